"""Rectified flow: the velocity on straight lines between data and noise.

Source: Liu et al. 2022, https://arxiv.org/abs/2209.03003; Lipman et al. 2022, https://arxiv.org/abs/2210.02747. The
direction is openpi's code's: **t = 1 is noise, t = 0 is data**, a sampler goes down. The papers of pi0 and of real-time
chunking write ``1 - t`` for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from polymodal.core.batch import Loss
from polymodal.heads.action import masked
from polymodal.nn.noise import shifted


@dataclass(frozen=True, kw_only=True)
class Beta:
    """Times of pi0: Beta(``alpha``, 1), denser near noise, and never below ``least``, where nothing is to learn."""

    alpha: float = 1.5
    least: float = 0.001

    def draw(self, count: int, device: torch.device, generator: torch.Generator | None = None) -> Float[Tensor, " n"]:
        # The distribution function of Beta(alpha, 1) is t ** alpha.
        u = torch.rand(count, device=device, generator=generator)
        return u ** (1 / self.alpha) * (1 - self.least) + self.least


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Every time is as likely."""

    def draw(self, count: int, device: torch.device, generator: torch.Generator | None = None) -> Float[Tensor, " n"]:
        return torch.rand(count, device=device, generator=generator)


@dataclass(frozen=True, kw_only=True)
class LogitNormal:
    """Times around the middle: the sigmoid of a normal (Stable Diffusion 3)."""

    mean: float = 0.0
    std: float = 1.0

    def draw(self, count: int, device: torch.device, generator: torch.Generator | None = None) -> Float[Tensor, " n"]:
        return (self.mean + self.std * torch.randn(count, device=device, generator=generator)).sigmoid()


@dataclass(frozen=True, kw_only=True)
class Shifted:
    """Times that are drawn and then moved towards noise by ``k``: Stable Diffusion 3 at large pictures.

    For FLUX's kind, ``k`` is `samplers.flow.Dynamic` of the picture's size.
    """

    times: LogitNormal | Uniform
    k: float

    def draw(self, count: int, device: torch.device, generator: torch.Generator | None = None) -> Float[Tensor, " n"]:
        return shifted(self.times.draw(count, device, generator), self.k)


Times: TypeAlias = Beta | Uniform | LogitNormal | Shifted
Velocity: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(what is between data and noise, the time of each row) -> where it moves as time grows: towards noise."""


def between(
    x: Float[Tensor, "batch *shape"], noise: Float[Tensor, "batch *shape"], t: Float[Tensor, " batch"]
) -> Float[Tensor, "batch *shape"]:
    """The point at time ``t`` of each row's line from data ``x`` (0) to ``noise`` (1)."""
    t = t.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
    return t * noise + (1 - t) * x


def flow_loss(
    velocity: Velocity,
    x: Float[Tensor, "batch *shape"],
    *,
    times: Times,
    mask: Bool[Tensor, "batch ..."] | None = None,
    generator: torch.Generator | None = None,
    noise: Float[Tensor, "batch *shape"] | None = None,
    t: Float[Tensor, " batch"] | None = None,
) -> Loss:
    """Squared error of the velocity, ``noise - x``, at one drawn time a row, summed over what ``mask`` keeps.

    Args:
        velocity: the model.
        x: data of any shape.
        times: what times are drawn from.
        mask: True for values that are learned; it broadcasts to ``x``.
        generator: seeds noise and times.
        noise: instead of what would be drawn.
        t: instead of the times that would be drawn.
    """
    if noise is None:
        noise = torch.randn(x.shape, device=x.device, dtype=x.dtype, generator=generator)
    t = times.draw(len(x), x.device, generator) if t is None else t
    error = velocity(between(x, noise, t), t).float() - (noise - x)
    return masked(error.square(), mask)
