"""Convolutional encoders and decoders of pictures: those of VQ-VAE, and those that VQGAN and latent diffusion share.

Sources: van den Oord et al., "Neural Discrete Representation Learning", 2017, arXiv 1711.00937; Esser et al., "Taming
Transformers for High-Resolution Image Synthesis", 2020, arXiv 2012.09841.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from polymodal.core.errors import ConfigError
from polymodal.nn.attention import attend
from polymodal.nn.blend import Blend

EPS = 1e-6  # of the group norms


@dataclass(frozen=True, kw_only=True)
class PyramidConfig:
    """A pyramid of residual blocks with group norms, each level at half the resolution of the one before.

    Attributes:
        channels: of the pixels.
        widths: channels of each level, the finest first.
        num_blocks: of each level of an encoder; a decoder has one more.
        attention: the levels whose blocks are followed by attention over the whole picture.
        middle_attention: whether the coarsest level has it between its last two blocks.
        latent_dim: channels between encoder and decoder.
        groups: of the norms.
    """

    channels: int = 3
    widths: tuple[int, ...] = (128, 128, 256, 256, 512)
    num_blocks: int = 2
    attention: tuple[int, ...] = ()
    middle_attention: bool = True
    latent_dim: int = 256
    groups: int = 32

    def __post_init__(self) -> None:
        if not self.widths or any(width % self.groups for width in self.widths):
            raise ConfigError(f"widths {self.widths} are not multiples of {self.groups} groups")
        if any(level not in range(len(self.widths)) for level in self.attention):
            raise ConfigError(f"attention at levels {self.attention} of {len(self.widths)}")

    @property
    def factor(self) -> int:
        """Pixels along each side of a latent vector's square."""
        return 2 ** (len(self.widths) - 1)

    def encoder(self, out: int | None = None) -> nn.Module:
        """Pixels to ``out`` channels, ``latent_dim`` if not given."""
        return Encoder(self, out or self.latent_dim)

    def decoder(self) -> nn.Module:
        return Decoder(self)


@dataclass(frozen=True, kw_only=True)
class PlainConfig:
    """VQ-VAE's: convolutions that halve the resolution, then residual blocks, all of one width, with ReLUs."""

    channels: int = 3
    latent_dim: int = 256
    num_halvings: int = 2
    num_blocks: int = 2

    @property
    def factor(self) -> int:
        return 2**self.num_halvings

    def encoder(self, out: int | None = None) -> nn.Module:
        c = self
        halvings = [nn.Conv2d(c.latent_dim if i else c.channels, c.latent_dim, 4, 2, 1) for i in range(c.num_halvings)]
        layers = [layer for conv in halvings for layer in (conv, nn.ReLU())][:-1]
        return nn.Sequential(*layers, *self._blocks(), nn.ReLU(), nn.Conv2d(c.latent_dim, out or c.latent_dim, 1))

    def decoder(self) -> nn.Module:
        c = self
        widths = [c.latent_dim] * (c.num_halvings - 1) + [c.channels]
        doublings = [nn.ConvTranspose2d(c.latent_dim, width, 4, 2, 1) for width in widths]
        return nn.Sequential(*self._blocks(), *(layer for conv in doublings for layer in (nn.ReLU(), conv)))

    def _blocks(self) -> list[nn.Module]:
        return [PlainBlock(self.latent_dim) for _ in range(self.num_blocks)]


CodecConfig: TypeAlias = PyramidConfig | PlainConfig


