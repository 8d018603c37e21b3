"""How diffusers writes the autoencoders of latent diffusion: config fields and names of its ``AutoencoderKL``, and of
its ``AutoencoderKLTemporalDecoder``, which decodes films."""

from __future__ import annotations

from typing import Any, Final

from polymodal.tokenizers.film_vae import FilmPyramidConfig
from polymodal.tokenizers.pyramid import PyramidConfig
from polymodal.tokenizers.vae import VAEConfig
from polymodal.weights.fields import MOST_LAYERS, MOST_LEVELS, Fields
from polymodal.weights.layouts import QUERY_KEY_VALUE, TO_PROJECTIONS
from polymodal.weights.rules import Rule, read_only, renames, rule

CLASS: Final = "AutoencoderKL"
FILM_CLASS: Final = "AutoencoderKLTemporalDecoder"
_DOWN, _UP = "DownEncoderBlock2D", "UpDecoderBlock2D"
_BLOCK = {n: n for n in ("norm1", "conv1", "norm2", "conv2")} | {"conv_shortcut": "shortcut"}
_FILM_BLOCK = {f"spatial_res_block.{theirs}": f"space.{ours}" for theirs, ours in _BLOCK.items()} | {
    **{f"temporal_res_block.{n}": n for n in ("norm1", "conv1", "norm2", "conv2")},
    "time_mixer": "blend",
}
_OLD_PROJECTIONS = {**QUERY_KEY_VALUE, "proj_attn": "o_proj"}  # files of 2022


def read_vae(f: Fields) -> VAEConfig:
    """The config of an autoencoder; what is wrong is added to the problems of ``f``."""
    for name in ("latents_mean", "latents_std"):
        f.require(name, None)
    groups, mixed = f.take("norm_num_groups", int, 32), f.take("use_quant_conv", bool, True)
    f.require("use_post_quant_conv", mixed)
    if "use_post_quant_conv" not in f and not mixed:
        f.problems.append("vae: use_quant_conv without use_post_quant_conv is not supported")
    f.require("act_fn", "silu")
    shape = _read_pyramid(f, groups)
    f.require("up_block_types", [_UP] * len(shape["widths"]))
    middle = f.take("mid_block_add_attention", bool, True)
    return VAEConfig(
        pyramid=PyramidConfig(**shape, middle_attention=middle), scale=_read_scale(f), mixed=mixed,
        shift=f.optional("shift_factor", float) or 0.0,
    )  # fmt: skip


def read_film_vae(f: Fields) -> VAEConfig:
    """The config of an autoencoder of films; what is wrong is added to the problems of ``f``."""
    f.require("layers_per_block", 2)  # else its middle has another number of blocks than attentions
    if "layers_per_block" not in f:
        f.problems.append("vae: there is no layers_per_block")
    return VAEConfig(pyramid=FilmPyramidConfig(**_read_pyramid(f, 32)), scale=_read_scale(f))


def _read_pyramid(f: Fields, groups: int) -> dict[str, Any]:
    """Keywords for a pyramid of so many groups."""
    f.ignore("the size of the training pictures", "sample_size")
    f.ignore("about fp16, which nothing here computes in", "force_upcast")
    widths = f.numbers("block_out_channels", int, longest=MOST_LEVELS) or (32,)
    f.require("down_block_types", [_DOWN] * len(widths))
    channels = f.take("in_channels", int, 3)
    f.require("out_channels", channels)
    if any(width < 1 or width % groups for width in widths):
        f.problems.append(f"vae: block_out_channels {widths} are not multiples of norm_num_groups {groups}")
        widths, groups = (1,) * len(widths), 1
    return {
        "channels": channels, "widths": widths, "groups": groups, "latent_dim": f.take("latent_channels", int, 4),
        "num_blocks": f.take("layers_per_block", int, 1, most=MOST_LAYERS // len(widths)),
    }  # fmt: skip


def _read_scale(f: Fields) -> float:
    scale = f.take("scaling_factor", float, 0.18215)
    if not scale:
        f.problems.append("vae: a scaling_factor of 0 would make all latents 0")
    return scale or 1.0


def write_vae(c: VAEConfig) -> dict[str, Any]:
    """The fields that `read_vae` reads."""
    return write_film_vae(c) | {
        "act_fn": "silu", "norm_num_groups": c.pyramid.groups, "up_block_types": [_UP] * len(c.pyramid.widths),
        "mid_block_add_attention": c.pyramid.middle_attention, "shift_factor": c.shift or None,
        "use_quant_conv": c.mixed, "use_post_quant_conv": c.mixed,
    }  # fmt: skip


def write_film_vae(c: VAEConfig) -> dict[str, Any]:
    """The fields that `read_film_vae` reads."""
    p = c.pyramid
    return {
        "in_channels": p.channels, "out_channels": p.channels, "latent_channels": p.latent_dim,
        "block_out_channels": list(p.widths), "layers_per_block": p.num_blocks, "scaling_factor": c.scale,
        "down_block_types": [_DOWN] * len(p.widths), "sample_size": 64 * p.factor,
    }  # fmt: skip


def vae_rules(theirs: str, ours: str, c: VAEConfig) -> list[Rule]:
    """The tensors of an autoencoder of pictures or films; both prefixes end in a dot, or are empty."""
    rules = [
        rule(f"{theirs}quant_conv.{{p}}", f"{ours}mix.{{p}}"),
        rule(f"{theirs}post_quant_conv.{{p}}", f"{ours}unmix.{{p}}"),
    ]
    last = len(c.pyramid.widths) - 1
    for part, way, resample in (("encoder", "down", "downsamplers"), ("decoder", "up", "upsamplers")):
        t, o = f"{theirs}{part}", f"{ours}{part}"
        rules += renames(t, o, {"conv_in": "first", "conv_norm_out": "norm", "conv_out": "last"})
        block = _FILM_BLOCK if isinstance(c.pyramid, FilmPyramidConfig) and part == "decoder" else _BLOCK
        rules += renames(f"{t}.mid_block.resnets.{{j}}", f"{o}.middle.blocks.{{j}}", block)
        attention = f"{t}.mid_block.attentions.0"
        rules += renames(attention, f"{o}.middle.attn", {"group_norm": "norm", **TO_PROJECTIONS})
        rules += read_only(renames(attention, f"{o}.middle.attn", _OLD_PROJECTIONS))
        for level in range(last + 1):
            stage = f"{t}.{way}_blocks.{level if way == 'down' else last - level}"
            rules += renames(f"{stage}.resnets.{{j}}", f"{o}.levels.{level}.blocks.{{j}}", block)
            rules += renames(stage, f"{o}.levels.{level}", {f"{resample}.0.conv": "resample.conv"})
    if isinstance(c.pyramid, FilmPyramidConfig):
        rules += renames(f"{theirs}decoder", f"{ours}decoder", {"time_conv_out": "over_time"})
    return rules
