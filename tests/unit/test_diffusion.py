"""Diffusion: the schedule, the three predictions, the loss, DDPM and DDIM against closed forms."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from polymodal.backbones.unet1d import UNet1d, UNet1dConfig
from polymodal.heads.diffusion import diffusion_loss
from polymodal.nn.noise import Prediction, add_noise, sample_and_noise, squared_cosine, target
from polymodal.samplers.diffusion import Denoiser, ddim, ddpm

KINDS: tuple[Prediction, ...] = ("noise", "sample", "velocity")
LEFT = squared_cosine(100)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_schedule_is_the_cosine_of_the_paper() -> None:
    """Nichol & Dhariwal, equation 17: f(t) = cos((t / T + s) / (1 + s) * pi / 2) ** 2, s = 0.008, betas up to 0.999."""

    def f(t: float) -> float:
        return math.cos((t / 100 + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - f(n + 1) / f(n), 0.999) for n in range(100)]
    expected = torch.tensor([1 - beta for beta in betas], dtype=torch.float64).cumprod(0)
    torch.testing.assert_close(LEFT.double(), expected, rtol=1e-6, atol=0)
    assert float(LEFT[-1]) < 1e-6
    assert bool((LEFT.diff() < 0).all())


def test_the_schedule_has_numbers_wherever_a_model_is_made() -> None:
    squared_cosine.cache_clear()
    with torch.device("meta"):
        assert squared_cosine(10).device.type == "cpu"


@pytest.mark.parametrize("kind", KINDS)
def test_a_right_prediction_gives_sample_and_noise_back(kind: Prediction) -> None:
    x, noise, step = torch.randn(5, 3, 2), torch.randn(5, 3, 2), torch.tensor([0, 10, 50, 80, 95])
    noisy = add_noise(x, noise, step, LEFT)
    got = sample_and_noise(kind, target(kind, x, noise, step, LEFT), noisy, step, LEFT)
    torch.testing.assert_close(got, (x, noise), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_right_model_has_no_loss_and_leads_to_the_data(kind: Prediction) -> None:
    x = torch.rand(4, 6, 2) * 2 - 1

    def right(noisy: Tensor, step: Tensor) -> Tensor:
        share = LEFT[step].view(-1, 1, 1)
        noise = (noisy - share.sqrt() * x) / (1 - share).sqrt()
        return target(kind, x, noise, step, LEFT)

    assert diffusion_loss(right, x, left=LEFT, prediction=kind, generator=seeded()).mean < 1e-6
    noise = torch.randn(4, 6, 2)
    for sample in (partial(ddim, steps=10), partial(ddim, steps=100), partial(ddpm, steps=100, generator=seeded())):
        torch.testing.assert_close(sample(right, noise, left=LEFT, prediction=kind), x, atol=1e-4, rtol=0)


def test_what_is_masked_is_not_learned() -> None:
    x, mask = torch.randn(3, 4, 2), torch.ones(3, 4, 1, dtype=torch.bool)
    mask[0, 1:] = False
    seen = []

    def model(noisy: Tensor, step: Tensor) -> Tensor:
        seen.append(step)
        return torch.where(mask, noisy, torch.inf)

    loss = diffusion_loss(model, x, left=LEFT, mask=mask, generator=seeded())
    assert loss.weight == 18
    assert bool(loss.total.isfinite())
    assert 0 <= int(seen[0].min()) <= int(seen[0].max()) < 100


def gaussian(mean: float, std: float) -> Denoiser:
    """The best prediction of the noise on normal data."""

    def denoiser(noisy: Tensor, step: Tensor) -> Tensor:
        share = LEFT[step].view(-1, 1)
        total = share * std**2 + 1 - share
        return (1 - share).sqrt() * (noisy - share.sqrt() * mean) / total

    return denoiser


def test_ddpm_draws_from_the_data() -> None:
    noise = torch.randn(20_000, 1, generator=seeded())
    x = ddpm(gaussian(0.3, 0.2), noise, left=LEFT, steps=100, clip=None, generator=seeded(1))
    assert (float(x.mean()), float(x.std())) == pytest.approx((0.3, 0.2), abs=0.02)


def test_ddim_keeps_the_order_and_draws_from_the_data() -> None:
    # In double precision: the first steps divide by almost nothing.
    noise = torch.randn(20_000, 1, generator=seeded(), dtype=torch.float64).sort(0).values
    x = ddim(gaussian(0.3, 0.2), noise, left=LEFT, steps=100, clip=None)
    assert bool((x.diff(dim=0) >= 0).all())
    assert (float(x.mean()), float(x.std())) == pytest.approx((0.3, 0.2), abs=0.02)


def test_one_step_of_each_against_the_formulas() -> None:
    """From step 50 to 40: DDPM's posterior (Ho et al., equations 6 and 7), DDIM without noise (Song et al., 12)."""
    left = LEFT[[40, 50]]  # a schedule of these two, of which both are taken
    noise, predicted = torch.randn(3, 2, generator=seeded()), torch.randn(3, 2, generator=seeded(1))
    before, after = float(left[1]), float(left[0])
    x0 = ((noise - (1 - before) ** 0.5 * predicted) / before**0.5).clamp(-1, 1)
    calls = []

    def model(x: Tensor, step: Tensor) -> Tensor:
        calls.append(x)
        return predicted

    ddim(model, noise, left=left, steps=2)
    torch.testing.assert_close(calls[1], after**0.5 * x0 + (1 - after) ** 0.5 * predicted)
    calls.clear()
    ddpm(model, noise, left=left, steps=2, generator=seeded(2))
    beta = 1 - before / after
    mean = after**0.5 * beta / (1 - before) * x0 + (1 - beta) ** 0.5 * (1 - after) / (1 - before) * noise
    deviation = ((1 - after) / (1 - before) * beta) ** 0.5
    torch.testing.assert_close(calls[1], mean + deviation * torch.randn(3, 2, generator=seeded(2)))


@pytest.mark.gpu
def test_a_seed_means_the_same_on_every_device() -> None:
    here, there = (
        ddpm(lambda x, step: x, torch.zeros(2, 3, device=device), left=LEFT, steps=5, generator=seeded())
        for device in ("cpu", "cuda")
    )
    torch.testing.assert_close(there.cpu(), here)


def test_levels_of_one_width_halve_time_too() -> None:
    model = UNet1d(UNet1dConfig(widths=(8, 16, 16), kernel_size=3, step_dim=8), action_width=2, known_dim=3)
    assert model(torch.randn(2, 8, 2), torch.tensor([0, 7]), torch.randn(2, 3)).shape == (2, 8, 2)


def test_steps_are_spaced_from_zero() -> None:
    steps: list[int] = []

    def model(x: Tensor, step: Tensor) -> Tensor:
        steps.append(int(step[0]))
        return torch.zeros_like(x)

    ddim(model, torch.zeros(1, 1), left=LEFT, steps=10)
    assert steps == [90, 80, 70, 60, 50, 40, 30, 20, 10, 0]
    steps.clear()
    ddim(model, torch.zeros(1, 1), left=LEFT, steps=3)
    assert steps == [66, 33, 0]
