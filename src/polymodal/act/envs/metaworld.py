"""Meta-World: fifty tasks of a robot arm on a table (Yu et al., 2019, arXiv 1910.10897).

The tasks and the scripted experts are those of the package ``metaworld`` (3.x), the words are ours. ``mt10`` and
``mt50`` are one environment each, in which every episode is of another task. Actions move the hand (x, y, z, each from
-1 to 1 for a centimetre) and close the gripper (from -1 to 1, in the package's sense a force), at 80 Hz.

**Deviations**: goals are drawn anew in each episode, and not from fifty that are drawn before; an episode ends when
the task is done. Pictures of ``corner2`` are turned upright.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from gymnasium import spaces

from polymodal.act.envs import check_task
from polymodal.act.envs.base import Action, Picture, RobotEnv, is_swapped
from polymodal.act.envs.metaworld_words import PARAPHRASES, WORDS
from polymodal.act.envs.render import Painter, mujoco  # before metaworld: it decides how MuJoCo draws
from polymodal.act.limits import Limits, Zone
from polymodal.core.errors import ConfigError

from metaworld.env_dict import ALL_V3_ENVIRONMENTS, MT10_V3  # isort: skip
from metaworld.policies import ENV_POLICY_MAP  # isort: skip

STEP: Final = 0.01  # metres that an action of 1 moves the hand
_SWING: Final = 2 * STEP  # metres that it may be out of its box
SETS: Final = {"mt10": tuple(MT10_V3), "mt50": tuple(ALL_V3_ENVIRONMENTS)}


def tasks() -> list[str]:
    """What can be made: sets of tasks, and single ones."""
    return [*SETS, *ALL_V3_ENVIRONMENTS]


class MetaWorld(RobotEnv):
    """One task or a set of them. ``reset(options={"task": "push-v3"})`` chooses one of a set.

    Args:
        task: one of `tasks`.
        cameras: ``corner2`` as in most papers, ``zoom`` on the middle of the table, ``wrist`` under the hand.
        privileged: the state is the package's 39 numbers with the objects and the goal, and not only the hand's four.
        reworded: tells in wordings that are otherwise never used.
    """

    known_cameras = ("corner2", "zoom", "wrist")
    fps = 80
    action_names = ("dx", "dy", "dz", "grip")

    def __init__(
        self,
        task: str = "mt10",
        *,
        size: int = 84,
        cameras: Sequence[str] | None = None,
        privileged: bool = False,
        reworded: bool = False,
    ) -> None:
        check_task("metaworld", task, tasks())
        self.names = SETS.get(task, (task,))
        self.task = self.names[0]  # until an episode begins
        self.privileged, self.reworded = privileged, reworded
        self.state_names = ("x", "y", "z", "opening")
        if privileged:
            self.state_names = tuple(f"obs{n}" for n in range(39))
        one = np.ones(4, np.float32)
        super().__init__(size=size, cameras=cameras, action_space=spaces.Box(-one, one))
        self._envs: dict[str, Any] = {}
        self._painters: dict[str, Painter] = {}
        self._zoom = mujoco.MjvCamera()
        self._zoom.lookat[:], self._zoom.distance = (0.0, 0.7, 0.13), 1.0
        self._zoom.azimuth, self._zoom.elevation = 125, -38

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed)
        if is_swapped(options):
            raise self.cannot_swap("what Meta-World shows is of one task")
        drawn = self.names[self.np_random.integers(len(self.names))]
        self.task = (options or {}).get("task", drawn)
        if self.task not in self.names:
            raise ConfigError(f"{self.task!r} is none of the tasks {', '.join(self.names)}")
        env = self._env
        env.seed(int(self.np_random.integers(2**31)))
        self._full, _ = env.reset()
        wordings = [text.format(WORDS[self.task]) for text in PARAPHRASES[self.reworded]]
        self.instruction = wordings[self.np_random.integers(len(wordings))]
        return self.observe(), self._info(False)

    @property
    def _env(self) -> Any:
        return self._env_of(self.task)

    def _env_of(self, task: str) -> Any:
        if task not in self._envs:
            env = ALL_V3_ENVIRONMENTS[task]()
            env._partially_observable = False  # the goal is for the expert; `state` hides it
            env._freeze_rand_vec, env._set_task_called, env.seeded_rand_vec = False, True, True
            del env.sawyer_observation_space
            self._envs[task] = env
        return self._envs[task]

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        self._full, reward, _, cut, info = self._env.step(self.action(action))
        done = bool(info["success"])
        return self.observe(), float(reward), done, bool(cut) and not done, self._info(done)

    def picture(self, camera: str) -> Picture:
        env = self._env
        if self.task not in self._painters:
            self._painters[self.task] = Painter(env.model, self.size)
        for name, place in env._target_site_config:  # the simulation forgets where goals are marked
            env.data.site(name).xpos = place[:3]
        view = {"corner2": "corner2", "zoom": self._zoom, "wrist": "gripperPOV"}[camera]
        picture = self._painters[self.task](env.data, view)
        return picture[::-1, ::-1].copy() if camera == "corner2" else picture

    def limits(self) -> Limits:
        """The hand moves by centimetres inside a box, of a set that around its tasks' boxes; the gripper takes a force.

        The package itself keeps the hand's target inside, and its experts lean against the box: they ask for a step
        more than there is. What is held here is the hand, which swings over its target.
        """
        tasks = [self._env_of(name) for name in self.names]
        low, high = np.min([e.mocap_low for e in tasks], 0) - _SWING, np.max([e.mocap_high for e in tasks], 0) + _SWING
        return self.limits_of(
            ("delta", "delta", "delta", "torque"),
            scale=(STEP, STEP, STEP, 1.0),
            measured=(0, 1, 2, -1),
            workspace=Zone(low=tuple(low.tolist()), high=tuple(high.tolist())),
        )

    def state(self) -> np.ndarray:
        return self._full[: None if self.privileged else 4].astype(np.float32)

    def expert(self) -> Callable[[], Action]:
        policy: Any = ENV_POLICY_MAP[self.task]()  # type: ignore[abstract]

        def act() -> Action:
            with warnings.catch_warnings():  # of gains that ask for more than an action can be
                warnings.simplefilter("ignore", UserWarning)
                return self.action(policy.get_action(self._full))

        return act

    def close(self) -> None:
        for painter in self._painters.values():
            painter.close()

    def _info(self, done: bool) -> dict[str, Any]:
        return {"instruction": self.instruction, "task": self.task, "success": done}
