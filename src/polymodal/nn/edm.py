"""How a network that takes noise off is told how much there is, and how what it reads and says is scaled (EDM).

Source: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022,
https://arxiv.org/abs/2206.00364, table 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from polymodal.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Preconditioning:
    """What a network reads of ``x + deviation * noise``, and what its answer says of ``x``.

    Attributes:
        data: the deviation of the data.
        offset: deviation of further noise that all pixels of a channel share, drawn in training alone.
        median: of the deviations that training draws,
        spread: the deviation of their logarithm,
        least, most: between which they are.
    """

    data: float = 0.5
    offset: float = 0.0
    median: float = math.exp(-1.2)
    spread: float = 1.2
    least: float = 0.002
    most: float = 80.0

    def __post_init__(self) -> None:
        if not (min(self.data, self.median, self.spread) > 0 <= self.offset and 0 < self.least < self.most < math.inf):
            raise ConfigError(f"deviations of data and noise are positive, and some noise is stronger; not {self}")

    def _both(self, deviation: Tensor) -> Tensor:
        """Variance of the noise, that of the offset included."""
        return deviation.float().square() + self.offset**2

    def reads(self, deviation: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """What noisy data are multiplied by: they have a deviation of one then."""
        return (self._both(deviation) + self.data**2).rsqrt()

    def told(self, deviation: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """What the network is told of the noise."""
        return self._both(deviation).log() / 8

    def kept(self, deviation: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """How much of the noisy data the estimate has,"""
        return self.data**2 / (self._both(deviation) + self.data**2)

    def added(self, deviation: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """and how much of what the network says: its target has a deviation of one."""
        both = self._both(deviation)
        return both.sqrt() * self.data / (both + self.data**2).sqrt()

    def draw(self, count: int, device: torch.device) -> Float[Tensor, " {count}"]:
        """Deviations for training."""
        return (self.median * (torch.randn(count, device=device) * self.spread).exp()).clamp(self.least, self.most)


def broad(number: Float[Tensor, " batch"], like: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch ..."]:
    """One number a row, to be multiplied with ``like``."""
    return number.view(-1, *[1] * (like.ndim - 1)).to(like.dtype)
