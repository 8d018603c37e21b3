"""MusicGen: music of a description, as the codes of a neural codec, all codebooks in one pass of one decoder.

Paper: Copet et al., "Simple and Controllable Music Generation", 2023, https://arxiv.org/abs/2306.05284. Official code:
facebookresearch/audiocraft. Hub: facebook/musicgen-small, -medium, -large, facebook/musicgen-stereo-small, ...

    description -> T5 encoder (frozen) -> linear -------------------+
                                                                    cross-attention
    codes so far, a table a book, summed, each book delayed -> causal decoder -> an output layer a book -> next codes
    codes of all frames -> EnCodec's decoder (frozen) -> samples

Training details kept here: each book is a step behind the one before it, a special code stands where it has none; the
loss is the mean over the books of each one's cross-entropy, the steps behind the last frame are not learned; a
description is dropped with a probability of 0.3, and what was dropped is zeros; generation is guided away from that by
3, with the best 250 codes to draw from. Stereo doubles the books, left, right, left, right, a pair with one delay.
Initialisation as in the official code. The paper trains with AdamW at 1e-4, betas 0.9 and 0.95, weight decay 0.1, a
warm-up and a cosine, and generates with a moving average of the weights.

Deviations: no dropout in the decoder (the paper has 0.1). Words that are padding are not seen, as in transformers; the
official code shows zeros in their place. Melodies (MusicGen-melody) are not read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from polymodal.backbones.conditioned import (
    ConditionedConfig,
    ConditionedDecoder,
    musicgen_rules,
    read_musicgen,
    write_musicgen,
)  # fmt: skip
from polymodal.backbones.encdec import EncDecConfig, EncDecMemory, Source, TextEncoder, t5_init_
from polymodal.backbones.encdec_families import read_t5, t5_rules, write_t5
from polymodal.core.batch import IGNORE, Batch, Loss, text_batch
from polymodal.core.errors import ConfigError, MediaError, UnsupportedError
from polymodal.core.sounding import Sounding, Voice
from polymodal.core.verbs import TensorSpec
from polymodal.heads.codebooks import Codebooks
from polymodal.samplers.delayed import Drawing, delay, generate, sounded
from polymodal.systems.base import System
from polymodal.systems.seanet_codec import Chunk, EnCodecConfig, SEANetCodec, codec_rules, read_codec, write_codec
from polymodal.tokenizers.language import LanguageTokenizer
from polymodal.weights.fields import Fields
from polymodal.weights.format import Format, write_whole
from polymodal.weights.rules import Rule, rule

DROPPED: Final = 30  # per cent of the descriptions in training
SECONDS, TOP_K, GUIDANCE = 15.0, 250, 3.0  # what the official code generates with


@dataclass(frozen=True, kw_only=True)
class MusicGenConfig:
    """A text encoder, a decoder of codes, and their codec, of one channel, that is used once or for each of two.

    ``num_codebooks`` counts those of all channels.
    """

    text: EncDecConfig
    backbone: ConditionedConfig
    codec: EnCodecConfig
    num_codebooks: int = 4
    channels: int = 1

    def __post_init__(self) -> None:
        c = self.codec
        if self.channels not in (1, 2) or self.num_codebooks != self.channels * c.num_codebooks:
            raise ConfigError(
                f"{self.num_codebooks} codebooks for {self.channels} channels of a codec of {c.num_codebooks} codebooks"
            )
        if c.seanet.channels != 1 or c.normalize or c.chunk is not None:
            raise ConfigError("MusicGen writes the codes of one channel in one piece, with no loudness beside them")

    @property
    def delays(self) -> tuple[int, ...]:
        return tuple(book // self.channels for book in range(self.num_codebooks))


@final
class MusicGen(System):
    """A frozen text encoder, a decoder of delayed codebooks, and a frozen codec."""

    config: MusicGenConfig
    tokenizer: LanguageTokenizer | None = None  # type: ignore[assignment]
    end_id: int | None = None  # music ends where it was asked to

    def __init__(self, config: MusicGenConfig) -> None:
        super().__init__(config)
        c = config
        self.text = TextEncoder(c.text).requires_grad_(False)
        self.connector = nn.Identity() if c.text.dim == c.backbone.dim else nn.Linear(c.text.dim, c.backbone.dim)
        self.backbone = ConditionedDecoder(c.backbone, c.backbone.dim)
        self.head = Codebooks(c.num_codebooks, c.codec.codebook_size, c.backbone.dim)
        self.codec = SEANetCodec(c.codec).requires_grad_(False)
        self.sample_rate, self.channels, self.hop = c.codec.sample_rate, c.channels, c.codec.seanet.hop
        self.delays, self.special_id = c.delays, self.head.special_id

    def train(self, mode: bool = True) -> MusicGen:
        super().train(mode)
        self.codec.eval()  # its codebooks would follow what they are shown
        return self

    @torch.no_grad()
    def init_weights(self) -> None:
        """audiocraft's; text encoder and codec as their own papers draw them, until there are trained ones."""
        t5_init_(self.text)
        self.backbone.init_weights()
        self.head.init_weights()

    def inputs_spec(self) -> dict[str, TensorSpec]:
        c = self.config
        return {
            "ids": TensorSpec(shape=(7,), dtype=torch.int64, high=c.text.vocab_size),
            "valid": TensorSpec(shape=(7,), dtype=torch.bool),
            "codes": TensorSpec(shape=(c.num_codebooks, 12), dtype=torch.int64, high=c.codec.codebook_size),
            "chance": TensorSpec(shape=(), dtype=torch.int64, high=100),  # may be left out: it is drawn
        }

    # -- reading

    def prompt(self, texts: Sequence[str]) -> Batch:
        """The tokens of descriptions.

        Raises:
            UnsupportedError: there is no tokenizer.
            MediaError: a description is empty.
        """
        if self.tokenizer is None:
            raise UnsupportedError(f"MusicGen ({self.source}) reads no text: no tokenizer.json was beside its weights")
        if not all(text.strip() for text in texts):
            raise MediaError("there is no description of the music")
        return text_batch([self.tokenizer.encode(text, special=True) for text in texts])

    def lesson(self, texts: Sequence[str], waves: Float[Tensor, "batch channels samples"]) -> Batch:
        """What `loss` reads."""
        return Batch(self.prompt(texts), codes=self.quantize(waves))

    def condition(self, batch: Batch) -> Source:
        """What the decoder reads of descriptions; those that ``dropped`` marks are zeros, which add nothing."""
        with torch.no_grad():
            words = self.text(batch["ids"], batch["valid"])
        dropped = batch.get("dropped", torch.zeros_like(batch["valid"][:, 0]))[:, None]
        words = self.connector(words) * (batch["valid"] & ~dropped)[..., None]
        return self.backbone.source(words, batch["valid"] | dropped)

    def _answer(self, batch: Batch) -> tuple[Float[Tensor, "batch steps dim"], Int[Tensor, "batch books steps"]]:
        """The decoder's vectors, and the codes that belong there."""
        if self.training:
            chance = batch["chance"] if "chance" in batch else torch.randint(100, (batch.size,), device=self.device)
            batch = Batch(batch, dropped=chance < DROPPED)
        codes = batch["codes"]
        steps = delay(codes, self.delays, IGNORE)[..., : codes.shape[2]]
        read = F.pad(steps[..., :-1], (1, 0), value=IGNORE)
        read = read.masked_fill(read < 0, self.special_id)
        return self.backbone(self.head.embed(read), self.condition(batch)), steps

    def forward(self, batch: Batch) -> Float[Tensor, "batch books steps codes"]:
        """Scores of the codes of each step."""
        return self.head.logits(self._answer(batch)[0])

    def loss(self, batch: Batch) -> Loss:
        """Of ``codes``, which are `IGNORE` where nothing is learned."""
        return self.head.loss(*self._answer(batch))

    # -- writing: what `samplers.delayed` needs

    def new_memory(self, batch: Batch, steps: int) -> EncDecMemory:
        return self.backbone.new_memory(batch.size, steps)

    def begin(self, batch: Batch, memory: EncDecMemory) -> Float[Tensor, "rows books codes"]:
        memory.source = self.condition(batch.to(self.device))
        return self.step(torch.full((batch.size, len(self.delays)), self.special_id, device=self.device), memory)

    def step(self, codes: Int[Tensor, "rows books"], memory: EncDecMemory) -> Float[Tensor, "rows books codes"]:
        assert memory.source is not None, "step comes after begin"
        x = self.backbone(self.head.embed(codes[..., None]), memory.source, memory)
        return self.head.logits(x)[:, :, 0].float()

    # -- sound

    @torch.no_grad()
    def quantize(self, wave: Float[Tensor, "batch channels samples"]) -> Int[Tensor, "batch books frames"]:
        """Codes of waveforms; those of two channels stand side by side, book by book."""
        codes = [self.codec.encode_chunks(one[:, None])[0].codes for one in wave.to(self.device).unbind(1)]
        return torch.stack(codes, 2).flatten(1, 2)

    @torch.no_grad()
    def reconstruct(self, codes: Int[Tensor, "batch books frames"]) -> Float[Tensor, "batch channels samples"]:
        """Waveforms of codes, a hop for each frame."""
        each = codes.to(self.device).unflatten(1, (-1, self.channels)).unbind(2)
        return torch.cat([self.codec.decode_chunks([Chunk(one, None)]) for one in each], 1)

    def drawing(self, sounding: Sounding) -> Drawing:
        """How codes are drawn, where nothing else is asked for as the official code does.

        Raises:
            MediaError: the sound would be longer than the decoder can make.
        """
        s, rate = sounding, self.sample_rate / self.hop
        seconds = SECONDS if s.seconds is None else s.seconds
        frames = max(1, round(seconds * rate))
        most = self.config.backbone.context - max(self.delays)
        if frames > most:
            raise MediaError(f"{seconds:g} seconds; this model makes at most {most / rate:.1f}")
        return Drawing(
            frames=frames, temperature=1.0 if s.temperature is None else s.temperature, top_k=s.top_k or TOP_K,
            guidance=GUIDANCE if s.guidance is None else s.guidance, seed=s.seed,
        )  # fmt: skip

    def sound(
        self, text: str, sounding: Sounding, *, voice: Voice | None = None
    ) -> Iterator[Float[Tensor, "channels samples"]]:
        """Music; blocks come while later codes are to be chosen."""
        if voice is not None:
            raise UnsupportedError("MusicGen makes music: it speaks with nobody's voice")
        frames = (frame for _, frame in generate(self, self.prompt([text]), self.drawing(sounding)))
        return sounded(frames, self.reconstruct, first=self.sample_rate // self.hop, ahead=self.codec.ahead)

    def load_processors(self, folder: Path) -> None:
        if (folder / "tokenizer.json").is_file():
            self.tokenizer = LanguageTokenizer.from_folder(folder)


def read_hf(raw: Mapping[str, Any]) -> tuple[MusicGenConfig, dict[str, str]]:
    f = Fields(raw)
    f.require("model_type", "musicgen")
    t, a, d = f.child("text_encoder"), f.child("audio_encoder"), f.child("decoder")
    for part, kind in ((t, "t5"), (a, "encodec"), (d, "musicgen_decoder")):
        part.require("model_type", kind)
    backbone, codec, text = read_musicgen(d), read_codec(a), read_t5(t)
    size = d.take("vocab_size", int, 2048)
    if size != codec.codebook_size:
        f.problems.append(f"config.json: decoder: vocab_size {size} is not codebook_size {codec.codebook_size}")
    for name in ("pad_token_id", "bos_token_id"):
        d.require(name, size)
    books, channels = d.take("num_codebooks", int, 4), d.take("audio_channels", int, 1)
    report = f.done()
    return MusicGenConfig(text=text, backbone=backbone, codec=codec, num_codebooks=books, channels=channels), report


def write_hf(c: MusicGenConfig) -> dict[str, Any]:
    size = c.codec.codebook_size
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "decoder_start_token_id"), size)
    decoder = {"vocab_size": size, "num_codebooks": c.num_codebooks, "audio_channels": c.channels, **special}
    raw = {
        "architectures": ["MusicgenForConditionalGeneration"], "model_type": "musicgen", "is_encoder_decoder": True,
        "text_encoder": {"model_type": "t5", **write_t5(c.text)},
        "audio_encoder": {"model_type": "encodec", **write_codec(c.codec)},
        "decoder": {"model_type": "musicgen_decoder", **decoder, **write_musicgen(c.backbone)},
    }  # fmt: skip
    return write_whole(c, raw, read_hf)


