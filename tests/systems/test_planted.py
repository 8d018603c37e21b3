"""An event planted in half an hour of film is found by the model that we ship, and what that takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import polymodal
from polymodal.core.sample import Video
from polymodal.data.worlds import shapes
from polymodal.moments import moments, spans
from polymodal.weights.hub import shipped
from tests.unit.test_video import encoded

MINUTES, EVERY, LASTS = 30, 20, 8  # a new scene every so many seconds; the event lasts eight


def film(rng: np.random.Generator, colour: str, shape: str, at: int) -> list[np.ndarray]:
    """A frame a second: scenes without a thing of this colour and shape, but from second ``at`` on for a while."""

    def drawn(planted: bool) -> np.ndarray:
        while True:
            scene = shapes.scene(rng)
            if any((t.colour, t.shape) == (colour, shape) for t in scene.things) == planted:
                return shapes.render(scene, 160)

    seconds = 60 * MINUTES
    pictures = [drawn(False) for _ in range(seconds // EVERY)]
    event = drawn(True)
    return [event if at <= second < at + LASTS else pictures[second // EVERY] for second in range(seconds)]


@pytest.mark.slow
@pytest.mark.skipif("polymodal/nano-vlm" not in shipped(), reason="no model that answers is shipped yet")
@pytest.mark.parametrize(
    ("colour", "shape", "at"), [("red", "star", 1234), ("blue", "moon", 77), ("green", "ring", 1650)]
)
def test_a_planted_event_is_found(colour: str, shape: str, at: int, tmp_path: Path) -> None:
    assert (colour, shape) not in shapes.HELD_OUT
    frames = film(np.random.default_rng(at), colour, shape, at)
    (tmp_path / "film.mp4").write_bytes(encoded(frames, fps=1))
    model = polymodal.load("polymodal/nano-vlm")
    found = list(moments(model, Video(tmp_path / "film.mp4"), f"is there a {colour} {shape}?", fps=1))
    assert len(found) == len(frames)
    best = max(spans(found, gap=1.5), key=lambda span: span.best.score)
    assert at - 5 <= best.best.time < at + LASTS + 5
