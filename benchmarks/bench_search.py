"""Search in 100,000 pictures: latency and recall of the vector index, and the whole command with its start.

    python -m benchmarks.bench_search [--model NAME_OR_PATH]

Bars: p95 < 20 ms warm at recall@10 >= 0.99; the command < 3 s. The vectors are random in 1,000 clusters, 512-d, and the
queries lie beside stored vectors, as those of a dual encoder do. The command searches words in an index of 100,000
vectors of the model's own length.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks._report import machine, report
from polymodal.api import load
from polymodal.core.files import write_json
from polymodal.retrieve.reader import FORMAT, META, Meta, Reader
from polymodal.retrieve.store import PICTURES, Store

COUNT, DIM, QUERIES = 100_000, 512, 300


@dataclass(frozen=True)
class Filled:
    reader: Reader
    vectors: np.ndarray
    seconds_to_index: float


def clustered(count: int, dim: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(1).standard_normal((1000, dim), dtype=np.float32)
    x = centres[rng.integers(0, len(centres), count)] + 0.6 * rng.standard_normal((count, dim), dtype=np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def fill(path: Path, dim: int, *, model: str = "", fingerprint: str = "random") -> Filled:
    """An index of random vectors, with thumbnails of the usual size so that the rows are as wide as real ones."""
    vectors = clustered(COUNT, dim, 2)
    store = Store(path / "tables", dim)
    thumbnail = np.random.default_rng(0).bytes(4000)
    for start in range(0, COUNT, 10_000):
        rows = [
            {
                "path": f"/pictures/{i:06d}.jpg", "hash": f"{i:064x}", "bytes": 100_000, "mtime_ns": i,
                "modified": None, "time": None, "width": 640, "height": 480, "thumbnail": thumbnail,
                "vector": vectors[i],
            }
            for i in range(start, start + 10_000)
        ]  # fmt: skip
        store.add(PICTURES, store.table(PICTURES, rows))
    started = time.perf_counter()
    store.tidy()
    seconds = time.perf_counter() - started
    write_json(path / META, asdict(Meta(format=FORMAT, model=model, fingerprint=fingerprint, dim=dim, roots=())))
    return Filled(Reader.open(path), vectors, seconds)


def latency(filled: Filled) -> dict[str, float]:
    rng = np.random.default_rng(3)
    noise = rng.standard_normal((QUERIES, DIM), dtype=np.float32)
    queries = filled.vectors[rng.integers(0, COUNT, QUERIES)] + 0.9 * noise / np.sqrt(DIM)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    exact = np.argpartition(-(queries @ filled.vectors.T), 10, axis=1)[:, :10]
    figures: dict[str, float] = {}
    for name, top, group in (("top 10", 10, False), ("top 20 grouped (the default)", 20, True)):
        for query in queries[:20]:
            filled.reader.nearest(query, top=top, group=group)  # warm
        seconds, recall = [], []
        for query, best in zip(queries, exact, strict=True):
            started = time.perf_counter()
            hits = filled.reader.nearest(query, top=top, group=group)
            seconds.append(time.perf_counter() - started)
            found = {int(Path(h.path).stem) for h in hits[:10]}
            recall.append(len(found & set(best.tolist())) / 10)
        figures[f"{name}: p50 ms"] = round(1000 * float(np.percentile(seconds, 50)), 2)
        figures[f"{name}: p95 ms"] = round(1000 * float(np.percentile(seconds, 95)), 2)
        figures[f"{name}: recall@10"] = round(float(np.mean(recall)), 4)
    return figures


def command(path: Path, model: str, runs: int = 5) -> dict[str, float]:
    loaded = load(model)
    fill(path, loaded.embedding_dim, model=model, fingerprint=loaded.fingerprint)
    seconds = []
    for _ in range(runs + 1):
        line = [sys.executable, "-m", "polymodal", "search", "a red fruit", "--index", str(path), "--json"]
        started = time.perf_counter()
        done = subprocess.run(line, capture_output=True, check=True, env={**os.environ, "POLYMODAL_INDEX": ""})
        seconds.append(time.perf_counter() - started)
        assert len(json.loads(done.stdout)["hits"]) == 20
    return {"command s, median": round(sorted(seconds[1:])[runs // 2], 2), "command s, first": round(seconds[0], 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="polymodal/nano-clip")
    arguments = parser.parse_args()
    on = machine()
    with tempfile.TemporaryDirectory() as folder:
        filled = fill(Path(folder) / "random", DIM)
        figures = {
            "vectors": COUNT,
            "dim": DIM,
            "index built in s": round(filled.seconds_to_index, 1),
            **latency(filled),
        }
        figures |= command(Path(folder) / "own", arguments.model)
    report("search", {"machine": on, **figures})


if __name__ == "__main__":
    main()
