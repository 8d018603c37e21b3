"""Boxes and points of answers: every notation is read, and lands where it was painted, whatever was resized."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from polymodal.core.batch import Batch
from polymodal.modalities.image import (
    CenterCrop,
    Exact,
    ImageProcessor,
    PatchBudget,
    PatchProcessor,
    ShortestEdge,
    View,
)
from polymodal.modalities.marks import (
    MOST,
    BoxTokens,
    Brackets,
    JsonPixels,
    LocTokens,
    Mark,
    Notation,
    draw,
    marks_in,
)
from polymodal.modalities.smart_resize import SmartResize
from polymodal.modalities.tiles import Grid, TileProcessor

Box = tuple[float, float, float, float]
PLAIN = View(original=(200, 100), seen=(200, 100), scale=(1.0, 1.0), offset=(0.0, 0.0))


def painted(rng: random.Random, box: tuple[int, int, int, int], size: tuple[int, int]) -> PILImage.Image:
    pixels = np.full((size[1], size[0], 3), rng.randrange(60, 120), np.uint8)
    left, top, right, bottom = box
    pixels[top:bottom, left:right] = (255, 0, 0)
    return PILImage.fromarray(pixels)


def red(picture: PILImage.Image) -> Box:
    """The border of what is more red than not."""
    pixels = np.asarray(picture).astype(int)
    rows, columns = np.nonzero(pixels[..., 0] - pixels[..., 1] > 128)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def first(processor: ImageProcessor) -> Callable[[PILImage.Image], PILImage.Image]:
    return lambda picture: processor.pictures(Batch(pixels=processor.from_pil([picture])))[0]


EXACT = ImageProcessor(resize=Exact(height=224, width=224))
CROP = ImageProcessor(resize=ShortestEdge(size=160), crop=CenterCrop(height=160, width=160))
PAD = ImageProcessor(resize=None, crop=CenterCrop(height=500, width=500))  # zeros around what is smaller
SMART = SmartResize(min_pixels=56 * 56, max_pixels=200 * 28 * 28)
NAFLEX = PatchProcessor(budget=PatchBudget(patch_size=16, max_patches=200))
TILES = TileProcessor(side=168, grids=(Grid(168, 336), Grid(336, 168), Grid(336, 336)), colour=EXACT)


def smart(picture: PILImage.Image) -> PILImage.Image:
    return picture.resize(SMART.target(*picture.size), PILImage.Resampling.BICUBIC)


def naflex(picture: PILImage.Image) -> PILImage.Image:
    rows, columns = NAFLEX.budget.grid(*picture.size)
    return picture.resize((columns * 16, rows * 16), PILImage.Resampling.BILINEAR)


def whole(picture: PILImage.Image) -> PILImage.Image:
    return TILES.colour.denormalise(TILES.from_pil(picture)[:1])[0]


def square(picture: PILImage.Image) -> PILImage.Image:
    side = max(picture.size)
    out = PILImage.new("RGB", (side, side))
    out.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return out


def fractions(box: Box, seen: tuple[int, int], whole: float) -> list[float]:
    return [value / seen[i % 2] * whole for i, value in enumerate(box)]


def in_thousandths(box: Box, seen: tuple[int, int]) -> str:
    a, b, c, d = map(round, fractions(box, seen, 1000))
    return f"<|object_ref_start|>it<|object_ref_end|><|box_start|>({a},{b}),({c},{d})<|box_end|>"


def in_pixels(box: Box, seen: tuple[int, int]) -> str:
    return f'```json\n[{{"bbox_2d": [{", ".join(str(int(v)) for v in box)}], "label": "it"}}]\n```'


def in_locs(box: Box, seen: tuple[int, int]) -> str:
    a, b, c, d = (min(round(v), 1023) for v in fractions(box, seen, 1024))
    return "".join(f"<loc{v:04}>" for v in (b, a, d, c)) + " it"


def in_brackets(box: Box, seen: tuple[int, int]) -> str:
    return "It is at [" + ", ".join(f"{v:.3f}" for v in fractions(box, seen, 1)) + "]."


KINDS: dict[str, tuple[Any, Callable[[PILImage.Image], PILImage.Image], Notation, Any]] = {
    "exact": (EXACT, first(EXACT), LocTokens(), in_locs),
    "crop": (CROP, first(CROP), Brackets(), in_brackets),
    "pad": (PAD, first(PAD), Brackets(), in_brackets),
    "smart resize, parts": (SMART, smart, BoxTokens(), in_thousandths),
    "smart resize, pixels": (SMART, smart, JsonPixels(), in_pixels),
    "any aspect": (NAFLEX, naflex, BoxTokens(), in_thousandths),
    "tiles": (TILES, whole, Brackets(), in_brackets),
    "tiles, square": (TILES, square, Brackets(of="square"), in_brackets),
}


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("kind", KINDS)
def test_a_mark_lands_where_it_was_painted(kind: str, seed: int) -> None:
    processor, see, notation, write = KINDS[kind]
    rng = random.Random(seed)
    size = rng.randrange(60, 480), rng.randrange(60, 480)
    view = processor.view(*size)
    # Of what a crop cuts off nothing can be said: boxes lie where the model sees them.
    low = view.to_original(torch.zeros(2)).clamp(min=0).ceil().int().tolist()
    high = view.to_original(torch.tensor(view.seen).float()).floor().int().tolist()
    high = [min(a, b) for a, b in zip(high, size, strict=True)]
    (left, right), (top, bottom) = (sorted(rng.sample(range(a, b - 12), 2)) for a, b in zip(low, high, strict=True))
    box = left, top, right + 12, bottom + 12
    seen = see(painted(rng, box, size))
    found = marks_in(write(red(seen), seen.size), notation, view)
    points = [point for mark in found for point in mark.points]
    # A pixel of what is seen, and what the notation rounds.
    slack = [1.5 * max(1, size[i] / view.seen[i], max(size) / seen.size[i]) + size[i] / 500 for i in range(2)]
    for (x, y), (wanted_x, wanted_y) in zip(points, (box[:2], box[2:]), strict=True):
        assert abs(x - wanted_x) <= slack[0], (box, points)
        assert abs(y - wanted_y) <= slack[1], (box, points)
    if kind not in ("crop", "pad", "tiles", "tiles, square"):
        assert {mark.label for mark in found} == {"it"}


def read(answer: str, notation: Notation, view: View = PLAIN) -> list[dict[str, Any]]:
    return [mark.to_json() for mark in marks_in(answer, notation, view)]


def test_notations() -> None:
    boxes = "<|object_ref_start|>cat<|object_ref_end|><|box_start|>(100,200),(300,400)<|box_end|>"
    boxes += ", <|box_start|>(5,10)<|box_end|>"
    assert read(boxes, BoxTokens()) == [{"label": "cat", "box": [20, 20, 60, 40]}, {"label": "", "point": [1, 1]}]
    cut = '[{"bbox_2d": [10, 20, 30, 40], "label": "a"}, {"point_2d": [7, 8.5]}, {"bbox_2d": [1, 2'
    assert read(cut, JsonPixels()) == [{"label": "a", "box": [10, 20, 30, 40]}, {"label": "", "point": [7, 8.5]}]
    locs = "<loc0512><loc0256><loc1023><loc0512> cat ; <loc0000><loc0512> <seg001> tip; <loc0001> x"
    assert [(m["label"], len(m.get("box", ()))) for m in read(locs, LocTokens())] == [("cat", 4), ("", 0)]
    assert read(locs, LocTokens())[0]["box"] == [50, 50, 100, 99.9]
    assert read("at [0.5, 0.25, 0.75, 1.0] and [1, 2, 3, 4]", Brackets()) == [{"label": "", "box": [100, 25, 150, 100]}]
    nested = '{"found": [{"bbox_2d": [1, 2, 3, 4], "label": "f(x) {", "is": {"red": true}}, {"point_2d": [5, 6]}]}'
    assert read(nested, JsonPixels()) == [{"label": "f(x) {", "box": [1, 2, 3, 4]}, {"label": "", "point": [5, 6]}]
    for notation in (BoxTokens(), JsonPixels(), LocTokens(), Brackets()):
        assert read("There is no dog in this picture. (1,2), [0.5]", notation) == []


def test_marks_are_cut_at_the_borders_and_their_corners_are_in_order() -> None:
    assert read('{"bbox_2d": [150, 90, -20, 40]}', JsonPixels()) == [{"label": "", "box": [0, 40, 150, 90]}]
    assert read('{"bbox_2d": [300, 10, 400, 20]} {"point_2d": [-5, 5]}', JsonPixels()) == []


@pytest.mark.parametrize(
    "answer",
    [
        '{"bbox_2d": [NaN, 1, 2, 3]} {"bbox_2d": [1e999, 1, 2, 3]} {"bbox_2d": ["1", 1, 2, 3]} {"point_2d": [true, 1]}',
        '{"bbox_2d": [' + "9" * 500 + ", 1, 2, 3]}",
        '{"bbox_2d": ' + "[" * 1500 + "}",
        "{" * 100_000,
        "<|box_start|>(" + "1" * 50_000 + ",2),(3,4)<|box_end|>",
        "[" + " " * 100_000,
        "<loc12345><loc0001",
    ],
)
def test_what_is_no_mark_is_left_out(answer: str) -> None:
    for notation in (BoxTokens(), JsonPixels(), LocTokens(), Brackets()):
        assert read(answer, notation) == []


def test_a_flood_of_marks_is_cut_short() -> None:
    assert len(read("[0,0,1,1]" * (2 * MOST), Brackets())) == MOST


def test_drawing_leaves_the_rest_of_the_picture_alone() -> None:
    picture = PILImage.new("RGB", (400, 300), "white")
    marks = [Mark(points=((100.0, 80.0), (220.0, 200.0)), label="a cup"), Mark(points=((300.0, 250.0),))]
    out = np.asarray(draw(picture, marks)).astype(int)
    changed = (out != 255).any(-1)
    assert changed[80:200, 98:100].all(), "the left border"
    assert not changed[100:200, 100:220].any(), "the inside is seen"
    assert changed[250, 300]
    assert not changed[:50].any()
    assert not changed[210:240].any()
    assert np.asarray(picture).min() == 255, "the original is as it was"
    draw(PILImage.new("RGB", (1, 1)), [Mark(points=((0.0, 0.0), (1.0, 1.0)), label="x" * 500)])
