"""The U-Net that takes noise off latents and looks at a text while it does so.

    latents -> conv -> (residual blocks, Transformers) a level, halved between two -> middle
            -> (residual blocks that read what the way down left, Transformers) a level, doubled between two -> conv

Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2021,
https://arxiv.org/abs/2112.10752, after Dhariwal & Nichol 2021, https://arxiv.org/abs/2105.05233; the sizes and pooled
text that SDXL adds to the step: Podell et al. 2023, https://arxiv.org/abs/2307.01952. Official code:
CompVis/latent-diffusion, Stability-AI/generative-models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from polymodal.core.errors import ConfigError
from polymodal.nn.attention import Attention
from polymodal.nn.blend import Blend
from polymodal.nn.time import Embedder, step_waves

TRANSFORMER_EPS = 1e-6  # of the group norm before a Transformer


@dataclass(frozen=True, kw_only=True)
class Transformers:
    """What stands behind each residual block of a level; ``depth`` counts the layers of each."""

    num_heads: int
    depth: int = 1


@dataclass(frozen=True, kw_only=True)
class Level:
    """One resolution."""

    dim: int
    transformers: Transformers | None = None


@dataclass(frozen=True, kw_only=True)
class Added:
    """What SDXL adds to the step: the text's vector and numbers (sizes, crops), each number as so many ``waves``.

    ``dim`` is the width of all these together.
    """

    dim: int = 2816
    waves: int = 256


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Attributes:
    levels: the finest first; between two a side is halved.
    middle: the Transformer at the coarsest resolution, between two residual blocks.
    context_dim: of a token of the text.
    num_blocks: of a level on the way down; on the way up there is one more.
    side: of the latents that it was made for.
    convolved: whether files have the maps into and out of a Transformer as 1x1 convolutions, which is the same.
    """

    levels: tuple[Level, ...]
    middle: Transformers
    context_dim: int
    in_channels: int = 4
    out_channels: int = 4
    num_blocks: int = 2
    groups: int = 32
    eps: float = 1e-5
    side: int = 64
    added: Added | None = None
    convolved: bool = False

    def __post_init__(self) -> None:
        for level in self.levels:
            if level.dim % self.groups:
                raise ConfigError(f"a level of {level.dim} channels is not {self.groups} whole groups")
            if level.transformers is not None and level.dim % level.transformers.num_heads:
                raise ConfigError(f"{level.dim} channels are not {level.transformers.num_heads} whole heads")
        if not self.levels or self.levels[-1].dim % self.middle.num_heads:
            raise ConfigError("a U-Net has at least one level, and heads of whole channels in its middle")

    @property
    def multiple(self) -> int:
        """Of which a side of latents is one, so that it comes back as it was."""
        return 2 ** (len(self.levels) - 1)

    @property
    def time_dim(self) -> int:
        return 4 * self.levels[0].dim

    @property
    def outer_eps(self) -> float:
        """Of the residual blocks on the way up, and of those on the way down that Transformers follow."""
        return self.eps

    def block(self, dim: int, out: int, eps: float) -> nn.Module:
        """A residual block."""
        return ResidualBlock(self, dim, out, eps)

    def transformer(self, dim: int, shape: Transformers) -> nn.Module:
        """What stands behind a residual block."""
        return Transformer(self, dim, shape)


class Residuals(NamedTuple):
    """What a ControlNet adds: to all that the way down leaves, finest first, and to the middle."""

    down: Sequence[Float[Tensor, "batch dim rows columns"]]
    middle: Float[Tensor, "batch dim rows columns"]


