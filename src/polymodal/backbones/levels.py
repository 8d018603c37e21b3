"""A Transformer that sees all of its input and is told which level of a residual code it writes (VALL-E's second)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from polymodal.core.errors import ConfigError
from polymodal.nn.attention import Attention
from polymodal.nn.mlp import MLP, ActivationName


@dataclass(frozen=True, kw_only=True)
class LevelConfig:
    """Pre-norm blocks whose norms know the level."""

    dim: int
    num_layers: int
    num_heads: int
    hidden_dim: int
    activation: ActivationName = "relu"

    def __post_init__(self) -> None:
        if self.dim % self.num_heads:
            raise ConfigError(f"a width of {self.dim} does not divide into {self.num_heads} heads")


class LevelNorm(nn.Module):
    """AdaLN: ``a * norm(x) + b``, both linear in the embedding of the level; at first ``norm(x)``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(dim, 2 * dim)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        nn.init.zeros_(self.modulation.weight)
        a, b = self.modulation.bias.chunk(2)
        a.fill_(1)
        b.zero_()

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], level: Float[Tensor, " dim"]
    ) -> Float[Tensor, "batch tokens dim"]:
        a, b = self.modulation(level).chunk(2)
        return a * nn.functional.layer_norm(x, x.shape[-1:]) + b


class LevelBlock(nn.Module):
    """Attention and feed-forward, each behind a norm that knows the level."""

    def __init__(self, config: LevelConfig) -> None:
        super().__init__()
        c = config
        self.attn_norm, self.mlp_norm = LevelNorm(c.dim), LevelNorm(c.dim)
        self.attn = Attention(c.dim, c.num_heads)
        self.mlp = MLP(c.dim, c.hidden_dim, c.activation)

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        level: Float[Tensor, " dim"],
        mask: Bool[Tensor, "batch 1 1 tokens"] | None,
    ) -> Float[Tensor, "batch tokens dim"]:
        x = x + self.attn(self.attn_norm(x, level), mask=mask)
        return x + self.mlp(self.mlp_norm(x, level))


class LevelTransformer(nn.Module):
    """Every token sees every valid one; ``num_levels`` levels."""

    def __init__(self, config: LevelConfig, num_levels: int) -> None:
        super().__init__()
        self.levels = nn.Embedding(num_levels, config.dim)
        self.blocks = nn.ModuleList(LevelBlock(config) for _ in range(config.num_layers))
        self.norm = LevelNorm(config.dim)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normals of 0.02 and no biases; the norms as they are built."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, LevelNorm):
                module.init_weights()
        nn.init.normal_(self.levels.weight, std=0.02)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], level: int, valid: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """Vectors after the last norm."""
        told = self.levels.weight[level]
        mask = None if bool(valid.all()) else valid[:, None, None]
        for block in self.blocks:
            x = block(x, told, mask)
        return self.norm(x, told)
