"""MAE's published facts, one by one, against recomputations of a few lines."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError, MediaError
from polymodal.encoders.vit import ViTConfig
from polymodal.heads.reconstruction import PatchDecoderConfig, patch_norm, patchify, unpatchify
from polymodal.systems.mae import MAE, MAEConfig
from polymodal.train import fit
from recipes.nano import mae as recipe

CONFIG = MAEConfig(
    vision=ViTConfig(image_size=16, patch_size=4, dim=16, num_layers=2, num_heads=2, hidden_dim=32),
    decoder=PatchDecoderConfig(dim=8, num_layers=1, num_heads=2, hidden_dim=16),
)


@pytest.fixture
def model() -> MAE:
    return MAE.build(CONFIG).eval()


def test_patches_are_rows_then_columns_then_channels() -> None:
    pixels = torch.randn(2, 3, 8, 12)
    patches = patchify(pixels, 4)
    assert patches.shape == (2, 6, 48)
    torch.testing.assert_close(patches[1, 4], pixels[1, :, 4:8, 4:8].permute(1, 2, 0).reshape(-1))
    assert torch.equal(unpatchify(patches, 4, 8, 12), pixels)


def test_targets_are_normalised_patch_by_patch() -> None:
    patches = torch.randn(2, 5, 48) * 7 + 3
    normed = patch_norm(patches)
    torch.testing.assert_close(normed.mean(-1), torch.zeros(2, 5), rtol=0, atol=1e-5)
    torch.testing.assert_close(normed.std(-1), torch.ones(2, 5), rtol=1e-4, atol=0)  # unbiased
    assert torch.equal(patch_norm(torch.full((1, 1, 48), 0.5)), torch.zeros(1, 1, 48))  # flat: no division by zero


@pytest.mark.proves("mae", "a shuffle per sample keeps 25 %; the encoder sees no mask tokens and nothing masked")
def test_shuffle_keeps_a_quarter_of_each_sample(model: MAE) -> None:
    noise = torch.rand(6, 16)
    keep, restore, masked = model.shuffle(noise)
    assert keep.shape == (6, 4)
    assert (masked.sum(1) == 12).all()
    assert len({tuple(row.tolist()) for row in keep}) > 1
    for row in range(6):
        assert set(keep[row].tolist()) == set((~masked[row]).nonzero().flatten().tolist())
        assert keep[row].tolist() == noise[row].argsort()[:4].tolist()
        # Patch i is number restore[i] of the visible patches, then the masked ones.
        assert keep[row].tolist() == [int((restore[row] == i).nonzero()) for i in range(4)]
    lengths: list[int] = []
    model.vision.blocks[0].register_forward_hook(lambda module, args, out: lengths.append(args[0].shape[1]))
    pixels = torch.randn(6, 3, 16, 16)
    model(Batch(pixels=pixels, noise=noise))
    assert lengths == [1 + 4]


@pytest.mark.proves("mae", "predictions do not depend on masked pixels; the loss counts masked patches only")
def test_loss_is_of_masked_patches_only(model: MAE) -> None:
    batch = Batch(pixels=torch.randn(3, 3, 16, 16), noise=torch.rand(3, 16))
    masked = model.shuffle(batch["noise"]).masked
    predicted = model(batch)
    loss = model.loss(batch)
    assert loss.weight == 3 * 12
    target = patch_norm(patchify(batch["pixels"], 4))
    torch.testing.assert_close(loss.mean, (predicted - target)[masked].square().mean())

    grid = masked.reshape(3, 1, 4, 1, 4, 1).expand(3, 3, 4, 4, 4, 4).reshape(3, 3, 16, 16)
    other = Batch(batch | {"pixels": torch.where(grid, torch.randn(3, 3, 16, 16), batch["pixels"])})
    torch.testing.assert_close(model(other), predicted)
    assert not torch.isclose(model.loss(other).mean, loss.mean)


def test_without_noise_each_call_draws_its_own(model: MAE) -> None:
    batch = Batch(pixels=torch.randn(2, 3, 16, 16))
    torch.manual_seed(1)
    first, second = model.loss(batch).total, model.loss(batch).total
    torch.manual_seed(1)
    assert first != second
    assert torch.equal(first, model.loss(batch).total)


def test_raw_targets() -> None:
    model = MAE.build(replace(CONFIG, norm_targets=False))
    batch = Batch(pixels=torch.randn(2, 3, 16, 16), noise=torch.rand(2, 16))
    error = (model(batch) - patchify(batch["pixels"], 4))[model.shuffle(batch["noise"]).masked]
    torch.testing.assert_close(model.loss(batch).mean, error.square().mean())


@pytest.mark.proves("mae", "fixed sin-cos positions in both Transformers, Xavier and N(0, 0.02) initialisation")
def test_initialisation() -> None:
    big = MAEConfig(
        vision=replace(CONFIG.vision, dim=128, num_heads=4, hidden_dim=256), decoder=replace(CONFIG.decoder, dim=64)
    )
    model = MAE.build(big)
    for position, dim in ((model.vision.position, 128), (model.decoder.position, 64)):
        assert not position.requires_grad
        assert not position[0].any()
        # Row 1 + 4 y + x: sines of x, cosines of x, then the same of y.
        quarter = dim // 4
        angle = 10000.0 ** (-torch.arange(quarter) / quarter)
        x, y = 2 * angle, 3 * angle
        torch.testing.assert_close(position[1 + 4 * 3 + 2], torch.cat([x.sin(), x.cos(), y.sin(), y.cos()]))
    block = model.vision.blocks[0]
    for layer, bound in (
        (block.attn.q_proj, math.sqrt(6 / (4 * 128))),  # as one fused matrix of 3 dim rows
        (block.attn.o_proj, math.sqrt(6 / (2 * 128))),
        (block.mlp.up_proj, math.sqrt(6 / (128 + 256))),
        (model.decoder.embed, math.sqrt(6 / (128 + 64))),
    ):
        assert 0.97 * bound < float(layer.weight.detach().abs().max()) <= bound
        assert not layer.bias.any()
    patch = model.vision.patch_embed.weight
    bound = math.sqrt(6 / (48 + 128))
    assert 0.97 * bound < float(patch.detach().abs().max()) <= bound
    assert float(model.vision.class_token.detach().std()) == pytest.approx(0.02, rel=0.25)
    assert float(model.decoder.mask_token.detach().std()) == pytest.approx(0.02, rel=0.35)


def test_everything_that_trains_gets_a_gradient(model: MAE) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.loss(Batch(pixels=torch.randn(3, 3, 16, 16))).total.backward()
    without = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == {"vision.position", "decoder.position"}


def test_encode_reads_the_whole_picture(model: MAE) -> None:
    pixels = torch.randn(2, 3, 16, 24)  # not the native size: positions are resized
    vectors = model.encode(Batch(pixels=pixels))
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))
    tokens = model.vision(pixels).x
    assert tokens.shape == (2, 1 + 24, 16)
    torch.testing.assert_close(vectors, torch.nn.functional.normalize(tokens[:, 1:].mean(1), dim=-1))
    with pytest.raises(MediaError, match="16 x 16"):
        model.loss(Batch(pixels=pixels))


@pytest.mark.parametrize(
    "change",
    [{"mask_ratio": 1.0}, {"mask_ratio": 0.0}, {"vision": replace(CONFIG.vision, image_size=18)}],
)
def test_impossible_configs(change: dict) -> None:
    with pytest.raises(ConfigError):
        replace(CONFIG, **change)


def test_config_that_the_hub_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="norm_eps"):
        MAE.build(replace(CONFIG, decoder=replace(CONFIG.decoder, norm_eps=1e-5))).save(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_the_recipe_trains(tmp_path: Path) -> None:
    run = recipe.run(steps=2)
    stage = replace(run.stages[0], batch_size=8, workers=0)
    result = fit(replace(run, stages=[stage], evaluate=None, expect={}), tmp_path, device="cpu")
    assert result.finished
    assert isinstance(result.model, MAE)
