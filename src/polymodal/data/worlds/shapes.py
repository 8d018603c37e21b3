"""Small scenes of coloured shapes whose every fact is known: what is there, how many, and where.

Pictures are put together from cached sprites that Pillow draws at four times their size. Some pairs of colour and shape
(``HELD_OUT``) never occur in training scenes, although each colour and each shape does.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

COLOURS: Final[dict[str, tuple[int, int, int]]] = {
    "red": (214, 39, 40),
    "orange": (255, 140, 0),
    "yellow": (250, 220, 30),
    "green": (30, 140, 50),
    "blue": (30, 70, 210),
    "purple": (130, 40, 160),
    "pink": (255, 130, 190),
    "brown": (115, 65, 25),
    "black": (15, 15, 15),
    "white": (250, 250, 250),
    "cyan": (40, 215, 225),
    "gray": (125, 125, 125),
}
SIZES: Final[dict[str, float]] = {"small": 0.17, "medium": 0.26, "large": 0.38}  # of the side of the picture
MATERIALS: Final = ("plain", "striped", "dotted", "shiny")
MAX_OBJECTS: Final = 8
RELATIONS: Final = ("left of", "right of", "above", "below")
HELD_OUT: Final = frozenset(
    {
        ("blue", "cup"),
        ("red", "plate"),
        ("green", "heart"),
        ("yellow", "square"),
        ("purple", "star"),
        ("orange", "ring"),
        ("pink", "triangle"),
        ("brown", "circle"),
        ("black", "diamond"),
        ("white", "cross"),
        ("cyan", "moon"),
        ("gray", "arrow"),
        ("red", "circle"),
        ("blue", "star"),
        ("green", "cup"),
        ("yellow", "plate"),
        ("cyan", "square"),
    }
)

MARGIN = 0.1  # of the side: centres closer than this are neither left nor right, above nor below, of each other
_MAX_OVERLAP = 0.05  # of the smaller box
_MAX_COVER = 0.42  # of the picture, by all boxes: beyond it, random placing seldom ends
_CONTRAST = 90.0  # least distance in RGB between the background and any object
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")


@dataclass(frozen=True, kw_only=True, slots=True)
class Thing:
    """One object. ``x`` and ``y`` are its centre and ``width`` its width, in fractions of the side of the picture."""

    shape: str
    colour: str
    size: str
    material: str
    x: float
    y: float
    width: float

    @property
    def height(self) -> float:
        return self.width * ASPECTS[self.shape]

    def box(self, size: int) -> tuple[int, int, int, int]:
        """Left, top, right, bottom in pixels of a picture of ``size`` x ``size``; right and bottom are exclusive."""
        width, height = (max(3, round(extent * size)) for extent in (self.width, self.height))
        left = min(max(round(self.x * size - width / 2), 0), size - width)
        top = min(max(round(self.y * size - height / 2), 0), size - height)
        return left, top, left + width, top + height


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """Objects on a plain background; nothing of the picture is left to chance."""

    things: tuple[Thing, ...]
    background: tuple[int, int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fact:
    """``things[subject]`` is ``relation`` ``things[object]``."""

    subject: int
    relation: str
    object: int


_Box = tuple[float, float, float, float]  # centre, width and height in fractions of the side

# ------------------------------------------------------------------------------------------------------- drawing

_Points = Sequence[tuple[int | float, int | float]]


def _polygon(points: _Points) -> Callable[[ImageDraw.ImageDraw, int, int], None]:
    """Draws a polygon given in any coordinates, stretched to fill the whole mask."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    spans = (min(xs), max(xs) - min(xs)), (min(ys), max(ys) - min(ys))

    def draw(pen: ImageDraw.ImageDraw, width: int, height: int) -> None:
        (left, across), (top, down) = spans
        pen.polygon([((x - left) / across * (width - 1), (y - top) / down * (height - 1)) for x, y in points], fill=255)

    return draw


def _circular(radii: list[float], start: float) -> _Points:
    steps = [start + 2 * math.pi * i / len(radii) for i in range(len(radii))]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, steps, strict=True)]


def _heart() -> _Points:
    turns = [2 * math.pi * i / 60 for i in range(60)]
    return [
        (math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16)
        for t in turns
    ]