class PlainBlock(nn.Module):
    """``x + conv1x1(relu(conv3x3(relu(x))))``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)
        self.out = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        return x + self.out(F.relu(self.conv(F.relu(x))))


class ResidualBlock(nn.Module):
    """Two convolutions, each behind a norm and SiLU, around a shortcut."""

    def __init__(self, dim: int, out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, dim, eps=EPS)
        self.conv1 = nn.Conv2d(dim, out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out, eps=EPS)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.shortcut = nn.Identity() if dim == out else nn.Conv2d(dim, out, 1)

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch out height width"]:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


BlockType: TypeAlias = Callable[[int, int, int], nn.Module]
"""(channels before, channels behind, groups of the norms) -> a residual block."""


class PictureAttention(nn.Module):
    """Attention with one head among all places of a picture."""

    def __init__(self, dim: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, dim, eps=EPS)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        h = rearrange(self.norm(x), "b d h w -> b 1 (h w) d")
        h = self.o_proj(attend(self.q_proj(h), self.k_proj(h), self.v_proj(h)))
        return x + rearrange(h, "b 1 (h w) d -> b d h w", h=x.shape[2])


class Halve(nn.Module):
    """A convolution of stride 2; zeros on the right and below only."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride=2)

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim half_height half_width"]:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Double(nn.Module):
    """Every pixel four times, and a convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height2 width2"]:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution, each perhaps followed by attention, and the way to the next one."""

    def __init__(
        self, dim: int, out: int, count: int, groups: int, *, attention: bool, resample: nn.Module | None,
        block: BlockType,
    ) -> None:  # fmt: skip
        super().__init__()
        self.blocks = nn.ModuleList(block(out if i else dim, out, groups) for i in range(count))
        self.attns = nn.ModuleList(PictureAttention(out, groups) for _ in range(count if attention else 0))
        self.resample = nn.Identity() if resample is None else resample

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch out new_height new_width"]:
        for i, block in enumerate(self.blocks):
            x = block(x)
            if len(self.attns):
                x = self.attns[i](x)
        return self.resample(x)


class Middle(nn.Module):
    """Two blocks at the coarsest resolution, with attention between them."""

    def __init__(self, dim: int, groups: int, *, attention: bool, block: BlockType) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block(dim, dim, groups) for _ in range(2))
        self.attn = PictureAttention(dim, groups) if attention else nn.Identity()

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        return self.blocks[1](self.attn(self.blocks[0](x)))


class Encoder(nn.Module):
    """Pixels to latent vectors, `PyramidConfig.factor` times smaller."""

    def __init__(self, config: PyramidConfig, out: int) -> None:
        super().__init__()
        c, last = config, len(config.widths) - 1
        self.first = nn.Conv2d(c.channels, c.widths[0], 3, padding=1)
        self.levels = nn.ModuleList(
            Level(
                c.widths[max(i - 1, 0)], width, c.num_blocks, c.groups, attention=i in c.attention,
                resample=None if i == last else Halve(width), block=ResidualBlock,
            )
            for i, width in enumerate(c.widths)
        )  # fmt: skip
        self.middle = Middle(c.widths[-1], c.groups, attention=c.middle_attention, block=ResidualBlock)
        self.norm = nn.GroupNorm(c.groups, c.widths[-1], eps=EPS)
        self.last = nn.Conv2d(c.widths[-1], out, 3, padding=1)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch latent rows columns"]:
        x = self.first(x)
        for level in self.levels:
            x = level(x)
        return self.last(F.silu(self.norm(self.middle(x))))


class Decoder(nn.Module):
    """Latent vectors to pixels, by blocks of a kind. ``levels`` are numbered as the encoder's, and run backwards."""

    def __init__(self, config: PyramidConfig, block: BlockType = ResidualBlock) -> None:
        super().__init__()
        c, last = config, len(config.widths) - 1
        self.first = nn.Conv2d(c.latent_dim, c.widths[-1], 3, padding=1)
        self.middle = Middle(c.widths[-1], c.groups, attention=c.middle_attention, block=block)
        self.levels = nn.ModuleList(
            Level(
                c.widths[min(i + 1, last)], width, c.num_blocks + 1, c.groups, attention=i in c.attention,
                resample=Double(width) if i else None, block=block,
            )
            for i, width in enumerate(c.widths)
        )  # fmt: skip
        self.norm = nn.GroupNorm(c.groups, c.widths[0], eps=EPS)
        self.last = nn.Conv2d(c.widths[0], c.channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "batch latent rows columns"]) -> Float[Tensor, "batch channels height width"]:
        x = self.middle(self.first(x))
        for level in reversed(self.levels):
            x = level(x)
        return self.last(F.silu(self.norm(x)))


def last_layer(decoder: nn.Module) -> nn.Parameter:
    """The weights that make pixels: VQGAN weighs its losses by their gradients."""
    layers = [m for m in decoder.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    weight = (decoder.last if isinstance(decoder, Decoder) else layers[-1]).weight
    assert isinstance(weight, nn.Parameter)
    return weight


@torch.no_grad()
def init_convolutions_(model: nn.Module) -> None:
    """torch's own scheme, which the official codes leave as it is: uniform by fan-in, norms one and zero."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear | nn.GroupNorm | nn.Conv3d | Blend):
            module.reset_parameters()
