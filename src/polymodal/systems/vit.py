"""ViT: a Transformer over patches that names what is in a picture.

Paper: Dosovitskiy et al., "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale", 2020,
https://arxiv.org/abs/2010.11929. Official code: google-research/vision_transformer.
Hub: google/vit-base-patch16-224, google/vit-large-patch16-384, ...

    picture -> patches + class token + positions -> pre-norm blocks -> norm -> class token -> linear -> cross-entropy

Training details kept here: the initialisation of the official JAX code (Xavier-uniform matrices, MLP biases of standard
deviation 1e-6, positions of 0.02, class token and head zero). At another size than the native one the grid of
positions is resized, the class token's is kept.

Deviations: the last block computes only the class token's row (the other rows are not read), which leaves every output
as it is. The paper's pre-training head with a hidden tanh layer is not here: published checkpoints end in one linear
layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from polymodal.core.batch import Batch, Loss
from polymodal.core.errors import ConfigError
from polymodal.core.sample import Sample
from polymodal.core.verbs import TensorSpec
from polymodal.encoders.vit import ViT, ViTConfig
from polymodal.heads.classification import classification_loss
from polymodal.modalities.image import HALF, Exact, ImageProcessor
from polymodal.nn.init import lecun_normal_, siglip_tower_
from polymodal.systems.base import Embedder, Format, Reference
from polymodal.weights.fields import IMAGE_FIELDS, TRANSFORMER_FIELDS, Fields, FieldTable, read_fields, write_fields
from polymodal.weights.layouts import vit_blocks, vit_embeddings
from polymodal.weights.rules import Rule, rule


@dataclass(frozen=True, kw_only=True)
class VisionTransformerConfig:
    """A tower and the names of its classes."""

    vision: ViTConfig
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.labels:
            raise ConfigError("a classifier needs at least one label")


def preset(patch: int, size: int, dim: int, layers: int, heads: int, classes: int) -> VisionTransformerConfig:
    return VisionTransformerConfig(
        vision=ViTConfig(
            image_size=size, patch_size=patch, dim=dim, num_layers=layers, num_heads=heads, hidden_dim=4 * dim,
            norm_eps=1e-12,
        ),
        labels=tuple(f"LABEL_{i}" for i in range(classes)),
    )  # fmt: skip


PRESETS = {
    "google/vit-base-patch16-224": lambda: preset(16, 224, 768, 12, 12, 1000),
    "google/vit-base-patch16-384": lambda: preset(16, 384, 768, 12, 12, 1000),
    "google/vit-large-patch16-224": lambda: preset(16, 224, 1024, 24, 16, 1000),
}


@final
class VisionTransformer(Embedder):
    """A Vision Transformer classifier; its vector of a picture is the class token."""

    config: VisionTransformerConfig

    def __init__(self, config: VisionTransformerConfig) -> None:
        super().__init__(config)
        self.vision = ViT(config.vision)
        self.head = nn.Linear(config.vision.dim, len(config.labels))

    @torch.no_grad()
    def init_weights(self) -> None:
        """The official JAX code's scheme."""
        assert self.vision.class_token is not None
        siglip_tower_(self.vision.blocks)
        lecun_normal_(self.vision.patch_embed)
        nn.init.normal_(self.vision.position, std=0.02)
        for parameter in (self.vision.class_token, self.head.weight, self.head.bias):
            nn.init.zeros_(parameter)

    def inputs_spec(self) -> dict[str, TensorSpec]:
        v = self.config.vision
        return {
            "pixels": TensorSpec(shape=(v.num_channels, v.image_size, v.image_size)),
            "labels": TensorSpec(shape=(), dtype=torch.int64, high=len(self.config.labels)),
        }

    @property
    def embedding_dim(self) -> int:
        return self.config.vision.dim

    def encode(self, batch: Batch) -> Float[Tensor, "samples dim"]:
        """The class token after the last norm, at unit length."""
        return F.normalize(self.vision.class_vector(batch["pixels"].to(self.device)).float(), dim=-1)

    def forward(self, batch: Batch) -> Float[Tensor, "batch classes"]:
        """A logit for each of ``config.labels``."""
        return self.head(self.vision.class_vector(batch["pixels"]))

    def loss(self, batch: Batch) -> Loss:
        return classification_loss(self(batch), batch["labels"])

    def count(self, sample: Sample) -> int:
        """Tokens that the tower computes for the pictures of a sample."""
        side = self.config.vision.image_size
        return len(sample.images) * self.config.vision.count(side, side)

    def default_images(self) -> ImageProcessor:
        side = self.config.vision.image_size
        return ImageProcessor(resize=Exact(height=side, width=side), resample="bilinear", mean=HALF, std=HALF)

    reference = Reference(
        package="transformers", cls="ViTForImageClassification", inputs={"pixels": "pixel_values", "labels": "labels"},
        output="logits",
    )  # fmt: skip


VISION: FieldTable = (
    *TRANSFORMER_FIELDS, *IMAGE_FIELDS, ("hidden_act", "activation", "gelu"), ("layer_norm_eps", "norm_eps", 1e-12),
    ("qkv_bias", "qkv_bias", True),
)  # fmt: skip


def read_hf(raw: Mapping[str, Any]) -> tuple[VisionTransformerConfig, dict[str, str]]:
    f = Fields(raw)
    f.require("model_type", "vit")
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        f.require(name, 0.0)
    f.ignore("the head of masked image modelling is not in these files", "encoder_stride")
    f.ignore("the classifier reads the class token without a pooler", "pooler_act", "pooler_output_size")
    vision = read_fields(f, VISION)
    names = f.take("id2label", dict, {"0": "LABEL_0", "1": "LABEL_1"})
    if set(names) != {str(i) for i in range(len(names))} or not all(isinstance(n, str) for n in names.values()):
        f.problems.append(f"config.json: the keys of id2label are not 0 to {len(names) - 1}, or a label is no string")
    report = f.done()
    labels = tuple(names[str(i)] for i in range(len(names)))
    return VisionTransformerConfig(vision=ViTConfig(**vision), labels=labels), report


def write_hf(c: VisionTransformerConfig) -> dict[str, Any]:
    labels = {
        "id2label": {str(i): label for i, label in enumerate(c.labels)},
        "label2id": {label: i for i, label in enumerate(c.labels)},
    }
    fields = write_fields(c.vision, VISION) | labels
    raw = {"architectures": ["ViTForImageClassification"], "model_type": "vit"} | fields
    if read_hf(raw)[0] != replace(c, vision=replace(c.vision, drop_path=0.0)):
        raise ConfigError(f"the Hub's format has no field for something in this config: {c}")
    return raw


def rules_hf(config: VisionTransformerConfig) -> list[Rule]:
    return [
        *vit_embeddings("vit.", "vision"),
        *vit_blocks("vit.encoder.layer", "vision.blocks"),
        rule("vit.layernorm.{p}", "vision.norm.{p}"),
        rule("classifier.{p}", "head.{p}"),
    ]


VisionTransformer.formats = {"hf": Format(read=read_hf, write=write_hf, rules=rules_hf)}
