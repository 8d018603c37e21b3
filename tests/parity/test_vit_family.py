"""ViT, MAE and DINOv2 against their public implementations: outputs, loss, first gradients."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import polymodal
from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError, MediaError, WeightsError
from polymodal.systems.base import System
from tests.parity.harness import assert_parity, file_gradients, random_batch, save_reference

transformers = pytest.importorskip("transformers")

TOWER: dict[str, Any] = {
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "hidden_size": 32,
    "image_size": 20,
    "patch_size": 4,
}


def vit_reference(folder: Path, **fields: Any) -> Any:
    config = transformers.ViTConfig(**TOWER | {"intermediate_size": 56, "num_labels": 7} | fields)
    return save_reference(transformers.ViTForImageClassification(config), folder)


def mae_reference(folder: Path, **fields: Any) -> Any:
    decoder = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    config = transformers.ViTMAEConfig(
        **TOWER | {"intermediate_size": 56} | {f"decoder_{name}": value for name, value in decoder.items()} | fields
    )
    return save_reference(transformers.ViTMAEForPreTraining(config), folder)


def dinov2_reference(folder: Path, **fields: Any) -> Any:
    return save_reference(
        transformers.Dinov2Model(transformers.Dinov2Config(**TOWER | {"mlp_ratio": 2} | fields)), folder
    )


@pytest.mark.proves("vit", "parity: outputs, loss, first gradients (transformers)")
@pytest.mark.parametrize("fields", [{}, {"hidden_act": "gelu_pytorch_tanh", "qkv_bias": False, "num_channels": 1}])
def test_vit_matches_transformers(tmp_path: Path, fields: dict[str, Any]) -> None:
    reference = vit_reference(tmp_path, **fields)
    system = polymodal.load(tmp_path)
    assert_parity(system, reference, random_batch(system, 5), tmp_path / "grad")


@pytest.mark.proves("vit", "parity at other sizes (transformers)")
def test_vit_at_another_size(tmp_path: Path) -> None:
    reference = vit_reference(tmp_path)
    system = polymodal.load(tmp_path)
    batch = Batch(pixels=torch.randn(3, 3, 28, 16), labels=torch.tensor([0, 3, 6]))
    assert_parity(system, reference, batch, tmp_path / "grad", interpolate_pos_encoding=True)
    with pytest.raises(MediaError, match="whole number"):
        system(Batch(pixels=torch.randn(3, 3, 30, 16)))


def test_vit_keeps_its_labels(tmp_path: Path) -> None:
    names = {0: "crane", 1: "crane", 2: "a, b"}  # ImageNet, too, has two cranes
    vit_reference(tmp_path, num_labels=3, id2label=names, label2id={n: i for i, n in names.items()})
    system = polymodal.load(tmp_path)
    assert system.config.labels == ("crane", "crane", "a, b")
    assert polymodal.load(system.save(tmp_path / "again")).config == system.config


@pytest.mark.proves("mae", "parity: outputs, loss, first gradients (transformers)")
@pytest.mark.parametrize(
    "fields", [{"norm_pix_loss": True}, {"norm_pix_loss": False, "mask_ratio": 0.5, "qkv_bias": False}]
)
def test_mae_matches_transformers(tmp_path: Path, fields: dict[str, Any]) -> None:
    reference = mae_reference(tmp_path, **fields)
    system = polymodal.load(tmp_path)
    assert_parity(system, reference, random_batch(system, 5), tmp_path / "grad")


def test_mae_reads_the_names_of_published_files_and_writes_them(tmp_path: Path) -> None:
    reference = mae_reference(tmp_path)
    system = polymodal.load(tmp_path)
    system.save(tmp_path / "ours")
    again = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "ours")
    for (name, old), new in zip(reference.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(old, new), name
    batch = random_batch(system, 2)
    assert torch.equal(polymodal.load(tmp_path / "ours")(batch), system(batch))


@pytest.mark.proves("dinov2", "parity: outputs and first gradients with masked patches (transformers)")
@pytest.mark.parametrize("fields", [{}, {"use_swiglu_ffn": True, "qkv_bias": False}])
@pytest.mark.parametrize("size", [(20, 20), (12, 32)])
def test_dinov2_matches_transformers(tmp_path: Path, fields: dict[str, Any], size: tuple[int, int]) -> None:
    reference = dinov2_reference(tmp_path, **fields)
    system = polymodal.load(tmp_path)
    pixels = torch.randn(4, 3, *size)
    masked = torch.rand(4, size[0] * size[1] // 16) < 0.4
    expected = reference(pixel_values=pixels, bool_masked_pos=masked).last_hidden_state
    ours = system(Batch(pixels=pixels, masked=masked))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    direction = torch.randn_like(expected)
    for output in (ours, expected):
        (output * direction).mean().backward()
    theirs = file_gradients(reference, tmp_path / "grad")
    gradients = system.to_hub({name: p.grad for name, p in system.named_parameters()})
    assert gradients.keys() == theirs.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.proves("dinov2", "parity: outputs (transformers)")
def test_dinov2_verb_outputs_match(tmp_path: Path) -> None:
    reference = dinov2_reference(tmp_path)
    system = polymodal.load(tmp_path)
    batch = random_batch(system, 3)
    assert_parity(system, reference, batch, tmp_path / "grad")
    expected = torch.nn.functional.normalize(reference(pixel_values=batch["pixels"]).pooler_output, dim=-1)
    torch.testing.assert_close(system.encode(batch), expected, rtol=0, atol=1e-5)


REFERENCES = {"vit": vit_reference, "mae": mae_reference, "dinov2": dinov2_reference}


@pytest.fixture(params=REFERENCES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    REFERENCES[request.param](tmp_path)
    return tmp_path


def edit(folder: Path, **fields: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


def test_save_and_load_give_the_same_system(folder: Path) -> None:
    system = polymodal.load(folder)
    again = polymodal.load(system.save(folder / "again"))
    assert again.config == system.config
    assert system.state_dict().keys() == again.state_dict().keys()
    assert all(
        torch.equal(a, b) for a, b in zip(system.state_dict().values(), again.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_dropout_prob": 0.1}, "hidden_dropout_prob"),
        ({"new_field": 1}, "new_field"),
        ({"hidden_act": "swishy"}, "swishy"),
        ({"patch_size": [4, 4]}, "patch_size"),
        ({"num_attention_heads": 5}, "num_heads"),
    ],
)
def test_config_that_is_not_understood(folder: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        polymodal.load(edit(folder, **fields))


def test_config_of_another_size(folder: Path) -> None:
    with pytest.raises(WeightsError, match="missing from the checkpoint") as caught:
        polymodal.load(edit(folder, num_hidden_layers=4, image_size=24))
    assert any("position" in p for p in caught.value.problems)
    assert sum("blocks.3." in p for p in caught.value.problems) >= 16


def test_every_parameter_gets_a_gradient(folder: Path) -> None:
    system = polymodal.load(folder)
    assert isinstance(system, System)
    names = {name for name, p in system.named_parameters() if p.requires_grad}
    fixed = {name for name, p in system.named_parameters() if not p.requires_grad}
    assert fixed <= {"vision.position", "decoder.position"}
    assert names


def test_config_that_the_hub_cannot_hold(folder: Path) -> None:
    """Nothing is written that would load as another system."""
    system = polymodal.load(folder)
    for change in ({"pre_norm": True}, {"patch_bias": False}):
        config = replace(system.config, vision=replace(system.config.vision, **change))
        with pytest.raises(ConfigError, match="no field for something"):
            type(system).build(config).save(folder / "other")
        assert not (folder / "other" / "model.safetensors").exists()
