"""An answer that is text, pictures and sound in turn, as it comes: one type for all of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Literal, TypeAlias, TypeVar

Kind: TypeAlias = Literal["text", "image", "audio"]
P_co = TypeVar("P_co", covariant=True)


@dataclass(frozen=True, kw_only=True)
class Event(Generic[P_co]):
    """What is new of one span of an answer.

    Attributes:
        kind: what the span is.
        index: its number in the answer, from 0 on.
        payload: tokens; or what they stand for: a piece of text, a whole picture, a block of sound. What ends a span
            may be empty.
        done: the span ends here.
    """

    kind: Kind
    index: int
    payload: P_co
    done: bool = False
