"""BERT: a bidirectional encoder that learns to fill in masked words.

Paper: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", 2018,
https://arxiv.org/abs/1810.04805. Official code: google-research/bert.
Hub: google-bert/bert-base-uncased, google-bert/bert-large-uncased, ...

    [CLS] text [SEP] other text [SEP] -> embeddings -> post-norm blocks -+-> layer, norm, embedding table -> masked word
                                                                         +-> first token -> tanh layer -> vector

Training details kept here: the official initialisation (normals of 0.02 cut at two deviations); norms after each
addition, with an epsilon of 1e-12; the tied output layer with a bias of its own.

Deviations: no dropout (0.1 in the paper). No prediction of the next sentence: of files that were written with both
heads, the one of masked words is read. The vector of padding gets a gradient like any other where padding is read as a
token, which no batch does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from polymodal.backbones.bert import Bert, BertConfig, BertPooler, MaskedHead, bert_init_
from polymodal.backbones.encdec_families import (
    bert_rules,
    masked_head_rules,
    read_architecture,
    read_bert,
    write_bert,
)
from polymodal.core.batch import Batch, Loss
from polymodal.core.errors import UnsupportedError
from polymodal.core.verbs import TensorSpec
from polymodal.heads.lm import ahead, next_token_loss
from polymodal.systems.reader import Reader
from polymodal.weights.fields import Fields
from polymodal.weights.format import Format, Reference, write_whole
from polymodal.weights.rules import Rule, drop, rule


@dataclass(frozen=True, kw_only=True)
class BERTConfig:
    """An encoder and what is on top of it: the head of masked words, or the layer over the first token."""

    text: BertConfig
    output: Literal["masked words", "first token"] = "masked words"


def preset(dim: int, layers: int, heads: int, *, vocab: int = 30522) -> BERTConfig:
    return BERTConfig(
        text=BertConfig(vocab_size=vocab, context=512, dim=dim, num_layers=layers, num_heads=heads, hidden_dim=4 * dim)
    )


PRESETS = {
    "google-bert/bert-base-uncased": lambda: preset(768, 12, 12),
    "google-bert/bert-large-uncased": lambda: preset(1024, 24, 16),
    "google-bert/bert-base-cased": lambda: preset(768, 12, 12, vocab=28996),
}


@final
class BERT(Reader):
    """Bidirectional encoder representations from Transformers."""

    config: BERTConfig

    def __init__(self, config: BERTConfig) -> None:
        super().__init__(config)
        masked = config.output == "masked words"
        self.text = Bert(config.text)
        self.head = MaskedHead(config.text) if masked else None
        self.pool = None if masked else BertPooler(config.text.dim)

    def init_weights(self) -> None:
        """The official code's scheme."""
        bert_init_(self)

    def inputs_spec(self) -> dict[str, TensorSpec]:
        c = self.config.text
        length = min(11, c.context)

        def integers(high: int) -> TensorSpec:
            return TensorSpec(shape=(length,), dtype=torch.int64, low=min(3, high - 1), high=high)

        valid = TensorSpec(shape=(length,), dtype=torch.bool)
        names = {"ids": integers(c.vocab_size), "valid": valid, "types": integers(c.num_types)}
        return names if self.head is None else names | {"labels": integers(c.vocab_size)}

    def vectors(self, batch: Batch) -> Float[Tensor, "batch tokens dim"]:
        """A vector for each token; ``valid`` and ``types`` may be missing from the batch."""
        return self.text(self.text.text(batch["ids"], batch.get("valid"), batch.get("types"))).x

    def forward(self, batch: Batch) -> Float[Tensor, "batch *tokens_and_width"]:
        """Scores of the vocabulary at each token; without that head, the vector of the first token."""
        vectors = self.vectors(batch)
        return self._scores(vectors) if self.pool is None else self.pool(vectors)

    def loss(self, batch: Batch) -> Loss:
        """Cross-entropy of the words at the masked places; labels are -100 elsewhere.

        Raises:
            UnsupportedError: the system has no head of masked words.
        """
        if self.head is None:
            raise UnsupportedError(f"BERT ({self.source}) has no head of masked words, so it has no loss")
        return next_token_loss(*ahead(self.vectors(batch), batch["labels"]), self._scores)

    def _scores(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch vocab"]:
        assert self.head is not None
        return self.head(x, self.text.embed_tokens.weight)

    reference = Reference(
        package="transformers", cls="BertForMaskedLM",
        inputs={"ids": "input_ids", "valid": "attention_mask", "types": "token_type_ids", "labels": "labels"},
        output="logits",
    )  # fmt: skip


_MASKED, _BASE = "BertForMaskedLM", "BertModel"


def read_hf(raw: Mapping[str, Any]) -> tuple[BERTConfig, dict[str, str]]:
    f = Fields(raw)
    f.require("model_type", "bert")
    base = read_architecture(f, (_MASKED, "BertForPreTraining", _BASE)) == _BASE
    text = read_bert(f)
    report = f.done()
    return BERTConfig(text=text, output="first token" if base else "masked words"), report


def write_hf(c: BERTConfig) -> dict[str, Any]:
    architecture = _MASKED if c.output == "masked words" else _BASE
    raw = {"architectures": [architecture], "model_type": "bert"} | write_bert(c.text)
    return write_whole(c, raw, read_hf)


def rules_hf(config: BERTConfig) -> list[Rule]:
    if config.output == "first token":
        return [*bert_rules("", "text."), rule("pooler.dense.{p}", "pool.proj.{p}")]
    return [
        *bert_rules("bert.", "text."),
        *masked_head_rules("cls.predictions.", "head."),
        drop("bert.pooler.dense.{p}", "belongs to the prediction of the next sentence"),
        drop("cls.seq_relationship.{p}", "the prediction of the next sentence"),
    ]


BERT.formats = {"hf": Format(read=read_hf, write=write_hf, rules=rules_hf)}
