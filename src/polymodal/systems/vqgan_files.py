"""How transformers writes VQGAN (Chameleon's ``vq_config``, the names of the official code): fields and names. Not a
system itself.

What it has no field for gets one of our own: the decoder, which its class leaves out, another codebook, another net.
"""

from __future__ import annotations

from typing import Any, Final

from polymodal.tokenizers.fsq import FiniteCodes
from polymodal.tokenizers.pyramid import CodecConfig, PlainConfig, PyramidConfig
from polymodal.tokenizers.vq import AveragedCodes, CodesConfig, LearnedCodes, VQConfig
from polymodal.weights.fields import MOST_LAYERS, Fields
from polymodal.weights.rules import Rule, Squeeze, renames, rule

MODEL_TYPE: Final = "chameleon_vqgan"
_BETA = 0.25  # of the codebook; the pull on the encoder has weight 1
_DEFAULT = PyramidConfig()


def read_vq(f: Fields) -> VQConfig:
    """Codes of pictures; what is wrong is added to the problems of ``f``."""
    f.require("model_type", MODEL_TYPE)
    f.require("double_latent", False)
    f.require("dropout", 0.0, 0)
    f.ignore("which initialisation its class has", "initializer_range")
    resolution = f.take("resolution", int, 512)
    plain = f.choose("net", {"pyramid": False, "plain": True}, "pyramid")
    net: CodecConfig = _read_plain(f) if plain else _read_pyramid(f, resolution)
    codes = _read_codes(f)
    if resolution % net.factor:
        f.problems.append(f"config.json: resolution {resolution} is no multiple of {net.factor} pixels a code")
        resolution = net.factor
    return VQConfig(net=net, codes=codes, resolution=resolution, paints=f.take("has_decoder", bool, False))


def _read_plain(f: Fields) -> PlainConfig:
    return PlainConfig(
        channels=f.take("in_channels", int, 3), latent_dim=f.take("latent_channels", int, 256),
        num_halvings=f.take("num_halvings", int, 2, most=16),
        num_blocks=f.take("num_res_blocks", int, 2, most=MOST_LAYERS),
    )  # fmt: skip


