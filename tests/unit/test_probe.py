"""Probes of frozen vectors: perfect where the answer is there, chance where it is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from polymodal.core.errors import DataError
from polymodal.core.interval import Interval
from polymodal.evaluate.probe import linear_probe, nearest_neighbours

PROBES = [linear_probe, nearest_neighbours]


def blobs(count: int, spread: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Four classes around fixed directions of an eight-dimensional space."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    return torch.eye(8)[labels] + spread * torch.randn(count, 8, generator=generator), labels


@pytest.mark.parametrize("probe", PROBES)
def test_what_is_there_is_found(probe: Callable[..., Interval]) -> None:
    assert probe(*blobs(200, 0.1, 0), *blobs(100, 0.1, 1)).value == 1.0


@pytest.mark.parametrize("probe", PROBES)
def test_noise_is_chance(probe: Callable[..., Interval]) -> None:
    _, y = blobs(400, 0.0, 0)
    found = probe(torch.randn(400, 8), y, torch.randn(400, 8), blobs(400, 0.0, 1)[1])
    assert found.low < 0.25 < found.high


def test_linear_probe_reads_a_small_direction_that_neighbours_miss() -> None:
    """Standardised features: a label in a coordinate a thousandth as large as the rest is as good as any."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 6, generator=generator)
    y = (x[:, 0] > 0).long()
    x = x * torch.tensor([1e-3, 1, 1, 1, 1, 1])
    assert linear_probe(x[:400], y[:400], x[400:], y[400:]).value > 0.97
    assert nearest_neighbours(x[:400], y[:400], x[400:], y[400:]).value < 0.7


def test_linear_probe_is_a_minimum() -> None:
    """No other seed or order of the data gives another answer."""
    x, y = blobs(150, 0.8, 0)
    asked = blobs(300, 0.8, 1)
    order = torch.randperm(150)
    assert linear_probe(x, y, *asked) == linear_probe(x[order], y[order], *asked)
    with torch.inference_mode():
        assert linear_probe(x, y, *asked).n == 300


def test_neighbours_vote_by_similarity() -> None:
    known = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])
    labels, asked = torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.1]])
    assert nearest_neighbours(known, labels, asked, torch.tensor([0]), k=3).value == 1.0
    # Without weights the two others would win.
    assert nearest_neighbours(known, labels, asked, torch.tensor([1]), k=3, temperature=100.0).value == 1.0


@pytest.mark.parametrize("probe", PROBES)
def test_bad_vectors_are_refused(probe: Callable[..., Interval]) -> None:
    x, y = blobs(10, 0.1, 0)
    with pytest.raises(DataError, match="not finite"):
        probe(x * float("nan"), y, x, y)
    with pytest.raises(DataError, match="some of each"):
        probe(x[:0], y[:0], x, y)
