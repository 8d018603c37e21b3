"""What the systems share that read text alone, and the encoder-decoders among them. Not a system itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from polymodal.backbones.encdec import EncDec, EncDecMemory, only_text
from polymodal.core.batch import Batch, Loss
from polymodal.core.chat import Chat
from polymodal.core.errors import UnsupportedError
from polymodal.core.sample import Sample
from polymodal.heads.lm import ahead, next_token_loss
from polymodal.systems.base import System
from polymodal.tokenizers.language import LanguageTokenizer


class Reader(System):
    """Base of the systems that read text alone."""

    tokenizer: LanguageTokenizer | None = None  # type: ignore[assignment]

    def load_processors(self, folder: Path) -> None:
        if (folder / "tokenizer.json").is_file():
            self.tokenizer = LanguageTokenizer.from_folder(folder)

    def count(self, sample: Sample) -> int:
        """Tokens of the texts of a sample, with those that the tokenizer frames each with."""
        return sum(len(self.read_text(part.text)) for part in sample.texts)

    def read_text(self, text: str) -> list[int]:
        """The ids of a text, framed as in training."""
        if self.tokenizer is None:
            name = type(self).__name__
            raise UnsupportedError(f"{name} ({self.source}) reads no text: no tokenizer.json was beside its weights")
        return self.tokenizer.encode(text, special=True)


class EncoderDecoder(Reader):
    """Base of the systems that answer one text with an `EncDec`: the `Generates` protocol.

    The config has a ``backbone``, the tokens ``stop`` that end an answer, and what every answer begins with.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.backbone = EncDec(config.backbone)

    @property
    def forced_ids(self) -> tuple[int, ...]:
        """What every answer begins with, behind the start token."""
        return ()

    def _vectors(self, batch: Batch) -> Float[Tensor, "batch tokens dim"]:
        b = self.backbone
        return b(b.text(batch["ids"], batch.get("valid")), b.target(b.shift(batch["labels"]))).x

    def forward(self, batch: Batch) -> Float[Tensor, "batch tokens vocab"]:
        """Scores of each label, given the text and the labels before it."""
        return self.backbone.logits(self._vectors(batch))

    def loss(self, batch: Batch) -> Loss:
        """Cross-entropy of the labels that are not -100."""
        return next_token_loss(*ahead(self._vectors(batch), batch["labels"]), self.backbone.logits)

    # -- the Generates protocol

    @property
    def vocab_size(self) -> int:
        return self.backbone.config.vocab_size

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return tuple(self.config.stop)

    def prompt(self, chats: Sequence[Chat]) -> Batch:
        """What the encoder reads of each question.

        Raises:
            MediaError: a chat is more than one text of a user, empty, or too long.
            UnsupportedError: no tokenizer was beside the weights.
        """
        return self.backbone.prompt([self.read_text(only_text(chat)) for chat in chats])

    def new_memory(self, rows: int, capacity: int) -> EncDecMemory:
        """Room for ``capacity`` tokens of the answer; the prompt is read by the encoder and takes none of it."""
        return self.backbone.new_memory(rows, capacity)

    def prefill(self, batch: Batch, memory: EncDecMemory) -> Float[Tensor, "rows vocab"]:
        batch = batch.to(self.device)
        return self.backbone.prefill(self.backbone.text(batch["ids"], batch.get("valid")), memory, self.forced_ids)

    def step(self, ids: Int[Tensor, " rows"], memory: EncDecMemory) -> Float[Tensor, "rows vocab"]:
        return self.backbone.step(ids, memory)
