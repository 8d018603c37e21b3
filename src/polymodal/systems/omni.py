"""One decoder over text, pictures and sound, any of them in and any of them out, in the style of GPT-4o.

Paper: OpenAI, "GPT-4o System Card", 2024, https://arxiv.org/abs/2410.21276: without sizes, weights or code. Built from
what it says, with the parts of Chameleon, EnCodec and MusicGen.

    picture -> VQGAN (frozen) -> codes, row by row ---------------------------+
    sound -> EnCodec (frozen) -> codes, frame by frame, the coarsest first ---+-- tokens of one vocabulary -> decoder
    text -> tokens -----------------------------------------------------------+
    next tokens -> text as it comes | a picture with its last code | blocks of sound, frame by frame

What the report says and is kept: one network, trained end to end, reads any sequence of text, pictures and sound and
writes any sequence of them; sound is heard and said without text between. From Chameleon: every token is learned, in
one loss with a z-loss of 1e-5; queries and keys are normed head by head; spans of media are whole whatever the scores
are (`samplers.modes`). What was written comes as one type of event (`Unified.stream`).

Deviations: everything that the report leaves open. The codebooks of a sound take turns, each with tokens of its own, so
that each code sees all coarser ones (MusicGen's flattening, Copet et al. 2023, section 2.2). A modality's tokens can
count more or less than text's in the loss: a second of sound is hundreds of them. No video is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, final

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from PIL import Image as PILImage
from torch import Tensor

from polymodal.backbones.decoder import AttentionConfig, Decoder, DecoderConfig, Gated
from polymodal.backbones.families import ControlIds
from polymodal.core.batch import Batch, Loss
from polymodal.core.chat import Chat
from polymodal.core.errors import ConfigError, MediaError, UnsupportedError
from polymodal.core.events import Event, Kind
from polymodal.core.sample import Audio, Part
from polymodal.core.sounding import Sounding, Voice
from polymodal.core.verbs import TensorSpec
from polymodal.heads.lm import next_token_loss
from polymodal.modalities.audio import blocks
from polymodal.modalities.image import HALF, Exact, ImageProcessor
from polymodal.nn.norm import RMS, Heads
from polymodal.nn.rope import Rope
from polymodal.samplers.autoregressive import Settings
from polymodal.samplers.delayed import sounded
from polymodal.samplers.modes import Mode
from polymodal.systems.seanet_codec import Chunk, EnCodecConfig, SEANetCodec
from polymodal.systems.unified import Z_LOSS, Shown, Span, Unified
from polymodal.tokenizers.vq import VQConfig, VQModel
from polymodal.weights.native import native_format

SECONDS: Final = 10.0  # of a sound, where nobody says more
_MARKS: Final = 5  # tokens behind those of text: end of a turn, begin and end of a picture, begin and end of a sound


@dataclass(frozen=True, kw_only=True)
class OmniConfig:
    """A decoder, the tokenizers of pictures and of sound, and how the vocabulary is shared.

    Its tokens are those of text, five marks, the codes of pictures, the codes of sound book by book. Behind the last
    one are the placeholders, which are never embedded.

    Attributes:
        words: tokens of text.
        image_weight, audio_weight: how much a token of these counts in the loss, beside one of text.
    """

    backbone: DecoderConfig
    vision: VQConfig
    codec: EnCodecConfig
    words: int
    control: ControlIds = field(default_factory=ControlIds)
    image_weight: float = 1.0
    audio_weight: float = 1.0

    def __post_init__(self) -> None:
        c, size = self.codec, self.first_sound + self.codec.num_codebooks * self.codec.codebook_size
        if self.backbone.vocab_size != size:
            raise ConfigError(f"a vocabulary of {self.backbone.vocab_size} for {size} tokens of text, marks and codes")
        if c.normalize or c.chunk is not None:
            raise ConfigError("sounds are written in one piece, with no loudness beside their codes")

    @property
    def turn_id(self) -> int:
        return self.words

    @property
    def first_code(self) -> int:
        """Of pictures."""
        return self.words + _MARKS

    @property
    def first_sound(self) -> int:
        return self.first_code + self.vision.codes.size

    @property
    def image_id(self) -> int:
        return self.backbone.vocab_size

    @property
    def sound_id(self) -> int:
        return self.backbone.vocab_size + 1

    @property
    def modes(self) -> tuple[Mode, Mode]:
        c, first = self.codec, self.first_sound
        books = [range(first + b * c.codebook_size, first + (b + 1) * c.codebook_size) for b in range(c.num_codebooks)]
        codes, mark = range(self.first_code, first), self.words
        return (
            Mode(kind="image", begin=mark + 1, end=mark + 2, books=((*codes,),), rounds=self.vision.num_codes),
            Mode(kind="audio", begin=mark + 3, end=mark + 4, books=tuple(tuple(book) for book in books)),
        )


@final
class Omni(Unified):
    """One decoder for text, pictures and sound."""

    config: OmniConfig
    writing: ClassVar[Settings] = Settings(temperature=1.0, top_p=0.9, guidance=3.0)  # of pictures

    def __init__(self, config: OmniConfig) -> None:
        super().__init__(config)
        c = config
        self.vision = VQModel(c.vision).requires_grad_(False)
        self.codec = SEANetCodec(c.codec).requires_grad_(False)
        self.backbone = Decoder(c.backbone)
        self.media_id, self.sound_id, self.modes = c.image_id, c.sound_id, c.modes
        self.stop_ids = (c.turn_id, *c.control.stop)
        self.sample_rate, self.channels, self.hop = c.codec.sample_rate, c.codec.seanet.channels, c.codec.seanet.hop

    def train(self, mode: bool = True) -> Omni:
        super().train(mode)
        self.codec.eval()  # its codebooks would follow what they are shown
        return self

    def init_weights(self) -> None:
        """The decoder's as Chameleon's; the tokenizers as their own papers draw them, until there are trained ones."""
        self.backbone.init_weights()
        self.vision.init_weights()

    def default_images(self) -> ImageProcessor:
        side = self.config.vision.resolution
        return ImageProcessor(resize=Exact(height=side, width=side), resample="bicubic", mean=HALF, std=HALF)

    def inputs_spec(self) -> dict[str, TensorSpec]:
        """A picture, a frame of sound, and text."""
        c, (image, audio) = self.config, self.modes
        head = (image.begin, *[c.image_id] * c.vision.num_codes, image.end)
        head += (audio.begin, *[c.sound_id] * len(audio.books), audio.end)
        text = TensorSpec(shape=(len(head) + 6,), dtype=torch.int64, low=3, high=c.words, head=head)
        row = TensorSpec(shape=(), dtype=torch.int64, rows=True)
        return {
            "ids": text, "labels": text, "pixels": TensorSpec(shape=(3, c.vision.resolution, c.vision.resolution)),
            "pixels_row": row, "wave": TensorSpec(shape=(self.channels, self.hop)), "wave_row": row,
            "starts": TensorSpec(shape=(), dtype=torch.bool), "starts_row": row,
        }  # fmt: skip

    # -- media as tokens

    def see(self, pictures: Sequence[PILImage.Image | Audio]) -> tuple[list[list[int]], Batch]:
        """For each picture or sound the ids that stand for it; pixels, and sounds hop by hop, ``starts`` at the first.

        Raises:
            MediaError: a sound cannot be decoded, or is longer than the context.
        """
        spelled: list[list[int]] = [[] for _ in pictures]
        out, mode = Batch(), self.mode("audio")
        seen = [n for n, medium in enumerate(pictures) if not isinstance(medium, Audio)]
        if seen:
            ids, out = super().see([pictures[n] for n in seen])  # type: ignore[misc]
            out["pixels_row"] = torch.tensor(seen)
            for n, row in zip(seen, ids, strict=True):
                spelled[n] = row
        hops = {n: self._hops(medium) for n, medium in enumerate(pictures) if isinstance(medium, Audio)}
        for n, wave in hops.items():
            spelled[n] = [mode.begin, *[self.config.sound_id] * (len(wave) * len(mode.books)), mode.end]
        if hops:
            rows = torch.tensor([n for n, wave in hops.items() for _ in wave])
            starts = torch.tensor([hop == 0 for wave in hops.values() for hop in range(len(wave))])
            out = Batch(out, wave=torch.cat([*hops.values()]), wave_row=rows, starts=starts, starts_row=rows)
        return spelled, out

    def _hops(self, sound: Audio) -> Float[Tensor, "hops channels hop"]:
        """A sound in pieces of a frame, the last one filled up with silence."""
        most = self.context * self.hop  # what is longer is not read to its end
        wave = next(blocks(sound, self.sample_rate, (most + 1) / self.sample_rate, self.channels))
        if wave.shape[1] > most:
            raise MediaError(f"{sound.where}: longer than {most / self.sample_rate:.1f} s, more than the context holds")
        return rearrange(F.pad(wave, (0, -wave.shape[1] % self.hop)), "c (n hop) -> n c hop", hop=self.hop)

    @torch.no_grad()
    def sound_tokens(self, wave: Float[Tensor, "1 channels samples"]) -> Int[Tensor, " tokens"]:
        """The tokens of a sound, frame by frame."""
        c, (codes,) = self.config.codec, self.codec.encode_chunks(wave)[0].codes
        first = self.config.first_sound + torch.arange(len(codes), device=codes.device) * c.codebook_size
        return rearrange(codes + first[:, None], "books frames -> (frames books)")

    def media_tokens(self, batch: Batch) -> dict[int, Int[Tensor, " tokens"]]:
        out = super().media_tokens(batch)
        if "wave" in batch and len(batch["wave"]):
            begin = batch["starts"].nonzero()[:, 0].tolist()
            lengths = [b - a for a, b in zip(begin, [*begin[1:], len(batch["wave"])], strict=True)]
            # One by one: what is behind the end of a sound must not change its codes.
            waves = [rearrange(wave, "n c hop -> 1 c (n hop)") for wave in batch["wave"].split(lengths)]
            out[self.config.sound_id] = torch.cat([self.sound_tokens(wave) for wave in waves])
        return out

    def loss(self, batch: Batch) -> Loss:
        """Of the next token of ``labels``, each counted by its modality, and by its row's ``weights``."""
        c, (hidden, labels, logits) = self.config, self.supervised(batch)
        worth = torch.ones_like(labels, dtype=torch.float32).masked_fill(labels >= c.first_code, c.image_weight)
        worth = worth.masked_fill(labels >= c.first_sound, c.audio_weight)
        worth = worth * batch["weights"][:, None] if "weights" in batch else worth
        return next_token_loss(hidden, labels, logits, worth, z_loss=Z_LOSS)

    # -- sound

    @torch.no_grad()
    def reconstruct(self, codes: Int[Tensor, "batch books frames"]) -> Float[Tensor, "batch channels samples"]:
        """Waveforms of codes, a hop for each frame."""
        return self.codec.decode_chunks([Chunk(codes.to(self.device), None)]).cpu()

    def _show(self, kind: Kind, index: int, span: Span) -> Shown:
        if kind != "audio":
            yield from super()._show(kind, index, span)
            return
        mode, first = self.mode("audio"), self.sample_rate // self.hop
        frames = (mode.codes(event.payload)[:, 0] for event in span if event.payload)
        for wave in sounded(frames, self.reconstruct, first=first, ahead=self.codec.ahead):
            yield Event(kind="audio", index=index, payload=wave)
        yield Event(kind="audio", index=index, payload=torch.zeros(self.channels, 0), done=True)

    def _part(self, kind: Kind, payloads: Sequence[Any]) -> Part:
        if kind != "audio":
            return super()._part(kind, payloads)
        return Audio(torch.cat([*payloads], 1).numpy(), rate=self.sample_rate)

    def sound(
        self, text: str, sounding: Sounding, *, voice: Voice | None = None
    ) -> Iterator[Float[Tensor, "channels samples"]]:
        """What answers a text, in sound alone; the model ends it, or ``seconds`` do."""
        if voice is not None:
            raise UnsupportedError("Omni speaks with nobody's voice")
        s, chat, mode = sounding, Chat.of(text), self.mode("audio")
        seconds = SECONDS if s.seconds is None else s.seconds
        room = 2 + len(mode.books) * max(1, round(seconds * self.sample_rate / self.hop))
        left = self.room(self.prompt([chat]))[0]
        if room > left and s.seconds is not None:
            raise MediaError(f"{seconds:g} seconds are {room} tokens; behind this text there is room for {left}")
        settings = Settings(
            max_new_tokens=min(room, left), temperature=1.0 if s.temperature is None else s.temperature, top_k=s.top_k,
            guidance=1.0 if s.guidance is None else s.guidance, seed=s.seed,
            constraint=self.interleaved(min(room, left), only="audio"),
        )  # fmt: skip
        against = None if settings.guidance == 1 else Chat.of("")
        for event in self.stream(chat, settings, against=against):
            assert isinstance(event.payload, Tensor)
            if event.payload.shape[1]:
                yield event.payload


Omni.formats = {"hf": native_format("polymodal_omni", OmniConfig)}


def like_chameleon() -> OmniConfig:
    """Chameleon's sizes for 7B, and EnCodec at 3 kbit/s."""
    vision, codec, words = VQConfig(), EnCodecConfig(bandwidths=(1.5, 3.0)), 65_536
    size = words + _MARKS + vision.codes.size + codec.num_codebooks * codec.codebook_size
    backbone = DecoderConfig(
        vocab_size=size, context=8192, dim=4096, num_layers=32, mlp=Gated(hidden_dim=11_008), norm=RMS(eps=1e-5),
        attention=AttentionConfig(num_heads=32, num_kv_heads=32, head_dim=128, qk_norm=Heads()), position=Rope(),
    )  # fmt: skip
    return OmniConfig(
        backbone=backbone, vision=vision, codec=codec, words=words, control=ControlIds(start=1, stop=(2,))
    )


PRESETS = {"omni-7b": like_chameleon}
