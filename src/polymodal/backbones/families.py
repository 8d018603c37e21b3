"""The language model families of the Hub: their configs, and how they name their weights.

A family is data: it reads a Hub config into a `DecoderConfig`, writes it back, and gives the rules of its names. The
same families serve language models and the systems that build on one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from polymodal.backbones.decoder import AttentionConfig, DecoderConfig, Gated, Learned, Plain, Window
from polymodal.nn.mlp import ActivationName
from polymodal.nn.norm import RMS, Heads, Layer, Norm, OffsetRMS
from polymodal.nn.rope import LinearScaling, Llama3Scaling, LongScaling, Rope, Scaling, YarnScaling
from polymodal.weights.fields import ACTIVATION_NAMES, ACTIVATIONS, MOST_LAYERS, Fields
from polymodal.weights.layouts import FAIRSEQ_FEED_FORWARD, PROJECTIONS
from polymodal.weights.rules import Chain, Rule, Split, Transpose, drop, read_only, renames, rule

_FAR: Final = 2**40  # rotary bases go to a thousand million


@dataclass(frozen=True, kw_only=True)
class ControlIds:
    """Token ids with a meaning of their own; an answer ends after one of ``stop``."""

    start: int | None = None
    stop: tuple[int, ...] = ()
    pad: int | None = None

    @classmethod
    def read(cls, f: Fields, default: ControlIds | None = None) -> ControlIds:
        """From the fields of a Hub config, which may list end tokens; what it does not mention is as in ``default``."""
        left_out = cls() if default is None else default
        stop = f.numbers("eos_token_id", int) if f.is_list("eos_token_id") else (f.optional("eos_token_id", int),)
        start, pad = f.optional("bos_token_id", int), f.optional("pad_token_id", int)
        return cls(
            start=start if "bos_token_id" in f else left_out.start,
            stop=tuple(i for i in stop if i is not None) if "eos_token_id" in f else left_out.stop,
            pad=pad if "pad_token_id" in f else left_out.pad,
        )

    def write(self) -> dict[str, Any]:
        stop = None if not self.stop else self.stop[0] if len(self.stop) == 1 else list(self.stop)
        return {"bos_token_id": self.start, "eos_token_id": stop, "pad_token_id": self.pad}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One `model_type` of the Hub.

    Attributes:
        architecture: transformers' class of the language model.
        base: the names of its backbone in a file begin with this.
        control: what a config means that says nothing of them, as the ``text_config`` of larger systems often does.
        read: a Hub config (or the part of one that describes the language model) -> `DecoderConfig`.
        write: the reverse, without ``architectures``.
        rules: (config, their base, the name of their output layer, our prefix) -> rules.
        public: whether transformers has that class; else a checkpoint brings its own code.
    """

    model_type: str
    architecture: str
    read: Callable[[Fields], DecoderConfig]
    write: Callable[[DecoderConfig], dict[str, Any]]
    rules: Callable[[DecoderConfig, str, str, str], list[Rule]]
    base: str = "model"
    control: ControlIds = field(default_factory=ControlIds)
    public: bool = True


# ------------------------------------------------------------------------------------------------- shared fields


def _take(f: Fields, name: str, default: int, *, most: int = 2**20) -> int:
    return f.take(name, int, default, most=most)


def _common(f: Fields, *, vocab: int, dim: int, layers: int, context: int, tied: bool = False) -> dict[str, Any]:
    f.require("attention_dropout", 0.0)
    f.ignore("a cache is asked for where it is needed", "use_cache")
    return {
        "vocab_size": _take(f, "vocab_size", vocab),
        "dim": _take(f, "hidden_size", dim),
        "num_layers": _take(f, "num_hidden_layers", layers, most=MOST_LAYERS),
        "context": _take(f, "max_position_embeddings", context, most=_FAR),
        "tied": f.take("tie_word_embeddings", bool, tied),
        "std": f.take("initializer_range", float, 0.02),
    }


def _write_common(c: DecoderConfig) -> dict[str, Any]:
    a = c.attention
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.dim,
        "num_hidden_layers": c.num_layers,
        "max_position_embeddings": c.context,
        "tie_word_embeddings": c.tied,
        "initializer_range": c.std,
        "num_attention_heads": a.num_heads,
        "num_key_value_heads": a.num_kv_heads,
        "head_dim": a.head_dim,
        "intermediate_size": c.mlp.hidden_dim,
        "rms_norm_eps": c.norm.eps,
    }


