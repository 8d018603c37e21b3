"""A U-Net of pictures with layers over time between its own: what Stable Video Diffusion takes noise off films by.

Behind each residual block another one convolves over frames; behind each layer of a Transformer another one lets each
place attend to itself in all frames; how much of either is taken is learned (`Blend`). Frames are the pictures of a
batch, film by film; steps and contexts are one a film, so that their number says how many frames each has.

Source: Blattmann et al., "Align your Latents", 2023, https://arxiv.org/abs/2304.08818; "Stable Video Diffusion", 2023,
https://arxiv.org/abs/2311.15127. Official code: Stability-AI/generative-models.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from polymodal.backbones.unet import (
    GatedGELU,
    ResidualBlock,
    Transformer,
    TransformerLayer,
    Transformers,
    UNetConfig,
)
from polymodal.nn.blend import Blend
from polymodal.nn.time import Embedder, step_waves

START = 0.5  # of what is blended by: 62 % are those of pictures


@dataclass(frozen=True, kw_only=True)
class FilmUNetConfig(UNetConfig):
    """``frames`` is the length of the films that it was made for."""

    frames: int = 14

    @property
    def outer_eps(self) -> float:
        """As diffusers computes it; the official code has ``eps`` everywhere."""
        return 1e-6

    def block(self, dim: int, out: int, eps: float) -> nn.Module:
        return FilmBlock(self, dim, out, eps)

    def transformer(self, dim: int, shape: Transformers) -> nn.Module:
        return FilmTransformer(self, dim, shape)


class TimeBlock(ResidualBlock):
    """A residual block that convolves over three frames; norms are over all frames."""

    def convolution(self, dim: int, out: int) -> nn.Module:
        return nn.Conv3d(dim, out, (3, 1, 1), padding=(1, 0, 0))


class FilmBlock(nn.Module):
    """A residual block of each frame and one over time."""

    def __init__(self, config: UNetConfig, dim: int, out: int, eps: float) -> None:
        super().__init__()
        self.space = ResidualBlock(config, dim, out, eps)
        self.time = TimeBlock(config, out, out, eps)
        self.blend = Blend(START)

    def forward(
        self, x: Float[Tensor, "pictures dim rows columns"], step: Float[Tensor, "batch time"]
    ) -> Float[Tensor, "pictures out rows columns"]:
        x = self.space(x, step.repeat_interleave(len(x) // len(step), 0))
        film = rearrange(x, "(b f) d h w -> b d f h w", b=len(step))
        return rearrange(self.blend(film, self.time(film, step)), "b d f h w -> (b f) d h w")


class TimeLayer(TransformerLayer):
    """A layer over the frames of one place, with one more feed-forward before it."""

    def __init__(self, dim: int, num_heads: int, context_dim: int) -> None:
        super().__init__(dim, num_heads, context_dim)
        self.in_norm = nn.LayerNorm(dim)
        self.in_mlp = GatedGELU(dim, 4 * dim)

    def forward(
        self, x: Float[Tensor, "batch frames dim"], context: Float[Tensor, "batch tokens context_dim"]
    ) -> Float[Tensor, "batch frames dim"]:
        return super().forward(x + self.in_mlp(self.in_norm(x)), context)


class FilmTransformer(Transformer):
    """Layers over the places of each frame, and behind each a layer over time, which is told the frame's number."""

    def __init__(self, config: UNetConfig, dim: int, shape: Transformers) -> None:
        super().__init__(config, dim, shape)
        self.time_blocks = nn.ModuleList(
            TimeLayer(dim, shape.num_heads, config.context_dim) for _ in range(shape.depth)
        )
        self.frame_embed = Embedder(dim, 4 * dim, dim)
        self.blend = Blend(START)

    def forward(
        self, x: Float[Tensor, "pictures dim rows columns"], context: Float[Tensor, "batch tokens context_dim"]
    ) -> Float[Tensor, "pictures dim rows columns"]:
        films, dim, (rows, columns) = len(context), x.shape[1], x.shape[2:]
        frames = len(x) // films
        number = self.frame_embed(step_waves(torch.arange(frames, device=x.device), dim).to(x.dtype))
        of_frames, of_places = (context.repeat_interleave(n, 0) for n in (frames, rows * columns))
        h = self.in_proj(rearrange(self.norm(x), "b d h w -> b (h w) d"))
        for block, time in zip(self.blocks, self.time_blocks, strict=True):
            h = block(h, of_frames)
            over = rearrange(h, "(b f) n d -> (b n) f d", f=frames) + number
            h = self.blend(h, rearrange(time(over, of_places), "(b n) f d -> (b f) n d", b=films))
        return x + rearrange(self.out_proj(h), "b (h w) d -> b d h w", h=rows)
