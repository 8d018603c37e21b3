"""The config of CLAP, and how the Hub writes it and names its weights. Not a system itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from polymodal.backbones.bert import BertConfig
from polymodal.backbones.encdec_families import bert_rules
from polymodal.connectors.mlp import MLP
from polymodal.encoders.htsat import HTSATConfig
from polymodal.weights.fields import (
    ACTIVATION_NAMES,
    ACTIVATIONS,
    TRANSFORMER_FIELDS,
    Fields,
    FieldTable,
    read_bert_fields,
    read_fields,
    write_fields,
)
from polymodal.weights.format import write_whole
from polymodal.weights.rules import Rule, drop, renames, rule


@dataclass(frozen=True, kw_only=True)
class CLAPConfig:
    """Two towers, and the layers from each into the space that they share."""

    audio: HTSATConfig
    text: BertConfig
    embed_dim: int = 512
    connector: MLP = field(default_factory=lambda: MLP(activation="relu"))


AUDIO: FieldTable = (
    ("num_mel_bins", "num_mels", 64), ("spec_size", "spec_size", 256), ("patch_embeds_hidden_size", "dim", 96),
    ("window_size", "window", 8), ("mlp_ratio", "mlp_ratio", 4.0), ("hidden_act", "activation", "gelu"),
    ("layer_norm_eps", "norm_eps", 1e-5), ("qkv_bias", "qkv_bias", True),
)  # fmt: skip
TEXT: FieldTable = (
    *TRANSFORMER_FIELDS, ("hidden_act", "activation", "gelu"), ("layer_norm_eps", "norm_eps", 1e-12),
    ("vocab_size", "vocab_size", 50265), ("type_vocab_size", "num_types", 1),
)  # fmt: skip
_BASE = HTSATConfig()


def _side(f: Fields, name: str) -> int:
    if not f.is_list(name):
        return f.take(name, int, 4)
    sides = f.numbers(name, int)
    if len(set(sides)) != 1:
        f.problems.append(f"config.json: {name} is {sides}; only squares are supported")
    return (*sides, 4)[0]


def _read_audio(f: Fields) -> dict[str, Any]:
    f.ignore("dropout of training, which these models are built without", "hidden_dropout_prob", "drop_path_rate")
    f.ignore("dropout of training, which these models are built without", "attention_probs_dropout_prob")
    f.ignore("a head that is not here, or what the rest says", "num_classes", "hidden_size", "num_hidden_layers")
    f.ignore("the outer config says it", "projection_dim", "projection_hidden_act")
    f.require("model_type", "clap_audio_model")
    f.require("patch_embed_input_channels", 1)
    f.require("flatten_patch_embeds", True)
    f.require("enable_patch_layer_norm", True)
    fused, ratio = f.take("enable_fusion", bool, False), f.take("aff_block_r", int, 4)
    f.require("fusion_type", "aff_2d", *([] if fused else [None]))
    return read_fields(f, AUDIO) | {
        "patch_size": _side(f, "patch_size"), "patch_stride": _side(f, "patch_stride"),
        "depths": f.numbers("depths", int) if "depths" in f else _BASE.depths, "fusion": ratio if fused else None,
        "num_heads": f.numbers("num_attention_heads", int) if "num_attention_heads" in f else _BASE.num_heads,
    }  # fmt: skip


def read_hf(raw: Mapping[str, Any]) -> tuple[CLAPConfig, dict[str, str]]:
    f = Fields(raw)
    f.require("model_type", "clap")
    f.ignore("the scales are weights of the checkpoint", "logit_scale_init_value")
    f.ignore("the configs of the towers say it", "hidden_size", "num_hidden_layers")
    t = f.child("text_config")
    t.require("model_type", "clap_text_model")
    t.ignore("the outer config says it", "projection_dim", "projection_hidden_act")
    t.ignore("of another kind of fusion, never read", "fusion_hidden_size", "fusion_num_hidden_layers")
    t.ignore("texts are read whole, never continued", "use_cache")
    offset = t.take("pad_token_id", int, 1, least=0) + 1
    places = t.take("max_position_embeddings", int, 514, least=offset + 1)
    text = BertConfig(**read_bert_fields(t, TEXT), context=places - offset, offset=offset)
    audio = _read_audio(f.child("audio_config"))
    embed_dim = f.take("projection_dim", int, 512)
    connector = MLP(activation=f.choose("projection_hidden_act", ACTIVATIONS, "relu"))
    report = f.done()
    return CLAPConfig(audio=HTSATConfig(**audio), text=text, embed_dim=embed_dim, connector=connector), report


def write_hf(c: CLAPConfig) -> dict[str, Any]:
    a, t, act = c.audio, c.text, ACTIVATION_NAMES[c.connector.activation]
    shared = {"projection_dim": c.embed_dim, "projection_hidden_act": act}
    audio = write_fields(a, AUDIO) | shared | {
        "model_type": "clap_audio_model", "patch_size": a.patch_size, "patch_stride": [a.patch_stride] * 2,
        "depths": list(a.depths), "num_attention_heads": list(a.num_heads), "hidden_size": a.out_dim,
        "num_hidden_layers": len(a.depths), "enable_fusion": a.fusion is not None, "aff_block_r": a.fusion or 4,
        "fusion_type": None if a.fusion is None else "aff_2d",
    }  # fmt: skip
    text = write_fields(t, TEXT) | shared | {
        "model_type": "clap_text_model", "pad_token_id": t.offset - 1, "max_position_embeddings": t.context + t.offset,
    }  # fmt: skip
    raw = {"architectures": ["ClapModel"], "model_type": "clap", "audio_config": audio, "text_config": text} | shared
    return write_whole(c, raw, read_hf)


def rules_hf(config: CLAPConfig) -> list[Rule]:
    theirs, block, mine = "audio_model.audio_encoder", "layers.{i}.blocks.{j}", "audio.stages.{i}.blocks.{j}"
    attention = {f"attention.self.{a}": f"attn.{a[0]}_proj" for a in ("query", "key", "value")}
    return [
        rule("logit_scale_a", "head.media_scale"),
        rule("logit_scale_t", "head.text_scale"),
        *(
            rule(f"{t}_projection.linear{n + 1}.{{p}}", f"{t}_projection.layers.{n}.{{p}}")
            for t in ("audio", "text") for n in (0, 1)
        ),
        *renames(theirs, "audio", {
            "batch_norm": "input_norm", "norm": "norm", "patch_embed.proj": "patch_embed",
            "patch_embed.norm": "patch_norm", "patch_embed.mel_conv2d": "local",
            "patch_embed.fusion_model.local_att.{n}": "fusion.local.{n}",
            "patch_embed.fusion_model.global_att.{n}": "fusion.whole.{n}",
            "layers.{i}.downsample.norm": "stages.{i}.merge.norm",
            "layers.{i}.downsample.reduction": "stages.{i}.merge.reduction",
        }),
        *renames(f"{theirs}.{block}", mine, attention | {
            "attention.output.dense": "attn.o_proj", "intermediate.dense": "mlp.up_proj",
            "output.dense": "mlp.down_proj", "layernorm_before": "attn_norm", "layernorm_after": "mlp_norm",
        }),
        rule(f"{theirs}.{block}.attention.self.relative_position_bias_table", f"{mine}.attn.bias"),
        drop(f"{theirs}.{block}.attention.self.relative_position_index", "follows from the window"),
        *bert_rules("text_model.", "text."),
        rule("text_model.pooler.dense.{p}", "pool.proj.{p}"),
        drop("text_model.embeddings.token_type_ids", "zeros: there is one type"),
    ]  # fmt: skip


def preset(audio: HTSATConfig) -> Callable[[], CLAPConfig]:
    """The Hub's defaults with another tower."""
    return lambda: replace(read_hf({})[0], audio=audio)
