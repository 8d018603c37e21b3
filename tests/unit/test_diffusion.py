"""Diffusion: the schedule, the three predictions, the loss, DDPM and DDIM against closed forms."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from polymodal.backbones.unet1d import UNet1d, UNet1dConfig
from polymodal.core.errors import ConfigError
from polymodal.heads.diffusion import diffusion_loss
from polymodal.nn.noise import (
    Prediction,
    Schedule,
    add_noise,
    linear,
    min_snr_weight,
    sample_and_noise,
    scaled_linear,
    squared_cosine,
    target,
    zero_terminal_snr,
)
from polymodal.samplers.diffusion import (
    DDIM,
    END,
    PLMS,
    Denoiser,
    Diffusion,
    DPMSolver,
    Euler,
    Heun,
    Solver,
    ddim,
    ddpm,
)
from polymodal.samplers.guidance import Dice, Guidance

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


# ---- schedules and weights


def test_schedules_of_latent_diffusion_and_ddpm() -> None:
    roots = [0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * n / 999 for n in range(1000)]
    expected = torch.tensor([1 - root**2 for root in roots], dtype=torch.float64).cumprod(0)
    torch.testing.assert_close(scaled_linear(0.00085, 0.012, 1000).double(), expected, rtol=1e-6, atol=0)
    even = torch.tensor([1 - (1e-4 + (0.02 - 1e-4) * n / 999) for n in range(1000)], dtype=torch.float64).cumprod(0)
    torch.testing.assert_close(linear(1e-4, 0.02, 1000).double(), even, rtol=1e-6, atol=0)
    assert torch.equal(Schedule().left, scaled_linear(0.00085, 0.012, 1000))
    assert torch.equal(Schedule(curve="squared_cosine", steps=100).left, LEFT)


def test_a_rescaled_schedule_ends_in_noise_alone_and_begins_as_it_did() -> None:
    left = zero_terminal_snr(Schedule().left)
    assert float(left[-1]) == 0
    assert float(left[0]) == pytest.approx(float(Schedule().left[0]), rel=1e-6)
    assert bool((left.diff() < 0).all())
    assert torch.equal(Schedule(zero_snr=True).left, left)


@pytest.mark.parametrize("how", [{"first": 0.0}, {"first": 0.5, "last": 0.1}, {"last": 1.0}, {"steps": 1}])
def test_schedules_that_add_no_more_noise_are_refused(how: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="more and more noise"):
        Schedule(**how)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="predict the velocity"):
        Diffusion(schedule=Schedule(zero_snr=True))


@pytest.mark.parametrize(
    "how",
    [
        {"last": 0.9}, {"last": 0.9, "zero_snr": True}, {"last": 0.2}, {"curve": "squared_cosine", "steps": 100_000},
        {"first": 1e-12},
    ],
)  # fmt: skip
def test_schedules_that_lose_the_signal_before_they_end_are_refused(how: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="some of the signal left before its last"):
        Schedule(**how)  # type: ignore[arg-type]


def test_steps_that_solvers_cannot_tell_apart_are_refused() -> None:
    """The last two of DDPM's rescaled schedule have less signal than the clock of a solver goes to."""
    way = Diffusion(
        schedule=Schedule(curve="linear", first=1e-4, last=0.02, zero_snr=True), prediction="velocity",
        solver=DPMSolver(), spacing="trailing",
    )  # fmt: skip
    noise = torch.randn(2, 3, generator=seeded())
    assert bool(way.sample(lambda x, when: x / 2, noise, way.points(100)).isfinite().all())
    with pytest.raises(ConfigError, match="999 steps, two of which have the same noise"):
        way.points(999)


def test_errors_of_all_predictions_weigh_as_that_of_the_sample() -> None:
    """The same error of the sample, said as that of the noise or of the velocity, has the same weight."""
    left, steps = Schedule().left, torch.arange(0, 1000, 77)
    share = left[steps].double()
    ratio = share / (1 - share)
    wanted = ratio.clamp(max=5)
    # An error of 1 of the sample is one of sqrt(ratio) of the noise, and of 1 / sqrt(1 - share) of the velocity.
    for kind, squared in (("sample", torch.ones_like(ratio)), ("noise", ratio), ("velocity", 1 / (1 - share))):
        weight = min_snr_weight(kind, steps, left).double() * squared  # type: ignore[arg-type]
        torch.testing.assert_close(weight, wanted, rtol=1e-5, atol=0)
    none = min_snr_weight("noise", torch.tensor([999]), Schedule(zero_snr=True).left)
    assert float(none) == 1


def test_weights_of_the_loss() -> None:
    x, step = torch.randn(3, 4, generator=seeded()), torch.tensor([5, 50, 95])
    noise = torch.randn(3, 4, generator=seeded(1))
    loss = diffusion_loss(lambda noisy, step: noisy * 0, x, left=LEFT, gamma=5.0, noise=noise, step=step)
    weight = min_snr_weight("noise", step, LEFT)
    torch.testing.assert_close(loss.total, (weight[:, None] * noise.square()).sum())
    assert loss.weight == 12


# ---- solvers


