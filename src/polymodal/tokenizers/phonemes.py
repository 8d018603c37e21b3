"""Text as phonemes, by espeak-ng: what speech is made from."""
# ruff: noqa: RUF001 - letters of the IPA look like others

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Sequence
from typing import Final

from polymodal.core.errors import ConfigError, MediaError, UnsupportedError
from polymodal.tokenizers.text import checked_text

_BETWEEN: Final = "_"
_STRESS: Final = str.maketrans("", "", "ˈˌ")
_FOREIGN: Final = re.compile(r"\([\w-]+\)")  # "(fr)": the language of a word that is none of the voice's
PAUSE: Final = " "  # between words
_END: Final = re.compile(r"(?<=[.!?])\s+")
_ENGLISH: Final = """
aɪ aɪə aɪɚ aʊ b d dʒ eɪ f h i iə iː j k l m n n̩ oʊ oː oːɹ p s t tʃ uː v w x z æ ð ŋ ɐ ɑː ɑːɹ ɔ ɔɪ ɔː ɔːɹ ə əl ɚ ɛ ɛɹ ɜː
ɡ ɪ ɪɹ ɹ ɾ ʃ ʊ ʊɹ ʌ ʒ ʔ θ ᵻ
"""
ENGLISH: Final = (PAUSE, *_ENGLISH.split())  # all that the voice en-us says


def phonemes(text: str, voice: str = "en-us") -> list[str]:
    """The phonemes of a text in the alphabet of the IPA, without stress, a `PAUSE` between words.

    Raises:
        MediaError: the text is not text, too long, or nothing in it can be said.
        UnsupportedError: espeak-ng is not installed, or has no such voice.
    """
    command = ["espeak-ng", "-q", "--ipa=1", f"--sep={_BETWEEN}", "-v", voice, "--stdin"]
    try:
        done = subprocess.run(command, input=checked_text(text).encode(), capture_output=True, check=True, timeout=60)
    except FileNotFoundError:
        raise UnsupportedError("phonemes need the program espeak-ng: apt install espeak-ng") from None
    except subprocess.TimeoutExpired:
        raise MediaError(f"a text of {len(text):,} letters is too long for espeak-ng; say it in parts") from None
    except subprocess.CalledProcessError as error:
        raise UnsupportedError(f"espeak-ng has no voice {voice!r}: {error.stderr.decode(errors='replace')}") from None
    words = _FOREIGN.sub("", done.stdout.decode()).translate(_STRESS).split()
    spelled = [[sound for sound in word.split(_BETWEEN) if sound] for word in words]
    out = [sound for word in spelled if word for sound in (*word, PAUSE)][:-1]
    if not out:
        raise MediaError(f"nothing in {text[:40]!r} can be said")
    return out


def sentences(text: str) -> list[str]:
    """A text in sentences; pieces without a letter or a digit are left out, unless there is nothing else."""
    return [piece for piece in _END.split(text.strip()) if any(c.isalnum() for c in piece)] or [text]


class Alphabet:
    """Phonemes and their numbers; the one after the last stands for the end of a text."""

    def __init__(self, symbols: Sequence[str]) -> None:
        if len(set(symbols)) != len(symbols) or not symbols:
            raise ConfigError("an alphabet is of different symbols, of one at least")
        self._numbers = {symbol: number for number, symbol in enumerate(symbols)}
        self.end_id = len(symbols)

    def __call__(self, spoken: Iterable[str]) -> list[int]:
        """The numbers of phonemes, and the end.

        Raises:
            MediaError: a phoneme is not among them.
        """
        spoken = list(spoken)
        unknown = sorted({sound for sound in spoken if sound not in self._numbers})
        if unknown:
            raise MediaError(f"this model was not trained on the phonemes {' '.join(unknown)}")
        return [*(self._numbers[sound] for sound in spoken), self.end_id]


def alphabet_of(texts: Iterable[Iterable[str]]) -> tuple[str, ...]:
    """The phonemes of some texts, sorted."""
    return tuple(sorted({sound for text in texts for sound in text}))
