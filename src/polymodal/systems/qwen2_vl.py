"""Qwen2-VL: pictures and clips of any size as tokens, whose places the decoder knows in time, rows and columns.

Paper: Wang et al., "Qwen2-VL: Enhancing Vision-Language Model's Perception of the World at Any Resolution", 2024,
https://arxiv.org/abs/2409.12191. Official code: QwenLM/Qwen2-VL, qwen-vl-utils, and transformers.
Hub: Qwen/Qwen2-VL-2B-Instruct, Qwen/Qwen2-VL-7B-Instruct, Qwen/Qwen2-VL-72B-Instruct.

    picture or clip -> patches of two frames -> ViT with 2-D RoPE, each frame for itself -> 2 x 2 merged by an MLP --+
                                                                     scatter -> decoder with M-RoPE -> next-token loss
    text -> embedding -----------------------------------------------------------------------------------------------+

Training details kept here: the loss is on answers only; pictures keep their aspect, sides rounded to 28 pixels. The
paper's three stages train the tower, then everything, then the decoder with the tower frozen.

Deviations: fresh weights are normal with the config's deviation; the paper starts from DFN's ViT and from Qwen2. What
follows a clip starts after its largest id, as in the paper and in transformers 4; transformers 5 counts rows and
columns alone, which gives ids twice where a clip is longer in time than its frames are wide. Clips are sampled and
sized as qwen-vl-utils does, and resized by Pillow where that takes torchvision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from polymodal.backbones.mrope import open_config, write_config
from polymodal.core.errors import ConfigError
from polymodal.encoders.qwen_vision import QwenVisionConfig, read_tower, write_tower
from polymodal.modalities.marks import BoxTokens
from polymodal.nn.norm import Layer
from polymodal.systems.qwen_vl import QwenVL, QwenVLConfig, format_of, qwen2_decoder, reference_of
from polymodal.weights.fields import ACTIVATION_NAMES, ACTIVATIONS


@dataclass(frozen=True, kw_only=True)
class Qwen2VLConfig(QwenVLConfig):
    """A tower of layer norms and plain MLPs, and a decoder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        v = self.vision
        if v.windows or v.norm != Layer(eps=1e-6) or v.activation == "swiglu" or v.hidden_dim % v.dim:
            raise ConfigError(
                f"Qwen2-VL's tower has layer norms, plain MLPs of a multiple of its width, no windows: {v}"
            )


def preset(*decoder: int, tied: bool = False) -> Qwen2VLConfig:
    """A config whose tower is that of all released models."""
    vision = QwenVisionConfig(
        dim=1280, num_layers=32, num_heads=16, hidden_dim=5120, activation="quick_gelu", norm=Layer(eps=1e-6)
    )  # fmt: skip
    return Qwen2VLConfig(vision=vision, backbone=qwen2_decoder(*decoder, tied=tied, context=32768))


PRESETS = {
    "Qwen/Qwen2-VL-2B-Instruct": lambda: preset(1536, 8960, 28, 12, 2, 151936, tied=True),
    "Qwen/Qwen2-VL-7B-Instruct": lambda: preset(3584, 18944, 28, 28, 4, 152064),
    "Qwen/Qwen2-VL-72B-Instruct": lambda: preset(8192, 29568, 80, 64, 8, 152064),
}


@final
class Qwen2VL(QwenVL):
    """A vision-language model of one tower, a merger and a decoder with positions in three axes."""

    config: Qwen2VLConfig
    notation = BoxTokens()
    reference = reference_of("Qwen2VLForConditionalGeneration")


def read_hf(raw: Mapping[str, Any]) -> tuple[Qwen2VLConfig, dict[str, str]]:
    f, parts = open_config(raw)
    f.require("model_type", "qwen2_vl")
    v = f.child("vision_config")
    v.choose(
        "model_type", dict.fromkeys(("qwen2_vl_vision", "qwen2_vl"), ""), "qwen2_vl_vision"
    )  # the second in older files
    v.require("hidden_size", parts["backbone"].dim)
    dim = v.take("embed_dim", int, 1280)
    tower = {
        "dim": dim, "hidden_dim": dim * v.take("mlp_ratio", int, 4), **read_tower(v),
        "activation": v.choose("hidden_act", ACTIVATIONS, "quick_gelu"), "norm": Layer(eps=1e-6),
    }  # fmt: skip
    report = f.done()
    return Qwen2VLConfig(vision=QwenVisionConfig(**tower), **parts), report


def write_hf(c: Qwen2VLConfig) -> dict[str, Any]:
    vision = {
        "embed_dim": c.vision.dim, "hidden_size": c.backbone.dim, "mlp_ratio": c.vision.hidden_dim // c.vision.dim,
        "hidden_act": ACTIVATION_NAMES[c.vision.activation], **write_tower(c.vision),
    }  # fmt: skip
    return write_config(c, vision, "qwen2_vl", "Qwen2VLForConditionalGeneration")


Qwen2VL.formats = {"hf": format_of(read_hf, write_hf)}
