"""Convolutions over time, as neural codecs use them: layouts are ``batch channels time``."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

ConvNorm = Literal["weight", "group"]  # weight normalisation, or one group norm over all channels behind the layer
PadMode = Literal["reflect", "constant", "replicate"]


def pad(x: Float[Tensor, "batch channels time"], left: int, right: int, mode: PadMode) -> Float[Tensor, "b c padded"]:
    """Padding at both ends; what is too short to be reflected is first made longer with zeros, cut off again."""
    short = max(left, right) + 1 - x.shape[-1] if mode == "reflect" else 0
    if short <= 0:
        return F.pad(x, (left, right), mode)
    return F.pad(F.pad(x, (0, short)), (left, right), mode)[..., :-short]


class Conv1d(nn.Module):
    """A convolution that gives ``ceil(time / stride)`` steps: padded at its start (causal) or at both ends.

    What the last stride lacks is padded at the end, so that no sample is ever lost.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        causal: bool = True,
        padding: PadMode = "reflect",
        norm: ConvNorm = "weight",
    ) -> None:
        super().__init__()
        conv = nn.Conv1d(in_channels, out_channels, kernel_size, stride, dilation=dilation)
        self.conv = weight_norm(conv) if norm == "weight" else conv
        self.norm = nn.GroupNorm(1, out_channels) if norm == "group" else nn.Identity()
        self.stride, self.total = stride, (kernel_size - 1) * dilation + 1 - stride
        self.causal, self.padding = causal, padding

    def forward(self, x: Float[Tensor, "batch channels time"]) -> Float[Tensor, "batch out_channels out_time"]:
        right = 0 if self.causal else self.total // 2
        last = -x.shape[-1] % self.stride
        return self.norm(self.conv(pad(x, self.total - right, right + last, self.padding)))


class ConvTranspose1d(nn.Module):
    """A transposed convolution that gives ``time * stride`` steps; what overhangs is cut off.

    Args:
        trim_right: of a causal layer, the share of the overhang that is cut off at the end; the rest at the start.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int,
        causal: bool = True,
        trim_right: float = 1.0,
        norm: ConvNorm = "weight",
    ) -> None:
        super().__init__()
        conv = nn.ConvTranspose1d(in_channels, out_channels, kernel_size, stride)
        self.conv = weight_norm(conv) if norm == "weight" else conv
        self.norm = nn.GroupNorm(1, out_channels) if norm == "group" else nn.Identity()
        total = kernel_size - stride
        self.right = math.ceil(total * trim_right) if causal else total // 2
        self.left = total - self.right

    def forward(self, x: Float[Tensor, "batch channels time"]) -> Float[Tensor, "batch out_channels out_time"]:
        x = self.norm(self.conv(x))
        return x[..., self.left : x.shape[-1] - self.right]


class ResidualLSTM(nn.Module):
    """Layers of an LSTM over time, added to what they read."""

    def __init__(self, dim: int, num_layers: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(dim, dim, num_layers)

    def forward(self, x: Float[Tensor, "batch dim time"]) -> Float[Tensor, "batch dim time"]:
        steps = x.permute(2, 0, 1)
        return (self.lstm(steps)[0] + steps).permute(1, 2, 0)


class Snake(nn.Module):
    """``x + sin(alpha x)^2 / alpha`` with an alpha for each channel: an activation that can be periodic."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))

    def forward(self, x: Float[Tensor, "batch channels time"]) -> Float[Tensor, "batch channels time"]:
        return x + (self.alpha + 1e-9).reciprocal() * torch.sin(self.alpha * x).pow(2)
