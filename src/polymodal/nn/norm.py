"""Norms as configs: a part names one and is built with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def normalised(x: Tensor, eps: float) -> Tensor:
    """Divided by the root mean square of the last axis, in fp32."""
    y = x.float()
    return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)


class RMSNorm(nn.Module):
    """Division by the root mean square, computed in fp32, and a learned scale."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        return self.weight.to(x.dtype) * normalised(x, self.eps).to(x.dtype)


class OffsetRMSNorm(RMSNorm):
    """Gemma's: the scale is stored as its distance from one and applied before the cast."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__(dim, eps)
        nn.init.zeros_(self.weight)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        return (normalised(x, self.eps) * (1 + self.weight.float())).to(x.dtype)


class HeadNorm(nn.Module):
    """Layer norm of the vectors of attention's heads, with a scale and a shift of each head's own (Chameleon)."""

    def __init__(self, num_heads: int, head_dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_heads, head_dim))
        self.bias = nn.Parameter(torch.zeros(num_heads, head_dim))

    def forward(self, x: Float[Tensor, "batch heads tokens head_dim"]) -> Float[Tensor, "batch heads tokens head_dim"]:
        return F.layer_norm(x, x.shape[-1:], eps=self.eps) * self.weight[:, None] + self.bias[:, None]


class AdaptiveRMSNorm(nn.Module):
    """Scaled and shifted by a condition, which also gates what is computed from it (pi0.5's adaRMS).

    The map from the condition starts at zero: all that lies behind a gate adds nothing at first.
    """

    def __init__(self, dim: int, condition_dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.modulation = nn.Linear(condition_dim, 3 * dim)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], condition: Float[Tensor, "batch condition_dim"]
    ) -> tuple[Float[Tensor, "batch tokens dim"], Float[Tensor, "batch 1 dim"]]:
        """What was normed, and the gate."""
        scale, shift, gate = self.modulation(condition).unsqueeze(1).chunk(3, -1)
        return (normalised(x, self.eps) * (1 + scale.float()) + shift.float()).to(x.dtype), gate


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
class AdaptiveRMS:
    """Root-mean-square norm that a condition as wide as ``dim`` scales, shifts and gates."""

    eps: float = 1e-6

    def build(self, dim: int) -> nn.Module:
        return AdaptiveRMSNorm(dim, dim, self.eps)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Layer norm."""

    eps: float = 1e-5

    def build(self, dim: int) -> nn.Module:
        return nn.LayerNorm(dim, eps=self.eps)


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Layer norm of queries and keys with parameters of each head's own."""

    eps: float = 1e-5

    def build_heads(self, num_heads: int, head_dim: int) -> nn.Module:
        return HeadNorm(num_heads, head_dim, self.eps)


Norm: TypeAlias = RMS | OffsetRMS | Layer
