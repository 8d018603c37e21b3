"""What the systems of the LLaVA family share: a tower, a connector and a decoder. Not a system itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from jaxtyping import Float
from PIL import Image as PILImage
from torch import Tensor

from polymodal.backbones.decoder import Decoder, DecoderConfig
from polymodal.backbones.encdec import EncDecConfig
from polymodal.backbones.families import FAMILIES, ControlIds
from polymodal.connectors.mlp import MLP, Connector, init_connector
from polymodal.core.batch import Batch
from polymodal.core.chat import Chat
from polymodal.core.errors import ConfigError, UnsupportedError
from polymodal.core.verbs import TensorSpec
from polymodal.encoders.vision_families import VISION_FAMILIES
from polymodal.encoders.vit import ViT, ViTConfig
from polymodal.modalities.image import CLIP_MEAN, CLIP_STD, HALF, IMAGENET_MEAN, IMAGENET_STD, Exact, ImageProcessor
from polymodal.modalities.stacked import Colour
from polymodal.nn.rope import Rope
from polymodal.systems.generator import Generator
from polymodal.weights.fields import ACTIVATION_NAMES, ACTIVATIONS, Fields
from polymodal.weights.rules import Rule, rule

# Of presets: CLIP's tower at 336 pixels, and Vicuna 7B with rows for the placeholders.
CLIP_336: Final = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14, "projection_dim": 768, "model_type": "clip_vision_model",
}  # fmt: skip
VICUNA: Final = {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}


def colours(tower: ViTConfig) -> tuple[Colour, Colour]:
    """Mean and deviation of the pixels that towers of this kind (DINOv2, CLIP, else SigLIP and ViT) read."""
    if tower.layer_scale is not None:
        return IMAGENET_MEAN, IMAGENET_STD
    return (CLIP_MEAN, CLIP_STD) if tower.pre_norm else (HALF, HALF)


def squares(tower: ViTConfig) -> ImageProcessor:
    """Whole pictures as a fresh tower of this kind may well read them; a trained one has a processor of its own."""
    mean, std = colours(tower)
    return ImageProcessor(resize=Exact(height=tower.image_size, width=tower.image_size), mean=mean, std=std)


def refuse_axes(backbone: DecoderConfig | EncDecConfig) -> None:
    """A `ConfigError` if the backbone reads positions that a composition does not lay out."""
    if isinstance(backbone.position, Rope) and backbone.position.sections is not None:
        raise ConfigError("a backbone with positions in three axes (M-RoPE) needs a grid that only Qwen-VL lays out")


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """A tower, a connector and a decoder.

    Attributes:
        vision_family: the `model_type` under whose names the Hub keeps the tower.
        layers: how many of the tower's layers are read.
        keep_class: whether the class token is a feature, too.
        family: the `model_type` of the language model.
        image_id: the token in whose place a feature is put.
    """

    vision_family: str
    vision: ViTConfig
    layers: int
    connector: Connector
    family: str
    backbone: DecoderConfig
    image_id: int
    control: ControlIds = field(default_factory=ControlIds)
    keep_class: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.layers <= self.vision.num_layers:
            raise ConfigError(f"features of layer {self.layers} of a tower of {self.vision.num_layers}")
        if not 0 <= self.image_id < self.backbone.vocab_size:
            raise ConfigError(f"the placeholder {self.image_id} is not in a vocabulary of {self.backbone.vocab_size}")

    @property
    def read_layers(self) -> int | None:
        """The layers that are read, of which the last norm is not one; None reads it, too."""
        return self.layers

    @property
    def num_features(self) -> int:
        """Vectors that a picture becomes."""
        prefix = 0 if self.keep_class else self.vision.num_prefix
        side = self.vision.image_size
        return self.connector.count(self.vision.count(side, side) - prefix)


class TowerGenerator(Generator):
    """Base of the LLaVA family: `TowerConfig`'s parts, built and initialised."""

    config: TowerConfig

    def __init__(self, config: TowerConfig) -> None:
        super().__init__(config)
        c = config
        self.vision = ViT(c.vision)
        self.connector = c.connector.build(c.vision.dim, c.backbone.dim)
        self.backbone = Decoder(c.backbone)
        self.media_id, self.stop_ids = c.image_id, c.control.stop
        # Nothing reads them; they are kept for the file's sake.
        self.vision.blocks[c.layers :].requires_grad_(False)
        self.vision.norm.requires_grad_(False)

    @torch.no_grad()
    def init_weights(self) -> None:
        VISION_FAMILIES[self.config.vision_family].init(self.vision)
        init_connector(self.connector)
        self.backbone.init_weights()

    def inputs_spec(self) -> dict[str, TensorSpec]:
        v, n = self.config.vision, self.config.num_features
        text = TensorSpec(shape=(n + 6,), dtype=torch.int64, low=3, high=min(self.vocab_size, self.config.image_id))
        return {
            "ids": replace(text, head=(self.config.image_id,) * n),
            "labels": text,
            "pixels": TensorSpec(shape=(v.num_channels, v.image_size, v.image_size)),
            "pixels_row": TensorSpec(shape=(), dtype=torch.int64, rows=True),
        }

    def see(self, pictures: Sequence[PILImage.Image]) -> tuple[list[list[int]], Batch]:
        return self.see_whole(pictures, self.config.num_features)

    def features(self, batch: Batch) -> Float[Tensor, "features dim"]:
        return self.project(batch["pixels"]).flatten(0, 1)

    def write_prompt(self, chat: Chat) -> list[int]:
        """As the Hub's processors of this family do: the token that begins every text comes first."""
        ids = super().write_prompt(chat)
        assert self.tokenizer is not None
        start = list(self.tokenizer.prefix)
        return ids if ids[: len(start)] == start else start + ids

    def project(self, pixels: Float[Tensor, "images channels height width"]) -> Float[Tensor, "images tokens dim"]:
        """The features of pictures or tiles, as the backbone reads them."""
        x = self.vision(pixels, layers=self.config.read_layers).x
        return self.connector(x if self.config.keep_class else x[:, self.config.vision.num_prefix :])


