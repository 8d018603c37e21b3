"""Naming the class of a picture."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from polymodal.core.batch import Loss


def classification_loss(logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]) -> Loss:
    """Cross-entropy, summed over the batch."""
    total = F.cross_entropy(logits.float(), labels, reduction="sum")
    right = (logits.detach().argmax(1) == labels).float().mean()
    return Loss(total=total, weight=labels.shape[0], metrics={"accuracy": right})
