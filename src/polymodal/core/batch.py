"""Named tensors on their way into a system, and what comes out of a loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from polymodal.core.errors import DataError

IGNORE = -100  # the label of a token that is not learned: prompts, placeholders, padding


def padded(rows: Sequence[Sequence[int]], *, fill: int = 0, width: int | None = None) -> Tensor:
    """Rows of numbers (or of booleans) as one tensor, filled up at their ends to ``width``, else to the longest."""
    width = max(map(len, rows)) if width is None else width
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])


def text_batch(rows: Sequence[Sequence[int]], *, width: int | None = None) -> Batch:
    """The ``ids`` of rows, `padded`, and where they are ``valid``."""
    return Batch(ids=padded(rows, width=width), valid=padded([[True] * len(r) for r in rows], fill=False, width=width))


class Batch(dict[str, Tensor]):
    """Tensors by name; the first axis of each is the batch.

    A tensor with a companion ``NAME_row`` is ragged: its entries (pictures, patches) belong to the rows that the
    companion numbers, in ascending order, and a row may have none or many.
    """

    @property
    def size(self) -> int:
        return next(iter(self.values())).shape[0]

    def to(self, device: torch.device | str) -> Batch:
        """A copy there. To a CPU it waits: the tensors would else be read before they are written."""
        wait = torch.device(device).type == "cpu"
        return Batch({k: v.to(device, non_blocking=not wait) for k, v in self.items()})

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

    def take(self, order: Sequence[int]) -> Batch:
        """These rows in this order, with their entries of the ragged tensors."""
        out = Batch()
        for name, value in self.items():
            row = self.get(name if name.endswith("_row") else f"{name}_row")
            if row is None:
                out[name] = value[list(order)]
                continue
            entries = [(row == number).nonzero()[:, 0] for number in order]
            new = [torch.full_like(mine, place) for place, mine in enumerate(entries)]
            none = row.new_zeros(0)
            out[name] = torch.cat([none, *new]) if name.endswith("_row") else value[torch.cat([none, *entries])]
        return out

    @staticmethod
    def join(parts: Sequence[Batch]) -> Batch:
        """The rows of all parts in one batch, with fewer tokens padded: labels with `IGNORE`, all else with zeros.

        A part without a ragged tensor has no entries of it, and entries have one shape: a picture is not padded, but
        may have fewer tiles ``(entries, tiles, channels, height, width)``, which its size tells.

        Raises:
            DataError: the parts do not hold the same tensors, or media of several shapes.
        """
        out, starts = Batch(), [sum(part.size for part in parts[:n]) for n in range(len(parts))]
        for name in dict.fromkeys(name for part in parts for name in part):
            ragged = name.endswith("_row") or any(f"{name}_row" in part for part in parts)
            if not ragged and not all(name in part for part in parts):
                raise DataError(f"batches with and without {name!r} cannot be joined: their sources differ")
            held = [(part[name], start) for part, start in zip(parts, starts, strict=True) if name in part]
            if len({(tensor.ndim, tensor.dtype) for tensor, _ in held}) > 1:
                raise DataError(f"{name!r} has another type or number of axes in another source")
            fixed = 1 if ragged and held[0][0].ndim < 5 else 2  # the axes from here on are the same in all
            if len(shapes := {tuple(tensor.shape[fixed:]) for tensor, _ in held}) > 1:
                raise DataError(f"{name!r} has several shapes in one batch, {sorted(shapes)}: their sources differ")
            sizes = [max(axis) for axis in zip(*(tensor.shape[1:] for tensor, _ in held), strict=True)]
            fill = IGNORE if name == "labels" else 0
            padded = []
            for tensor, start in held:
                tensor = tensor + start if name.endswith("_row") else tensor
                room = [size - now for size, now in zip(sizes, tensor.shape[1:], strict=True)]
                padded.append(F.pad(tensor, [n for more in reversed(room) for n in (0, more)], value=fill))
            out[name] = torch.cat(padded)
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
