"""Byte-level tokens under the constraint that they spell a text of exactly so many characters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from polymodal.core.errors import ConfigError


def _symbols() -> dict[str, int]:
    """GPT-2's character for each byte: itself where it can be printed, else one from 256 on."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printed]
    return {chr(b): b for b in printed} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTES: Final = _symbols()


def alphabet(tokens: Iterable[str]) -> dict[int, str]:
    """The bytes that can be written with these tokens, one by one: their tokens."""
    return {_BYTES[token]: token for token in tokens if token in _BYTES}


def token_bytes(token: str) -> bytes:
    """What a byte-level token spells; one with a character that stands for no byte spells itself."""
    spelled = [_BYTES.get(c) for c in token]
    return token.encode() if None in spelled else bytes(b for b in spelled if b is not None)


class ChunkText:
    """Which tokens may follow, given the characters still to be written and the bytes of one that is begun.

    Args:
        tokens: what each spells.
        characters: those a text may hold, in UTF-8.
        length: of a text, in characters.

    Raises:
        ConfigError: the tokens spell no such text.
    """

    def __init__(self, tokens: Sequence[bytes], characters: Sequence[bytes], length: int) -> None:
        self.length = length
        self._whole = set(characters)
        begun = {c[:n] for c in characters for n in range(1, len(c))}
        # The longest beginnings first: a token that ends no character leads to a longer one.
        self.begun = [*sorted(begun, key=len, reverse=True), b""]
        places = {beginning: place for place, beginning in enumerate(self.begun)}
        walks = [[self._walk(beginning, token, places) for token in tokens] for beginning in self.begun]
        self.end, self.characters = np.moveaxis(np.array(walks, np.int32), -1, 0)  # each (beginnings, tokens)
        self._allowed: dict[tuple[int, int], np.ndarray] = {}  # few of them are ever met
        self.reach = np.zeros((len(self.begun), length + 1), bool)
        self.reach[-1, 0] = True
        for left in range(length + 1):
            for place in range(len(self.begun)):
                self.reach[place, left] |= self._leads_on(place, left).any()
        if not self.reach[-1, length]:
            raise ConfigError(f"these tokens spell no text of {length} characters")

    def _walk(self, begun: bytes, token: bytes, places: dict[bytes, int]) -> tuple[int, int]:
        """(place of the beginning that is left over, characters that were ended); (0, -1) if it spells none of them."""
        data, at, ended = begun + token, 0, 0
        while at < len(data):
            size = 1 if data[at] < 0x80 else 2 if data[at] < 0xE0 else 3
            if data[at : at + size] in self._whole:
                at, ended = at + size, ended + 1
            else:
                return (places[data[at:]], ended) if token and data[at:] in places else (0, -1)
        return (places[b""], ended) if token else (0, -1)

    def allowed(self, place: int, left: int) -> Bool[np.ndarray, " tokens"]:
        """The tokens after which exactly ``left`` characters, of which one may be begun, can still be ended."""
        if (place, left) not in self._allowed:
            self._allowed[place, left] = self._leads_on(place, left)
        return self._allowed[place, left]

    def _leads_on(self, place: int, left: int) -> Bool[np.ndarray, " tokens"]:
        end, ended = self.end[place], self.characters[place]
        fits = (ended >= 0) & (ended <= left)
        return fits & self.reach[end, np.where(fits, left - ended, 0)]


class ChunkConstraint:
    """A `Constraint` of the samplers; see `FAST.constraint`."""

    def __init__(
        self, text: ChunkText, ids: Sequence[int], size: int, before: Sequence[int] = (), after: Sequence[int] = ()
    ) -> None:
        self.text, self.size, self.before, self.after = text, size, tuple(before), tuple(after)
        self.ids = torch.tensor(ids)
        self.tokens = {i: token for token, i in enumerate(ids)}

    def start(self) -> ChunkGuide:
        return ChunkGuide(self)


class ChunkGuide:
    """Where one answer stands."""

    def __init__(self, constraint: ChunkConstraint) -> None:
        self._constraint = constraint
        self._written = 0  # of what stands before and after
        self._place, self._left = len(constraint.text.begun) - 1, constraint.text.length

    @property
    def _fixed(self) -> int | None:
        """The id that must come next, unless it is a token of the chunk."""
        c = self._constraint
        if self._written < len(c.before):
            return c.before[self._written]
        return None if self._left else c.after[self._written - len(c.before)]

    def allowed(self) -> Bool[Tensor, " vocab"]:
        c, mask = self._constraint, torch.zeros(self._constraint.size, dtype=torch.bool)
        fixed = self._fixed
        mask[c.ids[torch.from_numpy(c.text.allowed(self._place, self._left))] if fixed is None else fixed] = True
        return mask

    def take(self, token: int) -> None:
        fixed = self._fixed
        if fixed is not None:
            assert token == fixed
            self._written += 1
            return
        c = self._constraint
        number = c.tokens[token]
        assert c.text.allowed(self._place, self._left)[number]
        self._left -= int(c.text.characters[self._place, number])
        self._place = int(c.text.end[self._place, number])

    @property
    def ended(self) -> bool:
        return not self._left and self._written == len(self._constraint.before) + len(self._constraint.after)

    def copy(self) -> ChunkGuide:
        other = ChunkGuide(self._constraint)
        other._written, other._place, other._left = self._written, self._place, self._left
        return other
