"""When something is to be seen in a clip: one question, asked of frame after frame."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

from polymodal.asking import request
from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError, UnsupportedError
from polymodal.core.sample import Image, Video
from polymodal.core.verbs import Generates
from polymodal.modalities.video import Fps, chunks
from polymodal.samplers.autoregressive import Settings
from polymodal.systems.base import System
from polymodal.tokenizers.language import LanguageTokenizer

BATCH: Final = 16  # frames that are looked at together


@dataclass(frozen=True, kw_only=True)
class Moment:
    """How sure a model is of an answer at some time."""

    time: float  # in seconds
    score: float  # log odds: of yes against no, or of the answer against all others


@dataclass(frozen=True, kw_only=True)
class Span:
    """A stretch of frames that all gave the answer, in seconds, and the one that gave it most surely."""

    start: float
    end: float
    best: Moment


def moments(
    model: System,
    clip: Video,
    question: str,
    *,
    answer: str | None = None,
    fps: float | int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Moment]:
    """Asks the same of frame after frame of a clip; an hour takes no more memory than a minute.

    Args:
        model: answers.
        clip: what is looked through.
        question: one that yes or no answers, if no answer is given.
        answer: the one that is looked for, as the model would begin it: ``"blue"`` to ``"what colour is the cup?"``.
        fps: frames looked at in a second.
        progress: called with the frames that were looked at, and with how many there are.

    Raises:
        UnsupportedError: the model writes no text, or begins yes and no with the same token.
        ConfigError: the answer is empty.
        MediaError: the clip cannot be decoded.
    """
    times = Fps(fps=fps, least=1, most=sys.maxsize, multiple=1, spacing="open").times(clip)
    done = 0
    for frames in chunks(clip, times, BATCH):
        batch, _, tokenizer = request(model, [[Image(frame), question] for frame in frames.pixels], Settings())
        if answer is None:
            odds = _yes(model, batch.to(model.device), tokenizer)
        else:
            odds = _odds(model, batch.to(model.device), tokenizer.encode(answer, special=False))
        yield from (Moment(time=t, score=score) for t, score in zip(frames.times, odds.tolist(), strict=True))
        done += len(frames.times)
        if progress is not None:
            progress(done, len(times))


def _yes(model: System, batch: Batch, tokenizer: LanguageTokenizer) -> Float[Tensor, " rows"]:
    """Log odds of yes against no as the first word of each answer."""
    assert isinstance(model, Generates)
    yes, no = (_beginnings(tokenizer, word) for word in ("yes", "no"))
    yes, no = yes - no, no - yes  # a blank may be a token of its own
    if not yes or not no:
        raise UnsupportedError(f"{model.source}: yes and no begin with the same token, so nothing can be compared")
    scores = model.prefill(batch, model.new_memory(batch.size, batch["ids"].shape[1])).float()
    return scores[:, sorted(yes)].logsumexp(1) - scores[:, sorted(no)].logsumexp(1)


def _odds(model: System, batch: Batch, answer: list[int]) -> Float[Tensor, " rows"]:
    """Log odds of these tokens as the beginning of each answer, against all other beginnings."""
    assert isinstance(model, Generates)
    if not answer:
        raise ConfigError("an answer to look for has at least one word")
    memory = model.new_memory(batch.size, batch["ids"].shape[1] + len(answer))
    scores, said = model.prefill(batch, memory), torch.zeros(batch.size, dtype=torch.float64)
    for place, token in enumerate(answer):
        said += scores.double().log_softmax(1)[:, token].cpu()
        if place + 1 < len(answer):
            scores = model.step(torch.full((batch.size,), token), memory)
    return said - torch.log(-torch.expm1(said.clamp(max=-1e-12)))


def _beginnings(tokenizer: LanguageTokenizer, word: str) -> set[int]:
    """The tokens that the word may begin with."""
    spelled = (
        tokenizer.encode(form, special=False) for form in (word, word.capitalize(), f" {word}", f" {word.capitalize()}")
    )
    return {ids[0] for ids in spelled}


def spans(found: Iterable[Moment], *, gap: float) -> list[Span]:
    """The stretches in which the answer is more likely than not, the surest first.

    Frames at most ``gap`` seconds apart belong together.
    """
    stretches: list[list[Moment]] = []
    for moment in found:
        if moment.score > 0:
            if not stretches or moment.time - stretches[-1][-1].time > gap:
                stretches.append([])
            stretches[-1].append(moment)
    out = [Span(start=s[0].time, end=s[-1].time, best=max(s, key=lambda m: m.score)) for s in stretches]
    return sorted(out, key=lambda span: -span.best.score)
