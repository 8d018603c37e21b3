"""Which spans of a sequence are hidden while training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from polymodal.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Spans:
    """Spans of ``length`` steps that may overlap, at random starts.

    Attributes:
        share: steps that would be hidden if no two spans met.
        length: steps of a span.
        least: spans in every row, if they fit.
    """

    share: float = 0.05
    length: int = 10
    least: int = 2

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1 or self.length < 1:
            raise ConfigError(f"spans need a share from 0 to 1 and a length, not {self.share} and {self.length}")

    def draw(
        self, lengths: Int[Tensor, " batch"], size: int, generator: torch.Generator | None = None
    ) -> Bool[Tensor, "batch size"]:
        """True where a step is hidden, never behind the end of its row."""
        hidden = torch.zeros(len(lengths), size, dtype=torch.bool)
        rounding = float(torch.rand((), generator=generator))
        for row, steps in zip(hidden, lengths.tolist(), strict=True):
            places = steps - self.length + 1
            if places < 1:
                continue
            count = max(int(self.share * steps / self.length + rounding), self.least)
            starts = torch.randperm(places, generator=generator)[: min(count, max(1, steps // self.length))]
            row[(starts[:, None] + torch.arange(self.length)).flatten()] = True
        return hidden.to(lengths.device)
