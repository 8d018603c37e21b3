"""Small trunks of policies: what a robot senses and is told, as one vector.

Instructions steer what is seen by FiLM, so that a fresh trunk sees as if nothing had been said.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from polymodal.core.errors import ConfigError
from polymodal.encoders.keypoints import SpatialSoftmax
from polymodal.nn.film import FiLM
from polymodal.nn.residual import ResidualMLP


@dataclass(frozen=True, kw_only=True)
class StateTrunk:
    """A residual MLP over the state and the instruction."""

    state_width: int
    dim: int = 256
    num_layers: int = 3

    def build(self, text_dim: int) -> StateEncoder:
        return StateEncoder(self, text_dim)


@dataclass(frozen=True, kw_only=True)
class PixelTrunk:
    """Convolutions over the pictures of every camera, steered by the instruction, then as `StateTrunk`.

    Attributes:
        cameras: their names; all share the convolutions, and each has a vector that tells it apart.
        image_size: pictures are squares of so many pixels.
        channels: of the convolutions; the first halves the sides, and so does the second.
        num_convs: residual pairs of convolutions after them.
        state_width: 0 where the state is not read.
    """

    cameras: tuple[str, ...]
    image_size: int = 64
    channels: int = 64
    num_convs: int = 1
    keypoints: int = 64
    state_width: int = 0
    dim: int = 256
    num_layers: int = 3

    def __post_init__(self) -> None:
        if not self.cameras or self.image_size % 4 or self.channels % 8:
            raise ConfigError("a trunk of pixels needs a camera, sides that 4 divides and channels that 8 divides")

    def build(self, text_dim: int) -> PixelEncoder:
        return PixelEncoder(self, text_dim)


@dataclass(frozen=True, kw_only=True)
class TileTrunk:
    """For pictures that are drawn of tiles: what each shows, steered by the instruction, and where that is.

    Attributes:
        cameras: their names; all share the layers but the last.
        image_size: pictures are squares of so many pixels.
        tile: pixels along a side of a tile.
        channels: that say what a tile shows.
        kept: channels of each tile that the last layers read.
        state_width: 0 where the state is not read.
    """

    cameras: tuple[str, ...]
    image_size: int
    tile: int
    channels: int = 128
    kept: int = 16
    state_width: int = 0
    dim: int = 256
    num_layers: int = 2

    def __post_init__(self) -> None:
        if not self.cameras or self.tile < 1 or self.image_size % self.tile:
            raise ConfigError("a trunk of tiles needs a camera, and pictures that are whole tiles")

    def build(self, text_dim: int) -> TileEncoder:
        return TileEncoder(self, text_dim)


class StateEncoder(nn.Module):
    """See `StateTrunk`."""

    def __init__(self, config: StateTrunk, text_dim: int) -> None:
        super().__init__()
        self.read = nn.Linear(config.state_width + text_dim, config.dim)
        self.mix = ResidualMLP(config.dim, config.num_layers)

    def forward(
        self, state: Float[Tensor, "batch state_width"], text: Float[Tensor, "batch text_dim"]
    ) -> Float[Tensor, "batch dim"]:
        return self.mix(self.read(torch.cat([state, text], 1)))


class Steered(nn.Module):
    """A pair of convolutions beside a shortcut, scaled and shifted by what is told."""

    def __init__(self, dim: int, told_dim: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(dim, dim, 3, 1, 1) for _ in range(2))
        self.norm = nn.GroupNorm(8, dim)
        self.film = FiLM(told_dim, dim)

    def forward(
        self, x: Float[Tensor, "images dim rows columns"], told: Float[Tensor, "images told_dim"]
    ) -> Float[Tensor, "images dim rows columns"]:
        hidden = torch.relu(self.film(self.norm(self.first(x)), told))
        return torch.relu(x + self.second(hidden))


class PixelEncoder(nn.Module):
    """See `PixelTrunk`."""

    def __init__(self, config: PixelTrunk, text_dim: int) -> None:
        super().__init__()
        c, self.config = config, config
        self.camera = nn.Embedding(len(c.cameras), text_dim)
        self.stem = nn.Sequential(
            nn.Conv2d(3, c.channels // 2, 5, 2, 2), nn.GroupNorm(4, c.channels // 2), nn.ReLU(),
            nn.Conv2d(c.channels // 2, c.channels, 3, 2, 1), nn.GroupNorm(8, c.channels), nn.ReLU(),
        )  # fmt: skip
        # Convolutions know no place, and "the left one" of two that look alike is one of place.
        self.position = nn.Parameter(torch.zeros(c.channels, c.image_size // 4, c.image_size // 4))
        self.steered = nn.ModuleList(Steered(c.channels, text_dim) for _ in range(c.num_convs))
        self.places = SpatialSoftmax(c.channels, c.keypoints, (c.image_size // 4, c.image_size // 4))
        seen = len(c.cameras) * (2 * c.keypoints + c.channels)
        self.read = nn.Linear(seen + c.state_width + text_dim, c.dim)
        self.mix = ResidualMLP(c.dim, c.num_layers)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Torch's own, and FiLM that does nothing."""
        for layer in self.steered:
            assert isinstance(layer, Steered)
            layer.film.init_weights()

    def forward(
        self,
        pixels: Float[Tensor, "batch cameras 3 height width"],
        text: Float[Tensor, "batch text_dim"],
        state: Float[Tensor, "batch state_width"] | None = None,
    ) -> Float[Tensor, "batch dim"]:
        told = (text[:, None] + self.camera.weight).flatten(0, 1)
        x = self.stem(pixels.flatten(0, 1))
        x = x + self.position.to(x.dtype)
        for layer in self.steered:
            x = layer(x, told)
        seen = torch.cat([self.places(x).flatten(1), x.mean((2, 3))], 1)
        parts = [rearrange(seen, "(b c) d -> b (c d)", c=pixels.shape[1]), text]
        return self.mix(self.read(torch.cat([*parts, *([] if state is None else [state])], 1)))


class TileEncoder(nn.Module):
    """See `TileTrunk`."""

    def __init__(self, config: TileTrunk, text_dim: int) -> None:
        super().__init__()
        c, self.config = config, config
        self.tiles = nn.Sequential(
            nn.Conv2d(3, c.channels, c.tile, c.tile), nn.ReLU(), nn.Conv2d(c.channels, c.channels, 1)
        )
        self.keep = nn.Conv2d(c.channels, c.kept, 1)
        self.query = nn.Linear(text_dim, c.kept * c.channels)
        seen = 2 * len(c.cameras) * c.kept * (c.image_size // c.tile) ** 2
        self.read = nn.Linear(seen + c.state_width + text_dim, c.dim)
        self.mix = ResidualMLP(c.dim, c.num_layers)

    def forward(
        self,
        pixels: Float[Tensor, "batch cameras 3 height width"],
        text: Float[Tensor, "batch text_dim"],
        state: Float[Tensor, "batch state_width"] | None = None,
    ) -> Float[Tensor, "batch dim"]:
        tiles = torch.relu(self.tiles(pixels.flatten(0, 1)))
        told = rearrange(self.query(text), "b (k d) -> b k d", d=tiles.shape[1]) / tiles.shape[1] ** 0.5
        match = told.repeat_interleave(pixels.shape[1], 0) @ tiles.flatten(2)
        kept = torch.cat([self.keep(tiles).flatten(2), match], 1)
        seen = rearrange(torch.relu(kept), "(b c) k n -> b (c k n)", c=pixels.shape[1])
        return self.mix(self.read(torch.cat([seen, text, *([] if state is None else [state])], 1)))