def _circle(pen: ImageDraw.ImageDraw, width: int, height: int) -> None:
    pen.ellipse((0, 0, width - 1, height - 1), fill=255)


def _ring(pen: ImageDraw.ImageDraw, width: int, height: int) -> None:
    _circle(pen, width, height)
    pen.ellipse((width * 0.27, height * 0.27, width * 0.73, height * 0.73), fill=0)


def _moon(pen: ImageDraw.ImageDraw, width: int, height: int) -> None:
    pen.ellipse((0, 0, 1.5 * width, height - 1), fill=255)
    pen.ellipse((0.45 * width, -0.06 * height, 1.75 * width, 1.06 * height), fill=0)
    pen.polygon([(0.75 * width, 0), (width - 1, 0), (width * 0.66, height * 0.08)], fill=255)
    pen.polygon([(0.75 * width, height - 1), (width - 1, height - 1), (width * 0.66, height * 0.92)], fill=255)


def _cup(pen: ImageDraw.ImageDraw, width: int, height: int) -> None:
    pen.ellipse((0.45 * width, 0.15 * height, width - 1, 0.72 * height), fill=255)
    pen.ellipse((0.58 * width, 0.29 * height, 0.87 * width, 0.58 * height), fill=0)
    pen.polygon([(0, 0), (0.74 * width, 0), (0.64 * width, height - 1), (0.10 * width, height - 1)], fill=255)


def _plate(pen: ImageDraw.ImageDraw, width: int, height: int) -> None:
    pen.ellipse((0, 0, width - 1, height - 1), fill=255)
    # The rim: a thin gap between the edge and the well.
    pen.ellipse((0.17 * width, 0.19 * height, 0.83 * width, 0.81 * height), fill=0)
    pen.ellipse((0.22 * width, 0.27 * height, 0.78 * width, 0.73 * height), fill=255)


