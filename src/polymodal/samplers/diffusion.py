"""Going back from noise to data: one loop, and the solvers that take its steps.

All that is between data and noise is ``signal * sample + rest * noise``, and what a model predicts says both: so one
loop, `sampled`, serves diffusions and flows. In coordinates in which a point is ``sample + clock * slope`` (divided by
``signal``, with the ratio of noise to signal for a clock, of a diffusion; as it is, with the time, of a flow) the
solvers are the textbook's.

Source: DDPM: Ho et al. 2020, https://arxiv.org/abs/2006.11239. DDIM: Song et al. 2020,
https://arxiv.org/abs/2010.02502. Euler and Heun: Karras et al. 2022, https://arxiv.org/abs/2206.00364.
DPM-Solver++(2M): Lu et al. 2022, https://arxiv.org/abs/2211.01095. PLMS: Liu et al. 2022,
https://arxiv.org/abs/2202.09778. Spacings: Lin et al. 2023, https://arxiv.org/abs/2305.08891, table 2.

Deviations from diffusers: a step always leads to the next one that is taken, also where their DDIM goes a fixed number
of steps ("linspace", and numbers that do not divide the schedule); noise has the deviation one at the beginning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from polymodal.core.errors import ConfigError
from polymodal.nn.noise import FAINTEST, Prediction, Schedule, undone

Denoiser: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(noisy data, step of each row) -> what the model predicts."""
Fresh: TypeAlias = Callable[[], Tensor]
"""New noise of the shape of the data."""
Watch: TypeAlias = Callable[[int, Tensor], None]
"""(the number of steps done, the sample that the model saw before the last one)."""
Spacing: TypeAlias = Literal["leading", "trailing", "linspace"]
END = -1.0  # what a model would be told of the end: it is not asked there


