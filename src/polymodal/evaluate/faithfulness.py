"""Whether pictures show what a text asked for, once somebody has read what is in them.

    scores = faithfulness([read(picture) for picture in pictures], prompts)
    baseline = faithfulness([read(picture) for picture in shuffled], prompts)

Beside it stands what pictures of other texts score: a painter that hears nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, runtime_checkable

from polymodal.core.errors import DataError
from polymodal.evaluate.text_metrics import Estimate, estimate

MARGIN: Final = 0.1  # of a side: centres that are no farther apart are neither left nor right, above nor below
_AXES: Final = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


@runtime_checkable
class Placed(Protocol):
    """An object that was read, as `data.worlds.shapes_reader.Seen`; x and y are fractions of the sides."""

    @property
    def colour(self) -> str: ...
    @property
    def shape(self) -> str: ...
    @property
    def x(self) -> float: ...
    @property
    def y(self) -> float: ...


@runtime_checkable
class Asked(Protocol):
    """What a text asks for, as `data.worlds.prompts.Prompt`: colours and shapes, and how the first two are placed."""

    @property
    def kinds(self) -> Sequence[tuple[str, str]]: ...
    @property
    def relation(self) -> str | None: ...


@dataclass(frozen=True, kw_only=True)
class Faithfulness:
    """Shares of pictures, each with its interval.

    Attributes:
        objects: show what was asked for, each object in its colour, and nothing else.
        count: show as many objects as were asked for.
        colours: show the colours that were asked for, on whatever.
        shapes: show the shapes that were asked for, in whatever colour.
        relation: of those whose text says one: show both objects, one of each, placed like that. None without such.
    """

    objects: Estimate
    count: Estimate
    colours: Estimate
    shapes: Estimate
    relation: Estimate | None

    def estimates(self) -> dict[str, Estimate]:
        """By name, those that there are."""
        return {name: value for name, value in vars(self).items() if value is not None}


def faithfulness(seen: Sequence[Sequence[Placed]], asked: Sequence[Asked]) -> Faithfulness:
    """What is seen in each picture against what its text asked for.

    Raises:
        DataError: there are none, or not one for each.
    """
    if len(seen) != len(asked) or not asked:
        raise DataError(f"{len(seen)} pictures of {len(asked)} texts: give one each, and one at least")
    both = list(zip(seen, asked, strict=True))
    related = [float(_placed(found, one)) for found, one in both if one.relation is not None]
    return Faithfulness(
        objects=_share(Counter((o.colour, o.shape) for o in found) == Counter(one.kinds) for found, one in both),
        count=_share(len(found) == len(one.kinds) for found, one in both),
        colours=_share(Counter(o.colour for o in found) == Counter(c for c, _ in one.kinds) for found, one in both),
        shapes=_share(Counter(o.shape for o in found) == Counter(s for _, s in one.kinds) for found, one in both),
        relation=estimate(related) if related else None,
    )


def _share(right: Iterable[bool]) -> Estimate:
    return estimate([float(each) for each in right])


def _placed(found: Sequence[Placed], asked: Asked) -> bool:
    """Whether the relation holds between the two objects, each of which is there once."""
    assert asked.relation is not None
    places = [[(o.x, o.y) for o in found if (o.colour, o.shape) == kind] for kind in asked.kinds[:2]]
    if [len(each) for each in places] != [1, 1]:
        return False
    (one,), (other,) = places
    across, down = _AXES[asked.relation]
    return across * (one[0] - other[0]) + down * (one[1] - other[1]) > MARGIN
