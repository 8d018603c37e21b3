"""How much noise is on what a diffusion model reads, step by step, and what it may be asked to predict.

Source: Ho et al., "Denoising Diffusion Probabilistic Models", 2020, https://arxiv.org/abs/2006.11239; the cosine
schedule of Nichol & Dhariwal 2021, https://arxiv.org/abs/2102.09672; ``v`` of Salimans & Ho 2022,
https://arxiv.org/abs/2202.00512.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Prediction = Literal["noise", "sample", "velocity"]


@cache
def squared_cosine(steps: int, largest: float = 0.999) -> Float[Tensor, " {steps}"]:
    """The share of the signal's variance that is left after each of ``steps`` steps, on the CPU.

    Each step adds at most ``largest``, as diffusers' ``squaredcos_cap_v2`` has it.
    """
    # Outside of any device context: models are made on the meta device, too.
    edges = torch.arange(steps + 1, device="cpu", dtype=torch.float64) / steps
    curve = ((edges + 0.008) / 1.008 * math.pi / 2).cos().square()
    return (1 - (1 - curve[1:] / curve[:-1]).clamp(max=largest)).cumprod(0).float()


def _at(
    left: Float[Tensor, " steps"], step: Int[Tensor, " batch"], x: Float[Tensor, "batch *shape"]
) -> tuple[Tensor, Tensor]:
    """The factors of signal and noise at each row's step, to be multiplied with ``x``."""
    share = left.to(x.device)[step].to(x.dtype).view(-1, *[1] * (x.ndim - 1))
    return share.sqrt(), (1 - share).sqrt()


def add_noise(
    x: Float[Tensor, "batch *shape"],
    noise: Float[Tensor, "batch *shape"],
    step: Int[Tensor, " batch"],
    left: Float[Tensor, " steps"],
) -> Float[Tensor, "batch *shape"]:
    """``x`` after so many steps (0 is the first) of the schedule ``left``."""
    signal, rest = _at(left, step, x)
    return signal * x + rest * noise


def target(
    kind: Prediction,
    x: Float[Tensor, "batch *shape"],
    noise: Float[Tensor, "batch *shape"],
    step: Int[Tensor, " batch"],
    left: Float[Tensor, " steps"],
) -> Float[Tensor, "batch *shape"]:
    """What a model of this kind learns to predict."""
    if kind == "velocity":
        signal, rest = _at(left, step, x)
        return signal * noise - rest * x
    return noise if kind == "noise" else x


def sample_and_noise(
    kind: Prediction,
    predicted: Float[Tensor, "batch *shape"],
    noisy: Float[Tensor, "batch *shape"],
    step: Int[Tensor, " batch"],
    left: Float[Tensor, " steps"],
) -> tuple[Float[Tensor, "batch *shape"], Float[Tensor, "batch *shape"]]:
    """The sample and the noise that a prediction amounts to."""
    signal, rest = _at(left, step, noisy)
    if kind == "noise":
        return (noisy - rest * predicted) / signal, predicted
    if kind == "sample":
        return predicted, (noisy - signal * predicted) / rest
    return signal * noisy - rest * predicted, signal * predicted + rest * noisy
