"""A robot small enough for every test: a hand over a table, two cameras, two things of which words name one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polymodal.act.limits import Limits, Zone
from polymodal.core.batch import Batch
from polymodal.core.observation import Observation

SIZE = 32
STEP = 0.05  # the farthest that the hand moves in one action
FPS = 20.0
_Y, _X = np.mgrid[0:SIZE, 0:SIZE] / (SIZE - 1) * 2 - 1
COLOURS = {"red": (220, 40, 40), "blue": (40, 60, 220)}
LIMITS = Limits(
    low=(-STEP, -STEP, -STEP, 0.0),
    high=(STEP, STEP, STEP, 1.0),
    kinds=("delta", "delta", "delta", "position"),
    measured=(0, 1, 2, -1),
    workspace=Zone(low=(-1.1, -1.1, 0.0), high=(1.1, 1.1, 1.0)),
)


class ToyRobot:
    """Go over the thing that is named. Actions are (dx, dy, dz, grip)."""

    fps = FPS
    cameras = ("front", "wrist")

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        rng = np.random.default_rng(seed)
        self.hand = np.array([*rng.uniform(-0.3, 0.3, 2), 0.8])
        self.grip, self.steps = 0.0, 0
        side = rng.choice([-1, 1])
        self.things = {
            name: np.array([s * rng.uniform(0.5, 0.8), rng.uniform(-0.7, 0.7), 0.1])
            for name, s in zip(COLOURS, (side, -side), strict=True)
        }
        names = rng.permutation(list(COLOURS)).tolist()
        self.told = names[0]
        self.shown = names[1] if (options or {}).get("swapped") else None
        return self._observe(), self._info()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert np.isfinite(action).all(), "nothing that is no number may reach a motor"
        self.hand = self.hand + np.clip(action[:3], -STEP, STEP)
        self.grip, self.steps = float(action[3]), self.steps + 1
        info = self._info()
        return self._observe(), 0.0, info["success"] or info.get("success_shown", False), self.steps >= 80, info

    def expert(self) -> Callable[[], np.ndarray]:
        """Swings into motion and out of it."""
        speed = np.zeros(3)

        def act() -> np.ndarray:
            nonlocal speed
            wanted = np.clip(0.3 * (self.things[self.told] - self.hand), -0.9 * STEP, 0.9 * STEP)
            speed = speed + np.clip(wanted - speed, -0.012, 0.012)
            return np.array([*speed, 0.5], np.float32)

        return act

    def _info(self) -> dict[str, Any]:
        there = {name: bool(np.linalg.norm(self.hand - at) < 0.05) for name, at in self.things.items()}
        info = {"instruction": f"touch the {self.told} thing", "success": there[self.told]}
        return info | ({"success_shown": there[self.shown]} if self.shown else {})

    def _observe(self) -> dict[str, Any]:
        return {
            "images": {"front": self._draw(np.zeros(2), 1.2), "wrist": self._draw(self.hand[:2], 0.6)},
            "state": np.array([*self.hand, self.grip], np.float32),
        }

    def _draw(self, middle: np.ndarray, half: float) -> np.ndarray:
        x, y = middle[0] + half * _X, middle[1] + half * _Y
        out = np.stack([90 + 40 * x, 110 + 30 * y, 100 + 0 * x], -1)
        discs = [(at, 0.18, COLOURS[name]) for name, at in self.things.items()]
        for at, radius, colour in [*discs, (self.hand, 0.1 + 0.1 * self.hand[2], (240, 240, 240))]:
            cover = np.clip((radius - np.hypot(x - at[0], y - at[1])) * SIZE / (2 * half) + 0.5, 0, 1)[..., None]
            out = out * (1 - cover) + np.array(colour) * cover
        return np.clip(out, 0, 255).astype(np.uint8)


class ToyPolicy:
    """Acts on the state alone, by what it is told: the things' places are its weights. ``noise`` makes it sample."""

    horizon = 8
    action_dim = 4

    def __init__(self, noise: float = 0.0) -> None:
        self.noise = noise

    def observe(self, observations: Sequence[Observation]) -> Batch:
        states = [o.state for o in observations]
        red = [float("red" in o.instruction) for o in observations]
        return Batch(state=torch.from_numpy(np.stack(states)).float(), red=torch.tensor(red))

    def act(self, batch: Batch, *, generator: torch.Generator | None = None) -> Tensor:
        side = batch["red"] * 2 - 1
        goal = torch.stack([0.5 * side, 0 * side, 0 * side + 0.1], 1)
        step = (0.2 * (goal - batch["state"][:, :3])).clamp(-STEP / 2, STEP / 2)
        chunk = torch.cat([step, torch.zeros(len(step), 1)], 1)[:, None].repeat(1, self.horizon, 1)
        return chunk + self.noise * torch.randn(chunk.shape, generator=generator)

    def lesson(self, observations: Sequence[Observation], actions: Tensor, valid: Tensor) -> Batch:
        raise NotImplementedError


def demonstrations(count: int, seed: int = 1000) -> tuple[list[list[Observation]], list[np.ndarray]]:
    """Observations and actions of the expert."""
    env, episodes, actions = ToyRobot(), [], []
    for n in range(count):
        raw, info = env.reset(seed=seed + n)
        expert, seen, done = env.expert(), [], []
        ended = False
        while not ended:
            seen.append(Observation(images=raw["images"], state=raw["state"], instruction=info["instruction"]))
            done.append(expert())
            raw, _, success, cut, info = env.step(done[-1])
            ended = success or cut
        episodes.append(seen)
        actions.append(np.array(done))
    return episodes, actions
