"""VQGAN against transformers (the encoder, its codes, its files) and diffusers (all of it, with gradients)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import polymodal
from polymodal.core.errors import ConfigError, UnsupportedError, WeightsError
from polymodal.systems.vae_files import vae_rules
from polymodal.systems.vqgan import VQGAN, read_hf, write_hf
from polymodal.tokenizers.fsq import FiniteCodes
from polymodal.tokenizers.pyramid import PlainConfig, PyramidConfig
from polymodal.tokenizers.vae import VAEConfig
from polymodal.tokenizers.vq import AveragedCodes, LearnedCodes, VQConfig
from polymodal.weights.rules import plan, rule, to_theirs
from tests.parity.harness import randomise, save_reference

transformers = pytest.importorskip("transformers")

FIELDS: dict[str, Any] = {
    "embed_dim": 8, "num_embeddings": 40, "latent_channels": 16, "resolution": 32, "base_channels": 32,
    "channel_multiplier": [1, 2], "num_res_blocks": 1, "attn_resolutions": [16],
}  # fmt: skip


@pytest.fixture
def pair(tmp_path: Path) -> tuple[VQGAN, Any]:
    torch.manual_seed(0)
    config = transformers.ChameleonVQVAEConfig(**FIELDS)
    reference = transformers.models.chameleon.modeling_chameleon.ChameleonVQVAE(config)
    save_reference(reference, tmp_path)
    system = polymodal.load(tmp_path)
    assert isinstance(system, VQGAN)
    return system, reference


@pytest.mark.proves("vqgan", "parity: latents, codes, quantised vectors, losses, files both ways (transformers)")
@pytest.mark.parametrize("size", [(32, 32), (32, 48), (8, 4)])
def test_codes_are_those_of_transformers(pair: tuple[VQGAN, Any], size: tuple[int, int], tmp_path: Path) -> None:
    system, reference = pair
    pixels = torch.randn(2, 3, *size)
    with torch.no_grad():
        theirs = reference.encode(pixels)
        latents = system.codec.latents(pixels)
        coded = system.codec.quantizer(latents)
    expected = reference.quant_conv(theirs.last_hidden_state).detach()
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(system.quantize(pixels).flatten(), theirs.image_tokens.flatten())
    assert len(theirs.image_tokens.unique()) > 3 or size == (8, 4)
    torch.testing.assert_close(coded.x, theirs.quantized_last_hidden_state, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(coded.penalty, theirs.embedding_loss, rtol=1e-5, atol=1e-6)
    with pytest.raises(UnsupportedError, match="no decoder"):
        system.reconstruct(coded.codes)
    system.save(tmp_path / "again")
    before, after = load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = type(reference).from_pretrained(tmp_path / "again").eval()
    assert torch.equal(again.encode(pixels).image_tokens, theirs.image_tokens)


@pytest.mark.proves(
    "vqgan", "parity: pictures, losses and first gradients of encoder, codebook and decoder (diffusers)"
)
def test_all_of_it_is_that_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    reference = diffusers.VQModel(
        **kinds, block_out_channels=[16, 32], layers_per_block=1, latent_channels=6, num_vq_embeddings=20,
        vq_embed_dim=5, norm_num_groups=8, sample_size=16,
    ).eval()  # fmt: skip
    randomise(reference)
    net = PyramidConfig(widths=(16, 32), num_blocks=1, latent_dim=6, groups=8)
    codes = LearnedCodes(size=20, dim=5, commitment=1.0, codebook=0.25)
    model = VQGAN(VQConfig(net=net, codes=codes, resolution=16)).eval()
    rules = [r for r in vae_rules("", "codec.", VAEConfig(pyramid=net)) if "mix" not in r.ours[0]]
    rules += [rule(f"{n}.{{p}}", f"codec.{n}.{{p}}") for n in ("quant_conv", "post_quant_conv")]
    rules.append(rule("quantize.embedding.weight", "codec.quantizer.entries.weight"))
    theirs = reference.state_dict()
    todo = plan(rules, theirs, model.state_dict())
    assert todo.problems == []
    model.load_state_dict(dict(todo.tensors(theirs.__getitem__, "VQModel")))
    pixels, direction = torch.randn(2, 3, 16, 24), torch.randn(2, 3, 16, 24)
    made, coded = model.through(pixels)
    out = reference(pixels)
    torch.testing.assert_close(made, out.sample, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(coded.penalty, out.commit_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.reconstruct(model.quantize(pixels)), made, rtol=1e-5, atol=1e-5)
    ((made * direction).mean() + coded.penalty).backward()
    ((out.sample * direction).mean() + out.commit_loss).backward()
    mine = to_theirs(rules, {name: p.grad for name, p in model.named_parameters()})  # type: ignore[misc]
    for name, parameter in reference.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(mine[name], parameter.grad, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "config",
    [
        VQConfig(net=PyramidConfig(widths=(8, 16), num_blocks=1, groups=4), codes=AveragedCodes(size=9, dim=3)),
        VQConfig(net=PlainConfig(latent_dim=8), codes=FiniteCodes(levels=(4, 3)), resolution=16),
        VQConfig(net=PlainConfig(latent_dim=8), codes=LearnedCodes(size=7, dim=3), resolution=16, paints=False),
    ],
)
def test_our_own_fields(config: VQConfig, tmp_path: Path) -> None:
    assert read_hf(json.loads(json.dumps(write_hf(config))))[0] == config
    torch.manual_seed(0)
    model = VQGAN.build(config).eval()
    loaded = polymodal.load(model.save(tmp_path))
    pixels = torch.randn(1, 3, 16, 16)
    assert isinstance(loaded, VQGAN)
    assert torch.equal(loaded.quantize(pixels), model.quantize(pixels))


def test_a_decoder_is_declared(tmp_path: Path) -> None:
    """A file with one needs the word of its config: nothing is guessed from the names."""
    net = PyramidConfig(widths=(32,), num_blocks=1)
    model = VQGAN.build(VQConfig(net=net, codes=LearnedCodes(size=9, dim=4), resolution=8))
    model.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"has_decoder": False}))
    with pytest.raises(WeightsError, match="decoder"):
        polymodal.load(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"double_latent": True}, {"dropout": 0.1}, {"base_channels": 33}, {"channel_multiplier": []},
        {"attn_type": "linear"}, {"resolution": 33}, {"codebook": "finite", "levels": [1]}, {"net": "vit"},
    ],
)  # fmt: skip
def test_an_impossible_config_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        read_hf({"model_type": "chameleon_vqgan", **FIELDS, **changes})
