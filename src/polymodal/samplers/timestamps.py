"""Whisper's rules for what may be written, and what the times in an answer mean. Ids are all that they know.

A window of speech is answered by pairs of times with text between them, ``<|0.00|> text <|2.40|><|2.40|> text ...``.
Source: openai/whisper, decoding.py and transcribe.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from polymodal.core.errors import UnsupportedError
from polymodal.core.transcript import Task


@dataclass(frozen=True, kw_only=True)
class SpeechTokens:
    """The control tokens of a model of this kind.

    Attributes:
        start: begins an answer.
        end: ends it.
        no_timestamps: says that no times follow; the times are the ids behind it, from 0 on.
        previous: stands before the text of the window before; None: such a text cannot be told.
        languages: their codes and tokens; none for a model of English alone.
        suppress: what is never written (music notes, brackets, control tokens).
        suppress_first: what an answer does not begin with.
        latest: the index of the latest time that an answer may begin at.
        precision: seconds between two times.
    """

    start: int
    end: int
    no_timestamps: int
    previous: int | None = None
    languages: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    tasks: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    suppress: tuple[int, ...] = ()
    suppress_first: tuple[int, ...] = ()
    latest: int | None = 50
    precision: float = 0.02

    @property
    def first_time(self) -> int:
        """The token of 0 seconds."""
        return self.no_timestamps + 1

    @property
    def highest(self) -> int:
        """The largest of all ids."""
        named = (*self.languages.values(), *self.tasks.values(), *self.suppress, *self.suppress_first)
        return max(self.start, self.end, self.first_time, self.previous or 0, *named)

    @property
    def no_speech(self) -> int:
        """Said instead of a language where nobody speaks."""
        return self.no_timestamps - 1

    def prompt(
        self, language: str | None, task: Task, *, timestamps: bool = True, before: Sequence[int] = ()
    ) -> list[int]:
        """What an answer begins with: the text before, the start, the language, the task.

        Args:
            language: a code; of no meaning to a model that knows one alone.
            task: what to write.
            timestamps: whether times are asked for.
            before: the tokens of the window before.

        Raises:
            UnsupportedError: the model does not know the language, or the task.
        """
        out = [] if self.previous is None or not before else [self.previous, *before]
        out.append(self.start)
        if self.languages:
            if language is None or language not in self.languages:
                known = ", ".join(sorted(self.languages))
                raise UnsupportedError(f"this model does not know the language {language!r}, but: {known}")
            out.append(self.languages[language])
        elif language not in (None, "en"):
            raise UnsupportedError(f"this model knows English alone, not {language!r}")
        if task in self.tasks:
            out.append(self.tasks[task])
        elif task != "transcribe":
            raise UnsupportedError("this model was not taught to translate; it transcribes")
        return out if timestamps else [*out, self.no_timestamps]


@dataclass(frozen=True)
class Timestamps:
    """The rules of answers with times: a constraint for ``Settings(constraint=...)``."""

    tokens: SpeechTokens

    def start(self) -> TimestampRules:
        return TimestampRules(self.tokens)


class TimestampRules:
    """The state of the rules in one answer.

    Times come in pairs and do not go back; the first is one second at most; one is forced where all of them together
    are more probable than the most probable text.
    """

    ended = False

    def __init__(self, tokens: SpeechTokens, written: Sequence[int] = ()) -> None:
        self._tokens, self._written = tokens, list(written)

    def allowed_by(self, scores: Float[Tensor, " vocab"]) -> Bool[Tensor, " vocab"]:
        """The tokens that may come next, by what was written and by these scores of theirs."""
        t, written = self._tokens, self._written
        times = t.first_time
        fine = torch.ones_like(scores, dtype=torch.bool)
        fine[[*t.suppress, t.no_timestamps]] = False
        if not written:
            fine[list(t.suppress_first)] = False
            fine[:times] = False
            if t.latest is not None:
                fine[times + t.latest + 1 :] = False
        elif written[-1] >= times:
            if len(written) < 2 or written[-2] >= times:  # a pair is complete: text, or the end
                fine[times:] = False
            else:  # its second half, or the end
                fine[: t.end] = False
        known = [token for token in written if token >= times]
        if known:
            closes = written[-1] >= times and len(written) > 1 and written[-2] < times
            fine[times : known[-1] + (0 if closes else 1)] = False  # what a pair holds is not empty
        left = scores.masked_fill(~fine, -torch.inf)
        text = left[:times].max()
        if torch.isfinite(text) and left[times:].logsumexp(0) > text:
            fine[:times] = False
        return fine

    def take(self, token: int) -> None:
        self._written.append(token)

    def copy(self) -> TimestampRules:
        return TimestampRules(self._tokens, self._written)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some tokens of an answer and when they were said, in steps of `SpeechTokens.precision` from its window's start.

    ``tokens`` are the text and the times around it, as the next window is told of them.
    """

    start: int
    end: int
    tokens: tuple[int, ...]


def pieces(written: Sequence[int], first_time: int, steps: int) -> tuple[list[Piece], int | None]:
    """An answer cut at its times, and how many steps of its window are done with: up to its last time; None: all.

    What follows an unfinished pair is left to the next window. Where there is no complete pair of pairs, the whole
    answer is one piece and its whole window is done.

    Args:
        written: tokens without the end.
        first_time: the token of 0 seconds.
        steps: of the window's sound, without padding.
    """
    is_time = [token >= first_time for token in written]
    cuts = [i + 1 for i, (a, b) in enumerate(itertools.pairwise(is_time)) if a and b]
    closed = is_time[-2:] == [False, True]  # nothing is said behind the last time
    if not cuts:
        last = max((token - first_time for token in written if token >= first_time), default=0)
        end = last if last > 0 else steps
        return [Piece(start=0, end=end, tokens=tuple(written))], None
    if closed:
        cuts.append(len(written))
    out = []
    for a, b in itertools.pairwise([0, *cuts]):
        part = written[a:b]
        out.append(Piece(start=part[0] - first_time, end=part[-1] - first_time, tokens=tuple(part)))
    return out, None if closed else out[-1].end
