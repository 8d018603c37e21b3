"""Prompts of shapes, the reader that says what a picture shows, and the scores of pictures that follow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from polymodal.core.errors import DataError, MediaError
from polymodal.data.worlds import prompts, shapes
from polymodal.data.worlds.shapes_reader import Seen, read
from polymodal.evaluate.faithfulness import faithfulness

Change = Callable[[np.ndarray], np.ndarray]
RNG = np.random.default_rng(5)
ASKED = [prompts.prompt(RNG, held_out=i % 2 == 0) for i in range(30)]
SCENES = [prompts.scene(one, RNG) for one in ASKED]


def blurred(pixels: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(0.7)))


def noisy(pixels: np.ndarray) -> np.ndarray:
    return np.clip(pixels + np.random.default_rng(0).normal(0, 8, pixels.shape), 0, 255).astype(np.uint8)


# ---- prompts


def test_prompts_and_their_scenes_say_the_same() -> None:
    for one, scene in zip(ASKED, SCENES, strict=True):
        assert one.kinds == tuple((thing.colour, thing.shape) for thing in scene.things)
        assert all(f"{colour} {shape}" in one.text for colour, shape in one.kinds)
        if one.relation is not None:
            assert shapes.Fact(subject=0, relation=one.relation, object=1) in shapes.facts(scene)
    assert {one.relation for one in ASKED} == {None, *shapes.RELATIONS}


def test_a_relation_is_told_from_both_sides() -> None:
    words = {"left of": ("left",), "right of": ("right",), "above": ("above", "over"), "below": ("below", "under")}
    turned = 0
    for one in ASKED:
        if one.relation is None:
            continue
        first, second = (one.text.index(" ".join(kind)) for kind in one.kinds)
        said = any(f" {word} " in one.text for word in words[one.relation])
        assert said == (first < second)
        turned += not said
    assert turned


def test_held_out_pairs_are_in_held_out_prompts_alone() -> None:
    for i, one in enumerate(ASKED):
        assert sum(kind in shapes.HELD_OUT for kind in one.kinds) == (i % 2 == 0)
        assert len(set(one.kinds)) == len(one.kinds)


# ---- the reader


@pytest.mark.parametrize(
    ("change", "most"), [(np.copy, 0), (noisy, 0), (blurred, 1), (lambda pixels: noisy(blurred(pixels)), 2)]
)
def test_scenes_are_read(change: Change, most: int) -> None:
    wrong = 0
    for scene in SCENES:
        seen = read(change(shapes.render(scene, 64)))
        true = {(thing.colour, thing.shape): thing for thing in scene.things}
        wrong += Counter((one.colour, one.shape) for one in seen) != Counter([*true])
        for one in seen:
            if (thing := true.get((one.colour, one.shape))) is not None:
                assert abs(one.x - thing.x) + abs(one.y - thing.y) < 0.03
                assert abs(one.width - thing.width) < 0.04
    assert wrong <= most


def test_many_objects_are_counted() -> None:
    kinds = [("red", "circle"), ("blue", "star"), ("green", "cup"), ("orange", "arrow"), ("purple", "plate")]
    things = tuple(
        shapes.Thing(colour=colour, shape=shape, size="small", material="plain", x=0.15 + 0.17 * i, y=y, width=0.17)
        for i, ((colour, shape), y) in enumerate(zip(kinds, (0.2, 0.6, 0.3, 0.8, 0.5), strict=True))
    )
    seen = read(shapes.render(shapes.Scene(things=things, background=(240, 240, 240)), 96))
    assert Counter((one.colour, one.shape) for one in seen) == Counter(kinds)


def test_noise_shows_nothing() -> None:
    rng = np.random.default_rng(1)
    assert not read(rng.integers(0, 256, (64, 64, 3)).astype(np.uint8))
    for deviation in (0, 10, 30, 60):
        assert not read(np.clip(128 + rng.normal(0, deviation, (64, 64, 3)), 0, 255).astype(np.uint8))
    for _ in range(10):
        clouds = Image.fromarray(rng.integers(0, 256, (9, 9, 3)).astype(np.uint8))
        assert not read(np.asarray(clouds.resize((64, 64), Image.Resampling.BICUBIC)))


@pytest.mark.parametrize(("shape", "kind"), [((64, 64, 3), float), ((64, 64), np.uint8), ((8, 64, 3), np.uint8)])
def test_what_is_no_picture_is_refused(shape: tuple[int, ...], kind: type) -> None:
    with pytest.raises(MediaError, match="shapes are read from bytes"):
        read(np.zeros(shape, kind))


# ---- scores


def seen(colour: str, shape: str, x: float, y: float) -> Seen:
    return Seen(colour=colour, shape=shape, x=x, y=y, width=0.3, overlap=1.0)


WANTED = prompts.Prompt(text="", kinds=(("red", "star"), ("blue", "cup")), relation="left of")
RIGHT = [seen("blue", "cup", 0.8, 0.4), seen("red", "star", 0.2, 0.5)]


def test_what_is_asked_for_is_right() -> None:
    scores = faithfulness([RIGHT], [WANTED]).estimates()
    assert {name: one.value for name, one in scores.items()} == dict.fromkeys(scores, 1.0)
    assert [*scores] == ["objects", "count", "colours", "shapes", "relation"]


@pytest.mark.parametrize(
    ("found", "wrong"),
    [
        ([seen("blue", "cup", 0.2, 0.4), seen("red", "star", 0.8, 0.5)], {"relation"}),
        ([seen("blue", "cup", 0.25, 0.1), seen("red", "star", 0.2, 0.9)], {"relation"}),  # hardly to the left
        ([seen("red", "cup", 0.8, 0.4), seen("blue", "star", 0.2, 0.5)], {"objects", "relation"}),  # crossed
        ([seen("green", "cup", 0.8, 0.4), RIGHT[1]], {"objects", "colours", "relation"}),
        ([*RIGHT, seen("gray", "moon", 0.5, 0.8)], {"objects", "count", "colours", "shapes"}),
        ([*RIGHT, RIGHT[1]], {"objects", "count", "colours", "shapes", "relation"}),  # which of the two is meant?
        ([], {"objects", "count", "colours", "shapes", "relation"}),
    ],
)
def test_what_is_wrong_is_named(found: list[Seen], wrong: set[str]) -> None:
    scores = faithfulness([found, found], [WANTED, WANTED]).estimates()
    assert {name for name, one in scores.items() if one.value == 0} == wrong
    assert all(one.value == 1 and one.low < 1 for name, one in scores.items() if name not in wrong)


def test_without_a_relation_none_is_judged() -> None:
    one = replace(WANTED, kinds=(("red", "star"),), relation=None)
    scores = faithfulness([RIGHT[1:], RIGHT], [one, one])
    assert scores.relation is None
    assert scores.objects.value == scores.count.value == 0.5


def test_each_picture_has_a_text() -> None:
    for found, wanted in (([RIGHT], []), ([], []), ([RIGHT], [WANTED, WANTED])):
        with pytest.raises(DataError, match="give one each"):
            faithfulness(found, wanted)