DRAW: Final[dict[str, Callable[[ImageDraw.ImageDraw, int, int], None]]] = {
    "circle": _circle,
    "square": _polygon([(0, 0), (1, 0), (1, 1), (0, 1)]),
    "triangle": _polygon([(0, 1), (0.5, 0), (1, 1)]),
    "diamond": _polygon([(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)]),
    "star": _polygon(_circular([1.0, 0.42] * 5, -math.pi / 2)),
    "cross": _polygon([(1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (2, 2), (2, 3), (1, 3), (1, 2), (0, 2), (0, 1), (1, 1)]),
    "heart": _polygon(_heart()),
    "arrow": _polygon([(0, 0.3), (0.5, 0.3), (0.5, 0), (1, 0.5), (0.5, 1), (0.5, 0.7), (0, 0.7)]),
    "ring": _ring,
    "moon": _moon,
    "cup": _cup,
    "plate": _plate,
}
SHAPES: Final = tuple(DRAW)
ASPECTS: Final = {shape: {"diamond": 1.3, "moon": 1.4, "plate": 0.5}.get(shape, 1.0) for shape in SHAPES}


@functools.lru_cache(maxsize=8192)
def _sprite(shape: str, colour: str, material: str, width: int, height: int) -> tuple[Image.Image, Image.Image]:
    """The picture and the mask of one object."""
    wide, high = 4 * width, 4 * height
    mask = Image.new("L", (wide, high))
    DRAW[shape](ImageDraw.Draw(mask), wide, high)
    base = np.asarray(COLOURS[colour], np.float32)
    # Patterns mix in white, or black where the colour itself is light.
    other = np.full(3, 255.0 if base.mean() < 200 else 60.0, np.float32)
    y, x = np.mgrid[0:high, 0:wide].astype(np.float32) / wide
    if material == "striped":
        mixed = 0.75 * ((x + y) * 4 % 1 < 0.42)
    elif material == "dotted":
        mixed = 0.85 * (((x * 4 % 1) - 0.5) ** 2 + ((y * 4 % 1) - 0.5) ** 2 < 0.09)
    elif material == "shiny":
        # A highlight at the upper left; on light colours it is the shadow below that shows.
        mixed = 0.9 * np.clip(1 - 2.6 * np.hypot(x - 0.33, y - 0.3 * high / wide), 0, 1)
    else:
        mixed = np.zeros_like(x)
    paint = base + (other - base) * mixed[..., None]
    if material == "shiny":
        paint *= (1 - 0.45 * np.clip(x + y * wide / high - 1, 0, 1))[..., None]
    picture = Image.fromarray(paint.astype(np.uint8))
    target = (width, height)
    return picture.resize(target, Image.Resampling.BOX), mask.resize(target, Image.Resampling.BOX)


def render(scene: Scene, size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """The picture of a scene; later objects lie over earlier ones."""
    canvas = Image.new("RGB", (size, size), scene.background)
    for thing in scene.things:
        left, top, right, bottom = thing.box(size)
        picture, mask = _sprite(thing.shape, thing.colour, thing.material, right - left, bottom - top)
        canvas.paste(picture, (left, top), mask)
    return np.asarray(canvas)


# ------------------------------------------------------------------------------------------------------ scenes


def _kind(rng: np.random.Generator, held_out: bool) -> tuple[str, str]:
    """A colour and a shape, from the held-out pairs or from the others."""
    if held_out:
        pairs = sorted(HELD_OUT)
        return pairs[rng.integers(len(pairs))]
    colours = tuple(COLOURS)
    while True:
        pair = colours[rng.integers(len(colours))], SHAPES[rng.integers(len(SHAPES))]
        if pair not in HELD_OUT:
            return pair


def _overlap(a: _Box, b: _Box) -> float:
    """Share of the smaller box that the two boxes have in common."""
    wide = min(a[0] + a[2] / 2, b[0] + b[2] / 2) - max(a[0] - a[2] / 2, b[0] - b[2] / 2)
    high = min(a[1] + a[3] / 2, b[1] + b[3] / 2) - max(a[1] - a[3] / 2, b[1] - b[3] / 2)
    return max(0.0, wide) * max(0.0, high) / min(a[2] * a[3], b[2] * b[3])


def _sizes(rng: np.random.Generator, shapes: list[str], names: Sequence[str]) -> list[str]:
    """Random sizes of ``names`` (the smallest first), the largest made smaller until there is room for all."""
    sizes = [int(i) for i in rng.integers(len(names), size=len(shapes))]

    def cover(i: int) -> float:
        return SIZES[names[sizes[i]]] ** 2 * ASPECTS[shapes[i]]

    while sum(cover(i) for i in range(len(shapes))) > _MAX_COVER and any(sizes):
        sizes[max(range(len(shapes)), key=lambda i: (sizes[i], cover(i)))] -= 1
    return [names[i] for i in sizes]


def _place(rng: np.random.Generator, extents: list[tuple[float, float]]) -> list[_Box] | None:
    """Boxes of the given widths and heights that hardly overlap, or None where no room was found."""
    placed: list[_Box] = []
    for width, height in extents:
        for x, y in rng.random((30, 2)).tolist():
            box = (width / 2 + (1 - width) * x, height / 2 + (1 - height) * y, width, height)
            if all(_overlap(box, other) <= _MAX_OVERLAP for other in placed):
                placed.append(box)
                break
        else:
            return None
    return placed


def _background(rng: np.random.Generator, colours: set[str]) -> tuple[int, int, int]:
    used = np.asarray([COLOURS[colour] for colour in sorted(colours)], np.float32)
    best, distance = (0, 0, 0), -1.0
    for red, green, blue in rng.integers(0, 256, size=(40, 3)).tolist():
        nearest = float(np.sqrt(((used - (red, green, blue)) ** 2).sum(1)).min())
        if nearest > distance:
            best, distance = (red, green, blue), nearest
        if distance >= _CONTRAST:
            break
    return best


def scene(rng: np.random.Generator, *, objects: int | None = None, held_out: bool = False) -> Scene:
    """A random scene.

    Args:
        objects: how many, 1 to 8; drawn at random where not given.
        held_out: one of the objects is a pair of colour and shape that training never sees; else none is.
    """
    count = int(rng.integers(1, MAX_OBJECTS + 1)) if objects is None else objects
    assert 1 <= count <= MAX_OBJECTS, f"{count} objects; a scene has 1 to {MAX_OBJECTS}"
    special = int(rng.integers(count)) if held_out else -1
    kinds = [_kind(rng, i == special) for i in range(count)]
    return arrange(kinds, rng)


def arrange(
    kinds: Sequence[tuple[str, str]],
    rng: np.random.Generator,
    *,
    sizes_of: Sequence[str] = tuple(SIZES),
    materials: Sequence[str] = MATERIALS,
) -> Scene:
    """A scene of exactly these colours and shapes; sizes, places, materials and the background are drawn."""
    sizes = _sizes(rng, [shape for _, shape in kinds], sizes_of)
    widths = [SIZES[size] * (0.92 + 0.16 * rng.random()) for size in sizes]
    extents = [(width, width * ASPECTS[shape]) for width, (_, shape) in zip(widths, kinds, strict=True)]
    while (boxes := _place(rng, extents)) is None:
        pass  # no room was found: once more from the start
    things = tuple(
        Thing(shape=shape, colour=colour, size=size, material=str(rng.choice(materials)), x=x, y=y, width=width)
        for (colour, shape), size, (x, y, width, _) in zip(kinds, sizes, boxes, strict=True)
    )
    return Scene(things=things, background=_background(rng, {colour for colour, _ in kinds}))


# --------------------------------------------------------------------------------------------------- what is true


def facts(scene: Scene) -> list[Fact]:
    """Every relation that clearly holds: the centres are apart by more than a tenth of the picture along its axis."""
    found = []
    for i, a in enumerate(scene.things):
        for j, b in enumerate(scene.things):
            if i == j:
                continue
            holds = (a.x < b.x - MARGIN, a.x > b.x + MARGIN, a.y < b.y - MARGIN, a.y > b.y + MARGIN)
            found += [Fact(subject=i, relation=r, object=j) for r, h in zip(RELATIONS, holds, strict=True) if h]
    return found


def plural(shape: str) -> str:
    """``cups``, ``crosses``."""
    return shape + ("es" if shape.endswith("s") else "s")


def _phrase(thing: Thing, rng: np.random.Generator, bare: float) -> str:
    """``a small red striped cup``: colour and shape always, size and material now and then; ``a cup`` if ``bare``."""
    if bare and rng.random() < bare:
        words = [thing.shape]
    else:
        words = [thing.size] if rng.random() < 0.5 else []
        words.append(thing.colour)
        if thing.material != "plain" and rng.random() < 0.6:
            words.append(thing.material)
        words.append(thing.shape)
    return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)


def _count(scene: Scene, rng: np.random.Generator) -> str:
    things = scene.things
    form = rng.integers(3)
    if form == 0:
        number, noun = len(things), ("object", "objects")
    elif form == 1:
        shapes = Counter(t.shape for t in things)
        shape = sorted(shapes)[rng.integers(len(shapes))]
        number, noun = shapes[shape], (shape, plural(shape))
    else:
        colours = Counter(t.colour for t in things)
        colour = sorted(colours)[rng.integers(len(colours))]
        number, noun = colours[colour], (f"{colour} object", f"{colour} objects")
    return f"{_NUMBERS[number]} {noun[number > 1]}"


def describe(scene: Scene, rng: np.random.Generator, *, bare: float = 0.0) -> str:
    """One true caption: all objects (up to three), a relation between two, one object, or a count.

    ``bare`` is the share of objects of which the shape alone is named. Where captions name colour, size and pattern,
    few pictures of a batch are left for the shape to tell apart, and it is not learned.
    """
    things = scene.things
    form = rng.random()
    if form < 0.15:
        return _count(scene, rng)
    if len(things) > 1 and form < 0.6:
        # The relation along the longer axis is the one that a person would name.
        clear = [
            f
            for f in facts(scene)
            if (abs(things[f.subject].x - things[f.object].x) > abs(things[f.subject].y - things[f.object].y))
            == (f.relation in RELATIONS[:2])
        ]
        if clear:
            fact = clear[rng.integers(len(clear))]
            subject, other = (_phrase(things[i], rng, bare) for i in (fact.subject, fact.object))
            return f"{subject} {fact.relation} {other}"
    if len(things) <= 3:
        phrases = [_phrase(things[i], rng, bare) for i in rng.permutation(len(things))]
        return ", ".join(phrases[:-1]) + (" and " if len(phrases) > 1 else "") + phrases[-1]
    return f"there is {_phrase(things[rng.integers(len(things))], rng, bare)}"
