"""What a painter is asked for: a text of one or two shapes, what must be seen in its picture, and scenes that it fits.

Objects are plain, large, and apart, on light or dark paper, and of shapes that are told from each other at 16 pixels:
what `shapes_reader` reads without error. Pairs of colour and shape of `shapes.HELD_OUT` stand in no text or scene of
training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final, Literal, TypeAlias, get_args

import numpy as np

from polymodal.data.worlds import shapes
from polymodal.data.worlds.shapes import COLOURS, HELD_OUT, RELATIONS, Scene, Thing

Kind: TypeAlias = Literal["one", "two", "related"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)

SHAPES: Final = ("circle", "square", "triangle", "diamond", "star", "cross", "heart", "ring")

_SHARES = (0.25, 0.15, 0.6)  # of the kinds
_GAP = 1 / 24  # of the side: objects are that far apart, so that none touches another
_CONTRAST = 100.0  # least distance in RGB between the paper and any object
_OPPOSITE: Final = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_WORDS: Final[Mapping[str, tuple[str, ...]]] = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
_FRAMES: Final = ("{}", "{}", "{}", "a picture of {}", "there is {}", "{} on plain paper")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A text, and what its picture must show: these colours and shapes and nothing else.

    ``relation`` is where the first of two ``kinds`` is, seen from the second; None where it is not said.
    """

    text: str
    kinds: tuple[tuple[str, str], ...]
    relation: str | None = None


def prompt(rng: np.random.Generator, *, kind: Kind | None = None, held_out: bool = False) -> Prompt:
    """A random text.

    Args:
        rng: what is drawn from.
        kind: one object, two, or two with a relation; drawn where not given.
        held_out: one of the objects is a pair of colour and shape that training never sees; else none is.
    """
    kind = kind or KINDS[rng.choice(len(KINDS), p=_SHARES)]
    kinds = [_pair(rng, held_out)]
    while kind != "one" and len(kinds) < 2:
        if (other := _pair(rng, held_out=False)) not in kinds:
            kinds.append(other)
    if len(kinds) == 2 and rng.random() < 0.5:
        kinds.reverse()
    names = [named(*each) for each in kinds]
    relation = None if kind != "related" else RELATIONS[rng.integers(len(RELATIONS))]
    if relation is not None:
        told, (first, second) = relation, names
        if rng.random() < 0.3:  # the same from the other side
            told, first, second = _OPPOSITE[relation], second, first
        words = _WORDS[told]
        said = f"{first} {words[rng.integers(len(words))]} {second}"
    else:
        said = " and ".join(names)
    return Prompt(text=_FRAMES[rng.integers(len(_FRAMES))].format(said), kinds=tuple(kinds), relation=relation)


def named(colour: str, shape: str) -> str:
    """``an orange ring``."""
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}"


def scene(prompt: Prompt, rng: np.random.Generator) -> Scene:
    """A scene that a text is true of; its relation holds along the longer of the ways between the two."""
    while True:
        drawn = shapes.arrange(prompt.kinds, rng, sizes_of=("large",), materials=("plain",))
        places = [(thing.x, thing.y) for thing in drawn.things]
        if _apart(drawn.things) and (prompt.relation is None or prompt.relation == relation(*places)):
            return replace(drawn, background=_paper(rng, {colour for colour, _ in prompt.kinds}))


def relation(first: tuple[float, float], second: tuple[float, float]) -> str | None:
    """Where one centre is, seen from another, as a person would say it; None where that is not clear."""
    across, down = first[0] - second[0], first[1] - second[1]
    if max(abs(across), abs(down)) <= shapes.MARGIN:
        return None
    return RELATIONS[int(across > 0)] if abs(across) > abs(down) else RELATIONS[2 + int(down > 0)]


@lru_cache(maxsize=2)
def pairs(*, held_out: bool) -> list[tuple[str, str]]:
    """Colours and shapes that training never sees together, or those that it sees."""
    return [(c, s) for c in COLOURS for s in SHAPES if ((c, s) in HELD_OUT) == held_out]


def _pair(rng: np.random.Generator, held_out: bool) -> tuple[str, str]:
    every = pairs(held_out=held_out)
    return every[rng.integers(len(every))]


def _apart(things: tuple[Thing, ...]) -> bool:
    return all(
        max(abs(a.x - b.x) - (a.width + b.width) / 2, abs(a.y - b.y) - (a.height + b.height) / 2) > _GAP
        for i, a in enumerate(things)
        for b in things[:i]
    )


def _paper(rng: np.random.Generator, colours: set[str]) -> tuple[int, int, int]:
    """Nearly white or nearly black, a little tinted."""
    used = np.array([COLOURS[colour] for colour in sorted(colours)], np.float32)
    best, distance = (0, 0, 0), -1.0
    for _ in range(20):
        base = 225 if rng.random() < 0.5 else 50
        red, green, blue = (int(base + tint) for tint in rng.integers(-10, 11, size=3))
        nearest = float(np.sqrt(((used - (red, green, blue)) ** 2).sum(1)).min())
        if nearest > distance:
            best, distance = (red, green, blue), nearest
        if distance >= _CONTRAST:
            break
    return best
