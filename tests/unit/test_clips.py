"""Clips: what the caption says is what the film shows, and the reader sees it."""

from __future__ import annotations

import numpy as np
import pytest

from polymodal.core.errors import DataError
from polymodal.data.worlds import clips, prompts


def test_the_reader_sees_every_motion() -> None:
    seen = set()
    for index in range(120):
        clip = clips.item("train", index)
        assert clip.frames.shape == (9, 32, 32, 3)
        for thing, motion in zip(clip.start.things, clip.motions, strict=True):
            told = motion.directions[0] if motion.directions else clips.STILL
            assert clips.direction(clip.frames, thing.colour) == told, f"{index}: {clip.caption}"
            assert f"{thing.colour} {thing.shape} {motion}" in clip.caption
            seen.add(told)
        absent = next(colour for colour in clips.COLOURS if colour not in {t.colour for t in clip.start.things})
        assert clips.direction(clip.frames, absent) is None
    assert seen == {*clips.DIRECTIONS, clips.STILL}


def test_captions_are_sentences() -> None:
    captions = {clips.item("train", index).caption for index in range(8)}
    assert "a red circle moves quickly to the left" not in captions  # a held-out pair of colour and shape
    assert all(caption.split()[0] in ("a", "an") for caption in captions)
    assert len(captions) > 6
    for split in clips.SPLITS:
        for thing in (one := clips.item(split, 5)).start.things:
            assert prompts.named(thing.colour, thing.shape) in one.caption


def test_unseen_motions_are_never_trained_on() -> None:
    for split, held_out in (("train", False), ("unseen", True)):
        for index in range(60):
            clip = clips.item(split, index, legs=2)
            pairs = {
                (thing.colour, way)
                for thing, motion in zip(clip.start.things, clip.motions, strict=True)
                for way in motion.directions
            }
            assert bool(pairs & clips.HELD_OUT) == held_out
    with pytest.raises(DataError, match="unseen"):
        clips.item("unsen", 0)


def test_actions_are_what_moves_the_first_shape() -> None:
    for index in range(20):
        clip = clips.item("train", index, frames=13, legs=3)
        assert clip.actions.shape == (12, 2)
        assert len(np.unique(clip.actions, axis=0)) >= 2  # it turns
        moved = np.diff(clips.track(clip.frames, clip.start.things[0].colour), axis=0)
        assert abs(moved - clip.actions).max() < 0.02  # a quarter of a pixel each side of the way
        assert np.array_equal(clip.under(clip.actions), clip.frames)
        assert np.array_equal(clip.frames, clips.item("train", index, frames=13, legs=3).frames)


def test_other_actions_make_another_film() -> None:
    clip = clips.item("train", 3)
    colour = clip.start.things[0].colour
    for name, way in clips.DIRECTIONS.items():
        frames = clip.under(np.tile(np.array(way, np.float32), (8, 1)))
        edge = clips.track(frames, colour)[-1]
        axis = int(way[0] == 0)
        assert np.array_equal(frames[0], clip.frames[0])
        assert edge[axis] > 0.8 if way[axis] > 0 else edge[axis] < 0.2, name  # it stops there


def test_what_the_reader_refuses() -> None:
    clip = next(c for i in range(50) if (c := clips.item("train", i)).motions[0].speed == "quickly")
    colour = clip.start.things[0].colour
    assert clips.direction(clip.frames[[0, 0]], colour) == clips.STILL
    cut = clip.frames.copy()
    cut[-1] = 0
    assert clips.direction(cut, colour) is None  # gone at the end
    inwards = np.sign(0.5 - clips.track(clip.frames, colour)[0]).astype(np.float32)
    assert clips.direction(clip.under(np.tile(0.02 * inwards, (8, 1))), colour) is None  # slanting
    assert clips.direction(np.random.default_rng(0).integers(0, 256, clip.frames.shape, np.uint8), colour) is None
