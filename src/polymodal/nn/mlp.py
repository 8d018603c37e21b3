"""Feed-forward layers and their activations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

ActivationName = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"]


def quick_gelu(x: Tensor) -> Tensor:
    """``x * sigmoid(1.702 x)``, what OpenAI trained CLIP with (close to GELU, but not equal)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "silu": F.silu,
}


class MLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, dim: int, hidden_dim: int, activation: ActivationName = "gelu", *, bias: bool = True) -> None:
        super().__init__()
        self.up_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        return self.down_proj(self.activation(self.up_proj(x)))


class GatedMLP(nn.Module):
    """``down(activation(gate(x)) * up(x))`` without biases, as the Llama family has it."""

    def __init__(self, dim: int, hidden_dim: int, activation: ActivationName = "silu", *, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
