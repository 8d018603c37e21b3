"""Each solver's whole trajectory, and the grid of its steps, against diffusers' schedulers."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from polymodal.nn.noise import Prediction, Schedule
from polymodal.samplers.diffusion import DDIM, DDPM, PLMS, Diffusion, DPMSolver, Euler, Heun, Point, Solver, Spacing
from polymodal.samplers.flow import Dynamic, Flow, Sampling

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of diffusers, with numpy 2
NAMES: dict[Prediction, str] = {"noise": "epsilon", "sample": "sample", "velocity": "v_prediction"}
LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHAPE, STEPS = (2, 4, 5, 3), 10
MIX = torch.randn(4, 4, generator=torch.Generator().manual_seed(9)) / 2


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model(x: Tensor, when: Tensor) -> Tensor:
    """A fixed network that looks at the step and mixes channels."""
    when = when.to(x.dtype).view(-1, 1, 1, 1) / 1000
    return torch.einsum("oc,bchw->bohw", MIX.to(x.dtype), x).tanh() * (1.5 - when) + 0.3 * when


def theirs(scheduler: Any, scale: float = 1.0, **how: Any) -> tuple[list[float], list[Tensor]]:
    """The steps that diffusers takes and what stands before each and at the end, as its models read it."""
    scheduler.set_timesteps(STEPS, **how)
    x = torch.randn(SHAPE, generator=seeded()) * getattr(scheduler, "init_noise_sigma", 1.0)
    trajectory, draws = [], seeded(1)
    takes = {"generator": draws} if "generator" in scheduler.step.__code__.co_varnames else {}
    for t in scheduler.timesteps:
        shown = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        trajectory.append(shown)
        x = scheduler.step(model(shown, (t * scale).expand(len(x))), t, x, **takes).prev_sample
    return scheduler.timesteps.tolist(), [*trajectory, x]


def ours(sampling: Sampling, *, scaled: bool = False, tokens: int = 0) -> tuple[list[float], list[Tensor]]:
    """The same of ours; ``scaled`` begins with as much noise as diffusers."""
    points = sampling.points(STEPS, tokens)
    x, draws = torch.randn(SHAPE, generator=seeded()), seeded(1)
    trajectory: list[Tensor] = []
    asked: list[float] = []

    def watched(x: Tensor, when: Tensor) -> Tensor:
        asked.append(float(when[0]))
        trajectory.append(x)
        return model(x, when)

    x = x * points[0].rest if scaled else x
    x = sampling.sample(watched, x, points, fresh=lambda: torch.randn(SHAPE, generator=draws))
    return asked, [*trajectory, x]


def check(
    mine: tuple[list[float], list[Tensor]],
    other: tuple[list[float], list[Tensor]],
    unit: float = 1.0,
    atol: float = 1e-5,
) -> None:
    assert [t * unit for t in mine[0]] == pytest.approx(other[0], rel=1e-5)
    for number, (a, b) in enumerate(zip(mine[1], other[1], strict=True)):
        torch.testing.assert_close(a, b, atol=atol, rtol=1e-5, msg=lambda m, n=number: f"step {n}: {m}")


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction", list(NAMES))
@pytest.mark.parametrize("clip", [None, 1.5])
def test_ddim(prediction: Prediction, spacing: Spacing, clip: float | None) -> None:
    for clean, eta in ((True, 0.0), (False, 0.7)):
        sampling = Diffusion(
            prediction=prediction, solver=DDIM(eta=eta), spacing=spacing, offset=1, clip=clip, clean=clean
        )
        scheduler = diffusers.DDIMScheduler(
            **LATENT, prediction_type=NAMES[prediction], timestep_spacing=spacing, steps_offset=1,
            clip_sample=clip is not None, clip_sample_range=clip or 1.0, set_alpha_to_one=clean,
        )  # fmt: skip
        step = scheduler.step
        scheduler.step = lambda out, t, x, generator, step=step, eta=eta: step(out, t, x, eta=eta, generator=generator)
        check(ours(sampling), theirs(scheduler))


# With the large variance diffusers draws noise at the last step, too, unless that is step 0.
@pytest.mark.parametrize(("spacing", "variance"), [("leading", "small"), ("trailing", "small"), ("leading", "large")])
@pytest.mark.parametrize("curve", ["linear", "squared_cosine"])
def test_ddpm(spacing: Spacing, variance: Any, curve: Any) -> None:
    schedule = Schedule(curve=curve, first=1e-4, last=0.02)
    sampling = Diffusion(schedule=schedule, solver=DDPM(variance=variance), spacing=spacing, clip=1.0)
    scheduler = diffusers.DDPMScheduler(
        beta_schedule={"linear": "linear", "squared_cosine": "squaredcos_cap_v2"}[curve], timestep_spacing=spacing,
        variance_type=f"fixed_{variance}",
    )  # fmt: skip
    check(ours(sampling), theirs(scheduler))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction", list(NAMES))
def test_euler_and_heun(prediction: Prediction, spacing: Spacing) -> None:
    solvers: dict[type, Solver] = {
        diffusers.EulerDiscreteScheduler: Euler(),
        diffusers.HeunDiscreteScheduler: Heun(),
    }
    for cls, solver in solvers.items():
        scheduler = cls(**LATENT, prediction_type=NAMES[prediction], timestep_spacing=spacing, steps_offset=1)
        sampling = Diffusion(prediction=prediction, solver=solver, spacing=spacing, offset=1)
        # States begin at 14.6 times the noise: what fp32 rounds there is carried to the small ones of the end.
        check(ours(sampling, scaled=spacing != "leading"), theirs(scheduler), atol=1e-4)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction", list(NAMES))
def test_dpm_solver(prediction: Prediction, spacing: Spacing) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **LATENT, prediction_type=NAMES[prediction], timestep_spacing=spacing, steps_offset=1
    )
    check(ours(Diffusion(prediction=prediction, solver=DPMSolver(), spacing=spacing, offset=1)), theirs(scheduler))


@pytest.mark.parametrize("prediction", ["noise", "velocity"])
def test_plms(prediction: Prediction) -> None:
    """As Stable Diffusion 1 is published."""
    scheduler = diffusers.PNDMScheduler(
        **LATENT, prediction_type=NAMES[prediction], steps_offset=1, skip_prk_steps=True, set_alpha_to_one=False
    )
    check(ours(Diffusion(prediction=prediction, solver=PLMS(), offset=1, clean=False)), theirs(scheduler))


@pytest.mark.parametrize("solver", [DDIM(), Euler(), DPMSolver()])
def test_zero_terminal_snr(solver: Solver) -> None:
    cls = {
        DDIM: diffusers.DDIMScheduler, Euler: diffusers.EulerDiscreteScheduler,
        DPMSolver: diffusers.DPMSolverMultistepScheduler,
    }[type(solver)]  # fmt: skip
    more = {"clip_sample": False} if cls is diffusers.DDIMScheduler else {}
    scheduler = cls(
        **LATENT, prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True, **more
    )
    sampling = Diffusion(
        schedule=Schedule(zero_snr=True), prediction="velocity", solver=solver, spacing="trailing"
    )  # fmt: skip
    # diffusers' Euler begins at 4,096 times the noise, and rounds there.
    check(ours(sampling), theirs(scheduler), atol=1e-4 if isinstance(solver, Euler) else 1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow(shift: float) -> None:
    """Stable Diffusion 3: a shift for all sizes."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    check(ours(Flow(shift=shift)), theirs(scheduler, 1 / 1000), unit=1000)


