"""CLIP: pictures and texts in one space, by contrast.

Paper: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021,
https://arxiv.org/abs/2103.00020. Official code: openai/CLIP; trained on by mlfoundations/open_clip.
Hub: openai/clip-vit-base-patch32, openai/clip-vit-large-patch14, laion/CLIP-ViT-B-32-laion2B-s34B-b79K, ...

    picture -> ViT -> class token -> norm -> projection --+
                                                          cosine * exp(scale) -> symmetric cross-entropy
    text -> causal Transformer -> norm -> EOT -> projection --+

Training details kept here: OpenAI's initialisation; the scale is stored as a logarithm, starts at ln(1/0.07), and is
clamped to [0, ln 100] after each optimiser step; no weight decay on norms, biases and scale; gradients flow through the
gather of all ranks' features.

Deviations: texts are padded to the longest of the batch instead of 77 tokens (a causal tower cannot see the padding),
and the last vision block computes only the class token's row (no other row is read). Both leave every output as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from polymodal.core.errors import ConfigError
from polymodal.core.files import read_json
from polymodal.core.sample import Sample
from polymodal.core.verbs import TensorSpec
from polymodal.encoders.clip_text import TEXT
from polymodal.encoders.text import TextConfig, TextTower
from polymodal.encoders.vit import ViT, ViTConfig
from polymodal.heads.contrastive import ContrastiveHead
from polymodal.modalities.image import CLIP_MEAN, CLIP_STD, CenterCrop, ImageProcessor, ShortestEdge
from polymodal.nn.init import openai_text_, openai_vision_
from polymodal.nn.mlp import ActivationName
from polymodal.systems.base import DualEncoder, Format, Reference
from polymodal.weights.fields import IMAGE_FIELDS, TRANSFORMER_FIELDS, Fields, FieldTable, read_fields, write_fields
from polymodal.weights.format import different_fields
from polymodal.weights.layouts import OPEN_CLIP_PLAIN, clip_blocks, open_clip_rules
from polymodal.weights.rules import Rule, drop, rule


@dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """Two towers and the width of the shared space; ``eot_id`` is the token whose first place is the text's vector."""

    vision: ViTConfig
    text: TextConfig
    embed_dim: int
    eot_id: int

    def __post_init__(self) -> None:
        if not self.text.causal:
            raise ConfigError("the text tower of CLIP is causal: what follows the end token must not be seen")
        if not 0 <= self.eot_id < self.text.vocab_size:  # it would be found nowhere, and the first token read instead
            raise ConfigError(f"the end of text {self.eot_id} is not in a vocabulary of {self.text.vocab_size}")


