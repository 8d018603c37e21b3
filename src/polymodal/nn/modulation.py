"""Layer norms that a condition scales, shifts and gates, and that start as nothing (adaLN-Zero).

Source: Peebles & Xie, "Scalable Diffusion Models with Transformers", 2022, https://arxiv.org/abs/2212.09748.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

EPS = 1e-6


class Modulation(nn.Module):
    """Vectors as wide as a token from a condition: a SiLU and a linear layer, which starts at zero."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.proj = nn.Linear(dim, count * dim)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, condition: Float[Tensor, "batch #tokens dim"]) -> tuple[Float[Tensor, "batch #tokens dim"], ...]:
        """``count`` vectors for all tokens of a row, or for each where each has its own condition."""
        return self.proj(F.silu(condition)).chunk(self.count, -1)


def modulated(
    x: Float[Tensor, "batch tokens dim"],
    shift: Float[Tensor, "batch #tokens dim"],
    scale: Float[Tensor, "batch #tokens dim"],
    *,
    eps: float = EPS,
) -> Float[Tensor, "batch tokens dim"]:
    """Normed without parameters, times one more than ``scale``, and shifted."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift
