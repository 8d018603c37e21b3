"""A residual MLP over single vectors."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from polymodal.nn.mlp import MLP


class ResidualMLP(nn.Module):
    """``x + mlp(norm(x))`` several times, each hidden layer twice as wide, and a last norm."""

    def __init__(self, dim: int, num_layers: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(num_layers))
        self.blocks = nn.ModuleList(MLP(dim, 2 * dim, "silu") for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return self.norm(x)
