"""Heads that give a whole chunk of actions in one pass: their values (L1), or a class for each value (bins)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from polymodal.core.batch import Loss


def masked(error: Float[Tensor, "batch *shape"], mask: Bool[Tensor, "batch ..."] | None) -> Loss:
    """The errors that ``mask`` (it broadcasts; None keeps all) keeps, summed; the weight is their number."""
    if mask is None:
        return Loss(total=error.sum(), weight=error.numel())
    mask = mask.expand(error.shape)
    # Not a product: what is masked may be nothing that one can calculate with.
    return Loss(total=error.where(mask, 0.0).sum(), weight=int(mask.sum()))


class L1Head(nn.Module):
    """A linear layer to all values of a chunk, and their absolute error."""

    def __init__(self, dim: int, horizon: int, action_dim: int) -> None:
        super().__init__()
        self.horizon = horizon
        self.proj = nn.Linear(dim, horizon * action_dim)

    def forward(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch horizon action_dim"]:
        return rearrange(self.proj(x), "b (h a) -> b h a", h=self.horizon)

    def loss(
        self,
        x: Float[Tensor, "batch dim"],
        actions: Float[Tensor, "batch horizon action_dim"],
        mask: Bool[Tensor, "batch ..."] | None = None,
    ) -> Loss:
        """``mask`` is True for the steps or values that count."""
        return masked((self(x).float() - actions).abs(), mask)


_DIGIT = 16
NUM_BINS = _DIGIT * _DIGIT


def bins(values: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """The number of the bin, of 256 equal ones over [-1, 1], that each value lies in; those outside are at its ends."""
    return ((values + 1) * (NUM_BINS / 2)).floor().clamp(0, NUM_BINS - 1).long()


def centres(numbers: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The middles of bins."""
    return (numbers.float() + 0.5) * (2 / NUM_BINS) - 1


class BinsHead(nn.Module):
    """One of 256 classes for each value of a chunk, as two digits of 16: the second is told the first.

    The chain rule makes this a distribution over all 256 bins, any of them, for 32 scores instead of 256; a softmax
    over 256 classes for each value would cost more than the rest of a small policy.

    Args:
        width: of the vector that says all about one value.
    """

    def __init__(self, dim: int, horizon: int, action_dim: int, width: int = 32) -> None:
        super().__init__()
        self.horizon, self.width = horizon, width
        self.proj = nn.Linear(dim, horizon * action_dim * width)
        self.first = nn.Linear(width, _DIGIT)
        self.embed_first = nn.Embedding(_DIGIT, width)
        self.second = nn.Linear(width, _DIGIT)

    def forward(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch horizon action_dim width"]:
        """A vector for each value."""
        return rearrange(self.proj(x), "b (h a w) -> b h a w", h=self.horizon, w=self.width)

    def scores(
        self, vectors: Float[Tensor, "*values width"], first: Int[Tensor, "*values"]
    ) -> Float[Tensor, "*values digit"]:
        """Of the second digit, given the first."""
        return self.second(F.gelu(vectors + self.embed_first(first)))

    def loss(
        self,
        x: Float[Tensor, "batch dim"],
        actions: Float[Tensor, "batch horizon action_dim"],
        mask: Bool[Tensor, "batch ..."] | None = None,
    ) -> Loss:
        """Cross-entropy of the bins; ``mask`` is True for the steps or values that count."""
        vectors, numbers = self(x), bins(actions)
        first, second = numbers // _DIGIT, numbers % _DIGIT
        error = sum(
            F.cross_entropy(scores.flatten(0, 2).float(), digit.flatten(), reduction="none").view(digit.shape)
            for scores, digit in ((self.first(vectors), first), (self.scores(vectors, first), second))
        )
        assert isinstance(error, Tensor)
        return masked(error, mask)

    def log_probs(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch horizon action_dim bins"]:
        """Of every bin."""
        vectors = self(x)
        every = torch.arange(_DIGIT, device=x.device).expand(*vectors.shape[:-1], _DIGIT)
        second = self.scores(vectors.unsqueeze(-2).expand(*every.shape, -1), every).float().log_softmax(-1)
        return (self.first(vectors).float().log_softmax(-1).unsqueeze(-1) + second).flatten(-2)

    def likeliest(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch horizon action_dim"]:
        """The middle of the likeliest bin of each value."""
        return centres(self.log_probs(x).argmax(-1))
