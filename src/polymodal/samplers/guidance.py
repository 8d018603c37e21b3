"""Away from what is asked against, and the noise of each row.

Source: classifier-free guidance: Ho & Salimans 2022, https://arxiv.org/abs/2207.12598; its rescaling: Lin et al. 2023,
https://arxiv.org/abs/2305.08891; in an interval only: Kynkäänniemi et al. 2024, https://arxiv.org/abs/2404.07724.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How far from one prediction to go beyond another.

    Attributes:
        scale: 1 stays at what is asked for.
        rescale: how much of the larger deviation that this makes is taken back, 0 to 1.
        interval: the share of the way to data from which on, and to which, there is guidance.
    """

    scale: float = 1.0
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)

    def at(self, progress: float) -> bool:
        """Whether there is guidance so far on the way."""
        return self.scale != 1 and self.interval[0] <= progress <= self.interval[1]

    def mix(
        self, asked: Float[Tensor, "batch *shape"], against: Float[Tensor, "batch *shape"]
    ) -> Float[Tensor, "batch *shape"]:
        """The guided prediction."""
        guided = against + self.scale * (asked - against)
        if not self.rescale:
            return guided
        every = tuple(range(1, asked.ndim))
        factor = asked.std(every, keepdim=True) / guided.std(every, keepdim=True)
        return guided * (self.rescale * factor + 1 - self.rescale)


class Dice:
    """Noise for rows, each from its own seed: a row gets the same whatever others are drawn with it."""

    def __init__(self, seeds: Sequence[int]) -> None:
        # On the CPU, so that a seed means the same on all devices.
        self._rows = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, shape: tuple[int, ...], device: torch.device) -> Float[Tensor, "rows *shape"]:
        return torch.stack([torch.randn(shape, generator=row) for row in self._rows]).to(device)
