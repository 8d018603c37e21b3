"""A number as waves: how a network is told where between noise and data it is."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn


def waves(t: Shaped[Tensor, " batch"], dim: int, *, shortest: float, longest: float) -> Float[Tensor, "batch {dim}"]:
    """Sines, then cosines, of ``dim / 2`` periods from ``shortest`` to ``longest``, spaced by a constant factor.

    pi0 takes 0.004 to 4 for times from 0 to 1. "Attention is all you need", with its last frequency at 1 / 10,000, is
    2 pi to 20,000 pi, for whole steps.
    """
    assert dim % 2 == 0 < dim - 2, "waves come in pairs, of at least two periods"
    share = torch.linspace(0, 1, dim // 2, device=t.device, dtype=torch.float32)
    period = shortest * (longest / shortest) ** share
    angle = t.float()[:, None] * (2 * math.pi / period)
    return torch.cat([angle.sin(), angle.cos()], 1)


def step_waves(t: Shaped[Tensor, " batch"], dim: int, *, gap: int = 0) -> Float[Tensor, "batch {dim}"]:
    """Cosines, then sines, at ``dim / 2`` frequencies from 1 down to 1 / 10,000, for steps up to about 1,000.

    Args:
        t: steps; there may be fractions.
        dim: of the result.
        gap: 0 leaves the last frequency one short of 1 / 10,000 (the official code of ADM, DiT, SD 3 and FLUX), 1
            reaches it (Ho et al.'s, and diffusers' for DiT).
    """
    half = dim // 2
    place = torch.arange(half, device=t.device, dtype=torch.float32)
    angle = t.float()[:, None] * torch.exp(-math.log(10_000) * place / (half - gap))
    return torch.cat([angle.cos(), angle.sin()], 1)


class Embedder(nn.Module):
    """A vector for the residual stream's condition: two linear layers with a SiLU between them."""

    def __init__(self, in_dim: int, dim: int, out: int | None = None) -> None:
        super().__init__()
        self.up_proj = nn.Linear(in_dim, dim)
        self.down_proj = nn.Linear(dim, out or dim)

    def forward(self, x: Float[Tensor, "*batch in_dim"]) -> Float[Tensor, "*batch out"]:
        return self.down_proj(F.silu(self.up_proj(x)))
