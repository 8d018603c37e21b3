"""The table-top from its state, all that can be drawn differing: clone a few demonstrations, then practise.

command   polymodal train recipes/nano/reach_rl.py --out runs/nano-reach-rl
machine   1 CPU core
time      4 minutes, of which a few seconds clone
expected  see `BARS`; in closed loop, in scenes that were never shown

The reward is that what was told succeeded. The policy practises behind the guard, in other scenes than it is tried out
in. What the clone reached before stands in the curve (``metrics.jsonl``).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final

from torch import nn

from polymodal.act.chunks import Player, Receding
from polymodal.act.guard import Guard
from polymodal.act.runner import run as run_loop
from polymodal.core.verbs import Acts
from polymodal.train.rl import Practice, Scenes
from polymodal.train.run import Bar, Cosine, Header, Run, Stage
from recipes.nano.stated import Pointed, Stated

REACH: Final = Stated(task="reach+randomised", episodes=80, noise=0.0, horizon=4, execute=4, dim=64)
DEVIATION: Final = (0.25, 0.25, 0.25, 0.0)  # what the closed hand is told moves nothing
PRACTISED: Final = 2**30  # the first scene of practice: those of trials are above
TRIED: Final = 200
# Set before the first run; the clone alone reached 0.575 of 200 episodes.
BARS: Final = {"new scenes": Bar(value=0.8)}


@dataclass(frozen=True, kw_only=True)
class Attempts:
    """Tries scenes of a task out, one episode each."""

    stated: Stated

    def __call__(self, policy: Acts, scene: int) -> float:
        player = Player(policy, Receding())
        return run_loop(self._env, player, self._guard, episodes=1, seed=scene).success.value

    @cached_property
    def _env(self) -> Pointed:
        return self.stated.env()

    @cached_property
    def _guard(self) -> Guard:
        return Guard(self._env.limits(), fps=self._env.fps)


def practice(stated: Stated) -> Practice:
    return Practice(stated.policy(), Attempts(stated=stated), execute=stated.execute, deviation=DEVIATION)


def run(stated: Stated = REACH, *, cloned: int = 900, practised: int = 80, tried: int = TRIED) -> Run:
    def evaluate(model: nn.Module) -> dict[str, float]:
        assert isinstance(model, Practice)
        return {"new scenes": stated.trial(model.policy, tried)[0].success.value}

    return Run(
        name="nano-reach-rl",
        header=Header(
            command="polymodal train recipes/nano/reach_rl.py --out runs/nano-reach-rl",
            machine="1 CPU core", time="4 minutes", expected="new scenes 0.80",
        ),
        model=lambda: practice(stated),
        stages=[
            Stage(
                name="clone", steps=cloned, batch_size=64, source=stated.lessons, lr=2e-3,
                schedule=Cosine(warmup=min(100, cloned // 10)), weight_decay=1e-4, betas=(0.9, 0.95), ema=0.99,
                workers=0,
            ),
            Stage(
                name="practise", steps=practised, batch_size=8, source=lambda: Scenes(2**20, first=PRACTISED), lr=5e-4,
                schedule=Cosine(warmup=min(5, practised // 10)), ema=0.9, workers=0,
                trainable={"policy.trunk": 1.0, "policy.head": 1.0},  # the words say nothing that the state does not
            ),
        ],
        evaluate=evaluate,
        expect=BARS,
    )  # fmt: skip
