"""Integrating a learned velocity from noise (t = 1) to data (t = 0), and guiding it by a beginning that is fixed.

`euler` is openpi's, for policies: what they were trained to do must not change by a rounding, so that it has a loop of
its own. Guidance: Black, Galliker & Levine, "Real-Time Execution of Action Chunking Flow
Policies", 2025, https://arxiv.org/abs/2506.07339: a chunk is drawn while the one before is still carried out; the steps
that will have been carried out by then are frozen, those after them are drawn to the old chunk, ever less.

Pictures are a `Flow`, which the loop of `samplers.diffusion` samples. Its shift: Esser et al. 2024,
https://arxiv.org/abs/2403.03206; that by the size of the picture is FLUX's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from polymodal.core.errors import ConfigError
from polymodal.nn.noise import shifted
from polymodal.samplers.diffusion import (
    END,
    Diffusion,
    DPMSolver,
    Euler,
    Heun,
    Point,
    Sampler,
)

Velocity: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(point, time of each row) -> velocity towards noise."""
MOST: Final = 20.0  # of a shift's logarithm: times behind it are no more told from noise


def euler(
    velocity: Velocity, noise: Float[Tensor, "batch *shape"], *, steps: int = 10
) -> Float[Tensor, "batch *shape"]:
    """What noise becomes when it goes against the velocity, in ``steps`` equal steps."""
    x = noise
    for step in range(steps):
        t = torch.full((len(x),), 1 - step / steps, device=x.device, dtype=torch.float32)
        x = x - velocity(x, t) / steps
    return x


def continued(
    velocity: Velocity,
    noise: Float[Tensor, "batch horizon dim"],
    previous: Float[Tensor, "batch steps dim"],
    frozen: int,
    *,
    steps: int = 10,
) -> Float[Tensor, "batch horizon dim"]:
    """`euler` of a chunk that goes on from what is left of the one before.

    Args:
        velocity: the model.
        noise: of the chunk's shape.
        previous: at most a horizon of steps, from the first of the new chunk on.
        frozen: so many of them will have been carried out by the time that the chunk is there.
        steps: of Euler's method. The pull is bounded by as many, so that one step takes away an error at most once: the
            paper has five of five.
    """
    horizon, left = noise.shape[1], previous.shape[1]
    prefix = F.pad(previous.to(noise), (0, 0, 0, horizon - left))
    weights = prefix_weights(horizon, frozen=frozen, until=left)
    return euler(guided(velocity, prefix, weights, strongest=float(steps)), noise, steps=steps)


def prefix_weights(horizon: int, *, frozen: int, until: int) -> Float[Tensor, " {horizon}"]:
    """How firmly each step of a chunk is held to the old one: 1 for the ``frozen`` first, then falling exponentially to
    0 at ``until``, where the old chunk ends or what is new may begin."""
    step = torch.arange(horizon, dtype=torch.float32)
    share = ((until - step) / (until - frozen + 1)).clamp(0, 1)
    falling = share * torch.expm1(share) / (math.e - 1)
    return torch.where(step < min(frozen, until), 1.0, falling)


def guided(
    velocity: Velocity,
    prefix: Float[Tensor, "batch horizon dim"],
    weights: Float[Tensor, " horizon"],
    *,
    strongest: float = 5.0,
) -> Velocity:
    """The velocity of a chunk that is pulled towards ``prefix``, as firmly as ``weights`` says for each of its steps.

    The pull is the gradient, through the model, of the weighted error of where a straight line would end. LeRobot's
    code leaves the model out of that gradient (its derivative is taken for the identity).

    Args:
        velocity: the model, differentiable in its first argument.
        prefix: the old chunk from now on; what stands where ``weights`` are zero does not matter.
        weights: see `prefix_weights`.
        strongest: the largest factor of the pull, which grows beyond bounds at both ends; the paper takes 5.
    """

    def pulled(x: Tensor, t: Tensor) -> Tensor:
        share = t.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            v = velocity(x, t)
            end = x - share * v
            error = (prefix - end).detach() * weights.to(x)[:, None]
            (pull,) = torch.autograd.grad(end, x, error)
        factor = ((share**2 + (1 - share) ** 2) / (share * (1 - share))).nan_to_num(posinf=strongest)
        return v.detach() - factor.clamp(max=strongest) * pull

    return pulled


