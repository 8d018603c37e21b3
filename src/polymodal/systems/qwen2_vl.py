"""Qwen2-VL: pictures and clips of any size as tokens, whose places the decoder knows in time, rows and columns.

Paper: Wang et al., "Qwen2-VL: Enhancing Vision-Language Model's Perception of the World at Any Resolution", 2024,
https://arxiv.org/abs/2409.12191. Official code: QwenLM/Qwen2-VL, qwen-vl-utils, and transformers.
Hub: Qwen/Qwen2-VL-2B-Instruct, Qwen/Qwen2-VL-7B-Instruct, Qwen/Qwen2-VL-72B-Instruct.

    picture or clip -> patches of two frames -> ViT with 2-D RoPE, each frame for itself -> 2 x 2 merged by an MLP --+
                                                                     scatter -> decoder with M-RoPE -> next-token loss
    text -> embedding -----------------------------------------------------------------------------------------------+

Training details kept here: the loss is on answers only; pictures keep their aspect, sides rounded to 28 pixels. The
paper's three stages train the tower, then everything, then the decoder with the tower frozen (``recipes``).

Deviations: fresh weights are normal with the config's deviation; the paper starts from DFN's ViT and from Qwen2. What
follows a clip starts after its largest id, as in the paper and in transformers 4; transformers 5 counts rows and
columns alone, which gives ids twice where a clip is longer in time than its frames are wide. Clips are sampled and
sized as qwen-vl-utils does, and resized by Pillow where that takes torchvision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from jaxtyping import Float
from PIL import Image as PILImage
from torch import Tensor

from polymodal.backbones.decoder import AttentionConfig, Decoder, DecoderConfig, Gated
from polymodal.backbones.families import FAMILIES, ControlIds
from polymodal.backbones.mrope import check_sections, mrope_positions, open_config, write_config
from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError, UnsupportedError
from polymodal.core.sample import Video
from polymodal.core.tokens import Modality, Tokens
from polymodal.core.verbs import TensorSpec
from polymodal.encoders.qwen_vision import (
    Merger,
    QwenVision,
    QwenVisionConfig,
    qwen_vision_rules,
    read_tower,
    write_tower,
)
from polymodal.modalities.smart_resize import SmartResize, load_smart_resize
from polymodal.nn.norm import RMS, Layer
from polymodal.nn.rope import Rope
from polymodal.systems.generator import Generator
from polymodal.tokenizers.chat import Placeholder
from polymodal.weights.fields import ACTIVATIONS
from polymodal.weights.format import Format, Reference
from polymodal.weights.rules import Rule, read_only

_CONTROL = ControlIds(start=151643, stop=(151645,))


@dataclass(frozen=True, kw_only=True)
class Qwen2VLConfig:
    """A tower and a decoder.

    Attributes:
        image_id: the token in whose place a vector of a picture is put; ``video_id`` of a clip.
        start_id: the token before a medium; ``end_id`` after it.
    """

    vision: QwenVisionConfig
    backbone: DecoderConfig
    image_id: int = 151655
    video_id: int = 151656
    start_id: int = 151652
    end_id: int = 151653
    control: ControlIds = _CONTROL

    def __post_init__(self) -> None:
        check_sections(self.backbone)
        v = self.vision
        if v.windows or v.norm != Layer(eps=1e-6) or v.activation == "swiglu" or v.hidden_dim % v.dim:
            raise ConfigError(
                f"Qwen2-VL's tower has layer norms, plain MLPs of a multiple of its width, no windows: {v}"
            )


def preset(dim: int, hidden: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool) -> Qwen2VLConfig:
    """A config whose tower is that of all released models."""
    attention = AttentionConfig(num_heads=heads, num_kv_heads=kv_heads, head_dim=128, qkv_bias=True)
    backbone = DecoderConfig(
        vocab_size=vocab, context=32768, dim=dim, num_layers=layers, attention=attention, mlp=Gated(hidden_dim=hidden),
        norm=RMS(), position=Rope(theta=1e6, sections=(16, 24, 24)), tied=tied,
    )  # fmt: skip
    vision = QwenVisionConfig(
        dim=1280, num_layers=32, num_heads=16, hidden_dim=5120, activation="quick_gelu", norm=Layer(eps=1e-6)
    )  # fmt: skip
    return Qwen2VLConfig(vision=vision, backbone=backbone)


PRESETS = {
    "Qwen/Qwen2-VL-2B-Instruct": lambda: preset(1536, 8960, 28, 12, 2, 151936, True),
    "Qwen/Qwen2-VL-7B-Instruct": lambda: preset(3584, 18944, 28, 28, 4, 152064, False),
    "Qwen/Qwen2-VL-72B-Instruct": lambda: preset(8192, 29568, 80, 64, 8, 152064, False),
}


@final
class Qwen2VL(Generator):
    """A vision-language model of one tower, a merger and a decoder with positions in three axes."""

    config: Qwen2VLConfig

    def __init__(self, config: Qwen2VLConfig) -> None:
        super().__init__(config)
        self.vision = QwenVision(config.vision)
        self.connector = Merger(config.vision, config.backbone.dim)
        self.backbone = Decoder(config.backbone)
        self.media_id, self.clip_id, self.stop_ids = config.image_id, config.video_id, config.control.stop

    def init_weights(self) -> None:
        self.vision.init_weights()
        self.connector.init_weights()
        self.backbone.init_weights()

    def inputs_spec(self) -> dict[str, TensorSpec]:
        """A picture of one token, and text."""
        c, m = self.config, self.config.vision.merge_size
        high = min(self.vocab_size, c.image_id, c.video_id)
        row = TensorSpec(shape=(), dtype=torch.int64, rows=True)
        return {
            "ids": TensorSpec(shape=(8,), dtype=torch.int64, high=high, head=(c.image_id,)),
            "labels": TensorSpec(shape=(8,), dtype=torch.int64, high=high),
            "patches": TensorSpec(shape=(m**2, c.vision.patch_dim)), "patches_row": row,
            "grid": TensorSpec(shape=(3,), dtype=torch.int64, head=(1, m, m)), "grid_row": row,
            # For the reference: 0 text, 1 picture, 2 clip. Here the ids say it.
            "kinds": TensorSpec(shape=(8,), dtype=torch.int64, head=(1,)),
        }  # fmt: skip

    def features(self, batch: Batch) -> Float[Tensor, "features dim"]:
        return self.connector(self.vision(batch["patches"], batch["grid"]))

    def layout(self, batch: Batch, x: Float[Tensor, "batch tokens dim"]) -> Tokens:
        """Causal throughout, in three axes where there are media."""
        tokens, ids, m = super().layout(batch, x), batch["ids"], self.config.vision.merge_size
        if "grid" not in batch:
            return tokens
        grid = batch["grid"] // batch["grid"].new_tensor([1, m, m])
        position = mrope_positions(self.places(ids), grid, batch["grid_row"])
        modality = tokens.modality.masked_fill(ids == self.config.image_id, int(Modality.IMAGE))
        modality = modality.masked_fill(ids == self.config.video_id, int(Modality.VIDEO))
        return replace(tokens, position=position, modality=modality)

    def see(self, pictures: Sequence[PILImage.Image | Video]) -> tuple[list[list[int]], Batch]:
        if not isinstance(self.images, SmartResize):
            raise UnsupportedError(f"{self.source} has no image processor")
        counts, batch = self.images(pictures)
        ids = [self.config.video_id if isinstance(medium, Video) else self.config.image_id for medium in pictures]
        return [[i] * count for i, count in zip(ids, counts, strict=True)], batch

    def default_images(self) -> Any:
        return default_images(self.config)

    def _media(self) -> dict[str, Placeholder]:
        c, tokenizer = self.config, self.tokenizer
        assert tokenizer is not None
        names = [tokenizer.backend.id_to_token(i) for i in (c.start_id, c.end_id, c.image_id, c.video_id)]
        before, after, picture, clip = (name or "" for name in names)
        if None in names:
            raise ConfigError(
                f"{self.source}: the tokenizer lacks a token that frames a picture or clip, or stands for it"
            )
        return {
            "image": Placeholder(picture, before=before, after=after),
            "video": Placeholder(clip, before=before, after=after),
        }

    reference = Reference(
        package="transformers", cls="Qwen2VLForConditionalGeneration",
        inputs={
            "ids": "input_ids", "labels": "labels", "patches": "pixel_values", "grid": "image_grid_thw",
            "kinds": "mm_token_type_ids",
        },
        output="logits",
    )  # fmt: skip


def default_images(c: Qwen2VLConfig) -> SmartResize:
    v = c.vision
    return SmartResize(patch_size=v.patch_size, merge_size=v.merge_size, temporal_size=v.temporal_size)


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
    names: dict[str, str] = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    vision = {
        "embed_dim": c.vision.dim, "hidden_size": c.backbone.dim, "mlp_ratio": c.vision.hidden_dim // c.vision.dim,
        "hidden_act": names[c.vision.activation], **write_tower(c.vision),
    }  # fmt: skip
    return write_config(c, vision, "qwen2_vl", "Qwen2VLForConditionalGeneration")


def rules_hf(c: Qwen2VLConfig) -> list[Rule]:
    def decoder(base: str) -> list[Rule]:
        return FAMILIES["qwen2"].rules(c.backbone, base, "lm_head", "backbone")

    # As the modules are called in memory since transformers 4.52, which some files have.
    inner = [r for r in decoder("model.language_model") if r.theirs != ("lm_head.weight",)]
    later = read_only([*qwen_vision_rules(c.vision, "model.visual"), *inner])
    return [*qwen_vision_rules(c.vision, "visual"), *decoder("model"), *later]


Qwen2VL.formats = {
    "hf": Format(
        read=read_hf, write=write_hf, rules=rules_hf,
        read_images=lambda folder, config: load_smart_resize(folder) or default_images(config),
    )
}  # fmt: skip
