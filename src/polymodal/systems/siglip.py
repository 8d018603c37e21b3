"""SigLIP: pictures and texts in one space, every pair a yes/no question of its own.

Paper: Zhai et al., "Sigmoid Loss for Language Image Pre-Training", 2023, https://arxiv.org/abs/2303.15343. Official
code: google-research/big_vision. The fixed-size checkpoints of SigLIP 2 have this architecture, too.
Hub: google/siglip-base-patch16-224, google/siglip-so400m-patch14-384, google/siglip2-base-patch16-224, ...

    picture -> ViT -> attention pooling with a learned probe --+
                                                               cosine * exp(scale) + bias -> sigmoid loss
    text -> bidirectional Transformer -> last position -> linear --+

Training details kept here: big_vision's initialisation; scale ln 10 and bias -10; the sum over all pairs is divided by
the number of rows; texts are always padded to the full context, because the last position is the text's vector and
padding is attended to, exactly as trained.

Deviations: none known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from polymodal.core.errors import ConfigError
from polymodal.core.sample import Sample
from polymodal.core.verbs import TensorSpec
from polymodal.encoders.pooling import AttentionPool
from polymodal.encoders.text import TextConfig, TextTower
from polymodal.encoders.vit import ViT, ViTConfig
from polymodal.heads.contrastive import SigmoidHead
from polymodal.modalities.image import HALF, Exact, ImageProcessor
from polymodal.nn.init import siglip_
from polymodal.systems.base import DualEncoder, Format, Reference
from polymodal.tokenizers.text import Pad
from polymodal.weights.fields import IMAGE_FIELDS, TRANSFORMER_FIELDS, Fields, FieldTable, read_fields, write_fields
from polymodal.weights.layouts import siglip_rules
from polymodal.weights.rules import Rule, drop, rule


@dataclass(frozen=True, kw_only=True)
class SigLIPConfig:
    """Two towers; the shared space is as wide as the vision tower (the text tower has a linear map to it)."""

    vision: ViTConfig
    text: TextConfig

    def __post_init__(self) -> None:
        if self.text.causal:
            raise ConfigError("the text tower of SigLIP is bidirectional: TextConfig(causal=False, ...)")


def preset(patch: int, size: int, dim: int, layers: int, heads: int, hidden: int, vocab: int = 32000) -> SigLIPConfig:
    """A config whose towers have the same shape, as in all released models."""
    shape: dict[str, Any] = dict(dim=dim, num_layers=layers, num_heads=heads, hidden_dim=hidden, activation="gelu_tanh")
    return SigLIPConfig(
        vision=ViTConfig(image_size=size, patch_size=patch, class_token=False, **shape),
        text=TextConfig(vocab_size=vocab, context=64, causal=False, norm_eps=1e-6, **shape),
    )


PRESETS = {
    "google/siglip-base-patch16-224": lambda: preset(16, 224, 768, 12, 12, 3072),
    "google/siglip-so400m-patch14-384": lambda: preset(14, 384, 1152, 27, 16, 4304),
    "google/siglip2-base-patch16-224": lambda: preset(16, 224, 768, 12, 12, 3072, vocab=256000),
}


@final
class SigLIP(DualEncoder):
    """Sigmoid loss for language-image pre-training."""

    config: SigLIPConfig
    padding: ClassVar[Pad] = "max"

    def __init__(self, config: SigLIPConfig) -> None:
        super().__init__(config)
        v = config.vision
        self.vision = ViT(v)
        assert v.activation != "swiglu"
        self.pool = AttentionPool(v.dim, v.num_heads, v.hidden_dim, activation=v.activation, norm_eps=v.norm_eps)
        self.text = TextTower(config.text)
        self.text_projection = nn.Linear(config.text.dim, v.dim)
        self.head = SigmoidHead()

    def init_weights(self) -> None:
        """big_vision's scheme."""
        siglip_(
            blocks=(*self.vision.blocks, *self.text.blocks),
            layers=(self.vision.patch_embed, self.text_projection),
            tables=(self.vision.position, self.text.position, self.text.embed_tokens.weight),
        )
        self.pool.init_weights()

    def inputs_spec(self) -> dict[str, TensorSpec]:
        v, t = self.config.vision, self.config.text
        return {
            "pixels": TensorSpec(shape=(v.num_channels, v.image_size, v.image_size)),
            "ids": TensorSpec(shape=(t.context,), dtype=torch.int64, high=t.vocab_size),
        }

    @property
    def embedding_dim(self) -> int:
        return self.config.vision.dim

    def encode_images(self, pixels: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim"]:
        return F.normalize(self.pool(self.vision(pixels)).float(), dim=-1)

    def encode_texts(self, ids: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch dim"]:
        return F.normalize(self.text_projection(self.text(ids).x[:, -1]).float(), dim=-1)

    def count(self, sample: Sample) -> int:
        """Tokens that the towers compute for the parts of a sample: a text always fills the context."""
        side = self.config.vision.image_size
        return len(sample.images) * self.config.vision.count(side, side) + len(sample.texts) * self.config.text.context

    def default_images(self) -> ImageProcessor:
        side = self.config.vision.image_size
        return ImageProcessor(resize=Exact(height=side, width=side), resample="bicubic", mean=HALF, std=HALF)

    reference = Reference(
        package="transformers", cls="SiglipModel", inputs={"pixels": "pixel_values", "ids": "input_ids"},
        output="logits_per_image", extra={"return_loss": True},
    )  # fmt: skip


SHAPE: FieldTable = (
    *TRANSFORMER_FIELDS,
    ("hidden_act", "activation", "gelu_pytorch_tanh"),
    ("layer_norm_eps", "norm_eps", 1e-6),
)
VISION: FieldTable = (*SHAPE, *IMAGE_FIELDS)
TEXT: FieldTable = (*SHAPE, ("vocab_size", "vocab_size", 32000), ("max_position_embeddings", "context", 64))


def read_hf(raw: Mapping[str, Any]) -> tuple[SigLIPConfig, dict[str, str]]:
    f = Fields(raw)
    f.require("model_type", "siglip")
    v, t = f.child("vision_config"), f.child("text_config")
    v.require("model_type", "siglip_vision_model")
    v.require("vision_use_head", True)
    t.require("model_type", "siglip_text_model")
    for part in (v, t):
        part.require("attention_dropout", 0.0)
    t.ignore("texts have no end token in the pooling: the last position is read", "eos_token_id")
    vision, text = read_fields(v, VISION), read_fields(t, TEXT)
    t.require("projection_size", vision["dim"])
    report = f.done()
    return SigLIPConfig(vision=ViTConfig(**vision, class_token=False), text=TextConfig(**text, causal=False)), report


def write_hf(c: SigLIPConfig) -> dict[str, Any]:
    text = write_fields(c.text, TEXT) | {"projection_size": c.vision.dim, "model_type": "siglip_text_model"}
    vision = write_fields(c.vision, VISION) | {"model_type": "siglip_vision_model"}
    return {"architectures": ["SiglipModel"], "model_type": "siglip", "text_config": text, "vision_config": vision}


def rules_hf(config: SigLIPConfig) -> list[Rule]:
    return [
        rule("vision_model.embeddings.patch_embedding.{p}", "vision.patch_embed.{p}"),
        *siglip_rules(),
        drop("{tower}.embeddings.position_ids", "0, 1, 2, ...: a buffer of older transformers"),
    ]


SigLIP.formats = {"hf": Format(read=read_hf, write=write_hf, rules=rules_hf)}
