"""The head of language models: the loss of the next token."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from polymodal.core.batch import Loss

IGNORE = -100  # the label of a token that is not learned: prompts, placeholders, padding
_CHUNK = 4096  # logits of so many tokens at a time


def next_token_loss(
    hidden: Float[Tensor, "batch tokens dim"],
    labels: Int[Tensor, "batch tokens"],
    logits: Callable[[Tensor], Tensor],
) -> Loss:
    """Cross-entropy of each label given the tokens before it; its weight is the number of supervised tokens.

    Logits are computed only where a label is, and in chunks whose graph is made anew in the backward pass: a vocabulary
    of 150,000 would else take more memory than the model.

    Args:
        hidden: vectors after the last norm.
        labels: ids, `IGNORE` where nothing is learned; not shifted: ``labels[i]`` is the token at place ``i``.
        logits: the output layer.
    """
    labels = labels[:, 1:]
    keep = labels != IGNORE
    rows, wanted = hidden[:, :-1][keep], labels[keep]
    total = hidden.sum() * 0.0  # a batch without a label still has a gradient
    right = torch.zeros((), device=hidden.device)

    def part(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits(x).float()
        return F.cross_entropy(scores, y, reduction="sum"), (scores.detach().argmax(-1) == y).sum()

    for x, y in zip(rows.split(_CHUNK), wanted.split(_CHUNK), strict=True):
        several = len(rows) > _CHUNK and torch.is_grad_enabled()
        loss, hits = checkpoint(part, x, y, use_reentrant=False) if several else part(x, y)
        total, right = total + loss, right + hits
    weight = int(keep.sum())
    return Loss(total=total, weight=weight, metrics={"accuracy": right / max(weight, 1)})
