"""A number as waves: how a network is told where between noise and data it is."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Shaped
from torch import Tensor


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
