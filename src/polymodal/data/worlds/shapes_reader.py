"""What stands in a picture of plain shapes, read from its pixels: nothing is learned.

Pixels that differ from the background, which is what most pixels are, fall into connected parts. The colour of a part
is that of its pixels farthest from the background; how much of each pixel it covers follows. The shape is the one that
overlaps best with what is covered when it is laid over the part's centre with the part's area: both hardly change where
an autoencoder blurs a picture. Objects that touch are read as one, and usually as nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image, ImageDraw

from polymodal.core.errors import MediaError
from polymodal.data.worlds.shapes import ASPECTS, COLOURS, DRAW, SHAPES

LEAST_OVERLAP: Final = 0.66  # of a shape with what is seen (the common part of what either covers)
LEAST_BACKGROUND: Final = 0.4  # of a picture
_SAME = 45.0  # in RGB: nearer to the background than this is the background
_NAMED = 70.0  # in RGB: farther from every colour than this has no name
_LEAST_AREA = 0.004  # of a picture; what is smaller is not seen
_REACH = 2  # pixels around a part that it may cover a little of
_FINE = 96  # pixels across a mask that is laid over parts
_WITHIN = 4  # places along each side of a pixel at which it is looked up


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """One object. ``x`` and ``y`` are its centre and ``width`` its width, in fractions of the sides of the picture.

    ``overlap`` is how well its shape fits: 1 where nothing is different.
    """

    shape: str
    colour: str
    x: float
    y: float
    width: float
    overlap: float


def read(pixels: np.ndarray) -> list[Seen]:
    """The objects of a picture (height width 3, bytes) from top to bottom; parts without a name are left out.

    Raises:
        MediaError: these are no pixels of a picture in colour.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or min(pixels.shape[:2]) < 16:
        raise MediaError(f"shapes are read from bytes (height, width, 3), not {pixels.dtype} {pixels.shape}")
    picture = pixels.astype(np.float32)
    background = np.median(picture.reshape(-1, 3), 0)
    differs = np.linalg.norm(picture - background, axis=2) > _SAME
    if 1 - differs.mean() < LEAST_BACKGROUND:
        return []
    return [seen for part in _parts(differs) if (seen := _named(picture, background, part, differs)) is not None]


def _parts(differs: Bool[np.ndarray, "height width"]) -> Iterator[Bool[np.ndarray, "height width"]]:
    """Connected parts (corners connect) that are large enough."""
    numbers = np.where(differs, np.arange(1, differs.size + 1).reshape(differs.shape), 0)
    while True:  # the least number of a part spreads over it
        spread = _spread(numbers, np.maximum) * differs
        if (spread == numbers).all():
            break
        numbers = spread
    for number, area in zip(*np.unique(numbers[differs], return_counts=True), strict=True):
        if area >= _LEAST_AREA * differs.size:
            yield numbers == number


def _spread(values: np.ndarray, joined: np.ufunc) -> np.ndarray:
    """Each value joined with its eight neighbours'."""
    padded = np.pad(values, 1)
    rows = joined(joined(padded[:-2], padded[1:-1]), padded[2:])
    return joined(joined(rows[:, :-2], rows[:, 1:-1]), rows[:, 2:])


def _named(picture: np.ndarray, background: np.ndarray, part: np.ndarray, differs: np.ndarray) -> Seen | None:
    """What a part is."""
    inside = picture[part]
    away = np.linalg.norm(inside - background, axis=1)
    paint = np.median(inside[away >= np.median(away)], 0)
    colour, distance = min(
        ((name, float(np.linalg.norm(paint - value))) for name, value in COLOURS.items()), key=lambda pair: pair[1]
    )
    if distance > _NAMED:
        return None
    near = part
    for _ in range(_REACH):
        near = _spread(near, np.logical_or)
    near = near & (part | ~differs)
    direction = paint - background
    covered = np.clip((picture - background) @ direction / (direction @ direction), 0, 1) * near
    covered[covered < 0.15] = 0  # noise
    area = covered.sum()
    rows, columns = np.indices(part.shape) + 0.5
    y, x = float((rows * covered).sum() / area), float((columns * covered).sum() / area)
    overlap, shape, width, left = max(_fit(shape, covered, x, y) for shape in SHAPES)
    if overlap < LEAST_OVERLAP:
        return None
    height, across = part.shape
    centre, middle = (left[0] + width / 2) / across, (left[1] + width * ASPECTS[shape] / 2) / height
    return Seen(shape=shape, colour=colour, x=centre, y=middle, width=width / across, overlap=overlap)


def _fit(shape: str, covered: np.ndarray, x: float, y: float) -> tuple[float, str, float, tuple[float, float]]:
    """How well a shape of the same centre of mass and area overlaps; its width, and its left and top, in pixels."""
    mask, centre_x, centre_y, area = _template(shape)
    width = float(np.sqrt(covered.sum() / area))  # areas are in squared widths
    left, top = x - centre_x * width, y - centre_y * width
    places = (np.arange(_WITHIN) + 0.5) / _WITHIN

    def looked_up(start: float, pixels: int, size: int) -> np.ndarray:
        """Pixels of the mask at places within each pixel; those outside are one behind the last, which is empty."""
        at = np.floor(((np.arange(pixels)[:, None] + places).ravel() - start) / width * _FINE).astype(int)
        return np.where((at >= 0) & (at < size), at, size)

    height, across = covered.shape
    laid = mask[np.ix_(looked_up(top, height, mask.shape[0] - 1), looked_up(left, across, mask.shape[1] - 1))]
    laid = laid.reshape(height, _WITHIN, across, _WITHIN).mean((1, 3))
    overlap = np.minimum(laid, covered).sum() / np.maximum(laid, covered).sum()
    return float(overlap), shape, width, (left, top)


@lru_cache(maxsize=len(SHAPES))
def _template(shape: str) -> tuple[Float[np.ndarray, "rows columns"], float, float, float]:
    """A fine mask with an empty row and column behind it, its centre of mass and its area, in widths."""
    drawn = Image.new("L", (_FINE, round(_FINE * ASPECTS[shape])))
    DRAW[shape](ImageDraw.Draw(drawn), *drawn.size)
    mask = np.asarray(drawn, np.float32) / 255
    rows, columns = (np.indices(mask.shape) + 0.5) / _FINE
    total = mask.sum()
    centre = float((columns * mask).sum() / total), float((rows * mask).sum() / total)
    return np.pad(mask, (0, 1)), *centre, float(total / _FINE**2)