def read_parts(f: Fields) -> dict[str, Any]:
    """What LLaVA and LLaVA-NeXT have in common, from the fields of their configs."""
    v, t = f.child("vision_config"), f.child("text_config")
    tower = VISION_FAMILIES[v.choose("model_type", {n: n for n in VISION_FAMILIES}, "clip_vision_model")]
    family = FAMILIES[t.choose("model_type", {n: n for n in FAMILIES}, "llama")]
    vision, backbone = tower.read(v), family.read(t)
    layer = f.take("vision_feature_layer", int, -2, least=-vision.num_layers - 1)
    select = f.choose("vision_feature_select_strategy", {"default": False, "full": True}, "default")
    if not (select or vision.class_token):
        f.problems.append("vision_feature_select_strategy default drops a patch of a tower without class token")
    f.ignore("it follows from the tower and the connector", "image_seq_length")
    f.ignore("the placeholder has a row in the text's vocabulary", "ignore_index", "vocab_size", "pad_token_id")
    connector = MLP(
        activation=f.choose("projector_hidden_act", ACTIVATIONS, "gelu"),
        bias=f.take("multimodal_projector_bias", bool, True),
    )
    image_id = f.take("image_token_id" if "image_token_id" in f else "image_token_index", int, 32000)
    return {
        "vision_family": tower.model_type, "vision": vision, "connector": connector, "family": family.model_type,
        "backbone": backbone, "image_id": image_id, "control": ControlIds.read(t, family.control),
        "keep_class": select and vision.class_token,
        "layers": layer if layer >= 0 else vision.num_layers + 1 + layer,
    }  # fmt: skip


def write_parts(c: Any) -> dict[str, Any]:
    """The fields of `read_parts`."""
    if not isinstance(c.connector, MLP) or c.connector.layers != 2:
        raise UnsupportedError("the Hub's format of LLaVA has a connector of two linear layers only")
    text = {"model_type": c.family, **FAMILIES[c.family].write(c.backbone), **c.control.write()}
    return {
        "vision_config": VISION_FAMILIES[c.vision_family].write(c.vision), "text_config": text,
        "vision_feature_layer": c.layers - c.vision.num_layers - 1,
        "vision_feature_select_strategy": "default" if c.vision.class_token and not c.keep_class else "full",
        "projector_hidden_act": ACTIVATION_NAMES[c.connector.activation], "multimodal_projector_bias": c.connector.bias,
        "image_token_index": c.image_id, "image_seq_length": c.num_features,
        "tie_word_embeddings": c.backbone.tied,
    }  # fmt: skip


def rules_of_parts(c: TowerConfig) -> list[Rule]:
    """The names of tower, connector and decoder."""
    family = FAMILIES[c.family]
    return [
        *VISION_FAMILIES[c.vision_family].rules("vision_tower", "vision"),
        *(rule(f"multi_modal_projector.linear_{n + 1}.{{p}}", f"connector.layers.{n}.{{p}}") for n in range(2)),
        *family.rules(c.backbone, f"language_model.{family.base}", "language_model.lm_head", "backbone"),
    ]
