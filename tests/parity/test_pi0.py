"""pi0 against transformers: velocities, loss, gradients, chunks, files; and its two stacks against one attention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file
from torch import Tensor

from polymodal import load
from polymodal.core.batch import Batch
from polymodal.core.errors import WeightsError
from polymodal.core.files import write_json
from polymodal.modalities.image import load_processor
from polymodal.systems.pi0 import PI0
from polymodal.systems.prefix import framed
from polymodal.weights.format import Reference
from tests.parity.harness import assert_parity, cases, compare_gradients, file_gradients, random_batch, save_reference

transformers = pytest.importorskip("transformers")

TEXT = {
    "model_type": "gemma", "vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TOWER = {
    "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "image_size": 28, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
VLM = {
    "model_type": "paligemma", "text_config": TEXT, "vision_config": TOWER, "projection_dim": 32,
    "image_token_index": 90,
}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "pi0": {
        "vlm_config": VLM, "dit_config": TEXT | {"hidden_size": 16, "intermediate_size": 24}, "chunk_size": 6,
        "max_state_dim": 5, "max_action_dim": 7,
    },
    "pi0, as wide, other times": {
        "vlm_config": VLM | {"image_token_index": 80}, "dit_config": TEXT | {"intermediate_size": 40},
        "chunk_size": 3, "max_state_dim": 4, "max_action_dim": 4, "num_inference_steps": 3,
        "time_sampling_beta_alpha": 2.0, "time_sampling_offset": 0.01, "time_sampling_scale": 0.99,
    },
}  # fmt: skip

# Not the class's own: a file of ours lacks a table that theirs has and never reads.
REFERENCE = Reference(
    package="transformers", cls="PI0ForConditionalGeneration", output="logits",
    inputs={
        "ids": "input_ids", "valid": "attention_mask", "pixels": "pixel_values", "seen": "pixel_attention_mask",
        "state": "state", "actions": "actions", "noise": "noise", "time": "timestep",
    },
)  # fmt: skip


@pytest.fixture(params=cases(dict.fromkeys(SIZES, "pi0")), scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PI0, Any, Path]:
    folder = tmp_path_factory.mktemp("reference")
    torch.manual_seed(0)
    config = transformers.PI0Config(**SIZES[request.param], attn_implementation="eager")
    reference = save_reference(transformers.PI0ForConditionalGeneration(config), folder, 0.2)
    model = load(folder)
    assert isinstance(model, PI0)
    model.reference = REFERENCE  # type: ignore[misc]
    return model, reference, folder


def ragged(model: PI0, cameras: tuple[int, ...] = (2, 1, 3), words: tuple[int, ...] = (5, 9, 3)) -> Batch:
    """Rows with some of three cameras and texts of several lengths, padded at the end."""
    c, generator = model.config, torch.Generator().manual_seed(3)
    rows = [
        [*[c.image_id] * (n * c.num_features), *torch.randint(3, 80, (m,), generator=generator).tolist()]
        for n, m in zip(cameras, words, strict=True)
    ]
    width = max(map(len, rows))
    batch = Batch(
        ids=torch.tensor([[*row, *[0] * (width - len(row))] for row in rows]),
        valid=torch.tensor([[i < len(row) for i in range(width)] for row in rows]),
        seen=torch.tensor([[i < n for i in range(3)] for n in cameras]),
    )
    spec = {name: each for name, each in model.inputs_spec().items() if name not in batch}
    return Batch(batch | {name: each.random(len(rows), generator) for name, each in spec.items()})


def theirs(batch: Batch) -> dict[str, Tensor]:
    return {theirs: batch[ours] for ours, theirs in REFERENCE.inputs.items() if ours in batch}


def test_velocity_loss_and_gradients(pair: tuple[PI0, Any, Path], tmp_path: Path) -> None:
    model, reference, _ = pair
    model.zero_grad()
    reference.zero_grad()
    assert_parity(model, reference, random_batch(model, 3), tmp_path)


def test_ragged_rows(pair: tuple[PI0, Any, Path], tmp_path: Path) -> None:
    """Texts of several lengths, and not every camera."""
    model, reference, _ = pair
    batch = ragged(model)
    model.zero_grad()
    reference.zero_grad()
    result = reference(**theirs(batch))
    torch.testing.assert_close(model(batch), result.logits, atol=1e-5, rtol=1e-5)
    loss = model.loss(batch).mean
    torch.testing.assert_close(loss, result.loss, atol=1e-5, rtol=1e-5)
    loss.backward()
    result.loss.backward()
    compare_gradients(model, file_gradients(reference, tmp_path))


def test_noise_and_times_that_are_drawn(pair: tuple[PI0, Any, Path]) -> None:
    """The loss of a lesson, which brings neither, is the reference's for what was drawn."""
    model, reference, _ = pair
    batch = random_batch(model, 64)
    given = Batch({name: tensor for name, tensor in batch.items() if name not in ("noise", "time")})
    torch.manual_seed(5)
    with torch.no_grad():
        loss = model.loss(given).mean
        torch.manual_seed(5)
        batch["noise"] = torch.randn(batch["actions"].shape)
        batch["time"] = model.config.times.draw(64, torch.device("cpu"))
        torch.testing.assert_close(loss, reference(**theirs(batch)).loss, atol=1e-5, rtol=1e-5)


