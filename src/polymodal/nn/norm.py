"""Norms as configs: a part names one and is built with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Division by the root mean square, computed in fp32, and a learned scale."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def normalised(self, x: Tensor) -> Tensor:
        y = x.float()
        return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        return self.weight.to(x.dtype) * self.normalised(x).to(x.dtype)


class OffsetRMSNorm(RMSNorm):
    """Gemma's: the scale is stored as its distance from one and applied before the cast."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__(dim, eps)
        nn.init.zeros_(self.weight)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        return (self.normalised(x) * (1 + self.weight.float())).to(x.dtype)


@dataclass(frozen=True, kw_only=True)
class RMS:
    """Root-mean-square norm."""

    eps: float = 1e-6

    def build(self, dim: int) -> nn.Module:
        return RMSNorm(dim, self.eps)


@dataclass(frozen=True, kw_only=True)
class OffsetRMS:
    """Root-mean-square norm whose weight is the distance of the scale from one."""

    eps: float = 1e-6

    def build(self, dim: int) -> nn.Module:
        return OffsetRMSNorm(dim, self.eps)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Layer norm."""

    eps: float = 1e-5

    def build(self, dim: int) -> nn.Module:
        return nn.LayerNorm(dim, eps=self.eps)


Norm: TypeAlias = RMS | OffsetRMS | Layer
