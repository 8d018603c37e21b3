"""What the systems share in which media are tokens beside those of text, read and written by one decoder. Not a system
itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, Final, TypeAlias

import torch
from jaxtyping import Float, Int
from PIL import Image as PILImage
from torch import Tensor

from polymodal.core.batch import Batch, Loss
from polymodal.core.chat import Chat, Turn
from polymodal.core.errors import ConfigError, MediaError, UnsupportedError
from polymodal.core.events import Event, Kind
from polymodal.core.sample import Audio, Image, Part, Sample, Text
from polymodal.core.tokens import Tokens
from polymodal.heads.lm import next_token_loss
from polymodal.modalities.generated import to_pil
from polymodal.samplers.autoregressive import Settings, sample
from polymodal.samplers.modes import Interleaved, Mode, Wordless, events
from polymodal.systems.generator import Generator
from polymodal.systems.picture_writing import PictureWriter
from polymodal.tokenizers.language import LanguageTokenizer
from polymodal.tokenizers.vq import VQModel

Z_LOSS: Final = 1e-5
Span: TypeAlias = Iterator[Event[tuple[int, ...]]]
Shown: TypeAlias = Iterator[Event[str | Tensor]]


class Unified(PictureWriter, Generator):
    """Base of the systems that learn, read and write text and pictures, and perhaps more, as tokens of one vocabulary.

    A config has ``image_id`` (stands for each code of a picture until it is known which), ``turn_id`` (ends a turn of a
    chat, or None) and ``control``. A subclass gives ``modes``.
    """

    vision: VQModel
    modes: tuple[Mode, ...]
    has_template = False

    def train(self, mode: bool = True) -> Unified:
        super().train(mode)
        self.vision.eval()  # frozen: moving averages would follow
        return self

    def mode(self, kind: Kind) -> Mode:
        return next(mode for mode in self.modes if mode.kind == kind)

    # -- media as tokens

    def see(self, pictures: Sequence[PILImage.Image]) -> tuple[list[list[int]], Batch]:
        mode = self.mode("image")
        spelled, media = self.see_whole(pictures, self.vision.config.num_codes)
        return [[mode.begin, *ids, mode.end] for ids in spelled], media

    @torch.no_grad()
    def picture_tokens(self, pixels: Float[Tensor, "pictures 3 height width"]) -> Int[Tensor, "pictures codes"]:
        """The tokens of the codes of pictures, row by row."""
        codes = self.vision.encode(pixels).flatten(1)
        return torch.tensor(self.mode("image").books[0], device=codes.device)[codes]

    def media_tokens(self, batch: Batch) -> dict[int, Int[Tensor, " tokens"]]:
        """The tokens of all media of a batch, in order, by the placeholders that stand for them."""
        pictures = "pixels" in batch and len(batch["pixels"])
        return {self.config.image_id: self.picture_tokens(batch["pixels"]).flatten()} if pictures else {}

    def spelled(self, batch: Batch) -> Batch:
        """The batch with its media's tokens where placeholders stood, in ``ids`` and in ``labels``: they are learned.

        Raises:
            MediaError: there are more or fewer places than codes.
        """
        out = Batch({n: t for n, t in batch.items() if not n.endswith("_row") and f"{n}_row" not in batch})
        for stands, tokens in self.media_tokens(batch).items():
            places = out["ids"] == stands
            if int(places.sum()) != len(tokens):
                raise MediaError(f"{int(places.sum())} places in the text for {len(tokens)} codes")
            out["ids"] = out["ids"].masked_scatter(places, tokens)
            if "labels" in out:
                out["labels"] = torch.where(out["labels"] == stands, out["ids"], out["labels"])
        return out

    def features(self, batch: Batch) -> Float[Tensor, "features dim"]:
        return torch.cat([self.backbone.embed(tokens[None])[0] for tokens in self.media_tokens(batch).values()])

    @property
    def must_see(self) -> bool:
        """Media are tokens: nothing but the decoder learns from them."""
        return False

    def read(self, batch: Batch) -> Tokens:
        return super().read(self.spelled(batch))

    def supervised(self, batch: Batch) -> tuple[Tensor, Tensor, Any]:
        return super().supervised(self.spelled(batch))

    def loss(self, batch: Batch) -> Loss:
        """Of the next token, be it of text or of a medium: of ``labels`` that are a placeholder, the medium's."""
        return next_token_loss(*self.supervised(batch), batch.get("weights"), z_loss=Z_LOSS)

    # -- chats and documents

    def _words(self) -> LanguageTokenizer:
        if self.tokenizer is None:
            raise UnsupportedError(
                f"{type(self).__name__} ({self.source}) has no tokenizer: no tokenizer.json was there"
            )
        return self.tokenizer

    def _ids(self, parts: Sequence[Part]) -> list[int]:
        stands = {Image: self.media_id, Audio: self.sound_id}
        ids: list[int] = []
        for part in parts:
            stand = stands.get(type(part))
            if isinstance(part, Text):
                ids += self._words().encode(part.text, special=False)
            elif stand is None:
                raise MediaError(f"{type(self).__name__} reads no {type(part).__name__}")
            else:
                ids.append(stand)
        return ids

    def write_prompt(self, chat: Chat) -> list[int]:
        """``start turn end turn end``, text and media of each in their order."""
        c = self.config
        end = [] if c.turn_id is None else [c.turn_id]
        ids = [] if c.control.start is None else [c.control.start]
        for turn in chat.turns:
            ids += self._ids(turn.parts) + end
        return ids

    def write_answer(self, chat: Chat) -> list[int]:
        """What the assistant said last, its media too, and its end."""
        turn = self.config.turn_id
        if turn is None and not self.stop_ids:
            raise ConfigError(f"{self.source} names no token that ends an answer")
        return [*self._ids(chat.turns[-1].parts), self.stop_ids[0] if turn is None else turn]

    def document(self, samples: Sequence[Sample]) -> Batch:
        """Texts with media in them to learn from, all of them, as in pre-training.

        Raises:
            MediaError: a medium cannot be decoded, or a document is longer than the context: nothing is cut.
        """
        control = self.config.control
        start = [] if control.start is None else [control.start]
        rows = [[*start, *self._ids(each.parts), *control.stop[:1]] for each in samples]
        chats = [Chat((Turn("user", each.parts),)) for each in samples]
        return self._assemble(chats, rows, [[True] * len(row) for row in rows])

    # -- answers of several kinds

    def interleaved(
        self, room: int, *, most: Mapping[Kind, int] | None = None, only: Kind | None = None
    ) -> Interleaved:
        """The constraint of an answer of at most so many tokens that is text with whole spans of media in it.

        Args:
            room: ``Settings.max_new_tokens``.
            most: at most so many of a kind; as many as fit of those that it does not name.
            only: the answer is one span of this kind.
        """
        return Interleaved(
            modes=self.modes, vocab_size=self.vocab_size, room=room, most=most or {}, only=only,
            never=tuple(self._media_ids),
        )  # fmt: skip

    def stream(self, chat: Chat, settings: Settings, *, against: Chat | None = None) -> Shown:
        """An answer as it comes: pieces of text, pictures with their last code, blocks of sound.

        Args:
            chat: what to answer.
            settings: how; without a constraint, media may be anywhere in text.
            against: what guidance leads away from.

        Raises:
            MediaError: a medium of the chat cannot be read, or the chat is longer than the context.
            UnsupportedError: there is no tokenizer, or nothing to paint with.
        """
        rules = settings.constraint or self.interleaved(settings.max_new_tokens)
        other = None if against is None else self.prompt([against])
        steps = sample(self, self.prompt([chat]), replace(settings, constraint=rules), Wordless(), against=other)
        return self.shown(step.token for step in steps if step.token is not None and step.finished != "stop")

    def shown(self, tokens: Iterable[int]) -> Shown:
        """What tokens of an answer stand for.

        Raises:
            MediaError: a span of them is not whole.
            UnsupportedError: there is no tokenizer, or nothing to paint with.
        """
        for (kind, index), span in groupby(events(tokens, self.modes), lambda event: (event.kind, event.index)):
            yield from self._show(kind, index, span)

    def _show(self, kind: Kind, index: int, span: Span) -> Shown:
        """One span: of text piece by piece, of pictures whole; a subclass shows what else it writes."""
        if kind == "text":
            stream = self._words().stream()
            for event in span:
                piece = stream.finish() if event.done else "".join(map(stream.push, event.payload))
                if piece or event.done:
                    yield Event(kind=kind, index=index, payload=piece, done=event.done)
            return
        for event in span:
            codes = self.mode(kind).codes(event.payload)
            yield Event(kind=kind, index=index, payload=self.paint(codes.to(self.device))[0], done=event.done)

    def parts(self, ids: Sequence[int]) -> list[Part]:
        """An answer's texts and media, in order; tokens that end it are left out.

        Raises:
            MediaError, UnsupportedError: as `shown`.
        """
        out: list[Part] = []
        shown = self.shown(i for i in ids if i not in self.stop_ids)
        for (kind, _), span in groupby(shown, lambda event: (event.kind, event.index)):
            out.append(self._part(kind, [event.payload for event in span]))
        return out

    def _part(self, kind: Kind, payloads: Sequence[Any]) -> Part:
        return Text("".join(payloads)) if kind == "text" else Image(to_pil(payloads[0]))

    # -- the verb draw

    @property
    def painter(self) -> VQModel:
        return self.vision

    def asked(self, texts: Sequence[str]) -> Batch:
        return self.prompt([Chat.of(text) for text in texts])

    def picture_settings(self) -> Settings:
        room = self.mode("image").shortest
        return replace(self.writing, max_new_tokens=room, constraint=self.interleaved(room, only="image"))

    def codes_of(self, ids: Sequence[int]) -> list[int]:
        (places,) = self.mode("image").places
        return [places[i] for i in ids if i in places]
