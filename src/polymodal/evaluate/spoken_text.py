"""One way to write what was said, so that word error rates count what was heard and not how it was spelt.

`english` follows the rules that Whisper's paper (Radford et al. 2022, arXiv 2212.04356, appendix C) describes and its
normaliser made the field's habit: small letters, no fillers, contractions and titles in full, numbers in digits,
American spelling. `basic` serves every other language.

**Deviations.** The table of British spellings holds the words of every day, not the official 1,700. `basic` keeps the
vowel signs of Indic and Thai scripts, which the official one cuts words apart at.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final


def basic(text: str) -> str:
    """Small letters and digits with single spaces: brackets with what they hold, marks and symbols are left out."""
    text = _BRACKETS.sub("", unicodedata.normalize("NFC", text).lower())
    return " ".join("".join(" " if unicodedata.category(c)[0] in "SP" else c for c in text).split())


def english(text: str) -> str:
    """Small letters without diacritics, numbers in digits, contractions in full; the marks of money and % stay."""
    text = _BRACKETS.sub("", text.lower().replace("\u2019", "'"))
    text = re.sub(r"\s+'", "'", _FILLERS.sub("", text))
    for pattern, written in _REPLACED:
        text = pattern.sub(written, text)
    text = re.sub(r"(\d),(?=\d)", r"\1", text)
    text = re.sub(r"\.(?=[^0-9]|$)", " ", text)
    text = re.sub(r"\band\s+a\s+half\b", "point five", _plain(text))
    text = re.sub(r"(?<=[0-9])(?=[a-z])(?!(?:st|nd|rd|th|s)\b)|(?<=[a-z])(?=[0-9])", " ", text)
    text = " ".join(_numbers(text.split()))
    text = re.sub(r"([€£$])(\d+) and ¢(\d{1,2})\b", lambda m: f"{m[1]}{m[2]}.{int(m[3]):02}", text)
    text = re.sub(r"[€£$]0\.(\d{1,2})\b", lambda m: f"¢{int(m[1])}", text)
    text = re.sub(r"\b1(s?)\b", r"one\1", text)
    text = " ".join(_AMERICAN.get(word, word) for word in text.split())
    text = re.sub(r"[.$¢€£](?=[^0-9]|$)", " ", text)
    return " ".join(re.sub(r"(?<![0-9])%", " ", text).split())


_BRACKETS: Final = re.compile(r"[<\[][^>\]]*[>\]]|\([^)]*\)")
_FILLERS: Final = re.compile(r"\b(?:hmm|mm|mhm|mmm|uh|um)\b")
_CONTRACTIONS: Final = {
    "won't": "will not", "can't": "can not", "let's": "let us", "ain't": "aint", "y'all": "you all",
    "wanna": "want to", "gotta": "got to", "gonna": "going to", "i'ma": "i am going to", "imma": "i am going to",
    "woulda": "would have", "coulda": "could have", "shoulda": "should have", "ma'am": "madam",
}  # fmt: skip
_TITLES: Final = {
    "mr": "mister", "mrs": "missus", "st": "saint", "dr": "doctor", "prof": "professor", "capt": "captain",
    "gov": "governor", "ald": "alderman", "gen": "general", "sen": "senator", "rep": "representative",
    "pres": "president", "rev": "reverend", "hon": "honorable", "asst": "assistant", "assoc": "associate",
    "lt": "lieutenant", "col": "colonel", "jr": "junior", "sr": "senior", "esq": "esquire",
}  # fmt: skip
_REPLACED: Final = [
    *((re.compile(rf"\b{short}\b"), full) for short, full in _CONTRACTIONS.items()),
    *((re.compile(rf"\b{short}\b"), f"{full} ") for short, full in _TITLES.items()),
    *((re.compile(rf"'{end} been\b"), f" {full} been") for end, full in (("d", "had"), ("s", "has"))),
    *((re.compile(rf"'{end} (gone|done|got)\b"), rf" {full} \1") for end, full in (("d", "had"), ("s", "has"))),
    *(
        (re.compile(rf"{end}\b"), f" {full}")
        for end, full in (
            ("n't", "not"), ("'re", "are"), ("'s", "is"), ("'d", "would"), ("'ll", "will"), ("'t", "not"),
            ("'ve", "have"), ("'m", "am"),
        )
    ),
]  # fmt: skip
_FOLDED: Final = {"œ": "oe", "ø": "o", "æ": "ae", "ß": "ss", "đ": "d", "ð": "d", "þ": "th", "ł": "l"}


def _plain(text: str) -> str:
    """Without diacritics; marks and symbols as spaces, but for those of numbers and money."""
    out = []
    for c in unicodedata.normalize("NFKD", text):
        if c in ".%$¢€£":
            out.append(c)
        elif c in _FOLDED:
            out.append(_FOLDED[c])
        elif unicodedata.category(c) != "Mn":
            out.append(" " if unicodedata.category(c)[0] in "MSP" else c)
    return "".join(out)


def _listed(text: str) -> list[str]:
    return text.split()


# ---- numbers ----

_ONES: Final = {
    word: value
    for value, word in enumerate(
        _listed(
            """
            one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
            eighteen nineteen
            """
        ),
        1,
    )
}
_TENS: Final = {
    word: 10 * value
    for value, word in enumerate(["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"], 2)
}
_TIMES: Final = {
    "hundred": 100,
    **{f"{of}illion": 1000 ** (n + 2) for n, of in enumerate(("m", "b", "tr", "quadr", "quint", "sext"))},
    "thousand": 1000,
}
_ZEROS: Final = frozenset({"o", "oh", "zero"})
_BEFORE: Final = {"minus": "-", "negative": "-", "plus": "+", "positive": "+"}
_MONEY: Final = {
    f"{word}{s}": sign
    for word, sign in (("pound", "£"), ("euro", "€"), ("dollar", "$"), ("cent", "¢"))
    for s in ("", "s")
}
_ODD: Final = {
    "zeroth": ("zero", "th"), "first": ("one", "st"), "second": ("two", "nd"), "third": ("three", "rd"),
    "fifth": ("five", "th"), "eighth": ("eight", "th"), "ninth": ("nine", "th"), "twelfth": ("twelve", "th"),
    "sixes": ("six", "s"),
}  # fmt: skip


def _unit(word: str) -> tuple[str, str]:
    """A number word without its ending, and the ending: ``twentieth`` is (twenty, th), ``fifties`` (fifty, s)."""
    if word in _ODD:
        return _ODD[word]
    for end, kept, written in (("ieth", "y", "th"), ("th", "", "th"), ("ies", "y", "s"), ("s", "", "s")):
        stem = word.removesuffix(end) + kept
        if word.endswith(end) and (stem in _ONES or stem in _TENS or stem in _TIMES):
            return stem, written
    return word, ""


@dataclass
class _Number:
    """A number while its words come in: ``prefix`` is fixed ("19" of nineteen forty), ``room`` may be filled."""

    prefix: str = ""
    total: int = 0  # thousands and more
    group: int = 0
    room: int = 0  # smaller values are added, others begin anew behind
    begun: bool = False

    def __str__(self) -> str:
        return self.prefix + (str(self.total + self.group) if self.begun else "")

    def add(self, value: int, room: int) -> None:
        if self.begun and not (value < 10 <= self.room or 10 <= value < 100 <= self.room):
            self.prefix, self.total, self.group = str(self), 0, 0
        self.group, self.room, self.begun = self.group + value, room, True

    def times(self, by: int) -> None:
        if not self.begun and not self.prefix:
            self.group, self.begun = 1, True
        if self.prefix:
            self.prefix, self.total, self.group, self.begun = "", 0, int(str(self)), True
        if by == 100:
            self.group *= 100
        else:
            below = self.total % by if self.total >= by else self.total
            self.total, self.group = self.total - below + (below + self.group) * by, 0
        self.room = by

    def digits(self, text: str) -> None:
        self.prefix, self.total, self.group, self.room, self.begun = str(self) + text, 0, 0, 0, False


def _numbers(words: list[str]) -> Iterator[str]:
    """Words with every number in digits: ``twenty first`` becomes 21st."""
    at = 0
    while at < len(words):
        sign = _BEFORE.get(words[at], "")
        start = at + bool(sign)
        text, ending, end = _number(words, start)
        if end == start:
            yield words[at]
            at += 1
            continue
        at = end
        if not ending and at < len(words) and words[at] in _MONEY and "$" not in text:
            sign, at = _MONEY[words[at]] + sign, at + 1
        elif not ending and words[at : at + 1] == ["percent"]:
            ending, at = "%", at + 1
        elif not ending and words[at : at + 2] == ["per", "cent"]:
            ending, at = "%", at + 2
        yield sign + text + ending


def _number(words: list[str], at: int) -> tuple[str, str, int]:
    """The number that begins at a word: its digits, its ending, the place behind it (``at`` if there is none)."""
    number, last, mark = _Number(), "", ""
    start = at
    while at < len(words):
        word, ending = _unit(words[at])
        following = _unit(words[at + 1])[0] if at + 1 < len(words) else ""
        if match := re.fullmatch(r"([$¢€£]?)(\d+(?:\.\d+)?)(%|st|nd|rd|th|s)?", words[at]):
            if match[1] and at > start:
                break
            mark = mark or match[1]
            if at > start and number.begun and last not in _ZEROS:
                break
            number.digits(match[2])
            ending = match[3] or ""
        elif word in _ONES:
            number.add(_ONES[word], 1)
        elif word in _TENS:
            number.add(_TENS[word], 10)
        elif word in _TIMES and ("." not in number.prefix):
            number.times(_TIMES[word])
        elif word in _TIMES and number.prefix:
            number = _scaled(number, _TIMES[word])
        elif word in _ZEROS:
            number.digits("0")
        elif word == "point" and following in (*_ONES, *_TENS, *_ZEROS):
            number.digits(".")
        elif word == "and" and last in _TIMES and following in (*_ONES, *_TENS, *_ZEROS):
            pass
        elif word in ("double", "triple") and (following in _ZEROS or _ONES.get(following, 10) < 10):
            digit = str(_ONES.get(following, 0))
            number.digits(digit * (2 if word == "double" else 3))
            at += 1
        else:
            break
        last, at = word, at + 1
        if ending:
            return mark + str(number), ending, at
    return mark + str(number), "", at


def _scaled(number: _Number, by: int) -> _Number:
    """``2.5`` times a million."""
    scaled = float(str(number)) * by
    return _Number(prefix=str(int(scaled)) if scaled.is_integer() else str(scaled))


_AMERICAN: Final = {
    british: american
    for pair in _listed(
        """
        aeroplane/airplane analyse/analyze apologise/apologize armour/armor behaviour/behavior cancelled/canceled
        catalogue/catalog centimetre/centimeter centre/center centres/centers cheque/check colour/color
        coloured/colored colours/colors cosy/cozy counsellor/counselor criticise/criticize defence/defense
        dialogue/dialog favour/favor favourite/favorite fibre/fiber flavour/flavor fulfil/fulfill grey/gray
        harbour/harbor harbours/harbors honour/honor humour/humor jewellery/jewelry kilometre/kilometer
        kilometres/kilometers labelled/labeled labour/labor licence/license litre/liter litres/liters metre/meter
        metres/meters modelling/modeling moustache/mustache neighbour/neighbor neighbours/neighbors offence/offense
        organisation/organization organise/organize organised/organized paralyse/paralyze parlour/parlor plough/plow
        practise/practice programme/program pyjamas/pajamas realise/realize realised/realized recognise/recognize
        recognised/recognized rumour/rumor sceptical/skeptical signalled/signaled theatre/theater theatres/theaters
        traveller/traveler travelled/traveled travelling/traveling tyre/tire tyres/tires
        """
    )
    for british, american in [pair.split("/")]
}
