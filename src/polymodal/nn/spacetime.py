"""Clips as patches of space at each moment, and clips of several sizes in one row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from polymodal.core.batch import Batch
from polymodal.core.errors import MediaError
from polymodal.core.packing import first_fit

NOBODY: Final = -1  # whose padding is


def patched(latents: Float[Tensor, "channels time height width"], size: int) -> tuple[Tensor, Tensor]:
    """Patches (tokens values) of a clip, and the time, row and column (tokens 3) of each.

    Raises:
        MediaError: the sides are no multiples of a patch.
    """
    time, height, width = latents.shape[1:]
    if height % size or width % size or not latents.numel():
        raise MediaError(f"latents of {time} x {height} x {width} do not divide into patches of {size} x {size}")
    patches = rearrange(latents, "c t (h p) (w q) -> (t h w) (c p q)", p=size, q=size)
    axes = [torch.arange(n, device=latents.device) for n in (time, height // size, width // size)]
    return patches, torch.cartesian_prod(*axes).view(-1, 3)


def unpatched(
    patches: Float[Tensor, "tokens values"], shape: tuple[int, int, int], size: int
) -> Float[Tensor, "channels time height width"]:
    """The clip of this time, height and width that these are the patches of."""
    time, height, width = shape
    return rearrange(
        patches, "(t h w) (c p q) -> c t (h p) (w q)", t=time, h=height // size, w=width // size, p=size, q=size
    )


def pack_clips(
    clips: Sequence[tuple[Tensor, Tensor]], texts: Sequence[Sequence[int]], *, capacity: int | None, pad_id: int
) -> Batch:
    """Rows of ``patches`` with their ``position`` and whose they are (``clip``), and the ``ids`` of each clip's text.

    Args:
        clips: `patched`.
        texts: of each.
        capacity: patches of a row; those of the longest clip if not given. What is longer has a row of its own.
        pad_id: fills texts up.
    """
    assert len(clips) == len(texts) > 0, "each clip has a text"
    lengths = [len(patches) for patches, _ in clips]
    rows = first_fit(lengths, capacity or max(lengths))
    width, most = max(sum(lengths[i] for i in row) for row in rows), max(map(len, rows))
    words = max(map(len, texts))
    first = clips[0][0]
    patches = first.new_zeros(len(rows), width, first.shape[1])
    position = torch.zeros(len(rows), width, 3, dtype=torch.int64)
    owner = torch.full((len(rows), width), NOBODY)
    ids = torch.full((len(rows), most, words), pad_id)
    valid = torch.zeros(len(rows), most, words, dtype=torch.bool)
    for row, numbers in enumerate(rows):
        start = 0
        for place, number in enumerate(numbers):
            here = slice(start, start + lengths[number])
            patches[row, here], position[row, here], owner[row, here] = *clips[number], place
            ids[row, place, : len(texts[number])] = torch.tensor(texts[number])
            valid[row, place, : len(texts[number])] = True
            start += lengths[number]
    return Batch(patches=patches, position=position, clip=owner, ids=ids, valid=valid)
