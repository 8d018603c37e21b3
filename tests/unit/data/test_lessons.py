"""Conversations and mixtures as sources: the same batches on any number of workers and after a resume."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage
from torch import nn

import polymodal
from polymodal.backbones.decoder import pack_rows
from polymodal.core.batch import IGNORE, Batch
from polymodal.core.errors import DataError
from polymodal.core.sample import Sample
from polymodal.data.lessons import Lessons, Mixture, Pairs
from polymodal.data.loader import Loader, Source
from polymodal.data.readers import open_dataset
from polymodal.heads.lm import IGNORE as OF_THE_HEAD
from polymodal.systems.base import DualEncoder
from polymodal.tokenizers.text import TextTokenizer
from polymodal.train.loop import fit
from polymodal.train.run import Constant, Header, Run, Stage
from tests.nano import NANO
from tests.talking import talking


class Numbers:
    """Gives back its name and the row, wider the larger its name is, with a picture for each odd row."""

    def __init__(self, name: int, rows: int) -> None:
        self.name, self.rows = name, rows

    def __len__(self) -> int:
        return self.rows

    def batch(self, indices: Sequence[int], rng: np.random.Generator) -> Batch:
        row = torch.tensor(indices, dtype=torch.int64)
        odd = (row % 2 == 1).nonzero()[:, 0]
        values = row[:, None].expand(-1, self.name + 1).contiguous()
        out = Batch(ids=values, name=torch.full_like(row, self.name), labels=values.clone())
        return Batch(out | {"pixels": row[odd][:, None].float(), "pixels_row": odd})


def drawn(mixture: Mixture, indices: Sequence[int], seed: int = 0) -> list[tuple[int, int]]:
    batch = mixture.batch(indices, np.random.default_rng(seed))
    return list(zip(batch["name"].tolist(), batch["ids"][:, 0].tolist(), strict=True))


@given(
    st.lists(st.tuples(st.integers(1, 30), st.floats(0.05, 10)), min_size=1, max_size=4),
    st.booleans(),
    st.integers(0, 9),
)
def test_an_epoch_of_a_mixture(parts: list[tuple[int, float]], shared: bool, seed: int) -> None:
    sources = [Numbers(n, rows) for n, (rows, _) in enumerate(parts)]
    try:
        mixture = Mixture(sources, [share for _, share in parts] if shared else None)
    except DataError:
        assert min(share for _, share in parts) < 1
        return
    total = sum(rows for rows, _ in parts)
    assert len(mixture) == sum(mixture.items) == total
    weights = np.array([share if shared else rows for rows, share in parts])
    assert (np.abs(mixture.items - weights / weights.sum() * total) < 1).all()
    found = drawn(mixture, range(total), seed)
    assert found == drawn(mixture, range(total), seed)
    for number, (rows, _) in enumerate(parts):
        counts = Counter(row for name, row in found if name == number)
        assert set(counts) <= set(range(rows))
        assert counts.total() == mixture.items[number]
        most, least = max(counts.values()), min(counts[row] for row in range(rows))
        assert most - least <= 1


def test_every_row_of_a_source_with_a_small_share_comes_in_time() -> None:
    mixture = Mixture([Numbers(0, 20), Numbers(1, 20)], [1, 7])
    assert mixture.items.tolist() == [5, 35]
    seen = {row for seed in range(60) for name, row in drawn(mixture, range(40), seed) if name == 0}
    assert seen == set(range(20))


def test_rows_of_a_mixed_batch_keep_what_is_theirs() -> None:
    mixture = Mixture([Numbers(0, 8), Numbers(2, 8)])
    indices = [9, 3, 15, 0, 1, 12]
    batch = mixture.batch(indices, np.random.default_rng(0))
    assert batch["ids"][:, 0].tolist() == [1, 3, 7, 0, 1, 4]
    assert batch["ids"].tolist()[1] == [3, 0, 0]
    assert batch["labels"].tolist()[1] == [3, IGNORE, IGNORE]
    assert batch["pixels_row"].tolist() == [0, 1, 2, 4]
    assert batch["pixels"][:, 0].tolist() == [1, 3, 7, 1]
    assert IGNORE == OF_THE_HEAD


@pytest.mark.parametrize("shares", [[1], [1, 0], [1, -1], [1, float("nan")], [1, 1e-9]])
def test_impossible_shares_are_refused(shares: list[float | int]) -> None:
    with pytest.raises(DataError, match="share"):
        Mixture([Numbers(0, 4), Numbers(1, 4)], shares)


def test_sources_that_do_not_fit_are_refused() -> None:
    class Other(Numbers):
        def batch(self, indices: Sequence[int], rng: np.random.Generator) -> Batch:
            return Batch(ids=torch.zeros(len(indices), 1, dtype=torch.int64))

    with pytest.raises(DataError, match="with and without 'name'"):
        Mixture([Numbers(0, 4), Other(1, 4)]).batch([0, 5], np.random.default_rng(0))


def test_pictures_are_never_padded() -> None:
    def seen(*shape: int, ragged: bool = True) -> Batch:
        batch = Batch(ids=torch.ones(1, shape[-1]).long(), pixels=torch.ones(shape))
        return Batch(batch | ({"pixels_row": torch.zeros(1).long()} if ragged else {}))

    for ragged in (True, False):
        with pytest.raises(DataError, match="'pixels' has several shapes"):
            Batch.join([seen(1, 3, 4, 4, ragged=ragged), seen(1, 3, 6, 6, ragged=ragged)])
    with pytest.raises(DataError, match="'pixels' has several shapes"):
        Batch.join([seen(1, 4), seen(1, 6)])
    tiles = Batch.join([seen(1, 5, 3, 4, 4), seen(1, 2, 3, 4, 4)])["pixels"]  # of a large and a small picture
    assert tiles.sum((2, 3, 4)).tolist() == [[48] * 5, [48, 48, 0, 0, 0]]
    patches = Batch.join([seen(1, 5, 4, ragged=False), seen(1, 2, 4, ragged=False)])["pixels"]  # a mask counts them
    assert patches.shape == (2, 5, 4)


@pytest.mark.parametrize(("start", "stop"), [(0, 9), (2, 7), (4, 5), (0, 0)])
def test_rows_in_their_order_are_taken_as_a_slice(start: int, stop: int) -> None:
    batch = Numbers(1, 9).batch(range(9), np.random.default_rng(0))
    expected, taken = batch.rows(start, stop), batch.take(list(range(start, stop)))
    assert taken.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in taken.items())


def test_pairs() -> None:
    words = TextTokenizer.train_bpe(["a red cup", "a blue plate"], 520)
    config = NANO["clip"]
    model = polymodal.build(
        replace(config, text=replace(config.text, vocab_size=words.vocab_size), eot_id=words.vocab_size - 1)
    )
    assert isinstance(model, DualEncoder)
    model.tokenizer = words
    pictures = [PILImage.new("RGB", (20, 16 + n), (60 * n, 0, 0)) for n in range(3)]
    samples = [Sample.of([picture, "a red cup" if n else "a"]) for n, picture in enumerate(pictures)]
    batch = Pairs(samples, model.prepare).batch([2, 0], np.random.default_rng(0))
    assert batch["ids"].tolist() == words(["a red cup", "a"])[0].tolist()
    assert torch.equal(batch["pixels"], model.prepare([Sample.of(pictures[2]), Sample.of(pictures[0])])["pixels"])
    assert torch.isfinite(model.loss(batch).total)
    with pytest.raises(DataError, match="sample 0 is no pair"):
        Pairs([Sample.of("a")], model.prepare).batch([0], np.random.default_rng(0))


# ---- a whole run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("data")
    rng, seen, read = np.random.default_rng(0), [], []
    for number in range(12):
        height, width = rng.integers(9, 40, 2)
        PILImage.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(place / f"{number}.png")
        said = [
            {"from": "human", "value": "<image>\nwhat is it? " * (1 + number % 3)},
            {"from": "gpt", "value": "a ring"},
        ]
        seen.append({"image": [f"{number}.png"] * (1 + number % 3), "conversations": said})
        read.append({"messages": [{"role": "user", "content": "how many?"}, {"role": "assistant", "content": "two"}]})
    (place / "seen.json").write_text(json.dumps(seen))
    (place / "read.jsonl").write_text("\n".join(map(json.dumps, read)))
    return place


def source(folder: Path) -> Source:
    lesson = talking("llava").lesson
    parts = [Lessons(open_dataset(folder / name), lesson) for name in ("seen.json", "read.jsonl")]
    return Mixture(parts, [3, 1])


def test_workers_and_resume_change_nothing(folder: Path) -> None:
    def batches(start: int, workers: int) -> list[Batch]:
        with Loader(source(folder), batch_size=4, seed=3, start_step=start, stop_step=9, workers=workers) as loader:
            return [item.batch for item in loader]

    expected = batches(0, 0)
    assert any(batch["pixels_row"].tolist() != list(range(batch.size)) for batch in expected)
    for start in (0, 4):
        for batch, wanted in zip(batches(start, 2), expected[start:], strict=True):
            assert batch.keys() == wanted.keys()
            assert all(torch.equal(tensor, wanted[name]) for name, tensor in batch.items())


def run(folder: Path, packed: bool) -> Run:
    def model() -> nn.Module:
        made = talking("llava")
        if packed:
            pack_rows(made)
        return made

    stage = Stage(
        name="one",
        steps=6,
        batch_size=8,
        accumulate=2,
        workers=2,
        lr=1e-3,
        schedule=Constant(),
        source=partial(source, folder),
    )
    return Run(name="toy", header=Header(command="", machine="", time="", expected=""), model=model, stages=[stage])


def curve(place: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (place / "metrics.jsonl").read_text().splitlines()]


def test_a_packed_run_is_the_run(folder: Path, tmp_path: Path) -> None:
    """Packing is no other training: the curve is the same, and so it is after a stop half way."""
    fit(run(folder, False), tmp_path / "lone", device="cpu")
    fit(run(folder, True), tmp_path / "packed", device="cpu", until_step=3)
    fit(run(folder, True), tmp_path / "packed", device="cpu")
    lone, packed = curve(tmp_path / "lone"), curve(tmp_path / "packed")
    assert len(lone) == 6
    np.testing.assert_allclose(packed, lone, rtol=1e-4)
    assert len(set(lone)) == 6
