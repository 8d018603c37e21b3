"""Named tensors on their way into a system, and what comes out of a loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


class Batch(dict[str, Tensor]):
    """Tensors by name; the first axis of each is the batch.

    A tensor with a companion ``NAME_row`` is ragged: its entries (pictures, patches) belong to the rows that the
    companion numbers, in ascending order, and a row may have none or many.
    """

    @property
    def size(self) -> int:
        return next(iter(self.values())).shape[0]

    def to(self, device: torch.device | str) -> Batch:
        return Batch({k: v.to(device, non_blocking=True) for k, v in self.items()})

    def rows(self, start: int, stop: int) -> Batch:
        """Some rows, with the entries of the ragged tensors that are theirs."""
        out = Batch()
        for name, value in self.items():
            if name.endswith("_row") or f"{name}_row" in self:
                row = self[name if name.endswith("_row") else f"{name}_row"]
                here = (row >= start) & (row < stop)
                out[name] = value[here] - start if name.endswith("_row") else value[here]
            else:
                out[name] = value[start:stop]
        return out


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
