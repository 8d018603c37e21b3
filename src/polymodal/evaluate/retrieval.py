"""Retrieval and zero-shot metrics."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def rank_of_positives(
    scores: Float[Tensor, "queries items"], positive: Bool[Tensor, "queries items"]
) -> Float[Tensor, " queries"]:
    """The tie-aware rank (0 is first) of the best positive of each query: better items plus half of its equals."""
    best = scores.masked_fill(~positive, -torch.inf).amax(1, keepdim=True)
    better = ((scores > best) & ~positive).sum(1)
    equal = ((scores == best) & ~positive).sum(1)
    return better + 0.5 * equal
