"""Heads of BLIP-2's first stage: contrast by the query that fits best, and matching against hard negatives.

Source: Li et al. 2023, https://arxiv.org/abs/2301.12597, section 3.1; official code: salesforce/LAVIS.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from polymodal.core.errors import TrainError

SMOOTHING = 0.1


@dataclass(frozen=True, eq=False, kw_only=True)
class Contrast:
    """Scores of this rank's rows against those of all ranks, and the loss summed over the rows."""

    by_image: Float[Tensor, "rows all"]
    by_text: Float[Tensor, "rows all"]
    total: Float[Tensor, ""]


def best_cosines(
    images: Float[Tensor, "images queries dim"], texts: Float[Tensor, "texts dim"]
) -> Float[Tensor, "images texts"]:
    """The largest cosine among a picture's queries with each text; all vectors are of unit length."""
    return torch.einsum("iqd,td->iqt", images, texts).amax(1)


class QueryContrastiveHead(nn.Module):
    """A learned temperature, which divides, and symmetric cross-entropy with smoothed labels."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.07))

    def contrast(
        self,
        images: Float[Tensor, "rows queries dim"],
        texts: Float[Tensor, "rows dim"],
        all_images: Float[Tensor, "all queries dim"],
        all_texts: Float[Tensor, "all dim"],
        same: Bool[Tensor, "rows all"],
    ) -> Contrast:
        """Both directions; ``same`` is True where a row and a column are of one picture.

        The first four are unit vectors: of this rank, and gathered, with gradient, from all.
        """
        by_image = best_cosines(images, all_texts) / self.temperature
        by_text = best_cosines(all_images, texts).T / self.temperature
        share = same.float() / same.sum(1, keepdim=True)
        wanted = (1 - SMOOTHING) * share + SMOOTHING / same.shape[1]
        total = (
            F.cross_entropy(by_image, wanted, reduction="sum") + F.cross_entropy(by_text, wanted, reduction="sum")
        ) / 2
        return Contrast(by_image=by_image, by_text=by_text, total=total)


@torch.no_grad()
def hard_negatives(scores: Float[Tensor, "rows all"], same: Bool[Tensor, "rows all"]) -> Int[Tensor, " rows"]:
    """A column for each row that does not belong to it, drawn by the softmax of the scores.

    Raises:
        TrainError: all columns belong to a row: there is nothing to draw.
    """
    chances = (scores.softmax(1) + 1e-4).masked_fill(same, 0)  # the constant lets every negative be drawn
    if not bool((chances > 0).any(1).all()):
        raise TrainError("matching needs a pair of another picture in every batch: take a batch of at least two pairs")
    return torch.multinomial(chances, 1)[:, 0]


class MatchingHead(nn.Module):
    """Whether a text belongs to a picture: two scores of each query, averaged; the second is for yes."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2)

    def forward(self, x: Float[Tensor, "pairs queries dim"]) -> Float[Tensor, "pairs 2"]:
        return self.proj(x).mean(1)
