"""Octo's head: a small residual network that says which noise is on a chunk of actions, given one vector.

Source: Octo Model Team 2024, https://arxiv.org/abs/2405.12213; octo-models/octo, ``diffusion.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from polymodal.core.errors import ConfigError
from polymodal.nn.init import lecun_normal_
from polymodal.nn.mlp import MLP


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Blocks of ``hidden_dim``, four times as wide inside, that know the step by ``time_dim`` waves.

    Attributes:
        steps: of the diffusion, all of which are taken to act.
        largest: no normalised number of an action is larger.
    """

    hidden_dim: int = 256
    num_layers: int = 3
    time_dim: int = 32
    steps: int = 20
    largest: float = 5.0

    def __post_init__(self) -> None:
        if self.time_dim % 2 or min(self.time_dim, self.steps) < 1 or self.largest <= 0:
            raise ConfigError("waves come in pairs, and a diffusion has steps and a range")


class ScoreNetwork(nn.Module):
    """The noise on a chunk of ``horizon`` actions, all of it at once."""

    def __init__(self, config: ScoreConfig, dim: int, horizon: int, action_width: int) -> None:
        super().__init__()
        c, values = config, horizon * action_width
        self.frequency = nn.Parameter(torch.empty(c.time_dim // 2))
        self.time_in = nn.Linear(c.time_dim, 2 * c.time_dim)
        self.time_out = nn.Linear(2 * c.time_dim, c.time_dim)
        self.read = nn.Linear(c.time_dim + dim + values, c.hidden_dim)
        self.norms = nn.ModuleList(nn.LayerNorm(c.hidden_dim, eps=1e-6) for _ in range(c.num_layers))
        self.blocks = nn.ModuleList(MLP(c.hidden_dim, 4 * c.hidden_dim, "silu") for _ in range(c.num_layers))
        self.write = nn.Linear(c.hidden_dim, values)

    @torch.no_grad()
    def init_weights(self) -> None:
        nn.init.normal_(self.frequency, std=0.2)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                lecun_normal_(module)
        for layer in (self.time_in, self.time_out, self.read, self.write):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        x: Float[Tensor, "batch horizon action_width"],
        step: Int[Tensor, " batch"],
        condition: Float[Tensor, "batch dim"],
    ) -> Float[Tensor, "batch horizon action_width"]:
        angle = step[:, None] * (2 * math.pi * self.frequency)
        time = self.time_out(nn.functional.silu(self.time_in(torch.cat([angle.cos(), angle.sin()], 1))))
        h = self.read(torch.cat([time, condition, x.flatten(1)], 1))
        for norm, block in zip(self.norms, self.blocks, strict=True):
            h = h + block(norm(h))
        return self.write(nn.functional.silu(h)).view(x.shape)
