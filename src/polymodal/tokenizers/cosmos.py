"""Encoder and decoder of the Cosmos tokenizers: wavelets, then convolutions and attention that never look ahead.

Source: NVIDIA, "Cosmos World Foundation Model Platform for Physical AI", 2025, arXiv 2501.03575; official code
NVIDIA/Cosmos-Tokenizer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from polymodal.core.errors import ConfigError, MediaError
from polymodal.nn.attention import attend
from polymodal.nn.conv3d import CausalConv3d, FactorisedConv3d, patches, unpatches
from polymodal.nn.precision import FullPrecision


@dataclass(frozen=True, kw_only=True)
class CosmosNetConfig:
    """A pyramid over films.

    Attributes:
        channels: of the pixels.
        latent_dim: channels between encoder and decoder.
        encoder_widths: channels before and behind each level, the finest first.
        decoder_widths: likewise, in the same order.
        num_blocks: of each level of the encoder; the decoder has one more.
        attention: sides of the pictures, halved level by level from ``resolution / patch_size``, that have attention.
        resolution: that levels are counted from.
        patch_size: frames and pixels of the wavelets.
        space, time: pixels and frames that a latent vector stands for.
    """

    channels: int = 3
    latent_dim: int = 16
    encoder_widths: tuple[int, ...] = (128, 256, 512, 512)
    decoder_widths: tuple[int, ...] = (256, 512, 512, 512)
    num_blocks: int = 2
    attention: tuple[int, ...] = (32,)
    resolution: int = 1024
    patch_size: int = 4
    space: int = 8
    time: int = 8

    def __post_init__(self) -> None:
        sizes = (self.patch_size, self.space, self.time)
        if min(sizes) < 1 or any(math.log2(n) % 1 for n in sizes) or min(self.halvings) < 0:
            raise ConfigError(
                f"patches of {self.patch_size} for {self.space} pixels and {self.time} frames a latent: powers of two, "
                "the first no larger than the others"
            )
        levels = len(self.encoder_widths)
        grown = tuple(sum(ways) for ways in zip(*map(self.grows, range(levels - 1)), strict=True)) if levels > 1 else ()
        if len(self.decoder_widths) != levels or max(self.halvings) > levels - 2 or grown != self.halvings:
            raise ConfigError(
                f"widths {self.encoder_widths} and {self.decoder_widths} do not go with space and time that are halved "
                f"{self.halvings} times behind the wavelets: as many of both, and three more than of time"
            )

    def grows(self, level: int) -> tuple[bool, bool]:
        """Whether a level of the decoder doubles space, and time: this (and so space) from the second level on."""
        (space, time), last = self.halvings, len(self.decoder_widths) - 2
        longer = 0 < level <= time and level < last
        return longer or (level < last and level < space and space > time), longer

    @property
    def halvings(self) -> tuple[int, int]:
        """How often space and time are halved behind the wavelets."""
        return (self.space // self.patch_size).bit_length() - 1, (self.time // self.patch_size).bit_length() - 1

    @property
    def inner(self) -> int:
        """Channels of a patch."""
        return self.channels * self.patch_size**3


class FrameNorm(nn.GroupNorm):
    """Group norm, with one group, of each frame alone: else the first would know the last."""

    def __init__(self, dim: int) -> None:
        super().__init__(1, dim, eps=1e-6)

    def forward(self, x: Float[Tensor, "batch dim t h w"]) -> Float[Tensor, "batch dim t h w"]:
        return rearrange(
            super().forward(rearrange(x, "b d t h w -> (b t) d h w")), "(b t) d h w -> b d t h w", b=len(x)
        )


class FilmBlock(nn.Module):
    """Two factorised convolutions, each behind a norm and SiLU, around a shortcut."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm1 = FrameNorm(dim)
        self.conv1 = FactorisedConv3d(dim, out)
        self.norm2 = FrameNorm(out)
        self.conv2 = FactorisedConv3d(out, out)
        self.shortcut = nn.Identity() if dim == out else CausalConv3d(dim, out)

    def forward(self, x: Float[Tensor, "batch dim t h w"]) -> Float[Tensor, "batch out t h w"]:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class FilmAttention(nn.Module):
    """Attention with one head: within each frame, or of each place to its past."""

    def __init__(self, dim: int, *, time: bool) -> None:
        super().__init__()
        self.time = time
        self.norm = FrameNorm(dim)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Float[Tensor, "batch dim t h w"]) -> Float[Tensor, "batch dim t h w"]:
        folded = "(b h w) 1 t d" if self.time else "(b t) 1 (h w) d"
        b, _, t, h, w = x.shape
        y = rearrange(self.norm(x), f"b d t h w -> {folded}")
        y = self.o_proj(attend(self.q_proj(y), self.k_proj(y), self.v_proj(y), causal=self.time))
        sizes = {"b": b, "h": h, "w": w} if self.time else {"b": b, "h": h, "t": t}
        return x + rearrange(y, f"{folded} -> b d t h w", **sizes)