@final
class CLIP(DualEncoder):
    """Contrastive language-image pre-training."""

    config: CLIPConfig
    head: ContrastiveHead

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__(config)
        self.vision = ViT(config.vision)
        self.text = TextTower(config.text)
        self.image_projection = nn.Linear(config.vision.dim, config.embed_dim, bias=False)
        self.text_projection = nn.Linear(config.text.dim, config.embed_dim, bias=False)
        self.head = ContrastiveHead()

    @torch.no_grad()
    def init_weights(self) -> None:
        """OpenAI's scheme: width-scaled normals in the text tower, torch's own defaults in the vision blocks."""
        vision, text = self.config.vision, self.config.text
        scale = vision.dim**-0.5
        assert self.vision.class_token is not None
        for parameter in (self.vision.class_token, self.vision.position, self.image_projection.weight):
            nn.init.normal_(parameter, std=scale)
        nn.init.normal_(self.text.embed_tokens.weight, std=0.02)
        nn.init.normal_(self.text.position, std=0.01)
        nn.init.normal_(self.text_projection.weight, std=text.dim**-0.5)
        openai_vision_(self.vision.blocks)
        openai_text_(self.text.blocks)

    def inputs_spec(self) -> dict[str, TensorSpec]:
        c = self.config
        side = c.vision.image_size
        return {
            "pixels": TensorSpec(shape=(c.vision.num_channels, side, side)),
            "ids": TensorSpec(shape=(c.text.context,), dtype=torch.int64, high=c.text.vocab_size, last=c.eot_id),
        }

    @property
    def embedding_dim(self) -> int:
        return self.config.embed_dim

    def encode_images(self, pixels: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim"]:
        return F.normalize(self.image_projection(self.vision.class_vector(pixels)).float(), dim=-1)

    def encode_texts(self, ids: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch dim"]:
        eot = (ids == self.config.eot_id).int().argmax(1)
        return F.normalize(self.text_projection(self.text.at(self.text(ids), eot)).float(), dim=-1)

    def after_step(self, step: int, total_steps: int) -> None:
        self.head.clamp()

    def count(self, sample: Sample) -> int:
        """Tokens that the towers compute for the parts of a sample."""
        side = self.config.vision.image_size
        texts = sum(self.prepare_texts([Sample((text,))])["ids"].shape[1] for text in sample.texts)
        return len(sample.images) * self.config.vision.count(side, side) + texts

    def default_images(self) -> ImageProcessor:
        side = self.config.vision.image_size
        return ImageProcessor(
            resize=ShortestEdge(size=side), resample="bicubic", crop=CenterCrop(height=side, width=side),
            mean=CLIP_MEAN, std=CLIP_STD,
        )  # fmt: skip

    reference = Reference(
        package="transformers", cls="CLIPModel", inputs={"pixels": "pixel_values", "ids": "input_ids"},
        output="logits_per_image", extra={"return_loss": True},
    )  # fmt: skip


VISION: FieldTable = (
    *TRANSFORMER_FIELDS, *IMAGE_FIELDS[::2], ("patch_size", "patch_size", 32),
    ("hidden_act", "activation", "quick_gelu"), ("layer_norm_eps", "norm_eps", 1e-5),
)  # fmt: skip


def read_hf(raw: Mapping[str, Any]) -> tuple[CLIPConfig, dict[str, str]]:
    f = Fields(raw)
    f.require("model_type", "clip")
    embed_dim = f.take("projection_dim", int, 512)
    f.ignore("the scale is a weight of the checkpoint", "logit_scale_init_value")
    f.ignore("old copies of the nested configs", "text_config_dict", "vision_config_dict")
    v, t = f.child("vision_config"), f.child("text_config")
    for part, kind in ((v, "clip_vision_model"), (t, "clip_text_model")):
        part.require("model_type", kind)
        part.require("attention_dropout", 0.0)
        part.require("dropout", 0.0)
        part.ignore("the projection's width is the outer projection_dim", "projection_dim")
    vision, text = read_fields(v, VISION), read_fields(t, TEXT)
    # Configs written before 2023 say 2 and mean "the largest id", which is OpenAI's end of text.
    eot = t.take("eos_token_id", int, 49407, least=0)
    report = f.done()
    return CLIPConfig(
        vision=ViTConfig(**vision, patch_bias=False, pre_norm=True), text=TextConfig(**text), embed_dim=embed_dim,
        eot_id=text["vocab_size"] - 1 if eot == 2 else eot,
    ), report  # fmt: skip


def write_hf(c: CLIPConfig) -> dict[str, Any]:
    vision = write_fields(c.vision, VISION) | {"model_type": "clip_vision_model", "projection_dim": c.embed_dim}
    text = write_fields(c.text, TEXT) | {
        "eos_token_id": c.eot_id, "bos_token_id": c.eot_id - 1, "pad_token_id": c.eot_id,
        "model_type": "clip_text_model", "projection_dim": c.embed_dim,
    }  # fmt: skip
    return {
        "architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": c.embed_dim, "text_config": text,
        "vision_config": vision,
    }  # fmt: skip


def rules_hf(config: CLIPConfig) -> list[Rule]:
    return [
        rule("logit_scale", "head.logit_scale"),
        rule("visual_projection.weight", "image_projection.weight"),
        rule("text_projection.weight", "text_projection.weight"),
        rule("vision_model.embeddings.class_embedding", "vision.class_token"),
        rule("vision_model.embeddings.patch_embedding.weight", "vision.patch_embed.weight"),
        rule("vision_model.embeddings.position_embedding.weight", "vision.position"),
        rule("vision_model.pre_layrnorm.{p}", "vision.pre_norm.{p}"),
        rule("vision_model.post_layernorm.{p}", "vision.norm.{p}"),
        *clip_blocks("vision_model.encoder", "vision.blocks"),
        rule("text_model.embeddings.token_embedding.weight", "text.embed_tokens.weight"),
        rule("text_model.embeddings.position_embedding.weight", "text.position"),
        rule("text_model.final_layer_norm.{p}", "text.norm.{p}"),
        *clip_blocks("text_model.encoder", "text.blocks"),
        drop("{tower}.embeddings.position_ids", "0, 1, 2, ...: a buffer of older transformers"),
    ]


def preset(vision: Mapping[str, Any], width: int = 512, activation: str = "quick_gelu") -> Callable[[], CLIPConfig]:
    """A config from the fields in which it differs from the Hub's defaults; the text tower's heads are 64 wide."""
    text = {"hidden_size": width, "num_attention_heads": width // 64, "intermediate_size": 4 * width}
    act = {"hidden_act": activation}
    raw = {"projection_dim": width, "text_config": text | act, "vision_config": {**vision, **act}}
    return lambda: read_hf(raw)[0]


BASE, LARGE = (
    dict(
        zip(
            ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size"),
            v,
            strict=True,
        )
    )
    for v in ((768, 12, 12, 3072, 32), (1024, 24, 16, 4096, 14))
)
PRESETS = {
    "openai/clip-vit-base-patch32": preset(BASE),
    "openai/clip-vit-base-patch16": preset(BASE | {"patch_size": 16}),
    "openai/clip-vit-large-patch14": preset(LARGE, 768),
    "openai/clip-vit-large-patch14-336": preset(LARGE | {"image_size": 336}, 768),
    "laion/CLIP-ViT-B-32-laion2B-s34B-b79K": preset(BASE, activation="gelu"),
}

OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_VISION: FieldTable = (
    ("image_size", "image_size", 224), ("patch_size", "patch_size", 16), ("width", "dim", 768),
    ("layers", "num_layers", 12),
)  # fmt: skip
OPEN_TEXT: FieldTable = (
    ("context_length", "context", 77), ("vocab_size", "vocab_size", 49408), ("width", "dim", 512),
    ("heads", "num_heads", 8), ("layers", "num_layers", 12),
)  # fmt: skip


def read_open_clip(raw: Mapping[str, Any]) -> tuple[CLIPConfig, dict[str, str]]:
    f = Fields(raw, OPEN_CLIP_CONFIG)
    f.ignore("read with the image processor", "preprocess_cfg")
    m = f.child("model_cfg")
    m.ignore("the scale is a weight of the checkpoint", "init_logit_scale")
    v, t = m.child("vision_cfg"), m.child("text_cfg")
    activation: ActivationName = "quick_gelu" if m.take("quick_gelu", bool, False) else "gelu"
    t.ignore("the end of text is the largest id", "tokenizer_kwargs", "hf_tokenizer_name", "eos_id", "pad_id")
    v.ignore("training only", "patch_dropout")
    for part, plain in ((m, OPEN_CLIP_PLAIN["model"]), (v, OPEN_CLIP_PLAIN["vision"]), (t, OPEN_CLIP_PLAIN["text"])):
        for name, value in plain.items():
            part.require(name, value)
    vision, text = read_fields(v, OPEN_VISION), read_fields(t, OPEN_TEXT)
    head_width, embed_dim = v.take("head_width", int, 64), m.take("embed_dim", int)
    hidden = [int(d["dim"] * part.take("mlp_ratio", float, 4.0)) for d, part in ((vision, v), (text, t))]
    report = f.done()
    return CLIPConfig(
        vision=ViTConfig(
            **vision, hidden_dim=hidden[0], num_heads=vision["dim"] // head_width, activation=activation, norm_eps=1e-5,
            patch_bias=False, pre_norm=True,
        ),
        text=TextConfig(**text, hidden_dim=hidden[1], activation=activation),
        embed_dim=embed_dim, eot_id=text["vocab_size"] - 1,
    ), report  # fmt: skip


def write_open_clip(c: CLIPConfig) -> dict[str, Any]:
    # OpenCLIP rounds the product of width and ratio down, so the ratio is rounded up.
    ratios = [math.nextafter(tower.hidden_dim / tower.dim, math.inf) for tower in (c.vision, c.text)]
    head = {"head_width": c.vision.dim // c.vision.num_heads}
    vision = write_fields(c.vision, OPEN_VISION) | head | {"mlp_ratio": ratios[0]}
    text = write_fields(c.text, OPEN_TEXT) | {"mlp_ratio": ratios[1]}
    quick = {"quick_gelu": True} if c.vision.activation == "quick_gelu" else {}
    raw = {"model_cfg": {"embed_dim": c.embed_dim, "vision_cfg": vision, "text_cfg": text} | quick}
    if lost := different_fields(read_open_clip(raw)[0], c):
        raise ConfigError(f"save it as hf: OpenCLIP's format cannot hold {', '.join(lost)}")
    return raw


def open_clip_images(folder: Path, config: CLIPConfig) -> ImageProcessor:
    raw = read_json(folder / OPEN_CLIP_CONFIG)
    return ImageProcessor.from_open_clip(raw.get("preprocess_cfg") or {}, config.vision.image_size)


CLIP.formats = {
    "hf": Format(read=read_hf, write=write_hf, rules=rules_hf),
    "open_clip": Format(
        read=read_open_clip,
        write=write_open_clip,
        rules=lambda config: open_clip_rules(),
        config_file=OPEN_CLIP_CONFIG,
        weights_file="open_clip_model.safetensors",
        read_images=open_clip_images,
        write_images=lambda images: {"preprocess_cfg": images.to_open_clip()},
    ),
}
