"""Asking a model about pictures and clips, from Python: `ask` for the whole answer, `stream` for its pieces.

Who asks again and again takes an engine: `engine_of` and `submit`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from PIL import Image as PILImage

from polymodal.core.batch import Batch
from polymodal.core.chat import Chat
from polymodal.core.errors import MediaError, UnsupportedError
from polymodal.core.sample import Image, Part, Video
from polymodal.core.verbs import Generates
from polymodal.modalities.image import Shows, Views
from polymodal.modalities.marks import Mark, Notation, draw, marks_in
from polymodal.modalities.video import Sampling, Uniform, frames_of
from polymodal.nn.feature_cache import FeatureCache
from polymodal.samplers.autoregressive import Settings, Step, complete, sample
from polymodal.serve.engine import Engine, EngineConfig, Handle
from polymodal.systems.base import System
from polymodal.systems.generator import Generator
from polymodal.tokenizers.language import LanguageTokenizer

FRAMES = Uniform(count=8)
CAPTION = "Describe the picture in one sentence."
FEATURES: Final = 2**28  # bytes of features of media that are kept while an engine runs


def stream(model: System, value: Any, settings: Settings | None = None) -> Iterator[Step]:
    """The steps of an answer as they come; each has the ``text`` that became certain.

    Args:
        model: writes.
        value: a chat, messages, or what makes one turn of the user: ``[Image("cup.png"), "What colour is it?"]``.
        settings: greedy and at most 256 tokens if not given.

    Raises:
        UnsupportedError: the model writes no text, or has no tokenizer.
        MediaError: a medium cannot be read, or the prompt is longer than the context.
    """
    batch, rules, tokenizer = request(model, [value], settings or Settings())
    assert isinstance(model, Generates)
    return sample(model, batch, rules, tokenizer)


def ask(model: System, value: Any, settings: Settings | None = None) -> str:
    """The whole answer to one question, the best one where several are sampled; see `stream`."""
    return answers(model, [value], settings)[0]


def answers(model: System, values: Sequence[Any], settings: Settings | None = None) -> list[str]:
    """Answers to several questions, computed together.

    Raises:
        UnsupportedError: as `stream`.
        MediaError: as `stream`.
    """
    if not values:
        return []
    batch, rules, tokenizer = request(model, values, settings or Settings())
    assert isinstance(model, Generates)
    found = {answer.row: answer.text for answer in reversed(complete(model, batch, rules, tokenizer))}  # best last
    return [found[row] for row in range(len(values))]


@contextlib.contextmanager
def engine_of(model: System, config: EngineConfig | None = None) -> Iterator[Engine]:
    """An engine that reads the same medium, and the same beginning of prompts, once; closed at the end of the ``with``.

    Raises:
        UnsupportedError: as `stream`.
    """
    tokenizer = _words(model)
    assert isinstance(model, Generates)
    with Engine(model, tokenizer, config) as engine:
        if not isinstance(model, Generator) or model.feature_cache is not None:
            yield engine
            return
        model.feature_cache = FeatureCache(FEATURES)
        try:
            yield engine
        finally:
            model.feature_cache = None


def submit(engine: Engine, model: System, value: Any, settings: Settings) -> Handle:
    """Asks the engine of a model.

    Raises:
        MediaError: as `stream`, or the request does not fit into the engine's memory.
    """
    batch, rules, _ = request(model, [value], settings)
    return engine.submit(batch.to(model.device), rules[0])


def request(
    model: System, values: Sequence[Any], settings: Settings
) -> tuple[Batch, list[Settings], LanguageTokenizer]:
    """What an engine or a sampling loop is given: prompts, the settings that each has room for, and the words.

    Raises:
        UnsupportedError: as `stream`.
        MediaError: as `stream`.
    """
    tokenizer = _words(model)
    assert isinstance(model, Generates)
    batch = model.prompt([watched(model, Chat.of(value)) for value in values])
    return batch, _fitting(model, batch, settings), tokenizer


def _words(model: System) -> LanguageTokenizer:
    if not isinstance(model, Generates):
        raise UnsupportedError(f"{model.source} writes no text, it gives vectors: take a vision-language model")
    if not isinstance(model.tokenizer, LanguageTokenizer):
        raise UnsupportedError(f"{model.source} has no tokenizer.json, so it can neither read nor write text")
    return model.tokenizer


def watched(model: System, chat: Chat, sampling: Sampling | None = None) -> Chat:
    """The chat with its clips as pictures, the time before each, unless the model reads clips itself.

    Args:
        model: reads it.
        chat: what was said.
        sampling: which frames; then also for a model that reads clips. `FRAMES` if not given.

    Raises:
        MediaError: a clip cannot be decoded.
    """
    if sampling is None and isinstance(model, Generator) and model.clip_id is not None:
        return chat

    def parts(part: Part) -> Sequence[Part]:
        return frames_of(part, sampling or FRAMES) if isinstance(part, Video) else [part]

    return replace(
        chat, turns=tuple(replace(t, parts=tuple(new for part in t.parts for new in parts(part))) for t in chat.turns)
    )


def _fitting(model: System, batch: Batch, settings: Settings) -> list[Settings]:
    """For each prompt, with as many new tokens as there is room for."""
    rooms = model.room(batch) if isinstance(model, Generator) else [settings.max_new_tokens] * batch.size
    if isinstance(model, Generator) and min(rooms) < 1:
        raise MediaError(f"the prompt fills the context of {model.context} tokens: no room to answer")
    return [replace(settings, max_new_tokens=min(settings.max_new_tokens, room)) for room in rooms]


@torch.no_grad()
def seen(model: System, image: Image) -> tuple[list[PILImage.Image], int]:
    """Exactly the pixels that a model gets of a picture, tile by tile; and the tokens that they become.

    Raises:
        UnsupportedError: the model reads no pictures.
        MediaError: the picture cannot be decoded.
    """
    if not isinstance(model, Generator) or not isinstance(model.images, Shows):
        raise UnsupportedError(f"{model.source} reads no pictures, or not in a form that can be shown")
    spelled, media = model.see([model.picture(image)])
    return model.images.pictures(media), len(spelled[0])


def marked(model: System, image: Image, answer: str) -> tuple[PILImage.Image, list[Mark]]:
    """The picture as a viewer shows it with the boxes and points of an answer on it; and these, in its pixels.

    Args:
        model: wrote the answer.
        image: what it was asked about.
        answer: with control tokens, as ``model.tokenizer.decode(ids, skip_special=False)`` gives it.

    Raises:
        UnsupportedError: no notation of boxes is known of this model.
        MediaError: the picture cannot be decoded.
    """
    notation, images = notation_of(model)
    assert isinstance(model, Generator)
    picture = model.picture(image)
    marks = marks_in(answer, notation, images.view(*picture.size))
    return draw(picture, marks), marks


def notation_of(model: System) -> tuple[Notation, Views]:
    """How a model writes boxes and points, and what knows where they are.

    Raises:
        UnsupportedError: it writes none, or nobody knows how.
    """
    if not isinstance(model, Generator) or model.notation is None or not isinstance(model.images, Views):
        raise UnsupportedError(f"{model.source} writes no boxes or points in a notation that is known")
    return model.notation, model.images