def _heads(f: Fields, dim: int, heads: int, kv_heads: int | None, head_dim: int | None = None) -> dict[str, Any]:
    count = _take(f, "num_attention_heads", heads)
    shared = f.optional("num_key_value_heads", int)
    width = f.optional("head_dim", int)
    if not f.has("num_key_value_heads"):
        shared = count if kv_heads is None else kv_heads
    if width is None and head_dim is None and dim % max(count, 1):
        f.problems.append(f"hidden_size {dim} is not a multiple of {count} heads, and there is no head_dim")
    return {
        "num_heads": max(count, 1),
        "num_kv_heads": shared or 1,
        "head_dim": width or head_dim or max(dim // max(count, 1), 1),
    }


def _gated(f: Fields, hidden_dim: int) -> Gated:
    return Gated(
        hidden_dim=_take(f, "intermediate_size", hidden_dim), activation=f.choose("hidden_act", ACTIVATIONS, "silu")
    )


def _layer_types(f: Fields, layers: int, default: Callable[[int], bool]) -> tuple[int, ...]:
    """The layers that see a window only: as declared, else those for which ``default`` is true."""
    if not f.has("layer_types"):
        return tuple(i for i in range(layers) if default(i))
    kinds = f.take("layer_types", list)
    if len(kinds) != layers or not set(kinds) <= {"sliding_attention", "full_attention"}:
        f.problems.append(f"layer_types {kinds!r:.80} does not say full_attention or sliding_attention {layers} times")
    return tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")


def _write_layers(c: DecoderConfig) -> list[str]:
    near = c.window.layers if c.window is not None else ()
    return ["sliding_attention" if i in near else "full_attention" for i in range(c.num_layers)]


# ------------------------------------------------------------------------------------------------ rotary positions


def _scaling(p: Fields, context: int, original: int | None) -> Scaling | None:
    """One entry of ``rope_parameters`` or ``rope_scaling``."""
    p.ignore("an older name of rope_type", "type")
    kind = p.take("rope_type" if p.has("rope_type") else "type", str, "default")
    if kind in ("default", "mrope"):
        return None
    if kind == "linear":
        return LinearScaling(factor=p.take("factor", float))
    if kind == "llama3":
        return Llama3Scaling(
            factor=p.take("factor", float), low=p.take("low_freq_factor", float),
            high=p.take("high_freq_factor", float), original=p.take("original_max_position_embeddings", int),
        )  # fmt: skip
    if kind == "yarn":
        for name in ("mscale", "mscale_all_dim"):
            p.require(name, None)
        p.require("truncate", True)
        return YarnScaling(
            factor=p.take("factor", float),
            original=p.optional("original_max_position_embeddings", int) or context,
            fast=p.optional("beta_fast", float) or 32.0, slow=p.optional("beta_slow", float) or 1.0,
            attention=p.optional("attention_factor", float),
        )  # fmt: skip
    if kind in ("longrope", "su"):
        first = p.optional("original_max_position_embeddings", int) or original or context
        factor = p.optional("factor", float) or context / first
        p.require("attention_factor", None)
        return LongScaling(
            short=p.numbers("short_factor", float), long=p.numbers("long_factor", float), original=first, factor=factor,
        )  # fmt: skip
    p.problems.append(f"rope_type is {kind!r}; understood: default, linear, llama3, yarn, longrope, mrope")
    return None


def _rope(
    p: Fields, *, context: int, theta: float = 10000.0, original: int | None = None, fraction: float = 1.0
) -> Rope:
    sections = p.numbers("mrope_section", int) if p.has("mrope_section") else None
    return Rope(
        theta=p.take("rope_theta", float, theta, most=_FAR),
        fraction=p.take("partial_rotary_factor", float, fraction),
        scaling=_scaling(p, context, original),
        sections=sections,
    )


def read_rope(f: Fields, *, context: int, theta: float = 10000.0, original: int | None = None) -> Rope:
    """Rotary positions, as ``rope_parameters`` or as the older ``rope_theta`` and ``rope_scaling``."""
    if f.has("rope_parameters"):
        f.ignore("rope_parameters say it", "rope_scaling")
        theta = f.take("rope_theta", float, theta, most=_FAR)  # where rope_parameters leave it out
        fraction = f.take("partial_rotary_factor", float, 1.0)
        return _rope(f.child("rope_parameters"), context=context, theta=theta, original=original, fraction=fraction)
    theta = f.take("rope_theta", float, theta, most=_FAR)
    fraction = f.take("partial_rotary_factor", float, 1.0)
    f.ignore("null", "rope_parameters", "rope_scaling")
    if not f.has("rope_scaling"):
        return Rope(theta=theta, fraction=fraction)
    return _rope(f.child("rope_scaling"), context=context, theta=theta, original=original, fraction=fraction)


def _rope_values(rope: Rope) -> dict[str, Any]:
    s = rope.scaling
    values: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.theta}
    if isinstance(s, LinearScaling):
        values |= {"rope_type": "linear", "factor": s.factor}
    elif isinstance(s, Llama3Scaling):
        values |= {"rope_type": "llama3", "factor": s.factor, "low_freq_factor": s.low, "high_freq_factor": s.high}
        values |= {"original_max_position_embeddings": s.original}
    elif isinstance(s, YarnScaling):
        values |= {"rope_type": "yarn", "factor": s.factor, "beta_fast": s.fast, "beta_slow": s.slow}
        values |= {"original_max_position_embeddings": s.original}
        values |= {} if s.attention is None else {"attention_factor": s.attention}
    elif isinstance(s, LongScaling):
        values |= {"rope_type": "longrope", "short_factor": list(s.short), "long_factor": list(s.long)}
        values |= {"original_max_position_embeddings": s.original, "factor": s.factor}
    if rope.sections is not None:
        values["mrope_section"] = list(rope.sections)
    if rope.fraction != 1.0:
        values["partial_rotary_factor"] = rope.fraction
    return values


