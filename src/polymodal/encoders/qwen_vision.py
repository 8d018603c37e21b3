"""The vision towers of Qwen2-VL and Qwen2.5-VL: patches of any number of frames of any size in one sequence.

Sources: Wang et al., "Qwen2-VL", 2024, https://arxiv.org/abs/2409.12191; Bai et al., "Qwen2.5-VL", 2025,
https://arxiv.org/abs/2502.13923.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from polymodal.core.errors import ConfigError, MediaError
from polymodal.nn.attention import attend
from polymodal.nn.mlp import MLP, ActivationName, GatedMLP
from polymodal.nn.norm import Norm
from polymodal.nn.rope import Rope, rotate
from polymodal.weights.fields import MOST_LAYERS, Fields
from polymodal.weights.rules import Rule, Split, rule


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Attention within squares of ``size`` pixels; the layers in ``full`` see the whole frame."""

    size: int = 112
    full: tuple[int, ...] = (7, 15, 23, 31)


@dataclass(frozen=True, kw_only=True)
class QwenVisionConfig:
    """A tower.

    Attributes:
        activation: "swiglu" is a gated layer with biases.
        windows: None where every layer sees the whole frame.
        temporal_size: frames that a patch spans; a picture is doubled to as many.
        merge_size: squares of so many patches a side become one token.
        std: of the normal distribution of fresh weights.
    """

    dim: int
    num_layers: int
    num_heads: int
    hidden_dim: int
    activation: ActivationName | Literal["swiglu"]
    norm: Norm
    windows: Windows | None = None
    patch_size: int = 14
    temporal_size: int = 2
    merge_size: int = 2
    num_channels: int = 3
    std: float = 0.02

    def __post_init__(self) -> None:
        if self.dim % (4 * self.num_heads):
            raise ConfigError(
                f"dim {self.dim} does not give {self.num_heads} heads a multiple of four dimensions each, as positions "
                "in two axes need"
            )
        block = self.patch_size * self.merge_size
        if self.windows is not None and self.windows.size < block:
            raise ConfigError(f"windows of {self.windows.size} pixels are smaller than a token of {block}")

    @property
    def patch_dim(self) -> int:
        """Numbers in a patch: channels, frames, rows and columns of pixels."""
        return self.num_channels * self.temporal_size * self.patch_size**2


Rotary: TypeAlias = tuple[Float[Tensor, "1 1 patches half"], Float[Tensor, "1 1 patches half"]]


@dataclass(frozen=True)
class Pieces:
    """Which patches see each other: pieces of the sequence, those of one length beside each other.

    ``order`` brings the patches into that order and ``back`` undoes it; ``shapes`` are (pieces, their length).
    """

    order: Int[Tensor, " patches"]
    back: Int[Tensor, " patches"]
    shapes: tuple[tuple[int, int], ...]
    cos: Float[Tensor, "1 1 patches half"]  # of the positions, in this order
    sin: Float[Tensor, "1 1 patches half"]

    @classmethod
    def of(cls, piece: Int[Tensor, " patches"], rotary: Rotary) -> Pieces:
        """From a number for each patch, equal within a piece, and the angles of its position."""
        _, index, counts = torch.unique(piece, return_inverse=True, return_counts=True)
        order = torch.argsort(counts[index] * len(counts) + index, stable=True)
        lengths, repeats = torch.unique(counts, return_counts=True)
        shapes = tuple(zip(repeats.tolist(), lengths.tolist(), strict=True))
        cos, sin = (t[:, :, order] for t in rotary)
        return cls(order, torch.argsort(order), shapes, cos, sin)


