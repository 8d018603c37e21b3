"""Text and pictures written by one loop: which tokens may come next where pictures are runs of code tokens.

A picture is a begin token, exactly so many codes, an end token. A constraint for `autoregressive.Settings`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from polymodal.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PictureTokens:
    """How a model writes pictures.

    Attributes:
        begin, end: stand around the codes.
        codes: the token of each code.
        count: codes of a picture.
    """

    begin: int
    end: int
    codes: tuple[int, ...]
    count: int

    @property
    def length(self) -> int:
        """Tokens of a picture, its frame included."""
        return self.count + 2


@dataclass(frozen=True, kw_only=True)
class Interleaved:
    """Text in which there may be whole pictures.

    Attributes:
        tokens: how pictures are written.
        vocab_size: how many scores the model gives.
        room: tokens of an answer (``max_new_tokens``): a picture that would not fit is not begun.
        most: pictures of an answer; 0 is text alone, None any number.
        only: an answer is ``most`` pictures, and nothing else.
        never: tokens that are not written (placeholders, which the vocabulary may lack).

    Raises:
        ConfigError: the pictures do not fit.
    """

    tokens: PictureTokens
    vocab_size: int
    room: int
    most: int | None = None
    only: bool = False
    never: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.only and (not self.most or self.most * self.tokens.length > self.room):
            raise ConfigError(
                f"{self.most} pictures of {self.tokens.length} tokens each, and {self.room} tokens to write them"
            )

    def start(self) -> ModeGuide:
        return ModeGuide(self)


class ModeGuide:
    """Where an answer stands: in text, or so many tokens into a picture."""

    def __init__(self, rules: Interleaved) -> None:
        self._rules, self._written, self._pictures = rules, 0, 0
        self._inside: int | None = None  # codes of the picture that is being written
        t = rules.tokens
        self._codes = self._mask([*t.codes])
        self._text = ~(self._codes | self._mask([t.end, t.begin, *(i for i in rules.never if i < rules.vocab_size)]))

    def _mask(self, ids: list[int]) -> Bool[Tensor, " vocab"]:
        mask = torch.zeros(self._rules.vocab_size, dtype=torch.bool)
        mask[ids] = True
        return mask

    @property
    def _may_begin(self) -> bool:
        r = self._rules
        return (r.most is None or self._pictures < r.most) and self._written + r.tokens.length <= r.room

    def allowed(self) -> Bool[Tensor, " vocab"]:
        """In a picture a code, or its end when it has all; in text what is no part of a picture, or a begin."""
        r, t = self._rules, self._rules.tokens
        if self._inside is not None:
            return self._codes if self._inside < t.count else self._mask([t.end])
        if r.only:
            return self._mask([t.begin])
        return self._text | self._mask([t.begin]) if self._may_begin else self._text

    def take(self, token: int) -> None:
        t, self._written = self._rules.tokens, self._written + 1
        if self._inside is None:
            self._inside = 0 if token == t.begin else None
        elif token == t.end:
            self._inside, self._pictures = None, self._pictures + 1
        else:
            self._inside += 1

    @property
    def ended(self) -> bool:
        return self._rules.only and self._pictures == self._rules.most

    def copy(self) -> ModeGuide:
        other = ModeGuide.__new__(ModeGuide)
        other.__dict__.update(self.__dict__)
        return other


class Wordless:
    """A tokenizer and its stream for answers that are no text."""

    def stream(self) -> Wordless:
        return self

    def push(self, token: int) -> str:
        return ""

    def finish(self) -> str:
        return ""
