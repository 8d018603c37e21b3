"""What frozen vectors know: a linear probe and nearest neighbours."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from polymodal.core.errors import DataError
from polymodal.core.interval import Interval, wilson


def linear_probe(
    known: Float[Tensor, "known dim"],
    labels: Int[Tensor, " known"],
    asked: Float[Tensor, "asked dim"],
    answers: Int[Tensor, " asked"],
    *,
    decay: float = 1e-3,
) -> Interval:
    """Accuracy on ``asked`` of logistic regression fitted to ``known``, on features standardised by ``known``.

    The fit is convex and run to its end by L-BFGS from zero, so that it has no luck and no schedule; ``decay`` weighs
    half the squared norm of the weights against the mean cross-entropy.

    Raises:
        DataError: there is nothing to fit or to ask, or a vector is not finite.
    """
    _check(known, asked)
    known, asked = known.float(), asked.float()
    mean, std = known.mean(0), known.std(0).clamp_min(1e-6)
    x = (known - mean) / std
    with torch.inference_mode(False), torch.enable_grad():
        x, y = x.clone(), labels.clone()
        weight = torch.zeros(int(torch.cat([labels, answers]).max()) + 1, x.shape[1] + 1, requires_grad=True)
        fit = torch.optim.LBFGS([weight], max_iter=300, tolerance_change=1e-7, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            fit.zero_grad()
            loss = F.cross_entropy(F.linear(x, weight[:, :-1], weight[:, -1]), y)
            loss = loss + decay / 2 * weight[:, :-1].square().sum()
            loss.backward()
            return loss

        fit.step(closure)
    found = F.linear((asked - mean) / std, weight.detach()[:, :-1], weight.detach()[:, -1]).argmax(1)
    return wilson(int((found == answers).sum()), len(answers))


def nearest_neighbours(
    known: Float[Tensor, "known dim"],
    labels: Int[Tensor, " known"],
    asked: Float[Tensor, "asked dim"],
    answers: Int[Tensor, " asked"],
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> Interval:
    """Accuracy on ``asked`` when the ``k`` most similar of ``known`` vote, weighted by exp(cosine / temperature).

    Source: Wu et al. 2018, https://arxiv.org/abs/1805.01978, as DINO and DINOv2 evaluate.

    Raises:
        DataError: there is nothing to compare with or to ask, or a vector is not finite.
    """
    _check(known, asked)
    cosine, near = (F.normalize(asked.float(), dim=-1) @ F.normalize(known.float(), dim=-1).T).topk(min(k, len(known)))
    votes = torch.zeros(len(asked), int(torch.cat([labels, answers]).max()) + 1)
    votes.scatter_add_(1, labels[near], (cosine / temperature).softmax(1))
    return wilson(int((votes.argmax(1) == answers).sum()), len(answers))


def _check(known: Tensor, asked: Tensor) -> None:
    if not len(known) or not len(asked):
        raise DataError(f"{len(known)} known and {len(asked)} asked vectors: a probe needs some of each")
    if not (known.isfinite().all() and asked.isfinite().all()):
        raise DataError("a vector is not finite: the model that made it has diverged")
