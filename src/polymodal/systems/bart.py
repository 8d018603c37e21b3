"""BART: an encoder-decoder that learns to write a text whose noise was removed.

Paper: Lewis et al., "BART: Denoising Sequence-to-Sequence Pre-training for Natural Language Generation, Translation,
and Comprehension", 2019, https://arxiv.org/abs/1910.13461. Official code: facebookresearch/fairseq, examples/bart.
Hub: facebook/bart-base, facebook/bart-large, facebook/bart-large-cnn, ...

    noisy text -> bidirectional encoder --+
                                          cross-attention
    start, text so far -> causal decoder --+-> embedding table -> next token

Training details kept here: fairseq's initialisation (0.02); norms after each addition and behind the embeddings;
learned positions, whose first two rows are never read; the decoder starts from the end token; the vector of padding
learns nothing from being read.

Deviations: no dropout (0.1 in the paper). The constant on the scores that the Hub's files hold is kept, added, and not
trained. What every answer begins with is read from config.json alone (``forced_bos_token_id``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch

from polymodal.backbones.decoder import Learned, Plain
from polymodal.backbones.encdec import EncDecConfig, StackConfig, bart_init_
from polymodal.backbones.encdec_families import bart_rules, read_bart, read_id, read_stop, write_bart, write_stop
from polymodal.core.verbs import TensorSpec
from polymodal.nn.norm import Layer
from polymodal.systems.reader import EncoderDecoder
from polymodal.weights.fields import Fields
from polymodal.weights.format import Format, Reference, write_whole
from polymodal.weights.rules import Rule


@dataclass(frozen=True, kw_only=True)
class BARTConfig:
    """A backbone, the tokens that end an answer, and the one that begins every answer, if there is one."""

    backbone: EncDecConfig
    stop: tuple[int, ...] = (2,)
    forced_id: int | None = None


def preset(dim: int, layers: int, heads: int, *, vocab: int = 50265, whole: bool = False) -> BARTConfig:
    """A config of a published model; ``whole`` ones were written with their output layer."""
    stack = StackConfig(
        num_layers=layers, num_heads=heads, head_dim=dim // heads, mlp=Plain(hidden_dim=4 * dim), bias=True
    )
    return BARTConfig(
        backbone=EncDecConfig(
            vocab_size=vocab, dim=dim, encoder=stack, decoder=stack, norm=Layer(eps=1e-5),
            position=Learned(count=1024, offset=2), post_norm=True, start_id=2, pad_id=1, fixed_id=1,
            logit_bias=whole,
        ),
        forced_id=0,
    )  # fmt: skip


PRESETS = {
    "facebook/bart-base": lambda: preset(768, 6, 12),
    "facebook/bart-large": lambda: preset(1024, 12, 16),
    "facebook/bart-large-cnn": lambda: preset(1024, 12, 16, vocab=50264, whole=True),
}


@final
class BART(EncoderDecoder):
    """A denoising sequence-to-sequence Transformer."""

    config: BARTConfig

    def init_weights(self) -> None:
        """fairseq's scheme."""
        bart_init_(self.backbone)

    def inputs_spec(self) -> dict[str, TensorSpec]:
        c = self.config.backbone
        assert isinstance(c.position, Learned)
        length = min(13, c.position.count)
        return {
            "ids": TensorSpec(shape=(length,), dtype=torch.int64, high=c.vocab_size),
            "valid": TensorSpec(shape=(length,), dtype=torch.bool),
            "labels": TensorSpec(shape=(min(7, length),), dtype=torch.int64, high=c.vocab_size),
        }

    @property
    def forced_ids(self) -> tuple[int, ...]:
        return () if self.config.forced_id is None else (self.config.forced_id,)

    reference = Reference(
        package="transformers", cls="BartForConditionalGeneration",
        inputs={"ids": "input_ids", "valid": "attention_mask", "labels": "labels"}, output="logits",
    )  # fmt: skip


def read_hf(raw: Mapping[str, Any]) -> tuple[BARTConfig, dict[str, str]]:
    f = Fields(raw)
    f.require("model_type", "bart")
    backbone, stop = read_bart(f), read_stop(f, 2)
    forced = read_id(f, "forced_bos_token_id", 0)
    forced_id = forced if f.has("forced_bos_token_id") else None
    report = f.done()
    return BARTConfig(backbone=backbone, stop=stop, forced_id=forced_id), report


def write_hf(c: BARTConfig) -> dict[str, Any]:
    forced = {} if c.forced_id is None else {"forced_bos_token_id": c.forced_id}
    raw = {"model_type": "bart"} | write_stop(c.stop) | forced | write_bart(c.backbone)
    return write_whole(c, raw, read_hf)


def rules_hf(config: BARTConfig) -> list[Rule]:
    return bart_rules(config.backbone, "", "backbone.")


BART.formats = {"hf": Format(read=read_hf, write=write_hf, rules=rules_hf)}
