"""The config of wav2vec 2.0, and how the Hub writes it and names its weights. Not a system itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from polymodal.backbones.encdec_families import read_architecture
from polymodal.encoders.wav2vec2 import Wav2Vec2TowerConfig
from polymodal.heads.ctc import CTCConfig
from polymodal.heads.speech_codes import SpeechCodesConfig
from polymodal.nn.spans import Spans
from polymodal.weights.fields import TRANSFORMER_FIELDS, Fields, FieldTable, read_fields, write_fields
from polymodal.weights.format import write_whole
from polymodal.weights.rules import Rule, Squeeze, read_only, renames, rule


@dataclass(frozen=True, kw_only=True)
class Wav2Vec2Config:
    """A tower and what it learns: codes from sound alone, or letters.

    Attributes:
        times: which steps are hidden while training; with a share of 0 nothing is, and there is no vector for it.
        channels: which channels are set to zero while training.
        hides: False in files that have the vector of hidden steps and never use it.
    """

    audio: Wav2Vec2TowerConfig
    head: SpeechCodesConfig | CTCConfig
    times: Spans = field(default_factory=Spans)
    channels: Spans = field(default_factory=lambda: Spans(share=0.0, least=0))
    hides: bool = True


_PRETRAINS, _WRITES = "Wav2Vec2ForPreTraining", "Wav2Vec2ForCTC"
TOWER: FieldTable = (
    *TRANSFORMER_FIELDS, ("hidden_act", "activation", "gelu"), ("layer_norm_eps", "norm_eps", 1e-5),
    ("conv_bias", "conv_bias", False), ("num_conv_pos_embeddings", "position_kernel", 128),
    ("num_conv_pos_embedding_groups", "position_groups", 16), ("do_stable_layer_norm", "pre_norm", False),
)  # fmt: skip
CONVS = {"conv_dim": "conv_dims", "conv_kernel": "conv_kernels", "conv_stride": "conv_strides"}
CODES: FieldTable = (
    ("num_codevectors_per_group", "num_codes", 320), ("num_codevector_groups", "num_codebooks", 2),
    ("codevector_dim", "code_dim", 256), ("proj_codevector_dim", "proj_dim", 256),
    ("num_negatives", "num_negatives", 100),
    ("contrastive_logits_temperature", "temperature", 0.1), ("diversity_loss_weight", "diversity", 0.1),
)  # fmt: skip
GUMBEL: FieldTable = (
    ("gumbel_temperature_start", "gumbel_start", 2.0), ("gumbel_temperature_decay", "gumbel_decay", 0.999995),
)  # fmt: skip
FLOOR = "gumbel_temperature_floor"
_LEFT = {
    "dropout of training, which these models are built without": (
        "hidden_dropout", "activation_dropout", "attention_dropout", "feat_proj_dropout", "feat_quantizer_dropout",
        "final_dropout", "layerdrop", "hidden_dropout_prob", "feat_extract_dropout",
    ),
    "a head that is not here": (
        "use_weighted_layer_sum", "classifier_proj_size", "tdnn_dim", "tdnn_kernel", "tdnn_dilation",
        "xvector_output_dim",
    ),
    "of adapters, which are not there": (
        "adapter_kernel_size", "adapter_stride", "num_adapter_layers", "output_hidden_size",
    ),
    "conv_dim says it": ("num_feat_extract_layers",),
    "left behind by the first release, and never read": (
        "freeze_feat_extract_train", "mask_channel_length", "mask_channel_min_space", "mask_channel_other",
        "mask_channel_prob", "mask_channel_selection", "mask_time_min_space", "mask_time_other", "mask_time_selection",
        "no_mask_channel_overlap", "no_mask_time_overlap",
    ),
}  # fmt: skip


def read_hf(raw: Mapping[str, Any]) -> tuple[Wav2Vec2Config, dict[str, str]]:
    f = Fields(raw)
    f.require("model_type", "wav2vec2")
    writes = read_architecture(f, (_PRETRAINS, _WRITES)) == _WRITES
    for reason, names in _LEFT.items():
        f.ignore(reason, *names)
    f.require("feat_extract_activation", "gelu")
    f.require("add_adapter", False)
    f.require("adapter_attn_dim", None)
    tower = read_fields(f, TOWER)
    base = Wav2Vec2TowerConfig()
    for theirs, ours in CONVS.items():
        tower[ours] = f.numbers(theirs, int) if theirs in f else getattr(base, ours)
    tower["conv_norm"] = f.choose("feat_extract_norm", {"group": "group", "layer": "layer"}, "group")
    head: dict[str, Any]
    if writes:
        f.ignore("of pre-training, which is over", FLOOR, *(theirs for theirs, _, _ in (*CODES, *GUMBEL)))
        head = {
            "vocab_size": f.take("vocab_size", int, 32), "blank_id": f.take("pad_token_id", int, 0, least=0),
            "by_length": f.choose("ctc_loss_reduction", {"sum": False, "mean": True}, "sum"),
            "zero_infinity": f.take("ctc_zero_infinity", bool, False),
        }  # fmt: skip
    else:
        f.ignore("of letters, which it does not write", "vocab_size", "pad_token_id", "ctc_loss_reduction")
        f.ignore("of letters, which it does not write", "ctc_zero_infinity")
        head = read_fields(f, (*CODES, *GUMBEL))
        # Published files do not say it: the floor is that of the paper's BASE and LARGE.
        head["gumbel_floor"] = f.take(FLOOR, float, 0.1 if tower["conv_norm"] == "layer" else 0.5)
    times, channels = _spans(f, "time", 0.05, 2), _spans(f, "feature", 0.0, 0)
    hides = f.take("apply_spec_augment", bool, True)
    report = f.done()
    return Wav2Vec2Config(
        audio=Wav2Vec2TowerConfig(**tower),
        head=CTCConfig(**head) if writes else SpeechCodesConfig(**head),
        times=Spans(**times),
        channels=Spans(**channels),
        hides=hides,
    ), report


def _spans(f: Fields, name: str, share: float, least: int) -> dict[str, Any]:
    return {
        "share": f.take(f"mask_{name}_prob", float, share),
        "length": f.take(f"mask_{name}_length", int, 10),
        "least": f.take(f"mask_{name}_min_masks", int, least, least=0),
    }


def write_hf(c: Wav2Vec2Config) -> dict[str, Any]:
    raw = write_fields(c.audio, TOWER) | {theirs: list(getattr(c.audio, ours)) for theirs, ours in CONVS.items()}
    raw |= {"model_type": "wav2vec2", "feat_extract_norm": c.audio.conv_norm, "feat_extract_activation": "gelu"}
    raw["apply_spec_augment"] = c.hides
    for theirs, spans in (("time", c.times), ("feature", c.channels)):
        raw |= {
            f"mask_{theirs}_prob": spans.share, f"mask_{theirs}_length": spans.length,
            f"mask_{theirs}_min_masks": spans.least,
        }  # fmt: skip
    if isinstance(c.head, CTCConfig):
        raw |= {"architectures": [_WRITES], "vocab_size": c.head.vocab_size, "pad_token_id": c.head.blank_id}
        raw |= {"ctc_loss_reduction": "mean" if c.head.by_length else "sum", "ctc_zero_infinity": c.head.zero_infinity}
    else:
        raw |= {"architectures": [_PRETRAINS], **write_fields(c.head, (*CODES, *GUMBEL)), FLOOR: c.head.gumbel_floor}
    return write_whole(c, raw, read_hf)


def rules_hf(config: Wav2Vec2Config) -> list[Rule]:
    layers, conv = "wav2vec2.encoder.layers.{i}", "wav2vec2.encoder.pos_conv_embed.conv"
    attention = {f"attention.{n}_proj": f"attn.{n}_proj" for n in "qkv"} | {"attention.out_proj": "attn.o_proj"}
    feed = {"feed_forward.intermediate_dense": "mlp.up_proj", "feed_forward.output_dense": "mlp.down_proj"}
    norms = {"layer_norm": "attn_norm", "final_layer_norm": "mlp_norm"}
    weight = "audio.position.parametrizations.weight"
    head = (
        [rule("lm_head.{p}", "head.proj.{p}")]
        if isinstance(config.head, CTCConfig)
        else [
            rule("quantizer.codevectors", "head.codes", Squeeze((0,))),
            rule("quantizer.weight_proj.{p}", "head.choice.{p}"),
            rule("project_hid.{p}", "head.query.{p}"),
            rule("project_q.{p}", "head.target.{p}"),
        ]
    )
    return [
        rule("wav2vec2.masked_spec_embed", "hidden"),
        rule("wav2vec2.feature_extractor.conv_layers.{i}.conv.{p}", "audio.convs.{i}.conv.{p}"),
        rule("wav2vec2.feature_extractor.conv_layers.{i}.layer_norm.{p}", "audio.convs.{i}.norm.{p}"),
        rule("wav2vec2.feature_projection.layer_norm.{p}", "audio.feature_norm.{p}"),
        rule("wav2vec2.feature_projection.projection.{p}", "audio.projection.{p}"),
        rule(f"{conv}.bias", "audio.position.bias"),
        rule(f"{conv}.parametrizations.weight.original0", f"{weight}.original0"),
        rule(f"{conv}.parametrizations.weight.original1", f"{weight}.original1"),
        *read_only([rule(f"{conv}.weight_g", f"{weight}.original0"), rule(f"{conv}.weight_v", f"{weight}.original1")]),
        rule("wav2vec2.encoder.layer_norm.{p}", "audio.norm.{p}"),
        *renames(layers, "audio.blocks.{i}", attention | feed | norms),
        *head,
    ]
