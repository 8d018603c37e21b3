"""What can be done to a screen, as text that is parsed strictly, and as a vector of numbers.

    click(x, y)  double_click(x, y)  right_click(x, y)  move(x, y)  drag(x, y, x2, y2)
    scroll(dx, dy)  type('text')  press('Enter')  wait()

Places are parts of the picture: (0, 0) is its upper left corner, (1, 1) its lower right one. ``scroll`` counts notches
of the wheel where the pointer is, to the right and down. ``press`` takes one of `KEYS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from jaxtyping import Float32, Shaped

from polymodal.core.errors import PolymodalError

Point: TypeAlias = tuple[float, float]

# The order is that of the kinds in a vector: add at the end.
GRAMMAR: Final[dict[str, tuple[str, ...]]] = {
    "wait": (),
    "click": ("x", "y"),
    "double_click": ("x", "y"),
    "right_click": ("x", "y"),
    "move": ("x", "y"),
    "drag": ("x", "y", "x2", "y2"),
    "scroll": ("dx", "dy"),
    "type": ("text",),
    "press": ("key",),
}
KINDS: Final = tuple(GRAMMAR)
# What a page can use. Nothing here leaves the page or closes it.
KEYS: Final = (
    *("Enter", "Tab", "Shift+Tab", "Escape", "Space", "Backspace", "Delete"),
    *("ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End", "PageUp", "PageDown"),
    *("Control+a", "Control+c", "Control+v", "Control+x", "Control+z"),
)
MOST_SCROLL: Final = 10.0
MOST_TEXT: Final = 500
CHARACTERS: Final = 32  # that a vector holds

# kind · x · y · x2 (or dx) · y2 (or dy) · characters, as code points with zeros behind them; or 1 + the number of a key
NAMES: Final = ("kind", "x", "y", "x2", "y2", *(f"char_{i}" for i in range(CHARACTERS)))
LOW: Final = np.array([0, 0, 0, -MOST_SCROLL, -MOST_SCROLL, *[0] * CHARACTERS], np.float32)
HIGH: Final = np.array([len(KINDS) - 1, 1, 1, MOST_SCROLL, MOST_SCROLL, *[0x10FFFF] * CHARACTERS], np.float32)


class MalformedAction(PolymodalError):
    """What a policy says is no action. It is never carried out in part."""


@dataclass(frozen=True)
class ScreenAction:
    """One act of the mouse or the keyboard, see the head of this file.

    Raises:
        MalformedAction: no such kind, wrong arguments, a place outside the picture.
    """

    kind: str
    numbers: tuple[float, ...] = ()
    text: str = ""

    def __post_init__(self) -> None:
        if (wanted := GRAMMAR.get(self.kind)) is None:
            raise MalformedAction(f"no action {self.kind[:20]!r}; there are {', '.join(KINDS)}")
        spoken = wanted in (("text",), ("key",))
        if len(self.numbers) != (0 if spoken else len(wanted)) or (self.text and not spoken):
            raise MalformedAction(f"{self.kind} takes ({', '.join(wanted)})")
        least, most = (-MOST_SCROLL, MOST_SCROLL) if self.kind == "scroll" else (0.0, 1.0)
        if not all(least <= n <= most for n in self.numbers):  # NaN fails this, too
            raise MalformedAction(f"the numbers of {self.kind} are from {least:g} to {most:g}, not {self.numbers}")
        if self.kind == "press" and self.text not in KEYS:
            raise MalformedAction(f"no key {self.text[:20]!r}; there are {', '.join(KEYS)}")
        if self.kind == "type" and not (0 < len(self.text) <= MOST_TEXT and self.text.isprintable()):
            raise MalformedAction(f"type takes 1 to {MOST_TEXT} printable characters; for others press a key")

    def __str__(self) -> str:
        if "text" in GRAMMAR[self.kind] or "key" in GRAMMAR[self.kind]:
            escaped = self.text.replace("\\", "\\\\").replace("'", "\\'")
            return f"{self.kind}('{escaped}')"
        return f"{self.kind}({', '.join(f'{n:.4f}'.rstrip('0').rstrip('.') for n in self.numbers)})"


WAIT: Final = ScreenAction("wait")

_CALL: Final = re.compile(r"\s*([a-z_]{1,16})\((.*)\)\s*")
_NUMBER: Final = re.compile(r"\s*([+-]?[0-9]{1,6}(?:\.[0-9]{1,17})?)\s*")
_STRING: Final = re.compile(r"""'((?:[^'\\]|\\['"\\])*)'|"((?:[^"\\]|\\['"\\])*)\"""")


def parse(text: str, place: Callable[[Point], Point] | None = None) -> ScreenAction:
    """The action that a text is, and nothing but it. Nothing of the text is evaluated.

    Args:
        text: e.g. ``click(0.31, 0.52)``.
        place: puts a place in the speaker's own numbers where it is in parts of the picture.

    Raises:
        MalformedAction: the text is not exactly one action.
    """
    call = _CALL.fullmatch(text) if len(text) <= 3 * MOST_TEXT else None
    if call is None:
        raise MalformedAction(f"not an action such as click(0.5, 0.5): {text[:80]!r}")
    kind, inside = call.group(1), call.group(2).strip()
    if string := _STRING.fullmatch(inside):
        spoken = string.group(1) if string.group(1) is not None else string.group(2)
        return ScreenAction(kind, text=re.sub(r"\\(.)", r"\1", spoken))
    found = [_NUMBER.fullmatch(piece) for piece in inside.split(",")] if inside else []
    numbers = tuple(float(n.group(1)) for n in found if n is not None)
    if len(numbers) != len(found):
        raise MalformedAction(f"{kind} takes ({', '.join(GRAMMAR.get(kind, ('...',)))}), not ({inside[:80]})")
    if place is not None and kind != "scroll" and len(numbers) % 2 == 0:
        numbers = tuple(n for pair in zip(numbers[::2], numbers[1::2], strict=True) for n in place(pair))
    return ScreenAction(kind, numbers)


def to_vector(action: ScreenAction) -> Float32[np.ndarray, " action_dim"]:
    """An action as numbers between `LOW` and `HIGH`, whose `NAMES` say what they are.

    Raises:
        MalformedAction: a text longer than a vector.
    """
    out = np.zeros(len(NAMES), np.float32)
    out[0] = KINDS.index(action.kind)
    first = 3 if action.kind == "scroll" else 1
    out[first : first + len(action.numbers)] = action.numbers
    codes = [1 + KEYS.index(action.text)] if action.kind == "press" else [ord(c) for c in action.text]
    if len(codes) > CHARACTERS:
        raise MalformedAction(f"a vector holds {CHARACTERS} characters, not {len(codes)}: type them in pieces")
    out[5 : 5 + len(codes)] = codes
    return out


def from_vector(vector: Shaped[np.ndarray, " action_dim"]) -> ScreenAction:
    """The action that is nearest to a vector; what is outside the limits is put onto them.

    Raises:
        MalformedAction: numbers that are not finite, or characters that are none.
    """
    if vector.shape != LOW.shape or not np.isfinite(vector).all():
        raise MalformedAction(f"a vector of {len(NAMES)} finite numbers is an action, see NAMES")
    limited = np.clip(vector, LOW, HIGH)
    kind = KINDS[round(float(limited[0]))]
    codes = [round(float(code)) for code in limited[5:]]
    codes = codes[: codes.index(0)] if 0 in codes else codes
    if kind == "press":
        return ScreenAction(kind, text=KEYS[codes[0] - 1] if codes and codes[0] <= len(KEYS) else "")
    if kind == "type":
        return ScreenAction(kind, text="".join(map(chr, codes)))
    first = 3 if kind == "scroll" else 1
    numbers = [float(n) for n in limited[first : first + len(GRAMMAR[kind])]]
    return ScreenAction(kind, tuple(numbers if kind == "scroll" else [min(max(n, 0.0), 1.0) for n in numbers]))


def within(point: Point, size: tuple[int, int]) -> Point:
    """A place in parts of a picture as pixels that are in it: its right and its lower edge are not."""
    x, y = (min(part * side, side - 0.5) for part, side in zip(point, size, strict=True))
    return x, y