class PieceAttention(nn.Module):
    """Full self-attention within pieces, with rotary positions."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.o_proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "patches dim"], pieces: Pieces) -> Float[Tensor, "patches dim"]:
        x = x[pieces.order]
        q, k, v = (
            rearrange(t, "n (h d) -> 1 h n d", h=self.num_heads)
            for t in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        q, k = rotate(q, pieces.cos, pieces.sin), rotate(k, pieces.cos, pieces.sin)
        sizes = [count * length for count, length in pieces.shapes]
        out = []
        for (count, _), *parts in zip(pieces.shapes, *(t.split(sizes, 2) for t in (q, k, v)), strict=True):
            seen = attend(*(rearrange(t, "1 h (s n) d -> s h n d", s=count) for t in parts))
            out.append(rearrange(seen, "s h n d -> (s n) (h d)"))
        return self.o_proj(torch.cat(out)[pieces.back])


class QwenVisionBlock(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, config: QwenVisionConfig) -> None:
        super().__init__()
        c = config
        self.attn_norm = c.norm.build(c.dim)
        self.attn = PieceAttention(c.dim, c.num_heads)
        self.mlp_norm = c.norm.build(c.dim)
        self.mlp: MLP | GatedMLP
        if c.activation == "swiglu":
            self.mlp = GatedMLP(c.dim, c.hidden_dim, bias=True)
        else:
            self.mlp = MLP(c.dim, c.hidden_dim, c.activation)

    def forward(self, x: Float[Tensor, "patches dim"], pieces: Pieces) -> Float[Tensor, "patches dim"]:
        x = x + self.attn(self.attn_norm(x), pieces)
        return x + self.mlp(self.mlp_norm(x))


class QwenVision(nn.Module):
    """Frames cut into patches, each frame for itself, through pre-norm blocks; there is no last norm."""

    def __init__(self, config: QwenVisionConfig) -> None:
        super().__init__()
        c = self.config = config
        size = (c.temporal_size, c.patch_size, c.patch_size)
        self.patch_embed = nn.Conv3d(c.num_channels, c.dim, size, size, bias=False)
        self.blocks = nn.ModuleList(QwenVisionBlock(c) for _ in range(c.num_layers))

    def init_weights(self) -> None:
        _normal(self, self.config.std)

    def layout(self, grid: Int[Tensor, "media 3"]) -> Int[Tensor, "patches 3"]:
        """Frame (counted over all media), row and column of each patch; squares that merge lie together."""
        m, first, parts = self.config.merge_size, 0, []
        for t, h, w in grid.tolist():
            axes = (torch.arange(n, device=grid.device) for n in (t, h, w))
            places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
            places[..., 0] += first
            parts.append(rearrange(places, "t (h a) (w b) axes -> (t h w a b) axes", a=m, b=m))
            first += t
        return torch.cat(parts)

    def forward(
        self, patches: Float[Tensor, "tokens neighbours patch_dim"], grid: Int[Tensor, "media 3"]
    ) -> Float[Tensor, "tokens neighbours dim"]:
        """Vectors of patches.

        Args:
            patches: of all media, those of one future token together.
            grid: steps in time, rows and columns of patches of each medium.

        Raises:
            MediaError: the grids are not those of the patches.
        """
        c = self.config
        tokens, neighbours = patches.shape[:2]
        if int(grid.prod(1).sum()) != tokens * neighbours:
            raise MediaError(f"{tokens * neighbours} patches do not fill the grids {grid.tolist()}")
        weight = self.patch_embed.weight
        # A convolution whose kernel is its stride: a linear map of each patch, which is faster as such.
        x = F.linear(patches.flatten(0, 1).to(weight.dtype), weight.flatten(1))
        place = self.layout(grid)
        frame, row, column = place.unbind(1)
        rotary = self._rotary(place[:, 1:])
        pieces = whole = Pieces.of(frame, rotary)
        if c.windows is not None:
            side = c.windows.size // c.patch_size // c.merge_size * c.merge_size
            across = int(column.max()) // side + 1
            down = int(row.max()) // side + 1
            pieces = Pieces.of((frame * down + row // side) * across + column // side, rotary)
        for number, block in enumerate(self.blocks):
            x = block(x, whole if c.windows is None or number in c.windows.full else pieces)
        return x.unflatten(0, (tokens, neighbours))

    def _rotary(self, place: Int[Tensor, "patches 2"]) -> Rotary:
        """Rows turn the first half of a head's pairs, columns the second, by the same frequencies."""
        half = self.config.dim // self.config.num_heads // 2
        rows, columns = (Rope().angles(place[None, :, axis : axis + 1], half) for axis in (0, 1))
        return torch.cat([rows[0], columns[0]], -1), torch.cat([rows[1], columns[1]], -1)


