"""Numbers for dual encoders: retrieval, zero-shot classification, and how sure they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from polymodal.core.errors import DataError
from polymodal.core.interval import Interval, wilson


@dataclass(frozen=True, kw_only=True)
class RetrievalCard:
    """How well queries find what belongs to them, with what guessing would reach beside it."""

    recall: dict[int, Interval]  # by K: the share of queries with at least one positive in the first K
    chance: dict[int, float]  # the same for a random order
    median_rank: float  # of the best positive; 1 is perfect
    queries: int
    gallery: int


def ranks(
    scores: Float[Tensor, "queries gallery"], positives: Bool[Tensor, "queries gallery"]
) -> Float[Tensor, " queries"]:
    """How many stand before the best positive of each query: #(s > s+) + #(other s = s+) / 2, over the negatives.

    Ties cost half, so a model that scores everything alike does no better than chance, whatever the order of sorting.

    Raises:
        DataError: a query has no positive, or a score is not a number.
    """
    if not positives.any(1).all():
        raise DataError(f"query {int((~positives.any(1)).nonzero()[0])} has no positive")
    if scores.isnan().any():
        raise DataError("a score is not a number")
    best = scores.masked_fill(~positives, -math.inf).amax(1, keepdim=True)
    above = ((scores > best) & ~positives).sum(1)
    level = ((scores == best) & ~positives).sum(1)
    return above + level / 2


def retrieval(
    scores: Float[Tensor, "queries gallery"],
    positives: Bool[Tensor, "queries gallery"],
    at: Sequence[int] = (1, 5, 10),
) -> RetrievalCard:
    """Recall@K (any-of), median rank, and chance.

    Args:
        scores: higher is nearer.
        positives: which of the gallery belong to each query; at least one.
        at: the Ks.

    Raises:
        DataError: a query has no positive, or a score is not a number.
    """
    before = ranks(scores, positives)
    queries, gallery = scores.shape
    per_query = positives.sum(1).tolist()
    return RetrievalCard(
        recall={k: wilson(int((before < k).sum()), queries) for k in at},
        chance={k: sum(_chance(k, p, gallery) for p in per_query) / queries for k in at},
        median_rank=float(before.quantile(0.5)) + 1,
        queries=queries,
        gallery=gallery,
    )


def recall_at_k(scores: Float[Tensor, "queries gallery"], positives: Bool[Tensor, "queries gallery"], k: int) -> float:
    """The share of queries with at least one positive in the first ``k``, ties counted half."""
    return float((ranks(scores, positives) < k).float().mean())


def _chance(k: int, positives: int, gallery: int) -> float:
    """That at least one of ``positives`` is among ``k`` drawn from ``gallery`` without putting back."""
    if k >= gallery:
        return 1.0
    return 1.0 - math.comb(gallery - positives, k) / math.comb(gallery, k)


@dataclass(frozen=True, kw_only=True)
class ZeroShotCard:
    """How well pictures are put into classes that are only named."""

    top1: Interval
    top5: Interval
    balanced: float  # mean of the recalls of the classes that have pictures
    chance: float  # of top-1: one over the number of classes
    pictures: int
    classes: int


def class_vectors(prompts: Float[Tensor, "classes prompts dim"]) -> Float[Tensor, "classes dim"]:
    """One unit vector a class: the mean of its normalised prompt vectors, normalised again."""
    return F.normalize(F.normalize(prompts, dim=-1).mean(1), dim=-1)


def zero_shot(
    images: Float[Tensor, "images dim"],
    prompts: Float[Tensor, "classes prompts dim"],
    targets: Int[Tensor, " images"],
) -> ZeroShotCard:
    """Zero-shot accuracy by cosine to the class vectors; ties cost half, as in `ranks`.

    Args:
        images: vectors of the pictures, of any length.
        prompts: vectors of the prompts of each class.
        targets: the class of each picture.

    Raises:
        DataError: a target is no class, or there are no pictures.
    """
    classes = prompts.shape[0]
    if not len(targets) or int(targets.min()) < 0 or int(targets.max()) >= classes:
        raise DataError(f"targets have to be at least one number from 0 to {classes - 1}")
    scores = F.normalize(images, dim=-1) @ class_vectors(prompts).T
    before = ranks(scores, F.one_hot(targets.long(), classes).bool())
    right = (before < 1).double()
    found = torch.zeros(classes, dtype=torch.double).index_add_(0, targets.long(), right)
    held = torch.bincount(targets, minlength=classes)
    return ZeroShotCard(
        top1=wilson(int(right.sum()), len(targets)),
        top5=wilson(int((before < 5).sum()), len(targets)),
        balanced=float((found[held > 0] / held[held > 0]).mean()),
        chance=1 / classes,
        pictures=len(targets),
        classes=classes,
    )
