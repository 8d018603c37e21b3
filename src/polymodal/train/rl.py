"""Practice: a policy tries scenes out, and does more of what went better than its other tries of the same scene.

    choice = what the policy answers + shift,  shift ~ Normal(0, deviation), one for all steps of an answer
    A = (reward - mean of the group) / standard deviation of the group, of some tries of one scene
    loss = mean over tries of the sum over answers of -A * discount^(answers that came after it) * log p(shift)

This is REINFORCE (Williams 1992, https://doi.org/10.1007/BF00992696) with the group of GRPO (arXiv 2402.03300) for a
baseline, so that no critic is learned. Each try serves one optimiser step, by the weights that made it: there is no
ratio to clip. It is for policies whose answer is a function of what they see (L1), in the units of their network.

What practice costs is the noise of its gradient. Deviations of single steps cancel each other out, and each has noise
of its own; a shift of all of them leads somewhere, and where an answer leads is then what is learned, not its shape.
What was done last has the most to do with how a try ended. Together they are worth 18 times as many tries at the
table-top (docs/decisions.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from polymodal.core.batch import Batch, Loss
from polymodal.core.errors import TrainError
from polymodal.core.observation import Observation
from polymodal.core.verbs import Acts, Trains, history_of
from polymodal.train.grpo import advantages_of

Attempt = Callable[[Acts, int], float]  # lets a policy try the scene of this number; gives its reward

_SAME = 1e-3  # of the network's units: what an answer may differ when it is worked out again among others


class Scenes:
    """A source of scenes by their numbers, from ``first`` on."""

    def __init__(self, count: int, *, first: int = 0) -> None:
        self._count, self._first = count, first

    def __len__(self) -> int:
        return self._count

    def batch(self, indices: Sequence[int], rng: np.random.Generator) -> Batch:
        return Batch(scene=torch.tensor(indices) + self._first)


class Exploring:
    """The `Acts` of a policy that does something near what it would do, and notes it.

    Args:
        policy: whose answers.
        execute: steps of a chunk that are carried out; it answers with no more.
        deviation: for each number of an action, of what it does from what it would do, in the network's units.
    """

    def __init__(self, policy: Any, execute: int, deviation: Float[Tensor, " action_width"]) -> None:
        self.policy, self.horizon, self.deviation = policy, execute, deviation
        self.action_dim, self.history = policy.action_dim, history_of(policy)
        self.seen: list[Batch] = []
        self.meant: list[Tensor] = []
        self.chosen: list[Tensor] = []

    def observe(self, observations: Sequence[Observation]) -> Batch:
        return self.policy.observe(observations)

    def act(
        self, batch: Batch, *, generator: torch.Generator | None = None
    ) -> Float[Tensor, "batch horizon action_dim"]:
        with self.policy.acting():
            mean = self.policy.chunk(batch.to(self.policy.device))[:, : self.horizon].float()
            choice = mean + self.deviation * torch.randn_like(mean[:, :1])
            self.seen.append(batch)
            self.meant.append(mean)
            self.chosen.append(choice)
            return self.policy.to_robot(choice).cpu()

    def lesson(self, observations: Any, actions: Any, valid: Any) -> Batch:
        return self.policy.lesson(observations, actions, valid)


class Practice(nn.Module):
    """Learns from `Scenes`, and from lessons as the policy does: a run clones first and practises then.

    Args:
        policy: a system that acts (`systems.acting.Policy`); it is ``policy`` in the names of parameters.
        attempt: carries out a try, behind a guard as always.
        execute: steps of a chunk that are carried out.
        deviation: see `Exploring`; 1 is half the range of an action. Numbers that have none are left as they are.
        group: tries of each scene.
        discount: what an answer has to do with how a try ended, for each that came after it.

    Raises:
        TrainError: the policy cannot be trained, or a number is out of its range; in training, it samples its answers.
    """

    deviation: Tensor

    def __init__(
        self,
        policy: nn.Module,
        attempt: Attempt,
        *,
        execute: int,
        deviation: Sequence[float],
        group: int = 8,
        discount: float = 0.8,
    ) -> None:
        super().__init__()
        if not isinstance(policy, Trains) or not isinstance(policy, Acts):
            raise TrainError(f"a {type(policy).__name__} cannot practise: it must act and have a loss")
        self.policy: Any = policy
        width = self.policy.action_width
        if not 1 <= execute <= policy.horizon or group < 2 or not 0 < discount <= 1:
            raise TrainError(
                f"practice takes 1 to {policy.horizon} steps, groups of 2 or more and a discount of 0 to 1, not "
                f"{execute}, {group} and {discount}"
            )
        if len(deviation) != width or not all(d >= 0 for d in deviation) or not any(deviation):
            raise TrainError(f"practice takes {width} deviations, none below 0 and one above, not {deviation}")
        self.attempt, self.execute, self.group, self.discount = attempt, execute, group, discount
        self.register_buffer("deviation", torch.tensor(deviation, dtype=torch.float32), persistent=False)

    def loss(self, batch: Batch) -> Loss:
        if "scene" not in batch:
            return self.policy.loss(batch)
        explorer = Exploring(self.policy, self.execute, self.deviation)
        rewards, lengths = self._try(explorer, batch["scene"].tolist())
        advantages = advantages_of(rewards).flatten().to(self.policy.device)
        seen = Batch.join(explorer.seen)
        mean = self._answers(seen.to(self.policy.device))
        if not torch.allclose(mean, torch.cat(explorer.meant), atol=_SAME):
            raise TrainError(
                f"{type(self.policy).__name__} answers differently each time: practice is not for samplers"
            )
        tried = self.deviation > 0
        shift = (torch.cat(explorer.chosen) - mean).mean(1)[:, tried] / self.deviation[tried]
        after = torch.cat([torch.arange(length).flip(0) for length in lengths]).to(advantages)
        credit = advantages.repeat_interleave(torch.tensor(lengths, device=advantages.device)) * self.discount**after
        total = (credit * shift.square().sum(1) / 2).sum()
        return Loss(total=total, weight=len(lengths), metrics={"reward": rewards.mean()})

    def _try(self, explorer: Exploring, scenes: Sequence[int]) -> tuple[Float[Tensor, "scenes group"], list[int]]:
        """The rewards of a group of tries of each scene, and how often each try chose."""
        rewards: list[float] = []
        ends = [0]
        training = self.policy.training
        self.policy.eval()
        try:
            for scene in scenes:
                for _ in range(self.group):
                    rewards.append(float(self.attempt(explorer, scene)))
                    ends.append(len(explorer.seen))
        finally:
            self.policy.train(training)
        return torch.tensor(rewards).view(len(scenes), self.group), np.diff(ends).tolist()

    def _answers(self, batch: Batch) -> Float[Tensor, "rows steps action_width"]:
        training = self.policy.training
        self.policy.eval()
        try:
            return self.policy.chunk(batch)[:, : self.execute].float()
        finally:
            self.policy.train(training)

    # -- the verb Trains

    def after_step(self, step: int, total_steps: int) -> None:
        self.policy.after_step(step, total_steps)

    def no_decay(self) -> Iterable[str]:
        return [f"policy.{name}" for name in self.policy.no_decay()]

    def blocks(self) -> Iterable[nn.Module]:
        return self.policy.blocks()
