"""A question with its known answer, as every world asks it, and what a guess without looking is worth."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

PARAPHRASES: Final = 7  # wordings of each kind of question
HELD_OUT_PARAPHRASES: Final = frozenset({5, 6})  # the wordings that training never sees


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """One question and its answer, both in lower case; ``paraphrase`` is the number of its wording within the kind."""

    kind: str
    question: str
    answer: str
    paraphrase: int


def wording(rng: np.random.Generator, templates: Sequence[str], *, reworded: bool) -> tuple[int, str]:
    """A number and its template: one of those of training, or with ``reworded`` one of those that it never sees."""
    assert len(templates) == PARAPHRASES, f"{len(templates)} wordings, first {templates[0]!r}"
    numbers = [i for i in range(PARAPHRASES) if (i in HELD_OUT_PARAPHRASES) == reworded]
    number = numbers[rng.integers(len(numbers))]
    return number, templates[number]


def chance(*parts: str) -> float:
    """A number in [0, 1) that depends on the words alone: the same on every machine."""
    return int.from_bytes(hashlib.sha256("/".join(parts).encode()).digest()[:8], "big") / 2**64


def prior(asked: Iterable[Asked]) -> dict[str, float]:
    """Accuracy, for each kind, of always giving the kind's most frequent answer.

    A kind whose answer is fixed has a prior of 1; what says something about it is the rate at which the same answer is
    given, wrongly, to the kinds that share its wordings.
    """
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for one in asked:
        answers[one.kind][one.answer] += 1
    return {kind: max(counts.values()) / counts.total() for kind, counts in sorted(answers.items())}