def test_chunks(pair: tuple[PI0, Any, Path]) -> None:
    """All Euler steps from the same noise."""
    model, reference, _ = pair
    batch = ragged(model)
    inputs = {name: tensor for name, tensor in theirs(batch).items() if name not in ("actions", "timestep", "noise")}
    with torch.no_grad():
        noise = model.noise(batch, torch.Generator().manual_seed(2))
        expected = reference.sample_actions(**inputs, noise=noise)
        torch.testing.assert_close(model.chunk(batch, torch.Generator().manual_seed(2)), expected, atol=1e-5, rtol=1e-5)


def test_round_trip(pair: tuple[PI0, Any, Path], tmp_path: Path) -> None:
    """What we write is what the reference wrote, but for the expert's embeddings, which nothing reads."""
    model, reference, folder = pair
    model.save(tmp_path)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() - after.keys() == {"paligemma_with_expert.gemma_expert.lm_head.weight"}
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    assert model.formats["hf"].read(json.loads((tmp_path / "config.json").read_text()))[0] == model.config
    again = type(reference).from_pretrained(tmp_path, attn_implementation="eager").eval()
    batch = random_batch(model, 2)
    with torch.no_grad():
        assert torch.equal(again(**theirs(batch)).logits, reference(**theirs(batch)).logits)


def published(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of the published files: LeRobot's."""
    out = {}
    for name, tensor in tensors.items():
        new = name.replace("language_model.model.", "language_model.").replace("tower.", "tower.vision_model.")
        out[f"model.{new.replace('model.language_model.embed_tokens', 'lm_head')}"] = tensor
    return out


def test_names_of_the_published_files(pair: tuple[PI0, Any, Path], tmp_path: Path) -> None:
    """transformers and we read the same tensors out of them."""
    model, reference, folder = pair
    save_file(published(load_file(folder / "model.safetensors")), tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    ours, them = load(tmp_path), type(reference).from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in model.state_dict().items())
    batch = random_batch(model, 2)
    with torch.no_grad():
        torch.testing.assert_close(ours(batch), them(**theirs(batch)).logits, atol=1e-5, rtol=1e-5)


def test_a_file_without_embeddings_is_refused(pair: tuple[PI0, Any, Path], tmp_path: Path) -> None:
    folder = pair[2]
    tensors = load_file(folder / "model.safetensors")
    (name,) = [n for n in tensors if n.endswith("embed_tokens.weight")]
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(WeightsError, match=r"trunk\.embed_tokens"):
        load(tmp_path)


@pytest.mark.parametrize(
    "size", [(28, 28), (29, 28), (41, 30), (23, 77), (120, 33), (3, 300), (640, 480), (224, 224)], ids=str
)
@pytest.mark.proves("pi0", "parity: framed pictures, at odd sizes (openpi-client)")
def test_frames_equal_those_of_openpi(size: tuple[int, int], tmp_path: Path) -> None:
    tools = pytest.importorskip("openpi_client.image_tools")
    ours = framed(28)
    picture = np.random.default_rng(1).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    try:
        expected = tools.resize_with_pad(picture, 28, 28)
    except ValueError:  # theirs has a side of nothing
        assert min(size) * 28 < max(size)
        return
    pixels = ours.pixels([PILImage.fromarray(picture)])[0].permute(1, 2, 0).numpy()
    assert np.array_equal(pixels, expected)
    write_json(tmp_path / "preprocessor_config.json", ours.to_hf())
    assert load_processor(tmp_path) == ours
    view = ours.view(*size)
    corners = view.to_seen(torch.tensor([[0.0, 0.0], [float(size[0]), float(size[1])]]))
    inside = expected.any(2).nonzero()
    assert abs(float(corners[0, 0]) - inside[1].min()) <= 1
    assert abs(float(corners[1, 1]) - inside[0].max() - 1) <= 1
