"""The variational bound by which a diffusion learns the variances of its steps, too, in bits a value.

Source: Nichol & Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021, https://arxiv.org/abs/2102.09672.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

_LEVEL = 1 / 255  # half of the distance between two values of a picture in [-1, 1]


def learned_variance(
    said: Float[Tensor, "batch *shape"], step: Int[Tensor, " batch"], added: Float[Tensor, " steps"]
) -> Float[Tensor, "batch *shape"]:
    """The logarithm of a step's variance, between that of the posterior (-1) and what the step added (1).

    Args:
        said: what the model says.
        step: of each row.
        added: the variance that each step adds, in fp64: its logarithms differ little.
    """
    least, most = (_at(log, step, said) for log in _log_variances(added))
    share = (said + 1) / 2
    return share * most + (1 - share) * least


def variance_bound(
    x: Float[Tensor, "batch *shape"],
    noisy: Float[Tensor, "batch *shape"],
    noise: Float[Tensor, "batch *shape"],
    said: Float[Tensor, "batch *shape"],
    step: Int[Tensor, " batch"],
    added: Float[Tensor, " steps"],
) -> Float[Tensor, " batch"]:
    """How far a step back is from the true one: the divergence, and at the first step what it costs to say the data.

    Args:
        x: the data.
        noisy: with the noise of ``step``.
        noise: that the model sees in them; nothing is learned about it here.
        said: what the model says of the variance, see `learned_variance`.
        step: of each row.
        added: the variance that each step adds, in fp64.
    """
    # In fp64: at the first steps the variances are so small that fp32 loses what the gradient is made of.
    x, noisy, noise, said = x.double(), noisy.double(), noise.detach().double(), said.double()
    left = (1 - added).cumprod(0)
    before = torch.cat([left.new_ones(1), left[:-1]])
    signal, rest = (_at(value.sqrt(), step, x) for value in (left, 1 - left))
    of_data = _at(added * before.sqrt() / (1 - left), step, x)
    of_noisy = _at((1 - before) * (1 - added).sqrt() / (1 - left), step, x)
    true_mean = of_data * x + of_noisy * noisy
    mean = of_data * (noisy - rest * noise) / signal + of_noisy * noisy
    true_log, log = _at(_log_variances(added)[0], step, x), learned_variance(said, step, added)
    apart = (true_mean - mean).square() * torch.exp(-log)
    divergence = 0.5 * (log - true_log - 1 + torch.exp(true_log - log) + apart)
    cost = torch.where((step == 0).view(-1, *[1] * (x.ndim - 1)), -_log_likelihood(x, mean, 0.5 * log), divergence)
    return (cost.flatten(1).mean(1) / math.log(2)).float()


def _log_variances(added: Tensor) -> tuple[Tensor, Tensor]:
    """Of the posterior (that of the first step, which has none, is the second's), and of what is added."""
    left = (1 - added).cumprod(0)
    posterior = added[1:] * (1 - left[:-1]) / (1 - left[1:])
    return torch.cat([posterior[:1], posterior]).log(), added.log()


def _at(values: Tensor, step: Tensor, x: Tensor) -> Tensor:
    return values.to(x.device)[step].to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def _log_likelihood(x: Tensor, mean: Tensor, log_deviation: Tensor) -> Tensor:
    """Of values with 256 levels in [-1, 1] under a normal distribution, whose tails belong to the outermost ones."""

    def below(y: Tensor) -> Tensor:  # the official code's approximation of the normal distribution function
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))

    apart, sharp = x - mean, torch.exp(-log_deviation)
    upper, lower = below(sharp * (apart + _LEVEL)), below(sharp * (apart - _LEVEL))
    least = 1e-12
    inner = (upper - lower).clamp(min=least).log()
    last = torch.where(x > 0.999, (1 - lower).clamp(min=least).log(), inner)
    return torch.where(x < -0.999, upper.clamp(min=least).log(), last)