def rules_hf(c: MusicGenConfig) -> list[Rule]:
    return [
        *(r for r in t5_rules(c.text, "text_encoder.", "text.") if "text.decoder" not in "".join(r.ours)),
        *musicgen_rules("decoder.model.decoder.", "backbone."),
        rule("decoder.model.decoder.embed_tokens.{k}.weight", "head.embed_tokens.{k}.weight"),
        rule("decoder.lm_heads.{k}.weight", "head.lm_heads.{k}.weight"),
        rule("enc_to_dec_proj.{p}", "connector.{p}"),
        *codec_rules("audio_encoder.", "codec.", c.codec),
    ]


# The preprocessor of these folders is one of sound; it says what the config says.
MusicGen.formats = {"hf": Format(read=read_hf, write=write_hf, rules=rules_hf, read_images=lambda *_: None)}


_CODEC = {
    "model_type": "encodec", "sampling_rate": 32000, "codebook_size": 2048, "target_bandwidths": [2.2],
    "num_filters": 64, "upsampling_ratios": [8, 5, 4, 4], "use_causal_conv": False, "use_conv_shortcut": False,
}  # fmt: skip
_T5_BASE = {"model_type": "t5", "d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}


def preset(dim: int, layers: int, channels: int) -> MusicGenConfig:
    """The published sizes, with T5-base and the codec of 32 kHz."""
    decoder = {
        "hidden_size": dim, "num_hidden_layers": layers, "num_attention_heads": dim // 64, "ffn_dim": 4 * dim,
        "num_codebooks": 4 * channels, "audio_channels": channels,
    }  # fmt: skip
    return read_hf({"text_encoder": _T5_BASE, "audio_encoder": _CODEC, "decoder": decoder})[0]


PRESETS = {
    f"facebook/musicgen-{'' if channels == 1 else 'stereo-'}{name}": partial(preset, dim, layers, channels)
    for name, dim, layers in (("small", 1024, 24), ("medium", 1536, 48), ("large", 2048, 48))
    for channels in (1, 2)
}
