"""Cosmos tokenizer: films (a picture is one of a single frame) as continuous latents, or as whole numbers, and back.

Paper: NVIDIA, "Cosmos World Foundation Model Platform for Physical AI", 2025, https://arxiv.org/abs/2501.03575.
Official code: NVIDIA/Cosmos-Tokenizer. Hub: the ``vae`` folders of nvidia/Cosmos-1.0-Diffusion-7B-Text2World and its
kin (diffusers); nvidia/Cosmos-1.0-Tokenizer-DV8x16x16 (discrete; TorchScript there, which is not read).

    1 + 8 k frames -> wavelets (4 x 4 x 4) -> causal pyramid -> 1x1x1 -> 1 + k frames of 16 numbers
                                                             -> 1x1x1 -> 6 numbers, rounded: codes of 64,000
    numbers -> 1x1x1 -> causal pyramid -> wavelets backwards -> 1 + 8 k frames

Training details kept here: nothing sees a later frame, so the first one is coded as if it were alone; norms are of
each frame; the continuous one is a plain autoencoder, without noise; the discrete one rounds to levels 8, 8, 8, 5, 5,
5, with the gradient passed straight through, and nothing else to be paid. The paper's first stage learns from L1 and
a perceptual distance of pictures and films together (`picture_codec.AdversarialPictures` takes one, frozen); its
second from optical flow and Gram matrices.

Deviations: only wavelets (the ``rearrange`` patches of diffusers are in no published file); flow and Gram losses are
left out; a discrete tokenizer is written with a field ``levels`` of our own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from polymodal.core.errors import ConfigError, UnsupportedError
from polymodal.core.verbs import TensorSpec
from polymodal.systems.picture_codec import PictureCodec
from polymodal.tokenizers.cosmos import CosmosNetConfig, FilmAutoencoder
from polymodal.tokenizers.fsq import CosmosCodes
from polymodal.tokenizers.pyramid import init_convolutions_
from polymodal.weights.fields import LARGEST, MOST_LAYERS, Fields
from polymodal.weights.format import Format, write_whole
from polymodal.weights.layouts import TO_PROJECTIONS
from polymodal.weights.rules import Rule, Squeeze, renames, rule

CLASS: Final = "AutoencoderKLCosmos"


@dataclass(frozen=True, kw_only=True)
class CosmosTokenizerConfig:
    """Encoder and decoder, and what is between them.

    Attributes:
        net: the pyramids.
        codes: the levels of a discrete tokenizer; None: latents stay continuous.
        mean, deviation: of each number of the latents, channel by channel, the frames of each in order: what diffusion
            models scale them by. Empty where nobody has measured them.
    """

    net: CosmosNetConfig = field(default_factory=CosmosNetConfig)
    codes: CosmosCodes | None = None
    mean: tuple[float, ...] = ()
    deviation: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.deviation) or len(self.mean) % self.net.latent_dim or 0 in self.deviation:
            raise ConfigError(
                f"{len(self.mean)} means and {len(self.deviation)} deviations, which are not zero, for latents of "
                f"{self.net.latent_dim} channels"
            )


@final
class CosmosTokenizer(PictureCodec):
    """Films to latents or codes, and back."""

    config: CosmosTokenizerConfig

    def __init__(self, config: CosmosTokenizerConfig) -> None:
        super().__init__(config)
        net = config.net
        inside = net.latent_dim if config.codes is None else config.codes.dim
        self.net = FilmAutoencoder(net, inside)
        self.quantizer = None if config.codes is None else config.codes.build()
        self.factor = net.space

    @property
    def codebook_size(self) -> int:
        """How many codes there are; 0 where latents are continuous."""
        return 0 if self.quantizer is None else self.quantizer.size

    def init_weights(self) -> None:
        """torch's own scheme, as the official code has it."""
        init_convolutions_(self)

    def inputs_spec(self) -> dict[str, TensorSpec]:
        net = self.config.net
        return {"pixels": TensorSpec(shape=(net.channels, 1 + net.time, 2 * net.space, 2 * net.space))}

    @property
    def last_layer(self) -> nn.Parameter:
        weight = self.net.decoder.last.time.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    # -- sizes

    def check(self, pixels: Float[Tensor, "batch channels *size"]) -> None:
        """As of pictures; films have one frame and a multiple of what a latent frame stands for."""
        super().check(pixels)
        self.grid(pixels.shape[2] if pixels.ndim == 5 else 1, *pixels.shape[-2:])

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Latent frames, rows and columns of a film: the one count that everybody uses."""
        return self.net.grid(frames, height, width)

    # -- latents

    def latents(self, pixels: Float[Tensor, "batch channels *size"]) -> Float[Tensor, "batch dim *grid"]:
        """Latents (of a discrete tokenizer: before they are rounded) of films or pictures in [-1, 1]."""
        self.check(pixels)
        film = pixels if pixels.ndim == 5 else pixels[:, :, None]
        latents = self.net.encode(film)
        return latents if pixels.ndim == 5 else latents[:, :, 0]

    def paint(self, latents: Float[Tensor, "batch dim *grid"]) -> Float[Tensor, "batch channels *size"]:
        """Films or pictures of latents (of a discrete tokenizer: of rounded ones)."""
        film = latents if latents.ndim == 5 else latents[:, :, None]
        pixels = self.net.decode(film)
        return pixels if latents.ndim == 5 else pixels[:, :, 0]

    def autoencode(
        self, pixels: Float[Tensor, "batch channels *size"]
    ) -> tuple[Float[Tensor, "batch channels *size"], Float[Tensor, ""]]:
        latents = self.latents(pixels)
        if self.quantizer is None:
            return self.paint(latents), latents.new_zeros(())
        coded = self.quantizer(latents)
        return self.paint(coded.x), coded.penalty

    # -- codes

    @torch.no_grad()
    def quantize(self, pixels: Float[Tensor, "batch channels *size"]) -> Int[Tensor, "batch *grid"]:
        """Codes of films or pictures in [-1, 1].

        Raises:
            MediaError: a size does not fit.
            UnsupportedError: the tokenizer is continuous.
        """
        return self._discrete().encode(self.latents(pixels.to(self.device)))

    @torch.no_grad()
    def reconstruct(self, codes: Int[Tensor, "batch *grid"]) -> Float[Tensor, "batch channels *size"]:
        """Films or pictures of codes; errors as `quantize`."""
        return self.paint(self._discrete().decode(codes.to(self.device)))

    def _discrete(self) -> Any:
        if self.quantizer is None:
            raise UnsupportedError(
                f"{self.source} is a continuous tokenizer: it has latents (latents, paint), no codes"
            )
        return self.quantizer


def _numbers(f: Fields, name: str) -> tuple[float, ...]:
    """A list of numbers, negative ones too, or null."""
    values = f.optional(name, list) or []
    if any(type(value) not in (int, float) or not abs(value) < 2**20 for value in values):
        f.problems.append(f"config.json: {name} holds what is no number, or one beyond {2**20:,}")
        return ()
    return tuple(map(float, values))


def read_hf(raw: Mapping[str, Any]) -> tuple[CosmosTokenizerConfig, dict[str, str]]:
    f = Fields(raw)
    f.require("_class_name", CLASS)
    f.ignore("which version wrote it", "_diffusers_version")
    f.require("patch_type", "haar")
    f.require("scaling_factor", 1.0, 1)
    channels = f.take("in_channels", int, 3)
    f.require("out_channels", channels)
    default = CosmosNetConfig()
    lists: dict[str, Any] = {o: f.numbers(t, int) if t in f else vars(default)[o] for o, t in _LISTS.items()}
    for ours, theirs in _LISTS.items():
        if ours != "attention" and (min(lists[ours], default=0) < 1 or len(lists[ours]) > 16):
            f.problems.append(f"config.json: {theirs} is {lists[ours]}, expected a few positive numbers")
    net = {ours: f.take(theirs, int, vars(default)[ours]) for ours, theirs in _SIZES.items()}
    if channels * net["patch_size"] ** 3 > LARGEST:
        f.problems.append(f"config.json: patch_size {net['patch_size']}, cubed, of {channels} channels is too much")
    blocks = f.take("num_layers", int, 2, most=MOST_LAYERS)
    mean, deviation = _numbers(f, "latents_mean"), _numbers(f, "latents_std")
    levels = f.numbers("levels", int) if "levels" in f else ()
    report = f.done()
    config = CosmosTokenizerConfig(
        net=CosmosNetConfig(channels=channels, num_blocks=blocks, **lists, **net), mean=mean, deviation=deviation,
        codes=CosmosCodes(levels=levels) if levels else None,
    )  # fmt: skip
    return config, report


_LISTS: Final = {
    "encoder_widths": "encoder_block_out_channels", "decoder_widths": "decode_block_out_channels",
    "attention": "attention_resolutions",
}  # fmt: skip
_SIZES: Final = {
    "latent_dim": "latent_channels", "resolution": "resolution", "patch_size": "patch_size",
    "space": "spatial_compression_ratio", "time": "temporal_compression_ratio",
}  # fmt: skip


def write_hf(c: CosmosTokenizerConfig) -> dict[str, Any]:
    n = c.net
    raw = {
        "_class_name": CLASS, "in_channels": n.channels, "out_channels": n.channels, "num_layers": n.num_blocks,
        "patch_type": "haar", "scaling_factor": 1.0, "latents_mean": list(c.mean) or None,
        "latents_std": list(c.deviation) or None, **{theirs: list(vars(n)[ours]) for ours, theirs in _LISTS.items()},
        **{theirs: vars(n)[ours] for ours, theirs in _SIZES.items()},
    }  # fmt: skip
    raw |= {} if c.codes is None else {"levels": list(c.codes.levels)}
    return write_whole(c, raw, read_hf)


_FACTORS: Final = {"conv_s": "space", "conv_t": "time"}


def _block(theirs: str, ours: str) -> list[Rule]:
    names = {f"norm{n}.norm": f"norm{n}" for n in (1, 2)} | {"conv_shortcut": "shortcut"}
    names |= {f"conv{n}.{a}": f"conv{n}.{b}" for n in (1, 2) for a, b in _FACTORS.items()}
    return renames(theirs, ours, names)


def _attention(theirs: str, ours: str) -> list[Rule]:
    """Their 1x1x1 convolutions are linear layers here."""
    rules = [rule(f"{theirs}.norm.norm.{{p}}", f"{ours}.norm.{{p}}")]
    for a, b in TO_PROJECTIONS.items():
        rules.append(rule(f"{theirs}.{a}.weight", f"{ours}.{b}.weight", Squeeze((2, 3, 4))))
        rules.append(rule(f"{theirs}.{a}.bias", f"{ours}.{b}.bias"))
    return rules


def rules_hf(c: CosmosTokenizerConfig) -> list[Rule]:
    rules = [rule(f"{n}.{{p}}", f"net.{n}.{{p}}") for n in ("quant_conv", "post_quant_conv")]
    halves = (
        ("encoder", "down", "downsamplers", ("space", "time", "mix")),
        ("decoder", "up", "upsamplers", ("time", "space", "mix")),
    )
    for part, way, resample, order in halves:
        whole = f"net.{part}"
        for a, b in _FACTORS.items():
            rules += renames(part, whole, {f"conv_in.{a}": f"first.{b}", f"conv_out.{a}": f"last.{b}"})
        rules.append(rule(f"{part}.norm_out.norm.{{p}}", f"{whole}.norm.{{p}}"))
        rules += _block(f"{part}.mid_block.resnets.{{j}}", f"{whole}.middle.blocks.{{j}}")
        rules += _attention(f"{part}.mid_block.attentions.0", f"{whole}.middle.attn")
        rules += _attention(f"{part}.mid_block.temp_attentions.0", f"{whole}.middle.time_attn")
        level, ours = f"{part}.{way}_blocks.{{i}}", f"{whole}.levels.{{i}}"
        rules += _block(f"{level}.resnets.{{j}}", f"{ours}.blocks.{{j}}")
        rules += _attention(f"{level}.attentions.{{j}}", f"{ours}.attns.{{j}}")
        rules += _attention(f"{level}.temp_attentions.{{j}}", f"{ours}.time_attns.{{j}}")
        layers = {f"conv{n}": name for n, name in enumerate(order, 1)}
        rules += renames(f"{level}.{resample}.0", f"{ours}.resample", layers)
    return rules


CosmosTokenizer.formats = {
    "hf": Format(read=read_hf, write=write_hf, rules=rules_hf, weights_file="diffusion_pytorch_model.safetensors")
}


def published(time: int, space: int, *, discrete: bool) -> CosmosTokenizerConfig:
    """The tokenizers of films, by how many frames and pixels a latent stands for."""
    net = CosmosNetConfig(space=space, time=time)
    return CosmosTokenizerConfig(net=net, codes=CosmosCodes() if discrete else None)


PRESETS = {
    f"nvidia/Cosmos-Tokenizer-{kind}{time}x{space}x{space}": partial(published, time, space, discrete=kind == "DV")
    for kind in ("CV", "DV")
    for time, space in ((4, 8), (8, 8), (8, 16))
}
