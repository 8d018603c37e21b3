"""How much noise is on what a diffusion model reads, step by step, and what it may be asked to predict.

Source: Ho et al., "Denoising Diffusion Probabilistic Models", 2020, https://arxiv.org/abs/2006.11239; the cosine
schedule of Nichol & Dhariwal 2021, https://arxiv.org/abs/2102.09672; ``v`` of Salimans & Ho 2022,
https://arxiv.org/abs/2202.00512; zero terminal SNR of Lin et al. 2023, https://arxiv.org/abs/2305.08891; min-SNR
weights of Hang et al. 2023, https://arxiv.org/abs/2303.09556; the shift of times of Esser et al. 2024 (Stable
Diffusion 3), https://arxiv.org/abs/2403.03206.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Final, Literal, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from polymodal.core.errors import ConfigError

Prediction = Literal["noise", "sample", "velocity"]
T = TypeVar("T", float, Tensor)
FAINTEST: Final = 2.0**-24  # share of the signal's variance that solvers take for none, as diffusers' do


@cache
def squared_cosine(steps: int, largest: float = 0.999) -> Float[Tensor, " {steps}"]:
    """The share of the signal's variance that is left after each of ``steps`` steps, on the CPU.

    Each step adds at most ``largest``, as diffusers' ``squaredcos_cap_v2`` has it.
    """
    # Outside of any device context: models are made on the meta device, too.
    edges = torch.arange(steps + 1, device="cpu", dtype=torch.float64) / steps
    curve = ((edges + 0.008) / 1.008 * math.pi / 2).cos().square()
    return (1 - (1 - curve[1:] / curve[:-1]).clamp(max=largest)).cumprod(0).float()


@cache
def linear(first: float, last: float, steps: int) -> Float[Tensor, " {steps}"]:
    """What is left of the signal's variance when the variance that a step adds grows evenly (DDPM)."""
    return (1 - torch.linspace(first, last, steps, device="cpu", dtype=torch.float64)).cumprod(0).float()


@cache
def scaled_linear(first: float, last: float, steps: int) -> Float[Tensor, " {steps}"]:
    """What is left of the signal's variance when the deviation that a step adds grows evenly (latent diffusion)."""
    added = torch.linspace(first**0.5, last**0.5, steps, device="cpu", dtype=torch.float64) ** 2
    return (1 - added).cumprod(0).float()


def zero_terminal_snr(left: Float[Tensor, " steps"]) -> Float[Tensor, " steps"]:
    """The schedule with nothing of the signal left after its last step, and its first step as it was."""
    root = left.double().sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])).square().float()


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How noise grows over the steps that a model was trained with; latent diffusion's, where nothing else is said.

    Attributes:
        curve: `scaled_linear`, `linear` or `squared_cosine`, which has no ``first`` and ``last``.
        first: variance that the first step adds.
        last: and the last.
        zero_snr: whether nothing of the signal is left at the end.
    """

    curve: Literal["scaled_linear", "linear", "squared_cosine"] = "scaled_linear"
    first: float = 0.00085
    last: float = 0.012
    steps: int = 1000
    zero_snr: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.first <= self.last < 1 or self.steps < 2:
            raise ConfigError(f"a schedule adds more and more noise in two or more steps; not {self}")
        first, last_but_one = float(self.left[0]), float(self.left[-2])
        if first == 1 or last_but_one <= (0 if self.zero_snr else FAINTEST):
            raise ConfigError(
                f"a schedule adds noise from its first step on, and has some of the signal left before its last; the "
                f"variance left of it would be {first:g} and {last_but_one:g} for {self}"
            )

    @property
    def left(self) -> Float[Tensor, " {self.steps}"]:
        """The share of the signal's variance that is left after each step, on the CPU."""
        return _left(self)


@cache
def _left(schedule: Schedule) -> Tensor:
    s = schedule
    if s.curve == "squared_cosine":
        left = squared_cosine(s.steps)
    else:
        left = {"linear": linear, "scaled_linear": scaled_linear}[s.curve](s.first, s.last, s.steps)
    return zero_terminal_snr(left) if s.zero_snr else left


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
    return undone(kind, predicted, noisy, *_at(left, step, noisy))


def undone(
    kind: Prediction,
    predicted: Float[Tensor, "batch *shape"],
    noisy: Float[Tensor, "batch *shape"],
    signal: Float[Tensor, "..."],
    rest: Float[Tensor, "..."],
) -> tuple[Float[Tensor, "batch *shape"], Float[Tensor, "batch *shape"]]:
    """The sample and the noise that a prediction amounts to, of ``noisy = signal * sample + rest * noise``."""
    if kind == "noise":
        return (noisy - rest * predicted) / signal, predicted
    if kind == "sample":
        return predicted, (noisy - signal * predicted) / rest
    return signal * noisy - rest * predicted, signal * predicted + rest * noisy


def min_snr_weight(
    kind: Prediction, step: Int[Tensor, " batch"], left: Float[Tensor, " steps"], gamma: float = 5.0
) -> Float[Tensor, " batch"]:
    """How much the error of a prediction counts at each row's step: as much as that of the sample at ``gamma`` at most.

    The weight of an error of the sample is the ratio of signal to noise, but at most ``gamma``; an error of the noise
    or of the velocity is that of the sample by a factor, which is divided by.
    """
    share = left.to(step.device)[step].double()
    ratio = share / (1 - share)
    capped = ratio.clamp(max=gamma)
    if kind == "noise":  # at no signal at all the limit
        return torch.where(ratio > 0, capped / ratio, 1.0).float()
    return (capped if kind == "sample" else capped / (ratio + 1)).float()


def shifted(t: T, k: float) -> T:
    """Times of a flow (0 is data, 1 noise) moved towards noise, as large pictures need: ``k t / (1 + (k - 1) t)``.

    FLUX's exponential shift by ``mu`` is the one by ``k = exp(mu)``.
    """
    return k * t / (1 + (k - 1) * t)
