"""From what a model says to what is judged.

Most of a published score is its parser, so each has a name with a version, and says None where it finds no answer: a
caller counts these, and never guesses.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from polymodal.core.errors import DataError
from polymodal.evaluate.text_metrics import tidy


@dataclass(frozen=True)
class Parser:
    """A named way to read an answer; ``read`` takes the answer and the options of the question (often none)."""

    name: str
    read: Callable[[str, Sequence[str]], str | None]

    def __call__(self, answer: str, options: Sequence[str] = ()) -> str | None:
        """What was answered, or None where it cannot be told."""
        return self.read(answer, options)


def without_thoughts(answer: str) -> str:
    """The answer without what stands in ``<think>``; thoughts that never end leave nothing."""
    return re.sub(r"<think>.*?(?:</think>|$)", "", answer, flags=re.DOTALL).strip()


def _verbatim(answer: str, options: Sequence[str]) -> str | None:
    return answer if answer.strip() else None


def _short(answer: str, options: Sequence[str]) -> str | None:
    return _bare(without_thoughts(answer))


def _stated(answer: str, options: Sequence[str]) -> str | None:
    text = without_thoughts(answer)
    stated = re.findall(r"\banswer\s*(?:is\b|[:=])[ \t*]*:?[ \t]*(.*\S)", text, flags=re.IGNORECASE)
    return _bare(stated[-1] if stated else text)


_QUOTES: Final = "*\"'`\u2018\u2019\u201c\u201d"


def _bare(text: str) -> str | None:
    text = text.strip().strip(_QUOTES).strip()
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1].rstrip(_QUOTES + " ")
    return text or None


def _yes_no(answer: str, options: Sequence[str]) -> str | None:
    found = re.search(r"\b(yes|no)\b", without_thoughts(answer), flags=re.IGNORECASE)
    return found[1].lower() if found else None


def _pope_official(answer: str, options: Sequence[str]) -> str | None:
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


_COUNTED: Final = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
_WORDS: Final = _COUNTED.split()
_END: Final = r"(?!\w|[.,]\d)"  # not within "12.5kg", whose number would be cut to 12
_NUMBER: Final = re.compile(
    rf"(?<![\w.])[-\u2212]?(?:\d{{1,3}}(?:,\d{{3}})+|\d+)(?:\.\d+)?{_END}|(?<![\w.])\.\d+{_END}"
    rf"|(?<![\w-])(?:none|{'|'.join(_WORDS)})(?![\w-])",
    re.IGNORECASE,
)


def _number(answer: str, options: Sequence[str]) -> str | None:
    found = _NUMBER.findall(without_thoughts(answer))
    if not found:
        return None
    last = found[-1].lower().replace("\u2212", "-").replace(",", "")
    if last in _WORDS:
        return str(_WORDS.index(last))
    if last == "none":
        return "0"
    whole, _, part = last.lstrip("-").partition(".")
    digits = (whole.lstrip("0") or "0") + (f".{part.rstrip('0')}" if part.strip("0") else "")
    return f"-{digits}" if last.startswith("-") and digits != "0" else digits


def _choice(answer: str, options: Sequence[str]) -> str | None:
    if not 2 <= len(options) <= 26:
        raise DataError(f"{len(options)} options: a choice is among 2 to 26, as texts in the order of their letters")
    last = string.ascii_uppercase[len(options) - 1]
    text = without_thoughts(answer)
    # Capitals anywhere, small letters only where nothing follows: "the answer is a dog" names no letter.
    letter = rf"(?:([A-{last}])\b(?!')|([a-{last.lower()}])[\s*)\].]*$)"
    if stated := re.findall(rf"\b(?i:(?:answer|option|choice)(?:\s*(?:is\b|:|-))+)[\s*(\[]*{letter}", text):
        return "".join(stated[-1]).upper()
    if lone := re.fullmatch(rf"[\W_]*([A-{last}])[\W_]*", text, flags=re.IGNORECASE):
        return lone[1].upper()
    if first := re.match(rf"\**([A-{last}])\**[).:]", text):
        return first[1]
    brackets = set(re.findall(rf"\(([A-{last}])\)", text))
    if len(brackets) == 1:
        return brackets.pop()
    plain = [_plain(option) for option in options]
    whole = _plain(text)
    if plain.count(whole) == 1 and whole:
        return string.ascii_uppercase[plain.index(whole)]
    inside = [i for i, option in enumerate(plain) if option and f" {option} " in f" {whole} "]
    return string.ascii_uppercase[inside[0]] if len(inside) == 1 else None


def _plain(text: str) -> str:
    """Lower-case words without marks, and without an article in front: "a dog" is said as "the dog" too."""
    words = tidy(re.sub(r"[^\w\s]", " ", text.lower()))
    return re.sub(r"^(?:a|an|the) ", "", words)


VERBATIM: Final = Parser("verbatim/1", _verbatim)
"""The answer as it came; None if it is blank. For captions and whatever is judged as a text."""

SHORT: Final = Parser("short answer/1", _short)
"""The whole answer without quotes, emphasis and one closing full stop."""

STATED: Final = Parser("stated answer/1", _stated)
"""What follows the last "answer is" or "answer:" on its line, or the whole answer; then as `SHORT`."""

YES_NO: Final = Parser("first yes or no/1", _yes_no)
"""The first word that is yes or no."""

POPE_OFFICIAL: Final = Parser("POPE official", _pope_official)
"""POPE's own reading: of the first sentence, no if a word is "No", "no" or "not", and else yes, even if it is empty.

So "NO", "There is none" and silence are yes, and "Yes, there is no doubt" is no.
"""

NUMBER: Final = Parser("last number/2", _number)
"""The last number, in digits or in English up to twenty, without thousands commas and idle zeros."""

CHOICE: Final = Parser("choice/1", _choice)
"""The letter of an option.

In this order: the last letter that an "answer is" names; a lone letter; a letter in front with a mark; the only
letter in brackets; the only option that the text equals, then holds. A bare "A" in a sentence is a word.
"""
