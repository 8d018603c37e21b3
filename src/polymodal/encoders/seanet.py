"""SEANet: the convolutional encoder of EnCodec, and the decoder that mirrors it (Tagliasacchi et al. 2020).

    samples -> conv -> (residual units -> ELU -> strided conv) x ratios -> + LSTM -> ELU -> conv -> latents
    latents -> conv -> + LSTM -> (ELU -> transposed conv -> residual units) x ratios -> ELU -> conv -> samples

The layers stand in one list in the order of the official code, activations included, and so do the names of its files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from polymodal.core.errors import ConfigError
from polymodal.nn.conv1d import Conv1d, ConvNorm, ConvTranspose1d, PadMode, ResidualLSTM


@dataclass(frozen=True, kw_only=True)
class SEANetConfig:
    """An encoder and its decoder.

    Attributes:
        channels: of the waveform.
        dim: of a latent.
        filters: channels of the first layer; each stride doubles them.
        ratios: strides of the decoder; the encoder's are the same from right to left.
        num_residual_layers: residual units of each resolution, dilated by powers of ``dilation_growth``.
        compress: how much narrower a residual unit is inside.
        trim_right: see `ConvTranspose1d`.
        shortcut: whether a convolution stands in the skip connection of a residual unit.
    """

    channels: int = 1
    dim: int = 128
    filters: int = 32
    ratios: tuple[int, ...] = (8, 5, 4, 2)
    num_residual_layers: int = 1
    kernel_size: int = 7
    last_kernel_size: int = 7
    residual_kernel_size: int = 3
    dilation_growth: int = 2
    compress: int = 2
    num_lstm_layers: int = 2
    causal: bool = True
    padding: PadMode = "reflect"
    norm: ConvNorm = "weight"
    trim_right: float = 1.0
    shortcut: bool = True

    def __post_init__(self) -> None:
        if not self.ratios or min(self.ratios) < 1:
            raise ConfigError(f"the ratios {self.ratios} are no strides")
        if self.channels not in (1, 2):
            raise ConfigError(f"{self.channels} channels: SEANet reads one (mono) or two (stereo)")
        if self.filters % self.compress or not 0 <= self.trim_right <= 1:
            raise ConfigError(f"{self.filters} filters, {self.compress} times fewer; trim_right {self.trim_right}")
        if not self.causal and self.trim_right != 1:
            raise ConfigError(f"trim_right is {self.trim_right}: only a causal decoder has a choice")

    @property
    def hop(self) -> int:
        """Samples a latent stands for."""
        return math.prod(self.ratios)

    @property
    def width(self) -> int:
        """Channels at the resolution of latents."""
        return self.filters * 2 ** len(self.ratios)

    def conv(self, *sizes: int, stride: int = 1, dilation: int = 1) -> Conv1d:
        kind: dict[str, Any] = {"causal": self.causal, "padding": self.padding, "norm": self.norm}
        return Conv1d(*sizes, stride=stride, dilation=dilation, **kind)


class ResidualUnit(nn.Module):
    """Two convolutions, the first dilated and narrow, added to their input (or its projection)."""

    def __init__(self, config: SEANetConfig, dim: int, dilation: int) -> None:
        super().__init__()
        inner = dim // config.compress
        wide = config.conv(dim, inner, config.residual_kernel_size, dilation=dilation)
        self.block = nn.ModuleList([nn.ELU(), wide, nn.ELU(), config.conv(inner, dim, 1)])
        self.shortcut = config.conv(dim, dim, 1) if config.shortcut else nn.Identity()

    def forward(self, x: Float[Tensor, "batch dim time"]) -> Float[Tensor, "batch dim time"]:
        out = x
        for layer in self.block:
            out = layer(out)
        return self.shortcut(x) + out


def residual_units(config: SEANetConfig, dim: int) -> Iterator[nn.Module]:
    """The residual units of one scale, each dilated further than the one before."""
    return (ResidualUnit(config, dim, config.dilation_growth**n) for n in range(config.num_residual_layers))


class SEANetEncoder(nn.Module):
    """Waveforms to latents: ``ceil(samples / hop)`` of them, whatever the length."""

    def __init__(self, config: SEANetConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = [config.conv(config.channels, config.filters, config.kernel_size)]
        dim = config.filters
        for ratio in reversed(config.ratios):
            down = config.conv(dim, 2 * dim, 2 * ratio, stride=ratio)
            layers += [*residual_units(config, dim), nn.ELU(), down]
            dim *= 2
        layers += [ResidualLSTM(dim, config.num_lstm_layers), nn.ELU()]
        self.layers = nn.ModuleList([*layers, config.conv(dim, config.dim, config.last_kernel_size)])

    def forward(self, wave: Float[Tensor, "batch channels samples"]) -> Float[Tensor, "batch dim frames"]:
        for layer in self.layers:
            wave = layer(wave)
        return wave


class SEANetDecoder(nn.Module):
    """Latents to waveforms, a whole hop of samples for each."""

    def __init__(self, config: SEANetConfig) -> None:
        super().__init__()
        dim = config.width
        layers: list[nn.Module] = [config.conv(config.dim, dim, config.kernel_size)]
        layers.append(ResidualLSTM(dim, config.num_lstm_layers))
        for ratio in config.ratios:
            up = ConvTranspose1d(
                dim, dim // 2, 2 * ratio,
                stride=ratio, causal=config.causal, trim_right=config.trim_right, norm=config.norm,
            )  # fmt: skip
            dim //= 2
            layers += [nn.ELU(), up, *residual_units(config, dim)]
        self.layers = nn.ModuleList([*layers, nn.ELU(), config.conv(dim, config.channels, config.last_kernel_size)])

    def forward(self, latents: Float[Tensor, "batch dim frames"]) -> Float[Tensor, "batch channels samples"]:
        for layer in self.layers:
            latents = layer(latents)
        return latents
