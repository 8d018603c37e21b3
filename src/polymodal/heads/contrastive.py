"""Losses of the dual encoders, equal on one rank and on many."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from polymodal.core.batch import Loss
from polymodal.core.distributed import gather_with_grad, rank, ring_shift, world_size


def clip_loss(images: Float[Tensor, "batch dim"], texts: Float[Tensor, "batch dim"], scale: Float[Tensor, ""]) -> Loss:
    """Symmetric cross-entropy over all pairs of the global batch; inputs have unit length, ``scale`` multiplies.

    Each rank scores its own rows against the columns of all ranks. That equals the loss of one big batch only because
    the gradient flows back through the gather.

    Source: Radford et al. 2021, https://arxiv.org/abs/2103.00020, figure 3.
    """
    local = images.shape[0]
    labels = torch.arange(local, device=images.device) + rank() * local
    by_image = scale * images @ gather_with_grad(texts).T
    by_text = scale * texts @ gather_with_grad(images).T
    total = (F.cross_entropy(by_image, labels, reduction="sum") + F.cross_entropy(by_text, labels, reduction="sum")) / 2
    right = (by_image.detach().argmax(1) == labels).float().mean()
    return Loss(total=total, weight=local, metrics={"accuracy": right, "scale": scale.detach()})


def sigmoid_loss(
    images: Float[Tensor, "batch dim"],
    texts: Float[Tensor, "batch dim"],
    scale: Float[Tensor, ""],
    bias: Float[Tensor, ""],
) -> Loss:
    """Every pair of the global batch is its own yes/no question: +1 on the diagonal, -1 elsewhere.

    The sum over pairs is divided by the number of rows, not of pairs. Across ranks the text shards go round a ring, so
    that a rank never holds more than two of them.

    Source: Zhai et al. 2023, https://arxiv.org/abs/2303.15343, algorithm 1.
    """
    local = images.shape[0]
    logits = scale * images @ texts.T + bias
    # logsigmoid(-x) for all pairs, and the diagonal corrected: logsigmoid(x) = logsigmoid(-x) + x.
    total = F.softplus(logits).sum() - logits.diagonal().sum()
    other = texts
    for _ in range(world_size() - 1):
        other = ring_shift(other)
        total = total + F.softplus(scale * images @ other.T + bias).sum()
    right = (logits.detach().argmax(1) == torch.arange(local, device=logits.device)).float().mean()
    return Loss(total=total, weight=local, metrics={"accuracy": right, "scale": scale.detach(), "bias": bias.detach()})
