"""Prismatic: the patches of one tower, or of two side by side, through an MLP, read by a language model as tokens.

Paper: Karamcheti et al., "Prismatic VLMs: Investigating the Design Space of Visually-Conditioned Language Models",
2024, https://arxiv.org/abs/2402.07865. Official code: TRI-ML/prismatic-vlms. Hub: TRI-ML/prismatic-siglip-224px-7b, and
openvla/openvla-7b, whose trunk it is.

    picture -> DINOv2 with registers --+ channels
                                       concatenated -> MLP, four times as wide first --+
    picture -> SigLIP -----------------+                                               [start, patches, text] -> decoder
    text -> embedding -----------------------------------------------------------------+

Training details kept here: patches of the layer before the last, not normed; one tower has a connector of two layers, a
pair one of three; patches stand behind the start token; each turn of a chat is tokenized by itself; the loss is on
answers and their end tokens; the connector starts from torch's own initialisation. The paper trains in one stage, the
connector and the language model at 2e-5, the towers frozen.

Deviations: the last layer, the last norm and SigLIP's pooled head, which nothing reads, are kept for the file's sake
and never train. Files name towers; sizes that timm has not are written beside the name (``vision_config``), where the
official code does not look. Prompts of Llama-2-chat, Mistral-Instruct and Phi-2 are not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, final

from polymodal.systems.fused import FusedConfig, FusedGenerator, read_parts, rules_of_parts, write_parts
from polymodal.weights.fields import Fields
from polymodal.weights.format import Format, write_whole


@dataclass(frozen=True, kw_only=True)
class PrismaticConfig(FusedConfig):
    """One tower or two, an MLP and a language model."""


@final
class Prismatic(FusedGenerator):
    """A vision-language model of one or two towers, a connector and a decoder."""

    config: PrismaticConfig


def read_hf(raw: Mapping[str, Any]) -> tuple[PrismaticConfig, dict[str, str]]:
    f = Fields(raw)
    f.require("model_type", "prismatic")
    parts = read_parts(f)
    report = f.done()
    return PrismaticConfig(**parts), report


def write_hf(c: PrismaticConfig) -> dict[str, Any]:
    raw = {"architectures": ["PrismaticForConditionalGeneration"], "model_type": "prismatic", **write_parts(c)}
    return write_whole(c, raw, read_hf)


Prismatic.formats = {"hf": Format(read=read_hf, write=write_hf, rules=rules_of_parts)}

_LLAMA = {"model_type": "llama", "vocab_size": 32064, "pad_token_id": 32000}
PRESETS = {
    name: partial(
        lambda vision, language, fit: read_hf({
            "model_type": "prismatic", "vision_backbone_id": vision, "llm_backbone_id": language,
            "image_resize_strategy": fit, "text_config": _LLAMA,
        })[0],
        vision, language, fit,
    )
    for name, vision, language, fit in (
        ("TRI-ML/prismatic-siglip-224px-7b", "siglip-vit-so400m", "vicuna-v15-7b", "letterbox"),
        ("prism-dinosiglip-224px+7b", "dinosiglip-vit-so-224px", "llama2-7b-pure", "resize-naive"),
        ("prism-dinosiglip+7b", "dinosiglip-vit-so-384px", "llama2-7b-pure", "resize-naive"),
    )
}  # fmt: skip
