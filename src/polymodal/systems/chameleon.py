"""Chameleon: text and pictures as tokens of one vocabulary, read and written by one decoder.

Paper: Chameleon Team, "Chameleon: Mixed-Modal Early-Fusion Foundation Models", 2024, https://arxiv.org/abs/2405.09818.
Official code: facebookresearch/chameleon. Hub: facebook/chameleon-7b, facebook/chameleon-30b.

    picture -> VQGAN (frozen) -> codes -> their tokens --+
                                                         [begin, 1,024 of them, end] in the text -> decoder
    text -> tokens --------------------------------------+
    tokens of codes -> VQGAN's decoder -> picture

Training details kept here: the tokens of pictures are learned as those of text are, in one loss, with a z-loss of
1e-5 against logits that drift; queries and keys are normed head by head, with a scale and a shift of each head's own;
the large model has its norms behind attention and feed-forward. A picture is written whole: behind its begin token
there are exactly its codes, then the end (`samplers.modes.Interleaved`). The paper trains with AdamW at 1e-4, betas
0.9 and 0.95, epsilon 1e-5, weight decay 0.1, clipping at 1, 4,000 steps of warm-up and an exponential decay.

Deviations: no dropout (the paper's small model has 0.1). transformers hides the scores of all codes, so that it writes
text alone: here they are live. Files of the Hub have no decoder of pictures, and are loaded without; where one is
among the weights, ``vq_config`` says ``"has_decoder": true``. Pictures are guided away from the empty prompt, not from
a picture without text, too. Each turn of a chat ends in ``<reserved08706>``, as the official code's.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Final, final

import torch
from jaxtyping import Float, Int
from PIL import Image as PILImage
from torch import Tensor

from polymodal.backbones.decoder import Decoder
from polymodal.core.batch import Batch, Loss
from polymodal.core.chat import Chat, Turn
from polymodal.core.errors import ConfigError, MediaError, UnsupportedError
from polymodal.core.sample import Image, Part, Sample, Text
from polymodal.core.tokens import Tokens
from polymodal.core.verbs import TensorSpec
from polymodal.heads.lm import next_token_loss
from polymodal.modalities.generated import to_pil
from polymodal.modalities.image import CenterCrop, ImageProcessor, ShortestEdge
from polymodal.samplers.autoregressive import Settings
from polymodal.samplers.modes import Interleaved, PictureTokens
from polymodal.systems.chameleon_files import LARGE, ChameleonConfig, published, read_hf, rules_hf, write_hf
from polymodal.systems.generator import Generator
from polymodal.systems.picture_writing import PictureWriter
from polymodal.tokenizers.vq import VQModel
from polymodal.weights.format import Format

Z_LOSS: Final = 1e-5


@final
class Chameleon(PictureWriter, Generator):
    """One decoder for text and pictures."""

    config: ChameleonConfig
    has_template = False
    writing: ClassVar[Settings] = Settings(temperature=0.7, top_p=0.9, guidance=3.0)  # the official code's

    def __init__(self, config: ChameleonConfig) -> None:
        super().__init__(config)
        c = config
        self.vision = VQModel(c.vision).requires_grad_(False)
        self.backbone = Decoder(c.backbone)
        self.media_id = c.image_id
        self.stop_ids = (() if c.turn_id is None else (c.turn_id,)) + c.control.stop
        self.tokens = PictureTokens(begin=c.start_id, end=c.end_id, codes=c.code_ids, count=c.vision.num_codes)

    def train(self, mode: bool = True) -> Chameleon:
        super().train(mode)
        self.vision.eval()  # frozen: moving averages would follow
        return self

    def init_weights(self) -> None:
        self.backbone.init_weights()
        self.vision.init_weights()

    def default_images(self) -> ImageProcessor:
        side, one = self.config.vision.resolution, (1.0, 1.0, 1.0)
        crop = CenterCrop(height=side, width=side)
        return ImageProcessor(
            resize=ShortestEdge(size=side), crop=crop, resample="lanczos", rescale=0.0078, mean=one, std=one
        )

    def inputs_spec(self) -> dict[str, TensorSpec]:
        c, n = self.config, self.config.vision.num_codes
        marks = sorted({2, *c.code_ids, c.start_id, c.end_id, c.image_id, c.backbone.vocab_size})
        low, high = max(itertools.pairwise(marks), key=lambda pair: pair[1] - pair[0])  # plain text
        picture = (c.start_id, *[c.image_id] * n, c.end_id)
        text = TensorSpec(shape=(n + 8,), dtype=torch.int64, low=low + 1, high=high, head=picture)
        side = c.vision.resolution
        return {
            "ids": text, "labels": text, "pixels": TensorSpec(shape=(c.vision.net.channels, side, side)),
            "pixels_row": TensorSpec(shape=(), dtype=torch.int64, rows=True),
        }  # fmt: skip

    # -- pictures as tokens

    def see(self, pictures: Sequence[PILImage.Image]) -> tuple[list[list[int]], Batch]:
        spelled, media = self.see_whole(pictures, self.tokens.count)
        return [[self.tokens.begin, *ids, self.tokens.end] for ids in spelled], media

    @torch.no_grad()
    def picture_tokens(self, pixels: Float[Tensor, "pictures 3 height width"]) -> Int[Tensor, "pictures codes"]:
        """The tokens of the codes of pictures, row by row."""
        codes = self.vision.encode(pixels).flatten(1)
        return torch.tensor(self.config.code_ids, device=codes.device)[codes]

    def spelled(self, batch: Batch) -> Batch:
        """The batch with its pictures' tokens where placeholders stood, in ``ids`` and in ``labels``: they are learned.

        Raises:
            MediaError: there are more or fewer places than codes.
        """
        if "pixels" not in batch or not len(batch["pixels"]):
            return Batch({name: t for name, t in batch.items() if not name.startswith("pixels")})
        places, codes = batch["ids"] == self.config.image_id, self.picture_tokens(batch["pixels"]).flatten()
        if int(places.sum()) != len(codes):
            raise MediaError(f"{int(places.sum())} places in the text for {len(codes)} codes of pictures")
        ids = batch["ids"].masked_scatter(places, codes)
        out = Batch({name: t for name, t in batch.items() if not name.startswith("pixels")} | {"ids": ids})
        if "labels" in batch:
            out["labels"] = torch.where(batch["labels"] == self.config.image_id, ids, batch["labels"])
        return out

    def features(self, batch: Batch) -> Float[Tensor, "features dim"]:
        return self.backbone.embed(self.picture_tokens(batch["pixels"])).flatten(0, 1)

    @property
    def must_see(self) -> bool:
        """Pictures are tokens: nothing but the decoder learns from them."""
        return False

    def read(self, batch: Batch) -> Tokens:
        return super().read(self.spelled(batch))

    def supervised(self, batch: Batch) -> tuple[Tensor, Tensor, Any]:
        return super().supervised(self.spelled(batch))

    def loss(self, batch: Batch) -> Loss:
        """Of the next token, be it of text or of a picture: of ``labels`` that are `media_id`, the picture's."""
        return next_token_loss(*self.supervised(batch), batch.get("weights"), z_loss=Z_LOSS)

    # -- text and pictures in turn

    def _ids(self, parts: Sequence[Part]) -> list[int]:
        if self.tokenizer is None:
            raise UnsupportedError(f"Chameleon ({self.source}) has no tokenizer: its folder lacks tokenizer.json")
        ids: list[int] = []
        for part in parts:
            ids += self.tokenizer.encode(part.text, special=False) if isinstance(part, Text) else [self.config.image_id]
        return ids

    def write_prompt(self, chat: Chat) -> list[int]:
        """``start turn end turn end``, text and pictures of each in their order."""
        c = self.config
        end = [] if c.turn_id is None else [c.turn_id]
        ids = [] if c.control.start is None else [c.control.start]
        for turn in chat.turns:
            ids += self._ids(turn.parts) + end
        return ids

    def write_answer(self, chat: Chat) -> list[int]:
        """What the assistant said last, its pictures too, and its end."""
        turn = self.config.turn_id
        if turn is None and not self.stop_ids:
            raise ConfigError(f"{self.source} names no token that ends an answer")
        return [*self._ids(chat.turns[-1].parts), self.stop_ids[0] if turn is None else turn]

    def document(self, samples: Sequence[Sample]) -> Batch:
        """Texts with pictures in them to learn from, all of them, as in pre-training.

        Raises:
            MediaError: a picture cannot be decoded, or a document is longer than the context: nothing is cut.
        """
        control = self.config.control
        start = [] if control.start is None else [control.start]
        rows = [[*start, *self._ids(each.parts), *control.stop[:1]] for each in samples]
        chats = [Chat((Turn("user", each.parts),)) for each in samples]
        return self._assemble(chats, rows, [[True] * len(row) for row in rows])

    def interleaved(self, room: int, *, pictures: int | None = None) -> Interleaved:
        """The constraint of an answer of at most so many tokens that is text with whole pictures in it.

        Args:
            room: ``Settings.max_new_tokens``.
            pictures: at most so many; None: as many as fit.
        """
        return Interleaved(
            tokens=self.tokens, vocab_size=self.vocab_size, room=room, most=pictures, never=(self.config.image_id,)
        )

    def parts(self, ids: Sequence[int]) -> list[Text | Image]:
        """An answer's texts and pictures, in order; tokens that end it are left out.

        Raises:
            MediaError: a picture in it is not whole.
            UnsupportedError: there is no tokenizer, or nothing to paint with.
        """
        if self.tokenizer is None:
            raise UnsupportedError(f"Chameleon ({self.source}) has no tokenizer: its folder lacks tokenizer.json")
        out: list[Text | Image] = []
        rest, t = [i for i in ids if i not in self.stop_ids], self.tokens
        while rest:
            cut = rest.index(t.begin) if t.begin in rest else len(rest)
            if cut:
                out.append(Text(self.tokenizer.decode(rest[:cut])))
            picture, rest = rest[cut : cut + t.length], rest[cut + t.length :]
            if picture:
                codes = self.codes_of(picture)
                if len(codes) != t.count or picture[-1] != t.end:
                    raise MediaError(f"a picture of {len(codes)} codes among {len(picture)} tokens, not of {t.count}")
                out.append(Image(to_pil(self.paint(torch.tensor([codes], device=self.device))[0])))
        return out

    # -- the verb draw

    @property
    def painter(self) -> VQModel:
        return self.vision

    def asked(self, texts: Sequence[str]) -> Batch:
        return self.prompt([Chat((Turn("user", (Text(text),)),)) for text in texts])

    def picture_settings(self) -> Settings:
        rules = replace(self.interleaved(self.tokens.length, pictures=1), only=True)
        return replace(self.writing, max_new_tokens=self.tokens.length, constraint=rules)

    def codes_of(self, ids: Sequence[int]) -> list[int]:
        return [self._code[i] for i in ids if i in self._code]

    @property
    def _code(self) -> Mapping[int, int]:
        return {token: code for code, token in enumerate(self.config.code_ids)}


Chameleon.formats = {"hf": Format(read=read_hf, write=write_hf, rules=rules_hf)}
PRESETS = {"facebook/chameleon-7b": partial(published, {}), "facebook/chameleon-30b": partial(published, LARGE)}
