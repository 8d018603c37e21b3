"""A residual MLP that regresses actions (OpenVLA-OFT's; https://arxiv.org/abs/2502.19645)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


class MLPResNetBlock(nn.Module):
    """``x + relu(fc(norm(x)))``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        return x + torch.relu(self.fc(self.norm(x)))


class MLPResNet(nn.Module):
    """Two blocks between linear layers: the vectors of one step's values -> these values."""

    def __init__(self, dim: int, action_dim: int) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(dim * action_dim)
        self.fc_in = nn.Linear(dim * action_dim, dim)
        self.blocks = nn.ModuleList(MLPResNetBlock(dim) for _ in range(2))
        self.norm_out = nn.LayerNorm(dim)
        self.fc_out = nn.Linear(dim, action_dim)

    def forward(self, x: Float[Tensor, "*batch vectors"]) -> Float[Tensor, "*batch action_dim"]:
        x = torch.relu(self.fc_in(self.norm_in(x)))
        for block in self.blocks:
            x = block(x)
        return self.fc_out(self.norm_out(x))
