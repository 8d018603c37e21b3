from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polymodal.core.batch import Batch
from polymodal.core.errors import DataError
from polymodal.data.loader import Loader, order

shapes = st.integers(1, 40).flatmap(
    lambda length: st.tuples(st.just(length), st.integers(1, length), st.integers(0, 2**40), st.integers(0, 5))
)


@given(shapes)
def test_an_epoch_is_a_permutation_without_its_last_rows(shape: tuple[int, int, int, int]) -> None:
    length, batch, seed, epoch = shape
    per_epoch = length // batch
    steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
    seen = [i for step in steps for i in order(length, seed, step, batch)]
    assert len(seen) == len(set(seen)) == per_epoch * batch
    assert set(seen) <= set(range(length))


@given(shapes, st.integers(1, 4), st.integers(0, 10**9))
def test_the_ranks_share_the_global_batch(shape: tuple[int, int, int, int], world: int, step: int) -> None:
    length, batch, seed, _ = shape
    length, batch = length * world, batch * world
    shares = [order(length, seed, step, batch, rank, world) for rank in range(world)]
    assert {len(share) for share in shares} == {batch // world}
    assert [i for share in shares for i in share] == order(length, seed, step, batch)


def test_epochs_and_seeds_differ() -> None:
    one = order(1000, 0, 0, 1000)
    assert one != order(1000, 0, 1, 1000)
    assert one != order(1000, 1, 0, 1000)
    assert sorted(one) == list(range(1000))


@pytest.mark.parametrize(("length", "batch", "world"), [(3, 4, 1), (0, 1, 1), (4, 0, 1), (8, 3, 2)])
def test_impossible_batches_are_refused(length: int, batch: int, world: int) -> None:
    with pytest.raises(DataError, match=f"batch of {batch}"):
        order(length, 0, 0, batch, 0, world)


class Numbers:
    """Gives back what it was asked for, with a random draw and the thread that made it."""

    def __init__(self, broken: int | None = None, short: bool = False) -> None:
        self.broken, self.short = broken, short
        self.threads: set[str] = set()

    def __len__(self) -> int:
        return 50

    def batch(self, indices: Sequence[int], rng: np.random.Generator) -> Batch:
        self.threads.add(threading.current_thread().name)
        if self.broken in indices:
            raise OSError("the disk is gone")
        values = torch.tensor(indices)[: -1 if self.short else None]
        return Batch(i=values, r=torch.from_numpy(rng.random(len(values))))


def loader(source: Numbers, start: int = 0, stop: int = 12, workers: int = 2, rank: int = 0, world: int = 1) -> Loader:
    return Loader(
        source, batch_size=8, seed=5, start_step=start, stop_step=stop, workers=workers, rank=rank, world=world
    )


def contents(items: Loader) -> list[tuple[int, list[int], list[int], list[float]]]:
    with items:
        return [(item.step, item.indices, item.batch["i"].tolist(), item.batch["r"].tolist()) for item in items]


def test_threads_change_nothing() -> None:
    inline, threaded = Numbers(), Numbers()
    expected = contents(loader(inline, workers=0))
    assert contents(loader(threaded, workers=3)) == expected
    assert inline.threads == {"MainThread"}
    assert "MainThread" not in threaded.threads
    assert [step for step, *_ in expected] == list(range(12))
    assert all(asked == given for _, asked, given, _ in expected)


def test_starting_anywhere_equals_going_there() -> None:
    everything = contents(loader(Numbers()))
    for start in (1, 5, 6, 11, 12):
        assert contents(loader(Numbers(), start=start)) == everything[start:]


def test_ranks_draw_different_numbers() -> None:
    first, second = (contents(loader(Numbers(), rank=rank, world=2)) for rank in (0, 1))
    assert all(a[3] != b[3] for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_failing_batch_is_named_where_it_is_used(workers: int) -> None:
    source = Numbers(broken=order(50, 5, 3, 8)[0])
    with loader(source, workers=workers) as items:
        assert [next(items).step for _ in range(3)] == [0, 1, 2]
        with pytest.raises(DataError, match=rf"step 3 \(items \[{source.broken}, .*OSError: the disk is gone"):
            next(items)


def test_a_short_batch_is_refused() -> None:
    with loader(Numbers(short=True)) as items, pytest.raises(DataError, match=r"'i' of shape \(7,\).* the 8 items"):
        next(items)


def test_the_time_without_data_is_counted() -> None:
    with loader(Numbers(), workers=0) as items:
        before = items.waited
        next(items)
        assert items.waited > before


def test_closing_ends_the_threads() -> None:
    with loader(Numbers(), stop=10**9) as items:
        next(items)
    assert not any(thread.name.startswith("loader") for thread in threading.enumerate())
