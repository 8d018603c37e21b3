"""A U-Net over time: convolutions along a chunk of actions, scaled and shifted by what is known.

Source: Chi et al., "Diffusion Policy", 2023, https://arxiv.org/abs/2303.04137, after Janner et al. 2022,
https://arxiv.org/abs/2205.09991; names are LeRobot's.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from polymodal.core.errors import ConfigError
from polymodal.nn.time import waves


@dataclass(frozen=True, kw_only=True)
class UNet1dConfig:
    """Attributes:
    widths: channels of each level; between two levels a chunk has half as many steps.
    step_dim: of the vector of the step of diffusion.
    scale: whether what is known also scales, and does not shift alone.
    """

    widths: tuple[int, ...] = (512, 1024, 2048)
    kernel_size: int = 5
    num_groups: int = 8
    step_dim: int = 128
    scale: bool = True

    def __post_init__(self) -> None:
        if len(self.widths) < 2 or any(width % self.num_groups for width in self.widths) or self.kernel_size % 2 == 0:
            raise ConfigError(
                f"a U-Net has at least two levels, of whole groups, and an odd kernel: {self.widths}, "
                f"{self.num_groups} groups, kernel {self.kernel_size}"
            )

    @property
    def multiple(self) -> int:
        """Of which a chunk's steps have to be one."""
        return 2 ** (len(self.widths) - 1)


class ConvBlock(nn.Module):
    """Convolution, group norm, Mish."""

    def __init__(self, source: int, dim: int, kernel_size: int, num_groups: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv1d(source, dim, kernel_size, padding=kernel_size // 2), nn.GroupNorm(num_groups, dim), nn.Mish()
        )

    def forward(self, x: Float[Tensor, "batch source steps"]) -> Float[Tensor, "batch dim steps"]:
        return self.block(x)


class ResidualBlock(nn.Module):
    """Two of them beside a shortcut; what is known acts between them, without the ``1 +`` of others."""

    def __init__(self, config: UNet1dConfig, source: int, dim: int, known_dim: int) -> None:
        super().__init__()
        c, self.scale = config, config.scale
        self.conv1 = ConvBlock(source, dim, c.kernel_size, c.num_groups)
        self.cond_encoder = nn.Sequential(nn.Mish(), nn.Linear(known_dim, 2 * dim if c.scale else dim))
        self.conv2 = ConvBlock(dim, dim, c.kernel_size, c.num_groups)
        self.residual_conv = nn.Identity() if source == dim else nn.Conv1d(source, dim, 1)

    def forward(
        self, x: Float[Tensor, "batch source steps"], known: Float[Tensor, "batch known_dim"]
    ) -> Float[Tensor, "batch dim steps"]:
        hidden, film = self.conv1(x), self.cond_encoder(known)[..., None]
        if self.scale:
            gamma, beta = film.chunk(2, 1)
            hidden = gamma * hidden + beta
        else:
            hidden = hidden + film
        return self.conv2(hidden) + self.residual_conv(x)


class UNet1d(nn.Module):
    """Down, through the middle, and up; the first level's shortcut is not read, as in the official code."""

    def __init__(self, config: UNet1dConfig, action_width: int, known_dim: int) -> None:
        super().__init__()
        c = self.config = config
        known_dim += c.step_dim
        # Place 0 is the waves, which have no weights.
        self.diffusion_step_encoder = nn.Sequential(
            nn.Identity(), nn.Linear(c.step_dim, 4 * c.step_dim), nn.Mish(), nn.Linear(4 * c.step_dim, c.step_dim)
        )
        pairs = list(itertools.pairwise((action_width, *c.widths)))
        bottom = c.widths[-1]
        self.down_modules = nn.ModuleList(
            self._level(source, dim, known_dim, nn.Conv1d(dim, dim, 3, 2, 1) if n < len(pairs) else nn.Identity())
            for n, (source, dim) in enumerate(pairs, 1)
        )
        self.mid_modules = nn.ModuleList(ResidualBlock(c, bottom, bottom, known_dim) for _ in range(2))
        self.up_modules = nn.ModuleList(
            self._level(2 * dim, source, known_dim, nn.ConvTranspose1d(source, source, 4, 2, 1))
            for source, dim in reversed(pairs[1:])
        )
        self.final_conv = nn.Sequential(
            ConvBlock(c.widths[0], c.widths[0], c.kernel_size, 8), nn.Conv1d(c.widths[0], action_width, 1)
        )

    def _level(self, source: int, dim: int, known_dim: int, resample: nn.Module) -> nn.ModuleList:
        first, second = (ResidualBlock(self.config, width, dim, known_dim) for width in (source, dim))
        return nn.ModuleList([first, second, resample])

    def forward(
        self,
        x: Float[Tensor, "batch horizon action_width"],
        step: Int[Tensor, " batch"],
        known: Float[Tensor, "batch known_dim"],
    ) -> Float[Tensor, "batch horizon action_width"]:
        when = waves(step, self.config.step_dim, shortest=2 * torch.pi, longest=2e4 * torch.pi).to(x.dtype)
        known = torch.cat([self.diffusion_step_encoder(when), known], 1)
        x, kept = x.mT, []
        for level in self.down_modules:
            assert isinstance(level, nn.ModuleList)
            x = level[1](level[0](x, known), known)
            kept.append(x)
            x = level[2](x)
        for block in self.mid_modules:
            x = block(x, known)
        for level in self.up_modules:
            assert isinstance(level, nn.ModuleList)
            x = level[0](torch.cat([x, kept.pop()], 1), known)
            x = level[2](level[1](x, known))
        return self.final_conv(x).mT
