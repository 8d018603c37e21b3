"""Whisper on the Hub: its config, its rules of writing (``generation_config.json``) and its weights' names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeAlias

from polymodal.backbones.decoder import Learned, Plain
from polymodal.backbones.encdec import CrossDecoderConfig, StackConfig
from polymodal.backbones.encdec_families import read_id
from polymodal.core.errors import ConfigError
from polymodal.encoders.whisper import whisper_encoder_rules
from polymodal.nn.mlp import ActivationName
from polymodal.nn.norm import Layer
from polymodal.samplers.timestamps import SpeechTokens
from polymodal.tokenizers.language import LanguageTokenizer
from polymodal.tokenizers.speech import END, NO_TIMESTAMPS, PREVIOUS, START, TASKS
from polymodal.weights.fields import MOST_LAYERS, Fields
from polymodal.weights.layouts import FAIRSEQ_FEED_FORWARD, PROJECTIONS
from polymodal.weights.rules import Rule, drop, renames, rule

GENERATION: Final = "generation_config.json"
_MASKS: Final = tuple(
    f"mask_{axis}_{name}" for axis in ("time", "feature") for name in ("prob", "length", "min_masks")
)  # fmt: skip


def read_decoder(f: Fields, dim: int, activation: ActivationName) -> CrossDecoderConfig:
    """The decoder of Whisper's config, whose width and activation are the encoder's."""
    f.ignore("a cache is asked for where it is needed", "use_cache")
    f.ignore("dropout of training, which these models are built without", "decoder_layerdrop")
    f.ignore("masks of training are a recipe's", "apply_spec_augment", *_MASKS)
    f.ignore("of a classifier that is not here", "use_weighted_layer_sum", "classifier_proj_size")
    f.ignore(f"{GENERATION} says it", "forced_decoder_ids")
    f.require("tie_word_embeddings", True)
    f.require("median_filter_width", 7)
    heads = f.take("decoder_attention_heads", int, 6)
    if dim % heads:
        f.problems.append(f"config.json: d_model {dim} is not a multiple of decoder_attention_heads {heads}")
    vocab_size, pad = f.take("vocab_size", int, 51865), read_id(f, "pad_token_id", 50256)
    if pad >= vocab_size:
        f.problems.append(f"config.json: pad_token_id {pad} is not in a vocabulary of {vocab_size}")
    return CrossDecoderConfig(
        vocab_size=vocab_size,
        dim=dim,
        decoder=StackConfig(
            num_layers=f.take("decoder_layers", int, 4, most=MOST_LAYERS),
            num_heads=heads,
            head_dim=max(dim // heads, 1),
            mlp=Plain(hidden_dim=f.take("decoder_ffn_dim", int, 1536), activation=activation),
            bias=True,
            key_bias=False,
        ),
        norm=Layer(eps=1e-5),
        position=Learned(count=f.take("max_target_positions", int, 448)),
        post_norm=False,
        start_id=read_id(f, "decoder_start_token_id", 50257),
        pad_id=pad,
        fixed_id=pad,
    )


def write_decoder(c: CrossDecoderConfig) -> dict[str, Any]:
    """The reverse of `read_decoder`."""
    assert isinstance(c.position, Learned)
    return {
        "vocab_size": c.vocab_size, "decoder_layers": c.decoder.num_layers,
        "decoder_attention_heads": c.decoder.num_heads, "decoder_ffn_dim": c.decoder.mlp.hidden_dim,
        "max_target_positions": c.position.count, "decoder_start_token_id": c.start_id, "pad_token_id": c.pad_id,
        "bos_token_id": c.pad_id, "is_encoder_decoder": True,
    }  # fmt: skip


def whisper_rules() -> list[Rule]:
    t, o = "model.decoder.layers.{i}", "backbone.decoder.blocks.{i}"
    names = {
        **{f"self_attn.{a}": f"attn.{b}" for a, b in PROJECTIONS.items()}, "self_attn_layer_norm": "attn_norm",
        **{f"encoder_attn.{a}": f"cross_attn.{b}" for a, b in PROJECTIONS.items()},
        "encoder_attn_layer_norm": "cross_norm", **FAIRSEQ_FEED_FORWARD,
    }  # fmt: skip
    return [
        *whisper_encoder_rules("model.encoder.", "encoder."),
        rule("model.decoder.embed_tokens.weight", "backbone.embed_tokens.weight"),
        rule("model.decoder.embed_positions.weight", "backbone.decoder.position.weight"),
        *renames(t, o, names),
        rule("model.decoder.layer_norm.{p}", "backbone.decoder.norm.{p}"),
        drop("proj_out.weight", "tied: the embedding table is the output layer"),
    ]


# ---- how answers are written

Heads: TypeAlias = tuple[tuple[int, int], ...]
_SEARCH: Final = "how to search is `Decoding`'s to say"


def read_generation(raw: Any, c: CrossDecoderConfig) -> tuple[SpeechTokens, Heads]:
    """The control tokens, and (layer, head) of the attention that follows the sound; none if the file names none.

    Args:
        raw: of the file.
        c: of the decoder that has these tokens and heads.

    Raises:
        ConfigError: a field is missing, broken or not understood.
    """
    f = Fields(raw, GENERATION)
    f.ignore("language and task are asked for", "forced_decoder_ids", "is_multilingual", "language", "task")
    f.ignore(_SEARCH, "return_timestamps", "max_new_tokens", "use_cache", "temperature_increment_on_fallback")
    f.ignore(
        _SEARCH, "compression_ratio_threshold", "logprob_threshold", "no_speech_threshold", "prompt_condition_type"
    )
    f.ignore(_SEARCH, "condition_on_prev_tokens", "cache_implementation", "_from_model_config")

    def ids(name: str) -> dict[str, int]:
        part = f.child(name)
        keys = f.optional(name, dict) or {}
        return {str(key).strip("<|>"): part.take(key, int, 0, least=0) for key in keys}

    def listed(name: str) -> tuple[int, ...]:
        return f.numbers(name, int) if f.has(name) else ()

    end = f.numbers("eos_token_id", int)[0] if f.is_list("eos_token_id") else f.take("eos_token_id", int, least=0)
    pairs = f.optional("alignment_heads", list) or []
    speech = SpeechTokens(
        start=f.take("decoder_start_token_id", int, least=0),
        end=end,
        no_timestamps=f.take("no_timestamps_token_id", int, least=0),
        previous=f.optional("prev_sot_token_id", int),
        languages=ids("lang_to_id"),
        tasks=ids("task_to_id"),
        suppress=listed("suppress_tokens"),
        suppress_first=listed("begin_suppress_tokens"),
        latest=f.optional("max_initial_timestamp_index", int),
    )
    heads = [(pair[0], pair[1]) for pair in pairs if isinstance(pair, list) and len(pair) == 2]
    if len(heads) != len(pairs) or not all(isinstance(n, int) and n >= 0 for pair in heads for n in pair):
        f.problems.append(f"{GENERATION}: alignment_heads are not pairs of a layer and a head")
    elif any(layer >= c.decoder.num_layers or head >= c.decoder.num_heads for layer, head in heads):
        f.problems.append(
            f"{GENERATION}: alignment_heads beyond {c.decoder.num_layers} layers of {c.decoder.num_heads} heads"
        )
    if speech.highest >= c.vocab_size:
        f.problems.append(f"{GENERATION}: token {speech.highest} is not in a vocabulary of {c.vocab_size}")
    f.done()
    return speech, tuple(heads)


def write_generation(speech: SpeechTokens, heads: Heads, context: int) -> dict[str, Any]:
    """The reverse of `read_generation`, as transformers reads it."""
    known: Mapping[str, Any] = {
        "prev_sot_token_id": speech.previous, "max_initial_timestamp_index": speech.latest,
        "lang_to_id": {f"<|{code}|>": i for code, i in speech.languages.items()}, "task_to_id": dict(speech.tasks),
        "suppress_tokens": list(speech.suppress), "begin_suppress_tokens": list(speech.suppress_first),
        "alignment_heads": [list(pair) for pair in heads],
    }  # fmt: skip
    return {
        "bos_token_id": speech.end, "decoder_start_token_id": speech.start, "eos_token_id": speech.end,
        "pad_token_id": speech.end, "no_timestamps_token_id": speech.no_timestamps, "max_length": context,
        "is_multilingual": bool(speech.languages), "return_timestamps": False,
        **{name: value for name, value in known.items() if value},
    }  # fmt: skip


def speech_tokens(words: LanguageTokenizer) -> SpeechTokens:
    """The control tokens of a tokenizer that has them by Whisper's names; none of them is ever written.

    Raises:
        ConfigError: it lacks one.
    """

    def named(name: str) -> int:
        found = words.backend.token_to_id(name)
        if found is None:
            raise ConfigError(f"the tokenizer has no {name}, which a model of speech needs")
        return found

    tasks = {task: named(f"<|{task}|>") for task in TASKS}
    start, end = named(START), named(END)
    inside = range(start + 1, min(tasks.values()))
    languages = {words.decode([i], skip_special=False).strip("<|>"): i for i in inside}
    return SpeechTokens(
        start=start, end=end, no_timestamps=named(NO_TIMESTAMPS), previous=named(PREVIOUS), languages=languages,
        tasks=tasks, suppress=tuple(range(start, named(NO_TIMESTAMPS))),
        suppress_first=(*words.encode(" ", special=False), end),
    )  # fmt: skip
