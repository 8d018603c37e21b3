"""Search finds what brute force finds, filters say exactly what they mean, and near-duplicates stand together."""

from __future__ import annotations

import datetime as dt
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage

from polymodal.core.errors import ConfigError
from polymodal.core.sample import Image
from polymodal.retrieve import Index, Reader
from polymodal.retrieve.filters import any_path, to_sql
from polymodal.retrieve.store import PICTURES
from tests.histogram import Histogram

DIM = Histogram.embedding_dim


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def put(index: Index, vectors: np.ndarray, paths: Sequence[str] = (), **facts: Sequence[Any]) -> None:
    """Rows without files."""
    start = index.store.pictures.count_rows()
    rows = []
    for i, vector in enumerate(vectors):
        row = {
            "path": paths[i] if paths else f"/p/{start + i}.png",
            "hash": f"{start + i:064x}",
            "bytes": 100 + i,
            "mtime_ns": i,
            "modified": None,
            "time": None,
            "width": 10,
            "height": 10,
            "thumbnail": b"",
            "vector": vector,
        }
        rows.append({**row, **{name: values[i] for name, values in facts.items()}})
    index.store.add(PICTURES, index.store.table(PICTURES, rows))


def clusters(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((50, DIM))
    return unit(centres[rng.integers(0, 50, count)] + 0.8 * rng.standard_normal((count, DIM)))


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return Index.create(tmp_path / "index", Histogram())


def numbers(hits: list) -> list[int]:
    return [int(Path(h.path).stem) for h in hits]


def test_words_and_pictures_find_pictures(index: Index, tmp_path: Path) -> None:
    model = Histogram()
    (tmp_path / "p").mkdir()
    for name in ("red", "green", "blue"):
        PILImage.new("RGB", (20, 20), name).save(tmp_path / f"p/{name}.png")
    index.update(model, [tmp_path / "p"])
    assert Path(index.search("a blue thing", model=model, top=1)[0].path).stem == "blue"
    buffer = io.BytesIO()
    PILImage.new("RGB", (9, 9), "green").save(buffer, "PNG")
    hits = index.search(Image(buffer.getvalue()), model=model)
    assert next(Path(h.path).stem for h in hits) == "green"
    assert [h.score for h in hits] == sorted((h.score for h in hits), reverse=True)
    assert hits[0].score == pytest.approx(1, abs=1e-5)


def test_flat_search_is_exact(index: Index) -> None:
    vectors = clusters(500)
    put(index, vectors)
    for query in clusters(20, seed=1):
        hits = index.search(10 * query, top=10, group=False)  # the length of a query says nothing
        assert numbers(hits) == np.argsort(-vectors @ query, kind="stable")[:10].tolist()
        np.testing.assert_allclose([h.score for h in hits], np.sort(vectors @ query)[::-1][:10], atol=1e-5)


def test_vector_index_is_built_extended_and_as_good_as_exact(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polymodal.retrieve.store.FLAT_ROWS", 4000)
    monkeypatch.setattr("polymodal.retrieve.store.TAIL_ROWS", 500)
    vectors = clusters(5000)
    put(index, vectors[:3999])
    index.store.tidy()
    assert index.stats().scanned == 3999, "below the bar there is nothing to train"
    put(index, vectors[3999:4500])
    index.store.tidy()
    assert index.stats().scanned == 0

    put(index, vectors[4500:])
    index.store.tidy()
    assert index.stats().scanned == 500, "a short tail is scanned beside the index"
    hits = [numbers(index.search(vectors[i], top=1)) for i in range(4500, 4520)]
    assert hits == [[i] for i in range(4500, 4520)]

    put(index, clusters(1, seed=3))
    index.store.tidy()
    assert index.stats().scanned == 0
    everything = np.concatenate([vectors, clusters(1, seed=3)])
    queries = clusters(50, seed=4)
    found = [numbers(index.search(q, top=10, group=False)) for q in queries]
    best = np.argsort(-queries @ everything.T, axis=1)[:, :10]
    recall = np.mean([len(set(f) & set(b.tolist())) / 10 for f, b in zip(found, best, strict=True)])
    assert recall >= 0.99


def test_a_narrow_filter_is_answered_in_full_by_the_vector_index(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polymodal.retrieve.store.FLAT_ROWS", 4000)
    vectors = clusters(4000)
    put(index, vectors)
    index.store.tidy()
    hits = index.search(vectors[7], top=10, where="bytes>=4080", group=False)
    allowed = np.arange(3980, 4000)
    wanted = allowed[np.argsort(-vectors[allowed] @ vectors[7])[:10]]
    assert numbers(hits) == wanted.tolist()


def test_many_small_writes_are_put_together(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polymodal.retrieve.store.FRAGMENTS", 5)
    vectors = clusters(7)
    for vector in vectors:
        put(index, vector[None])
    old_reader = Reader.open(index.path)
    index.store.tidy()
    assert index.store.pictures.stats()["fragment_stats"]["num_fragments"] == 1
    assert sorted(numbers(index.search(vectors[0]))) == list(range(7))
    assert len(old_reader.nearest(vectors[0])) == 7, "a reader that was there before goes on"


def test_an_empty_index_finds_nothing(index: Index) -> None:
    assert index.search(np.ones(DIM)) == []


@pytest.mark.parametrize("query", [np.ones(3), np.zeros(DIM), np.full(DIM, np.nan), np.ones((1, DIM))])
def test_a_query_that_is_no_vector_of_the_index(index: Index, query: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="64 finite numbers"):
        index.search(query)
    with pytest.raises(ConfigError, match="top=0"):
        index.search(np.ones(DIM), top=0)


# ---- groups ----


def test_near_duplicates_stand_under_the_best_of_them(index: Index) -> None:
    query = np.eye(DIM, dtype=np.float32)[0]

    def at(cosine: float, axis: int) -> np.ndarray:
        return cosine * query + np.sqrt(1 - cosine**2) * np.eye(DIM)[axis]

    best = at(0.9, 1)
    near = unit(best + 0.12 * np.eye(DIM)[2])  # cosine 0.993 to the best
    vectors = np.stack([best, near, at(0.5, 3), at(0.4, 4), at(0.3, 5)]).astype(np.float32)
    assert 0.985 <= best @ near < 1
    hashes = ["a" * 64, "b" * 64, "c" * 64, "d" * 64, "b" * 64]  # the last has the content of the second
    put(index, vectors, hash=hashes)
    hits = index.search(query, top=10)
    assert numbers(hits) == [0, 2, 3]
    assert [[int(Path(d).stem) for d in h.duplicates] for h in hits] == [[1, 4], [], []]
    assert numbers(index.search(query, top=10, group=False)) == [0, 1, 2, 3, 4]


def test_groups_follow_the_rule_on_random_vectors(index: Index) -> None:
    rng = np.random.default_rng(0)
    base = unit(rng.standard_normal((40, DIM)))
    vectors = unit(np.repeat(base, 5, 0) + 0.01 * rng.standard_normal((200, DIM)))
    put(index, vectors)
    query = base[3]
    hits = index.search(query, top=40)
    kept = vectors[numbers(hits)]
    assert len(hits) == 40
    assert np.triu(kept @ kept.T, 1).max() < 0.985, "no two hits are near-duplicates"
    for hit in hits:
        copies = vectors[[int(Path(d).stem) for d in hit.duplicates]]
        assert (copies @ vectors[numbers([hit])[0]] >= 0.985 - 1e-6).all()
        assert (copies @ query <= hit.score + 1e-6).all()


def test_many_copies_do_not_hide_other_pictures(index: Index) -> None:
    vectors = np.concatenate([np.tile(np.eye(DIM)[:1], (150, 1)), unit(np.eye(DIM)[:1] + 2 * np.eye(DIM)[1:6])])
    put(index, vectors.astype(np.float32))
    hits = index.search(np.eye(DIM)[0], top=6)
    assert len(hits) == 6
    assert len(hits[0].duplicates) == 149


# ---- filters ----

FACTS = {
    "paths": ["/p/Holiday/0.png", "/p/1%_.png", "/p/it's/2.png", '/p/a"b\\3.png', "/p/ÄRA/4.png"],
    "width": [640, 641, 10, 5000, 1],
    "height": [1, 2, 3, 4, 5],
    "bytes": [10, 1000, 1500, 2_000_000, 3],
    "time": [dt.datetime(2020, 1, 1), dt.datetime(2019, 12, 31, 23, 59, 59), None, dt.datetime(2024, 5, 6, 7, 8), None],
}


@pytest.mark.parametrize(
    ("where", "wanted"),
    [
        ("width>=640", [0, 1, 3]),
        ("width > 640 and height<4", [1]),
        ('path~"holiday"', [0]),
        ('path~"HOLIDAY" or width=1', [0, 4]),
        ('path~"ära"', [4]),
        ("path~'%'", [1]),
        ("path~'_'", [1]),
        ("path~'\\'", [3]),
        ("path~'a\"b'", [3]),
        ('path~"it\'s"', [2]),
        ('path="/p/1%_.png"', [1]),
        ('path!="/p/1%_.png"', [0, 2, 3, 4]),
        ("time>=2020-01-01", [0, 3]),
        ("time<2020-01-01T00:00:00", [1]),
        ("not time<2020-01-01", [0, 3]),
        ("bytes>=1.5k", [2, 3]),
        ("bytes=2M", [3]),
        ("NOT (width=640 OR width=641) AND bytes<100", [4]),
        ("not not width=640", [0]),
        ("width=1 or width=640 and height=5", [4]),
        ("(width=1 or width=640) and height=5", [4]),
        ("(((height=5)))", [4]),
    ],
)
def test_filter(index: Index, where: str, wanted: list[int]) -> None:
    put(index, clusters(5), **FACTS)
    hits = index.search(np.ones(DIM), where=where, group=False)
    assert sorted(FACTS["paths"].index(h.path) for h in hits) == wanted


@pytest.mark.parametrize(
    "where",
    [
        "width",
        "width>",
        "width>=",
        ">=3",
        "width>=640 and",
        "width>=640 height=3",
        "(width=3",
        "width=3)",
        "width='3'",
        "width~3",
        "path=3",
        "path<'a'",
        "path~'unclosed",
        "time>=2020-13-01",
        "time>=2020",
        "widht>3",
        "width=3; DROP TABLE pictures",
        "width=3 -- x",
        "1=1",
        "path='a' OR 1=1",
        "width IN (1)",
        "vector=3",
        "hash='a'",
        "width=1e9",
        "width=-1",
        "width=" + "9" * 40,
        "(" * 60 + "width=1" + ")" * 60,
        "not " * 60 + "width=1",
        "width=1 or " * 400 + "width=1",
    ],
)
def test_what_is_not_a_filter_teaches_the_grammar(where: str) -> None:
    with pytest.raises(ConfigError, match="A filter is written so") as error:
        to_sql(where)
    assert "example" in str(error.value)


def test_a_wrong_field_gets_a_hint() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'width'"):
        to_sql("widht>3")


HOSTILE = st.text(alphabet=st.sampled_from(list("'\"\\;-%_()=` \n\0\tORor1aÄ🙂")), max_size=12)


@given(names=st.lists(HOSTILE, min_size=1, max_size=4, unique=True), asked=HOSTILE)
def test_no_text_escapes_its_quotes(tmp_path_factory: pytest.TempPathFactory, names: list[str], asked: str) -> None:
    """Whatever a file is called and whatever is asked for, equality and containment mean themselves."""
    index = Index.create(tmp_path_factory.mktemp("i") / "index", Histogram())
    paths = [f"/{name}" for name in names]
    put(index, clusters(len(paths)), paths)
    for quote in ("'", '"'):
        if quote not in asked:
            found = index.search(np.ones(DIM), where=f"path={quote}/{asked}{quote}", group=False)
            assert [h.path for h in found] == [p for p in paths if p == f"/{asked}"]
            contains = index.search(np.ones(DIM), where=f"path~{quote}{asked}{quote}", group=False)
            assert {h.path for h in contains} == {p for p in paths if asked.lower() in p.lower()}
    rows = [r for t in index.store.rows(PICTURES, paths, ["path"]) for r in t.to_pylist()]
    assert {r["path"] for r in rows} == set(paths)
    index.store.remove(PICTURES, paths[:1])
    assert index.store.pictures.count_rows() == len(paths) - 1


@given(st.text(max_size=60))
def test_any_text_is_a_filter_or_a_clear_error(text: str) -> None:
    try:
        message = "" if to_sql(text) else "empty SQL"
    except ConfigError as error:
        message = str(error)
    assert not message or "A filter is written so" in message


def test_any_path_quotes() -> None:
    assert any_path(["a'b", "c"]) == "path IN ('a''b', 'c')"