@dataclass(frozen=True)
class Point:
    """A place between noise and data: ``signal * sample + rest * noise``.

    Attributes:
        when: what the model is told; `END` behind the last step.
    """

    when: float

    @property
    def signal(self) -> float:
        raise NotImplementedError

    @property
    def rest(self) -> float:
        raise NotImplementedError

    @property
    def scale(self) -> float:
        """What it is divided by to be ``sample + clock * slope``."""
        raise NotImplementedError

    @property
    def clock(self) -> float:
        return self.rest / self.scale

    def read(self, predicted: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The sample and the noise in ``x`` that a prediction amounts to."""
        raise NotImplementedError


@dataclass(frozen=True)
class Noisy(Point):
    """A step of a diffusion; ``share`` is what is left of the signal's variance."""

    share: float
    prediction: Prediction = "noise"

    @property
    def signal(self) -> float:
        return self.share**0.5

    @property
    def rest(self) -> float:
        return (1 - self.share) ** 0.5

    @property
    def scale(self) -> float:
        return self.signal

    def read(self, predicted: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        share = torch.tensor(self.share, dtype=torch.float32, device=x.device).to(x.dtype)
        return undone(self.prediction, predicted, x, share.sqrt(), (1 - share).sqrt())


@dataclass(frozen=True)
class Look:
    """What a model sees in ``x`` at a point."""

    predicted: Tensor
    sample: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Eye:
    """A model that is asked at points; the samples that it sees are kept within plus and minus ``clip``."""

    model: Denoiser
    clip: float | None = None

    def __call__(self, x: Tensor, point: Point) -> Look:
        # Whole numbers for what is trained on whole steps, as policies embed them.
        when = int(point.when) if isinstance(point, Noisy) and point.when == int(point.when) else point.when
        return self.read(self.model(x, torch.full((len(x),), when, device=x.device)), x, point)

    def read(self, predicted: Tensor, x: Tensor, point: Point) -> Look:
        sample, noise = point.read(predicted, x)
        return Look(predicted, sample if self.clip is None else sample.clamp(-self.clip, self.clip), noise)


Adjust: TypeAlias = Callable[[Tensor, Point], Tensor]
"""Changes what stands at a point."""
Past: TypeAlias = list[tuple[Point, Tensor]]
"""What a solver remembers of its steps; empty at the beginning."""


@dataclass(frozen=True, kw_only=True)
class DDIM:
    """Determined by its beginning; ``eta`` of the posterior's deviation is drawn anew at each step (1 is like DDPM)."""

    eta: float = 0.0
    spare: ClassVar[int] = 0  # steps more than asked for that the schedule is divided into
    least: ClassVar[float] = 0.0  # share of the signal's variance that there has to be

    def step(
        self, eye: Eye, x: Tensor, now: Point, then: Point, past: Past, fresh: Fresh | None
    ) -> tuple[Tensor, Tensor]:
        look = eye(x, now)
        if not self.eta or fresh is None:
            return _at(then, look), look.sample
        added = self.eta * then.rest / now.rest * (1 - (now.signal / then.signal) ** 2) ** 0.5
        left = (then.rest**2 - added**2) ** 0.5
        return then.signal * look.sample + left * look.noise + added * fresh(), look.sample


@dataclass(frozen=True, kw_only=True)
class DDPM:
    """New noise at each step, of the posterior's variance ("small") or of what the step had added ("large")."""

    variance: Literal["small", "large"] = "small"
    spare: ClassVar[int] = 0
    least: ClassVar[float] = 0.0

    def step(
        self, eye: Eye, x: Tensor, now: Point, then: Point, past: Past, fresh: Fresh | None
    ) -> tuple[Tensor, Tensor]:
        assert isinstance(now, Noisy), "DDPM is a solver of diffusions"
        assert isinstance(then, Noisy), "and not of flows"
        before, after = now.share, then.share
        look, kept = eye(x, now), before / after
        x = after**0.5 * (1 - kept) / (1 - before) * look.sample + kept**0.5 * (1 - after) / (1 - before) * x
        if then.when != END and fresh is not None:
            most = 1 - kept
            x = x + ((1 - after) / (1 - before) * most if self.variance == "small" else most) ** 0.5 * fresh()
        return x, look.sample


@dataclass(frozen=True, kw_only=True)
class Euler:
    """Along the slope; of a diffusion this is DDIM, of a flow Euler's method in time."""

    spare: ClassVar[int] = 0
    least: ClassVar[float] = FAINTEST  # a clock that does not reach infinity

    def step(
        self, eye: Eye, x: Tensor, now: Point, then: Point, past: Past, fresh: Fresh | None
    ) -> tuple[Tensor, Tensor]:
        look = eye(x, now)
        y, slope = _slope(x, look.sample, now)
        return then.scale * (y + (then.clock - now.clock) * slope), look.sample


@dataclass(frozen=True, kw_only=True)
class Heun:
    """Along the mean of the slopes at both ends of a step: the model is asked twice, but at the last step."""

    spare: ClassVar[int] = 0
    least: ClassVar[float] = FAINTEST

    def step(
        self, eye: Eye, x: Tensor, now: Point, then: Point, past: Past, fresh: Fresh | None
    ) -> tuple[Tensor, Tensor]:
        look = eye(x, now)
        y, slope = _slope(x, look.sample, now)
        ahead = then.scale * (y + (then.clock - now.clock) * slope)
        if then.when == END:
            return ahead, look.sample
        _, other = _slope(ahead, eye(ahead, then).sample, then)
        return then.scale * (y + (then.clock - now.clock) * (slope + other) / 2), look.sample


@dataclass(frozen=True, kw_only=True)
class DPMSolver:
    """DPM-Solver++(2M): a line through the last two samples is integrated; the first and the last step take one."""

    spare: ClassVar[int] = 1
    least: ClassVar[float] = FAINTEST

    def step(
        self, eye: Eye, x: Tensor, now: Point, then: Point, past: Past, fresh: Fresh | None
    ) -> tuple[Tensor, Tensor]:
        look = eye(x, now)
        sample = look.sample
        if past and then.when != END:
            (before, old), here = past[-1], _log_ratio(now)
            ratio = (_log_ratio(then) - here) / (here - _log_ratio(before)) / 2
            sample = sample + ratio * (sample - old)
        past[:] = [(now, look.sample)]
        shrink = then.rest / now.rest
        return shrink * x + (then.signal - now.signal * shrink) * sample, look.sample


@dataclass(frozen=True, kw_only=True)
class PLMS:
    """A linear multistep method on the predictions (diffusers' PNDM without its Runge-Kutta steps)."""

    spare: ClassVar[int] = 0
    least: ClassVar[float] = 0.0
    weights: ClassVar = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))

    def step(
        self, eye: Eye, x: Tensor, now: Point, then: Point, past: Past, fresh: Fresh | None
    ) -> tuple[Tensor, Tensor]:
        look = eye(x, now)
        past[:] = [(now, look.predicted), *past[:3]]
        weights = self.weights[len(past) - 1]
        mixed = sum((w * old for w, (_, old) in zip(weights, past, strict=True)), start=torch.zeros_like(x))
        if len(past) == 1 and then.when != END:  # nothing to go by yet: as Heun, with predictions
            mixed = (look.predicted + eye(_at(then, look), then).predicted) / 2
        mean = eye.read(mixed, x, now)
        return _at(then, mean), mean.sample