def write_rope(position: Rope | Learned) -> dict[str, Any]:
    """The fields of transformers 5, and those that older versions read."""
    assert isinstance(position, Rope)
    values = _rope_values(position)
    old = {k: v for k, v in values.items() if k not in ("rope_theta", "partial_rotary_factor")}
    if position.sections is not None:
        old["rope_type"] = old["type"] = "mrope"
    plain = position.scaling is None and position.sections is None
    return {"rope_parameters": values, "rope_theta": position.theta} | ({} if plain else {"rope_scaling": old})


# ------------------------------------------------------------------------------------------------------- families


def _llama_rules(c: DecoderConfig, base: str, head: str, ours: str) -> list[Rule]:
    t, o = f"{base}.layers.{{i}}", f"{ours}.blocks.{{i}}"
    post = "mlp_norm" if not c.post_norms else "attn_post_norm"
    more = [
        rule(f"{t}.pre_feedforward_layernorm.weight", f"{o}.mlp_norm.weight"),
        rule(f"{t}.post_feedforward_layernorm.weight", f"{o}.mlp_post_norm.weight"),
    ]
    return [
        rule(f"{base}.embed_tokens.weight", f"{ours}.embed_tokens.weight"),
        rule(f"{base}.norm.weight", f"{ours}.norm.weight"),
        rule(f"{t}.input_layernorm.weight", f"{o}.attn_norm.weight"),
        rule(f"{t}.post_attention_layernorm.weight", f"{o}.{post}.weight"),
        *(more if c.post_norms else []),
        *_projections(c, t, o),
        drop(f"{t}.self_attn.rotary_emb.inv_freq", "a table that older versions of transformers saved"),
        *_head(c, head, ours),
    ]


def read_chameleon(f: Fields) -> DecoderConfig:
    """A Llama whose queries and keys are normed head by head; the large one has its norms behind the layers."""
    c = _common(f, vocab=65536, dim=4096, layers=32, context=4096)
    f.require("attention_bias", False)
    f.require("mlp_bias", False)
    f.ignore("how the official code was split; the norms of the heads are written out", "model_parallel_size")
    behind = f.take("swin_norm", bool, False)
    return DecoderConfig(
        **c,
        attention=AttentionConfig(**_heads(f, c["dim"], 32, 32), qk_norm=Heads()),
        mlp=_gated(f, 11008), norm=RMS(eps=f.take("rms_norm_eps", float, 1e-5)),
        position=read_rope(f, context=c["context"]), pre_norms=not behind, post_norms=behind,
    )  # fmt: skip


def write_chameleon(c: DecoderConfig) -> dict[str, Any]:
    """The fields of `read_chameleon`."""
    raw = _write_common(c) | write_rope(c.position)
    del raw["head_dim"]  # it follows from the width
    return raw | {"hidden_act": ACTIVATION_NAMES[c.mlp.activation], "swin_norm": c.post_norms}


def chameleon_rules(c: DecoderConfig, base: str, head: str, ours: str) -> list[Rule]:
    """Its names."""
    t, o = f"{base}.layers.{{i}}", f"{ours}.blocks.{{i}}"
    rules = [r for r in _llama_rules(c, base, head, ours) if not any("norm" in name for name in r.ours)]
    behind = "_post" if c.post_norms else ""
    norms = {"input_layernorm": f"attn{behind}_norm", "post_attention_layernorm": f"mlp{behind}_norm"}
    norms |= {f"self_attn.{n}_norm": f"attn.{n}_norm" for n in "qk"}
    return [*rules, rule(f"{base}.norm.weight", f"{ours}.norm.weight"), *renames(t, o, norms)]


def _projections(c: DecoderConfig, t: str, o: str) -> list[Rule]:
    attn = [rule(f"{t}.self_attn.{n}_proj.{{p}}", f"{o}.attn.{n}_proj.{{p}}") for n in "qkvo"]
    if c.attention.qk_norm is not None:
        attn += [rule(f"{t}.self_attn.{n}_norm.weight", f"{o}.attn.{n}_norm.weight") for n in "qk"]
    return [*attn, *(rule(f"{t}.mlp.{n}_proj.weight", f"{o}.mlp.{n}_proj.weight") for n in ("gate", "up", "down"))]


