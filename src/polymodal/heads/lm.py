"""The head of language models: the loss of the next token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from polymodal.core.batch import IGNORE, Loss

_CHUNK = 4096  # logits of so many tokens at a time


def ahead(
    vectors: Float[Tensor, "batch tokens dim"], labels: Int[Tensor, "batch tokens"]
) -> tuple[Float[Tensor, "batch more dim"], Int[Tensor, "batch more"]]:
    """For the functions below, which shift by one: vectors that stand at their labels, what they read being shifted."""
    return F.pad(vectors, (0, 0, 0, 1)), F.pad(labels, (1, 0), value=IGNORE)


def next_token_loss(
    hidden: Float[Tensor, "batch tokens dim"],
    labels: Int[Tensor, "batch tokens"],
    logits: Callable[[Tensor], Tensor],
    weights: Float[Tensor, "batch *places"] | None = None,
    *,
    z_loss: float = 0.0,
) -> Loss:
    """Cross-entropy of each label given the tokens before it; its weight is the number of supervised tokens.

    Logits are computed only where a label is, and in chunks whose graph is made anew in the backward pass: a vocabulary
    of 150,000 would else take more memory than the model.

    Args:
        hidden: vectors after the last norm.
        labels: ids, `IGNORE` where nothing is learned; not shifted: ``labels[i]`` is the token at place ``i``.
        logits: the output layer.
        weights: how much each label counts, or each label of a row, instead of one.
        z_loss: so much of the squared logarithm of the softmax's divisor is added: logits do not drift (PaLM).
    """
    keep = labels[:, 1:] != IGNORE
    counted = hidden.new_ones(1, 1) if weights is None else weights.reshape(len(labels), -1)
    counted = counted.float().expand(labels.shape)[:, 1:][keep]
    total = hidden.sum() * 0.0  # a batch without a label still has a gradient
    right = torch.zeros((), device=hidden.device)

    def part(x: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits(x).float()
        hits = scores.detach().argmax(-1) == y
        cost = F.cross_entropy(scores, y, reduction="none")
        if z_loss:
            cost = cost + z_loss * scores.logsumexp(-1).square()
        return (w * cost).sum(), (w * hits).sum()

    for loss, hits in _in_chunks(part, hidden[:, :-1][keep], labels[:, 1:][keep], counted):
        total, right = total + loss, right + hits
    weight = float(len(counted) if weights is None else counted.sum())  # a dry run has no numbers to add up
    return Loss(total=total, weight=weight, metrics={"accuracy": right / (weight or 1.0)})


def next_token_log_probs(
    hidden: Float[Tensor, "batch tokens dim"],
    labels: Int[Tensor, "batch tokens"],
    logits: Callable[[Tensor], Tensor],
) -> Float[Tensor, "batch tokens"]:
    """Log-probability of each label given the tokens before it, in fp32; 0 where none is, and at the first place.

    Args:
        hidden, labels, logits: as of `next_token_loss`.
    """
    keep = labels[:, 1:] != IGNORE

    def part(x: Tensor, y: Tensor) -> Tensor:
        return -F.cross_entropy(logits(x).float(), y, reduction="none")

    none = torch.zeros(keep.shape, device=hidden.device)
    found = torch.cat(list(_in_chunks(part, hidden[:, :-1][keep], labels[:, 1:][keep])))
    return F.pad(none.masked_scatter(keep, found), (1, 0))


_Part = TypeVar("_Part")


def _in_chunks(part: Callable[..., _Part], rows: Tensor, *more: Tensor) -> Iterator[_Part]:
    several = len(rows) > _CHUNK and torch.is_grad_enabled()
    for chunk in zip(*(tensor.split(_CHUNK) for tensor in (rows, *more)), strict=True):
        yield checkpoint(part, *chunk, use_reentrant=False) if several else part(*chunk)
