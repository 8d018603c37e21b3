"""PaliGemma 1 and 2: SigLIP patches through one linear layer, and a Gemma that reads picture and prompt both ways.

Papers: Beyer et al., "PaliGemma: A versatile 3B VLM for transfer", 2024, https://arxiv.org/abs/2407.07726, and Steiner
et al., "PaliGemma 2", 2024, https://arxiv.org/abs/2412.03555. Official code: google-research/big_vision.
Hub: google/paligemma-3b-pt-224, google/paligemma2-3b-pt-224, ...

    picture -> SigLIP, last norm -> linear --+
                                             [picture, start, prompt, newline] sees itself whole; the answer is causal
    text -> embedding -----------------------+

Training details kept here: the prefix (picture and prompt) is bidirectional and not learned, the loss is on the answer
and its end token; the linear layer starts at zero, as in big_vision.

Deviations: none known. A prompt is one turn: there is no chat template.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, final

from polymodal.connectors.mlp import Linear
from polymodal.core.chat import Chat
from polymodal.core.errors import MediaError, UnsupportedError
from polymodal.modalities.marks import LocTokens
from polymodal.systems.prefix import (
    GEMMA,
    SO400M,
    TOWER,
    PrefixConfig,
    PrefixGenerator,
    read_parts,
    rules_hf,
    write_parts,
)
from polymodal.weights.fields import Fields
from polymodal.weights.format import Format, Reference


@dataclass(frozen=True, kw_only=True)
class PaliGemmaConfig(PrefixConfig):
    """A SigLIP tower, a linear layer and a Gemma."""


@final
class PaliGemma(PrefixGenerator):
    """A vision-language model with a prefix that is read both ways."""

    config: PaliGemmaConfig
    notation = LocTokens()

    def write_prompt(self, chat: Chat) -> list[int]:
        """``picture ... picture <bos> text newline``, as in training."""
        if self.tokenizer is None:
            raise UnsupportedError(f"{self.source} has no tokenizer.json")
        if len(chat.turns) != 1 or chat.turns[0].role != "user":
            raise MediaError("PaliGemma answers one prompt of a user: it was trained on no conversations")
        start = self.config.control.start
        text = self.tokenizer.encode(chat.turns[0].text + "\n", special=False)
        return [self.config.image_id] * len(chat.images) + ([] if start is None else [start]) + text

    reference = Reference(
        package="transformers", cls="PaliGemmaForConditionalGeneration",
        inputs={"ids": "input_ids", "labels": "labels", "kinds": "token_type_ids", "pixels": "pixel_values"},
        output="logits",
    )  # fmt: skip


def read_hf(raw: Mapping[str, Any]) -> tuple[PaliGemmaConfig, dict[str, str]]:
    f = Fields(raw)
    parts = read_parts(f)
    report = f.done()
    layers = parts["vision"].num_layers
    return PaliGemmaConfig(vision_family=TOWER, layers=layers, connector=Linear(), **parts), report


def write_hf(c: PaliGemmaConfig) -> dict[str, Any]:
    parts = write_parts(c.vision, c.family, c.backbone, c.image_id, c.control)
    return {"architectures": ["PaliGemmaForConditionalGeneration"], **parts}


PaliGemma.formats = {"hf": Format(read=read_hf, write=write_hf, rules=rules_hf)}

GEMMA2 = {"model_type": "gemma2", "vocab_size": 257216}
PRESETS = {
    name: partial(
        lambda text, side, dim: read_hf(
            {
                "model_type": "paligemma", "vision_config": {**SO400M, "image_size": side}, "text_config": dict(text),
                "projection_dim": dim, "image_token_index": 257152, "eos_token_id": 1, "bos_token_id": 2,
            }
        )[0],
        text, side, dim,
    )
    for name, text, side, dim in (
        ("google/paligemma-3b-pt-224", GEMMA, 224, 2048), ("google/paligemma-3b-pt-448", GEMMA, 448, 2048),
        ("google/paligemma2-3b-pt-224", GEMMA2, 224, 2304),
    )
}  # fmt: skip
