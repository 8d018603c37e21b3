"""TokenLearner: a few tokens, each of them a weighted mean of all features of a picture.

Source: Ryoo et al. 2021, https://arxiv.org/abs/2106.11297, version 1.1 as in google-research/robotics_transformer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from polymodal.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TokenLearnerConfig:
    """How many tokens, and the width of the layer that weighs features for them."""

    num_tokens: int = 8
    hidden_dim: int = 64

    def __post_init__(self) -> None:
        if min(self.num_tokens, self.hidden_dim) < 1:
            raise ConfigError("a TokenLearner makes at least one token, through a layer of at least one dimension")


class TokenLearner(nn.Module):
    """The weights come from the normed features, what they weigh are the features themselves."""

    def __init__(self, config: TokenLearnerConfig, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.up_proj = nn.Linear(dim, config.hidden_dim)
        self.down_proj = nn.Linear(config.hidden_dim, config.num_tokens)

    @torch.no_grad()
    def init_weights(self) -> None:
        for layer in (self.up_proj, self.down_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)

    def forward(self, x: Float[Tensor, "images places dim"]) -> Float[Tensor, "images tokens dim"]:
        scores = self.down_proj(F.gelu(self.up_proj(self.norm(x)), approximate="tanh"))
        return scores.softmax(1).transpose(1, 2) @ x
