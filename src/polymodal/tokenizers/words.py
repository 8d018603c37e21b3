"""Instructions as words of a small vocabulary: a robot that knows twenty nouns needs no more of a tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import torch
from jaxtyping import Int
from torch import Tensor

from polymodal.core.errors import ConfigError, MediaError

PAD, UNKNOWN, _FIRST = 0, 1, 2
_WORD: Final = re.compile(r"\w+")


def split(text: str) -> list[str]:
    """The words of a text in small letters, without punctuation."""
    return _WORD.findall(text.lower())


@dataclass(frozen=True, kw_only=True)
class Words:
    """Words and their numbers; 0 is padding, 1 is every word that is not among them.

    Attributes:
        context: the longest instruction in words.
    """

    words: tuple[str, ...]
    context: int

    def __post_init__(self) -> None:
        if len(set(self.words)) != len(self.words) or any(split(word) != [word] for word in self.words):
            raise ConfigError("a vocabulary is of different words in small letters, without spaces or punctuation")

    @staticmethod
    def of(texts: Iterable[str]) -> tuple[str, ...]:
        """The words of some texts, in alphabetical order."""
        return tuple(sorted({word for text in texts for word in split(text)}))

    @property
    def vocab_size(self) -> int:
        return _FIRST + len(self.words)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.words, _FIRST)}

    def __call__(self, texts: Sequence[str]) -> Int[Tensor, "texts words"]:
        """The words of each text, padded behind to the longest; an empty text is one unknown word.

        Raises:
            MediaError: a text is longer than the context: nothing is ever cut.
        """
        rows = [[self._numbers.get(word, UNKNOWN) for word in split(text)] or [UNKNOWN] for text in texts]
        for text, row in zip(texts, rows, strict=True):
            if len(row) > self.context:
                raise MediaError(f"an instruction of {len(row)} words; the policy reads at most {self.context}: {text}")
        out = torch.full((len(rows), max(map(len, rows))), PAD)
        for number, row in enumerate(rows):
            out[number, : len(row)] = torch.tensor(row)
        return out
