"""DiT and MMDiT begin as the identity; steps, labels, places and patches are the papers'; learned variances."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from polymodal.backbones.dit import DiTBackbone, DiTBackboneConfig
from polymodal.backbones.mmdit import CentreCrop, DoubleBlock, MMDiT, MMDiTConfig, SingleBlock, grid_positions
from polymodal.core.errors import ConfigError, MediaError
from polymodal.heads.variational import learned_variance, variance_bound
from polymodal.nn.modulation import Modulation
from polymodal.nn.norm import RMS
from polymodal.nn.patches import pack, unpack
from polymodal.nn.rope import AxialRope, rotate
from polymodal.nn.time import step_waves

DIT = DiTBackboneConfig(
    latent_size=8, patch_size=2, channels=4, out_channels=8, dim=16, num_layers=2, num_heads=2, hidden_dim=64,
    num_classes=5,
)  # fmt: skip
SD3 = MMDiTConfig(
    values=16, out_values=16, dim=16, num_layers=2, num_heads=2, hidden_dim=32, context_dim=12, pooled_dim=6,
    position=CentreCrop(side=6, base=4),
)  # fmt: skip
SD35 = replace(SD3, qk_norm=RMS(), extra_attention=1)
FLUX = replace(SD3, position=AxialRope(dims=(2, 2, 4)), num_single_layers=1, qk_norm=RMS(), guidance=True)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def started(model: DiTBackbone | MMDiT) -> Any:
    torch.manual_seed(0)
    model.init_weights()
    return model


def everything(model: MMDiT) -> dict[str, Any]:
    guidance = torch.tensor([3.5, 1.0]) if model.config.guidance else None
    return {
        "patches": noise(2, 6, 16), "grid": (2, 3), "text": noise(2, 5, 12), "pooled": noise(2, 6),
        "t": torch.tensor([0.2, 0.9]), "guidance": guidance,
    }  # fmt: skip


# -- the start


@pytest.mark.parametrize("config", [DIT, SD3, SD35, FLUX], ids=["dit", "sd3", "sd35", "flux"])
def test_a_new_model_says_nothing(config: DiTBackboneConfig | MMDiTConfig) -> None:
    """Every gate is exactly zero, every block the identity, the output zero; there is something to learn."""
    model = started(DiTBackbone(config) if isinstance(config, DiTBackboneConfig) else MMDiT(config))
    for module in model.modules():
        if isinstance(module, Modulation):
            assert not any(part.any() for part in module(noise(2, 1, config.dim)))
    x, condition = noise(2, 6, 16), noise(2, 1, 16, seed=1)
    for block in model.blocks:
        if isinstance(block, DoubleBlock):
            text = noise(2, 5, 16, seed=2)
            angles = None
            if isinstance(config.position, AxialRope):
                angles = config.position.angles(grid_positions(5, 2, 3, device=x.device).expand(2, -1, -1))
            after, text_after = block(x, text, condition, condition, angles)
            assert torch.equal(after, x)
            assert torch.equal(text_after, text)
        else:
            assert torch.equal(block(x, condition), x)
    if isinstance(model, MMDiT):
        for block in model.single_blocks:
            assert isinstance(block, SingleBlock)
            assert torch.equal(block(x, condition, None), x)
        out = model(**everything(model))
    else:
        out = model(noise(2, 4, 8, 8), torch.tensor([3.0, 700.0]), torch.tensor([1, 5]))
    assert not out.any()
    (out - 1).square().mean().backward()
    assert model.out.weight.grad.any()
    assert model.out.bias.grad.any()


def test_the_rest_starts_as_in_the_official_code() -> None:
    model = started(DiTBackbone(replace(DIT, dim=128, hidden_dim=512)))
    attention, mlp = model.blocks[0].attn, model.blocks[0].mlp
    fused = math.sqrt(6 / (4 * 128))  # q, k and v are one matrix there
    for layer, bound in (
        (attention.q_proj, fused), (attention.v_proj, fused), (attention.o_proj, math.sqrt(6 / 256)),
        (mlp.up_proj, math.sqrt(6 / 640)), (model.patch_embed, math.sqrt(6 / 144)),
    ):  # fmt: skip
        assert 0.97 * bound < layer.weight.abs().max() <= bound
        assert not layer.bias.any()
    for table in (model.labels.weight, model.time.up_proj.weight, model.time.down_proj.weight):
        assert 0.018 < table.std() < 0.022


# -- what is told


def test_steps_as_waves() -> None:
    """As the official code computes them, in numpy; diffusers' DiT reaches the last frequency."""
    t = torch.tensor([0.0, 1.0, 371.5, 999.0])
    for gap in (0, 1):
        frequencies = np.exp(-math.log(10_000) * np.arange(128) / (128 - gap))
        angle = t.numpy()[:, None].astype(np.float64) * frequencies
        expected = np.concatenate([np.cos(angle), np.sin(angle)], 1)
        # An angle of up to 1,000 has 6e-5 between its neighbours in fp32, and is rounded more than once.
        np.testing.assert_allclose(step_waves(t, 256, gap=gap).numpy(), expected, rtol=0, atol=2e-4)
    assert math.isclose(1 / frequencies[-1], 10_000)


