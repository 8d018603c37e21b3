"""Convolutions before the patches of a Vision Transformer.

Source: Xiao et al., "Early Convolutions Help Transformers See Better", 2021, https://arxiv.org/abs/2106.14881.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from polymodal.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class StemConfig:
    """Each of ``channels`` halves the sides, then ``depth`` convolutions refine beside a shortcut (the paper has none).

    A small tower that sees little learns outlines with it from a fraction of the pictures.
    """

    channels: tuple[int, ...]
    depth: int = 0

    def __post_init__(self) -> None:
        if not self.channels or min(*self.channels, 1) < 1 or self.depth < 0:
            raise ConfigError(f"a stem of {self.channels} channels and depth {self.depth} is impossible")

    @property
    def patch_size(self) -> int:
        """Pixels along a side of what becomes one token."""
        return int(2 ** len(self.channels))

    def build(self, num_channels: int) -> Stem:
        return Stem(self, num_channels)


class Stem(nn.Module):
    """3 x 3 convolutions with batch norm and ReLU; the 1 x 1 convolution after them is the tower's own."""

    def __init__(self, config: StemConfig, num_channels: int) -> None:
        super().__init__()
        widths = (num_channels, *config.channels)
        self.down = nn.ModuleList(Step(a, b, stride=2) for a, b in pairwise(widths))
        self.refine = nn.ModuleList(nn.ModuleList(Step(c, c) for _ in range(config.depth)) for c in config.channels)

    def init_weights(self) -> None:
        """Normal by fan out for ReLU, and norms that do nothing, as of a ResNet."""
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(part, nn.BatchNorm2d):
                part.reset_parameters()

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch last rows columns"]:
        for down, steps in zip(self.down, self.refine, strict=True):
            x = down(x)
            assert isinstance(steps, nn.ModuleList)
            for step in steps:
                x = x + step(x)
        return x


class Step(nn.Module):
    """A convolution, batch norm and ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs rows columns"]:
        return F.relu(self.norm(self.conv(x)))
