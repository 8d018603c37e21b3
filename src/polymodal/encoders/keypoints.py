"""Spatial softmax: where in a picture each feature is, as the mean place of its activation.

Source: Finn et al., "Deep Spatial Autoencoders for Visuomotor Learning", 2015, https://arxiv.org/abs/1509.06113; the
first layer and the names are robomimic's.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


class SpatialSoftmax(nn.Module):
    """``count`` features, each of which becomes one place; x before y, the corners are -1 and 1.

    Args:
        source: channels of what is read.
        grid: its rows and columns.
    """

    def __init__(self, source: int, count: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.nets = nn.Conv2d(source, count, 1)
        y, x = torch.meshgrid(torch.linspace(-1, 1, grid[0]), torch.linspace(-1, 1, grid[1]), indexing="ij")
        self.register_buffer("pos_grid", torch.stack([x.flatten(), y.flatten()], 1))

    def forward(self, x: Float[Tensor, "batch source rows columns"]) -> Float[Tensor, "batch count 2"]:
        weights = self.nets(x).flatten(2).float().softmax(-1)
        return (weights @ self.get_buffer("pos_grid").float()).to(x.dtype)
