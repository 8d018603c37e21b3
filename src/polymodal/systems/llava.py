"""LLaVA 1.0 and 1.5: the patches of a CLIP tower through a small connector, read by a language model as tokens.

Papers: Liu et al., "Visual Instruction Tuning", 2023, https://arxiv.org/abs/2304.08485 (1.0: one linear layer), and
"Improved Baselines with Visual Instruction Tuning", 2023, https://arxiv.org/abs/2310.03744 (1.5: 336 px and an MLP).
Official code: haotian-liu/LLaVA. Hub: llava-hf/llava-1.5-7b-hf, llava-hf/bakLlava-v1-hf, ...

    picture -> ViT, without its last layer and class token -> connector --+
                                                                          scatter -> decoder -> next-token loss
    text -> embedding ----------------------------------------------------+

Training details kept here: features of the layer before the last, not normed; the loss is on answers only; the
connector starts from normal weights. Stage 1 trains the connector alone at 1e-3, stage 2 connector
and language model at 2e-5; the tower is frozen in both.

Deviations: the tower's last layer and last norm, which nothing reads, are kept for the file's sake and never train.
Pictures are cropped as the Hub's processor says; the paper of 1.5 pads them to a square.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, final

from polymodal.connectors.mlp import Linear
from polymodal.modalities.image import CLIP_MEAN, CLIP_STD, CenterCrop, ImageProcessor, ShortestEdge
from polymodal.modalities.marks import Brackets
from polymodal.systems.tower import (
    CLIP_336,
    VICUNA,
    TowerConfig,
    TowerGenerator,
    read_parts,
    rules_of_parts,
    write_parts,
)
from polymodal.weights.fields import Fields
from polymodal.weights.format import Format, Reference


@dataclass(frozen=True, kw_only=True)
class LlavaConfig(TowerConfig):
    """A tower, a connector and a decoder."""


@final
class Llava(TowerGenerator):
    """A vision-language model of one tower, one connector and one decoder."""

    config: LlavaConfig
    notation = Brackets()

    def default_images(self) -> ImageProcessor:
        side = self.config.vision.image_size
        return ImageProcessor(
            resize=ShortestEdge(size=side), resample="bicubic", crop=CenterCrop(height=side, width=side),
            mean=CLIP_MEAN, std=CLIP_STD,
        )  # fmt: skip

    reference = Reference(
        package="transformers", cls="LlavaForConditionalGeneration",
        inputs={"ids": "input_ids", "labels": "labels", "pixels": "pixel_values"}, output="logits",
    )  # fmt: skip


def read_hf(raw: Mapping[str, Any]) -> tuple[LlavaConfig, dict[str, str]]:
    f = Fields(raw)
    f.require("model_type", "llava")
    parts = read_parts(f)
    report = f.done()
    return LlavaConfig(**parts), report


def write_hf(c: LlavaConfig) -> dict[str, Any]:
    return {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", **write_parts(c)}


Llava.formats = {"hf": Format(read=read_hf, write=write_hf, rules=rules_of_parts)}


def preset(text: Mapping[str, Any]) -> Callable[[], LlavaConfig]:
    raw = {"model_type": "llava", "vision_config": CLIP_336, "text_config": {**VICUNA, **text}}
    return lambda: read_hf(raw)[0]


PRESETS = {
    "liuhaotian/LLaVA-7b-v1": lambda: replace(
        read_hf({"model_type": "llava", "vision_config": CLIP_336 | {"image_size": 224}, "text_config": VICUNA})[0],
        connector=Linear(),
    ),
    "llava-hf/llava-1.5-7b-hf": preset({}),
    "llava-hf/llava-1.5-13b-hf": preset(
        {
            "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
            "num_key_value_heads": 40,
        }
    ),
}  # fmt: skip