class Shrink(nn.Module):
    """Halves space, time or both: a convolution beside a mean."""

    def __init__(self, dim: int, *, space: bool, time: bool) -> None:
        super().__init__()
        self.space = CausalConv3d(dim, dim, (1, 3, 3), stride=(1, 2, 2)) if space else None
        self.time = CausalConv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if time else None
        self.mix = CausalConv3d(dim, dim) if space or time else nn.Identity()

    def forward(self, x: Float[Tensor, "batch dim t h w"]) -> Float[Tensor, "batch dim t2 h2 w2"]:
        if self.space is not None:
            x = F.pad(x, (0, 1, 0, 1))
            x = self.space(x) + F.avg_pool3d(x, (1, 2, 2))
        if self.time is not None:
            x = torch.cat([x[:, :, :1], x], 2)
            x = self.time(x) + F.avg_pool3d(x, (2, 1, 1))
        return self.mix(x)


class Grow(nn.Module):
    """Doubles time, space or both: repeats, and adds a convolution of that; the first frame is not doubled."""

    def __init__(self, dim: int, *, space: bool, time: bool) -> None:
        super().__init__()
        self.time = CausalConv3d(dim, dim, (3, 1, 1)) if time else None
        self.space = CausalConv3d(dim, dim, (1, 3, 3), pad=1) if space else None
        self.mix = CausalConv3d(dim, dim) if space or time else nn.Identity()

    def forward(self, x: Float[Tensor, "batch dim t h w"]) -> Float[Tensor, "batch dim t2 h2 w2"]:
        if self.time is not None:
            x = x.repeat_interleave(2, 2)[:, :, 1:]
            x = x + self.time(x)
        if self.space is not None:
            x = x.repeat_interleave(2, 3).repeat_interleave(2, 4)
            x = x + self.space(x)
        return self.mix(x)


