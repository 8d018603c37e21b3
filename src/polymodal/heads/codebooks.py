"""The head of models that write several codes a step: a table and an output layer for each codebook."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from polymodal.core.batch import IGNORE, Loss
from polymodal.nn.init import cut_normal_


class Codebooks(nn.Module):
    """The codes of a step enter as the sum of their vectors and leave as scores, book by book.

    Each table has one row more than its book, `special_id`: what stands where a book has no code.
    """

    def __init__(self, num_codebooks: int, codebook_size: int, dim: int) -> None:
        super().__init__()
        self.special_id = codebook_size
        self.embed_tokens = nn.ModuleList(nn.Embedding(codebook_size + 1, dim) for _ in range(num_codebooks))
        self.lm_heads = nn.ModuleList(nn.Linear(dim, codebook_size, bias=False) for _ in range(num_codebooks))

    @torch.no_grad()
    def init_weights(self) -> None:
        """audiocraft's: normals of one over the root of the width."""
        for weight in self.parameters():
            cut_normal_(weight, weight.shape[1] ** -0.5)

    def embed(self, codes: Int[Tensor, "batch books steps"]) -> Float[Tensor, "batch steps dim"]:
        """Sums of the vectors of the codes of each step."""
        return torch.stack([table(book) for table, book in zip(self.embed_tokens, codes.unbind(1), strict=True)]).sum(0)

    def logits(self, x: Float[Tensor, "batch steps dim"]) -> Float[Tensor, "batch books steps codes"]:
        return torch.stack([head(x) for head in self.lm_heads], 1)

    def loss(self, x: Float[Tensor, "batch steps dim"], labels: Int[Tensor, "batch books steps"]) -> Loss:
        """Mean over the books of the mean cross-entropy of each; its weight is the largest number of labels of a book.

        Args:
            x: vectors after the last norm.
            labels: the codes that stand at these places, `IGNORE` where nothing is learned.
        """
        scores, known = self.logits(x).float(), labels != IGNORE
        each = F.cross_entropy(scores.movedim(3, 1), labels, ignore_index=IGNORE, reduction="none").sum((0, 2))
        counts = known.sum((0, 2))
        mean = (each / counts.clamp(min=1)).mean()
        right = ((scores.detach().argmax(3) == labels) & known).sum()
        return Loss(
            total=mean * counts.max(),
            weight=float(counts.max()),
            metrics={"accuracy": right / known.sum().clamp(min=1)},
        )
