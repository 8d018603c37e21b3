"""Boxes and points in what a model says: found in its own notation, and put where they belong in the picture.

Models count in pixels of the resized picture, in thousandths or other parts of what they saw, or of a square around it.
Whatever was resized, cropped or padded on the way, `marks_in` gives pixels of the upright original.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from polymodal.modalities.image import View

Point: TypeAlias = tuple[float, float]
MOST = 1000  # marks that are read of one answer: more are no answer


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A point ``(x, y)``, or a box as its upper left and its lower right corner."""

    points: tuple[Point] | tuple[Point, Point]
    label: str = ""

    def to_json(self) -> dict[str, object]:
        """``{"label", "point": [x, y]}`` or ``{"label", "box": [left, top, right, bottom]}``."""
        flat = [round(number, 2) for point in self.points for number in point]
        return {"label": self.label, "box" if len(self.points) == 2 else "point": flat}


@runtime_checkable
class Notation(Protocol):
    """How a model writes boxes and points."""

    def find(self, answer: str) -> Iterator[Mark]:
        """The marks of an answer (control tokens included), in the model's own numbers."""
        ...

    def place(self, point: Point, view: View) -> Point:
        """A point in the model's numbers, in pixels of the upright picture."""
        ...


def marks_in(answer: str, notation: Notation, view: View) -> list[Mark]:
    """The marks of an answer in pixels of the upright picture, cut at its borders; those wholly outside are left out.

    Args:
        answer: the text with control tokens, some of which may be the marks.
        notation: of the model.
        view: where what the model saw lies in the picture.
    """
    out: list[Mark] = []
    for mark in notation.find(answer):
        placed = [notation.place(point, view) for point in mark.points]
        low, high = (tuple(f(axis) for axis in zip(*placed, strict=True)) for f in (min, max))
        if all(a <= size and b >= 0 for a, b, size in zip(low, high, view.original, strict=True)):
            corners = [_cut(corner, view.original) for corner in (low, high)]
            out.append(replace(mark, points=(corners[0], corners[1]) if len(placed) == 2 else (corners[0],)))
        if len(out) == MOST:
            break
    return out


def _cut(point: Sequence[float], size: tuple[int, int]) -> Point:
    x, y = (min(max(value, 0.0), float(side)) for value, side in zip(point, size, strict=True))
    return x, y


def _unseen(point: Point, view: View) -> Point:
    x, y = view.to_original(torch.tensor(point, dtype=torch.float64)).tolist()
    return x, y


# ---- notations ----

_N: Final = r"\s*(-?\d{1,6}(?:\.\d{1,9})?)\s*"


@dataclass(frozen=True)
class _Parts:
    """Numbers that are parts of a whole: of what the model saw, or of the square that surrounds the picture."""

    whole: float
    of: Literal["seen", "square"] = "seen"

    def place(self, point: Point, view: View) -> Point:
        x, y = (number / self.whole for number in point)
        if self.of == "seen":
            return _unseen((x * view.seen[0], y * view.seen[1]), view)
        side = max(view.original)
        return x * side - (side - view.original[0]) / 2, y * side - (side - view.original[1]) / 2


@dataclass(frozen=True)
class BoxTokens(_Parts):
    """Qwen2-VL: ``<|box_start|>(x1,y1),(x2,y2)<|box_end|>`` in thousandths, perhaps behind what it is of."""

    whole: float = 1000.0

    def find(self, answer: str) -> Iterator[Mark]:
        named = r"(?:<\|object_ref_start\|>([^<]{0,200})<\|object_ref_end\|>\s*)?"
        pair = rf"\({_N},{_N}\)"
        for m in re.finditer(rf"{named}<\|box_start\|>\s*{pair}(?:\s*,\s*{pair})?\s*<\|box_end\|>", answer):
            label, *numbers = m.groups()
            yield _mark([float(n) for n in numbers if n is not None], label)