class ResidualBlock(nn.Module):
    """Two convolutions, each behind a norm and SiLU, around a shortcut; the step is added between them."""

    def __init__(self, config: UNetConfig, dim: int, out: int, eps: float) -> None:
        super().__init__()
        c = config
        self.norm1 = nn.GroupNorm(c.groups, dim, eps=eps)
        self.conv1 = self.convolution(dim, out)
        self.time_proj = nn.Linear(c.time_dim, out)
        self.norm2 = nn.GroupNorm(c.groups, out, eps=eps)
        self.conv2 = self.convolution(out, out)
        self.shortcut = nn.Identity() if dim == out else nn.Conv2d(dim, out, 1)

    def convolution(self, dim: int, out: int) -> nn.Module:
        return nn.Conv2d(dim, out, 3, padding=1)

    def forward(
        self, x: Float[Tensor, "batch dim *places"], step: Float[Tensor, "batch time"]
    ) -> Float[Tensor, "batch out *places"]:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_proj(step).view(*h.shape[:2], *[1] * (h.ndim - 2))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class GatedGELU(nn.Module):
    """``down(value * gelu(gate))``, both from one layer, the value first."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(dim, 2 * hidden_dim)
        self.down_proj = nn.Linear(hidden_dim, dim)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        value, gate = self.up_proj(x).chunk(2, -1)
        return self.down_proj(value * F.gelu(gate))


class TransformerLayer(nn.Module):
    """Places attend to each other, then to the text; a gated feed-forward; all behind norms."""

    def __init__(self, dim: int, num_heads: int, context_dim: int) -> None:
        super().__init__()
        self.attn_norm, self.cross_norm, self.mlp_norm = (nn.LayerNorm(dim) for _ in range(3))
        self.attn = Attention(dim, num_heads, bias=False)
        self.cross_attn = Attention(dim, num_heads, bias=False, context_dim=context_dim)
        self.mlp = GatedGELU(dim, 4 * dim)

    def forward(
        self, x: Float[Tensor, "batch places dim"], context: Float[Tensor, "batch tokens context_dim"]
    ) -> Float[Tensor, "batch places dim"]:
        x = x + self.attn(self.attn_norm(x))
        x = x + self.cross_attn(self.cross_norm(x), context)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """Layers over the places of a picture, between two linear maps, beside a shortcut."""

    def __init__(self, config: UNetConfig, dim: int, shape: Transformers) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(config.groups, dim, eps=TRANSFORMER_EPS)
        self.in_proj, self.out_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.blocks = nn.ModuleList(
            TransformerLayer(dim, shape.num_heads, config.context_dim) for _ in range(shape.depth)
        )

    def forward(
        self, x: Float[Tensor, "batch dim rows columns"], context: Float[Tensor, "batch tokens context_dim"]
    ) -> Float[Tensor, "batch dim rows columns"]:
        h = self.in_proj(rearrange(self.norm(x), "b d h w -> b (h w) d"))
        for block in self.blocks:
            h = block(h, context)
        return x + rearrange(self.out_proj(h), "b (h w) d -> b d h w", h=x.shape[2])


class Stage(nn.Module):
    """The residual blocks of a level, from these to its own channels, and the Transformers behind them."""

    def __init__(self, config: UNetConfig, sources: Sequence[int], level: Level, eps: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(config.block(source, level.dim, eps) for source in sources)
        shape = level.transformers
        self.transformers = nn.ModuleList(
            () if shape is None else (config.transformer(level.dim, shape) for _ in sources)
        )

    def steps(self) -> Iterator[tuple[nn.Module, nn.Module | None]]:
        for i, block in enumerate(self.blocks):
            yield block, self.transformers[i] if len(self.transformers) else None


class Down(Stage):
    """A level on the way down; ``last`` is not halved."""

    def __init__(self, config: UNetConfig, number: int) -> None:
        level, c = config.levels[number], config
        eps = c.eps if level.transformers is None else c.outer_eps
        super().__init__(c, [c.levels[max(number - 1, 0)].dim, *[level.dim] * (c.num_blocks - 1)], level, eps)
        last = number == len(c.levels) - 1
        self.downsample = None if last else nn.Conv2d(level.dim, level.dim, 3, stride=2, padding=1)

    def forward(self, x: Tensor, step: Tensor, context: Tensor) -> list[Tensor]:
        """What each block, and the halving, leaves."""
        left = []
        for block, transformer in self.steps():
            x = block(x, step)
            x = x if transformer is None else transformer(x, context)
            left.append(x)
        return left if self.downsample is None else [*left, self.downsample(x)]


class Up(Stage):
    """A level on the way up; the last is not doubled."""

    def __init__(self, config: UNetConfig, number: int) -> None:
        c = config
        dims = [level.dim for level in c.levels]
        dim, coarser, finer = dims[number], dims[min(number + 1, len(dims) - 1)], dims[max(number - 1, 0)]
        skips = [*[dim] * c.num_blocks, finer]  # the last is what the finer level left when it was halved, or the first
        sources = [a + b for a, b in zip([coarser, *[dim] * c.num_blocks], skips, strict=True)]
        super().__init__(c, sources, c.levels[number], c.outer_eps)
        self.upsample = nn.Conv2d(dim, dim, 3, padding=1) if number else None

    def forward(self, x: Tensor, left: list[Tensor], step: Tensor, context: Tensor) -> Tensor:
        """Takes from the end of ``left``; doubles to the size of what is left then."""
        for block, transformer in self.steps():
            x = block(torch.cat([x, left.pop()], 1), step)
            x = x if transformer is None else transformer(x, context)
        if self.upsample is None:
            return x
        return self.upsample(F.interpolate(x, size=left[-1].shape[-2:], mode="nearest"))


class Middle(Stage):
    """Two residual blocks with a Transformer between them."""

    def __init__(self, config: UNetConfig) -> None:
        dim = config.levels[-1].dim
        super().__init__(config, [dim, dim], Level(dim=dim), config.eps)
        self.transformers = nn.ModuleList([config.transformer(dim, config.middle)])

    def forward(self, x: Tensor, step: Tensor, context: Tensor) -> Tensor:
        first, second = self.blocks
        return second(self.transformers[0](first(x, step), context), step)


class UNetEncoder(nn.Module):
    """The way down and the middle, of which a ControlNet has a copy."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        c = self.config = config
        self.time_embed = Embedder(c.levels[0].dim, c.time_dim)
        a = c.added
        self.added_embed = None if a is None else Embedder(a.dim, c.time_dim)
        self.first = nn.Conv2d(c.in_channels, c.levels[0].dim, 3, padding=1)
        self.down = nn.ModuleList(Down(c, number) for number in range(len(c.levels)))
        self.middle = Middle(c)

    def step(
        self,
        when: Shaped[Tensor, " batch"],
        pooled: Float[Tensor, "batch pooled_dim"] | None = None,
        numbers: Float[Tensor, "batch numbers"] | None = None,
    ) -> Float[Tensor, "batch time"]:
        """What residual blocks read of the step and of what is added to it."""
        c, dtype = self.config, self.first.weight.dtype
        out = self.time_embed(step_waves(when, c.levels[0].dim).to(dtype))
        if self.added_embed is not None:
            assert c.added is not None
            assert numbers is not None, "this U-Net reads numbers, too"
            waves = step_waves(numbers.flatten(), c.added.waves).view(len(numbers), -1).to(dtype)
            told = waves if pooled is None else torch.cat([pooled.to(dtype), waves], 1)
            assert told.shape[1] == c.added.dim, "this U-Net reads the text's vector, too, or other numbers"
            out = out + self.added_embed(told)
        return F.silu(out)

    def forward(
        self,
        x: Float[Tensor, "pictures channels rows columns"],
        step: Float[Tensor, "batch time"],
        context: Float[Tensor, "batch tokens context_dim"],
        shown: Float[Tensor, "pictures dim rows columns"] | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        """All that the way down leaves, finest first, and the middle; ``shown`` is added to the first features."""
        x = self.first(x)
        left = [x if shown is None else x + shown]
        for stage in self.down:
            left += stage(left[-1], step, context)
        return left, self.middle(left[-1], step, context)


class UNet(nn.Module):
    """Noisy latents, their steps and a text to what is predicted of them."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        c = self.config = config
        self.encoder = UNetEncoder(c)
        self.up = nn.ModuleList(Up(c, number) for number in reversed(range(len(c.levels))))
        self.norm = nn.GroupNorm(c.groups, c.levels[0].dim, eps=c.eps)
        self.last = nn.Conv2d(c.levels[0].dim, c.out_channels, 3, padding=1)

    @torch.no_grad()
    def init_weights(self) -> None:
        """torch's own scheme; what joins a shortcut, and the last layer, start at zero, as in the official code."""
        init_unet_(self)
        zero_(self.last)

    def forward(
        self,
        x: Float[Tensor, "pictures channels rows columns"],
        when: Shaped[Tensor, " batch"],
        context: Float[Tensor, "batch tokens context_dim"],
        *,
        pooled: Float[Tensor, "batch pooled_dim"] | None = None,
        numbers: Float[Tensor, "batch numbers"] | None = None,
        residuals: Residuals | None = None,
    ) -> Float[Tensor, "pictures out_channels rows columns"]:
        """The prediction.

        Args:
            x: noisy latents; of films (`unet_film`) the frames of the first, then those of the next.
            when: steps, 0 to 999.
            context: the tokens of a text.
            pooled: the text's vector, where ``config.added`` asks for it.
            numbers: what is told of sizes, likewise.
            residuals: what a ControlNet adds.
        """
        step = self.encoder.step(when, pooled, numbers)
        left, x = self.encoder(x, step, context)
        if residuals is not None:
            left = [mine + more for mine, more in zip(left, residuals.down, strict=True)]
            x = x + residuals.middle
        for stage in self.up:
            x = stage(x, left, step, context)
        return self.last(F.silu(self.norm(x)))


def zero_(layer: nn.Linear | nn.Conv2d | nn.Conv3d) -> None:
    """Weight and bias."""
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)


@torch.no_grad()
def init_unet_(model: nn.Module) -> None:
    """torch's own scheme, and zeros for the last layer of each residual block and Transformer."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.Linear | nn.GroupNorm | nn.LayerNorm | Blend):
            module.reset_parameters()
    for module in model.modules():
        if isinstance(module, ResidualBlock):
            assert isinstance(module.conv2, nn.Conv2d | nn.Conv3d)
            zero_(module.conv2)
        elif isinstance(module, Transformer):
            zero_(module.out_proj)
