"""Batches in an order that is a pure function of seed, epoch and step, prepared ahead by threads."""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from polymodal.core.batch import Batch
from polymodal.core.errors import DataError


@runtime_checkable
class Source(Protocol):
    """Items by number. `batch` is called from several threads at once."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int], rng: np.random.Generator) -> Batch:
        """The items of ``indices`` in this order; all that is random is drawn from ``rng``."""
        ...


@dataclass(frozen=True, kw_only=True)
class Item:
    """One rank's share of the batch of one step."""

    step: int
    indices: list[int]
    batch: Batch


@functools.lru_cache(maxsize=4)
def _permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(length)


def order(length: int, seed: int, step: int, batch_size: int, rank: int = 0, world: int = 1) -> list[int]:
    """The items that ``rank`` reads at ``step``: a pure function of its arguments, equally fast for every step.

    Each epoch is a new permutation; the rows past its last whole batch are dropped. ``batch_size`` counts the rows of
    all ranks, of which each takes an equal, consecutive share.

    Raises:
        DataError: there are fewer items than one batch, or the batch cannot be shared equally.
    """
    if not 1 <= batch_size <= length:
        raise DataError(f"a batch of {batch_size} cannot be drawn from {length} items: change batch_size or the data")
    if batch_size % world:
        raise DataError(f"a batch of {batch_size} rows cannot be shared equally by {world} processes")
    epoch, position = divmod(step, length // batch_size)
    share = batch_size // world
    start = position * batch_size + rank * share
    return _permutation(length, seed, epoch)[start : start + share].tolist()


class Loader:
    """Iterates from ``start_step`` to ``stop_step``, keeping ``workers + 1`` batches in preparation.

    Threads and not processes: decoding, resizing and rendering release the GIL, and nothing has to be pickled. With
    ``workers=0`` a batch is made when it is asked for. Close it (or leave its ``with`` block) to end the threads.

    Args:
        batch_size: rows of one step over all ranks.
        pin: put tensors in page-locked memory, so that the copy to a GPU overlaps with work.
    """

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int,
        seed: int,
        start_step: int,
        stop_step: int,
        workers: int = 2,
        rank: int = 0,
        world: int = 1,
        pin: bool = False,
    ) -> None:
        self.source = source
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world = world
        self.pin = pin
        self.waited = 0.0  # seconds that the trainer has stood still for data
        self._steps = iter(range(start_step, stop_step))
        self._ahead = workers + 1
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="loader") if workers else None
        self._queue: deque[Future[Item]] = deque()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        began = time.perf_counter()
        try:
            if self._pool is None:
                return self._make(next(self._steps))
            while len(self._queue) < self._ahead and (step := next(self._steps, None)) is not None:
                self._queue.append(self._pool.submit(self._make, step))
            if not self._queue:
                raise StopIteration
            return self._queue.popleft().result()
        finally:
            self.waited += time.perf_counter() - began

    def _make(self, step: int) -> Item:
        indices = order(len(self.source), self.seed, step, self.batch_size, self.rank, self.world)
        try:
            batch = self.source.batch(indices, np.random.default_rng([self.seed, step, self.rank]))
        except Exception as error:
            raise DataError(
                f"the batch of step {step} (items {shorten(indices)}) failed: {type(error).__name__}: {error}"
            ) from error
        for name, tensor in batch.items():
            ragged = name.endswith("_row") or f"{name}_row" in batch
            if not ragged and tensor.shape[:1] != torch.Size([len(indices)]):
                raise DataError(
                    f"the batch of step {step} holds {name!r} of shape {tuple(tensor.shape)}; "
                    f"its first axis should be the {len(indices)} items {shorten(indices)}"
                )
        return Item(step=step, indices=indices, batch=_pinned(batch) if self.pin else batch)


def shorten(indices: Sequence[int], most: int = 16) -> str:
    """The indices for a message: ``[4, 8, 15, ... 64 in all]``."""
    if len(indices) <= most:
        return str(list(indices))
    return f"[{', '.join(map(str, indices[:most]))}, ... {len(indices)} in all]"


def _pinned(batch: Batch) -> Batch:
    return Batch({name: tensor.pin_memory() for name, tensor in batch.items()})
