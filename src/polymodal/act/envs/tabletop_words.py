"""What can lie on the table, what can be asked for, and in which words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

COLOURS: Final = {
    "red": (0.85, 0.07, 0.07), "green": (0.08, 0.62, 0.15), "blue": (0.08, 0.22, 0.95), "yellow": (0.98, 0.82, 0.05),
}  # fmt: skip
KINDS: Final = ("cube", "cup", "ball")
PLACES: Final = {"left": (0, -1), "right": (0, 1), "near": (1, -1), "far": (1, 1)}  # axis, side
WORDINGS: Final[Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {  # usual ones, held-out ones
    "reach": (
        ("touch the {thing}", "reach for the {thing}", "go to the {thing}", "move to the {thing}", "tap the {thing}"),
        ("bring the gripper to the {thing}", "can you touch the {thing}?", "the {thing} is what you should reach"),
    ),
    "pick-place": (
        (
            "put the {thing} on the {place} plate",
            "place the {thing} on the {place} plate",
            "move the {thing} to the {place} plate",
            "pick up the {thing} and put it on the {place} plate",
            "take the {thing} to the {place} plate",
        ),
        (
            "on the {place} plate, place the {thing}",
            "can you move the {thing} onto the {place} plate?",
            "the {thing} goes on the {place} plate",
        ),
    ),
}


class Told(NamedTuple):
    """What an instruction asks for."""

    colour: str
    kind: str
    place: str | None  # None where something is to be touched


def held_out(told: Told) -> bool:
    """Whether a combination is never told in training. Each colour and kind is told with the other values."""
    order = list(COLOURS).index(told.colour) + KINDS.index(told.kind)
    return order == 3 if told.place is None else (order + list(PLACES).index(told.place)) % 4 == 3
