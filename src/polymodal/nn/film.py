"""FiLM: a vector scales and shifts the channels of a picture's features.

Source: Perez et al. 2017, https://arxiv.org/abs/1709.07871.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn


class FiLM(nn.Module):
    """``(1 + gamma) x + beta``; both start at zero, so that a fresh layer changes nothing."""

    def __init__(self, condition_dim: int, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Linear(condition_dim, dim)
        self.beta = nn.Linear(condition_dim, dim)

    def init_weights(self) -> None:
        for layer in (self.gamma, self.beta):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, x: Float[Tensor, "batch dim height width"], condition: Float[Tensor, "batch condition"]
    ) -> Float[Tensor, "batch dim height width"]:
        gamma, beta = (layer(condition)[:, :, None, None] for layer in (self.gamma, self.beta))
        return (1 + gamma) * x + beta
