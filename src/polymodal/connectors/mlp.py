"""Connectors that map each feature by itself."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polymodal.nn.mlp import ACTIVATIONS, ActivationName


@dataclass(frozen=True, kw_only=True)
class Linear:
    """One linear layer (LLaVA 1.0, PaliGemma)."""

    bias: bool = True

    def build(self, source: int, target: int) -> Projector:
        return Projector([nn.Linear(source, target, bias=self.bias)])

    def count(self, tokens: int) -> int:
        """Tokens that so many features become."""
        return tokens


@dataclass(frozen=True, kw_only=True)
class MLP:
    """Linear layers with an activation between them (LLaVA 1.5 has two)."""

    layers: int = 2
    activation: ActivationName = "gelu"
    bias: bool = True

    def build(self, source: int, target: int) -> Projector:
        widths = [source, *[target] * self.layers]
        layers = [nn.Linear(a, b, bias=self.bias) for a, b in itertools.pairwise(widths)]
        return Projector(layers, self.activation)

    def count(self, tokens: int) -> int:
        return tokens


@dataclass(frozen=True, kw_only=True)
class WideMLP:
    """Three linear layers, GELU between them, the first four times as wide as what it reads (Prismatic's fused)."""

    def build(self, source: int, target: int) -> Projector:
        widths = [source, 4 * source, target, target]
        return Projector([nn.Linear(a, b) for a, b in itertools.pairwise(widths)])

    def count(self, tokens: int) -> int:
        return tokens


Connector: TypeAlias = Linear | MLP


@torch.no_grad()
def init_connector(connector: nn.Module, std: float = 0.02) -> None:
    """Normal weights and zero biases for every linear layer."""
    for layer in connector.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class Projector(nn.Module):
    """Linear layers, the activation between each two."""

    def __init__(self, layers: list[nn.Linear], activation: ActivationName = "gelu") -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.activation = ACTIVATIONS[activation]

    def init_weights(self) -> None:
        init_connector(self)

    def forward(self, x: Float[Tensor, "*batch source"]) -> Float[Tensor, "*batch target"]:
        for i, layer in enumerate(self.layers):
            x = layer(self.activation(x) if i else x)
        return x
