"""Convolutions over films that never look ahead, and the wavelets that films are cut into patches by."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class CausalConv3d(nn.Conv3d):
    """A convolution that sees no later frame; in the place of frames before the first one it sees the first one.

    Of the frames that its stride takes together it sees all.

    Args:
        dim, out: channels.
        kernel: over time, height and width.
        stride: likewise.
        pad: zeros around each frame.
    """

    def __init__(
        self, dim: int, out: int, kernel: tuple[int, int, int] = (1, 1, 1), *,
        stride: tuple[int, int, int] = (1, 1, 1), pad: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(dim, out, kernel, stride)
        self.before, self.pad = kernel[0] - stride[0], pad
        assert self.before >= 0, "a stride is at most as long as its kernel"

    def forward(self, x: Float[Tensor, "batch dim frames height width"]) -> Float[Tensor, "batch out t h w"]:
        if self.before:
            x = torch.cat([x[:, :, :1].expand(-1, -1, self.before, -1, -1), x], 2)
        return super().forward(F.pad(x, (self.pad,) * 4) if self.pad else x)


class FactorisedConv3d(nn.Module):
    """Over space, then over time."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.space = CausalConv3d(dim, out, (1, 3, 3), pad=1)
        self.time = CausalConv3d(out, out, (3, 1, 1))

    def forward(self, x: Float[Tensor, "batch dim frames height width"]) -> Float[Tensor, "batch out frames h w"]:
        return self.time(self.space(x))


_AXES = (2, 3, 4)  # time, height, width


def haar(x: Float[Tensor, "batch dim frames height width"]) -> Float[Tensor, "batch dim8 t h w"]:
    """Sums and differences of neighbours, halved, along each axis: eight times the channels at half of each size.

    The first eighth of the channels are means; the last axis changes fastest.
    """
    parts = [x]
    for axis in _AXES:
        pairs = [part.unflatten(axis, (-1, 2)).unbind(axis + 1) for part in parts]
        parts = [half for a, b in pairs for half in ((a + b) / 2, (a - b) / 2)]
    return torch.cat(parts, 1)


def unhaar(x: Float[Tensor, "batch dim8 t h w"]) -> Float[Tensor, "batch dim frames height width"]:
    """The inverse of `haar`."""
    parts = list(x.chunk(8, 1))
    for axis in reversed(_AXES):
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts = [torch.stack([low + high, low - high], axis + 1).flatten(axis, axis + 1) for low, high in pairs]
    return parts[0]


def patches(x: Float[Tensor, "batch dim frames height width"], size: int) -> Float[Tensor, "batch channels t h w"]:
    """Films of ``1 + n * size`` frames as patches of ``size`` frames and pixels, by wavelets of wavelets.

    The first frame makes the first patch alone.
    """
    x = torch.cat([x[:, :, :1].expand(-1, -1, size - 1, -1, -1), x], 2)
    while size > 1:
        x, size = haar(x), size // 2
    return x


def unpatches(x: Float[Tensor, "batch channels t h w"], size: int) -> Float[Tensor, "batch dim frames height width"]:
    """The inverse of `patches`."""
    extra = size - 1
    while size > 1:
        x, size = unhaar(x), size // 2
    return x[:, :, extra:]
