"""When each word was said: where the decoder looked in the sound as it said it. Source: openai/whisper, timing.py."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from polymodal.core.transcript import Word

MEDIAN: Final = 7  # steps; a look aside that is shorter does not count


def smoothed(weights: Float[Tensor, "heads tokens steps"], width: int = MEDIAN) -> Float[Tensor, "tokens steps"]:
    """One matrix of what all heads looked at, each step normalised over the tokens, single steps smoothed away."""
    deviation, mean = torch.std_mean(weights, dim=-2, keepdim=True, correction=0)
    return median((weights - mean) / deviation.clamp(min=1e-12), width).mean(0)


def median(x: Float[Tensor, "heads tokens steps"], width: int) -> Float[Tensor, "heads tokens steps"]:
    """The median of ``width`` neighbours on the last axis, which is mirrored at its ends; short ones stay as they are.

    The width is odd.
    """
    half = width // 2
    if x.shape[-1] <= half:
        return x
    return F.pad(x, (half, half), mode="reflect").unfold(-1, width, 1).sort().values[..., half]


def warp(cost: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Dynamic time warping: the cheapest path of (row, column) from the first corner to the last, one step a time.

    The cells of a diagonal depend on the two before it only, and are computed together.
    """
    rows, columns = cost.shape
    total = np.full((rows + 1, columns + 1), np.inf, np.float64)
    came = np.full((rows + 1, columns + 1), 2, np.int8)  # 0: from both, 1: from the row before, 2: from the column
    total[0, 0], came[1:, 0] = 0, 1
    for diagonal in range(2, rows + columns + 1):
        i = np.arange(max(1, diagonal - columns), min(rows, diagonal - 1) + 1)
        j = diagonal - i
        both, above, left = total[i - 1, j - 1], total[i - 1, j], total[i, j - 1]
        choice = np.where((both < above) & (both < left), 0, np.where((above < both) & (above < left), 1, 2))
        total[i, j] = cost[i - 1, j - 1] + np.choose(choice, [both, above, left])
        came[i, j] = choice
    path, i, j = [], rows, columns
    while i > 0 or j > 0:
        path.append((i - 1, j - 1))
        step = came[i, j]
        i, j = i - (step != 2), j - (step != 1)
    row, column = np.array(path[::-1]).T
    return row, column


def word_times(
    weights: Float[Tensor, "heads tokens steps"], first: int, lengths: Sequence[int]
) -> list[tuple[int, int]]:
    """First and last step of each word.

    Args:
        weights: of the attention of a prompt, the tokens of all words and the end.
        first: place of the first word; a token is said at the place before its own.
        lengths: tokens of each word.
    """
    matrix = smoothed(weights.float())[first - 1 : -1]
    rows, columns = warp(-matrix.cpu().double().numpy())
    new = np.concatenate([[True], np.diff(rows) > 0])
    starts = columns[new]
    edges = [0, *itertools.accumulate(lengths)]
    return [(int(starts[a]), int(starts[b])) for a, b in itertools.pairwise(edges)]


_OPENING: Final = "\"'“¿([{-"
_CLOSING: Final = "\"'.。,，!！?？:：”)]}、"  # noqa: RUF001


def punctuated(words: Sequence[Word]) -> tuple[Word, ...]:
    """Marks as parts of the words that they belong to, which keep their times."""
    out: list[Word] = []
    for word in reversed(words):
        if out and word.text.startswith(" ") and word.text.strip() in _OPENING:
            out[-1] = replace(out[-1], text=word.text + out[-1].text)
        else:
            out.append(word)
    joined: list[Word] = []
    for word in reversed(out):
        if joined and not joined[-1].text.endswith(" ") and word.text in _CLOSING:
            joined[-1] = replace(joined[-1], text=joined[-1].text + word.text)
        else:
            joined.append(word)
    return tuple(joined)