class Merger(nn.Module):
    """Neighbouring patches, normed and put beside each other, through an MLP: one token for each square."""

    def __init__(self, config: QwenVisionConfig, out_dim: int) -> None:
        super().__init__()
        self.std = config.std
        wide = config.dim * config.merge_size**2
        self.norm = config.norm.build(config.dim)
        self.up_proj = nn.Linear(wide, wide)
        self.down_proj = nn.Linear(wide, out_dim)

    def init_weights(self) -> None:
        _normal(self, self.std)

    def forward(self, x: Float[Tensor, "tokens neighbours dim"]) -> Float[Tensor, "tokens out_dim"]:
        return self.down_proj(F.gelu(self.up_proj(self.norm(x).flatten(1))))


@torch.no_grad()
def _normal(module: nn.Module, std: float) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv3d):
            nn.init.normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def qwen_vision_rules(config: QwenVisionConfig, theirs: str) -> list[Rule]:
    """The tower, as ``vision``, and the merger, as ``connector``, under the Hub's names."""
    t, o = f"{theirs}.blocks.{{i}}", "vision.blocks.{i}"
    plain = {"fc1": "up_proj", "fc2": "down_proj"}
    names = {n: n for n in ("gate_proj", "up_proj", "down_proj")} if config.activation == "swiglu" else plain
    return [
        rule(f"{theirs}.patch_embed.proj.weight", "vision.patch_embed.weight"),
        rule(f"{t}.norm1.{{p}}", f"{o}.attn_norm.{{p}}"),
        rule(f"{t}.norm2.{{p}}", f"{o}.mlp_norm.{{p}}"),
        rule(f"{t}.attn.qkv.{{p}}", [f"{o}.attn.{n}_proj.{{p}}" for n in "qkv"], Split(3)),
        rule(f"{t}.attn.proj.{{p}}", f"{o}.attn.o_proj.{{p}}"),
        *(rule(f"{t}.mlp.{name}.{{p}}", f"{o}.mlp.{mine}.{{p}}") for name, mine in names.items()),
        rule(f"{theirs}.merger.ln_q.{{p}}", "connector.norm.{p}"),
        rule(f"{theirs}.merger.mlp.0.{{p}}", "connector.up_proj.{p}"),
        rule(f"{theirs}.merger.mlp.2.{{p}}", "connector.down_proj.{p}"),
    ]


def read_tower(f: Fields) -> dict[str, Any]:
    """Keywords of a config from what both versions call the same on the Hub."""
    patch = f.take("patch_size", int, 14)
    f.require("spatial_patch_size", patch)
    rope = f.child("rope_parameters")
    rope.require("rope_theta", 10000.0)
    rope.require("rope_type", "axial")
    return {
        "num_layers": f.take("depth", int, 32, most=MOST_LAYERS), "num_heads": f.take("num_heads", int, 16),
        "num_channels": f.take("in_chans" if "in_chans" in f else "in_channels", int, 3), "patch_size": patch,
        "temporal_size": f.take("temporal_patch_size", int, 2), "merge_size": f.take("spatial_merge_size", int, 2),
        "std": f.take("initializer_range", float, 0.02),
    }  # fmt: skip


def write_tower(c: QwenVisionConfig) -> dict[str, Any]:
    """The reverse of `read_tower`."""
    return {
        "depth": c.num_layers, "num_heads": c.num_heads, "in_channels": c.num_channels, "patch_size": c.patch_size,
        "temporal_patch_size": c.temporal_size, "spatial_merge_size": c.merge_size, "initializer_range": c.std,
    }  # fmt: skip