def _head(c: DecoderConfig, head: str, ours: str) -> list[Rule]:
    if c.tied:
        return [drop(f"{head}.weight", "tied: the embedding table is the output layer")]
    return [rule(f"{head}.weight", f"{ours}.lm_head.weight")]


def _read_llama(f: Fields) -> DecoderConfig:
    c = _common(f, vocab=32000, dim=4096, layers=32, context=2048)
    bias = f.take("attention_bias", bool, False)
    f.require("mlp_bias", False)
    f.require("rope_interleaved", False)
    f.ignore("how matrices were split in training", "pretraining_tp")
    f.ignore("a mark of its training code", "is_llama_config")
    return DecoderConfig(
        **c,
        attention=AttentionConfig(**_heads(f, c["dim"], 32, None), qkv_bias=bias, out_bias=bias),
        mlp=_gated(f, 11008), norm=RMS(eps=f.take("rms_norm_eps", float, 1e-6)),
        position=read_rope(f, context=c["context"]),
    )  # fmt: skip


def _write_llama(c: DecoderConfig) -> dict[str, Any]:
    bias = {"attention_bias": c.attention.qkv_bias, "hidden_act": ACTIVATION_NAMES[c.mlp.activation]}
    return _write_common(c) | write_rope(c.position) | bias


def _read_mistral(f: Fields) -> DecoderConfig:
    c = _common(f, vocab=32000, dim=4096, layers=32, context=131072)
    size = f.optional("sliding_window", int) if "sliding_window" in f else 4096
    return DecoderConfig(
        **c,
        attention=AttentionConfig(**_heads(f, c["dim"], 32, 8)),
        mlp=_gated(f, 14336), norm=RMS(eps=f.take("rms_norm_eps", float, 1e-6)),
        position=read_rope(f, context=c["context"]),
        window=None if size is None else Window(size=size, layers=tuple(range(c["num_layers"]))),
    )  # fmt: skip


def _write_mistral(c: DecoderConfig) -> dict[str, Any]:
    size = None if c.window is None else c.window.size
    return (
        _write_common(c)
        | write_rope(c.position)
        | {"sliding_window": size, "hidden_act": ACTIVATION_NAMES[c.mlp.activation]}
    )


def _read_qwen2(f: Fields) -> DecoderConfig:
    return _qwen(f, qkv_bias=True, out_bias=False, qk_norm=None)


def _read_qwen3(f: Fields) -> DecoderConfig:
    bias = f.take("attention_bias", bool, False)
    return _qwen(f, qkv_bias=bias, out_bias=bias, qk_norm=RMS(eps=f.take("rms_norm_eps", float, 1e-6)), head_dim=128)


def _qwen(
    f: Fields, *, qkv_bias: bool, out_bias: bool, qk_norm: Norm | None, head_dim: int | None = None
) -> DecoderConfig:
    c = _common(f, vocab=151936, dim=4096, layers=32, context=32768)
    f.require("use_mrope", False)
    size, first = f.optional("sliding_window", int), f.take("max_window_layers", int, 28, least=0)
    slides = f.take("use_sliding_window", bool, False)
    near = _layer_types(f, c["num_layers"], lambda i: slides and i >= first)
    return DecoderConfig(
        **c,
        attention=AttentionConfig(
            **_heads(f, c["dim"], 32, 32, head_dim), qkv_bias=qkv_bias, out_bias=out_bias, qk_norm=qk_norm
        ),
        mlp=_gated(f, 22016), norm=RMS(eps=f.take("rms_norm_eps", float, 1e-6)),
        position=read_rope(f, context=c["context"]),
        window=Window(size=size, layers=near) if near and size is not None else None,
    )  # fmt: skip


def _write_qwen(c: DecoderConfig) -> dict[str, Any]:
    first = c.num_layers if c.window is None else min(c.window.layers)
    values = {
        "layer_types": _write_layers(c),
        "use_sliding_window": c.window is not None,
        "sliding_window": None if c.window is None else c.window.size,
        "max_window_layers": first,
        "hidden_act": ACTIVATION_NAMES[c.mlp.activation],
    }
    if c.attention.qk_norm is not None:
        values["attention_bias"] = c.attention.qkv_bias
    return _write_common(c) | write_rope(c.position) | values


