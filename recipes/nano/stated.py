"""What is shared by those that clone a policy from a state at the table-top: where the thing is that is named.

It takes a fraction of what pictures and words take, for questions that are not about seeing or listening: what late
actions cost, what practice adds.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field
from functools import cache
from itertools import count, islice

import numpy as np
import torch

from polymodal.act.chunks import Playback, Player, Receding, Way
from polymodal.act.envs.tabletop import Tabletop
from polymodal.act.guard import Guard
from polymodal.act.runner import Report
from polymodal.act.runner import run as run_loop
from polymodal.core.batch import Batch
from polymodal.core.verbs import Acts
from polymodal.encoders.trunk import StateTrunk
from polymodal.recording import demonstrate
from polymodal.systems.behaviour import BehaviourCloning
from polymodal.systems.chunk_heads import L1, Head
from recipes.nano.acting import TRIED, Demonstrations, Ready, at_once, fresh


class Pointed(Tabletop):
    """The table-top whose state says where the thing is that is named; of pick-place also where the plate is, and where
    the hand was told to be, which the expert goes by."""

    def __init__(self, task: str) -> None:
        places = ("thing.x", "thing.y", "thing.z", "plate.x", "plate.y", "told.x", "told.y", "told.z")
        self.state_names = (*Tabletop.state_names, *places[: 3 if task.startswith("reach") else 8])
        super().__init__(task, cameras=())

    def state(self) -> np.ndarray:
        thing = self.data.xpos[self.things[self.told.colour, self.told.kind]]
        more = () if self.told.place is None else (*self._plate(self.told.place), *self.target)
        return np.array([*super().state(), *thing, *more], np.float32)


@dataclass(frozen=True, kw_only=True)
class Stated:
    """A task, what is recorded of it, and the policy that is to do it as the scripted expert does.

    Attributes:
        task: of the table-top.
        episodes: that are recorded.
        noise: that pushes the expert's hand, so that the way back is seen (`recording.demonstrate`).
        horizon: steps of a chunk.
        execute: how many of them are carried out.
    """

    task: str
    episodes: int
    noise: float
    horizon: int
    execute: int
    head: Head = field(default_factory=L1)
    dim: int = 128  # of the trunk
    num_layers: int = 2

    def env(self) -> Pointed:
        return Pointed(self.task)

    @cache  # noqa: B019
    def demonstrations(self) -> Demonstrations:
        """So many in which the expert succeeded."""
        with closing(self.env()) as env:
            tried = (demonstrate(env, [0, number], self.noise) for number in count())
            done = list(islice((one for one in tried if one is not None), self.episodes))
        return Demonstrations(
            states=np.concatenate([one.state for one in done]),
            actions=np.concatenate([one.action for one in done]),
            episode=np.repeat(np.arange(len(done)), [len(one.action) for one in done]),
            told=tuple(one.task for one in done),
        )

    def policy(self) -> BehaviourCloning:
        shown = self.demonstrations()
        trunk = StateTrunk(state_width=shown.states.shape[1], dim=self.dim, num_layers=self.num_layers)
        return fresh("tabletop", shown, trunk, self.head, self.horizon)

    def lessons(self) -> Ready:
        return at_once(self.policy(), self.demonstrations())

    def lessons_of_carrying(self) -> Ready:
        """Those of pick-place, and what was done in each: the way of the target, in which the noise is."""
        policy, shown = self.policy(), self.demonstrations()
        done, stayed = shown.actions.copy(), shown.episode[1:] == shown.episode[:-1]
        done[:-1, :3][stayed] = np.diff(shown.states[:, -3:], axis=0)[stayed]
        ahead, _ = shown.ahead(self.horizon)
        return Ready(Batch(at_once(policy, shown).lessons, done=policy.to_network(torch.from_numpy(done[ahead]))))

    def trial(
        self, policy: Acts, episodes: int, way: Way | None = None, *, seed: int = TRIED
    ) -> tuple[Report, list[Playback]]:
        """Episodes in closed loop, behind a guard; and what was measured of the chunks of each."""
        player = Player(policy, way or Receding(execute=self.execute), generator=torch.Generator().manual_seed(seed))
        played: list[Playback] = []
        with closing(self.env()) as env:
            guard = Guard(env.limits(), fps=env.fps)
            report = run_loop(
                env, player, guard, episodes=episodes, seed=seed, progress=lambda *_: played.append(player.played)
            )
        return report, played
