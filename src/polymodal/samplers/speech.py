"""A sound of any length written down by a model that hears one window at a time.

A window is answered again at a higher temperature while the answer repeats itself or is improbable; it is skipped where
nobody speaks; the next window begins at the last time of the answer, and is told what was said before. Source:
openai/whisper, transcribe.py. Scripted models and real ones run through the same lines.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from polymodal.core.errors import UnsupportedError
from polymodal.core.transcript import Heard, Listening, Segment, Task, Word
from polymodal.core.verbs import Memory
from polymodal.samplers.alignment import punctuated, word_times
from polymodal.samplers.autoregressive import Settings, Step, advance, collect, search
from polymodal.samplers.modes import Wordless
from polymodal.samplers.timestamps import Piece, SpeechTokens, Timestamps, pieces


@runtime_checkable
class Hears(Protocol):
    """A model that writes down what is said in one window."""

    @property
    def speech(self) -> SpeechTokens: ...

    @property
    def context(self) -> int:
        """The most tokens of a prompt and its answer."""
        ...

    def hear(self, features: Tensor) -> Any:
        """What the answers to one window are written from."""
        ...

    def begin(self, heard: Any, ids: Sequence[int], places: Sequence[int]) -> tuple[Memory, Float[Tensor, "n vocab"]]:
        """Reads a prompt into a new memory; the scores after its tokens at these places."""
        ...

    def step(self, ids: Int[Tensor, " rows"], memory: Any) -> Float[Tensor, "rows vocab"]: ...

    def text(self, ids: Sequence[int]) -> str:
        """The text of ids among which are no times."""
        ...

    def align(
        self, heard: Any, ids: Sequence[int], steps: int
    ) -> tuple[Float[Tensor, "heads tokens steps"], Float[Tensor, "tokens vocab"]]:
        """Where the model looks, of so many steps, as it reads these tokens; and its scores after each of them."""
        ...

    def spell(self, ids: Sequence[int], language: str | None) -> list[list[int]]:
        """The tokens of each word."""
        ...


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """When an answer is believed.

    Attributes:
        temperatures: tried one after the other.
        repeats: an answer is drawn again whose text zlib makes smaller by more than this factor.
        logprob: and one whose tokens have a lower mean log-probability.
        no_speech: nobody speaks where the model says so with more than this probability, and improbably says more.
        beams: width of the search at temperature 0.
        best_of: answers that are drawn at the others, of which the most probable counts.
        previous: whether a window is told what was said before it.
        forget: above this temperature an answer is not worth telling.
    """

    temperatures: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    repeats: float = 2.4
    logprob: float = -1.0
    no_speech: float = 0.6
    beams: int = 1
    best_of: int = 5
    previous: bool = True
    forget: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was said in a window; ``tokens`` are without the end."""

    tokens: tuple[int, ...]
    text: str
    logprob: float
    no_speech: float
    temperature: float

    @property
    def ratio(self) -> float:
        """How many times smaller zlib makes the text; what repeats itself becomes very small."""
        whole = self.text.encode()
        return len(whole) / len(zlib.compress(whole))

    def silent(self, decoding: Decoding) -> bool:
        return self.no_speech > decoding.no_speech and self.logprob <= decoding.logprob

    def doubtful(self, decoding: Decoding) -> bool:
        return self.ratio > decoding.repeats or self.logprob < decoding.logprob


