"""A nano LLaVA and questions about the colour of a lone shape: what the tests of training with media share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import polymodal
from polymodal.core.batch import Batch
from polymodal.core.chat import Chat
from polymodal.core.sample import Image
from polymodal.data.lessons import Lessons
from polymodal.data.loader import Source
from polymodal.data.worlds import shapes
from polymodal.systems.llava import Llava
from polymodal.tokenizers.language import LanguageTokenizer
from polymodal.train import Constant, Header, Run, Stage, fit
from recipes.nano.scenes import close_up
from tests.nano import NANO

COLOURS = ("red", "green", "blue", "yellow")
HEADER = Header(command="", machine="", time="", expected="")


@cache
def tokenizer() -> LanguageTokenizer:
    return LanguageTokenizer.of_words([*COLOURS, "colour", "user", "assistant"])


def vlm(seed: int = 0) -> Llava:
    words = tokenizer()
    config = NANO["llava"]
    torch.manual_seed(seed)
    model = polymodal.build(
        replace(
            config, image_id=words.backend.token_to_id("<|image|>"),
            backbone=replace(config.backbone, vocab_size=words.vocab_size),
        )
    )  # fmt: skip
    assert isinstance(model, Llava)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:  # at the usual deviations such a narrow model learns slowly to look
                weight.normal_(std=1.0 if "embed_tokens" in name else weight[0].numel() ** -0.5)
    model.use_tokenizer(words)
    return model


def questions(count: int, *, seed: int = 0, held_out: bool = False) -> list[tuple[Chat, str]]:
    """Chats that ask for the colour, and the colour; held-out ones show pairs of colour and shape of their own."""
    rng = np.random.default_rng(seed)
    found: list[tuple[Chat, str]] = []
    while len(found) < count:
        scene = close_up(rng, held_out=held_out)
        if (colour := scene.things[0].colour) in COLOURS:
            found.append((Chat.of([Image(shapes.render(scene, 16)), "colour"]), colour))
    return found


class Kept:
    """The rows of a source, made once."""

    def __init__(self, source: Source) -> None:
        self.whole = source.batch(range(len(source)), np.random.default_rng(0))

    def __len__(self) -> int:
        return self.whole.size

    def batch(self, indices: Sequence[int], rng: np.random.Generator) -> Batch:
        return self.whole.take(indices)


def beginner(asked: Sequence[tuple[Chat, str]], folder: Path) -> dict[str, Tensor]:
    """Weights that know the form of an answer and something of colours."""
    lessons = Kept(Lessons([chat.reply(colour) for chat, colour in asked], vlm().lesson))
    stage = Stage(
        name="lessons", steps=50, batch_size=32, source=lambda: lessons, lr=3e-3, schedule=Constant(warmup=10),
        workers=0,
    )  # fmt: skip
    return fit(Run(name="beginner", header=HEADER, model=vlm, stages=[stage]), folder).model.state_dict()


def weighed(model: Llava, asked: Sequence[tuple[Chat, str]]) -> float:
    """The mean probability that the model answers right."""
    with torch.no_grad():
        answers = model.log_probs(model.lesson([chat.reply(colour) for chat, colour in asked]))
    return float(answers.sum(1).exp().mean())
