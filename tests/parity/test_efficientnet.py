"""EfficientNet against transformers' and under the names of three libraries' files."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from polymodal.core.errors import ConfigError, WeightsError
from polymodal.encoders.efficientnet import EfficientNet, EfficientNetConfig, Padding
from polymodal.encoders.efficientnet_files import Library, efficientnet_rules, load_efficientnet
from polymodal.nn.skeleton import skeleton
from polymodal.weights.rules import plan, to_theirs
from tests.parity.harness import file_gradients, save_reference

transformers = pytest.importorskip("transformers")

SMALL: dict[str, Any] = {"width": 0.5, "depth": 0.6, "drop_path": 0.0}


def reference(folder: Path, square: list[int]) -> Any:
    """A small model of transformers, its batch norms' averages random, too."""
    torch.manual_seed(0)
    config = transformers.EfficientNetConfig(
        width_coefficient=0.5, depth_coefficient=0.6, hidden_dim=640, drop_connect_rate=0.0, depthwise_padding=square
    )
    model = transformers.EfficientNetModel(config)
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    return save_reference(model, folder, 0.1)


# From 100 pixels, these blocks halve 25, 13 and 7: "same" pads odd sides alike before and behind.
@pytest.mark.proves("rt1", "parity: the tower's outputs and first gradients (transformers)")
@pytest.mark.parametrize(("padding", "square", "size"), [("open", [], 75), ("same", [3, 5, 9], 100), ("same", [], 64)])
@pytest.mark.parametrize("training", [False, True])
def test_matches_transformers(tmp_path: Path, padding: Padding, square: list[int], size: int, training: bool) -> None:
    theirs = reference(tmp_path / "model", square).train(training)
    ours = EfficientNet(EfficientNetConfig(**SMALL, padding=padding)).train(training)
    load_efficientnet(ours, tmp_path / "model")
    pixels = torch.randn(3, 3, size, size)
    outputs = [ours(pixels), theirs(pixels).last_hidden_state]
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-5)
    direction = torch.randn_like(outputs[0])
    for output in outputs:
        (output * direction).sum().backward()
    expected = file_gradients(theirs, tmp_path / "gradients")
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    rules = efficientnet_rules(ours.config, "transformers")
    todo = plan(rules, expected, ours.state_dict())
    assert not todo.problems
    found = {step.ours[0]: expected[step.theirs[0]] for step in todo.steps if step.ours[0] in gradients}
    assert found.keys() == gradients.keys() == dict(ours.named_parameters()).keys()
    assert max(float(g.abs().max()) for g in gradients.values()) > 1
    for name, gradient in gradients.items():
        scale = max(1.0, float(found[name].abs().max()))
        torch.testing.assert_close(gradient / scale, found[name] / scale, atol=1e-5, rtol=0, msg=name)


@pytest.mark.proves("rt1", "weights: an EfficientNet of transformers, timm or torchvision, total at full size")
def test_all_names_and_shapes_of_the_published_b3() -> None:
    config = transformers.EfficientNetConfig(
        width_coefficient=1.2, depth_coefficient=1.4, hidden_dim=1536, image_size=300, depthwise_padding=[5, 18]
    )
    with skeleton():
        theirs = transformers.EfficientNetForImageClassification(config).state_dict()
        ours = EfficientNet(EfficientNetConfig(), condition_dim=512)
    todo = plan(efficientnet_rules(ours.config, "transformers"), theirs, ours.state_dict())
    assert todo.problems == []
    assert set(todo.dropped) == {"classifier.weight", "classifier.bias"}
    assert set(todo.initialised) == {name for name in ours.state_dict() if name.startswith("films.")}
    tower = [p for name, p in ours.named_parameters() if not name.startswith("films.")]
    assert sum(p.numel() for p in tower) == 10_696_232  # as Keras counts B3 without its top


