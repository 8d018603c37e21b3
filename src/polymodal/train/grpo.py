"""GRPO: a system learns to write answers that score above the others of their group (DeepSeekMath, Shao et al. 2024).

For each prompt the policy as it was at the last look, p', writes a group of answers (arXiv 2402.03300, section 4.1):

    A = (reward - mean of the group) / standard deviation of the group, the same for all tokens of an answer
    ratio = p(token) / p'(token);   d = log r(token) - log p(token), of the reference r
    loss = mean over answers of the mean over their tokens of
           -min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon) * A) + beta * (exp(d) - d - 1)

Answers are written by the one generation loop, with the pictures of their prompts, and scored with the same.

Deviations: with ``inner_steps`` the policy is looked at anew after so many optimiser steps, and each of these has
prompts of its own (the mini-batches of PPO), where Algorithm 1 may go over the same answers several times; its authors
went over them once. An answer is sampled at temperature 1 without filters, so that p' is what wrote it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from polymodal.core.batch import IGNORE, Batch, Loss
from polymodal.core.chat import Chat
from polymodal.core.errors import TrainError
from polymodal.core.verbs import Generates
from polymodal.samplers.autoregressive import Completion, Settings, Tokenizer, complete
from polymodal.train.policy import Policy

Reward = Callable[[int, str], float]  # the number of a prompt in its source, and an answer to it


@dataclass(frozen=True)
class Prompts:
    """A source of prompts, which a reward knows by their numbers.

    Args:
        chats: up to where the assistant answers.
        prompt: makes a batch of chats, as `Generates.prompt` does, media included.
    """

    chats: Sequence[Chat]
    prompt: Callable[[Sequence[Chat]], Batch]

    def __len__(self) -> int:
        return len(self.chats)

    def batch(self, indices: Sequence[int], rng: np.random.Generator) -> Batch:
        return Batch(self.prompt([self.chats[i] for i in indices]) | {"item": torch.tensor(indices)})


class GRPO(Policy):
    """Group relative policy optimisation; reads the batches of `Prompts`.

    Args:
        policy: as of `Policy`; it also writes (`Generates`).
        tokenizer: of the policy.
        rewards: functions by name; the reward of an answer is their sum.
        group: answers to each prompt; 64 in the paper.
        max_new_tokens: tokens of an answer at most; 1024 in the paper.
        epsilon: how far a ratio counts from one.
        beta: how dear it is to leave the reference; 0.04 in the paper.
        inner_steps: optimiser steps before the answers are those of the policy as it is now.

    Raises:
        TrainError: the policy does not write, or a number is out of its range.
    """

    def __init__(
        self,
        policy: nn.Module,
        *,
        tokenizer: Tokenizer,
        rewards: Mapping[str, Reward],
        group: int = 8,
        max_new_tokens: int = 256,
        epsilon: float = 0.2,
        beta: float = 0.04,
        inner_steps: int = 1,
    ) -> None:
        super().__init__(policy)
        if not isinstance(policy, Generates):
            raise TrainError(f"{type(policy).__name__} does not write answers")
        if group < 2 or not 0 < epsilon < 1 or not beta >= 0 or inner_steps < 1 or not rewards:
            raise TrainError(
                "GRPO needs group >= 2, 0 < epsilon < 1, beta >= 0, inner_steps >= 1 and a reward, not "
                f"{group}, {epsilon}, {beta}, {inner_steps} and {list(rewards)}"
            )
        self.tokenizer, self.rewards = tokenizer, dict(rewards)
        self.group, self.max_new_tokens = group, max_new_tokens
        self.epsilon, self.beta, self.inner_steps = epsilon, beta, inner_steps
        # The values at the last look of all that may learn, in the order of the parameters; kept in checkpoints.
        copies = [p.detach().clone() for p in policy.parameters() if p.requires_grad] if inner_steps > 1 else []
        self.looked = nn.ParameterList(nn.Parameter(copy, requires_grad=False) for copy in copies)
        self._learned = [p for p in policy.parameters() if p.requires_grad] if inner_steps > 1 else []

    def loss(self, batch: Batch) -> Loss:
        with self._as_looked_at():
            answers = self.write(batch)
            rows = self.answered(batch, answers)
            before = self._old_log_probs(rows) if self.inner_steps > 1 else None
        advantages, metrics = self._judge(batch, answers)
        now = self.policy.log_probs(rows)
        if now.shape != rows["labels"].shape:
            raise TrainError(f"{type(self.policy).__name__} here reads prompts with an encoder: GRPO is for decoders")
        old = now.detach() if before is None else before
        terms = surrogate(now, old, advantages[:, None], self.epsilon)
        if self.beta:
            distance = divergence(now, self.reference_log_probs(rows))
            metrics["kl"] = answer_means(distance.detach(), rows).mean()
            terms = terms + self.beta * distance
        with torch.no_grad():
            clipped = ((now - old).exp() - 1).abs() > self.epsilon
            metrics["clipped"] = answer_means(clipped.float(), rows).mean()
        return Loss(total=answer_means(terms, rows).sum(), weight=len(answers), metrics=metrics)

    def after_step(self, step: int, total_steps: int) -> None:
        super().after_step(step, total_steps)
        if step % self.inner_steps == 0:
            for kept, now in zip(self.looked, self._learned, strict=True):
                kept.copy_(now)

    def blocks(self) -> Iterable[nn.Module]:
        """None: processes that gather blocks together would have to write answers of equal lengths."""
        raise TrainError("GRPO trains with parallel='ddp', not 'fsdp': each process writes answers of its own length")

    # -- answers

    def write(self, batch: Batch) -> list[Completion]:
        """A group of answers to each prompt, one prompt after the other; random numbers are torch's global ones."""
        prompts = Batch({name: tensor for name, tensor in batch.items() if name != "item"})
        settings = Settings(max_new_tokens=self.max_new_tokens, temperature=1.0, n=self.group)
        training = self.policy.training
        self.policy.eval()
        try:
            return complete(self.policy, prompts, settings, self.tokenizer)
        finally:
            self.policy.train(training)

    def answered(self, batch: Batch, answers: Sequence[Completion]) -> Batch:
        """Each answer, labelled, behind its prompt and with its prompt's pictures."""
        rows = batch.take([answer.row for answer in answers])
        del rows["item"]
        lengths = rows["valid"].sum(1).tolist()
        wide = max(length + len(answer.ids) for length, answer in zip(lengths, answers, strict=True))
        grown = max(0, wide - rows["ids"].shape[1])
        rows["ids"] = F.pad(rows["ids"], (0, grown))
        rows["valid"] = F.pad(rows["valid"], (0, grown))
        rows["labels"] = torch.full_like(rows["ids"], IGNORE)
        for row, (length, answer) in enumerate(zip(lengths, answers, strict=True)):
            place = slice(length, length + len(answer.ids))
            rows["ids"][row, place] = rows["labels"][row, place] = torch.tensor(answer.ids, device=rows["ids"].device)
            rows["valid"][row, place] = True
        # A placeholder that the policy wrote stands for no picture: it is judged, but it and what follows are not read.
        wrong = self.policy.places(rows["labels"]).long()
        count = wrong.cumsum(1)
        rows["labels"].masked_fill_(count - wrong > 0, IGNORE)
        rows["ids"].masked_fill_(count > 0, 0)
        rows["valid"].masked_fill_(count > 0, False)
        return rows

    def _judge(self, batch: Batch, answers: Sequence[Completion]) -> tuple[Tensor, dict[str, Tensor]]:
        """The advantage of each answer, and what to log."""
        items = batch["item"].tolist()
        given = {
            name: torch.tensor([reward(items[a.row], a.text) for a in answers], dtype=torch.float32)
            for name, reward in self.rewards.items()
        }
        total = torch.stack(list(given.values())).sum(0)
        metrics = {f"reward/{name}": values.mean() for name, values in given.items()}
        metrics["length"] = torch.tensor([float(len(answer.ids)) for answer in answers]).mean()
        return advantages_of(total.view(-1, self.group)).flatten().to(batch["item"].device), metrics

    # -- the policy at the last look

    @torch.no_grad()
    def _old_log_probs(self, rows: Batch) -> Tensor:
        return self.policy.log_probs(rows)

    @contextlib.contextmanager
    def _as_looked_at(self) -> Iterator[None]:
        """Inside the block the policy has the values of the last look."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for kept, now in zip(self.looked, self._learned, strict=True):
            mine = now.clone()
            now.copy_(kept)
            kept.copy_(mine)


def advantages_of(rewards: Float[Tensor, "prompts group"]) -> Float[Tensor, "prompts group"]:
    """Rewards relative to their group; none where all are equal."""
    spread = rewards.std(1, keepdim=True)
    return (rewards - rewards.mean(1, keepdim=True)) / (spread + 1e-4)


def surrogate(
    now: Float[Tensor, "rows tokens"],
    old: Float[Tensor, "rows tokens"],
    advantages: Float[Tensor, "rows 1"],
    epsilon: float,
) -> Float[Tensor, "rows tokens"]:
    """The clipped loss of each token from its log-probabilities."""
    ratio = (now - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages)


def divergence(
    now: Float[Tensor, "rows tokens"], reference: Float[Tensor, "rows tokens"]
) -> Float[Tensor, "rows tokens"]:
    """An estimate of the divergence from the reference at each token that is never negative (k3 of Schulman 2020)."""
    d = reference - now
    return d.exp() - d - 1


def answer_means(terms: Float[Tensor, "rows tokens"], rows: Batch) -> Float[Tensor, " rows"]:
    """Over the tokens of each answer."""
    learned = rows["labels"] != IGNORE
    return (terms * learned).sum(1) / learned.sum(1)