def _read_pyramid(f: Fields, resolution: int) -> PyramidConfig:
    base, groups = f.take("base_channels", int, 128), f.take("norm_num_groups", int, 32)
    factors = f.numbers("channel_multiplier", int) if "channel_multiplier" in f else (1, 1, 2, 2, 4)
    widths = tuple(base * n for n in factors)
    if not widths or len(widths) > 16 or any(w < 1 or w % groups for w in widths):
        f.problems.append(f"config.json: base_channels {base} times channel_multiplier {factors} in {groups} groups")
        widths, groups = (1,), 1
    # Null: none but in the middle.
    sides = f.numbers("attn_resolutions", int) if f.optional("attn_resolutions", list) is not None else ()
    levels = [resolution // 2**i for i in range(len(widths))]
    kind = f.optional("attn_type", str) if "attn_type" in f else "vanilla"
    if kind not in ("vanilla", "none", None):
        f.problems.append(f"config.json: attn_type is {kind!r}; only 'vanilla' and None are supported")
    return PyramidConfig(
        channels=f.take("in_channels", int, 3), widths=widths, groups=groups, middle_attention=kind == "vanilla",
        num_blocks=f.take("num_res_blocks", int, 2, most=MOST_LAYERS), latent_dim=f.take("latent_channels", int, 256),
        attention=tuple(i for i, side in enumerate(levels) if side in sides and kind == "vanilla"),
    )  # fmt: skip


def _read_codes(f: Fields) -> CodesConfig:
    kind = f.choose("codebook", {n: n for n in ("learned", "averaged", "finite")}, "learned")
    if kind == "finite":
        levels = f.numbers("levels", int)
        if not levels or min(levels) < 2 or len(levels) > 16:
            f.problems.append(f"config.json: levels {levels} are not two or more for each of a few dimensions")
            levels = (2,)
        return FiniteCodes(levels=levels)
    size, dim = f.take("num_embeddings", int, 8192), f.take("embed_dim", int, 256)
    if kind == "averaged":
        return AveragedCodes(size=size, dim=dim, commitment=f.take("commitment", float, 0.25))
    return LearnedCodes(
        size=size, dim=dim, codebook=f.take("beta", float, _BETA), commitment=f.take("commitment", float, 1.0)
    )


def write_vq(c: VQConfig) -> dict[str, Any]:
    """The fields that `read_vq` reads."""
    n, codes = c.net, c.codes
    raw: dict[str, Any] = {
        "model_type": MODEL_TYPE, "resolution": c.resolution, "in_channels": n.channels, "num_res_blocks": n.num_blocks,
        "latent_channels": n.latent_dim, "has_decoder": c.paints,
    }  # fmt: skip
    if isinstance(n, PlainConfig):
        raw |= {"net": "plain", "num_halvings": n.num_halvings}
    else:
        base = n.widths[0]
        raw |= {
            "base_channels": base, "channel_multiplier": [width // base for width in n.widths],
            "attn_resolutions": [c.resolution // 2**i for i in n.attention] or None,
            "attn_type": "vanilla" if n.middle_attention else None,
        }  # fmt: skip
        raw |= {} if n.groups == _DEFAULT.groups else {"norm_num_groups": n.groups}
    if isinstance(codes, FiniteCodes):
        return raw | {"codebook": "finite", "levels": list(codes.levels)}
    raw |= {"num_embeddings": codes.size, "embed_dim": codes.dim}
    if isinstance(codes, AveragedCodes):
        return raw | {"codebook": "averaged", "commitment": codes.commitment}
    return raw | {"beta": codes.codebook} | ({} if codes.commitment == 1.0 else {"commitment": codes.commitment})


_BLOCK = {n: n for n in ("norm1", "conv1", "norm2", "conv2")} | {"nin_shortcut": "shortcut"}
_ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "proj_out": "o_proj"}


def _attention(theirs: str, ours: str) -> list[Rule]:
    """Their 1x1 convolutions are linear layers here."""
    rules = [rule(f"{theirs}.norm.{{p}}", f"{ours}.norm.{{p}}")]
    for a, b in _ATTENTION.items():
        rules.append(rule(f"{theirs}.{a}.weight", f"{ours}.{b}.weight", Squeeze((2, 3))))
        rules.append(rule(f"{theirs}.{a}.bias", f"{ours}.{b}.bias"))
    return rules


def vq_rules(theirs: str, ours: str, c: VQConfig) -> list[Rule]:
    """The tensors; both prefixes end in a dot, or are empty."""
    rules = renames(theirs[:-1], ours[:-1], {n: n for n in ("quant_conv", "post_quant_conv")}) if theirs else []
    rules = rules or [rule(f"{n}.{{p}}", f"{ours}{n}.{{p}}") for n in ("quant_conv", "post_quant_conv")]
    if isinstance(c.codes, LearnedCodes):
        rules.append(rule(f"{theirs}quantize.embedding.weight", f"{ours}quantizer.entries.weight"))
    elif isinstance(c.codes, AveragedCodes):
        rules.append(rule(f"{theirs}quantize.{{p}}", f"{ours}quantizer.book.{{p}}"))
    for part, way, resample in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        t, o = f"{theirs}{part}", f"{ours}{part}"
        if isinstance(c.net, PlainConfig):
            rules += [
                rule(f"{t}.{{i}}.{{p}}", f"{o}.{{i}}.{{p}}"),
                rule(f"{t}.{{i}}.{{n}}.{{p}}", f"{o}.{{i}}.{{n}}.{{p}}"),
            ]
            continue
        rules += renames(t, o, {"conv_in": "first", "norm_out": "norm", "conv_out": "last"})
        for number in (1, 2):
            rules += renames(f"{t}.mid.block_{number}", f"{o}.middle.blocks.{number - 1}", _BLOCK)
        rules += _attention(f"{t}.mid.attn_1", f"{o}.middle.attn")
        level = f"{o}.levels.{{i}}"
        rules += renames(f"{t}.{way}.{{i}}.block.{{j}}", f"{level}.blocks.{{j}}", _BLOCK)
        rules += _attention(f"{t}.{way}.{{i}}.attn.{{j}}", f"{level}.attns.{{j}}")
        rules.append(rule(f"{t}.{way}.{{i}}.{resample}.conv.{{p}}", f"{level}.resample.conv.{{p}}"))
    return rules