def test_no_class_is_the_last_row_and_other_sizes_are_refused() -> None:
    model = DiTBackbone(DIT)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    x, step = noise(1, 4, 8, 8), torch.tensor([10.0])
    classes = torch.cat([model(x, step, torch.tensor([label])) for label in range(6)])
    assert len({tuple(row.flatten().tolist()) for row in classes}) == 6
    with pytest.raises(MediaError, match="made for 8 x 8"):
        model(noise(1, 4, 8, 16), step, torch.tensor([0]))


def test_places_are_the_middle_of_the_table() -> None:
    model = started(MMDiT(SD3))
    table = model.position.view(6, 6, 16)
    assert torch.equal(model.places(2, 3), table[2:4, 1:4].flatten(0, 1))
    assert torch.equal(model.places(6, 6), model.position)
    # Places are base / side apart: the sixth is where the fourth of a table of 4 would be.
    assert torch.allclose(table[3, 3], torch.from_numpy(_sincos(2.0, 2.0, 16)).float(), atol=1e-6)
    with pytest.raises(MediaError, match="7 x 2"):
        model.places(2, 7)


def _sincos(x: float, y: float, dim: int) -> Any:
    omega = 1 / 10_000 ** (np.arange(dim // 4) / (dim // 4))
    return np.concatenate([np.sin(x * omega), np.cos(x * omega), np.sin(y * omega), np.cos(y * omega)])


def test_packing_is_undone() -> None:
    x = noise(2, 3, 4, 6)
    assert torch.equal(unpack(pack(x, 2), 2, 4, 6), x)
    assert torch.equal(pack(x, 2)[0, 1], x[0, :, 0:2, 2:4].flatten())


def test_axes_turn_dimensions_of_their_own() -> None:
    """Attention sees differences of places, axis by axis; text at (0, 0, 0) is not turned."""
    rope = AxialRope(dims=(2, 2, 4))
    q, k = noise(1, 1, 1, 8), noise(1, 1, 1, 8, seed=1)

    def score(first: list[int], second: list[int]) -> float:
        turned = [rotate(x, *rope.angles(torch.tensor([[place]]))) for x, place in ((q, first), (k, second))]
        return float((turned[0] * turned[1]).sum())

    assert score([0, 0, 0], [0, 0, 0]) == pytest.approx(float((q * k).sum()))
    for axis in range(3):
        near, far = [0, 3, 5], [0, 3, 5]
        far[axis] += 2
        moved = [place + 7 for place in near], [place + 7 for place in far]
        assert score(near, far) == pytest.approx(score(*moved), abs=1e-5)
        assert score(near, far) != pytest.approx(score(near, near), abs=1e-3)


def test_conditions_reach_every_patch() -> None:
    """Text, its vector, time, guidance and the other patches: each changes all that comes out."""
    for config in (SD3, SD35, FLUX):
        model = started(MMDiT(config))
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        told = everything(model)
        before = model(**told)
        for name, value in told.items():
            if isinstance(value, Tensor):
                other = value * 0.5
                if value.ndim > 1:
                    other = value.clone()
                    other[:, 0] += 1
                changed = model(**told | {name: other})
                assert ((changed - before).abs().amax(2) > 1e-4).all(), (config, name)


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (DIT, {"num_heads": 3}), (DIT, {"latent_size": 9}), (DIT, {"out_channels": 5}), (SD3, {"num_heads": 3}),
        (FLUX, {"position": AxialRope(dims=(2, 2, 2))}), (SD3, {"extra_attention": 3}),
    ],
)  # fmt: skip
def test_impossible_configs_are_refused(config: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        replace(config, **fields)


# -- variances


ADDED = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)