@pytest.mark.parametrize("solver", [DDIM(), Euler(), Heun(), DPMSolver(), PLMS()])
def test_solvers_agree_in_the_limit_and_those_of_second_order_get_there_sooner(solver: Solver) -> None:
    left = Schedule(steps=1000).left

    def model(x: Tensor, step: Tensor) -> Tensor:  # the noise in data of mean 0.3 and deviation 0.5
        share = left[step.long()].to(x.dtype).view(-1, 1)
        return (1 - share).sqrt() * (x - share.sqrt() * 0.3) / (share * 0.25 + 1 - share)

    noise = torch.randn(50, 1, generator=seeded(), dtype=torch.float64)
    share = float(left[-1])
    deviation = (share * 0.25 + 1 - share) ** 0.5
    exact = 0.3 + 0.5 * (noise - share**0.5 * 0.3) / deviation  # the flow of normal data keeps the order

    def error(solver: Solver, steps: int) -> float:
        way = Diffusion(solver=solver, spacing="linspace")
        return float((way.sample(model, noise, way.points(steps)) - exact).abs().max())

    assert error(solver, 100) < 0.2 * error(solver, 10)
    if isinstance(solver, Heun | DPMSolver | PLMS):
        assert error(solver, 20) < 0.75 * error(DDIM(), 20)


@pytest.mark.parametrize("solver", [DDIM(), Euler(), DPMSolver()])
def test_grids(solver: Solver) -> None:
    def grid(**how: object) -> list[float]:
        points = Diffusion(solver=solver, **how).points(4)  # type: ignore[arg-type]
        assert points[-1].when == END
        return [point.when for point in points[:-1]]

    spare = isinstance(solver, DPMSolver)
    assert grid(offset=1) == ([801, 601, 401, 201] if spare else [751, 501, 251, 1])
    assert grid(spacing="trailing") == [999, 749, 499, 249]
    assert grid(spacing="linspace") == ([999, 749, 500, 250] if spare else [999, 666, 333, 0])


@pytest.mark.parametrize(
    ("steps", "how"), [(0, {}), (1001, {}), (1000, {"offset": 1}), (1000, {"solver": DPMSolver()})]
)
def test_grids_that_are_not_there_are_refused(steps: int, how: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="steps"):
        Diffusion(**how).points(steps)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="an offset of 1000"):
        Diffusion(offset=1000)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loop_gives_policies_what_the_formulas_written_out_give_bit_for_bit(kind: Prediction) -> None:
    """What policies were trained to do must not change by a rounding."""
    mix = torch.randn(7, 7, generator=seeded())

    def model(x: Tensor, step: Tensor) -> Tensor:
        return torch.tanh(x @ mix + step.view(-1, 1, 1) / 50)

    for steps, clip in ((10, 1.0), (3, None)):
        noise = torch.randn(4, 5, 7, generator=seeded(1))
        x = y = noise
        draws, stride = seeded(2), 100 // steps
        for now in range((steps - 1) * stride, -1, -stride):
            at = torch.full((4,), now)
            before, after = float(LEFT[now]), float(LEFT[now - stride]) if now >= stride else 1.0
            sample, rest = sample_and_noise(kind, model(x, at), x, at, LEFT)
            x = after**0.5 * (sample if clip is None else sample.clamp(-clip, clip)) + (1 - after) ** 0.5 * rest
            sample, _ = sample_and_noise(kind, model(y, at), y, at, LEFT)
            sample, kept = sample if clip is None else sample.clamp(-clip, clip), before / after
            y = after**0.5 * (1 - kept) / (1 - before) * sample + kept**0.5 * (1 - after) / (1 - before) * y
            if now >= stride:
                deviation = ((1 - after) / (1 - before) * (1 - kept)) ** 0.5
                y = y + deviation * torch.randn(y.shape, generator=draws)
        assert torch.equal(ddim(model, noise, left=LEFT, steps=steps, prediction=kind, clip=clip), x)
        found = ddpm(model, noise, left=LEFT, steps=steps, prediction=kind, clip=clip, generator=seeded(2))
        assert torch.equal(found, y)


# ---- guidance and noise


def test_guidance() -> None:
    asked, against = torch.randn(3, 4, 5, generator=seeded()), torch.randn(3, 4, 5, generator=seeded(1))
    torch.testing.assert_close(Guidance(scale=1.0).mix(asked, against), asked)
    torch.testing.assert_close(Guidance(scale=0.0).mix(asked, against), against)
    guided = Guidance(scale=7.5).mix(asked, against)
    torch.testing.assert_close(guided, against + 7.5 * (asked - against))
    whole = Guidance(scale=7.5, rescale=1.0).mix(asked, against)
    torch.testing.assert_close(whole.std((1, 2)), asked.std((1, 2)))
    part = Guidance(scale=7.5, rescale=0.7).mix(asked, against)
    torch.testing.assert_close(part, 0.7 * whole + 0.3 * guided)
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    torch.testing.assert_close(part, rescale_noise_cfg(guided, asked, guidance_rescale=0.7))
    assert [Guidance(scale=2.0, interval=(0.2, 0.6)).at(p) for p in (0.0, 0.2, 0.6, 0.7)] == [False, True, True, False]
    assert not Guidance().at(0.5)


def test_rows_have_noise_of_their_own() -> None:
    three, cpu = Dice([4, 5, 6]), torch.device("cpu")
    first, second = three((2, 3), cpu), three((2, 3), cpu)
    alone = Dice([5])
    assert torch.equal(alone((2, 3), cpu)[0], first[1])
    assert torch.equal(alone((2, 3), cpu)[0], second[1])
    assert not torch.equal(first, second)
