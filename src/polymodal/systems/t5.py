"""T5: every task of language as text to text, in one encoder-decoder.

Paper: Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", 2019,
https://arxiv.org/abs/1910.10683; 1.1 with gated layers and an output layer of its own; Flan-T5: Chung et al., "Scaling
Instruction-Finetuned Language Models", 2022, https://arxiv.org/abs/2210.11416. Official code:
google-research/text-to-text-transfer-transformer on Mesh-TensorFlow.
Hub: google-t5/t5-base, google/t5-v1_1-base, google/flan-t5-base, google/flan-t5-xxl, ...

    text -> bidirectional encoder --+
                                    cross-attention
    start, answer so far -> causal decoder --+-> linear -> next token

Training details kept here: Mesh-TensorFlow's initialisation; scores of attention are not scaled (the initialisation of
the queries is); relative positions, one table for the encoder and one for the decoder, shared by all their layers; the
tied output layer of 1.0 reads vectors times ``dim ** -0.5``; the decoder reads the labels shifted behind a start token.

Deviations: no dropout (1.0 is trained with 0.1, 1.1 without, both are fine-tuned with it). A fresh output layer of 1.1
is drawn at ``dim ** -0.5`` as in Mesh-TensorFlow (transformers draws it at one).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch

from polymodal.backbones.decoder import Gated
from polymodal.backbones.encdec import EncDecConfig, RelativeBias, StackConfig, Unbiased, t5_init_
from polymodal.backbones.encdec_families import read_stop, read_t5, t5_rules, write_stop, write_t5
from polymodal.core.verbs import TensorSpec
from polymodal.nn.norm import RMS
from polymodal.systems.reader import EncoderDecoder
from polymodal.weights.fields import Fields
from polymodal.weights.format import Format, Reference, write_whole
from polymodal.weights.rules import Rule


@dataclass(frozen=True, kw_only=True)
class T5Config:
    """A backbone and the tokens that end an answer."""

    backbone: EncDecConfig
    stop: tuple[int, ...] = (1,)


def preset(dim: int, hidden_dim: int, layers: int, heads: int, *, first: bool = False) -> T5Config:
    """1.1 and Flan-T5; ``first`` gives 1.0, with plain layers and a tied output layer."""
    mlp = Unbiased(hidden_dim=hidden_dim) if first else Gated(hidden_dim=hidden_dim, activation="gelu_tanh")
    stack = StackConfig(num_layers=layers, num_heads=heads, head_dim=64, mlp=mlp, scale=1.0)
    return T5Config(
        backbone=EncDecConfig(
            vocab_size=32128, dim=dim, encoder=stack, decoder=stack, norm=RMS(eps=1e-6), position=RelativeBias(),
            post_norm=False, start_id=0, pad_id=0, logit_scale=dim**-0.5 if first else None, tied=first,
        )
    )  # fmt: skip


PRESETS = {
    "google-t5/t5-small": lambda: preset(512, 2048, 6, 8, first=True),
    "google-t5/t5-base": lambda: preset(768, 3072, 12, 12, first=True),
    "google/flan-t5-small": lambda: preset(512, 1024, 8, 6),
    "google/flan-t5-base": lambda: preset(768, 2048, 12, 12),
    "google/flan-t5-large": lambda: preset(1024, 2816, 24, 16),
    "google/flan-t5-xl": lambda: preset(2048, 5120, 24, 32),
    "google/flan-t5-xxl": lambda: preset(4096, 10240, 24, 64),
}


@final
class T5(EncoderDecoder):
    """A text-to-text Transformer."""

    config: T5Config

    def init_weights(self) -> None:
        """Mesh-TensorFlow's scheme."""
        t5_init_(self.backbone)

    def inputs_spec(self) -> dict[str, TensorSpec]:
        vocab = self.config.backbone.vocab_size
        return {
            "ids": TensorSpec(shape=(13,), dtype=torch.int64, high=vocab),
            "valid": TensorSpec(shape=(13,), dtype=torch.bool),
            "labels": TensorSpec(shape=(7,), dtype=torch.int64, high=vocab),
        }

    reference = Reference(
        package="transformers", cls="T5ForConditionalGeneration",
        inputs={"ids": "input_ids", "valid": "attention_mask", "labels": "labels"}, output="logits",
    )  # fmt: skip


def read_hf(raw: Mapping[str, Any]) -> tuple[T5Config, dict[str, str]]:
    f = Fields(raw)
    f.require("model_type", "t5")
    backbone, stop = read_t5(f), read_stop(f, 1)
    report = f.done()
    return T5Config(backbone=backbone, stop=stop), report


def write_hf(c: T5Config) -> dict[str, Any]:
    named = {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}
    raw = named | write_stop(c.stop) | write_t5(c.backbone)
    return write_whole(c, raw, read_hf)


def rules_hf(config: T5Config) -> list[Rule]:
    return t5_rules(config.backbone, "", "backbone.")


T5.formats = {"hf": Format(read=read_hf, write=write_hf, rules=rules_hf)}
