"""Nothing reaches a motor but through here: limits, broken and stale data, what was never seen, emergency stop."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import numpy as np
from jaxtyping import Float, Float32, Float64

from polymodal.act.limiter import Limiter
from polymodal.act.limits import Limits
from polymodal.act.novelty import Novelty, is_picture
from polymodal.core.errors import ConfigError
from polymodal.core.observation import Observation

Decision: TypeAlias = Literal["limited", "held", "stopped"]

_TICK: Final = 1e-6  # seconds that clocks may differ
_MOTION: Final = 0.02  # standard deviations of the state that are no motion
_MOST: Final = 10_000  # records kept in memory
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """When the guard steps in, in seconds or in ticks of the control loop.

    Attributes:
        stale: the age at which an observation is not acted on any more. None: one and a half ticks.
        patience: how long the robot may be held before it is stopped for good.
        novelty: the score above which an observation or an action is odd; two normal episodes in a thousand reach 1.
        ticks: how many odd ticks in a row hold the robot: one alone may be chance.
        disagreement: the spread of sampled actions, in parts of the range of the limits, above which the robot is held.
    """

    stale: float | None = None
    patience: float = 2.0
    novelty: float = 1.0
    ticks: int = 2
    disagreement: float = 0.25


@dataclass(frozen=True, kw_only=True)
class Intervention:
    """What the guard did about one action, and why."""

    tick: int
    time: float  # of the guard's clock
    decision: Decision
    causes: tuple[str, ...]
    detail: str
    asked: tuple[float, ...] | None
    sent: tuple[float, ...]


class Guard:
    """Between a policy and a robot: takes the action that is asked for, gives the command that may be sent.

    An action that goes too far or too fast is *limited*. Where there is none, or where it or what it is an answer to
    cannot be trusted, the robot is *held*: it brakes within its limits and stands. An emergency, a hold that does not
    end and a robot that is where it must not be *stop* it: it stands until a person calls `release`. `stop` may be
    called from any thread and from a signal handler.

    Args:
        limits: of the robot.
        fps: actions a second.
        config: when to step in.
        novelty: what its training data look like; without it nothing is odd, and no frozen camera is found.
        hand: see `Limiter`.
        log: a file that every intervention is appended to, as a line of JSON.
        clock: gives the seconds that `Observation.time` counts. Without it each tick lasts ``1 / fps`` from `reset`:
            the time of a simulation.

    Raises:
        ConfigError: the log cannot be written to.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        fps: float | int,
        config: GuardConfig | None = None,
        novelty: Novelty | None = None,
        hand: Callable[[np.ndarray], np.ndarray] | None = None,
        log: str | Path | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.limits, self.fps, self.novelty = limits, fps, novelty
        self.config = config or GuardConfig()
        self.interventions: list[Intervention] = []
        self.counts: Counter[str] = Counter()  # "held: frozen camera" and so on, since the guard was made
        self.tick = 0  # since the last reset
        self.last: Float32[np.ndarray, " action_dim"] | None = None  # the command that was given last
        self.touched = time.monotonic()  # when it was asked last: what a `Watchdog` looks at
        self._limiter = Limiter(limits, fps, hand)
        self._log, self._clock = None if log is None else Path(log), clock
        self._stale = 1.5 / fps if self.config.stale is None else self.config.stale
        self._emergency: str | None = None  # why somebody else than the guard stopped the robot
        self._stop: str | None = None  # why the guard did
        self._told = False  # whether the stop is logged
        self._lock = threading.RLock()  # a signal may come while the same thread is in here
        state_ends = (end for end in (limits.state_low, limits.state_high) if end is not None)
        self._states = {len(end) for end in state_ends}  # numbers that a state must have; and how many at least
        self._least = 1 + max(limits.measured or (-1,))
        if self._log is not None:
            try:
                self._log.open("a").close()
            except OSError as error:
                raise ConfigError(f"the guard's log cannot be written: {error}") from None
        self.reset()

    def reset(self, state: np.ndarray | None = None) -> None:
        """A new episode: the robot stands still, where its state says. What is stopped stays stopped."""
        with self._lock:
            self._limiter.reset(self._readable(state))
            self.tick = self._odd = self._strange = self._braked = 0
            self._held_since: float | None = None
            self._before: Observation | None = None
            self._asked: np.ndarray | None = None
            self._unmoved = np.zeros(0 if self.novelty is None else len(self.novelty.cameras))

    def now(self) -> float:
        """What `Observation.time` is to say of a picture that is taken now."""
        return self.tick / self.fps if self._clock is None else self._clock()

    @property
    def stopped(self) -> str | None:
        """Why the robot is stopped, or None."""
        return self._stop or self._emergency

    @property
    def emergency(self) -> bool:
        """Whether somebody else than the guard stopped the robot."""
        return self._emergency is not None

    @property
    def standing(self) -> bool:
        """Whether the robot is stopped, and was given all commands that brake it."""
        return self.stopped is not None and self._braked >= self._limiter.ticks

    def stop(self, cause: str = "emergency stop") -> None:
        """An emergency: stops the robot, until `release`."""
        if self._emergency is None:
            self._emergency = cause

    def _halt(self, cause: str) -> None:
        if self.stopped is None:  # the first cause is the one to look into
            self._stop = cause

    def resume(self) -> None:
        """Ends a stop of the guard's own, as in a simulation. An emergency stop stays, also one that comes just now."""
        with self._lock:
            self._stop, self._told, self._held_since = None, False, None

    def release(self) -> None:
        """Ends any stop: a person has looked."""
        with self._lock:
            self.resume()
            self._emergency = None

    def __call__(
        self,
        action: Any,
        observation: Observation | None,
        *,
        disagreement: float = 0.0,
    ) -> Float32[np.ndarray, " action_dim"]:
        """The command for this tick.

        Args:
            action: what the policy asks for, be it an action or not; None if it did not answer in time.
            observation: the newest; None if none came.
            disagreement: the spread of several sampled actions, see `spread`.

        Raises:
            DataError: the robot is to be held, and no state has said yet where it is: there is nothing to send.
        """
        with self._lock:
            now = self.now()
            self.touched = time.monotonic()
            action = None if action is None else _numbers(action)
            distrust = [*self._of_observation(observation, now), *self._of_action(action, disagreement)]
            state = self._readable(None if observation is None else observation.state)
            if out := self._out_of_state(state):
                self._halt(out)
            if distrust and self._held_since is None:
                self._held_since = now
            elif not distrust:
                self._held_since = None
            if self._held_since is not None and now - self._held_since > self.config.patience:
                self._halt(f"held for {self.config.patience:g} s: {distrust[0][0]}")
            why = self.stopped  # read once: an emergency may come at any moment
            free = not distrust and why is None
            command, bent = self._limiter.step(action if free else None, state)
            command = command.astype(np.float32)
            self._braked = 0 if why is None else self._braked + 1
            if why is not None:
                if not self._told:
                    self._record(now, "stopped", [(why, "")], action, command)
                self._told = True
            elif distrust:
                self._record(now, "held", distrust, action, command)
            elif bent:
                self._record(now, "limited", [(cause, "") for cause in bent], action, command)
            self.tick += 1
            self.last = command
            return command

    def _of_observation(self, observation: Observation | None, now: float) -> list[tuple[str, str]]:
        """What is wrong with what the robot sees: (cause, detail)."""
        if observation is None:
            return [("no observation", "")]
        found = []
        if not -_TICK <= now - observation.time <= self._stale:
            found.append(("stale observation", f"{now - observation.time:.3f} s old"))
        if malformed := self._malformed(observation.state):
            found.append(("malformed state", malformed))
        elif observation.state is not None and not np.isfinite(_numbers(observation.state)).all():
            found.append(("non-finite state", ""))
        elif self.novelty is not None:
            found += self._of_sight(self.novelty, observation)
        self._before = observation
        return found

    def _malformed(self, state: np.ndarray | None) -> str:
        """What the state lacks that the limits look at."""
        shape = _numbers(state).shape if state is not None else (0,)
        fits = len(shape) == 1 and shape[0] >= self._least and self._states <= {shape[0]}
        return "" if fits else f"shape {shape}"

    def _readable(self, state: np.ndarray | None) -> Float64[np.ndarray, " state_dim"] | None:
        return None if state is None or self._malformed(state) else _numbers(state)

    def _of_sight(self, novelty: Novelty, observation: Observation) -> list[tuple[str, str]]:
        found = []
        for n, name in enumerate(novelty.cameras):
            picture = observation.images.get(name)
            if picture is None:
                found.append(("no picture", name))
                continue
            if not is_picture(picture):
                found.append(("malformed picture", f"{name}: shape {np.shape(picture)}"))
                continue
            if picture.std() < 0.25 * novelty.contrast[n]:
                found.append(("blank picture", name))
            before = None if self._before is None else self._before.images.get(name)
            if self._before is None or before is None or not np.array_equal(before, picture):
                self._unmoved[n] = 0
            else:
                self._unmoved[n] += novelty.moved(observation, self._before)
            if self._unmoved[n] > novelty.still[n] + _MOTION:
                found.append(("frozen camera", name))
        score = novelty.score(observation)
        self._odd = 0 if score <= self.config.novelty else self._odd + 1  # NaN is odd
        if self._odd >= self.config.ticks:
            found.append(("unseen", f"score {score:.2f}"))
        return found

    def _of_action(self, action: Float64[np.ndarray, "..."] | None, disagreement: float) -> list[tuple[str, str]]:
        """What is wrong with an action that no limit could mend."""
        before, self._asked = self._asked, None
        if action is None:
            return [("no action", "")]
        if action.shape != (self.limits.dim,):
            return [("malformed action", f"shape {action.shape}")]
        if not np.isfinite(action).all():
            return [("non-finite action", "")]
        found, self._asked = [], action.copy()
        if not disagreement <= self.config.disagreement:  # NaN, too: a sample that is none
            found.append(("disagreement", f"{disagreement:.2f} of the range"))
        if self.novelty is not None and before is not None:
            score = self.novelty.action_score(self._asked, before)
            self._strange = 0 if score <= self.config.novelty else self._strange + 1
            if self._strange >= self.config.ticks:
                found.append(("odd action", f"score {score:.2f}"))
        return found

    def _out_of_state(self, state: np.ndarray | None) -> str | None:
        for ends, beyond in ((self.limits.state_low, np.less), (self.limits.state_high, np.greater)):
            if state is not None and ends is not None and (over := beyond(state, ends)).any():
                place = int(np.argmax(over))
                return f"state[{place}] is {state[place]:.4g}, beyond its limit {ends[place]:.4g}"
        return None

    def _record(
        self, now: float, decision: Decision, why: list[tuple[str, str]], asked: np.ndarray | None, sent: np.ndarray
    ) -> None:
        record = Intervention(
            tick=self.tick,
            time=now,
            decision=decision,
            causes=tuple(cause for cause, _ in why),
            detail="; ".join(f"{cause}: {detail}" for cause, detail in why if detail),
            asked=tuple(asked.tolist()) if asked is not None and asked.shape == sent.shape else None,
            sent=tuple(sent.tolist()),
        )
        self.counts.update(f"{decision}: {cause}" for cause in record.causes)
        self.interventions.append(record)
        del self.interventions[:-_MOST]
        if self._log is not None:
            try:
                with self._log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(_plain(asdict(record))) + "\n")
            except OSError as error:  # a full disk must not leave the robot without a command
                _logger.error("an intervention of the guard is not in %s: %s", self._log, error)


def _numbers(value: Any) -> Float64[np.ndarray, "..."]:
    """An array, also of what is none: that becomes one which fits no limits, for a robot must get its command."""
    try:
        return np.array(value, np.float64)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return np.empty(0)


def _plain(value: Any) -> Any:
    """JSON knows no NaN: numbers that are not finite become words."""
    if isinstance(value, dict):
        return {name: _plain(of) for name, of in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value


def spread(samples: Float[np.ndarray, "samples horizon action_dim"], limits: Limits) -> float:
    """How much samples of one chunk disagree: the standard deviation of where they lead, over the range of the limits.

    Of the dimension and step that they disagree on the most.
    """
    wide = np.subtract(limits.high, limits.low)
    return float((samples.std(0) / wide).max())
