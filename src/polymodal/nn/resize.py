"""Resizing pictures that are tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def shrunk(pixels: Float[Tensor, "batch 3 height width"], side: int) -> Float[Tensor, "batch 3 {side} {side}"]:
    """A square, bicubic from corner to corner, blurred before by as much as it shrinks (Stable Video Diffusion's)."""
    for axis in (2, 3):
        sigma = max((pixels.shape[axis] / side - 1) / 2, 0.001)
        size = int(max(4 * sigma, 3)) | 1
        place = torch.arange(size, device=pixels.device, dtype=pixels.dtype) - size // 2
        weight = torch.exp(-place.square() / (2 * sigma**2))
        shape = (1, 1, size, 1) if axis == 2 else (1, 1, 1, size)
        kernel = (weight / weight.sum()).view(shape).expand(pixels.shape[1], -1, -1, -1)
        reach = size // 2
        padded = F.pad(pixels, (0, 0, reach, reach) if axis == 2 else (reach, reach, 0, 0), mode="reflect")
        pixels = F.conv2d(padded, kernel, groups=pixels.shape[1])
    return F.interpolate(pixels, size=(side, side), mode="bicubic", align_corners=True)
