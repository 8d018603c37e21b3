"""The Cosmos tokenizer against diffusers: latents, films, gradients, files; and what only the discrete one has."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import polymodal
from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError, MediaError, UnsupportedError
from polymodal.core.verbs import PictureCodes
from polymodal.nn.skeleton import skeleton
from polymodal.systems.cosmos_tokenizer import PRESETS, CosmosTokenizer, read_hf, write_hf
from polymodal.tokenizers.fsq import CosmosCodes
from tests.nano import NANO
from tests.parity.harness import randomise

diffusers = pytest.importorskip("diffusers")
FILE = "diffusion_pytorch_model.safetensors"
FIELDS: dict[str, Any] = {
    "latent_channels": 4, "encoder_block_out_channels": (8, 12, 16, 16), "decode_block_out_channels": (8, 8, 12, 16),
    "attention_resolutions": (8,), "resolution": 32, "num_layers": 1, "latents_mean": [0.5, -0.25] * 2,
    "latents_std": [1.5] * 4,
}  # fmt: skip
CASES = {"8x8x8": (8, 8), "8x16x16": (8, 16), "4x8x8": (4, 8), "4x4x4": (4, 4)}
PROOF = "parity: latents, films, pictures, loss, first gradients, files both ways (diffusers)"


@pytest.fixture(params=[pytest.param(c, marks=pytest.mark.proves("cosmos_tokenizer", PROOF), id=c) for c in CASES])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[CosmosTokenizer, Any, Path]:
    torch.manual_seed(0)
    time, space = CASES[request.param]
    ratios = {"temporal_compression_ratio": time, "spatial_compression_ratio": space}
    reference = diffusers.AutoencoderKLCosmos(**FIELDS, **ratios).eval()
    randomise(reference)
    reference.save_pretrained(tmp_path)
    system = polymodal.load(tmp_path)
    assert isinstance(system, CosmosTokenizer)
    return system, reference, tmp_path


def test_latents_films_gradients(pair: tuple[CosmosTokenizer, Any, Path]) -> None:
    system, reference, folder = pair
    net = system.config.net
    film = torch.randn(2, 3, 1 + net.time, 32, 16)
    theirs = reference.encode(film).latent_dist.mode()
    torch.testing.assert_close(system.latents(film), theirs, rtol=1e-5, atol=1e-5)
    assert theirs.shape[2:] == system.grid(1 + net.time, 32, 16)
    expected = reference(film).sample
    torch.testing.assert_close(system(Batch(pixels=film)), expected, rtol=1e-5, atol=1e-5)
    picture = film[:, :, 0]
    torch.testing.assert_close(
        system(Batch(pixels=picture)), reference(picture[:, :, None]).sample[:, :, 0], rtol=1e-5, atol=1e-5
    )
    loss, other = system.loss(Batch(pixels=film)).mean, F.l1_loss(expected, film)
    torch.testing.assert_close(loss, other, rtol=1e-5, atol=1e-6)
    loss.backward()
    other.backward()
    mine = system.to_hub({name: p.grad for name, p in system.named_parameters()})  # type: ignore[misc]
    named = dict(reference.named_parameters())
    assert mine.keys() == named.keys()
    for name, parameter in named.items():
        assert parameter.grad is not None
        scale = max(1.0, float(parameter.grad.abs().max()))
        assert float((mine[name] - parameter.grad).abs().max()) <= 1e-5 * scale, name
    system.save(folder / "again")
    before, after = load_file(folder / FILE), load_file(folder / "again" / FILE)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = diffusers.AutoencoderKLCosmos.from_pretrained(folder / "again")
    assert dict(again.config)["latents_mean"] == FIELDS["latents_mean"]
    torch.testing.assert_close(again(film).sample, expected, rtol=0, atol=0)


def discrete() -> CosmosTokenizer:
    torch.manual_seed(0)
    model = polymodal.build(replace(NANO["cosmos_tokenizer"], codes=CosmosCodes(levels=(5, 4, 3))))
    assert isinstance(model, CosmosTokenizer)
    return model.eval()


@pytest.mark.proves("cosmos_tokenizer", "causal: the first frame is coded and painted as if it were alone")
def test_the_first_frame_is_alone() -> None:
    model = discrete()
    film = torch.rand(1, 3, 17, 16, 24) * 2 - 1
    latents = model.latents(film)
    assert latents.shape == (1, 3, 3, 2, 3)
    torch.testing.assert_close(latents[:, :, 0], model.latents(film[:, :, 0]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(latents[:, :, :2], model.latents(film[:, :, :9]), rtol=1e-5, atol=1e-5)
    later = film.clone()
    later[:, :, 9:] *= -1
    torch.testing.assert_close(model.latents(later)[:, :, :2], latents[:, :, :2], rtol=1e-5, atol=1e-5)
    assert (model.latents(later)[:, :, 2] - latents[:, :, 2]).abs().max() > 1e-4
    made = model.paint(latents)
    torch.testing.assert_close(made[:, :, 0], model.paint(latents[:, :, 0]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made[:, :, :9], model.paint(latents[:, :, :2]), rtol=1e-5, atol=1e-5)


@pytest.mark.proves("cosmos_tokenizer", "quantize and reconstruct: pictures and films; T = 1 + 8 k or it is refused")
def test_codes_of_pictures_and_films() -> None:
    model = discrete()
    assert isinstance(model, PictureCodes)
    assert model.codebook_size == 60
    film = torch.rand(2, 3, 9, 16, 8) * 2 - 1
    codes = model.quantize(film)
    assert codes.shape == (2, *model.grid(9, 16, 8)) == (2, 2, 2, 1)
    assert 0 <= int(codes.min()) <= int(codes.max()) < 60
    assert model.reconstruct(codes).shape == film.shape
    torch.testing.assert_close(model.reconstruct(codes), model(Batch(pixels=film)), rtol=1e-5, atol=1e-5)
    assert model.quantize(film[:, :, 0]).shape == (2, 2, 1)
    assert model.reconstruct(codes[:, 0]).shape == (2, 3, 16, 8)
    for frames in (2, 8, 10):
        with pytest.raises(MediaError, match=f"a film of {frames} frames.* take {1 + (frames - 1) // 8 * 8}$"):
            model.quantize(torch.zeros(1, 3, frames, 16, 16))
    with pytest.raises(MediaError, match="multiples of 8 pixels"):
        model.quantize(torch.zeros(1, 3, 9, 16, 12))


def test_a_continuous_tokenizer_has_no_codes(pair: tuple[CosmosTokenizer, Any, Path]) -> None:
    with pytest.raises(UnsupportedError, match="continuous tokenizer"):
        pair[0].quantize(torch.zeros(1, 3, 32, 32))
    assert pair[0].codebook_size == 0


@pytest.mark.proves("cosmos_tokenizer", "weights: total on names and shapes of full-size checkpoints")
@pytest.mark.parametrize("name", [name for name in PRESETS if "CV" in name])
def test_full_size(name: str) -> None:
    config = PRESETS[name]()
    raw = write_hf(config)
    assert read_hf(raw)[0] == config
    given = {field: value for field, value in raw.items() if not field.startswith("_")}
    with torch.device("meta"):
        reference = diffusers.AutoencoderKLCosmos(**given)
    with skeleton():
        ours = CosmosTokenizer(config)
    theirs = reference.state_dict()
    todo = ours.plan(ours.formats["hf"], theirs)
    assert todo.problems == []
    assert todo.dropped == {}
    shapes = {name: tuple(t.shape) for name, t in theirs.items()}
    assert {name: tuple(t.shape) for name, t in ours.to_hub(ours.state_dict()).items()} == shapes


def test_published_codes() -> None:
    config = PRESETS["nvidia/Cosmos-Tokenizer-DV8x16x16"]()
    assert config.codes is not None
    assert (config.codes.size, config.net.space, config.net.time) == (64_000, 16, 8)
    assert read_hf(json.loads(json.dumps(write_hf(config))))[0] == config


@pytest.mark.parametrize(
    "changes",
    [
        {"patch_type": "rearrange"}, {"patch_size": 3}, {"spatial_compression_ratio": 2}, {"out_channels": 4},
        {"encoder_block_out_channels": []}, {"decode_block_out_channels": [8, 8, 8]}, {"latents_mean": ["a"]},
        {"latents_std": None}, {"latents_std": [0.0] * 4}, {"levels": [1]}, {"scaling_factor": 0.5}, {"new": 1},
        dict.fromkeys(("patch_size", "spatial_compression_ratio", "temporal_compression_ratio"), 4096),
        {"in_channels": 2**20, "out_channels": 2**20},
    ],
)  # fmt: skip
def test_an_impossible_config_is_refused(changes: dict[str, Any]) -> None:
    good = {
        "_class_name": "AutoencoderKLCosmos",
        **{k: list(v) if isinstance(v, tuple) else v for k, v in FIELDS.items()},
    }
    read_hf(good)
    with pytest.raises(ConfigError):
        read_hf(good | changes)
