"""How diffusers writes the U-Net of Stable Video Diffusion (its ``UNetSpatioTemporalConditionModel``)."""

from __future__ import annotations

from typing import Any, Final

from polymodal.backbones.unet import Added, Level, Transformers
from polymodal.backbones.unet_files import BLOCK, LAYER, per_level
from polymodal.backbones.unet_film import FilmUNetConfig
from polymodal.weights.fields import MOST_LAYERS, MOST_LEVELS, Fields
from polymodal.weights.rules import Rule, renames, rule

CLASS: Final = "UNetSpatioTemporalConditionModel"
_PLAIN, _CROSS = "{way}BlockSpatioTemporal", "CrossAttn{way}BlockSpatioTemporal"
_GROUPS: Final = 32
_HEADS: Final = (5, 10, 20, 20)
_USUAL: Final = [True, True, True, False]  # levels that have Transformers


def _kinds(crossed: list[bool], way: str) -> list[str]:
    return [(_CROSS if cross else _PLAIN).format(way=way) for cross in crossed]


def read_film_unet(f: Fields) -> FilmUNetConfig:
    """The config of a U-Net; what is wrong is added to the problems of ``f``."""
    name, usual = "block_out_channels", (320, 640, 1280, 1280)
    dims = f.numbers(name, int, longest=MOST_LEVELS) if f.has(name) else usual
    dims, levels = dims or (_GROUPS,), len(dims or (_GROUPS,))
    kinds = f.take("down_block_types", list, _kinds(_USUAL, "Down"))
    crossed = [kind == _CROSS.format(way="Down") for kind in kinds]
    if len(kinds) != levels or kinds != _kinds(crossed, "Down"):
        f.problems.append(f"down_block_types {kinds} are not {levels} of those that are understood")
        crossed = [True] * levels
    f.require("up_block_types", _kinds(crossed[::-1], "Up"))
    name = "num_attention_heads"
    heads = per_level(f, name, 1, levels) if f.has(name) or levels != len(_HEADS) else _HEADS
    depths = per_level(f, "transformer_layers_per_block", 1, levels)
    blocks = f.take("layers_per_block", int, 2, most=MOST_LAYERS // levels)
    if blocks * sum(1 + depth for depth in depths) > MOST_LAYERS:
        f.problems.append(f"{blocks} blocks a level and Transformers of {depths} layers are too many")
        blocks, depths = 1, (1,) * levels
    shapes = [Transformers(num_heads=h, depth=d) for h, d in zip(heads, depths, strict=True)]
    if any(dim < 1 or dim % _GROUPS or dim % h for dim, h in zip(dims, heads, strict=True)):
        f.problems.append(f"block_out_channels {dims} are not whole groups of {_GROUPS} and whole heads of {heads}")
        dims, shapes = (_GROUPS,) * levels, [Transformers(num_heads=1)] * levels
    waves = f.take("addition_time_embed_dim", int, 256, least=4)
    return FilmUNetConfig(
        levels=tuple(
            Level(dim=dim, transformers=shape if cross else None)
            for dim, shape, cross in zip(dims, shapes, crossed, strict=True)
        ),
        middle=shapes[-1], context_dim=f.take("cross_attention_dim", int, 1024), groups=_GROUPS, num_blocks=blocks,
        in_channels=f.take("in_channels", int, 8), out_channels=f.take("out_channels", int, 4),
        side=f.take("sample_size", int, 96), frames=f.take("num_frames", int, 25),
        added=Added(dim=f.take("projection_class_embeddings_input_dim", int, 768), waves=waves),
    )  # fmt: skip


def write_film_unet(c: FilmUNetConfig) -> dict[str, Any]:
    """The fields that `read_film_unet` reads."""
    assert c.added is not None, "a U-Net of films is told of their pace"
    crossed = [level.transformers is not None for level in c.levels]
    # Of a level without Transformers the numbers are never read; the last ones are also the middle's.
    shapes = [level.transformers or Transformers(num_heads=1) for level in c.levels[:-1]] + [c.middle]
    return {
        "sample_size": c.side, "in_channels": c.in_channels, "out_channels": c.out_channels, "num_frames": c.frames,
        "down_block_types": _kinds(crossed, "Down"), "up_block_types": _kinds(crossed[::-1], "Up"),
        "block_out_channels": [level.dim for level in c.levels], "addition_time_embed_dim": c.added.waves,
        "projection_class_embeddings_input_dim": c.added.dim, "layers_per_block": c.num_blocks,
        "cross_attention_dim": c.context_dim, "num_attention_heads": [shape.num_heads for shape in shapes],
        "transformer_layers_per_block": [shape.depth for shape in shapes],
    }  # fmt: skip


_OVER_TIME: Final = {"norm_in": "in_norm", "ff_in.net.0.proj": "in_mlp.up_proj", "ff_in.net.2": "in_mlp.down_proj"}
_EMBED: Final = {"linear_1": "up_proj", "linear_2": "down_proj"}


def _stage(theirs: str, ours: str) -> list[Rule]:
    block, mine = f"{theirs}.resnets.{{j}}", f"{ours}.blocks.{{j}}"
    rules = renames(f"{block}.spatial_res_block", f"{mine}.space", BLOCK)
    rules += renames(f"{block}.temporal_res_block", f"{mine}.time", BLOCK)
    rules += renames(block, mine, {"time_mixer": "blend"})
    block, mine = f"{theirs}.attentions.{{j}}", f"{ours}.transformers.{{j}}"
    rules += renames(block, mine, {"norm": "norm", "proj_in": "in_proj", "proj_out": "out_proj", "time_mixer": "blend"})
    rules += renames(f"{block}.transformer_blocks.{{k}}", f"{mine}.blocks.{{k}}", LAYER)
    rules += renames(f"{block}.temporal_transformer_blocks.{{k}}", f"{mine}.time_blocks.{{k}}", LAYER | _OVER_TIME)
    return rules + renames(f"{block}.time_pos_embed", f"{mine}.frame_embed", _EMBED)


def film_unet_rules(theirs: str, ours: str) -> list[Rule]:
    """The tensors of a U-Net; both prefixes end in a dot, or are empty."""
    encoder = f"{ours}encoder."
    rules = [rule(f"{theirs}conv_in.{{p}}", f"{encoder}first.{{p}}")]
    for a, b in (("time_embedding", "time_embed"), ("add_embedding", "added_embed")):
        rules += renames(f"{theirs}{a}", f"{encoder}{b}", _EMBED)
    rules.append(rule(f"{theirs}down_blocks.{{i}}.downsamplers.0.conv.{{p}}", f"{encoder}down.{{i}}.downsample.{{p}}"))
    rules += _stage(f"{theirs}down_blocks.{{i}}", f"{encoder}down.{{i}}")
    rules += _stage(f"{theirs}mid_block", f"{encoder}middle")
    rules += _stage(f"{theirs}up_blocks.{{i}}", f"{ours}up.{{i}}")
    return [
        *rules,
        rule(f"{theirs}up_blocks.{{i}}.upsamplers.0.conv.{{p}}", f"{ours}up.{{i}}.upsample.{{p}}"),
        rule(f"{theirs}conv_norm_out.{{p}}", f"{ours}norm.{{p}}"),
        rule(f"{theirs}conv_out.{{p}}", f"{ours}last.{{p}}"),
    ]
