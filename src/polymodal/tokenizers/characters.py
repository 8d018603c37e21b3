"""Characters and their numbers, as wav2vec 2.0 spells what it hears: the Hub's Wav2Vec2CTCTokenizer."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from polymodal.core.errors import ConfigError, MediaError
from polymodal.core.files import read_json, write_json

VOCAB, CONFIG = "vocab.json", "tokenizer_config.json"


@dataclass(frozen=True, kw_only=True)
class Characters:
    """A vocabulary of characters (or of longer tokens) with one for the space between words.

    Attributes:
        ids: the tokens and their numbers.
        control: tokens that are never text: the blank, unknown characters, starts and ends.
        unknown: stands for a character that is not in the vocabulary.
        space: stands between words.
        lower: the vocabulary has capitals, and texts are small letters.
    """

    ids: Mapping[str, int]
    control: tuple[str, ...] = ("<pad>", "<s>", "</s>", "<unk>")
    unknown: str = "<unk>"
    space: str = "|"
    lower: bool = False
    raw: Mapping[str, Any] = field(default_factory=dict)  # the rest of tokenizer_config.json, written back by `save`

    def __post_init__(self) -> None:
        if self.space not in self.ids:
            raise ConfigError(f"{VOCAB}: the token between words {self.space!r} is not there")

    @cached_property
    def _tokens(self) -> dict[int, str]:
        return {number: token for token, number in self.ids.items()}

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        long = sorted((t for t in self.ids if len(t) > 1 and t not in self.control), key=len, reverse=True)
        return re.compile("|".join([*map(re.escape, long), "."]), re.DOTALL)

    def encode(self, text: str) -> list[int]:
        """The numbers of a text's characters.

        Raises:
            MediaError: a character is not in the vocabulary, and there is no token for such.
        """
        text = (text.upper() if self.lower else text).replace(" ", self.space)
        found = [self.ids.get(token, self.ids.get(self.unknown)) for token in self._pattern.findall(text)]
        if None in found:
            raise MediaError(f"a text has characters that this vocabulary does not have: {text!r:.80}")
        return [number for number in found if number is not None]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of tokens that are joined already; control tokens are left out."""
        tokens = (self._tokens.get(number, "") for number in ids)
        text = "".join(" " if t == self.space else t for t in tokens if t not in self.control).strip()
        return text.lower() if self.lower else text

    def words(self, ids: Iterable[int]) -> list[list[int]]:
        """Which of the tokens are the letters of each word; empty words and control tokens are left out."""
        space, skipped = self.ids[self.space], {self.ids[token] for token in self.control if token in self.ids}
        words: list[list[int]] = [[]]
        for place, number in enumerate(ids):
            if number == space:
                words.append([])
            elif number not in skipped:
                words[-1].append(place)
        return [word for word in words if word]

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides the numbers."""
        rules = (sorted(self.ids.items()), self.control, self.unknown, self.space, self.lower)
        return hashlib.sha256(repr(rules).encode()).hexdigest()

    @classmethod
    def from_folder(cls, folder: Path) -> Characters:
        """Of ``vocab.json`` and ``tokenizer_config.json``.

        Raises:
            ConfigError: they are not of this kind of tokenizer.
        """
        ids, raw = read_json(folder / VOCAB), read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
        if not isinstance(ids, dict) or not all(isinstance(number, int) for number in ids.values()):
            raise ConfigError(f"{folder / VOCAB}: not one number a token (a vocabulary for each language is not read)")
        if not isinstance(raw, dict):
            raise ConfigError(f"{folder / CONFIG}: not an object")

        def token(name: str, default: str) -> str:
            value = raw.get(f"{name}_token", default)
            value = value.get("content") if isinstance(value, dict) else value
            return value if isinstance(value, str) else default

        names = (("pad", "<pad>"), ("bos", "<s>"), ("eos", "</s>"), ("unk", "<unk>"))
        return cls(
            ids=ids, control=tuple(token(*each) for each in names), unknown=token("unk", "<unk>"),
            space=token("word_delimiter", "|"), lower=raw.get("do_lower_case") is True, raw=raw,
        )  # fmt: skip

    def save(self, folder: str | Path) -> None:
        """Writes what `from_folder` and transformers read."""
        pad, bos, eos, unk = self.control
        ours = {
            "tokenizer_class": "Wav2Vec2CTCTokenizer", "pad_token": pad, "bos_token": bos, "eos_token": eos,
            "unk_token": unk, "word_delimiter_token": self.space, "do_lower_case": self.lower,
        }  # fmt: skip
        write_json(Path(folder) / VOCAB, dict(self.ids))
        write_json(Path(folder) / CONFIG, {**self.raw, **ours})
