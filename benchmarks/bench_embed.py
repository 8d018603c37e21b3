"""Embedding throughput against transformers: the same weights, the same pictures, in one run.

    python -m benchmarks.bench_embed [--pictures 64] [--rounds 5]

Bars: >= transformers in fp32; >= 1.8x transformers' fp32 with our default CPU precision, at a cosine >= 0.999 to fp32.
CLIP ViT-B/32 with random weights, saved by transformers, loaded by both. Pictures and texts take turns with each
library and the ratio is that of the medians; "with pre-processing" starts from decoded 640 x 480 pictures.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image as PILImage

from benchmarks._report import machine, report
from polymodal.api import load
from polymodal.core.batch import Batch
from polymodal.core.sample import Image


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def compare(works: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each, measured in turn so that a drift of the machine meets all alike."""
    for work in works.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            seconds[name].append(timed(work))
    return {name: statistics.median(times) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    count = arguments.pictures
    with tempfile.TemporaryDirectory() as folder:
        theirs = transformers.CLIPModel(transformers.CLIPConfig()).eval()
        theirs.save_pretrained(folder)
        theirs = transformers.CLIPModel.from_pretrained(folder).eval()
        ours, fast = load(Path(folder)), load(Path(folder), precision="auto")
        processor = transformers.CLIPImageProcessorPil()
        pixels = torch.randn(count, 3, 224, 224)
        rng = np.random.default_rng(0)
        pictures = [PILImage.fromarray(rng.integers(0, 256, (480, 640, 3), np.uint8)) for _ in range(count)]
        ids = torch.full((count, 77), 49407)
        for row, length in zip(ids, rng.integers(5, 20, count), strict=True):
            row[:length] = torch.from_numpy(rng.integers(0, 49406, length))
        trimmed = ids[:, :20]  # what our tokenizer gives for these texts: a causal tower cannot see the padding
        wrapped = [Image(p) for p in pictures]

        def reference(images: Any) -> Any:
            return F.normalize(theirs.get_image_features(pixel_values=images).pooler_output, dim=-1)

        runs: dict[str, dict[str, Callable[[], Any]]] = {
            "pictures": {
                "transformers": lambda: reference(pixels),
                "fp32": lambda: ours.encode(Batch(pixels=pixels)),
                "default": lambda: fast.encode(Batch(pixels=pixels)),
            },
            "pictures with pre-processing": {
                "transformers": lambda: reference(processor(pictures, return_tensors="pt")["pixel_values"]),
                "fp32": lambda: ours.embed(wrapped),
                "default": lambda: fast.embed(wrapped),
            },
            "texts": {
                "transformers": lambda: theirs.get_text_features(input_ids=ids),
                "fp32": lambda: ours.encode(Batch(ids=trimmed)),
                "default": lambda: fast.encode(Batch(ids=trimmed)),
            },
        }
        figures: dict[str, Any] = {"machine": machine(), "transformers": transformers.__version__, "rows": count}
        for name, works in runs.items():
            seconds = compare(works, arguments.rounds)
            figures[name] = {
                "per second": {k: round(count / s, 1) for k, s in seconds.items()},
                "fp32 / transformers": round(seconds["transformers"] / seconds["fp32"], 3),
                "default / transformers": round(seconds["transformers"] / seconds["default"], 3),
            }
        exact = ours.encode(Batch(pixels=pixels))
        figures["error to transformers (fp32)"] = float((exact - reference(pixels)).abs().max())
        cosine = F.cosine_similarity(fast.encode(Batch(pixels=pixels)), exact)
        figures["cosine of default to fp32, lowest"] = round(float(cosine.min()), 5)
    report("embed", figures)


if __name__ == "__main__":
    main()