Solver: TypeAlias = DDIM | DDPM | Euler | Heun | DPMSolver | PLMS


def _at(point: Point, look: Look) -> Tensor:
    return point.signal * look.sample + point.rest * look.noise


def _slope(x: Tensor, sample: Tensor, point: Point) -> tuple[Tensor, Tensor]:
    """``x`` in the coordinates of the clock, and the slope there."""
    y = x / point.scale
    return y, (y - sample) / point.clock


def _log_ratio(point: Point) -> float:
    return math.log(point.signal / point.rest) if point.signal else -math.inf


def sampled(
    model: Denoiser,
    x: Float[Tensor, "batch *shape"],
    points: Sequence[Point],
    solver: Solver,
    *,
    clip: float | None = None,
    fresh: Fresh | None = None,
    adjust: Adjust | None = None,
    watch: Watch | None = None,
) -> Float[Tensor, "batch *shape"]:
    """What ``x``, which is at the first of ``points``, becomes at the last one.

    Args:
        model: predicts, as the points read it.
        x: noise, or noisy data.
        points: from noise to data.
        solver: takes a step from each to the next.
        clip: the estimated sample is kept within plus and minus this at each step.
        fresh: new noise, for solvers that draw; without it they do not.
        adjust: is asked after each step.
        watch: is told after each step.
    """
    eye, past = Eye(model, clip), Past()
    for number, (now, then) in enumerate(pairwise(points), 1):
        x, sample = solver.step(eye, x, now, then, past, fresh)
        x = x if adjust is None else adjust(x, then)
        if watch is not None:
            watch(number, sample)
    return x


class Sampler:
    """How a diffusion or a flow is sampled: a solver, and the bound of what it estimates, see `sampled`."""

    solver: Solver
    clip: float | None = None

    def sample(
        self,
        model: Denoiser,
        x: Tensor,
        points: Sequence[Point],
        *,
        fresh: Fresh | None = None,
        adjust: Adjust | None = None,
        watch: Watch | None = None,
    ) -> Tensor:
        """`sampled` with this solver."""
        return sampled(model, x, points, self.solver, clip=self.clip, fresh=fresh, adjust=adjust, watch=watch)


