"""A U-Net over pixels whose group norms are scaled and shifted by what it is told (adaptive group normalisation).

    pixels -> conv -> residual blocks a level, halved between two -> middle, with attention
           -> residual blocks that read what the way down left, doubled between two -> norm, SiLU, conv

Source: Alonso et al., "Diffusion for World Modeling: Visual Details Matter in Atari", 2024,
https://arxiv.org/abs/2405.12399, after Dhariwal & Nichol 2021, https://arxiv.org/abs/2105.05233. Official code:
eloialonso/diamond.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from polymodal.core.errors import ConfigError
from polymodal.nn.attention import Attention

EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class AdaptiveUNetConfig:
    """Attributes:
    widths: channels of each level, the finest first; between two a side is halved.
    blocks: of each level on the way down; on the way up there is one more.
    attention: the levels whose blocks are followed by attention; the middle's always are.
    condition_dim: of what it is told.
    head_dim: of attention.
    group: channels that are normed together.
    """

    in_channels: int
    out_channels: int = 3
    widths: tuple[int, ...] = (64, 64, 64, 64)
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    attention: tuple[int, ...] = ()
    condition_dim: int = 256
    head_dim: int = 8
    group: int = 32

    def __post_init__(self) -> None:
        if not self.widths or len(self.widths) != len(self.blocks) or min(self.blocks) < 1:
            raise ConfigError(f"widths {self.widths} and blocks {self.blocks}: as many of both, and blocks everywhere")
        if min(*self.widths, self.in_channels, self.out_channels, self.condition_dim, self.head_dim, self.group) < 1:
            raise ConfigError(f"no size is less than one; not {self}")
        if not set(self.attention) <= set(range(len(self.widths))):
            raise ConfigError(f"attention in levels {self.attention}: there are 0 to {len(self.widths) - 1}")
        joined = [dim + finer for dim, finer in zip(self.widths, self.finer, strict=True)]  # on the way up
        for dim in (*self.widths, *(2 * dim for dim in self.widths), *joined):
            if dim % self.groups(dim):
                raise ConfigError(f"{dim} channels are not whole groups of {self.group}")
        for dim in self.widths:
            if dim % max(1, dim // self.head_dim):
                raise ConfigError(f"{dim} channels are not whole heads of {self.head_dim}")

    @property
    def finer(self) -> tuple[int, ...]:
        """Channels of the level above each one; the finest has those of the first convolution."""
        return (self.widths[0], *self.widths[:-1])

    def groups(self, dim: int) -> int:
        return max(1, dim // self.group)


class AdaptiveNorm(nn.Module):
    """A group norm without parameters, times one more than what the condition says, and shifted by it."""

    def __init__(self, config: AdaptiveUNetConfig, dim: int) -> None:
        super().__init__()
        self.groups = config.groups(dim)
        self.proj = nn.Linear(config.condition_dim, 2 * dim)

    def forward(
        self, x: Float[Tensor, "batch dim rows columns"], condition: Float[Tensor, "batch condition"]
    ) -> Float[Tensor, "batch dim rows columns"]:
        scale, shift = self.proj(condition)[:, :, None, None].chunk(2, 1)
        return F.group_norm(x, self.groups, eps=EPS) * (1 + scale) + shift


class PixelAttention(nn.Module):
    """Every pixel attends to all, beside a shortcut."""

    def __init__(self, config: AdaptiveUNetConfig, dim: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(config.groups(dim), dim, eps=EPS)
        self.attn = Attention(dim, max(1, dim // config.head_dim))

    def forward(self, x: Float[Tensor, "batch dim rows columns"]) -> Float[Tensor, "batch dim rows columns"]:
        pixels = rearrange(self.norm(x), "b d h w -> b (h w) d")
        return x + rearrange(self.attn(pixels), "b (h w) d -> b d h w", h=x.shape[2])


class AdaptiveBlock(nn.Module):
    """Two convolutions, each behind an adaptive norm and SiLU, around a shortcut."""

    def __init__(self, config: AdaptiveUNetConfig, dim: int, out: int, *, attention: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = AdaptiveNorm(config, dim), AdaptiveNorm(config, out)
        self.conv1, self.conv2 = nn.Conv2d(dim, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
        self.shortcut = nn.Identity() if dim == out else nn.Conv2d(dim, out, 1)
        self.attn = PixelAttention(config, out) if attention else nn.Identity()

    def forward(
        self, x: Float[Tensor, "batch dim rows columns"], condition: Float[Tensor, "batch condition"]
    ) -> Float[Tensor, "batch out rows columns"]:
        h = self.conv1(F.silu(self.norm1(x, condition)))
        return self.attn(self.shortcut(x) + self.conv2(F.silu(self.norm2(h, condition))))


class Level(nn.Module):
    """Blocks of one resolution."""

    def __init__(self, config: AdaptiveUNetConfig, sizes: Sequence[tuple[int, int]], *, attention: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(AdaptiveBlock(config, dim, out, attention=attention) for dim, out in sizes)

    def forward(
        self,
        x: Float[Tensor, "batch dim rows columns"],
        condition: Float[Tensor, "batch condition"],
        left: list[Tensor] | None = None,
    ) -> list[Float[Tensor, "batch _ rows columns"]]:
        """What each block makes; on the way up each takes from the end of ``left``, too."""
        made = []
        for block in self.blocks:
            x = block(x if left is None else torch.cat([x, left.pop()], 1), condition)
            made.append(x)
        return made


class AdaptiveUNet(nn.Module):
    """Pixels and a condition to pixels; sides that do not halve evenly are filled up with zeros, and cut again."""

    def __init__(self, config: AdaptiveUNetConfig) -> None:
        super().__init__()
        c = self.config = config
        dims, finer, levels = c.widths, c.finer, range(len(c.widths))
        self.first = nn.Conv2d(c.in_channels, dims[0], 3, padding=1)
        self.down = nn.ModuleList(
            Level(c, [(finer[i] if n == 0 else dims[i], dims[i]) for n in range(c.blocks[i])], attention=self._sees(i))
            for i in levels
        )
        self.middle = Level(c, [(dims[-1], dims[-1])] * 2, attention=True)
        self.up = nn.ModuleList(
            Level(c, [*[(2 * dims[i], dims[i])] * c.blocks[i], (dims[i] + finer[i], finer[i])], attention=self._sees(i))
            for i in reversed(levels)
        )
        self.shrink = nn.ModuleList(nn.Conv2d(dim, dim, 3, stride=2, padding=1) for dim in dims[:-1])
        self.grow = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for dim in reversed(dims[:-1]))
        self.norm = nn.GroupNorm(c.groups(dims[0]), dims[0], eps=EPS)
        self.last = nn.Conv2d(dims[0], c.out_channels, 3, padding=1)

    def _sees(self, level: int) -> bool:
        return level in self.config.attention

    @torch.no_grad()
    def init_weights(self) -> None:
        """torch's own scheme; halving is orthogonal; what joins a shortcut, and the last weights, start at zero."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear | nn.GroupNorm):
                module.reset_parameters()
        for module in self.modules():
            if isinstance(module, AdaptiveBlock):
                nn.init.zeros_(module.conv2.weight)
            elif isinstance(module, PixelAttention):
                nn.init.zeros_(module.attn.o_proj.weight)
                nn.init.zeros_(module.attn.o_proj.bias)
        for halve in self.shrink:
            assert isinstance(halve, nn.Conv2d)
            nn.init.orthogonal_(halve.weight)
        nn.init.zeros_(self.last.weight)

    def forward(
        self, x: Float[Tensor, "batch channels rows columns"], condition: Float[Tensor, "batch condition"]
    ) -> Float[Tensor, "batch out_channels rows columns"]:
        rows, columns = x.shape[2:]
        whole = 2 ** len(self.shrink)
        x = F.pad(x, (0, math.ceil(columns / whole) * whole - columns, 0, math.ceil(rows / whole) * whole - rows))
        left = [self.first(x)]
        for i, level in enumerate(self.down):
            if i:
                left.append(self.shrink[i - 1](left[-1]))
            left += level(left[-1], condition)
        x = self.middle(left[-1], condition)[-1]
        for i, level in enumerate(self.up):
            if i:
                x = self.grow[i - 1](F.interpolate(x, scale_factor=2.0, mode="nearest"))
            x = level(x, condition, left)[-1]
        return self.last(F.silu(self.norm(x)))[..., :rows, :columns]