def _gemma(
    f: Fields, c: dict[str, Any], heads: int, kv_heads: int, hidden_dim: int, more: dict[str, Any]
) -> dict[str, Any]:
    bias = f.take("attention_bias", bool, False)
    f.ignore("the system says what is read both ways", "use_bidirectional_attention")
    # Trained with the tanh form from the first version on; some early configs say gelu.
    names: dict[str, ActivationName] = {"gelu": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
    field = "hidden_activation" if f.has("hidden_activation") else "hidden_act"
    f.ignore("hidden_activation says it, or both say tanh-GELU", "hidden_act", "hidden_activation")
    activation = f.choose(field, names, "gelu_pytorch_tanh")
    return c | {
        "attention": AttentionConfig(
            **_heads(f, c["dim"], heads, kv_heads, 256), qkv_bias=bias, out_bias=bias, **more
        ),
        "mlp": Gated(hidden_dim=_take(f, "intermediate_size", hidden_dim), activation=activation),
        "norm": OffsetRMS(eps=f.take("rms_norm_eps", float, 1e-6)),
        "embed_scale": c["dim"] ** 0.5,
    }  # fmt: skip


def _read_gemma(f: Fields) -> DecoderConfig:
    c = _common(f, vocab=256000, dim=3072, layers=28, context=8192, tied=True)
    return DecoderConfig(**_gemma(f, c, 16, 16, 24576, {}), position=read_rope(f, context=c["context"]))


def _read_gemma2(f: Fields) -> DecoderConfig:
    c = _common(f, vocab=256000, dim=2304, layers=26, context=8192, tied=True)
    return _gemma_windows(f, c, None, cap=50.0, head_cap=30.0, every=2)


def _read_gemma3(f: Fields) -> DecoderConfig:
    c = _common(f, vocab=262208, dim=2304, layers=26, context=131072, tied=True)
    return _gemma_windows(f, c, OffsetRMS(eps=f.take("rms_norm_eps", float, 1e-6)), cap=None, head_cap=None, every=6)


def _gemma_windows(
    f: Fields, c: dict[str, Any], qk_norm: Norm | None, *, cap: float | None, head_cap: float | None, every: int
) -> DecoderConfig:
    scale = f.take("query_pre_attn_scalar", float, 256.0) ** -0.5
    caps = [
        f.optional(name, float) if name in f else default
        for name, default in (("attn_logit_softcapping", cap), ("final_logit_softcapping", head_cap))
    ]
    f.ignore("layer_types say it", "_sliding_window_pattern", "cache_implementation")
    every = f.take("sliding_window_pattern", int, every)
    near = _layer_types(f, c["num_layers"], lambda i: (i + 1) % every != 0)
    size = f.take("sliding_window", int, 4096)
    parameters = f.child("rope_parameters") if f.has("rope_parameters") else None
    local = None
    if parameters is not None and parameters.has("full_attention"):
        far, local = (
            _rope(parameters.child(name), context=c["context"], theta=theta)
            for name, theta in (("full_attention", 1e6), ("sliding_attention", 10000.0))
        )
        f.ignore("rope_parameters say it", "rope_theta", "rope_scaling", "rope_local_base_freq")
    elif qk_norm is not None:
        far = read_rope(f, context=c["context"], theta=1e6)
        local = Rope(theta=f.take("rope_local_base_freq", float, 10000.0, most=_FAR))
    else:
        far = read_rope(f, context=c["context"])
    base = _gemma(f, c, 8, 4, 9216, {"scale": scale, "soft_cap": caps[0], "qk_norm": qk_norm})
    return DecoderConfig(
        **base, position=far, window=Window(size=size, layers=near, rope=local), post_norms=True, soft_cap=caps[1]
    )


def _write_gemma(c: DecoderConfig) -> dict[str, Any]:
    return _write_common(c) | write_rope(c.position) | {"attention_bias": c.attention.qkv_bias} | _ACTIVATION


_ACTIVATION: Final = {"hidden_act": "gelu_pytorch_tanh"}


def _write_gemma_windows(c: DecoderConfig) -> dict[str, Any]:
    assert c.window is not None
    assert c.attention.scale is not None
    assert isinstance(c.position, Rope)
    values = {
        "query_pre_attn_scalar": round(c.attention.scale**-2, 6),
        "attn_logit_softcapping": c.attention.soft_cap,
        "final_logit_softcapping": c.soft_cap,
        "layer_types": _write_layers(c),
        "sliding_window": c.window.size,
        "hidden_activation": "gelu_pytorch_tanh",
    }
    rope = write_rope(c.position)
    if c.window.rope is not None:
        both = {"full_attention": c.position, "sliding_attention": c.window.rope}
        rope["rope_parameters"] = {name: _rope_values(r) for name, r in both.items()}
        rope["rope_local_base_freq"] = c.window.rope.theta
    written = _write_common(c) | rope | {"attention_bias": c.attention.qkv_bias} | values
    whole = written["query_pre_attn_scalar"]
    return written | {"query_pre_attn_scalar": int(whole) if whole == int(whole) else whole}


def _read_phi3(f: Fields) -> DecoderConfig:
    c = _common(f, vocab=32064, dim=3072, layers=32, context=4096)
    f.require("attention_bias", False)
    f.ignore("dropout of other recipes", "resid_pdrop", "embd_pdrop")
    original = f.optional("original_max_position_embeddings", int)
    size = f.optional("sliding_window", int)
    return DecoderConfig(
        **c,
        attention=AttentionConfig(**_heads(f, c["dim"], 32, None)),
        mlp=_gated(f, 8192), norm=RMS(eps=f.take("rms_norm_eps", float, 1e-5)),
        position=read_rope(f, context=c["context"], original=original),
        window=None if size is None else Window(size=size, layers=tuple(range(c["num_layers"]))),
    )  # fmt: skip


def _write_phi3(c: DecoderConfig) -> dict[str, Any]:
    scaling = c.position.scaling if isinstance(c.position, Rope) else None
    original = scaling.original if isinstance(scaling, LongScaling) else c.context
    return _write_mistral(c) | {"original_max_position_embeddings": original}


def _phi3_rules(c: DecoderConfig, base: str, head: str, ours: str) -> list[Rule]:
    t, o, a = f"{base}.layers.{{i}}", f"{ours}.blocks.{{i}}", c.attention
    parts = (a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim, a.num_kv_heads * a.head_dim)
    fused = ("q", "k", "v", "gate", "up")
    return [
        *(r for r in _llama_rules(c, base, head, ours) if not any(f".{n}_proj." in t for n in fused for t in r.theirs)),
        rule(f"{t}.self_attn.qkv_proj.weight", [f"{o}.attn.{n}_proj.weight" for n in "qkv"], Split(parts)),
        rule(f"{t}.mlp.gate_up_proj.weight", [f"{o}.mlp.{n}_proj.weight" for n in ("gate", "up")], Split(2)),
    ]


def _read_opt(f: Fields) -> DecoderConfig:
    dim = _take(f, "hidden_size", 768)
    f.require("do_layer_norm_before", True)  # the 350m model normalises after
    f.require("_remove_final_layer_norm", False)
    f.require("word_embed_proj_dim", dim)
    f.require("layer_norm_elementwise_affine", True)
    f.require("enable_bias", True)
    f.ignore("dropout of pre-training", "dropout", "attention_dropout", "layerdrop", "activation_dropout")
    f.ignore("a cache is asked for where it is needed", "use_cache")
    heads = _take(f, "num_attention_heads", 12)
    context = _take(f, "max_position_embeddings", 2048)
    return DecoderConfig(
        vocab_size=_take(f, "vocab_size", 50272), dim=dim, context=context,
        num_layers=_take(f, "num_hidden_layers", 12, most=MOST_LAYERS),
        tied=f.take("tie_word_embeddings", bool, True), std=f.take("init_std", float, 0.02),
        attention=AttentionConfig(
            num_heads=heads, num_kv_heads=heads, head_dim=max(dim // max(heads, 1), 1), qkv_bias=True, out_bias=True
        ),
        mlp=Plain(
            hidden_dim=_take(f, "ffn_dim", 3072), activation=f.choose("activation_function", ACTIVATIONS, "relu")
        ),
        norm=Layer(eps=1e-5), position=Learned(count=context, offset=2),
    )  # fmt: skip


def _write_opt(c: DecoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": c.vocab_size, "hidden_size": c.dim, "word_embed_proj_dim": c.dim, "init_std": c.std,
        "num_hidden_layers": c.num_layers, "num_attention_heads": c.attention.num_heads, "ffn_dim": c.mlp.hidden_dim,
        "max_position_embeddings": c.context, "activation_function": ACTIVATION_NAMES[c.mlp.activation],
        "tie_word_embeddings": c.tied, "do_layer_norm_before": True,
    }  # fmt: skip


def _opt_rules(c: DecoderConfig, base: str, head: str, ours: str) -> list[Rule]:
    t, o = f"{base}.layers.{{i}}", f"{ours}.blocks.{{i}}"
    return [
        rule(f"{base}.embed_tokens.weight", f"{ours}.embed_tokens.weight"),
        rule(f"{base}.embed_positions.weight", f"{ours}.position.weight"),
        rule(f"{base}.final_layer_norm.{{p}}", f"{ours}.norm.{{p}}"),
        *renames(f"{t}.self_attn", f"{o}.attn", PROJECTIONS),
        *renames(t, o, {"self_attn_layer_norm": "attn_norm", **FAIRSEQ_FEED_FORWARD}),
        *_head(c, head, ours),
    ]


def _read_gpt2(f: Fields) -> DecoderConfig:
    dim, heads = _take(f, "n_embd", 768), _take(f, "n_head", 12)
    context = _take(f, "n_positions", 1024)
    f.require("scale_attn_weights", True)
    f.require("scale_attn_by_inverse_layer_idx", False)
    f.ignore("the order of a product, not its value", "reorder_and_upcast_attn")
    f.ignore("dropout of pre-training", "resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout")
    f.ignore(
        "a head that language models do not have",
        *(f"summary_{n}" for n in ("type", "use_proj", "activation", "proj_to_labels")),
    )
    f.ignore("equal to n_positions", "n_ctx")
    f.ignore("a cache is asked for where it is needed", "use_cache")
    return DecoderConfig(
        vocab_size=_take(f, "vocab_size", 50257), dim=dim, context=context,
        num_layers=_take(f, "n_layer", 12, most=MOST_LAYERS), tied=f.take("tie_word_embeddings", bool, True),
        std=f.take("initializer_range", float, 0.02),
        attention=AttentionConfig(
            num_heads=heads, num_kv_heads=heads, head_dim=max(dim // max(heads, 1), 1), qkv_bias=True, out_bias=True
        ),
        mlp=Plain(
            hidden_dim=f.optional("n_inner", int) or 4 * dim,
            activation=f.choose("activation_function", {**ACTIVATIONS, "gelu_new": "gelu_tanh"}, "gelu_new"),
        ),
        norm=Layer(eps=f.take("layer_norm_epsilon", float, 1e-5)), position=Learned(count=context),
    )  # fmt: skip


def _write_gpt2(c: DecoderConfig) -> dict[str, Any]:
    activation = "gelu_new" if c.mlp.activation == "gelu_tanh" else ACTIVATION_NAMES[c.mlp.activation]
    return {
        "vocab_size": c.vocab_size, "n_embd": c.dim, "n_layer": c.num_layers, "n_head": c.attention.num_heads,
        "n_positions": c.context, "n_inner": c.mlp.hidden_dim, "activation_function": activation,
        "layer_norm_epsilon": c.norm.eps, "initializer_range": c.std, "tie_word_embeddings": c.tied,
    }  # fmt: skip


def _gpt2_rules(c: DecoderConfig, base: str, head: str, ours: str) -> list[Rule]:
    def named(prefix: str) -> list[Rule]:
        t, o = f"{prefix}h.{{i}}", f"{ours}.blocks.{{i}}"
        qkv = [f"{o}.attn.{n}_proj" for n in "qkv"]
        pairs = (("attn.c_proj", "attn.o_proj"), ("mlp.c_fc", "mlp.up_proj"), ("mlp.c_proj", "mlp.down_proj"))
        return [
            rule(f"{prefix}wte.weight", f"{ours}.embed_tokens.weight"),
            rule(f"{prefix}wpe.weight", f"{ours}.position.weight"),
            rule(f"{prefix}ln_f.{{p}}", f"{ours}.norm.{{p}}"),
            rule(f"{t}.ln_1.{{p}}", f"{o}.attn_norm.{{p}}"),
            rule(f"{t}.ln_2.{{p}}", f"{o}.mlp_norm.{{p}}"),
            rule(f"{t}.attn.c_attn.weight", [f"{n}.weight" for n in qkv], Chain((Transpose(), Split(3)))),
            rule(f"{t}.attn.c_attn.bias", [f"{n}.bias" for n in qkv], Split(3)),
            *(rule(f"{t}.{theirs}.weight", f"{o}.{mine}.weight", Transpose()) for theirs, mine in pairs),
            *(rule(f"{t}.{theirs}.bias", f"{o}.{mine}.bias") for theirs, mine in pairs),
            *(drop(f"{t}.attn.{n}", "the causal mask, which older versions saved") for n in ("bias", "masked_bias")),
        ]

    # The first files of GPT-2 have no prefix.
    return [*named(f"{base}."), *read_only(named("")), *_head(c, head, ours)]


def _read_qwen1(f: Fields) -> DecoderConfig:
    dim, heads, head_dim = (
        _take(f, name, n) for name, n in (("hidden_size", 4096), ("num_attention_heads", 32), ("kv_channels", 128))
    )
    hidden, context = _take(f, "intermediate_size", 22016), _take(f, "seq_length", 8192, most=_FAR)
    f.require("no_bias", True)  # but for queries, keys and values
    f.require("scale_attn_weights", True)
    f.ignore("beyond seq_length, where nothing is read", "use_dynamic_ntk", "use_logn_attn", "max_position_embeddings")
    f.ignore("dropout of pre-training", "attn_dropout_prob", "emb_dropout_prob")
    f.ignore("how it is computed, and in which type", "bf16", "fp16", "fp32", "use_flash_attn", "onnx_safe")
    f.ignore("how it is computed, and in which type", "softmax_in_fp32", "use_cache_quantization", "use_cache_kernel")
    f.ignore("a cache is asked for where it is needed", "use_cache")
    if heads * head_dim != dim or hidden % 2:
        f.problems.append(
            f"hidden_size {dim} is not {heads} heads of kv_channels {head_dim}, or intermediate_size {hidden} is odd"
        )
    return DecoderConfig(
        vocab_size=_take(f, "vocab_size", 151936), dim=dim, context=context,
        num_layers=_take(f, "num_hidden_layers", 32, most=MOST_LAYERS),
        tied=f.take("tie_word_embeddings", bool, False), std=f.take("initializer_range", float, 0.02),
        attention=AttentionConfig(num_heads=heads, num_kv_heads=heads, head_dim=head_dim, qkv_bias=True),
        mlp=Gated(hidden_dim=max(hidden // 2, 1)), norm=RMS(eps=f.take("layer_norm_epsilon", float, 1e-6)),
        position=Rope(
            theta=f.take("rotary_emb_base", float, 10000.0, most=_FAR), fraction=f.take("rotary_pct", float, 1.0)
        ),
    )  # fmt: skip


def _write_qwen1(c: DecoderConfig) -> dict[str, Any]:
    assert isinstance(c.position, Rope)
    return {
        "vocab_size": c.vocab_size, "hidden_size": c.dim, "num_hidden_layers": c.num_layers, "seq_length": c.context,
        "max_position_embeddings": c.context, "tie_word_embeddings": c.tied, "initializer_range": c.std,
        "num_attention_heads": c.attention.num_heads, "kv_channels": c.attention.head_dim, "no_bias": True,
        "intermediate_size": 2 * c.mlp.hidden_dim, "layer_norm_epsilon": c.norm.eps,
        "rotary_emb_base": c.position.theta, "rotary_pct": c.position.fraction,
    }  # fmt: skip


def _qwen1_rules(c: DecoderConfig, base: str, head: str, ours: str) -> list[Rule]:
    t, o = f"{base}.h.{{i}}", f"{ours}.blocks.{{i}}"
    layers = {
        "ln_1": "attn_norm", "ln_2": "mlp_norm", "attn.c_proj": "attn.o_proj", "mlp.w1": "mlp.up_proj",
        "mlp.w2": "mlp.gate_proj", "mlp.c_proj": "mlp.down_proj",
    }  # fmt: skip
    return [
        rule(f"{base}.wte.weight", f"{ours}.embed_tokens.weight"),
        rule(f"{base}.ln_f.weight", f"{ours}.norm.weight"),
        rule(f"{t}.attn.c_attn.{{p}}", [f"{o}.attn.{n}_proj.{{p}}" for n in "qkv"], Split(3)),
        *renames(t, o, layers),
        *_head(c, head, ours),
    ]


_LLAMA: Final = ControlIds(start=1, stop=(2,))
_GEMMA: Final = ControlIds(start=2, stop=(1,), pad=0)
_LIST: Final = (
    Family(
        model_type="llama", architecture="LlamaForCausalLM", read=_read_llama, write=_write_llama, rules=_llama_rules,
        control=_LLAMA,
    ),
    Family(
        model_type="mistral", architecture="MistralForCausalLM", read=_read_mistral, write=_write_mistral,
        rules=_llama_rules, control=_LLAMA,
    ),
    Family(
        model_type="qwen", architecture="QWenLMHeadModel", read=_read_qwen1, write=_write_qwen1, rules=_qwen1_rules,
        base="transformer", control=ControlIds(stop=(151643, 151645)), public=False,
    ),
    Family(
        model_type="qwen2", architecture="Qwen2ForCausalLM", read=_read_qwen2, write=_write_qwen, rules=_llama_rules
    ),
    Family(
        model_type="qwen3", architecture="Qwen3ForCausalLM", read=_read_qwen3, write=_write_qwen, rules=_llama_rules
    ),
    Family(
        model_type="gemma", architecture="GemmaForCausalLM", read=_read_gemma, write=_write_gemma, rules=_llama_rules,
        control=_GEMMA,
    ),
    Family(
        model_type="gemma2", architecture="Gemma2ForCausalLM", read=_read_gemma2, write=_write_gemma_windows,
        rules=_llama_rules, control=_GEMMA,
    ),
    Family(
        model_type="gemma3_text", architecture="Gemma3ForCausalLM", read=_read_gemma3, write=_write_gemma_windows,
        rules=_llama_rules, control=_GEMMA,
    ),
    Family(
        model_type="phi3", architecture="Phi3ForCausalLM", read=_read_phi3, write=_write_phi3, rules=_phi3_rules,
        control=ControlIds(start=1, stop=(32000,), pad=32000),
    ),
    Family(
        model_type="opt", architecture="OPTForCausalLM", read=_read_opt, write=_write_opt, rules=_opt_rules,
        base="model.decoder", control=ControlIds(start=2, stop=(2,), pad=1),
    ),
    Family(
        model_type="gpt2", architecture="GPT2LMHeadModel", read=_read_gpt2, write=_write_gpt2, rules=_gpt2_rules,
        base="transformer", control=ControlIds(start=50256, stop=(50256,)),
    ),
)  # fmt: skip

FAMILIES: Final[Mapping[str, Family]] = {family.model_type: family for family in _LIST}
