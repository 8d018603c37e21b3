"""The one closed loop: what is shown, what the policy asks, what the guard lets through, what comes of it."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Float32

from polymodal.act.chunks import Player
from polymodal.act.film import frame
from polymodal.act.guard import Guard, spread
from polymodal.act.limits import Limits
from polymodal.core.batch import Batch
from polymodal.core.interval import Interval, wilson
from polymodal.core.observation import Observation
from polymodal.core.verbs import Acts, history_of
from polymodal.modalities.film import Film


@runtime_checkable
class Environment(Protocol):
    """What the loop needs of an environment: Gymnasium's methods, and pictures, a state and words in what they give."""

    @property
    def fps(self) -> float | int: ...

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]: ...

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]: ...


@runtime_checkable
class Controller(Protocol):
    """Gives one action for each observation: a `Player` of a policy's chunks, an `Expert`, a link to a server."""

    def reset(self) -> None:
        """An episode begins."""

    def action(self, observation: Observation) -> Float32[np.ndarray, " action_dim"] | None:
        """What it asks for now; None: it has no answer in time."""
        ...


@runtime_checkable
class Fault(Protocol):
    """Something that breaks between a robot and its policy; both methods are called once a tick."""

    def reset(self, episode: int) -> None: ...

    def seen(self, observation: Observation) -> Observation | None: ...

    def asked(self, action: np.ndarray | None, observation: Observation | None) -> np.ndarray | None: ...


class Expert:
    """The scripted demonstrator of an environment, as a controller."""

    def __init__(self, env: Any) -> None:
        self._env = env

    def reset(self) -> None:
        self._next: Callable[[], np.ndarray] = self._env.expert()

    def action(self, observation: Observation) -> Float32[np.ndarray, " action_dim"]:
        return self._next()

    def close(self) -> None:
        """Nothing to end."""


class Sampled:
    """A policy that answers with the first of several samples, and says how much they disagree.

    Args:
        policy: one that samples.
        samples: at least two.
        limits: whose range the disagreement is a part of.
    """

    def __init__(self, policy: Acts, samples: int, limits: Limits) -> None:
        self.policy, self.samples, self.limits = policy, samples, limits
        self.horizon, self.action_dim, self.history = policy.horizon, policy.action_dim, history_of(policy)
        self.observe, self.lesson = policy.observe, policy.lesson
        self.disagreement = 0.0  # of the last chunk

    def act(
        self, batch: Batch, *, generator: torch.Generator | None = None
    ) -> Float[torch.Tensor, "batch horizon action_dim"]:
        chunks = self.policy.act(batch.take([0] * self.samples), generator=generator)
        self.disagreement = spread(chunks.float().cpu().numpy(), self.limits)
        return chunks[:1]


@dataclass(frozen=True, kw_only=True)
class Episode:
    """How one went.

    Attributes:
        success: what was told was done.
        success_shown: what the scene was drawn for, and was not told, was done; None where nothing was swapped.
        jerk: mean absolute second difference of the commands, in their own units.
        stopped: why the guard ended it, or None.
        interventions: how many ticks the guard stepped in, by what it did and why.
    """

    seed: int
    instruction: str
    steps: int
    success: bool
    success_shown: bool | None
    jerk: float
    stopped: str | None
    interventions: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What some episodes add up to.

    Attributes:
        success: with its 95 % interval.
        success_shown: under a swapped instruction, of what was shown and not told.
        latency_ms: percentiles of a tick: from an observation to the command that answers it.
        rate: ticks a second that the policy and the guard could hold.
        missed: ticks of a paced run that ended after the next one was due.
        interventions: of the guard, by what it did and why, in ticks.
    """

    episodes: tuple[Episode, ...]
    success: Interval
    success_shown: Interval | None
    latency_ms: Mapping[str, float]
    rate: float
    jerk: float
    missed: int
    interventions: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def run(
    env: Environment,
    controller: Controller,
    guard: Guard,
    *,
    episodes: int,
    seed: int = 0,
    swapped: bool = False,
    instruction: str | None = None,
    steps: int | None = None,
    pace: bool = False,
    film: Film | None = None,
    fault: Fault | None = None,
    seen: Callable[[int, Observation, np.ndarray], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Runs episodes in closed loop; nothing reaches the environment but what the guard gives.

    Args:
        env: a robot, simulated or not.
        controller: what acts.
        guard: of this robot. An emergency stop ends the run; a stop of its own ends an episode, and a paced run, too.
            Where the loop ends by an error, the guard stops the robot first.
        episodes: how many; the n-th is drawn from ``seed + n``.
        swapped: shown the scene of one target, told another.
        instruction: told instead of the environment's own words.
        steps: the most of an episode, beside the environment's own limit.
        pace: holds the rate of the environment by the clock. Without it a tick lasts what it takes.
        film: gets a frame for each tick.
        fault: what breaks.
        seen: is told each tick's (episode, observation, command).
        progress: is told (done, total) after each episode.
    """
    timing = _Timing(1 / env.fps if pace else 0.0)
    done: list[Episode] = []
    for number in range(episodes):
        one = _episode(
            env, controller, guard, number, seed=seed + number, swapped=swapped, instruction=instruction, steps=steps,
            timing=timing, film=film, fault=fault, seen=seen,
        )  # fmt: skip
        done.append(one)
        if progress is not None:
            progress(number + 1, episodes)
        if guard.emergency or (pace and guard.stopped is not None):
            break
        guard.resume()  # in a simulation nobody needs to look before the next scene is set
    shown = [one.success_shown for one in done if one.success_shown is not None]
    return Report(
        episodes=tuple(done),
        success=wilson(sum(one.success for one in done), len(done)),
        success_shown=wilson(sum(shown), len(shown)) if shown else None,
        latency_ms={f"p{p:g}": round(1e3 * float(np.percentile(timing.ticks, p)), 3) for p in (50, 95, 99)},
        rate=len(timing.ticks) / max(sum(timing.ticks), 1e-9),
        jerk=float(np.mean([one.jerk for one in done])),
        missed=timing.missed,
        interventions=dict(sum((Counter(one.interventions) for one in done), Counter())),
    )


