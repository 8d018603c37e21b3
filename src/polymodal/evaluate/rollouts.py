"""How good a world model's foresight is: how fast it goes wrong, and whether it does what it is told.

One step ahead almost everything is right, and a model that ignores its actions may still be. So frames are foreseen
from the model's own, next to what needs no model (`copy_last`, `Linear`), and the same past is given other actions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from polymodal.core.errors import DataError
from polymodal.evaluate.pictures import psnr, ssim
from polymodal.evaluate.text_metrics import Estimate, estimate

Imagine: TypeAlias = Callable[..., Tensor]
"""As `core.verbs.Imagines.imagine`: (frames, actions, seed=...) -> frames."""
EXACT: Final = 60.0  # decibels that a frame gets at the most: below that, 8 bits tell no difference
_OTHER: Final = 1 << 20  # between two seeds


# ---- what needs no model


def copy_last(
    frames: Float[Tensor, "batch context 3 height width"],
    actions: Float[Tensor, "batch steps action"],
    *,
    seed: int = 0,
) -> Float[Tensor, "batch future 3 height width"]:
    """Nothing moves any more."""
    return frames[:, -1:].expand(-1, actions.shape[1] + 1 - frames.shape[1], -1, -1, -1)


@dataclass(frozen=True, eq=False)
class Linear:
    """The next frame as a linear function of the last two and of the action, the same at every place.

    Attributes:
        weights: of the pixels around a place in both frames (the older first), of the action and of one.
        reach: how far around.
    """

    weights: Float[Tensor, "inputs 3"]
    reach: int

    @classmethod
    def fit(
        cls,
        frames: Float[Tensor, "films time 3 height width"],
        actions: Float[Tensor, "films time-1 action"],
        *,
        reach: int = 2,
    ) -> Linear:
        """By least squares (with a little ridge) over all places of all frames but the first two of each film.

        Raises:
            DataError: films of fewer than three frames.
        """
        if frames.shape[1] < 3:
            raise DataError(f"films of {frames.shape[1]} frames: a linear predictor reads two, and foresees a third")
        gram = right = torch.zeros((), dtype=torch.float64)
        for now in range(2, frames.shape[1]):
            x = _around(frames[:, now - 2 : now], actions[:, now - 1], reach).flatten(0, 1).double()
            gram = gram + x.T @ x
            right = right + x.T @ frames[:, now].flatten(2).transpose(1, 2).flatten(0, 1).double()
        ridge = 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        return cls(torch.linalg.solve(gram + ridge, right).float(), reach)

    def imagine(
        self,
        frames: Float[Tensor, "batch context 3 height width"],
        actions: Float[Tensor, "batch steps action"],
        *,
        seed: int = 0,
    ) -> Float[Tensor, "batch future 3 height width"]:
        """On from its own frames; a lone one stood still before."""
        size, seen = frames.shape[-2:], [frames[:, max(0, frames.shape[1] - 2)], frames[:, -1]]
        for action in actions[:, frames.shape[1] - 1 :].unbind(1):
            said = _around(torch.stack(seen[-2:], 1), action, self.reach) @ self.weights
            seen.append(said.transpose(1, 2).unflatten(2, size).clamp(0, 1))
        return torch.stack(seen[2:], 1)


def _around(
    pair: Float[Tensor, "films 2 3 height width"], action: Float[Tensor, "films action"], reach: int
) -> Float[Tensor, "films places inputs"]:
    near = F.unfold(pair.flatten(1, 2), 2 * reach + 1, padding=reach).transpose(1, 2)
    told = F.pad(action, (0, 1), value=1.0)[:, None].expand(-1, near.shape[1], -1)
    return torch.cat([near, told], 2)


# ---- how fast it goes wrong


@dataclass(frozen=True, eq=False)
class Growth:
    """How like the truth each foreseen frame is, film by film; `EXACT` decibels for the same frame."""

    psnr: Float[Tensor, "films steps"]
    ssim: Float[Tensor, "films steps"]

    def over(self, other: Growth, step: int, *, seed: int = 0) -> Estimate:
        """Decibels more than another way at a step (1 is the first), of the same films."""
        gain = (self.psnr - other.psnr)[:, step - 1]
        return estimate(gain.tolist(), bounds=(-EXACT, EXACT), seed=seed)


def growth(
    imagine: Imagine,
    frames: Float[Tensor, "films time 3 height width"],
    actions: Float[Tensor, "films time-1 action"],
    *,
    context: int,
    seed: int = 0,
) -> Growth:
    """Foresees all but the first ``context`` frames of films from these and the actions.

    Raises:
        DataError: nothing is left to be foreseen.
    """
    truth = frames[:, context:]
    if not context or not truth.shape[1]:
        raise DataError(f"{context} frames of films of {frames.shape[1]}: something is seen, and something foreseen")
    made = imagine(frames[:, :context], actions, seed=seed)
    scores = (score(made.flatten(0, 1), truth.flatten(0, 1)).unflatten(0, truth.shape[:2]) for score in (psnr, ssim))
    decibels, likeness = scores
    return Growth(decibels.clamp(max=EXACT), likeness)


# ---- does it do what it is told


@dataclass(frozen=True, kw_only=True)
class Counterfactual:
    """The same past with other actions. Distances are roots of mean squares over the frames to come.

    Attributes:
        response: between what is foreseen with the actions and with the others, from the same seed.
        spread: between what two seeds foresee with the same actions.
        true: between what happens with the actions and with the others.
        nearer: share of films whose foreseen other future is nearer to what would have happened than to what did.
        along: cosine between what the other actions change in the foreseen film, and in the true one.
    """

    response: float
    spread: float
    true: float
    nearer: Estimate
    along: Estimate


def counterfactual(
    imagine: Imagine,
    frames: Float[Tensor, "films time 3 height width"],
    actions: Float[Tensor, "films time-1 action"],
    instead: Float[Tensor, "films time 3 height width"],
    others: Float[Tensor, "films time-1 action"],
    *,
    context: int,
    seed: int = 0,
) -> Counterfactual:
    """Asks for both futures.

    Args:
        imagine: the model.
        frames: what happened with ``actions``.
        actions: up to the last frame.
        instead: what would have happened with ``others``; the first ``context`` frames are the same.
        others: the first ``context - 1`` are the same.
        context: how many frames are shown.
        seed: of what is foreseen.

    Raises:
        DataError: the two do not have the same past.
    """
    same = torch.equal(frames[:, :context], instead[:, :context])
    if not same or not torch.equal(actions[:, : context - 1], others[:, : context - 1]):
        raise DataError("other actions need the same past: its frames or its actions differ")
    past, happened, would = frames[:, :context], frames[:, context:], instead[:, context:]
    told, untold = (imagine(past, each, seed=seed) for each in (actions, others))
    again = imagine(past, actions, seed=seed + _OTHER)
    nearer = _distance(untold, would) < _distance(untold, happened)
    along = F.cosine_similarity((untold - told).flatten(1).double(), (would - happened).flatten(1).double())
    return Counterfactual(
        response=float(_distance(told, untold).mean()), spread=float(_distance(told, again).mean()),
        true=float(_distance(happened, would).mean()), nearer=estimate(nearer.double().tolist(), seed=seed),
        along=estimate(along.tolist(), bounds=(-1.0, 1.0), seed=seed),
    )  # fmt: skip


def _distance(one: Tensor, other: Tensor) -> Float[Tensor, " films"]:
    return (one - other).square().flatten(1).mean(1).sqrt()
