"""The vision towers of the Hub that larger systems build on: their configs, and how they name their weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from polymodal.encoders.vit import ViT, ViTConfig
from polymodal.nn.init import openai_vision_, siglip_
from polymodal.weights.fields import IMAGE_FIELDS, TRANSFORMER_FIELDS, Fields, FieldTable, read_fields, write_fields
from polymodal.weights.layouts import FEED_FORWARD, clip_blocks
from polymodal.weights.rules import Rule, Split, Squeeze, drop, read_only, renames, rule


@dataclass(frozen=True, kw_only=True)
class VisionFamily:
    """One `model_type` of a tower without its pooled head.

    Attributes:
        read: the ``vision_config`` of a system -> `ViTConfig`.
        write: the reverse.
        rules: (what their names begin with, our prefix) -> rules.
        init: fresh weights, as the tower's paper has them.
    """

    model_type: str
    read: Callable[[Fields], ViTConfig]
    write: Callable[[ViTConfig], dict[str, Any]]
    rules: Callable[[str, str], list[Rule]]
    init: Callable[[ViT], None]


_CLIP: Final[FieldTable] = (
    *TRANSFORMER_FIELDS, *IMAGE_FIELDS[::2], ("patch_size", "patch_size", 32),
    ("hidden_act", "activation", "quick_gelu"), ("layer_norm_eps", "norm_eps", 1e-5),
)  # fmt: skip
_SIGLIP: Final[FieldTable] = (
    *TRANSFORMER_FIELDS, *IMAGE_FIELDS, ("hidden_act", "activation", "gelu_pytorch_tanh"),
    ("layer_norm_eps", "norm_eps", 1e-6),
)  # fmt: skip
_BLIP2: Final[FieldTable] = (
    ("hidden_size", "dim", 1408), ("num_hidden_layers", "num_layers", 39), ("num_attention_heads", "num_heads", 16),
    ("intermediate_size", "hidden_dim", 6144), ("image_size", "image_size", 224), ("patch_size", "patch_size", 14),
    ("hidden_act", "activation", "gelu"), ("layer_norm_eps", "norm_eps", 1e-6), ("qkv_bias", "qkv_bias", True),
)  # fmt: skip


def _read(f: Fields, table: FieldTable, fixed: Mapping[str, Any]) -> ViTConfig:
    f.require("attention_dropout", 0.0)
    f.require("dropout", 0.0)
    f.require("vision_use_head", False)
    f.ignore(
        "of heads that are not used here", "projection_dim", "projector_hidden_act", "vocab_size", "num_image_tokens",
        "num_positions",
    )  # fmt: skip
    return ViTConfig(**read_fields(f, table), **fixed)


def _write(table: FieldTable, model_type: str, more: Mapping[str, Any]) -> Callable[[ViTConfig], dict[str, Any]]:
    return lambda config: {**write_fields(config, table), "model_type": model_type, **more}


def _named(theirs: str, ours: str, *, clip: bool) -> list[Rule]:
    only_clip = [
        rule(f"{theirs}.embeddings.class_embedding", f"{ours}.class_token"),
        rule(f"{theirs}.pre_layrnorm.{{p}}", f"{ours}.pre_norm.{{p}}"),
    ]
    return [
        rule(f"{theirs}.embeddings.patch_embedding.{{p}}", f"{ours}.patch_embed.{{p}}"),
        rule(f"{theirs}.embeddings.position_embedding.weight", f"{ours}.position"),
        rule(f"{theirs}.post_layernorm.{{p}}", f"{ours}.norm.{{p}}"),
        *clip_blocks(f"{theirs}.encoder", f"{ours}.blocks"),
        *(only_clip if clip else []),
        drop(f"{theirs}.embeddings.position_ids", "0, 1, 2, ...: a buffer of older transformers"),
    ]


def _rules(*, clip: bool) -> Callable[[str, str], list[Rule]]:
    # Files of transformers 4 have one level more.
    return lambda theirs, ours: [
        *_named(theirs, ours, clip=clip),
        *read_only(_named(f"{theirs}.vision_model", ours, clip=clip)),
    ]


@torch.no_grad()
def _init_clip(tower: ViT) -> None:
    assert tower.class_token is not None
    for parameter in (tower.class_token, tower.position):
        nn.init.normal_(parameter, std=tower.config.dim**-0.5)
    openai_vision_(tower.blocks)


def _init_siglip(tower: ViT) -> None:
    siglip_(blocks=tower.blocks, layers=[tower.patch_embed], tables=[tower.position])


def _read_blip2(f: Fields) -> ViTConfig:
    f.require("num_channels", 3)
    return _read(f, _BLIP2, {})


def _blip2_rules(theirs: str, ours: str) -> list[Rule]:
    e, t, o = f"{theirs}.embeddings", f"{theirs}.encoder.layers.{{i}}", f"{ours}.blocks.{{i}}"
    return [
        rule(f"{e}.class_embedding", f"{ours}.class_token", Squeeze((0, 1))),
        rule(f"{e}.position_embedding", f"{ours}.position", Squeeze((0,))),
        rule(f"{e}.patch_embedding.{{p}}", f"{ours}.patch_embed.{{p}}"),
        rule(f"{t}.self_attn.qkv.{{p}}", [f"{o}.attn.{n}_proj.{{p}}" for n in "qkv"], Split(3)),
        *renames(t, o, {
            "self_attn.projection": "attn.o_proj", "layer_norm1": "attn_norm", "layer_norm2": "mlp_norm",
            **FEED_FORWARD,
        }),
        rule(f"{theirs}.post_layernorm.{{p}}", f"{ours}.norm.{{p}}"),
    ]  # fmt: skip


@torch.no_grad()
def _init_eva(tower: ViT) -> None:
    """EVA's: normals cut at two deviations, what joins the residual smaller with depth."""
    assert tower.class_token is not None
    for parameter in (tower.class_token, tower.position, tower.patch_embed.weight):
        nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)
    if tower.patch_embed.bias is not None:
        nn.init.zeros_(tower.patch_embed.bias)
    for depth, block in enumerate(tower.blocks, 1):
        for name, layer in block.named_modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02, a=-0.04, b=0.04)
                if name.endswith(("o_proj", "down_proj")):
                    layer.weight.div_((2 * depth) ** 0.5)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)


_LIST: Final = (
    VisionFamily(
        model_type="clip_vision_model",
        read=lambda f: _read(f, _CLIP, {"patch_bias": False, "pre_norm": True}),
        write=_write(_CLIP, "clip_vision_model", {}),
        rules=_rules(clip=True),
        init=_init_clip,
    ),
    VisionFamily(
        model_type="siglip_vision_model",
        read=lambda f: _read(f, _SIGLIP, {"class_token": False}),
        write=_write(_SIGLIP, "siglip_vision_model", {"vision_use_head": False}),
        rules=_rules(clip=False),
        init=_init_siglip,
    ),
    VisionFamily(
        model_type="blip_2_vision_model",
        read=_read_blip2,
        write=_write(_BLIP2, "blip_2_vision_model", {}),
        rules=_blip2_rules,
        init=_init_eva,
    ),
)
VISION_FAMILIES: Final[Mapping[str, VisionFamily]] = {family.model_type: family for family in _LIST}