@torch.no_grad()
def write(model: Hears, heard: Any, prompt: Sequence[int], temperature: float, decoding: Decoding, seed: int) -> Answer:
    """One answer to one window, by the rules of times."""
    speech, greedy = model.speech, temperature == 0
    settings = Settings(
        max_new_tokens=min(model.context // 2, model.context - len(prompt)), temperature=temperature, seed=seed,
        constraint=Timestamps(speech), beams=decoding.beams if greedy else 1,
        best_of=None if greedy else decoding.best_of,
    )  # fmt: skip
    start = len(prompt) - 1 - list(prompt[::-1]).index(speech.start)
    memory, scores = model.begin(heard, prompt, (start, len(prompt) - 1))
    no_speech = float(scores[0].float().softmax(0)[speech.no_speech])
    one = search(0, prompt, settings, (speech.end,), Wordless())
    running, steps, scores = [(one, 1)], list[Step](), scores[1:]
    while running:
        steps += one.advance(scores, max(memory.lengths) < memory.capacity)
        running, scores = advance(model, memory, running, scores)
    best = collect(steps, settings)[0]
    tokens = tuple(token for token in best.ids if token != speech.end)
    return Answer(
        tokens=tokens,
        text=model.text([token for token in tokens if token < speech.first_time]),
        logprob=sum(step.ruled for step in best.steps) / len(best.steps),
        no_speech=no_speech,
        temperature=temperature,
    )


def believe(model: Hears, heard: Any, prompt: Sequence[int], decoding: Decoding, seed: int) -> Answer:
    """The first answer that is not doubtful; the last one if all are."""
    for temperature in decoding.temperatures:
        answer = write(model, heard, prompt, temperature, decoding, seed)
        if answer.silent(decoding) or not answer.doubtful(decoding):
            break
    return answer


@torch.no_grad()
def language_of(model: Hears, heard: Any) -> str | None:
    """The most probable language of a window; None if the model knows one alone."""
    speech = model.speech
    if not speech.languages:
        return None
    _, scores = model.begin(heard, [speech.start], (0,))
    return max(speech.languages, key=lambda code: float(scores[0, speech.languages[code]]))


# Features of the window that begins at a sample, and how many samples it has without padding; None behind the end.
Windows: TypeAlias = Callable[[int], tuple[Tensor, int] | None]


def hear_all(
    model: Hears,
    windows: Windows,
    rate: int,
    listening: Listening,
    decoding: Decoding,
    after: Heard | None = None,
) -> Iterator[Heard]:
    """What is said in all windows, one after the other; see `Transcribes.transcribe_stream`."""
    speech, at = model.speech, 0 if after is None else after.until
    context = () if after is None else after.context
    unit = round(speech.precision * rate)
    if speech.languages and listening.language is not None:
        speech.prompt(listening.language, listening.task)  # an error now, and not when the sound is there
    while (window := windows(at)) is not None:
        features, samples = window
        heard = model.hear(features)
        language = listening.language or language_of(model, heard)
        before = context if decoding.previous and speech.previous is not None else ()
        prompt = speech.prompt(language, listening.task, before=before)
        answer = believe(model, heard, prompt, decoding, seed=at)
        if answer.silent(decoding):
            at += samples
            yield Heard(segments=(), until=at, context=context)
            continue
        parts, done = pieces(answer.tokens, speech.first_time, samples // unit)
        # A piece without a word is nothing to tell.
        parts = [part for part in parts if model.text(_said(part, speech)).strip()]
        segments = _segments(model, parts, answer, language, at / rate)
        if listening.words and parts:
            segments = _with_words(model, heard, parts, segments, language, listening.task, samples // unit, at / rate)
        context = (*context, *(token for part in parts for token in part.tokens))[-(model.context // 2 - 1) :]
        if answer.temperature > decoding.forget:
            context = ()
        at += samples if done is None else min(done * unit, samples)
        yield Heard(segments=segments, until=at, context=context)


def _said(part: Piece, speech: SpeechTokens) -> list[int]:
    """The words: published models may write a language's token among them, which is behind the end."""
    return [token for token in part.tokens if token < speech.end]


def _segments(
    model: Hears, parts: Sequence[Piece], answer: Answer, language: str | None, start: float
) -> tuple[Segment, ...]:
    speech = model.speech
    return tuple(
        Segment(
            start=start + part.start * speech.precision, end=start + part.end * speech.precision,
            text=model.text(_said(part, speech)), language=language, logprob=answer.logprob,
            temperature=answer.temperature, no_speech=answer.no_speech,
        )
        for part in parts
    )  # fmt: skip


@torch.no_grad()
def _with_words(
    model: Hears,
    heard: Any,
    parts: Sequence[Piece],
    segments: Sequence[Segment],
    language: str | None,
    task: Task,
    steps: int,
    start: float,
) -> tuple[Segment, ...]:
    """The segments with the times of their words: all are said once more, without times, and watched."""
    speech = model.speech
    groups = [model.spell(_said(part, speech), language) for part in parts]
    prompt = speech.prompt(language, task, timestamps=False)
    said = [token for group in groups for word in group for token in word]
    weights, scores = model.align(heard, [*prompt, *said, speech.end], max(steps, 1))
    lengths = [len(word) for group in groups for word in group]
    times = iter(word_times(weights, len(prompt), lengths))
    chances = scores[len(prompt) - 1 : -2, : speech.end].float().softmax(1)
    chance = iter(chances.gather(1, torch.tensor(said, device=chances.device)[:, None])[:, 0].split(lengths))
    out = []
    for segment, group in zip(segments, groups, strict=True):
        words = []
        for word in group:
            first, last = next(times)
            words.append(
                Word(
                    text=model.text(word), start=start + first * speech.precision, end=start + last * speech.precision,
                    probability=float(next(chance).mean()),
                )
            )  # fmt: skip
        out.append(replace(segment, words=punctuated(words)))
    return tuple(out)


class Tape:
    """A stream of samples of which no more is kept than is still to be read."""

    def __init__(self, blocks: Iterable[Float[Tensor, " samples"]]) -> None:
        self._blocks, self._held, self._start = iter(blocks), torch.zeros(0), 0

    def read(self, start: int, count: int) -> Float[Tensor, " some"]:
        """Samples from ``start`` on, which does not go back; fewer than ``count`` at the end.

        Raises:
            UnsupportedError: they are behind what was read.
        """
        if start < self._start:
            raise UnsupportedError("a stream of sound does not go back")
        while self._start + len(self._held) < start + count and (block := next(self._blocks, None)) is not None:
            self._held = torch.cat([self._held, block])
            self._drop(start)
        self._drop(start)
        return self._held[:count]

    def _drop(self, start: int) -> None:
        gone = min(start - self._start, len(self._held))
        self._held, self._start = self._held[gone:], self._start + gone
