"""Short films of coloured shapes that move, with captions and actions that say exactly how.

One or two shapes on a dark ground. The first is moved by the clip's actions, two numbers a step: how far it goes to the
right and down, in fractions of the side. The others go one way, or stand still. Nothing leaves the picture, and in the
clips that are drawn here nothing covers anything else. A caption says every motion: "a red circle moves quickly to the
left, then up and a blue star stands still".

One direction for each colour (`HELD_OUT`) never occurs in training, although the colour and the direction do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Float32, Float64, UInt8
from PIL import Image

from polymodal.data.worlds import shapes
from polymodal.data.worlds.prompts import named
from polymodal.data.worlds.shapes import Scene, Thing
from polymodal.data.worlds.splits import generator

SPLITS: Final = ("train", "unseen")
COLOURS: Final = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "cyan")  # far apart
SHAPES: Final = ("circle", "square", "triangle", "diamond", "star", "cross", "heart", "arrow")  # solid
DIRECTIONS: Final[dict[str, tuple[int, int]]] = {
    "to the left": (-1, 0),
    "to the right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
}
STILL: Final = "still"
SPEEDS: Final = {"slowly": 0.2, "": 0.33, "quickly": 0.5}  # sides of the picture that a clip would cross
HELD_OUT: Final = frozenset((colour, tuple(DIRECTIONS)[n % 4]) for n, colour in enumerate(COLOURS))

_FINER = 4  # shapes move by quarters of a pixel
_NEAR = 60.0  # in RGB: a pixel may be of a colour
_LEAST = 0.004  # of the picture, in pixels of its colour: a shape is seen
_WIDEST = 0.2  # of the side: how far from their middle its pixels lie, as the root of the mean square
_RESTS = 0.06  # of the side: less is no motion
_CLEAR = 0.6  # what goes aside by more of what it goes ahead has no direction


@dataclass(frozen=True, kw_only=True, slots=True)
class Motion:
    """Where a shape goes, one direction after the other for equal times; none: it stands still."""

    directions: tuple[str, ...]
    speed: str

    def steps(self, count: int) -> Float32[np.ndarray, "{count} 2"]:
        """How far it goes in each of ``count`` steps, in fractions of the side."""
        ways = [DIRECTIONS[name] for name in self.directions] or [(0, 0)]
        leg = np.arange(count) * len(ways) // count
        return np.asarray(ways, np.float32)[leg] * np.float32(SPEEDS[self.speed] / count)

    def __str__(self) -> str:
        if not self.directions:
            return "stands still"
        return " ".join(word for word in ("moves", self.speed, ", then ".join(self.directions)) if word)


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """A film and everything that is true of it.

    Attributes:
        actions: how far the first shape is moved between two frames, to the right and down, in fractions of the side.
        start: the scene of the first frame.
        motions: of each of its things.
    """

    frames: UInt8[np.ndarray, "time size size 3"]
    caption: str
    actions: Float32[np.ndarray, "time-1 2"]
    start: Scene
    motions: tuple[Motion, ...]

    def under(self, actions: Float32[np.ndarray, "steps 2"]) -> UInt8[np.ndarray, "steps+1 size size 3"]:
        """The film as it would have been, had the first shape been moved by other actions, to its edge at the most."""
        longest = len(self.actions)
        assert len(actions) <= longest, f"{len(actions)} actions for a clip of {longest} steps"
        others = [motion.steps(longest)[: len(actions)] for motion in self.motions[1:]]
        return _play(self.start, [actions, *others], self.frames.shape[1])


def item(split: str, index: int, *, seed: int = 0, frames: int = 9, size: int = 32, legs: int = 1) -> Clip:
    """Clip number ``index`` of a split, the same on every machine: ``unseen`` has motions that ``train`` never has.

    Raises:
        DataError: there is no such split.
    """
    rng = generator("clips", SPLITS, split, index, seed)
    return clip(rng, frames=frames, size=size, legs=legs, held_out=split == "unseen")


def clip(rng: np.random.Generator, *, frames: int = 9, size: int = 32, legs: int = 1, held_out: bool = False) -> Clip:
    """A random clip of one or two shapes.

    Args:
        frames: at least two.
        size: of a frame, in pixels.
        legs: directions that the first shape takes one after the other; with more than one, the actions change.
        held_out: the first shape moves in the direction that training never sees of its colour; else none does.
    """
    assert frames > legs >= 1, f"{frames} frames for {legs} legs"
    while True:
        things = _things(rng)
        motions = [_motion(rng, things[0].colour, legs, held_out)]
        motions += [_motion(rng, thing.colour, int(rng.integers(2)), False) for thing in things[1:]]
        steps = [motion.steps(frames - 1) for motion in motions]
        if (placed := _place(rng, things, steps)) is not None:
            break
    level = int(rng.integers(0, 40))
    start = Scene(things=placed, background=(level, level, level))
    told = [f"{named(thing.colour, thing.shape)} {motion}" for thing, motion in zip(placed, motions, strict=True)]
    return Clip(
        frames=_play(start, steps, size),
        caption=" and ".join(told),
        actions=steps[0],
        start=start,
        motions=tuple(motions),
    )


def _things(rng: np.random.Generator) -> list[Thing]:
    """One or two plain shapes of different colours, not yet placed."""
    count = int(rng.integers(1, 3))
    things: list[Thing] = []
    while len(things) < count:
        colour, shape = str(rng.choice(COLOURS)), str(rng.choice(SHAPES))
        if (colour, shape) in shapes.HELD_OUT or colour in [thing.colour for thing in things]:
            continue
        width = float(rng.uniform(0.2, 0.3))
        things.append(Thing(shape=shape, colour=colour, size="medium", material="plain", x=0.5, y=0.5, width=width))
    return things


def _motion(rng: np.random.Generator, colour: str, legs: int, held_out: bool) -> Motion:
    """A motion of so many legs, no two in a row the same; the first is in the held-out direction, or none is."""
    taken: list[str] = []
    while len(taken) < legs:
        special = held_out and not taken
        fits = [n for n in DIRECTIONS if n not in taken[-1:] and ((colour, n) in HELD_OUT) == special]
        taken.append(str(rng.choice(fits)))
    return Motion(directions=tuple(taken), speed=str(rng.choice(list(SPEEDS))) if taken else "")


def _path(thing: Thing, steps: Float32[np.ndarray, "steps 2"]) -> Float64[np.ndarray, "steps+1 2"]:
    """The centres of a thing that is moved by these steps and stopped by the edges of the picture."""
    half = np.array([thing.width, thing.height]) / 2
    centres = [np.array([thing.x, thing.y])]
    for step in steps:
        centres.append(np.clip(centres[-1] + step, half, 1 - half))
    return np.stack(centres)


def _place(
    rng: np.random.Generator, things: Sequence[Thing], steps: Sequence[Float32[np.ndarray, "steps 2"]]
) -> tuple[Thing, ...] | None:
    """The things where their paths stay inside and apart, or None where no such places were found."""
    for _ in range(20):
        placed = []
        for thing, step in zip(things, steps, strict=True):
            moved = np.concatenate([np.zeros((1, 2)), step.cumsum(0, dtype=np.float64)])
            half = np.array([thing.width, thing.height]) / 2
            low, high = half - moved.min(0), 1 - half - moved.max(0)
            if (low > high).any():
                return None
            x, y = rng.uniform(low, high).tolist()
            placed.append(dataclasses.replace(thing, x=x, y=y))
        if len(placed) == 1:
            return tuple(placed)
        first, second = placed
        gap = abs(_path(first, steps[0]) - _path(second, steps[1]))
        reach = np.array([first.width + second.width, first.height + second.height]) / 2 + 0.04
        if (gap > reach).any(1).all():
            return tuple(placed)
    return None


def _play(
    start: Scene, steps: Sequence[Float32[np.ndarray, "steps 2"]], size: int
) -> UInt8[np.ndarray, "steps+1 {size} {size} 3"]:
    """The film of things that are moved by these steps; the first lies over the others."""
    paths = [_path(thing, step) for thing, step in zip(start.things, steps, strict=True)]
    frames = []
    for centres in zip(*paths, strict=True):
        moved = [dataclasses.replace(t, x=x, y=y) for t, (x, y) in zip(start.things, centres, strict=True)]
        fine = shapes.render(dataclasses.replace(start, things=tuple(reversed(moved))), size * _FINER)
        frames.append(np.asarray(Image.fromarray(fine).reduce(_FINER)))
    return np.stack(frames)


# ---- what a film shows


def track(frames: UInt8[np.ndarray, "time height width 3"], colour: str) -> Float64[np.ndarray, "time 2"]:
    """The centre (x, y) of what has a colour in each frame, in fractions of the sides.

    NaN where hardly anything has it, or where what has it is strewn wider than a shape is.
    """
    away = np.linalg.norm(frames.astype(np.float64) - shapes.COLOURS[colour], axis=-1)
    weight = np.clip(1 - away / _NEAR, 0, None)
    height, width = frames.shape[1:3]
    seen = weight.sum((1, 2)) >= _LEAST * height * width
    share = weight / np.where(seen, weight.sum((1, 2)), 1)[:, None, None]
    x, y = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    columns, rows = share.sum(1), share.sum(2)
    centre = np.stack([columns @ x, rows @ y], -1)
    spread = columns @ x**2 + rows @ y**2 - (centre**2).sum(-1)
    return np.where((seen & (spread < _WIDEST**2))[:, None], centre, np.nan)


def direction(frames: UInt8[np.ndarray, "time height width 3"], colour: str) -> str | None:
    """Which of `DIRECTIONS` a colour takes from the first frame to the last, or `STILL`.

    None where it is missing in the first or the last frame, or in more than a fifth of all, or where its way is
    slanting.
    """
    centres = track(frames, colour)
    if np.isnan(centres[[0, -1]]).any() or np.isnan(centres[:, 0]).mean() > 0.2:
        return None
    way = centres[-1] - centres[0]
    ahead, aside = sorted(abs(way), reverse=True)
    if ahead < _RESTS:
        return STILL
    if aside > _CLEAR * ahead:
        return None
    axis = int(abs(way[1]) > abs(way[0]))
    return next(name for name, sign in DIRECTIONS.items() if sign[axis] * way[axis] > 0)
