"""DAC: sound as codes that are looked up by angle, from an autoencoder with periodic activations.

Paper: Kumar et al., "High-Fidelity Audio Compression with Improved RVQGAN", 2023, https://arxiv.org/abs/2306.06546.
Official code: descriptinc/descript-audio-codec.
Hub: descript/dac_16khz, descript/dac_24khz, descript/dac_44khz.

    samples -> DAC encoder -> factorised residual quantiser (codes) -> DAC decoder -> samples

Training details kept here: codebooks of 8 dimensions, compared after normalisation, that train by gradient (codebook
1.0, commitment 0.25); Snake activations; quantiser dropout by rows; log-mel distance at seven scales (15); convolutions
from a truncated normal of 0.02, biases from zero.

Deviations: the files of the Hub hold convolutions with their weight normalisation folded in, and so they train here; a
decoder with odd strides gives a few samples less than a whole hop, as transformers' does; the paper's discriminators of
waveform periods and of frequency bands are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError
from polymodal.encoders.dac import DACDecoder, DACEncoder
from polymodal.nn.mel import log_mel_distance
from polymodal.systems.base import Format, Reference
from polymodal.systems.codec import Codec
from polymodal.tokenizers.rvq import FactorisedQuantizer, Quantised
from polymodal.weights.fields import Fields, FieldTable, read_fields, write_fields
from polymodal.weights.format import write_whole
from polymodal.weights.rules import Rule, rule


@dataclass(frozen=True, kw_only=True)
class DACConfig:
    """A mono codec for one sample rate.

    Attributes:
        dim: channels of the encoder's first layer; each of its strides, ``ratios``, doubles them.
        decoder_dim: channels of the decoder's first layer, halved by each stride.
        quantizer_dropout: share of a batch that trains with a random number of codebooks.
    """

    sample_rate: int = 16000
    dim: int = 64
    decoder_dim: int = 1536
    ratios: tuple[int, ...] = (2, 4, 8, 8)
    num_codebooks: int = 9
    codebook_size: int = 1024
    codebook_dim: int = 8
    quantizer_dropout: float = 0.0
    commitment: float = 0.25
    codebook: float = 1.0

    def __post_init__(self) -> None:
        if not self.ratios or min(self.ratios) < 2 or self.decoder_dim % 2 ** len(self.ratios):
            raise ConfigError(f"strides {self.ratios} for a decoder of {self.decoder_dim} channels")

    @property
    def latent_dim(self) -> int:
        return self.dim * 2 ** len(self.ratios)


PRESETS = {
    "descript/dac_16khz": lambda: DACConfig(num_codebooks=12, ratios=(2, 4, 5, 8)),
    "descript/dac_24khz": lambda: DACConfig(sample_rate=24000, num_codebooks=32, ratios=(2, 4, 5, 8)),
    "descript/dac_44khz": lambda: DACConfig(sample_rate=44100),
}


@final
class DAC(Codec):
    """Neural codec."""

    config: DACConfig
    terms = {"mel": 15.0}
    channels = 1

    def __init__(self, config: DACConfig) -> None:
        super().__init__(config)
        self.encoder = DACEncoder(dim=config.dim, ratios=config.ratios)
        self.quantizer = FactorisedQuantizer(
            num_codebooks=config.num_codebooks, codebook_size=config.codebook_size, dim=config.latent_dim,
            code_dim=config.codebook_dim, dropout=config.quantizer_dropout, commitment=config.commitment,
            codebook=config.codebook,
        )  # fmt: skip
        self.decoder = DACDecoder(latent_dim=config.latent_dim, dim=config.decoder_dim, ratios=config.ratios)
        self.sample_rate, self.hop = config.sample_rate, math.prod(config.ratios)
        self.num_codebooks, self.codebook_size = config.num_codebooks, config.codebook_size

    def init_weights(self) -> None:
        """The official scheme; what it leaves alone keeps torch's own."""
        for module in self.modules():
            if isinstance(module, nn.Conv1d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def latents(self, wave: Float[Tensor, "batch channels samples"]) -> Float[Tensor, "batch dim frames"]:
        """The encoder's vectors; silence fills the last frame."""
        self.check(wave)
        return self.encoder(F.pad(wave, (0, -wave.shape[-1] % self.hop)))

    def autoencode(
        self, wave: Float[Tensor, "batch channels samples"]
    ) -> tuple[Float[Tensor, "batch channels samples"], Quantised]:
        quantised, length = self.quantizer(self.latents(wave)), wave.shape[-1]
        made = self.decoder(quantised.x)[..., :length]
        return F.pad(made, (0, length - made.shape[-1])), quantised

    def forward(self, batch: Batch) -> Float[Tensor, "batch samples"]:
        """The sound again, without its axis of channels."""
        return self.autoencode(batch["wave"])[0][:, 0]

    def reconstruction(
        self, made: Float[Tensor, "batch channels samples"], wave: Float[Tensor, "batch channels samples"]
    ) -> dict[str, Float[Tensor, ""]]:
        return {"mel": log_mel_distance(made, wave, self.sample_rate)}

    @torch.no_grad()
    def quantize(
        self, wave: Float[Tensor, "batch channels samples"], codebooks: int | None = None
    ) -> Int[Tensor, "batch codebooks frames"]:
        """Codes of waveforms; with fewer codebooks at a lower bit rate.

        Raises:
            MediaError: the waveforms have other channels.
        """
        return self.quantizer.encode(self.latents(wave), codebooks)

    @torch.no_grad()
    def reconstruct(self, codes: Int[Tensor, "batch codebooks frames"]) -> Float[Tensor, "batch channels samples"]:
        """Waveforms of codes, a hop for each frame (a few samples less where a stride is odd)."""
        return self.decoder(self.quantizer.decode(codes))

    reference = Reference(
        package="transformers", cls="DacModel", inputs={"wave": "input_values"}, output="audio_values", loss=False
    )


FIELDS: FieldTable = (
    ("sampling_rate", "sample_rate", 16000), ("encoder_hidden_size", "dim", 64),
    ("decoder_hidden_size", "decoder_dim", 1536), ("n_codebooks", "num_codebooks", 9),
    ("codebook_size", "codebook_size", 1024), ("codebook_dim", "codebook_dim", 8),
    ("quantizer_dropout", "quantizer_dropout", 0.0), ("commitment_loss_weight", "commitment", 0.25),
    ("codebook_loss_weight", "codebook", 1.0),
)  # fmt: skip


def read_hf(raw: Mapping[str, Any]) -> tuple[DACConfig, dict[str, str]]:
    f = Fields(raw)
    f.require("model_type", "dac")
    fields = read_fields(f, FIELDS)
    if "downsampling_ratios" in f:
        fields["ratios"] = f.numbers("downsampling_ratios", int)
    config = DACConfig() if f.problems else DACConfig(**fields)
    # Written, too, though they follow from the others.
    if "upsampling_ratios" in f and f.numbers("upsampling_ratios", int) != config.ratios[::-1]:
        f.problems.append("config.json: upsampling_ratios is not downsampling_ratios from right to left")
    for name, value in (("hidden_size", config.latent_dim), ("hop_length", math.prod(config.ratios))):
        if f.take(name, int, value) != value:
            f.problems.append(f"config.json: {name} is {raw[name]!r}, but {value} follows from the other fields")
    return config, f.done()


def write_hf(c: DACConfig) -> dict[str, Any]:
    raw = {"architectures": ["DacModel"], "model_type": "dac"} | write_fields(c, FIELDS) | {
        "downsampling_ratios": list(c.ratios), "upsampling_ratios": list(c.ratios[::-1]),
        "hidden_size": c.latent_dim, "hop_length": math.prod(c.ratios),
    }  # fmt: skip
    return write_whole(c, raw, read_hf)


def rules_hf(config: DACConfig) -> list[Rule]:
    rules = []
    for stack, conv in (("encoder", "conv1"), ("decoder", "conv_t1")):
        rules += [
            rule(f"{stack}.conv1.{{p}}", f"{stack}.first.{{p}}"),
            rule(f"{stack}.snake1.{{p}}", f"{stack}.snake.{{p}}"),
            rule(f"{stack}.conv2.{{p}}", f"{stack}.last.{{p}}"),
            rule(f"{stack}.block.{{i}}.snake1.{{p}}", f"{stack}.blocks.{{i}}.snake.{{p}}"),
            rule(f"{stack}.block.{{i}}.{conv}.{{p}}", f"{stack}.blocks.{{i}}.conv.{{p}}"),
        ]
        for unit in range(3):
            theirs, ours = f"{stack}.block.{{i}}.res_unit{unit + 1}", f"{stack}.blocks.{{i}}.units.{unit}"
            rules.append(rule(f"{theirs}.{{layer}}.{{p}}", f"{ours}.{{layer}}.{{p}}"))
    names = {"in_proj": "in_proj", "out_proj": "out_proj", "codebook": "entries"}
    books = [
        rule(f"quantizer.quantizers.{{i}}.{a}.{{p}}", f"quantizer.books.{{i}}.{b}.{{p}}") for a, b in names.items()
    ]
    return rules + books


DAC.formats = {"hf": Format(read=read_hf, write=write_hf, rules=rules_hf)}
