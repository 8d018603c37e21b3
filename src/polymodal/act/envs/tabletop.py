"""A table with coloured things and white plates, and words that say what goes where.

In each scene two colours meet two kinds of things, and the two plates look alike: who does not read the instruction
cannot know which of the things is meant, nor on which plate it belongs. Success is read from the simulator's state.

    red | green | blue | yellow  x  cube | cup | ball  x  left | right | near | far plate

A fixed quarter of these combinations is never told (`held_out`) unless ``+unseen`` asks for just those; in the same
way ``+reworded`` tells in wordings (`WORDINGS`) that are otherwise never used.

Actions are the motion of the gripper's target in metres (x to the right, y away from the first camera, z up) and its
opening from 0 to 1, at 10 Hz.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Final

import numpy as np
from gymnasium import spaces

from polymodal.act.envs import check_task
from polymodal.act.envs.base import Action, Picture, RobotEnv, is_swapped
from polymodal.act.envs.render import Painter, mujoco
from polymodal.act.envs.tabletop_model import HALF_HEIGHT, MUCH, Look, Randomisation, model_of
from polymodal.act.envs.tabletop_words import COLOURS, KINDS, PLACES, WORDINGS, Told, held_out
from polymodal.act.limits import Limits, Zone
from polymodal.core.errors import ConfigError

VARIANTS: Final = ("unseen", "reworded", "randomised")
STEP: Final = 0.025  # metres that the target moves in one action
REACH: Final = np.array([[-0.26, -0.22, 0.015], [0.26, 0.22, 0.25]])  # where it may be
_AREA = np.array([0.19, 0.14])  # where things are put, around the middle
_SUBSTEPS, _RAMP = 10, 5  # of physics in one action; pieces in which the target moves on
_HOVER, _GRASP = 0.12, 0.022  # heights of the finger tips
_NEAR = 0.025  # of the point above a thing: it is reached
_ON = 0.045  # of the middle of a plate: it is on the plate
_WHOLE: Final = mujoco.mjtState.mjSTATE_INTEGRATION  # of the physics, to the bit


class Tabletop(RobotEnv):
    """``reach`` asks to touch a thing, ``pick-place`` to put it on a plate.

    Args:
        task: one of these, with what differs behind it: ``pick-place+unseen+reworded+randomised``.
        kinds: of things; with one kind there is a thing of each colour.
        privileged: the state goes on with each thing's place, colour and kind and with the plates' places.
    """

    known_cameras = ("front", "wrist")
    fps = 10
    action_names = ("dx", "dy", "dz", "opening")
    state_names: tuple[str, ...] = ("x", "y", "z", "opening")

    def __init__(
        self,
        task: str = "pick-place",
        *,
        size: int = 64,
        cameras: Sequence[str] | None = None,
        kinds: Sequence[str] = KINDS,
        privileged: bool = False,
        randomisation: Randomisation | None = None,
    ) -> None:
        task, *variants = task.split("+")
        check_task("tabletop", task, tasks())
        for variant in variants:
            check_task(f"tabletop/{task}", variant, VARIANTS)
        if not kinds or not set(kinds) <= set(KINDS):
            raise ConfigError(f"the things of the table are {', '.join(KINDS)}, not {', '.join(kinds)}")
        self.task, self.kinds, self.privileged = task, tuple(kinds), privileged
        self.unseen, self.reworded = "unseen" in variants, "reworded" in variants
        if privileged:
            each = [*"xyz", *COLOURS, *KINDS]
            things = [f"thing{n}.{name}" for n in range(4) for name in each]
            self.state_names = (*self.state_names, *things, *(f"plate{n}.{axis}" for n in range(2) for axis in "xy"))
        low, high = np.array([-STEP, -STEP, -STEP, 0], np.float32), np.array([STEP, STEP, STEP, 1], np.float32)
        super().__init__(size=size, cameras=cameras, action_space=spaces.Box(low, high))
        self.model = model_of(self.kinds)
        self.data = mujoco.MjData(self.model)
        self._look = Look(self.model, randomisation or (MUCH if "randomised" in variants else Randomisation()))
        self._painter: Painter | None = None
        self.target = np.zeros(3)  # where the finger tips are told to be
        self.limit = 40 if task == "reach" else 120  # steps

    # ---- Gymnasium

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed)
        mujoco.mj_resetData(self.model, self.data)
        self._swapped = is_swapped(options)
        self._draw_told()
        delay = self._look.draw(self.things, self.data, self.np_random)
        self._late = deque([np.array([0, 0, 0, self.task != "reach"], np.float32)] * delay)
        self._put()
        self._steps = 0
        return self.observe(), self._info()

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        self.advance(action)
        info = self._info()
        ended = info["success"] or info.get("success_shown", False)
        return self.observe(), float(info["success"]), ended, self._steps >= self.limit and not ended, info

    def advance(self, action: Any) -> None:
        """A step that nobody looks at."""
        self._late.append(self.action(action))
        now = self._late.popleft()
        before = self.target.copy()
        self.target = np.clip(self.target + now[:3], *REACH)
        self.data.ctrl[3:5] = now[3] * 0.04
        for part in range(1, _RAMP + 1):
            self.data.ctrl[:3] = before + (self.target - before) * part / _RAMP
            mujoco.mj_step(self.model, self.data, _SUBSTEPS // _RAMP)
        self._steps += 1

    def moment(self) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...], int]:
        """All that the future depends on, for `rewind`."""
        physics = np.empty(mujoco.mj_stateSize(self.model, _WHOLE))
        mujoco.mj_getState(self.model, self.data, physics, _WHOLE)
        return physics, self.target.copy(), tuple(self._late), self._steps

    def rewind(self, moment: tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...], int]) -> None:
        """Back to a moment of the running episode."""
        physics, target, late, self._steps = moment
        mujoco.mj_setState(self.model, self.data, physics, _WHOLE)
        mujoco.mj_kinematics(self.model, self.data)  # where things are; more would disturb the solver's warm start
        self.target, self._late = target.copy(), deque(late)

    def close(self) -> None:
        if self._painter is not None:
            self._painter.close()

    # ---- what is seen and known

    def picture(self, camera: str) -> Picture:
        if self._painter is None:
            self._painter = Painter(self.model, self.size)
        return self._painter(self.data, camera)

    def limits(self) -> Limits:
        """The hand moves by metres, and stays over the table."""
        low, high = REACH + np.array([[-0.01, -0.01, -0.015], [0.01, 0.01, 0.01]])  # it swings over its target
        return self.limits_of(
            ("delta", "delta", "delta", "position"),
            measured=(0, 1, 2, -1),
            workspace=Zone(low=tuple(low.tolist()), high=tuple(high.tolist())),
        )

    def state(self) -> np.ndarray:
        hand = [*self.data.qpos[:3], self.opening]
        if not self.privileged:
            return np.array(hand, np.float32)
        for (colour, kind), body in self.things.items():
            hand += [*self.data.xpos[body], *(c == colour for c in COLOURS), *(k == kind for k in KINDS)]
        return np.array([*hand, *self.data.mocap_pos[1:3, :2].ravel()], np.float32)

    @property
    def opening(self) -> float:
        """0 closed, 1 open; between them, something is held."""
        return float(self.data.qpos[3:5].mean() / 0.04)

    def done(self, told: Told) -> bool:
        """Whether the scene is as an instruction asks."""
        body = self.things[told.colour, told.kind]
        at = self.data.xpos[body]
        if told.place is None:
            return bool(np.linalg.norm(self.data.qpos[:3] - self._above(told)) < _NEAR)
        rests = abs(at[2] - HALF_HEIGHT[told.kind]) < 0.01
        still = np.linalg.norm(self.data.cvel[body]) < 0.1 and self.opening > 0.75
        return bool(np.linalg.norm(at[:2] - self._plate(told.place)) < _ON and rests and still)

    def _above(self, told: Told) -> np.ndarray:
        return self.data.xpos[self.things[told.colour, told.kind]] + [0, 0, HALF_HEIGHT[told.kind] + 0.012]

    def _plate(self, place: str) -> np.ndarray:
        axis, side = PLACES[place]
        plates = self.data.mocap_pos[1:3, :2]
        return plates[np.argmax(plates[:, axis] * side)]

    def _info(self) -> dict[str, Any]:
        info = {"instruction": self.instruction, "told": self.told, "success": self.done(self.told)}
        if self.shown is not None:
            info |= {"shown": self.shown, "success_shown": self.done(self.shown)}
        return info

    # ---- drawing an episode

    def _draw_told(self) -> None:
        """Which things are there, how the plates lie, and what is asked for."""
        rng = self.np_random
        while True:
            names = list(rng.permutation(list(COLOURS))), list(rng.permutation(self.kinds))
            colours, kinds = names[0][: 2 if len(self.kinds) > 1 else 4], names[1][:2]
            pairs = [(str(c), str(k)) for c in colours for k in kinds]
            self._axis = int(rng.integers(2))
            places = [p for p, (axis, _) in PLACES.items() if axis == self._axis]
            every = [Told(*pair, place) for pair in pairs for place in (places if self.task != "reach" else [None])]
            choice = [told for told in every if held_out(told) == self.unseen]
            if not choice:
                continue
            told, self.shown = choice[rng.integers(len(choice))], None
            if self._swapped:
                others = [other for other in choice if other[:2] != told[:2]]
                if not others:
                    continue
                told, self.shown = others[rng.integers(len(others))], told
            break
        self.told = told
        wordings = WORDINGS[self.task][self.reworded]
        said = wordings[rng.integers(len(wordings))]
        self.instruction = said.format(thing=f"{told.colour} {told.kind}", place=told.place)
        free = {kind: [n for n in range(4) if self._body(kind, n) >= 0] for kind in self.kinds}
        order = rng.permutation(len(pairs))  # the slots of the state say nothing of what is where
        self.things = {pairs[n]: self._body(pairs[n][1], free[pairs[n][1]].pop()) for n in order}

    def _body(self, kind: str, number: int) -> int:
        return mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_BODY, f"{kind}{number}")

    def _put(self) -> None:
        """Things, plates and the gripper where they begin."""
        rng, data = self.np_random, self.data
        plates = [] if self.task == "reach" else self._plates(rng)
        while len(spots := self._spots(rng, plates)) < len(self.things):
            plates = plates and self._plates(rng)
        for number, plate in enumerate(plates):
            data.mocap_pos[1 + number] = [*plate, 0]
        for (pair, body), spot in zip(self.things.items(), spots, strict=True):
            at = self.model.jnt_qposadr[self.model.body_jntadr[body]]
            turn = rng.uniform(-0.25, 0.25) / 2
            data.qpos[at : at + 7] = [*spot, HALF_HEIGHT[pair[1]], math.cos(turn), 0, 0, math.sin(turn)]
        self.target = rng.uniform([-0.12, -0.12, 0.13], [0.12, 0.12, 0.19])
        opening = 0.0 if self.task == "reach" else 0.04
        data.qpos[:5] = [*self.target, opening, opening]
        data.ctrl[:5] = data.qpos[:5]
        mujoco.mj_forward(self.model, data)

    def _plates(self, rng: np.random.Generator) -> list[np.ndarray]:
        """Two plates of which one is clearly the left, or clearly the near one."""
        while True:
            a, b = rng.uniform(-_AREA, _AREA, (2, 2))
            apart = np.abs(a - b)
            if np.linalg.norm(a - b) > 0.15 and apart[1 - self._axis] < apart[self._axis] / 2:
                return [a, b]

    def _spots(self, rng: np.random.Generator, plates: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Places with room for the fingers between them; fewer than things where they do not fit."""
        spots: list[np.ndarray] = []
        for spot in rng.uniform(-_AREA, _AREA, (100, 2)):
            clear = all(np.linalg.norm(spot - other) > 0.095 for other in spots)
            if clear and all(np.linalg.norm(spot - plate) > 0.115 for plate in plates):
                spots.append(spot)
            if len(spots) == len(self.things):
                break
        return spots

    # ---- the demonstrator

    def expert(self) -> Callable[[], Action]:
        if self.task == "reach":
            return lambda: self._towards(self._above(self.told), 0)
        return self._carry(self.told).__next__

    def _towards(self, point: np.ndarray, opening: float | int) -> Action:
        """Straight ahead, from where the target is once the late actions have been taken."""
        will_be = np.clip(self.target + sum(a[:3] for a in self._late), *REACH)
        return np.array([*np.clip(point - will_be, -STEP, STEP), opening], np.float32)

    def _carry(self, told: Told) -> Iterator[Action]:
        """Above it, down, close, up, above the plate, down, open, up; again from the start where it was lost."""
        assert told.place is not None
        body = self.things[told.colour, told.kind]
        while True:
            yield from self._go(lambda: [*self.data.xpos[body][:2], _HOVER], 1, 0.01)
            yield from self._go(lambda: [*self.data.xpos[body][:2], _GRASP], 1, 0.01)
            for _ in range(3 + len(self._late)):
                yield self._towards(np.array([*self.target[:2], _GRASP]), 0)
            plate = self._plate(told.place)
            yield from self._go(lambda: [*self.target[:2], _HOVER], 0, 0.03)
            if self.opening < 0.4:  # nothing between the fingers
                continue
            yield from self._go(partial(_above, plate, _HOVER), 0, 0.012)
            yield from self._go(partial(_above, plate, _GRASP + 0.004), 0, 0.01)
            for _ in range(2 + len(self._late)):
                yield self._towards(np.array([*plate, _GRASP + 0.004]), 1)
            yield from self._go(lambda: [*self.target[:2], _HOVER], 1, 0.03)

    def _go(self, where: Callable[[], Sequence[float]], opening: float | int, near: float) -> Iterator[Action]:
        """Until the gripper is there; up to 25 steps."""
        for _ in range(25):
            point = np.array(where())
            if np.linalg.norm(self.data.qpos[:3] - point) < near:
                return
            yield self._towards(point, opening)


def _above(spot: np.ndarray, height: float) -> list[float]:
    return [*spot, height]


def tasks() -> list[str]:
    """What can be made."""
    return list(WORDINGS)
