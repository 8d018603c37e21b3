"""The certificate: a good checkpoint gets one, and what is wrong with a bad one is named."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import polymodal
from polymodal.core.errors import ConfigError
from polymodal.systems import TABLE, siglip
from polymodal.systems.clip import CLIP
from polymodal.tokenizers.text import TextTokenizer
from polymodal.verify import Certificate, Check, verify
from polymodal.weights.hub import shipped
from tests.nano import NANO, every_system, nano
from tests.parity.harness import randomise

transformers = pytest.importorskip("transformers")


@pytest.fixture
def folder(name: str, tmp_path: Path) -> Path:
    """A checkpoint in which no weight is zero, so that everything takes part in the outputs."""
    model = nano(name)
    randomise(model)
    return model.save(tmp_path / "model")


def outcomes(certificate: Certificate) -> dict[str, str]:
    return {check.name: check.outcome for check in certificate.checks}


def tampered(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    file = sorted(folder.rglob("*.safetensors"))[-1]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return folder


def configured(folder: Path, **fields: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


@every_system("certificate: outputs, loss and gradients agree with the reference to five digits", referenced=True)
def test_a_good_checkpoint(name: str, folder: Path) -> None:
    if name == "blip2_qformer":
        pytest.skip("a trained file of stage 1 holds what the reference has no place for; tests/parity/test_blip2.py")
    certificate = verify(folder)
    assert certificate.ok, certificate.text()
    assert certificate.problems == []
    checks = {check.name: check for check in certificate.checks}
    assert list(checks)[-3:] == ["output", "loss", "gradients"]
    for compared in ("output", "loss", "gradients"):
        check = checks[compared]
        if check.outcome == "passed":
            assert check.digits is not None
            assert check.digits >= 5, certificate.text()
    assert outcomes(certificate)["loss"] == ("passed" if TABLE[name].resolve().reference.loss else "not run")
    assert certificate.parameters > 10_000
    assert sum(certificate.dtypes.values()) == len(load_file(folder / "model.safetensors"))
    assert {"polymodal", "torch", "transformers", "Python", "on"} <= certificate.versions.keys()
    assert {"config.json", "model.safetensors"} <= certificate.files.keys()


def test_the_certificate_as_text_and_as_json(tmp_path: Path) -> None:
    certificate = verify(nano("siglip").save(tmp_path))
    raw = json.loads(json.dumps(certificate.to_json(), allow_nan=False))
    assert raw["ok"] is True
    assert raw["checks"][-1]["name"] == "gradients"
    assert raw["checks"][-1]["digits"] >= 5
    text = certificate.text()
    for word in ("Result: ok", "SigLIP", "digits agree", raw["files"]["model.safetensors"], "hidden_size: read"):
        assert word in text


@pytest.mark.parametrize("name", ["siglip"])
def test_tampered_weights_are_named(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["logit_skale"] = tensors.pop("logit_scale")
        tensors["vision_model.post_layernorm.weight"] = torch.ones(33)
        tensors["logit_bias"] = torch.zeros(1, dtype=torch.int64)
        tensors["text_model.head.bias"][3] = torch.nan
        tensors["text_model.head.weight"][1, 2:4] = torch.inf

    certificate = verify(tampered(folder, change))
    assert not certificate.ok
    assert outcomes(certificate) == {"config": "passed", "names, shapes, dtypes": "failed", "finite": "failed"}
    problems = "\n".join(certificate.problems)
    for expected in (
        "unexpected: logit_skale (1,)",
        "missing from the checkpoint: logit_scale",
        "vision_model.post_layernorm.weight gives (33,)",
        "wrong dtype: logit_bias is torch.int64",
        "text_model.head.bias has 1 values that are NaN or infinite",
        "text_model.head.weight has 2 values that are NaN or infinite",
    ):
        assert expected in problems
    assert "Result: NOT ok" in certificate.text()
    assert "Problems (6)" in certificate.text()


@every_system("certificate: NaN weights are found")
def test_nan_weights_are_found(name: str, folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        max(tensors.values(), key=lambda t: t.numel()).view(-1)[0] = torch.nan

    certificate = verify(tampered(folder, change))
    assert outcomes(certificate)["finite"] == "failed"
    assert not certificate.ok
    json.dumps(certificate.to_json(), allow_nan=False)


@pytest.mark.parametrize("name", ["siglip"])
def test_wrong_fields_are_named(folder: Path) -> None:
    certificate = verify(configured(folder, rope_theta=1e4, vision_config={"hidden_size": "wide", "patch_size": 0}))
    assert outcomes(certificate) == {"config": "failed"}
    assert certificate.system == "SigLIP"
    assert len(certificate.problems) == 4  # and a width that does not fit the default one
    assert all(any(word in p for p in certificate.problems) for word in ("rope_theta", "hidden_size", "patch_size"))
    assert "unreadable" not in certificate.text()


@pytest.mark.parametrize("name", ["siglip"])
def test_a_wrong_field_that_the_shapes_do_not_show_is_not_ours_alone(folder: Path) -> None:
    """Both read the same config, so a wrong number of heads agrees: what a certificate cannot know, its fields say."""
    config = json.loads((folder / "config.json").read_text())
    certificate = verify(configured(folder, text_config=config["text_config"] | {"num_attention_heads": 8}))
    assert certificate.ok
    assert certificate.config["config.json: text_config: num_attention_heads"] == "read"


@pytest.mark.parametrize("name", ["clip"])
def test_broken_files(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    assert outcomes(verify(folder)) == {"config": "passed", "files": "failed"}
    file.unlink()
    assert "no model.safetensors" in verify(folder).problems[0]
    file.write_bytes(whole)
    (folder / "preprocessor_config.json").write_text("{}")
    certificate = verify(folder)
    assert outcomes(certificate)["loading"] == "failed"
    assert "image_processor_type is missing" in certificate.problems[0]
    (folder / "config.json").write_text("{")
    certificate = verify(folder)
    assert outcomes(certificate) == {"config": "failed"}
    assert "unreadable" in certificate.text()


@pytest.mark.parametrize("name", ["clip"])
def test_a_tokenizer_with_more_ids_than_embeddings(folder: Path) -> None:
    TextTokenizer.train_bpe(["a red cup"] * 3, 520, length=8).save(folder)
    certificate = verify(folder)
    assert outcomes(certificate)["processors"] == "failed"
    assert "the model embeds 40" in certificate.problems[0]


def test_another_format_says_what_was_not_run(tmp_path: Path) -> None:
    config = NANO["clip"]
    same = {"activation": "gelu", "norm_eps": 1e-5}
    model = CLIP.build(replace(config, vision=replace(config.vision, **same), text=replace(config.text, **same)))
    certificate = verify(model.save(tmp_path / "open", format_name="open_clip"))
    assert certificate.ok
    assert certificate.format == "open_clip"
    assert outcomes(certificate)["reference"] == "not run"
    assert "does not read the format open_clip" in certificate.text()


def test_a_pipeline_is_hashed_part_by_part(tmp_path: Path) -> None:
    folder = nano("stable_diffusion").save(tmp_path / "model")
    (tmp_path / "secret.json").write_text("{}")
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").write_text("no part of it")
    index = json.loads((folder / "model_index.json").read_text()) | {"..": ["diffusers", "U"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    digests = [verify(folder).files]
    parts = {f"{part}/config.json" for part in ("text_encoder", "unet", "vae")}
    weights = {f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae")}
    others = {"model_index.json", "scheduler/scheduler_config.json", "text_encoder/model.safetensors"}
    assert digests[0].keys() == parts | weights | others

    def change(tensors: dict[str, Tensor]) -> None:
        next(iter(tensors.values())).add_(1)

    digests.append(verify(tampered(folder, change)).files)
    changed = {name for name in digests[0] if digests[0][name] != digests[1][name]}
    assert changed == {"vae/diffusion_pytorch_model.safetensors"}


def test_nothing_of_this_name() -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        verify("nothing")


@pytest.mark.parametrize("name", shipped())
def test_what_we_ship_is_certified(name: str) -> None:
    certificate = verify(name)
    assert certificate.ok, certificate.text()
    reference = polymodal.load(name).reference
    without = ["reference"] if reference is None else [] if reference.loss else ["loss"]
    assert [check.name for check in certificate.checks if check.outcome != "passed"] == without
    assert all(check.digits >= 5 for check in certificate.checks if check.digits is not None), certificate.text()


@pytest.mark.parametrize("name", ["siglip"])
@pytest.mark.parametrize(
    ("block", "reason"),
    [
        ("sys.modules['transformers'] = None", "transformers is not installed"),
        (
            "import types; m = sys.modules['transformers'] = types.ModuleType('transformers'); m.__spec__ = 1",
            "transformers.SiglipModel cannot be imported",
        ),
    ],
)
def test_without_the_reference_it_says_so(folder: Path, block: str, reason: str) -> None:
    script = f"import sys; {block}\nfrom polymodal.verify import verify\nprint(verify(sys.argv[1]).text())"
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=True)
    assert "not run  reference" in done.stdout
    assert reason in done.stdout
    assert "Result: ok" in done.stdout
    assert "digits agree" not in done.stdout


@pytest.mark.parametrize("name", ["siglip"])
def test_a_difference_from_the_reference_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: with another activation in ours than the file says, outputs and gradients are apart."""

    def wrong(raw: Any) -> Any:
        raw = json.loads(json.dumps(raw))
        raw["text_config"]["hidden_act"] = "relu"
        return siglip.read_hf(raw)

    formats = {"hf": replace(siglip.SigLIP.formats["hf"], read=wrong)}
    monkeypatch.setattr(siglip.SigLIP, "formats", formats)
    certificate = verify(folder)
    assert not certificate.ok
    assert outcomes(certificate)["output"] == "failed"
    assert outcomes(certificate)["gradients"] == "failed"


def test_digits() -> None:
    def digits(error: float | None) -> float | None:
        return Check(name="output", outcome="passed", error=error).digits

    assert [digits(e) for e in (0.0, 1e-5, 0.1, 1.0)] == [7.2, 5.0, 1.0, 0.0]
    assert digits(None) is None
    assert digits(float("nan")) is None
