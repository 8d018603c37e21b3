"""Numbers of actions and states as tokens: RT-1's bins, OpenVLA's last words of a vocabulary, RT-2's and pi0.5's texts.

All work on normalised numbers but `UniformBins`, which has limits of its own. Decoding takes valid ids only: the common
code clips, so that any word that a model writes moves a joint to the end of its range.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from polymodal.core.errors import ConfigError, MediaError


@dataclass(frozen=True, kw_only=True)
class UniformBins:
    """RT-1 (arXiv 2212.06817): ``count`` values from ``low`` to ``high``, both included, for each dimension.

    Their code cuts what lies between two values off; ours takes the nearer one, which halves the error.

    Attributes:
        low: of each dimension, in the units of what is encoded; ``high`` likewise.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    count: int = 256

    def __post_init__(self) -> None:
        if len(self.low) != len(self.high) or not all(a < b for a, b in zip(self.low, self.high, strict=True)):
            raise ConfigError(f"bins between {self.low} and {self.high}: a low below a high for each dimension")
        if self.count < 2:
            raise ConfigError(f"{self.count} bins: at least two")

    @property
    def step(self) -> Float[Tensor, " dim"]:
        return (torch.tensor(self.high) - torch.tensor(self.low)) / (self.count - 1)

    def encode(self, x: Float[Tensor, "*batch dim"]) -> Int[Tensor, "*batch dim"]:
        """What lies outside the limits takes the last bin."""
        bins = ((x - torch.tensor(self.low).to(x)) / self.step.to(x)).round()
        return _finite(bins).clamp(0, self.count - 1).long()

    def decode(self, bins: Int[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """The values of bins.

        Raises:
            MediaError: there is no such bin.
        """
        _check(bins, 0, self.count)
        return self.values(bins)

    def values(self, bins: Int[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """`decode` of bins that there are, without a look at them."""
        return bins * self.step.to(bins.device) + torch.tensor(self.low, device=bins.device)


@dataclass(frozen=True, kw_only=True)
class VocabularyBins:
    """OpenVLA (arXiv 2406.09246): the last ids of a vocabulary, in reverse, are bins of [-1, 1].

    ``count`` edges make ``count - 1`` bins; 1 itself, where clipped numbers lie, has an id of its own which decodes as
    the last bin.

    Attributes:
        vocab_size: of the tokenizer, without padding: 32000 for Llama 2, whose ids are 31744 to 31999.
    """

    vocab_size: int
    count: int = 256

    @property
    def first_id(self) -> int:
        return self.vocab_size - self.count

    def encode(self, x: Float[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
        """What lies outside [-1, 1] takes the last bin."""
        edges = torch.linspace(-1, 1, self.count, dtype=torch.float64, device=x.device)
        return self.vocab_size - torch.bucketize(_finite(x).double().clamp(-1, 1), edges, right=True)

    def decode(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """The middles of bins.

        Raises:
            MediaError: an id is a word and no bin.
        """
        _check(ids, self.first_id, self.vocab_size)
        edges = torch.linspace(-1, 1, self.count, dtype=torch.float64, device=ids.device)
        middles = ((edges[1:] + edges[:-1]) / 2).float()
        return middles[(self.vocab_size - ids - 1).clamp(max=self.count - 2)]

    def constraint(self, numbers: int, size: int, after: Sequence[int] = ()) -> Slots:
        """The answers of exactly so many bins, then the ids ``after``; ``size`` is how many scores the model gives."""
        bins = torch.zeros(size, dtype=torch.bool)
        bins[self.first_id : self.vocab_size] = True
        return Slots([bins] * numbers + only(after, size))


def only(ids: Sequence[int], size: int) -> list[Bool[Tensor, " vocab"]]:
    """For each id the mask that allows it alone."""
    return list(torch.nn.functional.one_hot(torch.tensor(ids, dtype=torch.long), size).bool())


class Slots:
    """A `Constraint` of the samplers: answers of a fixed length, of which each place has its own ids.

    Args:
        allowed: for each place, which ids of the vocabulary it may hold.
    """

    def __init__(self, allowed: Sequence[Bool[Tensor, " vocab"]]) -> None:
        self._allowed = allowed

    def start(self) -> SlotsGuide:
        return SlotsGuide(self._allowed)


class SlotsGuide:
    """Where one answer stands."""

    def __init__(self, allowed: Sequence[Bool[Tensor, " vocab"]], place: int = 0) -> None:
        self._allowed, self._place = allowed, place

    def allowed(self) -> Bool[Tensor, " vocab"]:
        return self._allowed[self._place]

    def take(self, token: int) -> None:
        assert self._allowed[self._place][token]
        self._place += 1

    @property
    def ended(self) -> bool:
        return self._place == len(self._allowed)

    def copy(self) -> SlotsGuide:
        return SlotsGuide(self._allowed, self._place)


@dataclass(frozen=True, kw_only=True)
class TextBins:
    """RT-2 (arXiv 2307.15818): an action as integers with blanks between them, ``1 128 91 241 5 101 127``.

    Its first number, whether the episode ends, is an action dimension like the others.
    """

    dim: int
    count: int = 256

    def encode(self, x: Float[Tensor, "batch dim"]) -> list[str]:
        """Of numbers in [-1, 1]; what lies outside takes the last bin."""
        bins = self._bins.encode(x)
        return [" ".join(map(str, row)) for row in bins.tolist()]

    def decode(self, texts: Sequence[str]) -> Float[Tensor, "batch dim"]:
        """The inverse of `encode`.

        Raises:
            MediaError: a text is not exactly such numbers.
        """
        for text in texts:
            if not re.fullmatch(self.pattern, text.strip()):
                raise MediaError(f"{text[:80]!r} is no action of {self.dim} integers below {self.count}")
        rows = [[int(word) for word in text.split()] for text in texts]
        return self._bins.decode(torch.tensor(rows, dtype=torch.long).reshape(-1, self.dim))

    @property
    def pattern(self) -> str:
        """A regular expression of the texts that are actions, for `samplers.constraints.Constraint.regex`."""
        number = "(?:" + "|".join(map(str, reversed(range(self.count)))) + ")"
        return " ".join([number] * self.dim)

    @property
    def _bins(self) -> UniformBins:
        return UniformBins(low=(-1.0,) * self.dim, high=(1.0,) * self.dim, count=self.count)


STATE_BINS: Final = 256


def state_text(state: Float[Tensor, "batch dim"]) -> list[str]:
    """Normalised states as pi0-FAST and pi0.5 read them: which of 256 bins of [-1, 1]; -1 below and 255 above them."""
    edges = torch.linspace(-1, 1, STATE_BINS + 1, dtype=torch.float64, device=state.device)[:-1]
    bins = torch.bucketize(_finite(state).double(), edges, right=True) - 1
    return [" ".join(map(str, row)) for row in bins.tolist()]


def _finite(x: Tensor) -> Tensor:
    if bool(x.isnan().any()):
        raise MediaError("an action or a state that is not a number (NaN) has no bin")
    return x


def _check(ids: Tensor, first: int, end: int) -> None:
    wrong = (ids < first) | (ids >= end)
    if bool(wrong.any()):
        raise MediaError(
            f"{ids[wrong].flatten()[:5].tolist()} are no actions, which have the ids {first} to {end - 1}: sample "
            "under the constraint, and they cannot occur"
        )
