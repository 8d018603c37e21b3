"""SEANet around a residual quantiser: EnCodec, and the codec inside MusicGen. Not a system itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from polymodal.core.errors import ConfigError, UnsupportedError
from polymodal.encoders.seanet import SEANetConfig, SEANetDecoder, SEANetEncoder
from polymodal.nn.conv1d import ConvNorm, PadMode
from polymodal.nn.precision import FullPrecision
from polymodal.tokenizers.rvq import Quantised, ResidualQuantizer
from polymodal.weights.fields import MOST_LAYERS, Fields, FieldTable, read_fields, write_fields
from polymodal.weights.rules import Rule, read_only, rule


@dataclass(frozen=True, kw_only=True)
class EnCodecConfig:
    """A codec for one sample rate.

    Attributes:
        bandwidths: kbit/s, ascending; the largest says how many codebooks there are, and training draws one of them.
        normalize: every piece is divided by its loudness, which is kept beside its codes.
        chunk_seconds: longer waveforms are coded in pieces of so many seconds; None codes them whole.
        overlap: the share of a piece that the next one repeats; they are faded into each other.
    """

    sample_rate: int = 24000
    bandwidths: tuple[float, ...] = (1.5, 3.0, 6.0, 12.0, 24.0)
    seanet: SEANetConfig = field(default_factory=SEANetConfig)
    codebook_size: int = 1024
    normalize: bool = False
    chunk_seconds: float | None = None
    overlap: float | None = None

    def __post_init__(self) -> None:
        if not self.bandwidths or sorted(self.bandwidths) != list(self.bandwidths) or self.num_codebooks < 1:
            raise ConfigError(
                f"the bandwidths {self.bandwidths} kbit/s should ascend, to that of a codebook at least: "
                f"{self.codebook_rate / 1000} kbit/s"
            )
        if (self.chunk_seconds is None) != (self.overlap is None) or not 0 <= (self.overlap or 0) < 1:
            raise ConfigError(f"chunks of {self.chunk_seconds} s with an overlap of {self.overlap}")

    @property
    def codebook_rate(self) -> int:
        """Bits a second of one codebook, with whole frames and bits as the official code counts them."""
        return math.ceil(self.sample_rate / self.seanet.hop) * max(1, math.ceil(math.log2(self.codebook_size)))

    @property
    def num_codebooks(self) -> int:
        return int(1000 * self.bandwidths[-1] // self.codebook_rate)

    def codebooks_at(self, bandwidth: float) -> int:
        """Codebooks within a bandwidth in kbit/s, one at least."""
        return min(self.num_codebooks, max(1, int(1000 * bandwidth // self.codebook_rate)))

    @property
    def chunk(self) -> tuple[int, int] | None:
        """Samples of a piece, and from the start of one to that of the next."""
        if self.chunk_seconds is None or self.overlap is None:
            return None
        length = int(self.chunk_seconds * self.sample_rate)
        return length, max(1, int((1.0 - self.overlap) * length))


class Chunk(NamedTuple):
    """A piece of sound as codes; ``scale`` is its loudness where the codec normalises."""

    codes: Int[Tensor, "batch codebooks frames"]
    scale: Float[Tensor, "batch 1 1"] | None


class SEANetCodec(FullPrecision):
    """Encoder, residual quantiser and decoder: in fp32, because rounded vectors are nearest to other codes."""

    def __init__(self, config: EnCodecConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = SEANetEncoder(config.seanet)
        self.quantizer = ResidualQuantizer(
            num_codebooks=config.num_codebooks, codebook_size=config.codebook_size, dim=config.seanet.dim,
            choices=tuple(map(config.codebooks_at, config.bandwidths)),
        )  # fmt: skip
        self.decoder = SEANetDecoder(config.seanet)

    @property
    def ahead(self) -> int:
        """So many later frames may still change the sound of a frame: each resolution looks ahead a bit."""
        seanet = self.config.seanet
        return 0 if seanet.causal else seanet.kernel_size // 2 + 2 * len(seanet.ratios) + 1

    def scale(self, wave: Float[Tensor, "batch channels samples"]) -> Float[Tensor, "batch 1 1"] | None:
        """The loudness (root mean square of the mean of the channels), if the codec normalises."""
        if not self.config.normalize:
            return None
        return wave.mean(1, keepdim=True).pow(2).mean(2, keepdim=True).sqrt() + 1e-8

    def autoencode(
        self, wave: Float[Tensor, "batch channels samples"]
    ) -> tuple[Float[Tensor, "batch channels samples"], Quantised]:
        """Through encoder, quantiser and decoder in one piece, and cut to the length of the input."""
        scale = self.scale(wave)
        quantised = self.quantizer(self.encoder(wave if scale is None else wave / scale))
        made = self.decoder(quantised.x)[..., : wave.shape[-1]]
        return (made if scale is None else made * scale), quantised

    def encode_chunks(self, wave: Float[Tensor, "batch channels samples"], codebooks: int | None = None) -> list[Chunk]:
        """Codes of each piece, one piece unless the codec has chunks; the last ones may be short."""
        length, stride = self.config.chunk or (wave.shape[-1],) * 2
        pieces = []
        for start in range(0, wave.shape[-1], stride):
            piece = wave[..., start : start + length]
            scale = self.scale(piece)
            latents = self.encoder(piece if scale is None else piece / scale)
            pieces.append(Chunk(self.quantizer.encode(latents, codebooks), scale))
        return pieces

    def decode_chunks(self, chunks: Sequence[Chunk]) -> Float[Tensor, "batch channels samples"]:
        """The pieces, faded into each other where they overlap; whole frames, so perhaps longer than what was coded."""
        waves = [self.decoder(self.quantizer.decode(codes)) for codes, _ in chunks]
        waves = [w if chunk.scale is None else w * chunk.scale for w, chunk in zip(waves, chunks, strict=True)]
        return waves[0] if self.config.chunk is None else overlap_add(waves, self.config.chunk[1])

    def refuse_scales(self) -> None:
        if self.config.normalize or self.config.chunk is not None:
            raise UnsupportedError(
                "this codec keeps the loudness of each piece beside its codes: use encode_chunks and decode_chunks"
            )


def overlap_add(waves: Sequence[Float[Tensor, "batch channels _"]], stride: int) -> Float[Tensor, "batch channels n"]:
    """Pieces that begin ``stride`` samples apart as one: a mean weighted by triangles over their length."""
    length = waves[0].shape[-1]
    ramp = torch.linspace(0, 1, length + 2, device=waves[0].device)[1:-1]
    triangle = 0.5 - (ramp - 0.5).abs()
    out = waves[0].new_zeros(*waves[0].shape[:-1], stride * (len(waves) - 1) + waves[-1].shape[-1])
    weight = torch.zeros_like(out[0, 0])
    for number, wave in enumerate(waves):
        place = slice(number * stride, number * stride + wave.shape[-1])
        out[..., place] += triangle[: wave.shape[-1]] * wave
        weight[place] += triangle[: wave.shape[-1]]
    return out / weight


# -- the format of the Hub

SEANET: FieldTable = (
    ("audio_channels", "channels", 1), ("hidden_size", "dim", 128), ("num_filters", "filters", 32),
    ("kernel_size", "kernel_size", 7), ("last_kernel_size", "last_kernel_size", 7),
    ("residual_kernel_size", "residual_kernel_size", 3), ("dilation_growth_rate", "dilation_growth", 2),
    ("compress", "compress", 2), ("use_causal_conv", "causal", True), ("trim_right_ratio", "trim_right", 1.0),
    ("use_conv_shortcut", "shortcut", True),
)  # fmt: skip
CODEC: FieldTable = (("sampling_rate", "sample_rate", 24000), ("codebook_size", "codebook_size", 1024),
                     ("normalize", "normalize", False))  # fmt: skip
LAYERS = (("num_residual_layers", 1), ("num_lstm_layers", 2))
NORMS: dict[str, ConvNorm] = {"weight_norm": "weight", "time_group_norm": "group"}
PADS: dict[str, PadMode] = {"reflect": "reflect", "constant": "constant", "replicate": "replicate"}


def read_codec(f: Fields) -> EnCodecConfig:
    """A config of transformers' EnCodec, or the part of MusicGen's that is one; problems are left in ``f``."""
    seanet = read_fields(f, SEANET) | {name: f.take(name, int, default, most=MOST_LAYERS) for name, default in LAYERS}
    seanet |= {"norm": f.choose("norm_type", NORMS, "weight_norm"), "padding": f.choose("pad_mode", PADS, "reflect")}
    if "upsampling_ratios" in f:
        seanet["ratios"] = f.numbers("upsampling_ratios", int)
    fields = read_fields(f, CODEC)
    if "target_bandwidths" in f:
        fields["bandwidths"] = f.numbers("target_bandwidths", float)
    fields |= {"chunk_seconds": f.optional("chunk_length_s", float), "overlap": f.optional("overlap", float)}
    if f.optional("codebook_dim", int) not in (None, seanet["dim"]):
        f.problems.append(f"codebook_dim is another one than hidden_size {seanet['dim']}: no such codec is known")
    if f.problems:
        return EnCodecConfig()
    return EnCodecConfig(seanet=SEANetConfig(**seanet), **fields)


def write_codec(c: EnCodecConfig) -> dict[str, Any]:
    norms = {ours: theirs for theirs, ours in NORMS.items()}
    more = {name: getattr(c.seanet, name) for name, _ in LAYERS}
    return write_fields(c.seanet, SEANET) | write_fields(c, CODEC) | more | {
        "norm_type": norms[c.seanet.norm], "pad_mode": c.seanet.padding, "codebook_dim": c.seanet.dim,
        "upsampling_ratios": list(c.seanet.ratios), "target_bandwidths": list(c.bandwidths),
        "chunk_length_s": c.chunk_seconds, "overlap": c.overlap,
    }  # fmt: skip


def codec_rules(theirs: str, ours: str, config: EnCodecConfig) -> list[Rule]:
    """Under a prefix of a file, the parts of a `SEANetCodec` under a prefix of ours."""
    rules = []
    places = [
        f"{stack}.layers.{{i}}{inner}" for stack in ("encoder", "decoder") for inner in ("", ".block.{j}", ".shortcut")
    ]
    for place in places:
        here, there = f"{theirs}{place}", f"{ours}{place}"
        if config.seanet.norm == "group":
            rules += [rule(f"{here}.{part}.{{p}}", f"{there}.{part}.{{p}}") for part in ("conv", "norm")]
            continue
        rules.append(rule(f"{here}.conv.bias", f"{there}.conv.bias"))
        for number, old in enumerate(("weight_g", "weight_v")):
            name = f"conv.parametrizations.weight.original{number}"
            rules += [
                rule(f"{here}.{name}", f"{there}.{name}"),
                *read_only([rule(f"{here}.conv.{old}", f"{there}.{name}")]),
            ]
    rules += [
        rule(f"{theirs}{s}.layers.{{i}}.lstm.{{p}}", f"{ours}{s}.layers.{{i}}.lstm.{{p}}")
        for s in ("encoder", "decoder")
    ]
    names = {"embed": "entries", "embed_avg": "sums", "cluster_size": "counts", "inited": "started"}
    books = (f"{theirs}quantizer.layers.{{i}}.codebook", f"{ours}quantizer.books.{{i}}")
    return rules + [rule(f"{books[0]}.{a}", f"{books[1]}.{b}") for a, b in names.items()]
