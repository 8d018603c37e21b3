"""Whether nano-vlm finds an event that was planted in half an hour of film, and how long that takes.

    python -m benchmarks.bench_planted [--films 6]

Bar: found within 5 seconds of its time. A film has a frame a second and another lone thing every 20 seconds; for
8 seconds it shows the thing that is asked for: found is where "what shape is the cyan object?" is answered with its
shape most surely (`polymodal ask FILM ... --when --answer arrow`). Asked with yes or no, it finds 2 of 6.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import av
import numpy as np

import polymodal
from benchmarks._report import machine, report
from polymodal.core.sample import Video
from polymodal.data.worlds import shapes
from polymodal.moments import moments, spans

SECONDS, EVERY, LASTS, WITHIN, SIZE = 1800, 20, 8, 5, 160


def without(asked: shapes.Thing, rng: np.random.Generator) -> shapes.Scene:
    """A scene of a lone thing that is not the one that is asked for."""
    while True:
        scene = shapes.scene(rng, objects=1)
        if (scene.things[0].colour, scene.things[0].shape) != (asked.colour, asked.shape):
            return scene


def film(path: Path, rng: np.random.Generator) -> tuple[shapes.Thing, int]:
    """Writes a film; the thing that it shows for a while, and from which second on."""
    event, at = shapes.scene(rng, objects=1), int(rng.integers(60, SECONDS - 60))
    (asked,) = event.things
    scene = event
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("libx264", rate=1)
        stream.width = stream.height = SIZE
        for second in range(SECONDS):
            if second % EVERY == 0:
                scene = without(asked, rng)
            shown = event if at <= second < at + LASTS else scene
            out.mux(stream.encode(av.VideoFrame.from_ndarray(shapes.render(shown, SIZE))))
        out.mux(stream.encode(None))
    return asked, at


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--films", type=int, default=6)
    arguments = parser.parse_args()
    model: Any = polymodal.load("polymodal/nano-vlm")
    rows, began = [], time.process_time()
    for seed in range(arguments.films):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "film.mp4"
            asked, at = film(path, np.random.default_rng(seed))
            started = time.process_time()
            question = f"what shape is the {asked.colour} object?"
            seen = moments(model, Video(path), question, answer=asked.shape, fps=1)
            best = max(spans(seen, gap=1.5), key=lambda span: span.best.score, default=None)
        found = best is not None and at - WITHIN <= best.best.time < at + LASTS + WITHIN
        where = None if best is None else best.best.time
        rows.append({"asked": f"{asked.colour} {asked.shape}", "at": at, "said": where, "found": found})
        print(rows[-1], f"{time.process_time() - started:.0f} CPU-s", flush=True)
    found = sum(row["found"] for row in rows)
    each = round((time.process_time() - began) / len(rows), 1)
    report("planted", {"machine": machine(), "found": f"{found} of {len(rows)}", "CPU-s a film": each, "films": rows})


if __name__ == "__main__":
    main()
