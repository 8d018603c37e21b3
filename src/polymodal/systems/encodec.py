"""EnCodec: sound as a few streams of codes, from a convolutional autoencoder with residual vector quantisation.

Paper: Defossez et al., "High Fidelity Neural Audio Compression", 2022, https://arxiv.org/abs/2210.13438.
Official code: facebookresearch/encodec (models), facebookresearch/audiocraft (training).
Hub: facebook/encodec_24khz, facebook/encodec_48khz, facebook/encodec_32khz (MusicGen's).

    samples -> SEANet encoder -> residual quantiser (codes) -> SEANet decoder -> samples

Training details kept here: codebooks that follow moving averages (0.99), started by k-means on the first batch; a
bandwidth drawn for each batch; one straight-through step over the whole sum, so that every codebook's commitment
reaches the encoder; L1 of samples (0.1) and multi-scale mel loss (2), which `Adversarial` joins with discriminators of
spectra (adversarial 4, feature matching 4) by shares of the gradient, the commitment outside.

The 48 kHz model codes pieces of a second and keeps the loudness of each: `encode_chunks` and `decode_chunks`. The
others have the verb `Codes`.

Deviations: a dead entry's moving average begins anew with the vector that replaces it (in the official code the next
update overwrites the replacement), and so does that of the k-means start; codec and discriminators take their steps at
the same time, not one after the other. The entropy-coding language model of the paper is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from polymodal.core.batch import Batch
from polymodal.encoders.seanet import SEANetConfig
from polymodal.heads.codec import MelScales, multi_scale_mel
from polymodal.systems.base import Format, Reference
from polymodal.systems.codec import Codec
from polymodal.systems.seanet_codec import Chunk, EnCodecConfig, SEANetCodec, codec_rules, read_codec, write_codec
from polymodal.tokenizers.rvq import Quantised
from polymodal.weights.fields import Fields
from polymodal.weights.format import write_whole
from polymodal.weights.rules import Rule

PRESETS = {
    "facebook/encodec_24khz": lambda: EnCodecConfig(),
    "facebook/encodec_48khz": lambda: EnCodecConfig(
        sample_rate=48000, bandwidths=(3.0, 6.0, 12.0, 24.0), normalize=True, chunk_seconds=1.0, overlap=0.01,
        seanet=SEANetConfig(channels=2, causal=False, norm="group"),
    ),
    "facebook/encodec_32khz": lambda: EnCodecConfig(
        sample_rate=32000, bandwidths=(2.2,), codebook_size=2048,
        seanet=SEANetConfig(filters=64, ratios=(8, 5, 4, 4), causal=False, shortcut=False),
    ),
}  # fmt: skip


@final
class EnCodec(Codec):
    """Neural codec."""

    config: EnCodecConfig
    terms = {"l1": 0.1, "mel": 2.0}

    def __init__(self, config: EnCodecConfig) -> None:
        super().__init__(config)
        self.codec = SEANetCodec(config)
        self.sample_rate, self.channels, self.hop = config.sample_rate, config.seanet.channels, config.seanet.hop
        self.num_codebooks, self.codebook_size = config.num_codebooks, config.codebook_size

    def init_weights(self) -> None:
        """torch's own, which layers have from their making, as in the official code; codebooks wait for a batch."""

    def latents(self, wave: Float[Tensor, "batch channels samples"]) -> Float[Tensor, "batch dim frames"]:
        self.check(wave)
        scale = self.codec.scale(wave)
        return self.codec.encoder(wave if scale is None else wave / scale)

    def autoencode(
        self, wave: Float[Tensor, "batch channels samples"]
    ) -> tuple[Float[Tensor, "batch channels samples"], Quantised]:
        self.check(wave)
        return self.codec.autoencode(wave)

    def forward(self, batch: Batch) -> Float[Tensor, "batch channels samples"]:
        """The sound again at the lowest bandwidth, piece by piece: transformers' own default."""
        wave, lowest = batch["wave"], self.config.codebooks_at(self.config.bandwidths[0])
        self.check(wave)
        return self.codec.decode_chunks(self.codec.encode_chunks(wave, lowest))[..., : wave.shape[-1]]

    def reconstruction(
        self, made: Float[Tensor, "batch channels samples"], wave: Float[Tensor, "batch channels samples"]
    ) -> dict[str, Float[Tensor, ""]]:
        return {"l1": F.l1_loss(made, wave), "mel": multi_scale_mel(made, wave, MelScales(rate=self.sample_rate))}

    @torch.no_grad()
    def quantize(
        self, wave: Float[Tensor, "batch channels samples"], codebooks: int | None = None
    ) -> Int[Tensor, "batch codebooks frames"]:
        """Codes of waveforms; with fewer codebooks at a lower bit rate (`EnCodecConfig.codebooks_at`).

        Raises:
            UnsupportedError: this codec keeps a loudness beside its codes.
            MediaError: the waveforms have other channels.
        """
        self.codec.refuse_scales()
        self.check(wave)
        return self.codec.encode_chunks(wave, codebooks)[0].codes

    @torch.no_grad()
    def reconstruct(self, codes: Int[Tensor, "batch codebooks frames"]) -> Float[Tensor, "batch channels samples"]:
        """Waveforms of codes, a hop for each frame."""
        self.codec.refuse_scales()
        return self.codec.decode_chunks([Chunk(codes, None)])

    @torch.no_grad()
    def encode_chunks(self, wave: Float[Tensor, "batch channels samples"], codebooks: int | None = None) -> list[Chunk]:
        """Codes and loudness of each piece of the waveforms."""
        self.check(wave)
        return self.codec.encode_chunks(wave, codebooks)

    @torch.no_grad()
    def decode_chunks(self, chunks: Sequence[Chunk]) -> Float[Tensor, "batch channels samples"]:
        """Waveforms of what `encode_chunks` made, perhaps longer by less than a frame."""
        return self.codec.decode_chunks(chunks)

    reference = Reference(
        package="transformers", cls="EncodecModel", inputs={"wave": "input_values"}, output="audio_values", loss=False
    )


def read_hf(raw: Mapping[str, Any]) -> tuple[EnCodecConfig, dict[str, str]]:
    f = Fields(raw)
    f.require("model_type", "encodec")
    config = read_codec(f)
    return config, f.done()


def write_hf(c: EnCodecConfig) -> dict[str, Any]:
    raw = {"architectures": ["EncodecModel"], "model_type": "encodec"} | write_codec(c)
    return write_whole(c, raw, read_hf)


def rules_hf(config: EnCodecConfig) -> list[Rule]:
    return codec_rules("", "codec.", config)


EnCodec.formats = {"hf": Format(read=read_hf, write=write_hf, rules=rules_hf)}
