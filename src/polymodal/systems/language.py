"""Language models: the text-only backbones of the vision-language systems, usable alone.

Papers: Touvron et al., "LLaMA", 2023, https://arxiv.org/abs/2302.13971, and the reports of Mistral, Qwen, Gemma, Phi-3,
OPT and GPT-2. Official code: transformers. Hub: meta-llama/Llama-3.2-1B, Qwen/Qwen2.5-0.5B, Qwen/Qwen3-0.6B,
google/gemma-2-2b, HuggingFaceTB/SmolLM2-135M, microsoft/Phi-3-mini-4k-instruct, facebook/opt-125m, gpt2, ...

    ids -> embedding -> decoder blocks -> norm -> scores of the next token -> cross-entropy

Training details kept here: normal weights of the config's deviation and zero biases; the loss is the mean over the
supervised tokens of the global batch.

Deviations: no dropout (OPT and GPT-2 were pre-trained with 0.1); GPT-2's smaller deviation for projections into the
residual stream is not in the Hub's config and is not applied; early Gemma configs that say gelu are read as tanh-GELU;
the first Qwen reads at most the length it was trained with (its dynamic rotary base and its logarithm on the scores,
which begin behind that, are not here), and its files have no tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch

from polymodal.backbones.decoder import Decoder, DecoderConfig
from polymodal.backbones.families import FAMILIES, ControlIds
from polymodal.core.errors import ConfigError, did_you_mean
from polymodal.core.verbs import TensorSpec
from polymodal.systems.generator import Generator
from polymodal.weights.fields import Fields
from polymodal.weights.format import Format, Reference
from polymodal.weights.rules import Rule


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """A decoder; ``family`` is the `model_type` under whose names the Hub keeps it."""

    family: str
    backbone: DecoderConfig
    control: ControlIds = field(default_factory=ControlIds)

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ConfigError(f"no family {self.family!r}{did_you_mean(self.family, FAMILIES)}")


@final
class LanguageModel(Generator):
    """A decoder-only language model."""

    config: LanguageModelConfig

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__(config)
        self.backbone = Decoder(config.backbone)
        self.stop_ids = config.control.stop
        if not FAMILIES[config.family].public:
            self.reference = None  # type: ignore[misc, assignment]

    def init_weights(self) -> None:
        self.backbone.init_weights()

    def inputs_spec(self) -> dict[str, TensorSpec]:
        high = self.config.backbone.vocab_size
        return {name: TensorSpec(shape=(12,), dtype=torch.int64, low=3, high=high) for name in ("ids", "labels")}

    reference = Reference(
        package="transformers", cls="AutoModelForCausalLM", inputs={"ids": "input_ids", "labels": "labels"},
        output="logits",
    )  # fmt: skip


def read_hf(raw: Mapping[str, Any]) -> tuple[LanguageModelConfig, dict[str, str]]:
    f = Fields(raw)
    family = FAMILIES[f.choose("model_type", {name: name for name in FAMILIES})]
    backbone, control = family.read(f), ControlIds.read(f, family.control)
    f.require("use_bidirectional_attention", None, False)
    report = f.done()
    return LanguageModelConfig(family=family.model_type, backbone=backbone, control=control), report


def write_hf(c: LanguageModelConfig) -> dict[str, Any]:
    family = FAMILIES[c.family]
    return {
        "architectures": [family.architecture],
        "model_type": c.family,
        **family.write(c.backbone),
        **c.control.write(),
    }


def rules_hf(c: LanguageModelConfig) -> list[Rule]:
    family = FAMILIES[c.family]
    return family.rules(c.backbone, family.base, "lm_head", "backbone")


LanguageModel.formats = {"hf": Format(read=read_hf, write=write_hf, rules=rules_hf)}


def preset(family: str, raw: Mapping[str, Any]) -> Callable[[], LanguageModelConfig]:
    """A config from the fields in which it differs from the Hub's defaults."""
    return lambda: read_hf({"model_type": family, **raw})[0]


def sizes(dim: int, hidden: int, layers: int, heads: int, kv_heads: int, vocab: int, context: int) -> dict[str, Any]:
    names = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "vocab_size", "max_position_embeddings",
    )  # fmt: skip
    return dict(zip(names, (dim, hidden, layers, heads, kv_heads, vocab, context), strict=True))


LLAMA3 = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
TIED = {"tie_word_embeddings": True}


def control(start: int, stop: int, pad: int | None = None) -> dict[str, Any]:
    return ControlIds(start=start, stop=(stop,), pad=pad).write()


PRESETS = {
    "HuggingFaceTB/SmolLM2-135M": preset(
        "llama",
        sizes(576, 1536, 30, 9, 3, 49152, 8192)
        | TIED
        | control(0, 0)
        | {"rope_theta": 100000, "rms_norm_eps": 1e-05, "initializer_range": 1 / 24},
    ),
    "meta-llama/Llama-3.2-1B": preset(
        "llama",
        sizes(2048, 8192, 16, 32, 8, 128256, 131072)
        | TIED
        | control(128000, 128001)
        | {"rope_theta": 500000.0, "rope_scaling": LLAMA3, "rms_norm_eps": 1e-05, "head_dim": 64},
    ),
    "lmsys/vicuna-7b-v1.5": preset(
        "llama", sizes(4096, 11008, 32, 32, 32, 32000, 4096) | control(1, 2, 0) | {"rms_norm_eps": 1e-05}
    ),
    "mistralai/Mistral-7B-v0.1": preset(
        "mistral", sizes(4096, 14336, 32, 32, 8, 32000, 32768) | {"sliding_window": 4096, "rms_norm_eps": 1e-05}
    ),
    "Qwen/Qwen-7B": preset("qwen", {}),
    "Qwen/Qwen2.5-0.5B": preset(
        "qwen2", sizes(896, 4864, 24, 14, 2, 151936, 32768) | TIED | control(151643, 151643) | {"rope_theta": 1000000.0}
    ),
    "Qwen/Qwen3-0.6B": preset(
        "qwen3",
        sizes(1024, 3072, 28, 16, 8, 151936, 40960)
        | TIED
        | control(151643, 151645)
        | {"rope_theta": 1000000.0, "head_dim": 128},
    ),
    "google/gemma-2b": preset("gemma", sizes(2048, 16384, 18, 8, 1, 256000, 8192) | {"head_dim": 256}),
    "google/gemma-2-2b": preset("gemma2", sizes(2304, 9216, 26, 8, 4, 256000, 8192) | {"head_dim": 256}),
    "google/gemma-3-1b-pt": preset(
        "gemma3_text", sizes(1152, 6912, 26, 4, 1, 262144, 32768) | {"head_dim": 256, "sliding_window": 512}
    ),
    "microsoft/Phi-3-mini-4k-instruct": preset(
        "phi3", sizes(3072, 8192, 32, 32, 32, 32064, 4096) | {"sliding_window": 2047}
    ),
    "facebook/opt-125m": preset("opt", {}),
    "openai-community/gpt2": preset("gpt2", {}),
}
