"""T5, BART and BERT on the Hub: their configs, and how they name their weights.

The readers take a whole config or the part of one that describes the language model (BLIP-2's ``text_config``); the
rules take the prefixes of both sides.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, cast

from polymodal.backbones.bert import BertConfig
from polymodal.backbones.decoder import Gated, Learned, Plain
from polymodal.backbones.encdec import EncDecConfig, RelativeBias, StackConfig, Unbiased
from polymodal.nn.mlp import ActivationName
from polymodal.nn.norm import RMS, Layer
from polymodal.weights.fields import (
    ACTIVATION_NAMES,
    ACTIVATIONS,
    MOST_LAYERS,
    TRANSFORMER_FIELDS,
    Fields,
    FieldTable,
    read_bert_fields,
    write_fields,
)
from polymodal.weights.layouts import FAIRSEQ_FEED_FORWARD, PROJECTIONS, QUERY_KEY_VALUE
from polymodal.weights.rules import Rule, Squeeze, drop, read_only, renames, rule

_ACTIVATIONS: Final = cast(Mapping[str, ActivationName], ACTIVATIONS)
_DROPOUT: Final = "dropout of training, which these models are built without"
_CACHE: Final = "a cache is asked for where it is needed"


def read_id(f: Fields, name: str, default: int) -> int:
    """A token id; the default where the field is missing or null."""
    if f.has(name):
        return f.take(name, int, default, least=0)
    f.optional(name, int)
    return default


def read_stop(f: Fields, default: int) -> tuple[int, ...]:
    """The tokens that end an answer."""
    if f.is_list("eos_token_id"):
        return f.numbers("eos_token_id", int)
    return (read_id(f, "eos_token_id", default),)


def write_stop(stop: tuple[int, ...]) -> dict[str, Any]:
    """The field that `read_stop` reads."""
    return {"eos_token_id": stop[0] if len(stop) == 1 else list(stop)}


# ---- T5

# feed_forward_proj of the Hub; "gated-gelu" has always meant the tanh form
_T5_MLPS: Final[Mapping[str, tuple[type[Unbiased] | type[Gated], ActivationName]]] = {
    "relu": (Unbiased, "relu"),
    "gated-gelu": (Gated, "gelu_tanh"),
    "gated-silu": (Gated, "silu"),
}
_T5_ACTIVATIONS: Final[Mapping[str, ActivationName]] = {
    "relu": "relu", "gelu_new": "gelu_tanh", "gelu": "gelu", "silu": "silu",
}  # fmt: skip


def read_t5(f: Fields) -> EncDecConfig:
    """T5 1.0, 1.1 and Flan-T5."""
    f.ignore(_DROPOUT, "dropout_rate", "classifier_dropout")
    f.ignore(_CACHE, "use_cache", "output_past")
    f.ignore("follows from feed_forward_proj", "is_gated_act")
    f.ignore("relative positions have no end", "n_positions")
    dim = f.take("d_model", int, 512)
    kind, activation = f.choose("feed_forward_proj", _T5_MLPS, "relu")
    if f.has("dense_act_fn"):  # transformers writes it always; BLIP-2's Flan-T5 runs with the exact form of GELU
        activation = f.choose("dense_act_fn", _T5_ACTIVATIONS)
    layers = f.take("num_layers", int, 6, most=MOST_LAYERS)
    decoder_layers = (
        f.take("num_decoder_layers", int, layers, most=MOST_LAYERS) if f.has("num_decoder_layers") else layers
    )
    shape: dict[str, Any] = {
        "num_heads": f.take("num_heads", int, 8),
        "head_dim": f.take("d_kv", int, 64),
        "mlp": kind(hidden_dim=f.take("d_ff", int, 2048), activation=activation),
        "scale": 1.0,
    }
    # transformers 5 writes a tie into every config, and by the other field that there is none.
    tied = f.take("tie_word_embeddings", bool, True)
    tied = f.take("scale_decoder_outputs", bool, tied) and tied
    buckets = f.take("relative_attention_num_buckets", int, 32)
    distance = f.take("relative_attention_max_distance", int, 128)
    if buckets < 4 or buckets % 2 or distance <= buckets // 2:
        f.problems.append(f"relative_attention_num_buckets {buckets} do not share out distances up to {distance}")
        buckets, distance = 32, 128
    pad = read_id(f, "pad_token_id", 0)
    return EncDecConfig(
        vocab_size=f.take("vocab_size", int, 32128),
        dim=dim,
        encoder=StackConfig(num_layers=layers, **shape),
        decoder=StackConfig(num_layers=decoder_layers, **shape),
        norm=RMS(eps=f.take("layer_norm_epsilon", float, 1e-6)),
        position=RelativeBias(buckets=buckets, max_distance=distance),
        post_norm=False,
        start_id=read_id(f, "decoder_start_token_id", pad),
        pad_id=pad,
        logit_scale=dim**-0.5 if tied else None,
        tied=tied,
    )


def write_t5(c: EncDecConfig) -> dict[str, Any]:
    """The reverse of `read_t5`."""
    mlp, p = c.encoder.mlp, c.position
    assert isinstance(p, RelativeBias)
    assert isinstance(mlp, Unbiased | Gated)
    names = {v: k for k, v in _T5_MLPS.items()}
    exact = {"dense_act_fn": "gelu"} if mlp.activation == "gelu" else {}
    return exact | {
        "vocab_size": c.vocab_size, "d_model": c.dim, "d_kv": c.encoder.head_dim, "d_ff": mlp.hidden_dim,
        "num_layers": c.encoder.num_layers, "num_decoder_layers": c.decoder.num_layers,
        "num_heads": c.encoder.num_heads, "relative_attention_num_buckets": p.buckets,
        "relative_attention_max_distance": p.max_distance, "layer_norm_epsilon": c.norm.eps,
        "feed_forward_proj": names[type(mlp), "gelu_tanh" if exact else mlp.activation], "is_encoder_decoder": True,
        "tie_word_embeddings": c.tied, "pad_token_id": c.pad_id, "decoder_start_token_id": c.start_id,
    }  # fmt: skip


def t5_rules(c: EncDecConfig, theirs: str, ours: str) -> list[Rule]:
    """All of T5; both prefixes end in a dot or are empty."""

    def stack(name: str, mlp: int) -> list[Rule]:
        t, o = f"{theirs}{name}.block.{{i}}.layer", f"{ours}{name}.blocks.{{i}}"
        gated = isinstance(c.encoder.mlp, Gated)
        layers = {"wi_0": "gate", "wi_1": "up", "wo": "down"} if gated else {"wi": "up", "wo": "down"}
        table = "relative_attention_bias.weight"
        return [
            *(rule(f"{t}.0.SelfAttention.{n}.weight", f"{o}.attn.{n}_proj.weight") for n in "qkvo"),
            rule(f"{t}.0.layer_norm.weight", f"{o}.attn_norm.weight"),
            rule(f"{theirs}{name}.block.0.layer.0.SelfAttention.{table}", f"{ours}{name}.position.weight"),
            *(
                rule(f"{t}.{mlp}.DenseReluDense.{n}.weight", f"{o}.mlp.{mine}_proj.weight")
                for n, mine in layers.items()
            ),
            rule(f"{t}.{mlp}.layer_norm.weight", f"{o}.mlp_norm.weight"),
            rule(f"{theirs}{name}.final_layer_norm.weight", f"{ours}{name}.norm.weight"),
        ]

    t, o = f"{theirs}decoder.block", f"{ours}decoder.blocks.{{i}}"
    head = (
        drop(f"{theirs}lm_head.weight", "tied: the embedding table is the output layer")
        if c.tied
        else rule(f"{theirs}lm_head.weight", f"{ours}lm_head.weight")
    )
    return [
        rule(f"{theirs}shared.weight", f"{ours}embed_tokens.weight"),
        *stack("encoder", 1),
        *stack("decoder", 2),
        *(rule(f"{t}.{{i}}.layer.1.EncDecAttention.{n}.weight", f"{o}.cross_attn.{n}_proj.weight") for n in "qkvo"),
        rule(f"{t}.{{i}}.layer.1.layer_norm.weight", f"{o}.cross_norm.weight"),
        head,
        drop(f"{theirs}{{stack}}.embed_tokens.weight", "a second name of shared.weight"),
        drop(f"{t}.0.layer.1.EncDecAttention.relative_attention_bias.weight", "in the first files, never read"),
    ]


# ---- BART

_BART: Final = "BartForConditionalGeneration"
_BART_BASE: Final = "BartModel"


def read_architecture(f: Fields, known: tuple[str, ...]) -> str:
    """The class that wrote a checkpoint; the first of ``known`` where the config names none."""
    named = f.optional("architectures", list)
    if named is None or (len(named) == 1 and named[0] in known):
        return known[0] if named is None else named[0]
    f.problems.append(f"config.json: architectures is {named!r:.80}; understood: {', '.join(known)}")
    return known[0]


def read_bart(f: Fields) -> EncDecConfig:
    """BART, written with its output layer (and a constant on its scores) or as the backbone alone."""
    architecture = read_architecture(f, (_BART, _BART_BASE))
    f.ignore(_DROPOUT, "dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop", "decoder_layerdrop")
    f.ignore("a head that is not here", "classifier_dropout", "classif_dropout", "_num_labels")
    f.ignore(_CACHE, "use_cache", "output_past")
    f.ignore("encoder_layers says it", "num_hidden_layers")
    f.ignore("of fresh weights: 0.02", "init_std")
    f.ignore("forced_bos_token_id says it", "force_bos_token_to_be_generated")
    f.ignore("an experiment of its training code", "replacing_rate", "student_decoder_layers", "student_encoder_layers")
    for name in ("add_bias_logits", "add_final_layer_norm", "normalize_before", "static_position_embeddings"):
        f.require(name, False)
    f.require("normalize_embedding", True)
    f.require("extra_pos_embeddings", 2)
    f.require("tie_word_embeddings", True)
    dim = f.take("d_model", int, 1024)
    activation = f.choose("activation_function", _ACTIVATIONS, "gelu")

    def stack(name: str) -> StackConfig:
        heads = f.take(f"{name}_attention_heads", int, 16)
        if dim % max(heads, 1):
            f.problems.append(f"config.json: d_model {dim} is not a multiple of {name}_attention_heads {heads}")
        return StackConfig(
            num_layers=f.take(f"{name}_layers", int, 12, most=MOST_LAYERS), num_heads=heads,
            head_dim=max(dim // max(heads, 1), 1), bias=True,
            mlp=Plain(hidden_dim=f.take(f"{name}_ffn_dim", int, 4096), activation=activation),
        )  # fmt: skip

    pad, vocab_size = read_id(f, "pad_token_id", 1), f.take("vocab_size", int, 50265)
    if pad >= vocab_size:
        f.problems.append(f"config.json: pad_token_id {pad} is not in a vocabulary of {vocab_size}")
    return EncDecConfig(
        vocab_size=vocab_size,
        dim=dim,
        encoder=stack("encoder"),
        decoder=stack("decoder"),
        norm=Layer(eps=1e-5),
        position=Learned(count=f.take("max_position_embeddings", int, 1024), offset=2),
        post_norm=True,
        start_id=read_id(f, "decoder_start_token_id", 2),
        pad_id=pad,
        fixed_id=pad,
        embed_scale=dim**0.5 if f.take("scale_embedding", bool, False) else None,
        logit_bias=architecture == _BART,
    )


def write_bart(c: EncDecConfig) -> dict[str, Any]:
    """The reverse of `read_bart`."""
    assert isinstance(c.position, Learned)
    stacks: dict[str, Any] = {}
    for name, s in (("encoder", c.encoder), ("decoder", c.decoder)):
        stacks |= {f"{name}_layers": s.num_layers, f"{name}_attention_heads": s.num_heads}
        stacks |= {f"{name}_ffn_dim": s.mlp.hidden_dim}
    return stacks | {
        "architectures": [_BART if c.logit_bias else _BART_BASE], "vocab_size": c.vocab_size, "d_model": c.dim,
        "activation_function": ACTIVATION_NAMES[c.encoder.mlp.activation], "max_position_embeddings": c.position.count,
        "scale_embedding": c.embed_scale is not None, "is_encoder_decoder": True, "pad_token_id": c.pad_id,
        "decoder_start_token_id": c.start_id, "tie_word_embeddings": True,
    }  # fmt: skip


def bart_rules(c: EncDecConfig, theirs: str, ours: str) -> list[Rule]:
    """All of BART; both prefixes end in a dot or are empty."""
    base = f"{theirs}model." if c.logit_bias else theirs

    def stack(name: str) -> list[Rule]:
        t, o = f"{base}{name}.layers.{{i}}", f"{ours}{name}.blocks.{{i}}"
        rules = [
            rule(f"{base}{name}.embed_positions.weight", f"{ours}{name}.position.weight"),
            rule(f"{base}{name}.layernorm_embedding.{{p}}", f"{ours}{name}.norm.{{p}}"),
            *renames(t, o, FAIRSEQ_FEED_FORWARD),
        ]
        attentions = {"self_attn": ("attn", "attn_norm")}
        if name == "decoder":
            attentions["encoder_attn"] = ("cross_attn", "cross_norm")
        for module, (mine, norm) in attentions.items():
            rules += renames(f"{t}.{module}", f"{o}.{mine}", PROJECTIONS)
            rules.append(rule(f"{t}.{module}_layer_norm.{{p}}", f"{o}.{norm}.{{p}}"))
        return rules

    return [
        rule(f"{base}shared.weight", f"{ours}embed_tokens.weight"),
        *stack("encoder"),
        *stack("decoder"),
        *([rule(f"{theirs}final_logits_bias", f"{ours}logit_bias", Squeeze((0,)))] if c.logit_bias else []),
        drop(f"{base}{{stack}}.embed_tokens.weight", "a second name of shared.weight"),
        drop(f"{theirs}lm_head.weight", "tied: the embedding table is the output layer"),
        drop(f"{base}{{stack}}.version", "a mark of the training code"),
    ]


# ---- BERT

_BERT: Final[FieldTable] = (
    *TRANSFORMER_FIELDS, ("vocab_size", "vocab_size", 30522), ("max_position_embeddings", "context", 512),
    ("type_vocab_size", "num_types", 2), ("hidden_act", "activation", "gelu"), ("layer_norm_eps", "norm_eps", 1e-12),
)  # fmt: skip


def read_bert(f: Fields) -> BertConfig:
    """A BERT encoder."""
    f.ignore(_CACHE, "use_cache")
    f.ignore("of the first code, never read", "directionality", "output_past", "layer_norm_epsilon")
    f.ignore("the pooler is as wide as the encoder", *(f"pooler_{n}" for n in (
        "fc_size", "num_attention_heads", "num_fc_layers", "size_per_head", "type"
    )))  # fmt: skip
    f.require("is_decoder", False)
    f.require("add_cross_attention", False)
    f.require("tie_word_embeddings", True)
    return BertConfig(**read_bert_fields(f, _BERT))


def write_bert(c: BertConfig) -> dict[str, Any]:
    """The reverse of `read_bert`."""
    return write_fields(c, _BERT)


def bert_rules(theirs: str, ours: str) -> list[Rule]:
    """Embeddings and layers of BERT; both prefixes end in a dot or are empty."""
    e, t, o = f"{theirs}embeddings", f"{theirs}encoder.layer.{{i}}", f"{ours}blocks.{{i}}"
    norms = {
        f"{e}.LayerNorm": f"{ours}norm",
        f"{t}.attention.output.LayerNorm": f"{o}.attn_norm",
        f"{t}.output.LayerNorm": f"{o}.mlp_norm",
    }
    return [
        rule(f"{e}.word_embeddings.weight", f"{ours}embed_tokens.weight"),
        rule(f"{e}.position_embeddings.weight", f"{ours}position.weight"),
        rule(f"{e}.token_type_embeddings.weight", f"{ours}types.weight"),
        *renames(f"{t}.attention.self", f"{o}.attn", QUERY_KEY_VALUE),
        *renames(t, o, {
            "attention.output.dense": "attn.o_proj", "intermediate.dense": "mlp.up_proj",
            "output.dense": "mlp.down_proj",
        }),
        *(r for name, mine in norms.items() for r in norm_rules(name, mine)),
        drop(f"{e}.position_ids", "0, 1, 2, ...: a buffer of older transformers"),
    ]  # fmt: skip


def norm_rules(theirs: str, ours: str) -> list[Rule]:
    """A layer norm by today's names, and by those of files that were converted from TensorFlow."""
    new = [rule(f"{theirs}.{name}", f"{ours}.{name}") for name in ("weight", "bias")]
    return new + read_only(
        [rule(f"{theirs}.{old}", f"{ours}.{name}") for old, name in (("gamma", "weight"), ("beta", "bias"))]
    )


def masked_head_rules(theirs: str, ours: str) -> list[Rule]:
    """The head of masked language models (transformers: ``cls.predictions.``)."""
    return [
        rule(f"{theirs}transform.dense.{{p}}", f"{ours}proj.{{p}}"),
        *norm_rules(f"{theirs}transform.LayerNorm", f"{ours}norm"),
        rule(f"{theirs}bias", f"{ours}bias"),
        drop(f"{theirs}decoder.{{p}}", "tied: the embedding table and the bias beside it"),
    ]
