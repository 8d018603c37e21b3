"""DPO: a system learns to write the preferred one of two answers (Rafailov et al. 2023, arXiv 2305.18290).

    -log sigmoid(beta * ((log p(chosen) - log r(chosen)) - (log p(rejected) - log r(rejected))))

with p the system and r its reference; a log-probability is the sum over the tokens of the answer alone. All four are
given the whole prompt, pictures included: both rows of a pair hold them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from polymodal.core.batch import Batch, Loss
from polymodal.core.chat import Chat
from polymodal.core.errors import DataError, TrainError
from polymodal.data.rows import Media, lesson
from polymodal.train.policy import Policy

CHOSEN, REJECTED = "chosen_", "rejected_"


@dataclass(frozen=True, kw_only=True)
class Preference:
    """A chat up to where the assistant answers, and two answers to it."""

    chat: Chat
    chosen: str
    rejected: str


def read_preference(row: Any, media: Media) -> Preference:
    """A row as `data.rows.lesson` reads it, with ``chosen`` and ``rejected`` in the place of its answer.

    >>> pairs = open_dataset("pairs.jsonl", read=read_preference)  # {"image": ..., "question": ..., "chosen": ..., ...}

    Raises:
        DataError: an answer is missing, or the rest of the row is no question and no conversation.
    """
    if not isinstance(row, Mapping) or not all(isinstance(row.get(n), str) and row[n] for n in ("chosen", "rejected")):
        raise DataError("a preference is an object with the texts 'chosen' and 'rejected'")
    chosen, rejected = row["chosen"], row["rejected"]
    rest = {name: value for name, value in row.items() if name not in ("chosen", "rejected")}
    said = {"role": "assistant", "content": chosen}
    talk = next((name for name in ("messages", "conversations") if isinstance(rest.get(name), list)), None)
    chat = lesson(rest | ({"answer": chosen} if talk is None else {talk: [*rest[talk], said]}), media)
    return Preference(chat=replace(chat, turns=chat.turns[:-1]), chosen=chosen, rejected=rejected)


@dataclass(frozen=True)
class Preferences:
    """A source of pairs.

    Args:
        pairs: what to learn from.
        lesson: makes a batch of chats, as `Generator.lesson` does: media included, answers labelled.
    """

    pairs: Sequence[Preference]
    lesson: Callable[[Sequence[Chat]], Batch]

    def __len__(self) -> int:
        return len(self.pairs)

    def batch(self, indices: Sequence[int], rng: np.random.Generator) -> Batch:
        pairs = [self.pairs[i] for i in indices]
        out = Batch()
        for prefix, answers in ((CHOSEN, [p.chosen for p in pairs]), (REJECTED, [p.rejected for p in pairs])):
            rows = self.lesson([pair.chat.reply(answer) for pair, answer in zip(pairs, answers, strict=True)])
            # A picture is read again for the other answer: each branch has a whole batch of its own.
            out |= {prefix + name: tensor for name, tensor in rows.items()}
        return Batch(out)


class DPO(Policy):
    """Direct preference optimisation; reads the batches of `Preferences`.

    Args:
        policy: as of `Policy`, after supervised training on such answers.
        beta: how dear it is to leave the reference; 0.1 to 0.5 in the paper.
    """

    def __init__(self, policy: nn.Module, *, beta: float = 0.1) -> None:
        super().__init__(policy)
        if not beta > 0:
            raise TrainError(f"beta is {beta}: it should be positive")
        self.beta = beta

    def log_probs(self, batch: Batch) -> Float[Tensor, "models branches batch"]:
        """Of whole answers: by the policy and by the reference, of the chosen and of the rejected ones."""
        rows = Batch.join([branch(batch, CHOSEN), branch(batch, REJECTED)])
        sums = torch.stack([self.policy.log_probs(rows).sum(1), self.reference_log_probs(rows).sum(1)])
        return rearrange(sums, "models (branches batch) -> models branches batch", branches=2)

    def loss(self, batch: Batch) -> Loss:
        policy, reference = self.log_probs(batch)
        chosen, rejected = self.beta * (policy - reference)
        margin = chosen - rejected
        return Loss(
            total=-F.logsigmoid(margin).sum(),
            weight=len(margin),
            metrics={
                "chosen": chosen.detach().mean(), "rejected": rejected.detach().mean(),
                "margin": margin.detach().mean(), "preferred": (margin.detach() > 0).float().mean(),
            },
        )  # fmt: skip


def branch(batch: Batch, prefix: str) -> Batch:
    """The rows of the chosen or of the rejected answers."""
    return Batch({n.removeprefix(prefix): tensor for n, tensor in batch.items() if n.startswith(prefix)})
