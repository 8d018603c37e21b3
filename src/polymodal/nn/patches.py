"""Pictures (or latents) as tokens, and back, in the order in which a convolution's kernel reads them."""

from __future__ import annotations

from einops import rearrange
from jaxtyping import Float
from torch import Tensor


def pack(x: Float[Tensor, "batch channels height width"], size: int) -> Float[Tensor, "batch patches values"]:
    """The values of each patch: channels, then rows, then columns (what FLUX calls packed latents)."""
    return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=size, q=size)


def unpack(
    patches: Float[Tensor, "batch patches values"], size: int, height: int, width: int
) -> Float[Tensor, "batch channels height width"]:
    """The inverse of `pack` for ``height`` x ``width`` values."""
    rows, columns = height // size, width // size
    return rearrange(patches, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, w=columns, p=size, q=size)