# Digests of the names and shapes that timm 1.0.31 (tf_efficientnet_b0, _b3) and torchvision 0.28 (efficientnet_b0, _b3)
# have, classifiers left out.
@pytest.mark.proves("rt1", "weights: an EfficientNet of transformers, timm or torchvision, total at full size")
@pytest.mark.parametrize(
    ("library", "width", "depth", "tensors", "digest"),
    [
        ("timm", 1.0, 1.0, 358, "2d41c859e24d15cd"),
        ("timm", 1.2, 1.4, 572, "34a30ad5dc13017d"),
        ("torchvision", 1.0, 1.0, 358, "188ac9aab15123a7"),
        ("torchvision", 1.2, 1.4, 572, "c32038d2327795a0"),
    ],
)
def test_names_and_shapes_of_other_libraries(
    library: Library, width: float, depth: float, tensors: int, digest: str
) -> None:
    with skeleton():
        tower = EfficientNet(EfficientNetConfig(width=width, depth=depth))
    names = to_theirs(efficientnet_rules(tower.config, library), tower.state_dict())
    lines = sorted(f"{name} {tuple(tensor.shape)}" for name, tensor in names.items())
    assert len(lines) == tensors
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize("library", ["transformers", "timm", "torchvision"])
def test_loads_what_it_wrote_and_leaves_film(tmp_path: Path, library: Library) -> None:
    torch.manual_seed(0)
    tower, other = (EfficientNet(EfficientNetConfig(**SMALL), condition_dim=8) for _ in range(2))
    tower.init_weights()
    names = to_theirs(efficientnet_rules(tower.config, library), tower.state_dict())
    assert not any("film" in name for name in names)
    save_file(names | {"classifier.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    before = {name: tensor.clone() for name, tensor in other.state_dict().items() if name.startswith("films.")}
    load_efficientnet(other, tmp_path, library)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, before[name] if name in before else tower.state_dict()[name]), name


def test_what_does_not_fit_is_refused_whole(tmp_path: Path) -> None:
    reference(tmp_path, [])
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["encoder.blocks.1.projection.project_conv.weight"] = torch.zeros(3, 3)
    tensors["unheard_of"] = tensors.pop("encoder.top_bn.running_var")
    save_file(tensors, tmp_path / "model.safetensors")
    tower = EfficientNet(EfficientNetConfig(**SMALL))
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    with pytest.raises(WeightsError) as error:
        load_efficientnet(tower, tmp_path)
    assert len(error.value.problems) == 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in tower.state_dict().items())
    with pytest.raises(WeightsError):
        load_efficientnet(tower, tmp_path, "timm")


@pytest.mark.parametrize(("padding", "side"), [("open", 9), ("same", 10), ("symmetric", 10)])
def test_grid_is_what_comes_out(padding: Padding, side: int) -> None:
    config = EfficientNetConfig(**SMALL, padding=padding)
    assert config.grid(300) == side
    tower = EfficientNet(config).eval()
    for height, width in ((64, 75), (33, 96), (101, 70)):
        with torch.no_grad():
            found = tower(torch.zeros(1, 3, height, width)).shape
        assert found == (1, config.dim, config.grid(height), config.grid(width))


def test_keras_initialisation() -> None:
    torch.manual_seed(0)
    tower = EfficientNet(EfficientNetConfig(**SMALL), condition_dim=8)
    tower.init_weights()
    last = tower.blocks[-1]
    for layer, fan_out in ((last.project.conv, 160), (last.depthwise.conv, 9), (tower.stem.conv, 16 * 9)):
        # What a normal of this deviation keeps when it is cut at two of them, and widened to keep its variance.
        assert float(layer.weight.detach().std()) == pytest.approx(math.sqrt(2 / fan_out), rel=0.1)
        assert float(layer.weight.detach().abs().max()) <= 2 * math.sqrt(2 / fan_out) / 0.8796 + 1e-6
    assert tower.films is not None
    assert not any(p.any() for p in tower.films.parameters())


@pytest.mark.parametrize("fields", [{"width": 0.0}, {"depth": -1.0}, {"drop_path": 1.0}])
def test_impossible_configs(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        EfficientNetConfig(**fields)
