"""Integrating a learned velocity from noise (t = 1) to data (t = 0), and guiding it by a beginning that is fixed.

Euler as openpi has it. Guidance: Black, Galliker & Levine, "Real-Time Execution of Action Chunking Flow Policies",
2025, https://arxiv.org/abs/2506.07339: a chunk is drawn while the one before is still carried out; the steps that will
have been carried out by then are frozen, those after them are drawn to the old chunk, ever less.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Velocity: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(point, time of each row) -> velocity towards noise."""


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
