"""Parti: text to pictures as translation: an encoder reads the text, a decoder writes the codes of a picture.

Paper: Yu et al., "Scaling Autoregressive Models for Content-Rich Text-to-Image Generation", 2022,
https://arxiv.org/abs/2206.10789. Official code and weights: none. So this is in the style of Parti: what the paper says
is kept, and tested fact by fact.

    text -> encoder (both ways) ----------------+ cross-attention
    start, codes so far, row by row -> decoder -> scores of the next code
    all 1,024 codes -> VQGAN's decoder -> picture of 256 pixels

Training details kept here: texts of at most 128 tokens; 1,024 codes of 8,192 for a picture, learned by cross-entropy;
in 10 % of the rows the text is nothing but padding, so that scores can be guided: without text, plus so many times
what the text changes; the tokenizer of pictures is frozen. The paper trains with Adafactor, betas 0.9 and 0.96,
weight decay 0.045, clipping at 4, at 4.5e-5 after 5,000 steps of warm-up, with an exponential decay from step 85,000
on, and dropout of 0.1.

Deviations: VQGAN in the place of ViT-VQGAN; all codes so far are seen, where the paper has sparse masks in the shape of
convolutions; learned positions and pre-norm layers with GELU, of which the paper says nothing; no dropout; the encoder
is not pre-trained; pictures are not re-ranked by a contrastive model, nor enlarged to 1,024 pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Final, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from polymodal.backbones.decoder import Learned, Plain
from polymodal.backbones.encdec import CrossDecoder, EncDecConfig, EncDecMemory, Source, StackConfig, TextEncoder
from polymodal.core.batch import Batch, Loss, text_batch
from polymodal.core.chat import Chat
from polymodal.core.errors import ConfigError, MediaError, UnsupportedError
from polymodal.core.sample import Image, Sample, Text
from polymodal.core.tokens import Modality, Tokens
from polymodal.core.verbs import TensorSpec
from polymodal.heads.lm import ahead, next_token_loss
from polymodal.modalities.image import HALF, Exact, ImageProcessor
from polymodal.nn.norm import Layer
from polymodal.samplers.autoregressive import Settings
from polymodal.systems.picture_writing import PictureWriter
from polymodal.tokenizers.language import LanguageTokenizer
from polymodal.tokenizers.pyramid import PyramidConfig
from polymodal.tokenizers.vq import LearnedCodes, VQConfig, VQModel
from polymodal.weights.native import native_format

DROPPED: Final = 10  # per cent of the texts in training


@dataclass(frozen=True, kw_only=True)
class PartiConfig:
    """An encoder of texts, a decoder of codes, and the tokenizer of pictures.

    Attributes:
        backbone: both stacks; its vocabulary is that of the codes, and a start.
        vision: the tokenizer of pictures.
        text_vocab_size: of the tokens that the encoder reads.
        text_context: the longest text in tokens.
        pad_id: what the encoder reads where there is no text.
    """

    backbone: EncDecConfig
    vision: VQConfig
    text_vocab_size: int = 16_000
    text_context: int = 128
    pad_id: int = 0

    def __post_init__(self) -> None:
        size, places = self.vision.codes.size, self.backbone.position
        b = self.backbone
        if (b.vocab_size, b.start_id, b.pad_id, b.tied) != (size + 1, size, size, False):
            raise ConfigError(
                f"a vocabulary of {self.backbone.vocab_size} for {size} codes and a start, numbered {size}"
            )
        if not isinstance(places, Learned) or places.count != self.vision.num_codes:
            raise ConfigError(f"a picture of {self.vision.num_codes} codes needs a learned position for each")

    @property
    def text(self) -> EncDecConfig:
        """The encoder, with its own table and positions."""
        return replace(self.backbone, vocab_size=self.text_vocab_size, position=Learned(count=self.text_context))


class _Writer:
    """What the loop of generation needs of a Parti: there is no text to be answered, so it has no verb for that."""

    stop_ids = ()

    def __init__(self, model: Parti) -> None:
        self.model, self.vocab_size = model, model.config.vision.codes.size

    def prompt(self, chats: Sequence[Chat]) -> Batch:
        raise UnsupportedError("Parti answers nobody: it makes pictures of texts")

    def new_memory(self, rows: int, capacity: int) -> EncDecMemory:
        return self.model.backbone.new_memory(rows, capacity)

    def prefill(self, batch: Batch, memory: EncDecMemory) -> Float[Tensor, "rows codes"]:
        memory.source = self.model.condition(batch.to(self.model.device))
        return self.step(torch.full((batch.size,), self.vocab_size, device=self.model.device), memory)

    def step(self, ids: Int[Tensor, " rows"], memory: EncDecMemory) -> Float[Tensor, "rows codes"]:
        return self.model.backbone.step(ids, memory)[:, : self.vocab_size]


@final
class Parti(PictureWriter):
    """An encoder-decoder from text to codes of pictures."""

    config: PartiConfig
    tokenizer: LanguageTokenizer | None = None  # type: ignore[assignment]
    writing: ClassVar[Settings] = Settings(temperature=1.0, guidance=3.0)

    def __init__(self, config: PartiConfig) -> None:
        super().__init__(config)
        self.text = TextEncoder(config.text)
        self.backbone = CrossDecoder(config.backbone)
        self.vision = VQModel(config.vision).requires_grad_(False)

    def train(self, mode: bool = True) -> Parti:
        super().train(mode)
        self.vision.eval()  # frozen: moving averages would follow
        return self

    @torch.no_grad()
    def init_weights(self) -> None:
        """Small normals, zero biases; the tokenizer of pictures as its own paper draws it."""
        for part in (self.text, self.backbone):
            for module in part.modules():
                if isinstance(module, nn.Linear | nn.Embedding):
                    nn.init.normal_(module.weight, std=0.02)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.vision.init_weights()

    def default_images(self) -> ImageProcessor:
        side = self.config.vision.resolution
        return ImageProcessor(resize=Exact(height=side, width=side), resample="bicubic", mean=HALF, std=HALF)

    def inputs_spec(self) -> dict[str, TensorSpec]:
        c = self.config
        return {
            "ids": TensorSpec(shape=(7,), dtype=torch.int64, high=c.text_vocab_size),
            "valid": TensorSpec(shape=(7,), dtype=torch.bool),
            "codes": TensorSpec(shape=(c.vision.num_codes,), dtype=torch.int64, high=c.vision.codes.size),
            "chance": TensorSpec(shape=(), dtype=torch.int64, high=100),  # may be left out: it is drawn
        }

    # -- reading

    def prompt(self, texts: Sequence[str]) -> Batch:
        """The tokens of texts; the empty one is padding alone.

        Raises:
            UnsupportedError: there is no tokenizer.
            MediaError: a text is longer than the encoder reads: nothing is cut.
        """
        c = self.config
        if self.tokenizer is None and any(texts):
            raise UnsupportedError(f"Parti ({self.source}) reads no text: no tokenizer.json was beside its weights")
        rows = [self.tokenizer.encode(t, special=True) if t and self.tokenizer else [c.pad_id] for t in texts]
        longest = max(map(len, rows))
        if longest > c.text_context:
            raise MediaError(f"a text of {longest} tokens; Parti ({self.source}) reads at most {c.text_context}")
        return text_batch(rows)

    def lesson(self, texts: Sequence[str], pixels: Float[Tensor, "batch 3 height width"]) -> Batch:
        """What `loss` reads."""
        return Batch(self.prompt(texts), codes=self.vision.encode(pixels.to(self.device)).flatten(1))

    def condition(self, batch: Batch) -> Source:
        """What the decoder reads of texts."""
        x = self.text(batch["ids"], batch["valid"])
        return self.backbone.source(Tokens.of(x, causal=False, modality=Modality.TEXT, valid=batch["valid"]))

    def _said(self, batch: Batch) -> Float[Tensor, "batch codes dim"]:
        """The decoder's vectors at the codes."""
        if self.training:
            chance = batch["chance"] if "chance" in batch else torch.randint(100, (batch.size,), device=self.device)
            gone = (chance < DROPPED)[:, None]
            first = torch.arange(batch["ids"].shape[1], device=self.device) == 0
            ids, valid = batch["ids"].masked_fill(gone, self.config.pad_id), torch.where(gone, first, batch["valid"])
            batch = Batch(batch, ids=ids, valid=valid)
        target = self.backbone.target(self.backbone.shift(batch["codes"]))
        return self.backbone.decoder(target, self.condition(batch)).x

    def _scores(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch size"]:
        return self.backbone.logits(x)[..., : self.config.vision.codes.size]  # the start is never said

    def forward(self, batch: Batch) -> Float[Tensor, "batch codes size"]:
        """Scores of each code given those before it."""
        return self._scores(self._said(batch))

    def loss(self, batch: Batch) -> Loss:
        """Cross-entropy of ``codes``."""
        return next_token_loss(*ahead(self._said(batch), batch["codes"]), self._scores)

    def count(self, sample: Sample) -> int:
        """Tokens of texts and codes of pictures."""
        if any(not isinstance(part, Text | Image) for part in sample.parts):
            raise MediaError("Parti makes pictures of texts; there is something else in the sample")
        texts = sum(int(self.prompt([text.text])["valid"].sum()) for text in sample.texts)
        return texts + self.config.vision.num_codes * len(sample.images)

    # -- the verb draw

    @property
    def painter(self) -> VQModel:
        return self.vision

    @property
    def writer(self) -> _Writer:
        return _Writer(self)

    def asked(self, texts: Sequence[str]) -> Batch:
        return self.prompt(texts)

    def picture_settings(self) -> Settings:
        return replace(self.writing, max_new_tokens=self.config.vision.num_codes)

    def codes_of(self, ids: Sequence[int]) -> list[int]:
        return list(ids)

    def load_processors(self, folder: Path) -> None:
        if (folder / "tokenizer.json").is_file():
            self.tokenizer = LanguageTokenizer.from_folder(folder)


Parti.formats = {"hf": native_format("polymodal_parti", PartiConfig)}


def paper(dim: int, heads: int, encoder: int, decoder: int) -> PartiConfig:
    """The published sizes, for pictures of 256 pixels."""
    stack = partial(StackConfig, num_heads=heads, head_dim=dim // heads, mlp=Plain(hidden_dim=4 * dim), bias=True)
    codes = 8192
    backbone = EncDecConfig(
        vocab_size=codes + 1, dim=dim, encoder=stack(num_layers=encoder), decoder=stack(num_layers=decoder),
        norm=Layer(), position=Learned(count=1024), post_norm=False, start_id=codes, pad_id=codes, tied=False,
    )  # fmt: skip
    net = PyramidConfig(widths=(128, 128, 256, 512), attention=(3,))
    return PartiConfig(backbone=backbone, vision=VQConfig(net=net, codes=LearnedCodes(size=codes, dim=32)))


PRESETS = {
    "parti-350m": partial(paper, 1024, 16, 12, 12),
    "parti-750m": partial(paper, 1024, 16, 12, 36),
    "parti-3b": partial(paper, 2048, 32, 12, 36),
    "parti-20b": partial(paper, 4096, 64, 16, 64),
}
