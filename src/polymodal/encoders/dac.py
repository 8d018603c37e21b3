"""The encoder and decoder of DAC (Kumar et al. 2023): SEANet's shape with Snake activations and three dilations.

samples -> conv -> (3 residual units -> Snake -> strided conv) x ratios -> Snake -> conv -> latents
latents -> conv -> (Snake -> transposed conv -> 3 residual units) x ratios -> Snake -> conv -> tanh -> samples
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polymodal.nn.conv1d import Snake

DILATIONS = (1, 3, 9)


class ResidualUnit(nn.Module):
    """A dilated and a pointwise convolution, each behind a snake, added to their input."""

    def __init__(self, dim: int, dilation: int) -> None:
        super().__init__()
        self.snake1 = Snake(dim)
        self.conv1 = nn.Conv1d(dim, dim, 7, dilation=dilation, padding=3 * dilation)
        self.snake2 = Snake(dim)
        self.conv2 = nn.Conv1d(dim, dim, 1)

    def forward(self, x: Float[Tensor, "batch dim time"]) -> Float[Tensor, "batch dim time"]:
        return x + self.conv2(self.snake2(self.conv1(self.snake1(x))))


class EncoderBlock(nn.Module):
    """Residual units, then half the channels' resolution: ``floor((time + stride % 2) / stride)`` steps."""

    def __init__(self, dim: int, stride: int) -> None:
        super().__init__()
        self.units = nn.ModuleList(ResidualUnit(dim, dilation) for dilation in DILATIONS)
        self.snake = Snake(dim)
        self.conv = nn.Conv1d(dim, 2 * dim, 2 * stride, stride, padding=(stride + 1) // 2)

    def forward(self, x: Float[Tensor, "batch dim time"]) -> Float[Tensor, "batch wider shorter"]:
        for unit in self.units:
            x = unit(x)
        return self.conv(self.snake(x))


class DecoderBlock(nn.Module):
    """Back to a resolution, then residual units: ``time * stride - stride % 2`` steps."""

    def __init__(self, dim: int, stride: int) -> None:
        super().__init__()
        self.snake = Snake(dim)
        self.conv = nn.ConvTranspose1d(dim, dim // 2, 2 * stride, stride, padding=(stride + 1) // 2)
        self.units = nn.ModuleList(ResidualUnit(dim // 2, dilation) for dilation in DILATIONS)

    def forward(self, x: Float[Tensor, "batch dim time"]) -> Float[Tensor, "batch narrower longer"]:
        x = self.conv(self.snake(x))
        for unit in self.units:
            x = unit(x)
        return x


class DACEncoder(nn.Module):
    """Mono waveforms, a multiple of the product of ``ratios`` long, to latents ``dim * 2 ** len(ratios)`` wide."""

    def __init__(self, *, dim: int, ratios: Sequence[int]) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, dim, 7, padding=3)
        self.blocks = nn.ModuleList(EncoderBlock(dim * 2**n, ratio) for n, ratio in enumerate(ratios))
        width = dim * 2 ** len(ratios)
        self.snake = Snake(width)
        self.last = nn.Conv1d(width, width, 3, padding=1)

    def forward(self, wave: Float[Tensor, "batch 1 samples"]) -> Float[Tensor, "batch dim frames"]:
        x = self.first(wave)
        for block in self.blocks:
            x = block(x)
        return self.last(self.snake(x))


class DACDecoder(nn.Module):
    """Latents to mono waveforms; ``ratios`` are those of the encoder."""

    def __init__(self, *, latent_dim: int, dim: int, ratios: Sequence[int]) -> None:
        super().__init__()
        self.first = nn.Conv1d(latent_dim, dim, 7, padding=3)
        self.blocks = nn.ModuleList(DecoderBlock(dim // 2**n, ratio) for n, ratio in enumerate(reversed(ratios)))
        width = dim // 2 ** len(ratios)
        self.snake = Snake(width)
        self.last = nn.Conv1d(width, 1, 7, padding=3)

    def forward(self, latents: Float[Tensor, "batch dim frames"]) -> Float[Tensor, "batch 1 samples"]:
        x = self.first(latents)
        for block in self.blocks:
            x = block(x)
        return torch.tanh(self.last(self.snake(x)))
