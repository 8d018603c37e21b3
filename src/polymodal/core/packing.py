"""Several short samples in one row: less padding, and the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from polymodal.core.tokens import Tokens


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of the samples that share them: the longest first, each in the first row with room for it.

    What is longer than ``capacity`` has a row of its own. Samples of length 0 are in no row.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[number]
        if not length:
            continue
        row = next((i for i, left in enumerate(room) if left >= length), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(number)
        room[row] -= length
    return rows


@dataclass(frozen=True, kw_only=True, eq=False)
class Packing:
    """Where the tokens of samples with a row of their own go when they share rows as long as the longest of them.

    A longer row would save little more padding and mask more attention; a shorter one does not hold the longest sample.
    Blocks, positions and modalities are worked out while each sample is alone and move with its tokens, so a picture's
    block stays bidirectional and every count, M-RoPE's too, begins at zero in each sample.

    Attributes:
        source: the token of the lone rows, flattened, that each place takes; 0 where ``filled`` is False.
        filled: the places that are taken.
        sample: the lone row that a place belongs to; -1 where none.
        place: where each lone token goes, flattened; 0 for padding.
        valid: the lone tokens that are no padding.
    """

    source: Int[Tensor, "rows length"]
    filled: Bool[Tensor, "rows length"]
    sample: Int[Tensor, "rows length"]
    place: Int[Tensor, "batch tokens"]
    valid: Bool[Tensor, "batch tokens"]

    @classmethod
    def of(cls, valid: Bool[Tensor, "batch tokens"]) -> Packing:
        """A packing of rows with padding."""
        batch, width = valid.shape
        tokens = [row.nonzero()[:, 0] for row in valid.cpu()]
        lengths = list(map(len, tokens))
        longest = max([1, *lengths])
        rows = first_fit(lengths, longest) or [[]]
        source = torch.zeros(len(rows), longest, dtype=torch.int64)
        sample = torch.full_like(source, -1)
        place = torch.zeros(batch, width, dtype=torch.int64)
        for row, numbers in enumerate(rows):
            start = 0
            for number in numbers:
                stop = start + lengths[number]
                source[row, start:stop] = number * width + tokens[number]
                sample[row, start:stop] = number
                place[number, tokens[number]] = row * longest + torch.arange(start, stop)
                start = stop
        source, sample, place = (t.to(valid.device) for t in (source, sample, place))
        return cls(source=source, filled=sample >= 0, sample=sample, place=place, valid=valid)

    @property
    def padding(self) -> tuple[float, float]:
        """The share of places that hold no token: with a row for each sample, and packed."""
        return 1 - float(self.valid.float().mean()), 1 - float(self.filled.float().mean())

    def pack(self, tokens: Tokens) -> Tokens:
        """The tokens of lone rows in the rows that they share."""
        assert bool((tokens.sample == tokens.sample[:, :1]).all()), "rows that are packed already"

        def moved(values: Shaped[Tensor, "batch tokens *more"]) -> Shaped[Tensor, "rows length *more"]:
            return _taken(values, self.source)

        return replace(
            tokens, x=moved(tokens.x), valid=self.filled, block=moved(tokens.block), position=moved(tokens.position),
            modality=moved(tokens.modality), sample=self.sample,
        )  # fmt: skip

    def unpack(self, x: Shaped[Tensor, "rows length *more"]) -> Shaped[Tensor, "batch tokens *more"]:
        """What was made of each token, in lone rows again; zero for padding."""
        out = _taken(x, self.place)
        return out.masked_fill(~self.valid.reshape(*self.valid.shape, *(1,) * (out.ndim - 2)), 0)


def _taken(values: Tensor, index: Tensor) -> Tensor:
    """``values`` of flattened rows; not by indexing, whose backward pass sorts."""
    return values.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape)