@dataclass(frozen=True)
class JsonPixels:
    """Qwen2.5-VL: JSON with ``bbox_2d`` or ``point_2d`` in pixels of the resized picture; its end may be cut off."""

    def find(self, answer: str) -> Iterator[Mark]:
        for m in re.finditer(r"\{", answer):  # also within others, and so in bounded pieces
            try:
                found, _ = json.JSONDecoder().raw_decode(answer[m.start() : m.start() + 2000])
            except (ValueError, RecursionError):
                continue
            for key, count in (("bbox_2d", 4), ("point_2d", 2)):
                numbers = found.get(key)
                if isinstance(numbers, list) and len(numbers) == count and all(map(_is_place, numbers)):
                    label = found.get("label")
                    yield _mark([float(n) for n in numbers], label if isinstance(label, str) else "")

    def place(self, point: Point, view: View) -> Point:
        return _unseen(point, view)


@dataclass(frozen=True)
class LocTokens(_Parts):
    """PaliGemma: tokens ``<loc0000>`` for top, left, bottom and right (or y and x) in 1024ths, then a name."""

    whole: float = 1024.0

    def find(self, answer: str) -> Iterator[Mark]:
        for m in re.finditer(r"((?:<loc\d{4}>)+)((?:<seg\d{3}>)*)([^<;]{0,200})", answer):
            numbers = [float(n) for n in re.findall(r"\d{4}", m.group(1))]
            if len(numbers) in (2, 4):
                y_first = [numbers[i ^ 1] for i in range(len(numbers))]
                yield _mark(y_first, m.group(3))


@dataclass(frozen=True)
class Brackets(_Parts):
    """LLaVA: ``[x1, y1, x2, y2]`` in parts of one; other lists of numbers are no boxes."""

    whole: float = 1.0

    def find(self, answer: str) -> Iterator[Mark]:
        for m in re.finditer(rf"\[{_N},{_N},{_N},{_N}\]", answer):
            numbers = [float(n) for n in m.groups()]
            if all(0 <= n <= 1 for n in numbers):
                yield _mark(numbers, "")


def _is_place(number: object) -> bool:
    return type(number) in (int, float) and -1e6 < number < 1e6  # type: ignore[operator]


def _mark(numbers: Sequence[float], label: str | None) -> Mark:
    first = (numbers[0], numbers[1])
    name = (label or "").strip()
    if len(numbers) == 2:
        return Mark(points=(first,), label=name)
    return Mark(points=(first, (numbers[2], numbers[3])), label=name)


# ---- for people to look at ----

# Okabe and Ito's colours, which colour-blind people tell apart; each with a text colour that is read on it.
_COLOURS: Final = (("#D55E00", "white"), ("#0072B2", "white"), ("#009E73", "white"), ("#F0E442", "black"))


def draw(picture: PILImage.Image, marks: Sequence[Mark]) -> PILImage.Image:
    """A copy of an upright picture with its marks on it, in lines that are seen at its size."""
    out = picture.convert("RGB")
    pen = ImageDraw.Draw(out)
    line = max(2, round(max(out.size) / 250))
    font = ImageFont.load_default(size=max(10.0, 5.0 * line))
    for number, mark in enumerate(marks):
        colour, on = _COLOURS[number % len(_COLOURS)]
        x, y = mark.points[0]
        if len(mark.points) == 2:
            # The line stands around the box, and within the picture.
            right, bottom = mark.points[1]
            box = [
                max(x - line, 0.0),
                max(y - line, 0.0),
                min(right + line, out.width) - 1,
                min(bottom + line, out.height) - 1,
            ]
            pen.rectangle([box[0], box[1], max(box[0], box[2]), max(box[1], box[3])], outline=colour, width=line)
            x, y = box[:2]
        else:
            reach = 2 * line
            pen.ellipse(
                [x - reach, y - reach, x + reach, y + reach], fill=colour, outline="white", width=max(1, line // 2)
            )
            x, y = x + reach, y + reach
        if mark.label:
            _write(pen, mark.label[:60], (x, y), font, colour, on)
    return out


def _write(
    pen: ImageDraw.ImageDraw,
    text: str,
    at: Point,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    ground: str,
    ink: str,
) -> None:
    """A name in a box of its own, above a place where there is room for it, and within the picture."""
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    width, height, (wide, high) = right - left + 4, bottom - top + 4, pen.im.size
    x = min(max(at[0], 0), max(wide - width, 0))
    y = at[1] - height if at[1] >= height else min(at[1], max(high - height, 0))
    pen.rectangle([x, y, x + width, y + height], fill=ground)
    pen.text((x + 2 - left, y + 2 - top), text, font=font, fill=ink)
