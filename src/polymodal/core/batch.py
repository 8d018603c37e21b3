"""Named tensors on their way into a system, and what comes out of a loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


class Batch(dict[str, Tensor]):
    """Tensors by name; the first axis of each is the batch."""

    @property
    def size(self) -> int:
        return next(iter(self.values())).shape[0]

    def to(self, device: torch.device | str) -> Batch:
        return Batch({k: v.to(device, non_blocking=True) for k, v in self.items()})

    def rows(self, start: int, stop: int) -> Batch:
        return Batch({k: v[start:stop] for k, v in self.items()})


@dataclass
class Loss:
    """A loss summed over ``weight`` items, so that micro-batches and ranks add up to the global mean.

    ``total.sum() / weight.sum()`` over all micro-batches of all ranks is the loss of the global batch.
    """

    total: Tensor  # scalar, with gradient: the sum over the items
    weight: int | float  # how many items (supervised tokens, rows, masked patches) it is a sum of
    metrics: Mapping[str, float | Tensor] = field(default_factory=dict)  # scalars to log

    @property
    def mean(self) -> Tensor:
        return self.total / self.weight
