"""What was said in a sound, and when: the pieces that `Transcribes` gives, and the files that they are written to."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, TypeAlias

Task: TypeAlias = Literal["transcribe", "translate"]


@dataclass(frozen=True, kw_only=True)
class Listening:
    """How a sound is to be heard.

    Attributes:
        language: what is spoken, as a code ("en"); None lets the model find out, again and again.
        task: the words as they are spoken, or in English.
        words: whether each word gets its times.
    """

    language: str | None = None
    task: Task = "transcribe"
    words: bool = False


@dataclass(frozen=True, kw_only=True)
class Word:
    """One word, blanks around it included; times are seconds from the first sample."""

    text: str
    start: float
    end: float
    probability: float


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A piece of speech, about a sentence; times are seconds from the first sample.

    Attributes:
        logprob: mean log-probability of the tokens of its window.
        temperature: at which they were drawn; 0 are the likeliest.
        no_speech: probability that nobody speaks in its window.
    """

    start: float
    end: float
    text: str
    language: str | None = None
    words: tuple[Word, ...] = ()
    logprob: float = 0.0
    temperature: float = 0.0
    no_speech: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Heard:
    """What one window of a long sound gave; with the sound it is all that is needed to go on behind it.

    Attributes:
        until: samples from the start of the sound that are done with.
        context: the tokens that the next window is told of.
    """

    segments: tuple[Segment, ...]
    until: int
    context: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Heard:
        """The reverse of `to_json`, and of what JSON makes of its tuples."""
        return cls(
            segments=tuple(
                Segment(**{**one, "words": tuple(Word(**word) for word in one["words"])}) for one in raw["segments"]
            ),
            until=raw["until"],
            context=tuple(raw["context"]),
        )


# ---- files ----


def to_text(segments: Iterable[Segment]) -> str:
    """One segment a line."""
    return "".join(f"{segment.text.strip()}\n" for segment in segments)


def to_srt(segments: Iterable[Segment]) -> str:
    """SubRip."""
    return "".join(
        f"{number}\n{_clock(one.start, ',')} --> {_clock(one.end, ',')}\n{_cue(one.text)}\n\n"
        for number, one in enumerate(segments, 1)
    )


def to_vtt(segments: Iterable[Segment]) -> str:
    """WebVTT; where words have times, each is marked with its own."""
    cues = [f"{_clock(one.start, '.')} --> {_clock(one.end, '.')}\n{_spoken(one)}\n\n" for one in segments]
    return "WEBVTT\n\n" + "".join(cues)


def to_json(segments: Sequence[Segment]) -> str:
    """Everything that is known, one object."""
    text = "".join(segment.text for segment in segments).strip()
    whole = {"text": text, "segments": [asdict(segment) for segment in segments]}
    return json.dumps(whole, indent=2, ensure_ascii=False) + "\n"


WRITERS: Final[Mapping[str, Callable[[Sequence[Segment]], str]]] = {
    "txt": to_text, "srt": to_srt, "vtt": to_vtt, "json": to_json,
}  # fmt: skip


def _clock(seconds: float, point: str) -> str:
    """Hours, minutes, seconds and milliseconds."""
    whole = round(max(seconds, 0.0) * 1000)
    minutes, rest = divmod(whole, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}{point}{rest % 1000:03}"


def _cue(text: str) -> str:
    """Text that ends no cue early: an arrow is the mark of times, an empty line of the end."""
    return " ".join(text.split()).replace("-->", "->")


def _spoken(segment: Segment) -> str:
    def escaped(text: str) -> str:
        return text.replace("\n", " ").replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")

    if not segment.words:
        return escaped(_cue(segment.text))
    return "".join(f"<{_clock(word.start, '.')}><c>{escaped(word.text)}</c>" for word in segment.words).strip()
