"""Systems at nano size that talk: a tokenizer of their own, and weights that say something else of everything."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

import polymodal
from polymodal.systems.generator import Generator
from polymodal.tokenizers.language import LanguageTokenizer
from tests.nano import NANO

WORDS = ["a red cup and a blue plate", "what is it? it is a ring", "how many? two", "yes", "no", "the bar is highest"]
MARKS = {"image_id": "<|image|>", "video_id": "<|video|>", "start_id": "<|see|>", "end_id": "<|seen|>"}


def talking(name: str, *, context: int = 400) -> Generator:
    """A system of this name; what stands for its media are control tokens."""
    tokenizer = LanguageTokenizer.train_bpe(WORDS * 20, 320, special=tuple(MARKS.values()))
    torch.manual_seed(0)
    config = NANO[name]
    ids: dict[str, Any] = {
        field: tokenizer.backend.token_to_id(mark)
        for field, mark in MARKS.items()
        if vars(config).get(field) is not None
    }
    backbone = replace(config.backbone, vocab_size=tokenizer.vocab_size, context=context)
    model = polymodal.build(replace(config, backbone=backbone, **ids))
    assert isinstance(model, Generator)
    for parameter in model.parameters():  # fresh weights say the same to everything
        parameter.data.normal_(std=0.3)
    model.use_tokenizer(tokenizer)
    return model.eval()
