"""Finite scalar quantisation: each of a few numbers is rounded to one of its levels; the codebook is all combinations.

Source: Mentzer et al., "Finite Scalar Quantization: VQ-VAE Made Simple", 2023, arXiv 2309.15505 (appendix A.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from polymodal.core.errors import ConfigError
from polymodal.tokenizers.rvq import Coded

MARGIN = 1e-3  # how far within (without, in `CosmosFSQ`) the outermost values the bound lies, as a share


@dataclass(frozen=True, kw_only=True)
class FiniteCodes:
    """The paper's; ``levels`` of each dimension."""

    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)

    def __post_init__(self) -> None:
        if not self.levels or min(self.levels) < 2 or math.prod(self.levels) > 2**31:
            raise ConfigError(f"levels {self.levels}: each is at least 2, and all together number the codes")

    @property
    def size(self) -> int:
        return math.prod(self.levels)

    @property
    def dim(self) -> int:
        return len(self.levels)

    def build(self) -> FSQ:
        return FSQ(self)


@dataclass(frozen=True, kw_only=True)
class CosmosCodes(FiniteCodes):
    """Those of the Cosmos tokenizers, whose bound is another one (`CosmosFSQ`)."""

    def build(self) -> FSQ:
        return CosmosFSQ(self)


class FSQ(nn.Module):
    """Bounds each number, rounds it, and lets the gradient pass; nothing is learned, and nothing is to be paid.

    A quantised number lies in [-1, 1]. The first dimension is the fastest digit of a code.
    """

    def __init__(self, config: FiniteCodes) -> None:
        super().__init__()
        self.config = config
        self.size, self.dim = config.size, config.dim

    def _table(self, like: Tensor) -> Float[Tensor, " dim"]:
        return torch.tensor(self.config.levels, dtype=torch.float32, device=like.device)

    def _basis(self, like: Tensor) -> Int[Tensor, " dim"]:
        return torch.tensor([math.prod(self.config.levels[:i]) for i in range(self.dim)], device=like.device)

    def bound(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Values that round to as many integers as there are levels; an even number of them is off centre by half."""
        levels = self._table(x)
        half = (levels - 1) * (1 - MARGIN) / 2
        offset = 0.5 * (levels % 2 == 0)
        return torch.tanh(x + torch.tan(offset / half)) * half - offset

    def round(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Quantised numbers; the gradient is that of `bound`."""
        bounded = self.bound(x.float())
        return (bounded + (bounded.round() - bounded).detach()) / (self._table(x) // 2)

    def code(self, x: Float[Tensor, "*batch dim"]) -> Int[Tensor, "*batch"]:
        """The codes of quantised numbers."""
        half = self._table(x) // 2
        return ((x * half + half).round().long() * self._basis(x)).sum(-1)

    def numbers(self, codes: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch dim"]:
        """The quantised numbers of codes."""
        half = self._table(codes) // 2
        return (codes[..., None] // self._basis(codes) % self._table(codes).long() - half) / half

    # -- what the quantisers of tokenizers/vq.py do, too

    def reset(self) -> None:
        """There is nothing to initialise."""

    def forward(self, x: Float[Tensor, "batch dim *grid"]) -> Coded:
        """The nearest points of the grid."""
        rounded = self.round(rearrange(x, "b d ... -> b ... d"))
        out = rearrange(rounded, "b ... d -> b d ...").to(x.dtype)
        return Coded(out, self.code(rounded.detach()), rounded.new_zeros(()))

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "batch dim *grid"]) -> Int[Tensor, "batch *grid"]:
        return self(x).codes

    def decode(self, codes: Int[Tensor, "batch *grid"]) -> Float[Tensor, "batch dim *grid"]:
        return rearrange(self.numbers(codes), "b ... d -> b d ...")


class CosmosFSQ(FSQ):
    """Its bound reaches a little beyond the outermost values, and maps zero to zero."""

    def bound(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        levels = self._table(x)
        half = (levels - 1) * (1 + MARGIN) / 2
        offset = 0.5 * (levels % 2 == 0)
        return torch.tanh(x + torch.atanh(offset / half)) * half - offset
