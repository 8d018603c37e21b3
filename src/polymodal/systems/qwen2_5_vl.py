"""Qwen2.5-VL: Qwen2-VL with windows in a tower of the decoder's design, and with time in seconds.

Paper: Bai et al., "Qwen2.5-VL Technical Report", 2025, https://arxiv.org/abs/2502.13923. Official code:
QwenLM/Qwen2.5-VL, qwen-vl-utils, and transformers. Hub: Qwen/Qwen2.5-VL-3B-Instruct, Qwen/Qwen2.5-VL-7B-Instruct, ...

    picture or clip -> patches of two frames -> ViT: windows of 112 pixels, four layers see all -> 2 x 2 merged, MLP --+
                                                            scatter -> decoder with M-RoPE in seconds -> next-token loss
    text -> embedding -------------------------------------------------------------------------------------------------+

Training details kept here: the loss is on answers only; pictures keep their aspect, sides rounded to 28 pixels. Boxes
in its texts are in pixels of the resized picture (the processor's ``view`` maps them back).

Deviations: fresh weights are normal with the config's deviation; the paper trains its tower with CLIP's loss first and
starts from Qwen2.5. What follows a clip starts after its largest id, as in transformers 4; transformers 5 counts rows
and columns alone, which gives ids twice where a clip lasts longer than its frames are wide. Clips are sampled and sized
as qwen-vl-utils does, and resized by Pillow where that takes torchvision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from jaxtyping import Float
from torch import Tensor

from polymodal.backbones.mrope import open_config, write_config
from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError
from polymodal.encoders.qwen_vision import QwenVisionConfig, Windows, read_tower, write_tower
from polymodal.modalities.marks import JsonPixels
from polymodal.nn.norm import RMS
from polymodal.systems.qwen_vl import QwenVL, QwenVLConfig, format_of, qwen2_decoder, reference_of


@dataclass(frozen=True, kw_only=True)
class Qwen2_5VLConfig(QwenVLConfig):
    """A tower with windows, and a decoder.

    Attributes:
        tokens_per_second: ids in time that a second of a clip takes.
    """

    tokens_per_second: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        v = self.vision
        if v.windows is None or v.norm != RMS() or v.activation != "swiglu":
            raise ConfigError(f"Qwen2.5-VL's tower has RMS norms, gated MLPs and windows: {v}")


def preset(*decoder: int, tied: bool = False) -> Qwen2_5VLConfig:
    """A config whose tower is that of the released models of this size."""
    vision = QwenVisionConfig(
        dim=1280, num_layers=32, num_heads=16, hidden_dim=3420, activation="swiglu", norm=RMS(), windows=Windows()
    )  # fmt: skip
    backbone = qwen2_decoder(*decoder, tied=tied, context=128000)
    return Qwen2_5VLConfig(vision=vision, backbone=backbone, tokens_per_second=2)


PRESETS = {
    "Qwen/Qwen2.5-VL-3B-Instruct": lambda: preset(2048, 11008, 36, 16, 2, 151936, tied=True),
    "Qwen/Qwen2.5-VL-7B-Instruct": lambda: preset(3584, 18944, 28, 28, 4, 152064),
}


@final
class Qwen2_5VL(QwenVL):
    """A vision-language model of one tower, a merger and a decoder with positions in three axes."""

    config: Qwen2_5VLConfig
    notation = JsonPixels()
    reference = reference_of("Qwen2_5_VLForConditionalGeneration")

    def intervals(self, batch: Batch) -> Float[Tensor, " media"] | None:
        return batch["seconds"] * self.config.tokens_per_second if "seconds" in batch else None


def read_hf(raw: Mapping[str, Any]) -> tuple[Qwen2_5VLConfig, dict[str, str]]:
    f, parts = open_config(raw)
    f.require("model_type", "qwen2_5_vl")
    v = f.child("vision_config")
    v.choose(
        "model_type", dict.fromkeys(("qwen2_5_vl_vision", "qwen2_5_vl"), ""), "qwen2_5_vl_vision"
    )  # the second in older files
    v.require("hidden_act", "silu")
    v.require("out_hidden_size", parts["backbone"].dim)
    full = v.numbers("fullatt_block_indexes", int) if v.has("fullatt_block_indexes") else Windows().full
    tower = {
        "dim": v.take("hidden_size", int, 3584), "hidden_dim": v.take("intermediate_size", int, 3420), **read_tower(v),
        "activation": "swiglu", "norm": RMS(), "windows": Windows(size=v.take("window_size", int, 112), full=full),
    }  # fmt: skip
    speed = v.take("tokens_per_second", int, 4)
    report = f.done()
    return Qwen2_5VLConfig(vision=QwenVisionConfig(**tower), tokens_per_second=speed, **parts), report


def write_hf(c: Qwen2_5VLConfig) -> dict[str, Any]:
    assert c.vision.windows is not None
    vision = {
        "hidden_size": c.vision.dim, "out_hidden_size": c.backbone.dim, "intermediate_size": c.vision.hidden_dim,
        "hidden_act": "silu", "window_size": c.vision.windows.size,
        "fullatt_block_indexes": list(c.vision.windows.full), "tokens_per_second": c.tokens_per_second,
        **write_tower(c.vision),
    }  # fmt: skip
    return write_config(c, vision, "qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration")


Qwen2_5VL.formats = {"hf": format_of(read_hf, write_hf)}
