"""SigLIP 2 NaFlex: SigLIP for pictures of any aspect and several lengths, without distortion.

Paper: Tschannen et al., "SigLIP 2: Multilingual Vision-Language Encoders with Improved Semantic Understanding,
Localization, and Dense Features", 2025, https://arxiv.org/abs/2502.14786. Official code: google-research/big_vision.
Hub: google/siglip2-base-patch16-naflex, google/siglip2-so400m-patch16-naflex. (The fixed-size SigLIP 2 checkpoints have
SigLIP's architecture and declare it; they load as that.)

    picture -> at most N patches, aspect kept -> Transformer, resized positions -> attention pooling --+
                                                           cosine * exp(scale) + bias -> sigmoid loss
    text (Gemma tokens) -> bidirectional Transformer -> last position -> linear --+

Training details kept here: those of SigLIP; padding patches are neither attended to nor pooled; the position grid is
resized bilinearly with antialiasing, in fp32.

Deviations: the paper adds captioning, self-distillation and masked prediction losses during pre-training, whose heads
the released checkpoints do not hold; only the sigmoid loss is here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError, UnsupportedError
from polymodal.core.sample import Sample
from polymodal.core.tokens import Modality, Tokens
from polymodal.core.verbs import TensorSpec
from polymodal.encoders.pooling import AttentionPool
from polymodal.encoders.text import TextConfig, TextTower
from polymodal.heads.contrastive import SigmoidHead
from polymodal.modalities.image import PatchBudget, PatchProcessor, decode
from polymodal.nn.block import Block
from polymodal.nn.init import siglip_
from polymodal.nn.mlp import ActivationName
from polymodal.systems.base import DualEncoder, Format, Reference
from polymodal.tokenizers.text import Pad
from polymodal.weights.fields import TRANSFORMER_FIELDS, Fields, FieldTable, read_fields, write_fields
from polymodal.weights.layouts import siglip_rules
from polymodal.weights.rules import Rule, rule


@dataclass(frozen=True, kw_only=True)
class NaFlexConfig:
    """The vision tower; ``num_patches`` is the size of the learned position grid, a square."""

    patch_size: int
    num_patches: int
    dim: int
    num_layers: int
    num_heads: int
    hidden_dim: int
    num_channels: int = 3
    activation: ActivationName = "gelu_tanh"
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if math.isqrt(self.num_patches) ** 2 != self.num_patches:
            raise ConfigError(f"num_patches is a square number, the position grid; not {self.num_patches}")


@dataclass(frozen=True, kw_only=True)
class SigLIP2Config:
    """Two towers; the shared space is as wide as the vision tower."""

    vision: NaFlexConfig
    text: TextConfig

    def __post_init__(self) -> None:
        if self.text.causal:
            raise ConfigError("the text tower of SigLIP is bidirectional: TextConfig(causal=False, ...)")


def preset(dim: int, layers: int, heads: int, hidden: int) -> SigLIP2Config:
    shape: dict[str, Any] = dict(dim=dim, num_layers=layers, num_heads=heads, hidden_dim=hidden, activation="gelu_tanh")
    return SigLIP2Config(
        vision=NaFlexConfig(patch_size=16, num_patches=256, **shape),
        text=TextConfig(vocab_size=256000, context=64, causal=False, norm_eps=1e-6, **shape),
    )


PRESETS = {
    "google/siglip2-base-patch16-naflex": lambda: preset(768, 12, 12, 3072),
    "google/siglip2-so400m-patch16-naflex": lambda: preset(1152, 27, 16, 4304),
}


class NaFlexTower(nn.Module):
    """Blocks over already cut patches, with positions resized to each picture's own grid."""

    def __init__(self, config: NaFlexConfig) -> None:
        super().__init__()
        c = self.config = config
        self.patch_embed = nn.Linear(c.num_channels * c.patch_size**2, c.dim)
        self.position = nn.Parameter(torch.empty(c.num_patches, c.dim))
        self.blocks = nn.ModuleList(
            Block(c.dim, c.num_heads, c.hidden_dim, activation=c.activation, norm_eps=c.norm_eps)
            for _ in range(c.num_layers)
        )
        self.norm = nn.LayerNorm(c.dim, eps=c.norm_eps)

    def positions(self, shapes: Int[Tensor, "batch 2"], length: int) -> Float[Tensor, "batch patches dim"]:
        """Learned positions at each picture's rows and columns; the padding gets zeros."""
        table = rearrange(self.position.float(), "(h w) d -> 1 d h w", h=math.isqrt(self.config.num_patches))
        out = table.new_zeros(shapes.shape[0], length, table.shape[1])
        sizes = [(rows, columns) for rows, columns in shapes.tolist()]
        for size in sorted(set(sizes)):
            grid = F.interpolate(table, size=size, mode="bilinear", align_corners=False, antialias=True)
            rows = [i for i, s in enumerate(sizes) if s == size]
            out[rows, : size[0] * size[1]] = rearrange(grid, "1 d h w -> (h w) d")
        return out

    def forward(
        self,
        patches: Float[Tensor, "batch patches pixels"],
        mask: Bool[Tensor, "batch patches"],
        shapes: Int[Tensor, "batch 2"],
    ) -> Tokens:
        x = self.patch_embed(patches.to(self.patch_embed.weight.dtype))
        x = x + self.positions(shapes, x.shape[1]).to(x.dtype)
        column = shapes[:, 1:]
        index = torch.arange(x.shape[1], device=x.device)
        position = torch.stack([index // column, index % column], -1)
        tokens = Tokens.of(x, causal=False, modality=Modality.IMAGE, valid=mask, position=position)
        see = None if bool(mask.all()) else tokens.mask()
        for block in self.blocks:
            x = block(x, mask=see)
        return tokens.with_x(self.norm(x))


@final
class SigLIP2(DualEncoder):
    """SigLIP with native flexible resolution."""

    config: SigLIP2Config
    images: PatchProcessor | None
    padding: ClassVar[Pad] = "max"

    def __init__(self, config: SigLIP2Config) -> None:
        super().__init__(config)
        v = config.vision
        self.vision = NaFlexTower(v)
        self.pool = AttentionPool(v.dim, v.num_heads, v.hidden_dim, activation=v.activation, norm_eps=v.norm_eps)
        self.text = TextTower(config.text)
        self.text_projection = nn.Linear(config.text.dim, v.dim)
        self.head = SigmoidHead()

    def init_weights(self) -> None:
        """big_vision's scheme, as for SigLIP."""
        siglip_(
            blocks=(*self.vision.blocks, *self.text.blocks),
            layers=(self.vision.patch_embed, self.text_projection),
            tables=(self.vision.position, self.text.position, self.text.embed_tokens.weight),
        )
        self.pool.init_weights()

    def inputs_spec(self) -> dict[str, TensorSpec]:
        v, t = self.config.vision, self.config.text
        side = math.isqrt(v.num_patches)
        return {
            "patches": TensorSpec(shape=(v.num_patches, v.num_channels * v.patch_size**2)),
            "mask": TensorSpec(shape=(v.num_patches,), dtype=torch.bool),
            "shapes": TensorSpec(shape=(2,), dtype=torch.int64, low=side, high=side + 1),
            "ids": TensorSpec(shape=(t.context,), dtype=torch.int64, high=t.vocab_size),
        }

    @property
    def embedding_dim(self) -> int:
        return self.config.vision.dim

    def encode_images(
        self,
        patches: Float[Tensor, "batch patches pixels"],
        mask: Bool[Tensor, "batch patches"],
        shapes: Int[Tensor, "batch 2"],
    ) -> Float[Tensor, "batch dim"]:
        return F.normalize(self.pool(self.vision(patches, mask, shapes)).float(), dim=-1)

    def encode_texts(self, ids: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch dim"]:
        return F.normalize(self.text_projection(self.text(ids).x[:, -1]).float(), dim=-1)

    def count(self, sample: Sample) -> int:
        """Tokens that carry something: the patches of each picture at its own aspect, and full contexts of text."""
        processor = self._processor()
        patches = sum(processor.count(*decode(image).size) for image in sample.images)
        return patches + len(sample.texts) * self.config.text.context

    def _processor(self) -> PatchProcessor:
        if self.images is None:
            raise UnsupportedError(f"this SigLIP2 ({self.source}) has no image processor")
        return self.images

    def prepare_images(self, items: Sequence[Sample]) -> Batch:
        patches, mask, shapes = self._processor()([s.images[0] for s in items])
        return Batch(patches=patches, mask=mask, shapes=shapes)

    def default_images(self) -> PatchProcessor:
        v = self.config.vision
        return PatchProcessor(budget=PatchBudget(patch_size=v.patch_size, max_patches=v.num_patches))

    reference = Reference(
        package="transformers", cls="Siglip2Model",
        inputs={
            "patches": "pixel_values", "mask": "pixel_attention_mask", "shapes": "spatial_shapes", "ids": "input_ids",
        },
        output="logits_per_image", extra={"return_loss": True},
    )  # fmt: skip


SHAPE: FieldTable = (
    *TRANSFORMER_FIELDS,
    ("hidden_act", "activation", "gelu_pytorch_tanh"),
    ("layer_norm_eps", "norm_eps", 1e-6),
)
VISION: FieldTable = (
    *SHAPE,
    ("patch_size", "patch_size", 16),
    ("num_patches", "num_patches", 256),
    ("num_channels", "num_channels", 3),
)
TEXT: FieldTable = (*SHAPE, ("vocab_size", "vocab_size", 32000), ("max_position_embeddings", "context", 64))


def read_hf(raw: Mapping[str, Any]) -> tuple[SigLIP2Config, dict[str, str]]:
    f = Fields(raw)
    f.require("model_type", "siglip2")
    v, t = f.child("vision_config"), f.child("text_config")
    v.require("model_type", "siglip2_vision_model")
    v.require("vision_use_head", True)
    t.require("model_type", "siglip2_text_model")
    for part in (v, t):
        part.require("attention_dropout", 0.0)
    t.ignore("texts have no end token in the pooling: the last position is read", "eos_token_id")
    vision, text = read_fields(v, VISION), read_fields(t, TEXT)
    t.require("projection_size", vision["dim"])
    report = f.done()
    return SigLIP2Config(vision=NaFlexConfig(**vision), text=TextConfig(**text, causal=False)), report


def write_hf(c: SigLIP2Config) -> dict[str, Any]:
    text = write_fields(c.text, TEXT) | {"projection_size": c.vision.dim, "model_type": "siglip2_text_model"}
    vision = write_fields(c.vision, VISION) | {"model_type": "siglip2_vision_model"}
    return {"architectures": ["Siglip2Model"], "model_type": "siglip2", "text_config": text, "vision_config": vision}


def rules_hf(config: SigLIP2Config) -> list[Rule]:
    return [rule("vision_model.embeddings.patch_embedding.{p}", "vision.patch_embed.{p}"), *siglip_rules()]


SigLIP2.formats = {"hf": Format(read=read_hf, write=write_hf, rules=rules_hf)}
