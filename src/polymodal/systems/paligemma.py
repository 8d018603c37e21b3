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
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polymodal.backbones.families import FAMILIES, ControlIds
from polymodal.connectors.mlp import Linear
from polymodal.core.batch import Batch
from polymodal.core.chat import Chat
from polymodal.core.errors import MediaError, UnsupportedError
from polymodal.core.tokens import Modality, Tokens
from polymodal.core.verbs import TensorSpec
from polymodal.encoders.vision_families import VISION_FAMILIES
from polymodal.heads.lm import IGNORE
from polymodal.modalities.image import HALF, Exact, ImageProcessor
from polymodal.modalities.marks import LocTokens
from polymodal.systems.tower import TowerConfig, TowerGenerator
from polymodal.weights.fields import Fields
from polymodal.weights.format import Format, Reference
from polymodal.weights.rules import Rule, rule

TOWER = "siglip_vision_model"


@dataclass(frozen=True, kw_only=True)
class PaliGemmaConfig(TowerConfig):
    """A SigLIP tower, a linear layer and a Gemma."""

    @property
    def read_layers(self) -> None:
        return None


@final
class PaliGemma(TowerGenerator):
    """A vision-language model with a prefix that is read both ways."""

    config: PaliGemmaConfig
    notation = LocTokens()
    has_template = False

    def __init__(self, config: PaliGemmaConfig) -> None:
        super().__init__(config)
        self.vision.norm.requires_grad_(True)  # unlike LLaVA, the last norm is read

    @torch.no_grad()
    def init_weights(self) -> None:
        super().init_weights()
        nn.init.zeros_(self.connector.get_parameter("layers.0.weight"))

    def inputs_spec(self) -> dict[str, TensorSpec]:
        n = self.config.num_features
        spec = super().inputs_spec()
        # Where the answer begins, which the reference wants to be told.
        kinds = TensorSpec(shape=(n + 6,), dtype=torch.int64, low=1, high=2, head=(0,) * (n + 2))
        return spec | {"labels": replace(spec["labels"], head=(IGNORE,) * (n + 2)), "kinds": kinds}

    def layout(self, batch: Batch, x: Float[Tensor, "batch tokens dim"]) -> Tokens:
        """The prefix is one block, each token of the answer one of its own; without labels all is prefix."""
        tokens = Tokens.of(x, causal=False, modality=Modality.TEXT, valid=batch.get("valid"))
        if "labels" not in batch:
            return tokens
        answer = (batch["labels"] != IGNORE).cumsum(1)
        return Tokens(
            x=x, valid=tokens.valid, block=answer, position=tokens.position, modality=tokens.modality,
            sample=tokens.sample,
        )  # fmt: skip

    def plain_from(self, batch: Batch) -> int:
        """A prompt is read both ways: none of it can be read by itself."""
        return int(batch["ids"].shape[1])

    def write_prompt(self, chat: Chat) -> list[int]:
        """``picture ... picture <bos> text newline``, as in training."""
        if self.tokenizer is None:
            raise UnsupportedError(f"{self.source} has no tokenizer.json")
        if len(chat.turns) != 1 or chat.turns[0].role != "user":
            raise MediaError("PaliGemma answers one prompt of a user: it was trained on no conversations")
        start = self.config.control.start
        text = self.tokenizer.encode(chat.turns[0].text + "\n", special=False)
        return [self.config.image_id] * len(chat.images) + ([] if start is None else [start]) + text

    def default_images(self) -> ImageProcessor:
        side = self.config.vision.image_size
        return ImageProcessor(resize=Exact(height=side, width=side), resample="bicubic", mean=HALF, std=HALF)

    reference = Reference(
        package="transformers", cls="PaliGemmaForConditionalGeneration",
        inputs={"ids": "input_ids", "labels": "labels", "kinds": "token_type_ids", "pixels": "pixel_values"},
        output="logits",
    )  # fmt: skip


def read_hf(raw: Mapping[str, Any]) -> tuple[PaliGemmaConfig, dict[str, str]]:
    f = Fields(raw)
    f.require("model_type", "paligemma")
    v, t = f.child("vision_config"), f.child("text_config")
    v.require("model_type", TOWER)
    family = FAMILIES[t.choose("model_type", {n: n for n in ("gemma", "gemma2")}, "gemma")]
    t.ignore("it follows from the tower", "num_image_tokens")
    f.ignore(
        "widths and ids that the parts' own configs have", "hidden_size", "vocab_size", "_vocab_size", "ignore_index"
    )
    vision, backbone = VISION_FAMILIES[TOWER].read(v), family.read(t)
    t.require("use_bidirectional_attention", True)  # of the prefix: `layout` says where
    f.require("projection_dim", backbone.dim)
    image_id = f.take("image_token_id" if "image_token_id" in f else "image_token_index", int, 256000)
    control = ControlIds.read(t if "eos_token_id" in t else f, family.control)
    report = f.done()
    return PaliGemmaConfig(
        vision_family=TOWER, vision=vision, layers=vision.num_layers, connector=Linear(), family=family.model_type,
        backbone=backbone, image_id=image_id, control=control,
    ), report  # fmt: skip


def write_hf(c: PaliGemmaConfig) -> dict[str, Any]:
    text = {
        "model_type": c.family, **FAMILIES[c.family].write(c.backbone), **c.control.write(),
        "num_image_tokens": c.num_features, "use_bidirectional_attention": True,
    }  # fmt: skip
    vision = VISION_FAMILIES[TOWER].write(c.vision) | {"projection_dim": c.backbone.dim}
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"], "model_type": "paligemma", "text_config": text,
        "vision_config": vision, "projection_dim": c.backbone.dim, "image_token_index": c.image_id,
        "tie_word_embeddings": c.backbone.tied,
    }  # fmt: skip


def rules_hf(c: PaliGemmaConfig) -> list[Rule]:
    family = FAMILIES[c.family]
    return [
        *VISION_FAMILIES[TOWER].rules("vision_tower", "vision"),
        rule("multi_modal_projector.linear.{p}", "connector.layers.0.{p}"),
        *family.rules(c.backbone, f"language_model.{family.base}", "language_model.lm_head", "backbone"),
    ]


PaliGemma.formats = {"hf": Format(read=read_hf, write=write_hf, rules=rules_hf)}

SO400M = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
    "patch_size": 14, "image_size": 224, "model_type": TOWER,
}  # fmt: skip
GEMMA = {
    "model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18,
    "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 257216,
}  # fmt: skip
GEMMA2 = {"model_type": "gemma2", "vocab_size": 257216}
PRESETS = {
    name: partial(
        lambda text, side, dim: read_hf(
            {
                "model_type": "paligemma", "vision_config": SO400M | {"image_size": side}, "text_config": text,
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
