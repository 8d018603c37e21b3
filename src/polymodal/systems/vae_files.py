"""How diffusers writes the autoencoder of latent diffusion (its ``AutoencoderKL``): config fields and names."""

from __future__ import annotations

from typing import Any, Final

from polymodal.tokenizers.pyramid import PyramidConfig
from polymodal.tokenizers.vae import VAEConfig
from polymodal.weights.fields import MOST_LAYERS, MOST_LEVELS, Fields
from polymodal.weights.layouts import QUERY_KEY_VALUE, TO_PROJECTIONS
from polymodal.weights.rules import Rule, read_only, renames, rule

CLASS: Final = "AutoencoderKL"
_DOWN, _UP = "DownEncoderBlock2D", "UpDecoderBlock2D"
_BLOCK = {n: n for n in ("norm1", "conv1", "norm2", "conv2")} | {"conv_shortcut": "shortcut"}
_OLD_PROJECTIONS = {**QUERY_KEY_VALUE, "proj_attn": "o_proj"}  # files of 2022


def read_vae(f: Fields) -> VAEConfig:
    """The config of an autoencoder; what is wrong is added to the problems of ``f``."""
    f.require("act_fn", "silu")
    f.ignore("the size of the training pictures", "sample_size")
    f.ignore("about fp16, which nothing here computes in", "force_upcast")
    for name in ("latents_mean", "latents_std"):
        f.require(name, None)
    widths = f.numbers("block_out_channels", int, longest=MOST_LEVELS) or (32,)
    for name, kind in (("down_block_types", _DOWN), ("up_block_types", _UP)):
        f.require(name, [kind] * len(widths))
    channels, groups = f.take("in_channels", int, 3), f.take("norm_num_groups", int, 32)
    f.require("out_channels", channels)
    mixed = f.take("use_quant_conv", bool, True)
    f.require("use_post_quant_conv", mixed)
    if "use_post_quant_conv" not in f and not mixed:
        f.problems.append("vae: use_quant_conv without use_post_quant_conv is not supported")
    if any(width < 1 or width % groups for width in widths):
        f.problems.append(f"vae: block_out_channels {widths} are not multiples of norm_num_groups {groups}")
        widths, groups = (1,), 1
    blocks = f.take("layers_per_block", int, 1, most=MOST_LAYERS // len(widths))
    middle = f.take("mid_block_add_attention", bool, True)
    scale, shift = f.take("scaling_factor", float, 0.18215), f.optional("shift_factor", float) or 0.0
    if not scale:
        f.problems.append("vae: a scaling_factor of 0 would make all latents 0")
        scale = 1.0
    return VAEConfig(
        pyramid=PyramidConfig(
            channels=channels, widths=widths, num_blocks=blocks, middle_attention=middle,
            latent_dim=f.take("latent_channels", int, 4), groups=groups,
        ),
        scale=scale, shift=shift, mixed=mixed,
    )  # fmt: skip


def write_vae(c: VAEConfig) -> dict[str, Any]:
    """The fields that `read_vae` reads."""
    p, levels = c.pyramid, len(c.pyramid.widths)
    return {
        "act_fn": "silu", "in_channels": p.channels, "out_channels": p.channels, "latent_channels": p.latent_dim,
        "block_out_channels": list(p.widths), "layers_per_block": p.num_blocks, "norm_num_groups": p.groups,
        "down_block_types": [_DOWN] * levels, "up_block_types": [_UP] * levels, "sample_size": 64 * p.factor,
        "mid_block_add_attention": p.middle_attention, "scaling_factor": c.scale, "shift_factor": c.shift or None,
        "use_quant_conv": c.mixed, "use_post_quant_conv": c.mixed,
    }  # fmt: skip


def vae_rules(theirs: str, ours: str, c: VAEConfig) -> list[Rule]:
    """The tensors of an autoencoder; both prefixes end in a dot, or are empty."""
    rules = [
        rule(f"{theirs}quant_conv.{{p}}", f"{ours}mix.{{p}}"),
        rule(f"{theirs}post_quant_conv.{{p}}", f"{ours}unmix.{{p}}"),
    ]
    last = len(c.pyramid.widths) - 1
    for part, way, resample in (("encoder", "down", "downsamplers"), ("decoder", "up", "upsamplers")):
        t, o = f"{theirs}{part}", f"{ours}{part}"
        rules += renames(t, o, {"conv_in": "first", "conv_norm_out": "norm", "conv_out": "last"})
        rules += renames(f"{t}.mid_block.resnets.{{j}}", f"{o}.middle.blocks.{{j}}", _BLOCK)
        attention = f"{t}.mid_block.attentions.0"
        rules += renames(attention, f"{o}.middle.attn", {"group_norm": "norm", **TO_PROJECTIONS})
        rules += read_only(renames(attention, f"{o}.middle.attn", _OLD_PROJECTIONS))
        for level in range(last + 1):
            stage = f"{t}.{way}_blocks.{level if way == 'down' else last - level}"
            rules += renames(f"{stage}.resnets.{{j}}", f"{o}.levels.{level}.blocks.{{j}}", _BLOCK)
            rules += renames(stage, f"{o}.levels.{level}", {f"{resample}.0.conv": "resample.conv"})
    return rules
