"""What the recipes of the table-top share: demonstrations in memory, lessons of them, and trials behind the guard."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cache
from itertools import count, islice
from typing import Final

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor, nn

from polymodal.act.chunks import Player, Receding
from polymodal.act.envs import make
from polymodal.act.guard import Guard
from polymodal.act.runner import Report
from polymodal.act.runner import run as run_loop
from polymodal.core.batch import Batch
from polymodal.core.observation import Observation
from polymodal.encoders.trunk import PixelTrunk, StateTrunk, TileTrunk
from polymodal.modalities.action import Statistics
from polymodal.recording import demonstrate
from polymodal.systems.acting import Policy
from polymodal.systems.behaviour import BehaviourCloning, BehaviourConfig
from polymodal.systems.chunk_heads import L1, Head
from polymodal.tokenizers.words import Words

TRIED: Final = 2**31  # the first seed of trials: those of demonstrations are below
FILLER: Final = "whatsoever"  # a word that no policy knows


@dataclass(frozen=True, kw_only=True)
class Demonstrations:
    """What a scripted expert saw and wanted, step by step, of all episodes one after the other."""

    states: np.ndarray
    actions: np.ndarray
    episode: np.ndarray  # which one a step belongs to
    told: tuple[str, ...]  # in each episode
    pictures: Mapping[str, np.ndarray] = field(default_factory=dict)  # of each camera

    @property
    def statistics(self) -> dict[str, Statistics]:
        return {"state": Statistics.from_array(self.states), "action": Statistics.from_array(self.actions)}

    def ahead(self, horizon: int) -> tuple[np.ndarray, Bool[Tensor, "steps horizon"]]:
        """For each step the numbers of those of its chunk, and which of them are of the same episode."""
        last = len(self.actions) - 1
        ahead = np.minimum(np.arange(last + 1)[:, None] + np.arange(horizon), last)
        return ahead, torch.from_numpy(self.episode[ahead] == self.episode[:, None])


def fresh(
    robot: str, shown: Demonstrations, trunk: StateTrunk | PixelTrunk | TileTrunk, head: Head, horizon: int
) -> BehaviourCloning:
    """A policy that knows the robot and the words of the demonstrations, and nothing else."""
    config = BehaviourConfig(
        trunk=trunk, head=head, words=Words.of(shown.told), horizon=horizon, action_width=shown.actions.shape[1]
    )
    model = BehaviourCloning.build(config)
    model.use_statistics({robot: shown.statistics})
    return model


@dataclass(frozen=True, kw_only=True)
class Cloning:
    """A task, what is recorded of it, and the policy that is to do it as the scripted expert does.

    Attributes:
        trunk: with the cameras and the size of their pictures.
        episodes: that are recorded.
        noise: that pushes the expert's hand, so that the way back is seen (`recording.demonstrate`).
        horizon: steps of a chunk.
        execute: how many of them are carried out.
        tried: episodes of each trial.
    """

    task: str
    trunk: PixelTrunk
    head: Head = field(default_factory=L1)
    episodes: int
    noise: float
    horizon: int
    execute: int
    tried: int = 100

    @cache  # noqa: B019
    def demonstrations(self) -> Demonstrations:
        """So many in which the expert succeeded."""
        cameras = self.trunk.cameras
        with closing(make(self.task, size=self.trunk.image_size, cameras=cameras)) as env:
            tried = (demonstrate(env, [0, number], self.noise) for number in count())
            done = list(islice((one for one in tried if one is not None), self.episodes))
        return Demonstrations(
            pictures={camera: np.concatenate([one.images[camera] for one in done]) for camera in cameras},
            states=np.concatenate([one.state for one in done]),
            actions=np.concatenate([one.action for one in done]),
            episode=np.repeat(np.arange(len(done)), [len(one.action) for one in done]),
            told=tuple(one.task for one in done),
        )

    def policy(self) -> BehaviourCloning:
        return fresh(self.task, self.demonstrations(), self.trunk, self.head, self.horizon)

    def lessons(self, steps: np.ndarray | None = None) -> Lessons:
        return Lessons(self.policy(), self.demonstrations(), framed, steps)

    def trials(self, model: nn.Module) -> dict[str, float]:
        """How often it succeeds in wordings that were never used, there with another target told than shown, too, and
        in combinations that were never told."""
        assert isinstance(model, BehaviourCloning)
        normal, swapped = self._try(model, "+reworded"), self._try(model, "+reworded", swapped=True)
        assert swapped.success_shown is not None
        return {
            "new wordings": normal.success.value,
            "swapped, told of normal": swapped.success.value / max(normal.success.value, 1 / self.tried),
            "swapped, shown left alone": 1 - swapped.success_shown.value,
            "new combinations": self._try(model, "+unseen").success.value,
        }

    def _try(self, model: BehaviourCloning, variants: str, *, swapped: bool = False) -> Report:
        with closing(make(self.task + variants, size=self.trunk.image_size, cameras=self.trunk.cameras)) as env:
            player = Player(model, Receding(execute=self.execute), generator=torch.Generator().manual_seed(0))
            guard = Guard(env.limits(), fps=env.fps)
            return run_loop(env, player, guard, episodes=self.tried, seed=TRIED, swapped=swapped)


def tried(model: Policy, task: str, episodes: int) -> Report:
    """Episodes that were never shown, in closed loop, behind a guard, of a policy that looks before each step."""
    with closing(make(task)) as env:
        player = Player(model, Receding(execute=1), generator=torch.Generator().manual_seed(0))
        return run_loop(env, player, Guard(env.limits(), fps=env.fps), episodes=episodes, seed=TRIED)


def as_told(told: str, rng: np.random.Generator) -> str:
    return told


def framed(told: str, rng: np.random.Generator) -> str:
    """Half of the instructions get unknown words before and behind them: a noun is to be known in any wording."""
    before, behind = rng.integers(4, size=2) * rng.integers(2)
    return " ".join([*[FILLER] * before, told, *[FILLER] * behind])


class Lessons:
    """Steps of demonstrations, each with the actions of the next steps.

    Args:
        worded: what is said of each.
        steps: numbers of those that are taught, one as often as it is there; all of them, if None.
    """

    def __init__(
        self,
        policy: Policy,
        shown: Demonstrations,
        worded: Callable[[str, np.random.Generator], str] = as_told,
        steps: np.ndarray | None = None,
    ) -> None:
        self._policy, self._shown, self._worded = policy, shown, worded
        self._ahead, self._valid = shown.ahead(policy.horizon)
        self._steps = np.arange(len(shown.actions)) if steps is None else steps

    def __len__(self) -> int:
        return len(self._steps)

    def batch(self, indices: Sequence[int], rng: np.random.Generator) -> Batch:
        shown, rows = self._shown, self._steps[list(indices)]
        seen = [
            Observation(
                images={camera: pictures[row] for camera, pictures in shown.pictures.items()},
                state=shown.states[row],
                instruction=self._worded(shown.told[shown.episode[row]], rng),
            )
            for row in rows
        ]
        return self._policy.lesson(seen, torch.from_numpy(shown.actions[self._ahead[rows]]), self._valid[rows])


class Ready:
    """Lessons that were made at once: of single steps, the bookkeeping can cost as much as the training."""

    def __init__(self, lessons: Batch) -> None:
        self.lessons = lessons

    def __len__(self) -> int:
        return self.lessons.size

    def batch(self, indices: Sequence[int], rng: np.random.Generator) -> Batch:
        return self.lessons.take(indices)


def at_once(policy: Policy, shown: Demonstrations) -> Ready:
    """Every step of demonstrations that need no new words or pictures each time."""
    lessons = Lessons(policy, shown)
    return Ready(lessons.batch(range(len(lessons)), np.random.default_rng(0)))