@dataclass(frozen=True, kw_only=True)
class Diffusion(Sampler):
    """How a diffusion was trained and is sampled.

    Attributes:
        prediction: what the model predicts.
        spacing: which steps are taken: "leading" those from 0 on, ``offset`` behind them; "trailing" those back from
            the last; "linspace" both ends and what is even between them.
        clip: see `sampled`.
        clean: whether the last step takes all noise away; else it leads to that of the first step of the schedule.
    """

    schedule: Schedule = field(default_factory=Schedule)
    prediction: Prediction = "noise"
    solver: Solver = field(default_factory=DDIM)
    spacing: Spacing = "leading"
    offset: int = 0
    clip: float | None = None
    clean: bool = True

    def __post_init__(self) -> None:
        if self.schedule.zero_snr and self.prediction == "noise":
            raise ConfigError("where nothing of the signal is left, noise tells nothing of it: predict the velocity")
        if not 0 <= self.offset < self.schedule.steps:
            raise ConfigError(f"an offset of {self.offset} in a schedule of {self.schedule.steps} steps")

    def points(self, steps: int, places: int = 0) -> list[Noisy]:
        """Where ``steps`` of the solver lead, from noise to data; ``places`` is for flows.

        Raises:
            ConfigError: the schedule does not have so many steps.
        """
        total, all_steps = self.schedule.steps, steps + self.solver.spare
        if steps < 1 or all_steps > total:
            raise ConfigError(f"{steps} steps; this model takes 1 to {total - self.solver.spare}")
        if self.spacing == "trailing":
            when = np.round(np.arange(total, 0, -total / steps)) - 1
        elif self.spacing == "leading":
            when = np.arange(all_steps, dtype=np.float64)[::-1] * (total // all_steps) + self.offset
        else:
            when = np.linspace(0, total - 1, all_steps)[::-1]
            when = when if isinstance(self.solver, Euler | Heun) else when.round()
        left = self.schedule.left.clamp(min=self.solver.least)
        if (when := when[:steps])[0] >= total:
            raise ConfigError(f"{steps} steps with an offset of {self.offset} begin behind the last of {total}")
        clock = ((1 - left.double()) / left.double()).sqrt().numpy()
        between = 1 / (np.interp(when, np.arange(total), clock) ** 2 + 1)
        shares = [
            float(left[int(t)]) if t == int(t) else s for t, s in zip(when.tolist(), between.tolist(), strict=True)
        ]
        if any(more >= less for more, less in pairwise(shares)):
            raise ConfigError(f"{steps} steps, two of which have the same noise: take fewer")
        points = [Noisy(t, share, self.prediction) for t, share in zip(when.tolist(), shares, strict=True)]
        return [*points, Noisy(END, 1.0 if self.clean else float(left[0]), self.prediction)]

    def progress(self, when: float) -> float:
        """Which share of the way to data is done."""
        return 1 - when / (self.schedule.steps - 1)


def ddim(
    denoiser: Denoiser,
    noise: Float[Tensor, "batch *shape"],
    *,
    left: Float[Tensor, " total"],
    steps: int,
    prediction: Prediction = "noise",
    clip: float | None = 1.0,
) -> Float[Tensor, "batch *shape"]:
    """What noise becomes, always the same.

    Args:
        denoiser: the model.
        noise: of deviation one.
        left: the schedule that the model was trained with, see `nn.noise`.
        steps: how many of its steps are taken.
        prediction: what the model predicts.
        clip: the estimated sample is kept within plus and minus this at each step.
    """
    return sampled(denoiser, noise, _leading(left, steps, prediction), DDIM(), clip=clip)


def ddpm(
    denoiser: Denoiser,
    noise: Float[Tensor, "batch *shape"],
    *,
    left: Float[Tensor, " total"],
    steps: int,
    prediction: Prediction = "noise",
    clip: float | None = 1.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch *shape"]:
    """What noise becomes, with new noise of the posterior's variance at each step but the last; see `ddim`."""

    def fresh() -> Tensor:
        # On the generator's own device, so that a seed means the same on all.
        where = noise.device if generator is None else generator.device
        return torch.randn(noise.shape, device=where, dtype=noise.dtype, generator=generator).to(noise.device)

    return sampled(denoiser, noise, _leading(left, steps, prediction), DDPM(), clip=clip, fresh=fresh)


def _leading(left: Tensor, steps: int, prediction: Prediction) -> list[Noisy]:
    """Points of a schedule: 0, n, 2n, ... from its end."""
    assert 1 <= steps <= len(left), f"{steps} of {len(left)} steps"
    taken = range((steps - 1) * (len(left) // steps), -1, -(len(left) // steps))
    return [*(Noisy(float(step), float(left[step]), prediction) for step in taken), Noisy(END, 1.0, prediction)]
