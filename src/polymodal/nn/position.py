"""Position tables of pictures: fixed sin-cos ones, and learned ones at a size they were not trained for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor


def sincos_2d(dim: int, height: int, width: int, *, apart: float = 1.0) -> Float[Tensor, "patches {dim}"]:
    """The 2-D sin-cos table of MAE: the first half of ``dim`` encodes x (width), the second half y (height).

    Neighbours are ``apart`` from each other.
    """
    assert dim % 4 == 0, "a 2-D sin-cos table needs a dim that 4 divides"
    omega = 1.0 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64, device="cpu") / (dim // 4))

    def axis(count: int) -> Tensor:
        angle = apart * torch.arange(count, dtype=torch.float64, device="cpu")[:, None] * omega
        return torch.cat([angle.sin(), angle.cos()], 1)

    x = axis(width)[None].expand(height, width, dim // 2)
    y = axis(height)[:, None].expand(height, width, dim // 2)
    return torch.cat([x, y], 2).reshape(height * width, dim).float()


def resize_grid(table: Float[Tensor, "source dim"], height: int, width: int) -> Float[Tensor, "{height*width} dim"]:
    """A learned square grid of positions at another size: bicubic, in fp32; the same tensor at its own size."""
    side = int(table.shape[0] ** 0.5)
    if (height, width) == (side, side):
        return table
    grid = rearrange(table.float(), "(h w) d -> 1 d h w", h=side)
    grid = F.interpolate(grid, size=(height, width), mode="bicubic", align_corners=False)
    return rearrange(grid, "1 d h w -> (h w) d").to(table.dtype)
