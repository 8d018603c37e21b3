"""How diffusers writes the U-Net of latent diffusion (its ``UNet2DConditionModel``): config fields and names."""

from __future__ import annotations

from typing import Any, Final

from polymodal.backbones.unet import Added, Level, Transformers, UNetConfig
from polymodal.weights.fields import MOST_LAYERS, MOST_LEVELS, Fields
from polymodal.weights.layouts import TO_PROJECTIONS
from polymodal.weights.rules import Rule, Squeeze, renames, rule

CLASS: Final = "UNet2DConditionModel"
_PLAIN, _CROSS = "{way}Block2D", "CrossAttn{way}Block2D"
# Options of the class that no released Stable Diffusion uses, with the values that they must have.
_FIXED: Final[dict[str, tuple[Any, ...]]] = {
    "center_input_sample": (False,), "flip_sin_to_cos": (True,), "freq_shift": (0,), "downsample_padding": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",), "mid_block_scale_factor": (1,), "act_fn": ("silu",),
    "dropout": (0.0,), "dual_cross_attention": (False,), "class_embed_type": (None,), "num_class_embeds": (None,),
    "encoder_hid_dim": (None,), "encoder_hid_dim_type": (None,), "only_cross_attention": (False,),
    "num_attention_heads": (None,), "resnet_time_scale_shift": ("default",), "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1.0,), "time_embedding_type": ("positional",), "time_embedding_dim": (None,),
    "time_embedding_act_fn": (None,), "timestep_post_act": (None,), "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3,), "conv_out_kernel": (3,), "attention_type": ("default",),
    "class_embeddings_concat": (False,), "mid_block_only_cross_attention": (None, False),
    "cross_attention_norm": (None,), "reverse_transformer_layers_per_block": (None,),
}  # fmt: skip
BLOCK = {n: n for n in ("norm1", "conv1", "norm2", "conv2")} | {
    "time_emb_proj": "time_proj", "conv_shortcut": "shortcut",
}  # fmt: skip
LAYER = {
    "norm1": "attn_norm", "norm2": "cross_norm", "norm3": "mlp_norm", "ff.net.0.proj": "mlp.up_proj",
    "ff.net.2": "mlp.down_proj", **{f"attn1.{theirs}": f"attn.{ours}" for theirs, ours in TO_PROJECTIONS.items()},
    **{f"attn2.{theirs}": f"cross_attn.{ours}" for theirs, ours in TO_PROJECTIONS.items()},
}  # fmt: skip


def per_level(f: Fields, name: str, default: int, levels: int) -> tuple[int, ...]:
    """A number for each level, or one for all."""
    one = not f.is_list(name)
    values = (f.take(name, int, default, most=MOST_LAYERS),) * levels if one else f.numbers(name, int, most=MOST_LAYERS)
    if len(values) != levels or min(values, default=0) < 1:
        f.problems.append(f"{name} {values} is not a number for each of {levels} levels")
        return (1,) * levels
    return values


def read_unet(f: Fields, *, up: bool = True) -> UNetConfig:
    """The config of a U-Net, or (without ``up``) of the half that a ControlNet copies."""
    for name, values in _FIXED.items():
        f.require(name, *values)
    f.ignore("softmax is as exact as the weights", "upcast_attention")
    f.ignore("of a kind of added condition that is not read", "addition_embed_type_num_heads")
    name, usual = "block_out_channels", (320, 640, 1280, 1280)
    dims = f.numbers(name, int, longest=MOST_LEVELS) if f.has(name) else usual
    dims, levels = dims or (32,), len(dims or (32,))
    default = [_CROSS] * (levels - 1) + [_PLAIN]
    kinds = f.take("down_block_types", list, [kind.format(way="Down") for kind in default])
    crossed = [kind == _CROSS.format(way="Down") for kind in kinds]
    if len(kinds) != levels or any(
        kind not in (_CROSS.format(way="Down"), _PLAIN.format(way="Down")) for kind in kinds
    ):
        f.problems.append(f"down_block_types {kinds} are not {levels} of those that are understood")
        crossed = [True] * levels
    if up:
        f.require("up_block_types", [(_CROSS if c else _PLAIN).format(way="Up") for c in reversed(crossed)])
    heads, depths = (
        per_level(f, "attention_head_dim", 8, levels),
        per_level(f, "transformer_layers_per_block", 1, levels),
    )
    if f.is_list("layers_per_block"):
        counts = set(per_level(f, "layers_per_block", 2, levels))
        if len(counts) > 1:
            f.problems.append("layers_per_block differs from level to level")
        blocks = counts.pop()
    else:
        blocks = f.take("layers_per_block", int, 2, most=MOST_LAYERS)
    if (total := blocks * sum(1 + depth for depth in depths)) > MOST_LAYERS:
        f.problems.append(f"{total:,} layers on the way down, of {blocks} blocks a level and Transformers of {depths}")
        blocks, depths = 1, (1,) * levels
    groups = f.take("norm_num_groups", int, 32)
    shapes = [Transformers(num_heads=h, depth=d) for h, d in zip(heads, depths, strict=True)]
    wrong = any(dim < 1 or dim % groups for dim in dims)
    wrong = wrong or any(c and dim % s.num_heads for c, dim, s in zip(crossed, dims, shapes, strict=True))
    if wrong or dims[-1] % shapes[-1].num_heads:
        f.problems.append(f"block_out_channels {dims} are not whole groups of {groups} and whole heads of {heads}")
        dims, groups, shapes = (1,) * levels, 1, [Transformers(num_heads=1)] * levels
    return UNetConfig(
        levels=tuple(
            Level(dim=dim, transformers=shape if cross else None)
            for dim, shape, cross in zip(dims, shapes, crossed, strict=True)
        ),
        middle=shapes[-1], context_dim=f.take("cross_attention_dim", int, 1280), groups=groups, num_blocks=blocks,
        in_channels=f.take("in_channels", int, 4), out_channels=f.take("out_channels", int, 4) if up else 4,
        eps=f.take("norm_eps", float, 1e-5), side=f.take("sample_size", int, 64) if up else 64,
        added=_read_added(f), convolved=not f.take("use_linear_projection", bool, False),
    )  # fmt: skip