@dataclass(frozen=True)
class Line(Point):
    """A time of a flow, on the line ``(1 - time) * sample + time * noise``; the model predicts ``noise - sample``."""

    time: float

    @property
    def signal(self) -> float:
        return 1 - self.time

    @property
    def rest(self) -> float:
        return self.time

    @property
    def scale(self) -> float:
        return 1.0

    def read(self, predicted: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return x - self.time * predicted, x + (1 - self.time) * predicted


@dataclass(frozen=True, kw_only=True)
class Dynamic:
    """FLUX's shift, which grows with the picture: ``exp`` of what is linear in its tokens, between two sizes."""

    least: float = 0.5  # at so many tokens:
    fewest: int = 256
    most: float = 1.15
    largest: int = 4096

    def __post_init__(self) -> None:
        if not self.fewest < self.largest:
            raise ConfigError(f"a shift between {self.fewest} and {self.largest} tokens")
        if not max(abs(self.least), abs(self.most)) <= MOST:
            raise ConfigError(f"a shift by exp({self.least}) to exp({self.most}); it goes to exp({MOST:g})")

    def at(self, tokens: int) -> float:
        """The factor for a picture of so many tokens.

        Raises:
            ConfigError: the line that it is on goes nowhere with so many.
        """
        grown = self.least + (self.most - self.least) * (tokens - self.fewest) / (self.largest - self.fewest)
        if abs(grown) > MOST:
            raise ConfigError(f"a picture of {tokens:,} tokens, at which times would be shifted by exp({grown:g})")
        return math.exp(grown)


@dataclass(frozen=True, kw_only=True)
class Flow(Sampler):
    """How a rectified flow is sampled.

    Attributes:
        shift: of the times, towards noise: one for all pictures (Stable Diffusion 3), or by their size (FLUX).
        spacing: before the shift: "even" goes to 0 in equal steps; "trained" takes its last one from the least time
            of ``steps``, shifted, as diffusers' scheduler does if it is not told otherwise.
        steps: that the times of training are counted in.
    """

    shift: float | Dynamic = 1.0
    solver: Euler | Heun | DPMSolver = field(default_factory=Euler)
    spacing: Literal["even", "trained"] = "trained"
    steps: int = 1000

    def __post_init__(self) -> None:
        if not isinstance(self.shift, Dynamic) and not math.exp(-MOST) <= self.shift <= math.exp(MOST):
            raise ConfigError(
                f"times are shifted by a factor above 0, from exp(-{MOST:g}) to exp({MOST:g}), not {self.shift}"
            )

    def points(self, steps: int, places: int) -> list[Line]:
        """Where ``steps`` of the solver lead, from noise to data, for a picture of so many tokens.

        Raises:
            ConfigError: fewer than one step, or more than were trained.
        """
        if not 1 <= steps <= self.steps:
            raise ConfigError(f"{steps} steps; this model takes 1 to {self.steps}")
        fixed = not isinstance(self.shift, Dynamic)
        k = self.shift.at(places) if isinstance(self.shift, Dynamic) else self.shift
        least = 1 / steps if self.spacing == "even" else 1 / self.steps
        if fixed and self.spacing == "trained":
            least = shifted(least, k)
        times = [shifted(t, k) for t in np.linspace(1, least, steps).tolist()]
        return [*(Line(t, t) for t in times), Line(END, 0.0)]

    def progress(self, when: float) -> float:
        """Which share of the way to data is done."""
        return 1 - when


Sampling: TypeAlias = Diffusion | Flow
"""How a model makes pictures of noise."""
