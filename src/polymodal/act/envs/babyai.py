"""BabyAI: a grid world that is told in a small language (Chevalier-Boisvert et al., 2019, arXiv 1810.08272).

The levels and the bot that demonstrates are those of the package ``minigrid`` (3.1 and later). The agent sees the
seven by seven cells before it, eight pixels each. An action is a vector with a number for each of the seven discrete
ones, of which the largest is done; the bot gives one-hot vectors.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import minigrid
import numpy as np
from gymnasium import spaces
from minigrid.envs.babyai.core.verifier import GoToInstr, ObjDesc, PickupInstr
from minigrid.utils.baby_ai_bot import BabyAIBot

from polymodal.act.envs import check_task
from polymodal.act.envs.base import Action, Picture, RobotEnv, is_swapped
from polymodal.act.limits import Limits
from polymodal.core.errors import ConfigError

VIEW = 7  # cells


def tasks() -> list[str]:
    """Names of the levels without ``BabyAI-`` and ``-v0``."""
    if "BabyAI-GoToLocal-v0" not in gymnasium.registry:
        minigrid.register_minigrid_envs()
    return sorted(_names())


def _names() -> dict[str, str]:
    known = [name for name in gymnasium.registry if name.startswith("BabyAI-")]
    return {name.removeprefix("BabyAI-").rsplit("-v", 1)[0]: name for name in sorted(known)}


class BabyAI(RobotEnv):
    """One level; the state says which way the agent faces (right, down, left, up).

    Args:
        task: one of `tasks`.
        size: of the picture, a multiple of seven.
    """

    known_cameras = ("agent",)
    fps = 5  # nominal: nothing moves between two actions
    state_names = ("faces_right", "faces_down", "faces_left", "faces_up")
    action_names = ("left", "right", "forward", "pickup", "drop", "toggle", "done")

    def __init__(self, task: str = "GoToLocal", *, size: int = 56, cameras: Sequence[str] | None = None) -> None:
        check_task("babyai", task, tasks())
        if size % VIEW or size < VIEW:
            raise ConfigError(f"BabyAI draws {VIEW} cells of whole pixels: size is a multiple of {VIEW}, not {size}")
        self.task = task
        actions = len(self.action_names)
        super().__init__(
            size=size,
            cameras=cameras,
            action_space=spaces.Box(np.zeros(actions, np.float32), np.ones(actions, np.float32)),
        )
        self._grid: Any = gymnasium.make(_names()[task], disable_env_checker=True).unwrapped
        self._shown: Any = None
        self._taken: int | None = None  # the last action, for the bot

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed)
        self._success = self._success_shown = False
        self._shown = None
        for _ in range(100):
            with contextlib.redirect_stdout(io.StringIO()):  # it says there what it draws again
                self._grid.reset(seed=int(self.np_random.integers(2**31)))
            if not is_swapped(options) or self._swap():
                return self.observe(), self._info()
        raise self.cannot_swap(f"{self.task} is told of no single thing that has another beside it")

    def _swap(self) -> bool:
        """Tells another thing of the scene to go to or pick up; False where there is none that can be told apart."""
        shown = self._grid.instrs
        if type(shown) not in (GoToInstr, PickupInstr):
            return False
        meant = shown.desc.obj_set
        things = [cell for cell in self._grid.grid.grid if cell is not None and cell.type in ("key", "ball", "box")]
        others = [cell for cell in things if all((cell.type, cell.color) != (m.type, m.color) for m in meant)]
        if not others:
            return False
        other = others[self.np_random.integers(len(others))]
        self._grid.instrs = type(shown)(ObjDesc(other.type, other.color))
        self._grid.instrs.reset_verifier(self._grid)
        self._grid.mission = self._grid.instrs.surface(self._grid)
        self._shown = shown
        return not self._passes()

    def _passes(self) -> bool:
        """Whether the bot does what is shown on its way to what is told."""
        grid, shown = copy.deepcopy((self._grid, self._shown))
        bot, ended = BabyAIBot(grid), False
        while not ended:
            taken = bot.replan()
            _, _, done, cut, _ = grid.step(taken)
            shown.update_objs_poss()
            if shown.verify(taken) == "success":
                return True
            ended = done or cut
        return False

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        taken = int(np.argmax(self.action(action)))
        _, reward, ended, cut, _ = self._grid.step(taken)
        self._success = bool(ended and reward > 0)
        if self._shown is not None:
            self._shown.update_objs_poss()
            self._success_shown = self._shown.verify(taken) == "success"
        self._taken = taken
        return self.observe(), float(self._success), bool(ended) or self._success_shown, bool(cut), self._info()

    def picture(self, camera: str) -> Picture:
        return self._grid.get_frame(tile_size=self.size // VIEW, agent_pov=True).astype(np.uint8)

    def limits(self) -> Limits:
        """An action is a choice; ``done`` does nothing."""
        return self.limits_of(("choice",) * 7, rest=(*(0.0,) * 6, 1.0))

    def state(self) -> np.ndarray:
        return np.eye(4, dtype=np.float32)[self._grid.agent_dir]

    def expert(self) -> Callable[[], Action]:
        bot = BabyAIBot(self._grid)
        self._taken = None

        def act() -> Action:
            return np.eye(len(self.action_names), dtype=np.float32)[int(bot.replan(self._taken))]

        return act

    def close(self) -> None:
        self._grid.close()

    def _info(self) -> dict[str, Any]:
        info = {"instruction": str(self._grid.mission), "success": self._success}
        return info if self._shown is None else info | {"success_shown": self._success_shown}
