"""Asking a model about pictures and clips, from Python: `ask` for the whole answer, `stream` for its pieces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image as PILImage

from polymodal.core.batch import Batch
from polymodal.core.chat import Chat
from polymodal.core.errors import MediaError, UnsupportedError
from polymodal.core.sample import Image
from polymodal.core.verbs import Generates
from polymodal.modalities.image import Shows
from polymodal.samplers.autoregressive import Settings, Step, complete, sample
from polymodal.systems.base import System
from polymodal.systems.generator import Generator
from polymodal.tokenizers.language import LanguageTokenizer

CAPTION = "Describe the picture in one sentence."


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
    settings = settings or Settings()
    batch, tokenizer = _prompt(model, [Chat.of(value)])
    assert isinstance(model, Generates)
    return sample(model, batch, replace(settings, max_new_tokens=_room(model, batch, settings)), tokenizer)


def ask(model: System, value: Any, settings: Settings | None = None) -> str:
    """The whole answer to one question, the best one where several are sampled; see `stream`."""
    return answers(model, [value], settings)[0]


def answers(model: System, values: Sequence[Any], settings: Settings | None = None) -> list[str]:
    """Answers to several questions, computed together: what `evaluate` calls.

    Raises:
        UnsupportedError: as `stream`.
        MediaError: as `stream`.
    """
    if not values:
        return []
    settings = settings or Settings()
    batch, tokenizer = _prompt(model, [Chat.of(value) for value in values])
    assert isinstance(model, Generates)
    settings = replace(settings, max_new_tokens=_room(model, batch, settings))
    found = {answer.row: answer.text for answer in reversed(complete(model, batch, settings, tokenizer))}  # best last
    return [found[row] for row in range(len(values))]


def _prompt(model: System, chats: Sequence[Chat]) -> tuple[Batch, LanguageTokenizer]:
    if not isinstance(model, Generates):
        raise UnsupportedError(f"{model.source} writes no text, it gives vectors: take a vision-language model")
    if not isinstance(model.tokenizer, LanguageTokenizer):
        raise UnsupportedError(f"{model.source} has no tokenizer.json, so it can neither read nor write text")
    return model.prompt(chats), model.tokenizer


def _room(model: System, batch: Batch, settings: Settings) -> int:
    """New tokens that fit behind the longest prompt."""
    if not isinstance(model, Generator):
        return settings.max_new_tokens
    left = model.backbone.config.context - batch["ids"].shape[1]
    if left < 1:
        raise MediaError(f"the prompt fills the context of {model.backbone.config.context} tokens: no room to answer")
    return min(settings.max_new_tokens, left)


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