def _read_added(f: Fields) -> Added | None:
    f.require("addition_embed_type", None, "text_time")
    waves, total = (f.optional(n, int) for n in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"))
    if not f.has("addition_embed_type"):
        return None
    if not waves or not total or waves % 2 or waves < 4:
        f.problems.append(f"text_time: {waves} waves of a number, {total} of all that is added")
        return None
    return Added(dim=total, waves=waves)


def write_unet(c: UNetConfig, *, up: bool = True) -> dict[str, Any]:
    """The fields that `read_unet` reads."""
    widths = {level.dim // level.transformers.num_heads for level in c.levels if level.transformers is not None}
    # Of a level without Transformers the number is never read.
    heads = [
        s.num_heads if (s := level.transformers) is not None
        else max(1, level.dim // next(iter(widths))) if len(widths) == 1 else c.middle.num_heads
        for level in c.levels[:-1]
    ] + [c.middle.num_heads]  # fmt: skip
    depths = [1 if level.transformers is None else level.transformers.depth for level in c.levels[:-1]]
    depths.append(c.middle.depth)
    crossed = [level.transformers is not None for level in c.levels]
    raw: dict[str, Any] = {
        "act_fn": "silu", "in_channels": c.in_channels, "block_out_channels": [level.dim for level in c.levels],
        "down_block_types": [(_CROSS if each else _PLAIN).format(way="Down") for each in crossed],
        "layers_per_block": c.num_blocks, "norm_num_groups": c.groups, "norm_eps": c.eps,
        "cross_attention_dim": c.context_dim, "use_linear_projection": not c.convolved,
        "attention_head_dim": heads[0] if len(set(heads)) == 1 else heads,
        "transformer_layers_per_block": depths[0] if len(set(depths)) == 1 else depths,
    }  # fmt: skip
    if up:
        ups = [(_CROSS if each else _PLAIN).format(way="Up") for each in reversed(crossed)]
        raw |= {"out_channels": c.out_channels, "sample_size": c.side, "up_block_types": ups}
    if c.added is not None:
        raw |= {
            "addition_embed_type": "text_time", "addition_time_embed_dim": c.added.waves,
            "projection_class_embeddings_input_dim": c.added.dim,
        }  # fmt: skip
    return raw


def _stage(theirs: str, ours: str, c: UNetConfig) -> list[Rule]:
    attention, mine = f"{theirs}.attentions.{{j}}", f"{ours}.transformers.{{j}}"
    maps = {"proj_in": "in_proj", "proj_out": "out_proj"}
    rules = renames(f"{theirs}.resnets.{{j}}", f"{ours}.blocks.{{j}}", BLOCK)
    rules += renames(attention, mine, {"norm": "norm"} | ({} if c.convolved else maps))
    rules += renames(f"{attention}.transformer_blocks.{{k}}", f"{mine}.blocks.{{k}}", LAYER)
    if c.convolved:
        for a, b in maps.items():
            rules.append(rule(f"{attention}.{a}.weight", f"{mine}.{b}.weight", Squeeze((2, 3))))
            rules.append(rule(f"{attention}.{a}.bias", f"{mine}.{b}.bias"))
    return rules


def encoder_rules(theirs: str, ours: str, c: UNetConfig) -> list[Rule]:
    """The tensors of a `UNetEncoder`; both prefixes end in a dot, or are empty."""
    rules = [rule(f"{theirs}conv_in.{{p}}", f"{ours}first.{{p}}")]
    for mine, other in (("time_embed", "time_embedding"), ("added_embed", "add_embedding")):
        rules += renames(
            f"{theirs}{other}", f"{ours}{mine}", {"linear_1": "up_proj", "linear_2": "down_proj"}
        )  # fmt: skip
    rules.append(rule(f"{theirs}down_blocks.{{i}}.downsamplers.0.conv.{{p}}", f"{ours}down.{{i}}.downsample.{{p}}"))
    rules += _stage(f"{theirs}down_blocks.{{i}}", f"{ours}down.{{i}}", c)
    return rules + _stage(f"{theirs}mid_block", f"{ours}middle", c)


def unet_rules(theirs: str, ours: str, c: UNetConfig) -> list[Rule]:
    """The tensors of a `UNet`; both prefixes end in a dot, or are empty."""
    return [
        *encoder_rules(theirs, f"{ours}encoder.", c),
        *_stage(f"{theirs}up_blocks.{{i}}", f"{ours}up.{{i}}", c),
        rule(f"{theirs}up_blocks.{{i}}.upsamplers.0.conv.{{p}}", f"{ours}up.{{i}}.upsample.{{p}}"),
        rule(f"{theirs}conv_norm_out.{{p}}", f"{ours}norm.{{p}}"),
        rule(f"{theirs}conv_out.{{p}}", f"{ours}last.{{p}}"),
    ]