class FilmLevel(nn.Module):
    """Blocks, each perhaps followed by attention within frames and to the past, and the way to the next level."""

    def __init__(self, dim: int, out: int, count: int, *, attention: bool, resample: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(FilmBlock(out if i else dim, out) for i in range(count))
        number = count if attention else 0
        self.attns = nn.ModuleList(FilmAttention(out, time=False) for _ in range(number))
        self.time_attns = nn.ModuleList(FilmAttention(out, time=True) for _ in range(number))
        self.resample = resample

    def forward(self, x: Float[Tensor, "batch dim t h w"]) -> Float[Tensor, "batch out t2 h2 w2"]:
        for i, block in enumerate(self.blocks):
            x = block(x)
            if len(self.attns):
                x = self.time_attns[i](self.attns[i](x))
        return self.resample(x)


class FilmMiddle(nn.Module):
    """Two blocks with both attentions between them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(FilmBlock(dim, dim) for _ in range(2))
        self.attn, self.time_attn = FilmAttention(dim, time=False), FilmAttention(dim, time=True)

    def forward(self, x: Float[Tensor, "batch dim t h w"]) -> Float[Tensor, "batch dim t h w"]:
        return self.blocks[1](self.time_attn(self.attn(self.blocks[0](x))))


class FilmEncoder(nn.Module):
    """Films of ``1 + n * time`` frames to ``1 + n`` latent ones."""

    def __init__(self, config: CosmosNetConfig) -> None:
        super().__init__()
        c = self.config = config
        widths, (space, time), last = c.encoder_widths, c.halvings, len(c.encoder_widths) - 2
        self.first = FactorisedConv3d(c.inner, widths[0])
        self.levels = nn.ModuleList(
            FilmLevel(
                widths[i], widths[i + 1], c.num_blocks, attention=c.resolution // c.patch_size // 2**i in c.attention,
                resample=Shrink(widths[i + 1], space=i < min(space, last), time=i < min(time, last)),
            )
            for i in range(last + 1)
        )  # fmt: skip
        self.middle = FilmMiddle(widths[-1])
        self.norm = FrameNorm(widths[-1])
        self.last = FactorisedConv3d(widths[-1], c.latent_dim)

    def forward(self, pixels: Float[Tensor, "batch channels frames height width"]) -> Float[Tensor, "batch dim t h w"]:
        x = self.first(patches(pixels, self.config.patch_size))
        for level in self.levels:
            x = level(x)
        return self.last(F.silu(self.norm(self.middle(x))))


class FilmDecoder(nn.Module):
    """Latent frames to films; its levels run from the coarsest to the finest."""

    def __init__(self, config: CosmosNetConfig) -> None:
        super().__init__()
        c = self.config = config
        widths, last = c.decoder_widths[::-1], len(c.decoder_widths) - 2
        self.first = FactorisedConv3d(c.latent_dim, widths[0])
        self.middle = FilmMiddle(widths[0])
        levels = []
        for i in range(last + 1):
            wider, longer = c.grows(i)
            levels.append(
                FilmLevel(
                    widths[i], widths[i + 1], c.num_blocks + 1, resample=Grow(widths[i + 1], space=wider, time=longer),
                    attention=c.resolution // c.patch_size // 2**last * 2**i in c.attention,
                )
            )  # fmt: skip
        self.levels = nn.ModuleList(levels)
        self.norm = FrameNorm(widths[-1])
        self.last = FactorisedConv3d(widths[-1], c.inner)

    def forward(self, latents: Float[Tensor, "batch dim t h w"]) -> Float[Tensor, "batch channels frames height width"]:
        x = self.middle(self.first(latents))
        for level in self.levels:
            x = level(x)
        return unpatches(self.last(F.silu(self.norm(x))), self.config.patch_size)


class FilmAutoencoder(FullPrecision):
    """Encoder and decoder with what is between them, ``inside`` channels; nothing sees a later frame."""

    def __init__(self, config: CosmosNetConfig, inside: int | None = None) -> None:
        super().__init__()
        c = self.config = config
        self.encoder = FilmEncoder(c)
        self.quant_conv = CausalConv3d(c.latent_dim, inside or c.latent_dim)
        self.post_quant_conv = CausalConv3d(inside or c.latent_dim, c.latent_dim)
        self.decoder = FilmDecoder(c)

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Latent frames, rows and columns of a film: the one count that everybody uses.

        Raises:
            MediaError: nothing is padded or cut, and the film does not divide into latents.
        """
        c = self.config
        if height % c.space or width % c.space or not height * width:
            raise MediaError(
                f"the sides of films are multiples of {c.space} pixels here, not {width} x {height}: resize or crop"
            )
        if frames < 1 or (frames - 1) % c.time:
            near = max(1, 1 + (frames - 1) // c.time * c.time)
            raise MediaError(
                f"a film of {frames} frames; latents are made of 1, {1 + c.time}, {1 + 2 * c.time}, ...: take {near}"
            )
        return 1 + (frames - 1) // c.time, height // c.space, width // c.space

    def encode(self, film: Float[Tensor, "batch channels frames height width"]) -> Float[Tensor, "batch dim t h w"]:
        """Latents of films in [-1, 1]."""
        self.grid(*film.shape[2:])
        return self.quant_conv(self.encoder(film))

    def decode(self, latents: Float[Tensor, "batch dim t h w"]) -> Float[Tensor, "batch channels frames height width"]:
        """Films of latents."""
        return self.decoder(self.post_quant_conv(latents))