@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_flow_with_a_dynamic_shift(tokens: int) -> None:
    """FLUX: a shift by the size of the picture, and equal steps before it."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    sigmas = torch.linspace(1, 1 / STEPS, STEPS).tolist()
    other = theirs(_Given(scheduler, sigmas), 1 / 1000, mu=calculate_shift(tokens))
    check(ours(Flow(shift=Dynamic(), spacing="even"), tokens=tokens), other, unit=1000)


class _Given:
    """A scheduler that is told its steps."""

    def __init__(self, scheduler: Any, sigmas: list[float]) -> None:
        self._scheduler, self._sigmas, self.step = scheduler, sigmas, scheduler.step

    def set_timesteps(self, steps: int, mu: float) -> None:
        self._scheduler.set_timesteps(sigmas=self._sigmas, mu=mu)
        self.timesteps = self._scheduler.timesteps


def test_heun_of_a_flow() -> None:
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    asked, other = theirs(scheduler, 1 / 1000)
    check(ours(Flow(shift=3.0, solver=Heun())), (asked, other), unit=1000)


def test_noise_is_added_as_there() -> None:
    scheduler = diffusers.DDPMScheduler(**LATENT)
    x, noise, steps = torch.randn(SHAPE), torch.randn(SHAPE), torch.tensor([3, 977])
    from polymodal.nn.noise import add_noise

    left = Schedule().left
    torch.testing.assert_close(add_noise(x, noise, steps, left), scheduler.add_noise(x, noise, steps))
    torch.testing.assert_close(left, scheduler.alphas_cumprod, atol=1e-6, rtol=1e-5)


def test_min_snr_weights_are_those_of_diffusers() -> None:
    from diffusers.training_utils import compute_snr

    from polymodal.nn.noise import min_snr_weight

    scheduler, steps = diffusers.DDPMScheduler(**LATENT), torch.arange(0, 1000, 37)
    snr = compute_snr(scheduler, steps)
    capped = snr.clamp(max=5)
    for kind, expected in (("noise", capped / snr), ("velocity", capped / (snr + 1)), ("sample", capped)):
        torch.testing.assert_close(min_snr_weight(kind, steps, Schedule().left), expected, atol=1e-5, rtol=1e-5)


def test_points_are_places_between_noise_and_data() -> None:
    points: list[Point] = [*Diffusion().points(7), *Flow(shift=2.0).points(7, 0)]
    for point in points:
        norm = point.signal**2 + point.rest**2 if hasattr(point, "share") else point.signal + point.rest
        assert norm == pytest.approx(1)
