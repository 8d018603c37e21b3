"""Connectors that read the features of a picture as a grid: squares of it become one token each.

Sources: pixel shuffle as in InternVL (Chen et al., "How Far Are We to GPT-4V?", 2024, https://arxiv.org/abs/2404.16821)
and Idefics3 (https://arxiv.org/abs/2408.12637); averages before the projection as in DeCo (Yao et al. 2024,
https://arxiv.org/abs/2405.20985), over the time of a clip, too, as in Video-ChatGPT (https://arxiv.org/abs/2306.05424).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from polymodal.connectors.merge import pool_space, pool_time, strided
from polymodal.connectors.mlp import MLP, init_connector
from polymodal.core.errors import ConfigError
from polymodal.nn.mlp import ActivationName


def side_of(tokens: int) -> int:
    """Cells along one side of a square grid.

    Raises:
        ConfigError: so many tokens are no square.
    """
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ConfigError(f"{tokens} features are no square grid: a class token or registers may be among them")
    return side


@dataclass(frozen=True, kw_only=True)
class PixelShuffle:
    """The features of a square, side by side in one wider vector, through linear layers: nothing is averaged away.

    InternVL's is this; Idefics3 and SmolVLM have one linear layer without norm and bias.

    Attributes:
        factor: cells along a side of the square.
        layers: linear layers, an activation between each two.
        norm: a layer norm before them.
    """

    factor: int = 2
    layers: int = 2
    norm: bool = True
    bias: bool = True
    activation: ActivationName = "gelu"

    def __post_init__(self) -> None:
        if min(self.factor, self.layers) < 1:
            raise ConfigError("pixel shuffle needs squares of at least one cell, and a linear layer")

    def build(self, source: int, target: int) -> ShuffleConnector:
        return ShuffleConnector(self, source, target)

    def count(self, tokens: int) -> int:
        """Tokens that so many features become.

        Raises:
            ConfigError: the features are no grid of whole squares.
        """
        side = side_of(tokens)
        if side % self.factor:
            fits = [str(f) for f in range(2, side + 1) if side % f == 0]
            raise ConfigError(
                f"a grid of {side} x {side} features does not divide into squares of {self.factor} x {self.factor}: "
                f"take a factor of {' or '.join(fits)}, pooling, or a tower of another size"
            )
        return (side // self.factor) ** 2


class ShuffleConnector(nn.Module):
    """Space to depth, a norm, and linear layers."""

    def __init__(self, config: PixelShuffle, source: int, target: int) -> None:
        super().__init__()
        c, self.factor = config, config.factor
        wide = source * c.factor**2
        self.norm = nn.LayerNorm(wide) if c.norm else nn.Identity()
        self.proj = MLP(layers=c.layers, activation=c.activation, bias=c.bias).build(wide, target)

    def init_weights(self) -> None:
        init_connector(self)

    def forward(self, x: Float[Tensor, "batch tokens source"]) -> Float[Tensor, "batch squares target"]:
        f, rows = self.factor, side_of(x.shape[1]) // self.factor
        return self.proj(self.norm(rearrange(x, "b (h i w j) d -> b (h w) (i j d)", h=rows, i=f, j=f)))


@dataclass(frozen=True, kw_only=True)
class Pooling:
    """Means over squares of the grid, and over stretches of time of a clip, through linear layers.

    Attributes:
        stride: cells along a side of the square; the last ones may be smaller, and share cells then.
        frames: of a clip that are read; 0 where only pictures are.
        steps: even stretches of time that they become.
    """

    stride: int = 2
    frames: int = 0
    steps: int = 1
    layers: int = 2
    bias: bool = True
    activation: ActivationName = "gelu"

    def __post_init__(self) -> None:
        if min(self.stride, self.layers, self.steps) < 1 or self.frames < 0:
            raise ConfigError("pooling needs squares of at least one cell, a stretch of time, and a linear layer")
        if self.frames and self.steps > self.frames:
            raise ConfigError(f"{self.frames} frames cannot be pooled to {self.steps} steps")

    def build(self, source: int, target: int) -> PoolingConnector:
        return PoolingConnector(self, source, target)

    def count(self, tokens: int) -> int:
        """Tokens that so many features of a picture become.

        Raises:
            ConfigError: the features are no grid.
        """
        side = side_of(tokens)
        return math.prod(strided((side, side), self.stride))

    def count_clip(self, tokens: int) -> int:
        """Tokens that a clip becomes whose frames have so many features."""
        return self.steps * self.count(tokens)


class PoolingConnector(nn.Module):
    """Means, and linear layers."""

    def __init__(self, config: Pooling, source: int, target: int) -> None:
        super().__init__()
        self.config = config
        self.proj = MLP(layers=config.layers, activation=config.activation, bias=config.bias).build(source, target)

    def init_weights(self) -> None:
        init_connector(self)

    def forward(
        self, x: Float[Tensor, "media tokens source"] | Float[Tensor, "media frames tokens source"]
    ) -> Float[Tensor, "media pooled target"]:
        """The features of pictures, or of the frames of clips."""
        side = side_of(x.shape[-2])
        x = pool_space(x, (side, side), strided((side, side), self.config.stride), "average")
        if x.ndim == 4:
            x = pool_time(x, self.config.steps).flatten(1, 2)
        return self.proj(x)
