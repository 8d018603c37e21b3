"""Planning: many plans are tried in a model of the world, and the first action of the best one is done.

Sources: the cross-entropy method: Rubinstein 1999; in a learned model of what is seen: Finn & Levine 2016,
https://arxiv.org/abs/1610.00696; Chua et al. 2018, https://arxiv.org/abs/1805.12114.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from polymodal.core.errors import ConfigError, MediaError
from polymodal.core.observation import Observation
from polymodal.core.verbs import Imagines

Plans: TypeAlias = Float32[np.ndarray, "plans steps action"]
Cost: TypeAlias = Callable[[Plans], Float[np.ndarray, " plans"]]
"""What each plan costs, from here."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """The cross-entropy method: each round draws plans around the best of the round before; the first one anywhere.

    Attributes:
        low, high: of an action.
        steps: of a plan.
        plans: of a round.
        rounds: one is random shooting.
        best: plans of a round that the next one is drawn around.
        held: steps that an action is held, so that plans lead somewhere.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    steps: int
    plans: int = 64
    rounds: int = 3
    best: int = 8
    held: int = 1

    def __post_init__(self) -> None:
        bounds = [] if len(self.low) != len(self.high) else list(zip(self.low, self.high, strict=True))
        if not bounds or not all(-math.inf < low <= high < math.inf for low, high in bounds):
            raise ConfigError(
                f"actions between {self.low} and {self.high}: as many finite bounds, the lower ones first"
            )
        if min(self.steps, self.rounds, self.held) < 1 or not 1 <= self.best <= self.plans:
            raise ConfigError(f"steps, rounds, and fewer best plans than plans; not {self}")

    def __call__(
        self, cost: Cost, rng: np.random.Generator, start: Float32[np.ndarray, "steps action"] | None = None
    ) -> tuple[Float32[np.ndarray, "steps action"], float]:
        """The cheapest plan of all that were tried, and its cost; ``start`` is tried, too.

        Plans whose cost is not finite are never drawn around.

        Raises:
            ConfigError: no plan has a finite cost.
        """
        low, high = np.asarray(self.low, np.float32), np.asarray(self.high, np.float32)
        choices = -(-self.steps // self.held)
        drawn = rng.uniform(low, high, (self.plans, choices, len(low)))
        found: tuple[Any, float] = (None, np.inf)
        for number in range(self.rounds):
            plans = np.repeat(drawn, self.held, 1)[:, : self.steps].astype(np.float32)
            if start is not None and not number:
                plans[0] = start
            costs = np.asarray(cost(plans), np.float64)
            order = np.argsort(costs, kind="stable")
            order = order[np.isfinite(costs[order])]
            if not len(order):
                break
            if costs[order[0]] < found[1]:
                found = plans[order[0]], float(costs[order[0]])
            kept = plans[order[: self.best], :: self.held]
            drawn = rng.normal(kept.mean(0), kept.std(0) + 0.02 * (high - low), drawn.shape).clip(low, high)
        if found[0] is None:
            raise ConfigError("no plan has a cost that is a number")
        return found


@runtime_checkable
class Weigh(Protocol):
    """Says what plans cost, as things stand."""

    def reset(self) -> None:
        """An episode begins."""

    def __call__(self, observation: Observation, done: Float32[np.ndarray, " action"] | None) -> Cost:
        """``done`` led to the observation, one step after the last one; None at the beginning."""
        ...


class Planner:
    """Model-predictive control, as a controller of `act.runner`: the rest of a plan is where the next search begins.

    It takes it that what it asks for is done, and that it is asked at every step. A guard that clips or holds a
    command, and a fault that hides a view, do not tell it: then ``done`` and the times of `Weigh` are not what they
    were.
    """

    def __init__(self, weigh: Weigh, search: Search, *, seed: int = 0) -> None:
        self.weigh, self.search, self.seed = weigh, search, seed
        self.reset()

    def reset(self) -> None:
        self.weigh.reset()
        self._rng = np.random.default_rng(self.seed)
        self._plan: Any = None

    def action(self, observation: Observation) -> Float32[np.ndarray, " action"]:
        done = None if self._plan is None else self._plan[0]
        rest = None if self._plan is None else np.concatenate([self._plan[1:], self._plan[-1:]])
        self._plan, _ = self.search(self.weigh(observation, done), self._rng, rest)
        return self._plan[0]

    def close(self) -> None:
        """Nothing to end."""


@runtime_checkable
class Rewinds(Protocol):
    """A simulator that can be put back."""

    def advance(self, action: Any) -> None:
        """One step; nothing is looked at."""

    def moment(self) -> Any:
        """All that its future depends on."""

    def rewind(self, moment: Any) -> None: ...


class InSimulator:
    """Plans are carried out in the true simulator, which is put back: the best that planning can do.

    Args:
        env: acts, and is acted on.
        price: of the state that it is in; the prices of all steps of a plan are added.
    """

    def __init__(self, env: Rewinds, price: Callable[[], float]) -> None:
        self.env, self.price = env, price

    def reset(self) -> None:
        """It remembers nothing."""

    def __call__(self, observation: Observation, done: Float32[np.ndarray, " action"] | None) -> Cost:
        return self._cost

    def _cost(self, plans: Plans) -> Float[np.ndarray, " plans"]:
        now, out = self.env.moment(), np.zeros(len(plans))
        for number, plan in enumerate(plans):
            for action in plan:
                self.env.advance(action)
                out[number] += self.price()
            self.env.rewind(now)
        return out


class InImagination:
    """Plans are carried out in a world model, from what one camera saw and what was done.

    Args:
        model: foresees.
        price: of films (plans steps 3 height width) that begin with the first frame to come.
        camera: whose pictures have the model's size.
        seed: of what is foreseen; the same for all plans, so that they differ in what they do alone.
    """

    def __init__(
        self,
        model: Imagines,
        price: Callable[[Float[Tensor, "plans steps 3 height width"]], Float[np.ndarray, " plans"]],
        camera: str,
        *,
        seed: int = 0,
    ) -> None:
        self.model, self.price, self.camera, self.seed = model, price, camera, seed
        self.reset()

    def reset(self) -> None:
        self._frames: list[Tensor] = []
        self._done: list[Tensor] = []

    def __call__(self, observation: Observation, done: Float32[np.ndarray, " action"] | None) -> Cost:
        picture = observation.images.get(self.camera)
        if picture is None or picture.shape[:2] != self.model.size[::-1]:
            width, height = self.model.size
            raise MediaError(f"the world model needs the camera {self.camera!r}, of {width} x {height} pixels")
        self._frames.append(torch.from_numpy(picture.copy()).permute(2, 0, 1).float() / 255)
        if done is not None:
            self._done.append(torch.from_numpy(done))
        self._frames = self._frames[-self.model.history :]
        self._done = self._done[-len(self._frames) + 1 :] if len(self._frames) > 1 else []
        return self._cost

    def _cost(self, plans: Plans) -> Float[np.ndarray, " plans"]:
        past = torch.stack(self._frames).expand(len(plans), -1, -1, -1, -1)
        actions = torch.from_numpy(plans)
        if self._done:
            actions = torch.cat([torch.stack(self._done).expand(len(plans), -1, -1), actions], 1)
        return self.price(self.model.imagine(past, actions, seed=[self.seed] * len(plans)))
