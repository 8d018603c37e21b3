"""The transformers of Stable Diffusion 3 and FLUX as diffusers writes them: configs and names."""

from __future__ import annotations

from typing import Any

from polymodal.backbones.dit import embedder, feed_forward, projections, read_heads
from polymodal.backbones.mmdit import CentreCrop, MMDiTConfig
from polymodal.nn.norm import RMS
from polymodal.nn.rope import AxialRope
from polymodal.weights.fields import MOST_LAYERS, Fields
from polymodal.weights.rules import Flatten, RopePermute, Rule, Squeeze, SwapHalves, renames, rule


def _shape(f: Fields, heads: int, width: int, layers: int, pooled: int) -> dict[str, Any]:
    """What both have; numbers are the defaults of diffusers."""
    return read_heads(f, heads, width) | {
        "num_layers": f.take("num_layers", int, layers, most=MOST_LAYERS),
        "context_dim": f.take("joint_attention_dim", int, 4096),
        "pooled_dim": f.take("pooled_projection_dim", int, pooled),
    }  # fmt: skip


def _write_shape(c: MMDiTConfig) -> dict[str, Any]:
    return {
        "num_layers": c.num_layers, "num_attention_heads": c.num_heads, "attention_head_dim": c.dim // c.num_heads,
        "joint_attention_dim": c.context_dim, "pooled_projection_dim": c.pooled_dim,
    }  # fmt: skip


