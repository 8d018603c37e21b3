"""A small network that reads a noisy chunk of actions, how noisy it is, and what a trunk says: the model of a flow or
of a diffusion over actions."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polymodal.nn.residual import ResidualMLP
from polymodal.nn.time import waves

_WAVES = 64


class ChunkDenoiser(nn.Module):
    """A residual MLP over the whole chunk at once.

    Args:
        dim: of what the trunk says.
        hidden_dim: of this network.
    """

    def __init__(self, dim: int, horizon: int, action_dim: int, *, hidden_dim: int, num_layers: int) -> None:
        super().__init__()
        values = horizon * action_dim
        self.read = nn.Linear(values, hidden_dim)
        self.time = nn.Linear(_WAVES, hidden_dim)
        self.condition = nn.Linear(dim, hidden_dim)
        self.mix = ResidualMLP(hidden_dim, num_layers)
        self.write = nn.Linear(hidden_dim, values)

    def forward(
        self,
        x: Float[Tensor, "batch horizon action_dim"],
        t: Float[Tensor, " batch"],
        condition: Float[Tensor, "batch dim"],
    ) -> Float[Tensor, "batch horizon action_dim"]:
        """``t`` runs from 0, data, to 1, noise."""
        when = waves(t, _WAVES, shortest=4e-3, longest=4.0).to(x.dtype)
        h = self.read(x.flatten(1)) + self.time(when) + self.condition(condition)
        return self.write(self.mix(h)).view(x.shape)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Torch's own, and a first answer of zero."""
        nn.init.zeros_(self.write.weight)
        nn.init.zeros_(self.write.bias)
