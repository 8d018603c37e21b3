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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from polymodal.backbones.decoder import Learned, Plain
from polymodal.backbones.encdec import EncDec, EncDecConfig, EncDecMemory, StackConfig, bart_init_, only_text
from polymodal.backbones.encdec_families import bart_rules, read_bart, read_id, read_stop, write_bart, write_stop
from polymodal.core.batch import Batch, Loss
from polymodal.core.chat import Chat
from polymodal.core.errors import ConfigError, UnsupportedError
from polymodal.core.sample import Sample
from polymodal.core.verbs import TensorSpec
from polymodal.heads.lm import IGNORE, next_token_loss
from polymodal.nn.norm import Layer
from polymodal.systems.base import Format, Reference, System
from polymodal.tokenizers.language import LanguageTokenizer
from polymodal.weights.fields import Fields
from polymodal.weights.format import different_fields
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
class BART(System):
    """A denoising sequence-to-sequence Transformer."""

    config: BARTConfig
    tokenizer: LanguageTokenizer | None = None  # type: ignore[assignment]

    def __init__(self, config: BARTConfig) -> None:
        super().__init__(config)
        self.backbone = EncDec(config.backbone)

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

    def _vectors(self, batch: Batch) -> Float[Tensor, "batch tokens dim"]:
        b = self.backbone
        return b(b.text(batch["ids"], batch.get("valid")), b.target(b.shift(batch["labels"]))).x

    def forward(self, batch: Batch) -> Float[Tensor, "batch tokens vocab"]:
        """Scores of each label, given the text and the labels before it."""
        return self.backbone.logits(self._vectors(batch))

    def loss(self, batch: Batch) -> Loss:
        """Cross-entropy of the labels that are not -100."""
        # The loss shifts by one, and the decoder's input was shifted already.
        vectors, labels = F.pad(self._vectors(batch), (0, 0, 0, 1)), F.pad(batch["labels"], (1, 0), value=IGNORE)
        return next_token_loss(vectors, labels, self.backbone.logits)

    def count(self, sample: Sample) -> int:
        """Tokens that the encoder reads of the texts of a sample."""
        return sum(len(self._ids(part.text)) for part in sample.texts)

    def load_processors(self, folder: Path) -> None:
        if (folder / "tokenizer.json").is_file():
            self.tokenizer = LanguageTokenizer.from_folder(folder)

    def _ids(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise UnsupportedError(f"BART ({self.source}) reads no text: no tokenizer.json was beside its weights")
        return self.tokenizer.encode(text, special=True)

    # -- the Generates protocol

    @property
    def vocab_size(self) -> int:
        return self.config.backbone.vocab_size

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self.config.stop

    def prompt(self, chats: Sequence[Chat]) -> Batch:
        """What the encoder reads of each question.

        Raises:
            MediaError: a chat is more than one text of a user, empty, or too long.
            UnsupportedError: no tokenizer was beside the weights.
        """
        return self.backbone.prompt([self._ids(only_text(chat)) for chat in chats])

    def new_memory(self, rows: int, capacity: int) -> EncDecMemory:
        """Room for ``capacity`` tokens of the answer; the prompt is read by the encoder and takes none of it."""
        return self.backbone.new_memory(rows, capacity)

    def prefill(self, batch: Batch, memory: EncDecMemory) -> Float[Tensor, "rows vocab"]:
        batch = batch.to(self.device)
        forced = () if self.config.forced_id is None else (self.config.forced_id,)
        return self.backbone.prefill(self.backbone.text(batch["ids"], batch.get("valid")), memory, forced)

    def step(self, ids: Int[Tensor, " rows"], memory: EncDecMemory) -> Float[Tensor, "rows vocab"]:
        return self.backbone.step(ids, memory)

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
    lost = different_fields(c, read_hf(raw)[0])
    if lost:
        raise ConfigError(f"the Hub's format has no field for {', '.join(lost)} of this config")
    return raw


def rules_hf(config: BARTConfig) -> list[Rule]:
    return bart_rules(config.backbone, "", "backbone.")


BART.formats = {"hf": Format(read=read_hf, write=write_hf, rules=rules_hf)}
