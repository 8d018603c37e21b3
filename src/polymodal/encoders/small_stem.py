"""Convolutions in the place of a Vision Transformer's patches, as Octo has them.

Source: Xiao et al. 2021, https://arxiv.org/abs/2106.14881; octo-models/octo, ``vit_encoders.py`` (SmallStem16). Kernels
have mean zero and deviation one wherever they are used (Qiao et al. 2019, https://arxiv.org/abs/1903.10520).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from polymodal.core.errors import ConfigError
from polymodal.nn.init import lecun_normal_

_GROUPS = 32  # of a group norm


@dataclass(frozen=True, kw_only=True)
class SmallStemConfig:
    """Each of ``channels``, a multiple of 32, halves the sides; ``dim`` is of what comes out."""

    channels: tuple[int, ...] = (32, 96, 192, 384)
    dim: int = 512

    def __post_init__(self) -> None:
        if not self.channels or any(c < 1 or c % _GROUPS for c in self.channels):
            raise ConfigError(f"a stem has channels that {_GROUPS} divides, not {self.channels}")

    @property
    def patch_size(self) -> int:
        """Pixels along a side of what becomes one token."""
        return int(2 ** len(self.channels))


class StandardConv(nn.Conv2d):
    """A convolution whose kernels are standardised, one by one."""

    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs rows columns"]:
        std, mean = torch.std_mean(self.weight, (1, 2, 3), correction=0, keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (std + 1e-5), self.bias, self.stride, self.padding)


class SmallStem(nn.Module):
    """Convolutions with group norm and ReLU, then one of 1 x 1."""

    def __init__(self, config: SmallStemConfig) -> None:
        super().__init__()
        widths = (3, *config.channels)
        self.convs = nn.ModuleList(StandardConv(a, b, 3, 2, 1) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.GroupNorm(_GROUPS, c, eps=1e-6) for c in config.channels)
        self.embed = nn.Conv2d(config.channels[-1], config.dim, 1)

    @torch.no_grad()
    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                lecun_normal_(module)

    def forward(self, pixels: Float[Tensor, "images 3 height width"]) -> Float[Tensor, "images tokens dim"]:
        x = pixels
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        return self.embed(x).flatten(2).transpose(1, 2)