def test_variances_lie_between_the_posteriors_and_what_is_added() -> None:
    step = torch.tensor([0, 1, 500, 999])
    left = (1 - ADDED).cumprod(0)
    low = learned_variance(-torch.ones(4, 2), step, ADDED).exp()
    high = learned_variance(torch.ones(4, 2), step, ADDED).exp()
    torch.testing.assert_close(high[:, 0].double(), ADDED[step], rtol=1e-5, atol=0)
    posterior = ADDED[500] * (1 - left[499]) / (1 - left[500])
    torch.testing.assert_close(low[2, 0].double(), posterior, rtol=1e-5, atol=0)
    assert torch.equal(low[0], low[1])  # the first step has none: it takes the second's


def test_the_bound_is_the_divergence_of_two_normal_distributions() -> None:
    """By torch's own, in fp64; at the first step, what it costs to say a value of 256."""
    x, true_noise, guessed, said = (noise(3, 5, seed=s).double().clamp(-1, 1) for s in range(4))
    step = torch.tensor([1, 400, 999])
    left = (1 - ADDED).cumprod(0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), left[:-1]])
    share = left[step, None]
    noisy = share.sqrt() * x + (1 - share).sqrt() * true_noise
    got = variance_bound(x, noisy, guessed, said, step, ADDED)

    def back(data: Tensor) -> Tensor:
        added, b = ADDED[step, None], before[step, None]
        return (added * b.sqrt() * data + (1 - b) * (1 - added).sqrt() * noisy) / (1 - share)

    deviation = (ADDED[step] * (1 - before[step]) / (1 - left[step])).sqrt()[:, None]
    true = torch.distributions.Normal(back(x), deviation)
    seen = (noisy - (1 - share).sqrt() * guessed) / share.sqrt()
    model = torch.distributions.Normal(back(seen), (0.5 * learned_variance(said, step, ADDED)).exp())
    expected = torch.distributions.kl_divergence(true, model).mean(1) / math.log(2)
    torch.testing.assert_close(got, expected.float(), rtol=1e-6, atol=0)

    first = torch.zeros(3, dtype=torch.long)
    share = left[first, None]
    noisy = share.sqrt() * x + (1 - share).sqrt() * true_noise
    levels = (x * 127.5 + 127.5).round() / 127.5 - 1
    got = variance_bound(levels, noisy, guessed, said, first, ADDED)
    seen = (noisy - (1 - share).sqrt() * guessed) / share.sqrt()
    normal = torch.distributions.Normal(seen, (0.5 * learned_variance(said, first, ADDED)).exp())
    upper = torch.where(levels > 0.999, 1.0, normal.cdf(levels + 1 / 255))
    lower = torch.where(levels < -0.999, 0.0, normal.cdf(levels - 1 / 255))
    expected = -(upper - lower).clamp(min=1e-12).log().mean(1) / math.log(2)
    # The official distribution function is approximate.
    torch.testing.assert_close(got, expected.float(), rtol=0.02, atol=0.05)


def test_the_bound_teaches_the_variance_alone() -> None:
    x, guessed, said = noise(2, 4), noise(2, 4, seed=1).requires_grad_(), noise(2, 4, seed=2).requires_grad_()
    variance_bound(x, x, guessed, said, torch.tensor([0, 300]), ADDED).sum().backward()
    assert guessed.grad is None
    assert said.grad is not None
    assert said.grad.all()
