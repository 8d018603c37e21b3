"""Indexing: its throughput as a share of the bare model's, and what an unchanged folder costs.

    python -m benchmarks.bench_index [--model NAME_OR_PATH]

Bars: >= 85 % of the bare model's throughput; 10,000 unchanged files in < 3 % of the first time. "Bare" is `encode` on
batches that are already pre-processed and in memory: no reading, decoding or storing. The first is measured with CLIP
ViT-B/16 (random weights cost what real ones do) at the default precision on JPEG pictures of 640 x 480, the model alone
before and after indexing; the second with the shipped model on small pictures, where the first time is short.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage

from benchmarks._report import machine, report
from polymodal.api import build, load
from polymodal.core.batch import Batch
from polymodal.core.sample import Image, Sample
from polymodal.core.verbs import Embeds
from polymodal.nn.precision import cast
from polymodal.retrieve.index import Index
from polymodal.retrieve.ingest import BATCH
from polymodal.systems.clip import PRESETS

PRESET = "openai/clip-vit-base-patch16"
PICTURES, UNCHANGED = 3 * BATCH, 10_000


def photographs(folder: Path, count: int, size: tuple[int, int]) -> list[Path]:
    """JPEG pictures with the detail of photographs: clouds of all scales, and some noise."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    paths = []
    for i in range(count):
        pixels = np.zeros((size[1], size[0], 3), np.float32)
        for cells in (3, 12, 48):
            cloud = PILImage.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
            pixels += np.asarray(cloud.resize(size, PILImage.Resampling.BICUBIC), np.float32) / 3
        pixels += rng.normal(0, 4, pixels.shape)
        buffer = io.BytesIO()
        PILImage.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        paths.append(folder / f"{i:05d}.jpg")
        paths[-1].write_bytes(buffer.getvalue())
    return paths


def bare(model: Embeds, batches: list[Batch]) -> float:
    """Pictures a second of `encode` alone."""
    with torch.inference_mode():
        model.encode(batches[0])
        started = time.perf_counter()
        for batch in batches:
            model.encode(batch)
        return sum(batch.size for batch in batches) / (time.perf_counter() - started)


def throughput(folder: Path) -> dict[str, Any]:
    model: Any = cast(build(PRESETS[PRESET]()).eval(), "auto")
    paths = photographs(folder / "pictures", PICTURES, (640, 480))
    batches = [
        model.prepare([Sample((Image(p),)) for p in paths[start : start + BATCH]])
        for start in range(0, len(paths), BATCH)
    ]
    before = bare(model, batches)
    report = Index.create(folder / "index", model).update(model, [folder / "pictures"])
    assert report.added == PICTURES
    after = bare(model, batches)
    alone, indexing = (before + after) / 2, PICTURES / report.seconds
    return {
        "model": PRESET,
        "model alone, pictures/s, before and after": [round(before, 2), round(after, 2)],
        "indexing, pictures/s": round(indexing, 2),
        "share": round(indexing / alone, 3),
    }


def unchanged(folder: Path, name: str) -> dict[str, Any]:
    model = load(name, precision="auto")
    photographs(folder / "small", UNCHANGED, (96, 96))
    index = Index.create(folder / "small-index", model)
    first = index.update(model, [folder / "small"])
    assert first.added == UNCHANGED
    again = [index.update(model, [folder / "small"]) for _ in range(3)]
    assert all(r.unchanged == UNCHANGED for r in again)
    second = sorted(r.seconds for r in again)[1]
    return {
        "files": UNCHANGED,
        "first s": round(first.seconds, 2),
        "unchanged s": round(second, 3),
        "unchanged, share of the first": round(second / first.seconds, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="polymodal/nano-clip")
    arguments = parser.parse_args()
    on = machine()
    with tempfile.TemporaryDirectory() as folder:
        figures = throughput(Path(folder)) | unchanged(Path(folder), arguments.model)
    report("index", {"machine": on, **figures})


if __name__ == "__main__":
    main()
