"""What PaliGemma and the policies on it share: SigLIP, a linear layer, a Gemma that reads a prefix both ways. Not a
system itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polymodal.backbones.decoder import DecoderConfig
from polymodal.backbones.families import FAMILIES, ControlIds
from polymodal.connectors.mlp import Projector
from polymodal.core.batch import Batch
from polymodal.core.tokens import Modality, Tokens
from polymodal.core.verbs import TensorSpec
from polymodal.encoders.vision_families import VISION_FAMILIES
from polymodal.encoders.vit import ViT, ViTConfig
from polymodal.heads.lm import IGNORE
from polymodal.modalities.image import HALF, Exact, Frame, ImageProcessor, Within
from polymodal.systems.tower import TowerConfig, TowerGenerator
from polymodal.weights.fields import Fields
from polymodal.weights.rules import Rule, rule

TOWER: Final = "siglip_vision_model"


@dataclass(frozen=True, kw_only=True)
class PrefixConfig(TowerConfig):
    """A SigLIP tower, a linear layer and a Gemma."""

    @property
    def read_layers(self) -> None:
        return None


@torch.no_grad()
def init_sight(vision: ViT, connector: Projector) -> None:
    """Fresh weights of what sees; the linear layer starts at zero, as in big_vision."""
    VISION_FAMILIES[TOWER].init(vision)
    for layer in connector.layers:
        nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]


def framed(side: int) -> ImageProcessor:
    """Whole pictures in squares, with black where their shape leaves some over: as openpi's policies see them."""
    square = {"height": side, "width": side}
    return ImageProcessor(resize=Within(**square), crop=Frame(**square), resample="bilinear", mean=HALF, std=HALF)


class PrefixGenerator(TowerGenerator):
    """Base of those that write an answer behind a prefix of pictures and text, which sees itself whole."""

    config: PrefixConfig
    has_template = False

    def __init__(self, config: PrefixConfig) -> None:
        super().__init__(config)
        self.vision.norm.requires_grad_(True)  # unlike LLaVA, the last norm is read

    @torch.no_grad()
    def init_weights(self) -> None:
        init_sight(self.vision, self.connector)
        self.backbone.init_weights()

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
        return replace(tokens, block=(batch["labels"] != IGNORE).cumsum(1))

    def plain_from(self, batch: Batch) -> int:
        """A prompt is read both ways: none of it can be read by itself."""
        return int(batch["ids"].shape[1])

    def default_images(self) -> ImageProcessor:
        side = self.config.vision.image_size
        return ImageProcessor(resize=Exact(height=side, width=side), resample="bicubic", mean=HALF, std=HALF)


def read_parts(f: Fields, *model_types: str) -> dict[str, Any]:
    """PaliGemma's parts, from the fields of its config, or of one of these kinds."""
    f.require("model_type", "paligemma", *model_types)
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
    return {
        "vision": vision, "family": family.model_type, "backbone": backbone,
        "image_id": f.take("image_token_id" if "image_token_id" in f else "image_token_index", int, 256000),
        "control": ControlIds.read(t if "eos_token_id" in t else f, family.control),
    }  # fmt: skip


def write_parts(
    vision: ViTConfig, family: str, backbone: DecoderConfig, image_id: int, control: ControlIds
) -> dict[str, Any]:
    """The fields of `read_parts`."""
    text = {
        "model_type": family, **FAMILIES[family].write(backbone), **control.write(),
        "num_image_tokens": vision.grid**2, "use_bidirectional_attention": True,
    }  # fmt: skip
    return {
        "model_type": "paligemma", "text_config": text, "projection_dim": backbone.dim, "image_token_index": image_id,
        "vision_config": VISION_FAMILIES[TOWER].write(vision) | {"projection_dim": backbone.dim},
        "tie_word_embeddings": backbone.tied,
    }  # fmt: skip


def rules_of_parts(base: str) -> list[Rule]:
    """The names of what sees, in a model whose names begin with ``base``; those of the Gemma are its family's."""
    return [
        *VISION_FAMILIES[TOWER].rules(f"{base}vision_tower", "vision"),
        rule(f"{base}multi_modal_projector.linear.{{p}}", "connector.layers.0.{p}"),
    ]


def rules_hf(c: PrefixConfig) -> list[Rule]:
    """Of a whole model."""
    family = FAMILIES[c.family]
    text = family.rules(c.backbone, f"language_model.{family.base}", "language_model.lm_head", "backbone")
    return [*rules_of_parts(""), *text]


SO400M: Final[Mapping[str, Any]] = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
    "patch_size": 14, "image_size": 224, "model_type": TOWER,
}  # fmt: skip
GEMMA: Final[Mapping[str, Any]] = {
    "model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18,
    "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 257216,
}  # fmt: skip