def _episode(
    env: Environment,
    controller: Controller,
    guard: Guard,
    number: int,
    *,
    seed: int,
    swapped: bool,
    instruction: str | None,
    steps: int | None,
    timing: _Timing,
    film: Film | None,
    fault: Fault | None,
    seen: Callable[[int, Observation, np.ndarray], None] | None,
) -> Episode:
    raw, info = env.reset(seed=seed, options={"swapped": True} if swapped else None)
    told = instruction if instruction is not None else str(info["instruction"])
    guard.reset(raw["state"])
    controller.reset()
    if fault is not None:
        fault.reset(number)
    before = guard.counts.copy()
    sent: list[np.ndarray] = []
    success = shown = False
    timing.start()
    try:
        while steps is None or len(sent) < steps:
            now = Observation(images=raw["images"], state=raw["state"], instruction=told, time=guard.now())
            began = time.perf_counter()
            view = now if fault is None else fault.seen(now)
            asked = None if view is None or not _finite(view) else controller.action(view)
            if fault is not None:
                asked = fault.asked(asked, view)
            command = guard(asked, view, disagreement=_disagreement(controller))
            timing.ticks.append(time.perf_counter() - began)
            if film is not None:
                film.add(frame(view or Observation(), [told, _state(guard, number, len(sent))], len(now.images)))
            if seen is not None:
                seen(number, now, command)
            raw, _, ended, cut, info = env.step(command)
            sent.append(command)
            success, shown = bool(info["success"]), bool(info.get("success_shown", False))
            timing.wait()
            if ended or cut or guard.standing:
                break
    except BaseException as error:
        guard.stop(f"the control loop ended by an error ({type(error).__name__})")
        with contextlib.suppress(Exception):  # it may be the robot itself that fails
            while not guard.standing:
                env.step(guard(None, None))
                timing.wait()
        raise
    return Episode(
        seed=seed,
        instruction=told,
        steps=len(sent),
        success=success,
        success_shown=shown if swapped else None,
        jerk=float(np.abs(np.diff(sent, 2, axis=0)).mean()) if len(sent) > 2 else 0.0,
        stopped=guard.stopped,
        interventions=dict(guard.counts - before),
    )


def _finite(view: Observation) -> bool:
    """Whether a policy can be asked: it refuses other states, and the guard holds the robot for them."""
    return view.state is None or bool(np.isfinite(view.state).all())


def _disagreement(controller: Controller) -> float:
    sampled = controller.policy if isinstance(controller, Player) else None
    return sampled.disagreement if isinstance(sampled, Sampled) else 0.0


def _state(guard: Guard, episode: int, tick: int) -> str:
    last = guard.interventions[-1] if guard.interventions else None
    said = f" | {last.decision}: {', '.join(last.causes)}" if last is not None and last.tick == guard.tick - 1 else ""
    return f"episode {episode + 1}, {tick / guard.fps:.1f} s{said}"


class _Timing:
    """Times ticks, and holds their rate where there is one to hold."""

    def __init__(self, period: float) -> None:
        self.ticks: list[float] = []
        self.missed = 0
        self._period = period

    def start(self) -> None:
        self._due = time.perf_counter() + self._period

    def wait(self) -> None:
        if not self._period:
            return
        left = self._due - time.perf_counter()
        if left < 0:
            self.missed += 1
            self._due = time.perf_counter()  # a late tick does not make the next ones hurry
        else:
            time.sleep(left)
        self._due += self._period
