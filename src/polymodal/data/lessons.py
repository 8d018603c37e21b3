"""Conversations, or pictures with captions, as a source of batches; and several sources as one."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from polymodal.core.batch import Batch
from polymodal.core.chat import Chat
from polymodal.core.errors import DataError
from polymodal.core.sample import Sample
from polymodal.data.loader import Source


@dataclass(frozen=True)
class Lessons:
    """A source of conversations.

    Args:
        chats: what to learn from, e.g. a `Dataset`.
        lesson: makes a batch of chats: a model's method of this name, of which only the tokenizer, the template and the
            processors are used. A model on the meta device will do.
    """

    chats: Sequence[Chat]
    lesson: Callable[[Sequence[Chat]], Batch]

    def __len__(self) -> int:
        return len(self.chats)

    def batch(self, indices: Sequence[int], rng: np.random.Generator) -> Batch:
        return self.lesson([self.chats[i] for i in indices])


@dataclass(frozen=True)
class Pairs:
    """A source of pictures and their captions, as dual encoders read them.

    Args:
        samples: each of a picture and a text, e.g. a `Dataset` that is read by `rows.sample`.
        prepare: makes a batch of samples of one kind: a model's method of this name.
    """

    samples: Sequence[Sample]
    prepare: Callable[[Sequence[Sample]], Batch]

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, indices: Sequence[int], rng: np.random.Generator) -> Batch:
        chosen = [self.samples[i] for i in indices]
        for index, sample in zip(indices, chosen, strict=True):
            if (len(sample.images), len(sample.texts)) != (1, 1):
                raise DataError(f"sample {index} is no pair: {len(sample.images)} pictures, {len(sample.texts)} texts")
        pictures = self.prepare([Sample((sample.images[0],)) for sample in chosen])
        return Batch(pictures | self.prepare([Sample((sample.texts[0],)) for sample in chosen]))


class Mixture:
    """Several sources as one, whose epoch has as many items as they have together.

    Of a source that has fewer rows than its share of the epoch, each row comes equally often, give or take one. Of one
    that has more, a part is read: its rows are dealt out to the items of its share, and each item draws one of its own,
    so that no row comes twice in an epoch and all of them come in time.

    Args:
        sources: what to mix; the names and types of their tensors are the same.
        shares: of the items of an epoch, in any unit; as many as each source has rows if not given.

    Raises:
        DataError: the shares are not one positive number a source, or one is too small for a single item.
    """

    def __init__(self, sources: Sequence[Source], shares: Sequence[float | int] | None = None) -> None:
        self.sources = list(sources)
        self._rows = [len(source) for source in sources]
        weights = np.array(self._rows if shares is None else shares, float)
        good = (np.isfinite(weights) & (weights > 0)).all() and all(self._rows)
        if len(weights) != len(self._rows) or not len(weights) or not good:
            raise DataError(f"{len(self._rows)} sources of {self._rows} rows need as many positive shares: {shares}")
        exact = weights / weights.sum() * sum(self._rows)
        self.items = np.floor(exact).astype(int)
        left = sum(self._rows) - int(self.items.sum())
        self.items[np.argsort(self.items - exact, kind="stable")[:left]] += 1
        if not self.items.all():
            raise DataError(f"shares {shares} of {sum(self._rows)} items leave a source without any: give it more")
        self._ends = np.cumsum(self.items).tolist()

    def __len__(self) -> int:
        return self._ends[-1]

    def batch(self, indices: Sequence[int], rng: np.random.Generator) -> Batch:
        mine: dict[int, list[int]] = {}  # source -> places in the batch
        rows = []
        for place, index in enumerate(indices):
            number = bisect.bisect_right(self._ends, index)
            mine.setdefault(number, []).append(place)
            rows.append(self._row(number, index - self._ends[number] + int(self.items[number]), rng))
        parts = [self.sources[number].batch([rows[p] for p in places], rng) for number, places in sorted(mine.items())]
        order = np.argsort([place for _, places in sorted(mine.items()) for place in places])
        return Batch.join(parts).take(order.tolist())

    def _row(self, number: int, item: int, rng: np.random.Generator) -> int:
        rows, items = self._rows[number], int(self.items[number])
        if items >= rows:
            return item % rows
        return item + items * int(rng.integers(-(-(rows - item) // items)))
