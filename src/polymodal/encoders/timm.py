"""Vision towers of timm that larger systems build on: their sizes by name, and how timm names their weights.

Source: huggingface/pytorch-image-models, ``vision_transformer.py`` of 0.9, with which Prismatic was trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polymodal.encoders.pooling import AttentionPool
from polymodal.encoders.vit import ViT, ViTConfig
from polymodal.weights.layouts import FEED_FORWARD
from polymodal.weights.rules import Rule, Split, Squeeze, renames, rule

_LARGE: Final[dict[str, Any]] = {"dim": 1024, "num_layers": 24, "num_heads": 16, "hidden_dim": 4096}
_SO400M: Final[dict[str, Any]] = {"dim": 1152, "num_layers": 27, "num_heads": 16, "hidden_dim": 4304}


def _siglip(size: int) -> ViTConfig:
    # timm's SigLIP has the exact GELU, big_vision's the tanh form.
    return ViTConfig(image_size=size, patch_size=14, class_token=False, activation="gelu", **_SO400M)


def _clip(size: int) -> ViTConfig:
    own: dict[str, Any] = {"pre_norm": True, "patch_bias": False, "activation": "quick_gelu", "norm_eps": 1e-5}
    return ViTConfig(image_size=size, patch_size=14, **own, **_LARGE)


TOWERS: Final[Mapping[str, ViTConfig]] = {
    "vit_large_patch14_reg4_dinov2.lvd142m": ViTConfig(
        image_size=518, patch_size=14, num_registers=4, class_position=False, layer_scale=1e-5, **_LARGE
    ),
    "vit_so400m_patch14_siglip_224": _siglip(224),
    "vit_so400m_patch14_siglip_384": _siglip(384),
    "vit_large_patch14_clip_224.openai": _clip(224),
    "vit_large_patch14_clip_336.openai": _clip(336),
    "vit_large_patch16_224.augreg_in21k_ft_in1k": ViTConfig(image_size=224, patch_size=16, **_LARGE),
}


def activations(names: Sequence[str]) -> list[str | None]:
    """What timm is to build these towers with in place of its GELU."""
    return ["quick_gelu" if TOWERS[name].activation == "quick_gelu" else None for name in names]


class PatchTower(nn.Module):
    """The patches of a ViT before its last layer, without its class token and registers.

    The last layer, the last norm and SigLIP's pooled head are kept for the file's sake: nothing reads them, and they
    never train.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        c = self.config = config
        self.vit = ViT(c)
        self.pool = None
        if not c.class_token:
            assert c.activation != "swiglu"
            self.pool = AttentionPool(c.dim, c.num_heads, c.hidden_dim, activation=c.activation, norm_eps=c.norm_eps)
            self.pool.requires_grad_(False)
        self.vit.blocks[-1].requires_grad_(False)
        self.vit.norm.requires_grad_(False)

    def init_weights(self) -> None:
        init_timm(self.vit)
        if self.pool is not None:
            self.pool.init_weights()

    def forward(self, pixels: Float[Tensor, "images channels height width"]) -> Float[Tensor, "images patches dim"]:
        return self.vit(pixels, layers=self.config.num_layers - 1).x[:, self.config.num_prefix :]


@torch.no_grad()
def init_timm(tower: ViT) -> None:
    """timm's scheme: truncated normals of 0.02; class token and registers 1e-6, mask token zero."""
    nn.init.trunc_normal_(tower.position, std=0.02)
    for tokens in (tower.class_token, tower.registers):
        if tokens is not None:
            nn.init.normal_(tokens, std=1e-6)
    if tower.mask_token is not None:
        nn.init.zeros_(tower.mask_token)
    for module in tower.modules():  # the patch convolution keeps torch's default, as timm's does
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def timm_rules(theirs: str, ours: str, *, scale: str = "gamma") -> list[Rule]:
    """The names of a `PatchTower`; ``scale`` is what the file calls the scales of a layer."""
    v, p = f"{ours}.vit", f"{ours}.pool"
    t, o = f"{theirs}.blocks.{{i}}", f"{v}.blocks.{{i}}"
    qkv, kv = ([f"{o}.attn.{n}_proj.{{p}}" for n in "qkv"], [f"{p}.attn.{n}_proj.{{p}}" for n in "kv"])
    return [
        rule(f"{theirs}.cls_token", f"{v}.class_token", Squeeze((0, 1))),
        rule(f"{theirs}.reg_token", f"{v}.registers", Squeeze((0,))),
        rule(f"{theirs}.pos_embed", f"{v}.position", Squeeze((0,))),
        *renames(theirs, v, {"patch_embed.proj": "patch_embed", "norm_pre": "pre_norm", "norm": "norm"}),
        rule(f"{t}.attn.qkv.{{p}}", qkv, Split(3)),
        *renames(t, o, {"attn.proj": "attn.o_proj", "norm1": "attn_norm", "norm2": "mlp_norm", **FEED_FORWARD}),
        rule(f"{t}.ls1.{scale}", f"{o}.attn_scale.weight"),
        rule(f"{t}.ls2.{scale}", f"{o}.mlp_scale.weight"),
        rule(f"{theirs}.attn_pool.latent", f"{p}.probe", Squeeze((0, 1))),
        rule(f"{theirs}.attn_pool.kv.{{p}}", kv, Split(2)),
        *renames(f"{theirs}.attn_pool", p, {"q": "attn.q_proj", "proj": "attn.o_proj", "norm": "norm", **FEED_FORWARD}),
    ]
