"""What the systems share whose language model may be a decoder or an encoder-decoder. Not a system itself."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from polymodal.backbones.decoder import Decoder, DecoderConfig, Learned
from polymodal.backbones.encdec import EncDec, EncDecConfig, EncDecMemory, bart_init_, t5_init_
from polymodal.core.batch import Batch
from polymodal.core.chat import Chat
from polymodal.core.errors import MediaError, UnsupportedError
from polymodal.core.tokens import Modality, Tokens
from polymodal.heads.lm import IGNORE, ahead
from polymodal.nn.cache import KVCache
from polymodal.systems.generator import Generator


class EitherGenerator(Generator):
    """A `Generator` whose backbone may also be an `EncDec`: its encoder reads prompt and media, its decoder answers.

    The ``labels`` of a decoder are as long as its ``ids``; those of an encoder-decoder are a text of their own.
    """

    def add_backbone(self, config: DecoderConfig | EncDecConfig) -> None:
        """Makes the language model of this config."""
        backbone = Decoder(config) if isinstance(config, DecoderConfig) else EncDec(config)
        self.backbone = backbone  # type: ignore[assignment]

    @property
    def seq2seq(self) -> EncDec | None:
        """The language model, if it is an encoder-decoder."""
        backbone: nn.Module = self.backbone
        return backbone if isinstance(backbone, EncDec) else None

    @torch.no_grad()
    def init_backbone(self) -> None:
        """Fresh weights, as the papers of decoders, of T5 and of BART have them."""
        model = self.seq2seq
        if model is None:
            self.backbone.init_weights()
        else:
            (bart_init_ if model.config.post_norm else t5_init_)(model)

    # -- reading

    def layout(self, batch: Batch, x: Float[Tensor, "batch tokens dim"]) -> Tokens:
        return Tokens.of(x, causal=self.seq2seq is None, modality=Modality.TEXT, valid=batch.get("valid"))

    def _answer(self, model: EncDec, batch: Batch) -> Float[Tensor, "batch tokens dim"]:
        return model(self.read(batch), model.target(model.shift(batch["labels"]))).x

    def forward(self, batch: Batch) -> Float[Tensor, "batch tokens vocab"]:
        """Scores of the token after each; of each label with an encoder-decoder."""
        model = self.seq2seq
        return super().forward(batch) if model is None else model.logits(self._answer(model, batch))

    def supervised(self, batch: Batch) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        model = self.seq2seq
        if model is None:
            return super().supervised(batch)
        return *ahead(self._answer(model, batch), batch["labels"]), model.logits

    # -- prompts

    @property
    def context(self) -> int:
        if self.seq2seq is None:
            return super().context
        position = self.seq2seq.config.position
        return position.count if isinstance(position, Learned) else sys.maxsize  # relative positions have no end

    def room(self, batch: Batch) -> list[int]:
        return super().room(batch) if self.seq2seq is None else [self.context] * batch.size  # the prompt takes none

    def lesson(self, chats: Sequence[Chat]) -> Batch:
        if self.seq2seq is None:
            return super().lesson(chats)
        for number, chat in enumerate(chats):
            if len(chat.turns) != 2 or chat.turns[1].role != "assistant" or chat.turns[1].calls:
                raise MediaError(f"chat {number} is no lesson: an encoder-decoder learns one question and its answer")
        answers = [torch.tensor(self.write_answer(chat)) for chat in chats]
        asked = self.prompt([replace(chat, turns=chat.turns[:1]) for chat in chats])
        return Batch(asked | {"labels": pad_sequence(answers, batch_first=True, padding_value=IGNORE)})

    # -- generation

    def new_memory(self, rows: int, capacity: int) -> KVCache:
        return super().new_memory(rows, capacity) if self.seq2seq is None else self.seq2seq.new_memory(rows, capacity)

    @torch.no_grad()
    def prefill(self, batch: Batch, memory: KVCache) -> Float[Tensor, "rows vocab"]:
        if self.seq2seq is None:
            return super().prefill(batch, memory)
        assert isinstance(memory, EncDecMemory)
        return self.seq2seq.prefill(self.read(batch.to(self.device)), memory)

    def plain_from(self, batch: Batch) -> int:
        """An encoder reads a prompt both ways: none of it can be read by itself."""
        return super().plain_from(batch) if self.seq2seq is None else int(batch["ids"].shape[1])

    def resume(self, ids: Int[Tensor, "rows tokens"], memory: KVCache) -> Float[Tensor, "rows vocab"]:
        if self.seq2seq is not None:
            raise UnsupportedError("an encoder reads a prompt at once, not in pieces")
        return super().resume(ids, memory)

    def step(self, ids: Int[Tensor, " rows"], memory: KVCache) -> Float[Tensor, "rows vocab"]:
        if self.seq2seq is None:
            return super().step(ids, memory)
        assert isinstance(memory, EncDecMemory)
        return self.seq2seq.step(ids, memory)