def read_sd3(f: Fields) -> MMDiTConfig | None:
    """The config of an SD3Transformer2DModel; None where there are problems."""
    values = _shape(f, 18, 64, 18, 2048)
    f.require("patch_size", 2)
    channels = f.take("in_channels", int, 16)
    size = f.take("sample_size", int, 128, least=2)
    extra = f.numbers("dual_attention_layers", int) if "dual_attention_layers" in f else ()
    if extra != tuple(range(len(extra))) or len(extra) > values["num_layers"]:
        f.problems.append(f"config.json: dual_attention_layers are not the first ones: {extra}")
    if f.take("caption_projection_dim", int, 1152) != values["dim"]:
        f.problems.append("config.json: caption_projection_dim is not num_attention_heads * attention_head_dim")
    norm = f.choose("qk_norm", {"rms_norm": RMS()}) if f.optional("qk_norm", str) is not None else None
    values |= {
        "values": 4 * channels, "out_values": 4 * (f.optional("out_channels", int) or channels),
        "position": CentreCrop(side=f.take("pos_embed_max_size", int, 96, most=4096), base=size // 2), "qk_norm": norm,
        "extra_attention": len(extra),
    }  # fmt: skip
    return None if f.problems else MMDiTConfig(**values)


def write_sd3(c: MMDiTConfig) -> dict[str, Any]:
    """The fields of `read_sd3`."""
    assert isinstance(c.position, CentreCrop)
    return _write_shape(c) | {
        "patch_size": 2, "in_channels": c.values // 4, "out_channels": c.out_values // 4,
        "sample_size": 2 * c.position.base, "pos_embed_max_size": c.position.side, "caption_projection_dim": c.dim,
        "dual_attention_layers": list(range(c.extra_attention)), "qk_norm": None if c.qk_norm is None else "rms_norm",
    }  # fmt: skip


def read_flux(f: Fields) -> MMDiTConfig | None:
    """The config of a FluxTransformer2DModel; None where there are problems."""
    values = _shape(f, 24, 128, 19, 768)
    f.require("patch_size", 1)
    channels = f.take("in_channels", int, 64)
    dims = f.numbers("axes_dims_rope", int) if "axes_dims_rope" in f else (16, 56, 56)
    if any(dim < 2 or dim % 2 for dim in dims) or len(dims) != 3 or sum(dims) * values["num_heads"] != values["dim"]:
        f.problems.append(f"config.json: axes_dims_rope {dims} do not fill the heads")
        dims = (2, 2, 2)
    values |= {
        "values": channels, "out_values": f.optional("out_channels", int) or channels,
        "num_single_layers": f.take("num_single_layers", int, 38, most=MOST_LAYERS), "qk_norm": RMS(),
        "position": AxialRope(dims=dims), "guidance": f.take("guidance_embeds", bool, False),
    }  # fmt: skip
    return None if f.problems else MMDiTConfig(**values)


def write_flux(c: MMDiTConfig) -> dict[str, Any]:
    """The fields of `read_flux`."""
    assert isinstance(c.position, AxialRope)
    return _write_shape(c) | {
        "patch_size": 1, "in_channels": c.values, "out_channels": None if c.out_values == c.values else c.out_values,
        "num_single_layers": c.num_single_layers, "guidance_embeds": c.guidance,
        "axes_dims_rope": list(c.position.dims),
    }  # fmt: skip


_ADDED = {"add_q_proj": "q_proj", "add_k_proj": "k_proj", "add_v_proj": "v_proj", "to_add_out": "o_proj"}


def _ends(theirs: str, ours: str) -> list[Rule]:
    return [
        *embedder(f"{theirs}time_text_embed.timestep_embedder", f"{ours}time"),
        *embedder(f"{theirs}time_text_embed.text_embedder", f"{ours}pooled"),
        rule(f"{theirs}context_embedder.{{p}}", f"{ours}text_embed.{{p}}"),
        rule(f"{theirs}norm_out.linear.{{p}}", f"{ours}modulation.proj.{{p}}", SwapHalves()),
        rule(f"{theirs}proj_out.{{p}}", f"{ours}out.{{p}}"),
    ]


def sd3_rules(c: MMDiTConfig, theirs: str = "", ours: str = "") -> list[Rule]:
    """The names of an SD3Transformer2DModel; what turns the last block's text has its halves the other way round."""
    t, o = f"{theirs}transformer_blocks.{{i}}", f"{ours}blocks.{{i}}"
    last, count = c.num_layers - 1, range(c.num_layers)
    rules = [
        rule(f"{theirs}pos_embed.proj.weight", f"{ours}patch_embed.weight", Flatten((c.values // 4, 2, 2))),
        rule(f"{theirs}pos_embed.proj.bias", f"{ours}patch_embed.bias"),
        rule(f"{theirs}pos_embed.pos_embed", f"{ours}position", Squeeze((0,))),
        *_ends(theirs, ours),
        rule(f"{t}.norm1.linear.{{p}}", f"{o}.image.modulation.proj.{{p}}"),
        *projections(f"{t}.attn", f"{o}.image.attn"),
        *projections(f"{t}.attn2", f"{o}.image.extra"),
        *renames(f"{t}.attn", f"{o}.text.attn", _ADDED),
        *feed_forward(f"{t}.ff", f"{o}.image.mlp"),
        *feed_forward(f"{t}.ff_context", f"{o}.text.mlp"),
    ]
    for i in count:
        name = f"{theirs}transformer_blocks.{i}.norm1_context.linear.{{p}}"
        rules.append(rule(name, f"{ours}blocks.{i}.text.modulation.proj.{{p}}", SwapHalves() if i == last else None))
    for n in "qk":
        rules += [
            rule(f"{t}.attn.norm_{n}.weight", f"{o}.image.attn.{n}_norm.weight"),
            rule(f"{t}.attn2.norm_{n}.weight", f"{o}.image.extra.{n}_norm.weight"),
            rule(f"{t}.attn.norm_added_{n}.weight", f"{o}.text.attn.{n}_norm.weight"),
        ]
    return rules


def flux_rules(c: MMDiTConfig, theirs: str = "", ours: str = "") -> list[Rule]:
    """The names of a FluxTransformer2DModel; its rotary pairs are neighbours, ours are halves apart."""
    t, o = f"{theirs}transformer_blocks.{{i}}", f"{ours}blocks.{{i}}"
    ts, os = f"{theirs}single_transformer_blocks.{{i}}", f"{ours}single_blocks.{{i}}"
    rules = [
        rule(f"{theirs}x_embedder.{{p}}", f"{ours}patch_embed.{{p}}"),
        *_ends(theirs, ours),
        *embedder(f"{theirs}time_text_embed.guidance_embedder", f"{ours}guidance"),
        rule(f"{t}.norm1.linear.{{p}}", f"{o}.image.modulation.proj.{{p}}"),
        rule(f"{t}.norm1_context.linear.{{p}}", f"{o}.text.modulation.proj.{{p}}"),
        *feed_forward(f"{t}.ff", f"{o}.image.mlp"),
        *feed_forward(f"{t}.ff_context", f"{o}.text.mlp"),
        rule(f"{ts}.norm.linear.{{p}}", f"{os}.modulation.proj.{{p}}"),
        rule(f"{ts}.proj_mlp.{{p}}", f"{os}.up_proj.{{p}}"),
        rule(f"{ts}.proj_out.{{p}}", f"{os}.out_proj.{{p}}"),
        rule(f"{t}.attn.to_out.0.{{p}}", f"{o}.image.attn.o_proj.{{p}}"),
        rule(f"{t}.attn.to_add_out.{{p}}", f"{o}.text.attn.o_proj.{{p}}"),
    ]
    turned = RopePermute(c.num_heads)
    for their_layer, their_norm, mine in (
        (f"{t}.attn.to_{{}}", f"{t}.attn.norm_{{}}", f"{o}.image.attn"),
        (f"{t}.attn.add_{{}}_proj", f"{t}.attn.norm_added_{{}}", f"{o}.text.attn"),
        (f"{ts}.attn.to_{{}}", f"{ts}.attn.norm_{{}}", f"{os}.attn"),
    ):
        rules.append(rule(f"{their_layer.replace('{}', 'v')}.{{p}}", f"{mine}.v_proj.{{p}}"))
        for n in "qk":
            rules += [
                rule(f"{their_layer.replace('{}', n)}.{{p}}", f"{mine}.{n}_proj.{{p}}", turned),
                rule(f"{their_norm.replace('{}', n)}.weight", f"{mine}.{n}_norm.weight", RopePermute(1)),
            ]
    return rules
