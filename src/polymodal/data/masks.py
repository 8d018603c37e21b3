"""Which patches of a picture are hidden from a network that learns to fill them in."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Bool

_MIN_PATCHES = 4
_ASPECTS = (math.log(0.3), math.log(1 / 0.3))  # of a rectangle, height to width


def block_mask(rng: np.random.Generator, height: int, width: int, count: int) -> Bool[np.ndarray, "{height} {width}"]:
    """Hides random rectangles until about ``count`` patches are hidden, never more.

    Source: Bao et al. 2021 (BEiT), https://arxiv.org/abs/2106.08254, as DINOv2 uses it.
    """
    mask = np.zeros((height, width), bool)
    largest = height * width / 2
    while (left := count - int(mask.sum())) > 0:
        for _ in range(10):
            area = rng.uniform(min(_MIN_PATCHES, left), min(left, largest))
            aspect = math.exp(rng.uniform(*_ASPECTS))
            rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if rows >= height or columns >= width:
                continue
            top, start = rng.integers(height - rows + 1), rng.integers(width - columns + 1)
            block = mask[top : top + rows, start : start + columns]
            if 0 < block.size - int(block.sum()) <= left:
                block[:] = True
                break
        else:
            break  # nothing fits any more
    return mask


def block_masks(
    rng: np.random.Generator,
    pictures: int,
    height: int,
    width: int,
    *,
    ratios: tuple[float, float] = (0.1, 0.5),
    share: float = 0.5,
) -> Bool[np.ndarray, "{pictures} patches"]:
    """Masks for the global crops of a batch: ``share`` of them, chosen at random, have a part of ``ratios`` hidden.

    The parts are spread over the range: picture k of n draws from the k-th of n equal pieces of it, so that a batch of
    any size has easy and hard ones.
    """
    masks = np.zeros((pictures, height * width), bool)
    chosen = rng.permutation(pictures)[: int(pictures * share)]
    edges = np.linspace(*ratios, len(chosen) + 1)
    for picture, low, high in zip(chosen, edges, edges[1:], strict=False):
        masks[picture] = block_mask(rng, height, width, int(height * width * rng.uniform(low, high))).reshape(-1)
    return masks
