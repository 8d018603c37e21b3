"""Commands that keep a robot inside its limits: each is bent until the stop that could follow stays inside, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from jaxtyping import Float

from polymodal.act.limits import SLACK, Limits, Vector, vector
from polymodal.core.errors import ConfigError, DataError

_TRIES: Final = np.linspace(0, 1, 9)[:, None]  # from braking (0) to what was asked (1)
_LONGEST: Final = 2000  # ticks of a stop
_BEYOND: Final = {"position": "position", "delta": "velocity", "torque": "torque", "choice": "range"}


class Limiter:
    """Follows what is asked as far as the limits let it; from every command it gives it can stop inside them.

    That is its invariant: after each command the stop that would follow at once (the jerk, then the acceleration at
    their limits) is played through, and a command whose stop would leave the limits is drawn towards braking until it
    does not. The stop itself was inside when the command before was given.

    Args:
        limits: of one robot.
        fps: commands a second.
        hand: the hand's (x, y, z) for positions of all dimensions, (..., dim) to (..., 3); `Limits.hand` names them
            where it is not given.
    """

    def __init__(
        self, limits: Limits, fps: float | int, hand: Callable[[np.ndarray], np.ndarray] | None = None
    ) -> None:
        self.limits, self._dt = limits, 1 / fps
        self._low, self._high = np.array(limits.low), np.array(limits.high)
        self._delta = np.array([kind == "delta" for kind in limits.kinds])
        self._idles = np.array([kind in ("torque", "choice") for kind in limits.kinds])
        self._measured = np.array([place >= 0 for place in limits.measured or (-1,) * limits.dim])
        self._rest = vector(limits.rest, np.zeros(limits.dim))
        self._scale = vector(limits.scale, np.ones(limits.dim))
        widest = np.where(self._delta, np.minimum(-self._low, self._high) * self._scale, self._high - self._low) * fps
        self._velocity = np.minimum(vector(limits.velocity, widest), widest)
        self._acceleration = vector(limits.acceleration, 2 * self._velocity * fps)
        self._jolt = vector(limits.jerk, 2 * self._acceleration * fps) * self._dt  # change of acceleration in a tick
        self._floor, self._ceiling = (
            np.where(self._delta, end, x) for end, x in ((-np.inf, self._low), (np.inf, self._high))
        )
        self._hand = hand if hand is not None else lambda q: q[..., list(limits.hand)]
        if limits.workspace is not None and hand is None:
            on = list(limits.hand)
            self._floor[on] = np.maximum(self._floor[on], limits.workspace.low)
            self._ceiling[on] = np.minimum(self._ceiling[on], limits.workspace.high)
        self._zoned = bool(limits.forbidden) or (limits.workspace is not None and hand is not None)
        self.ticks = self._longest_stop()  # of a stop, at most
        self.reset()

    def reset(self, state: np.ndarray | None = None) -> None:
        """At rest where the state says; where it says nothing, at the first command."""
        dim = self.limits.dim
        self._v, self._a = np.zeros(dim), np.zeros(dim)
        self._q = np.clip(np.zeros(dim), self._floor, self._ceiling)
        self._known = self._delta.copy()
        self._see(state, np.ones(dim, bool))

    def _see(self, state: np.ndarray | None, axes: np.ndarray) -> None:
        """Takes from the state where the robot is along some axes."""
        for axis, place in enumerate(self.limits.measured or ()):
            if axes[axis] and place >= 0 and state is not None and np.isfinite(state[place]):
                self._q[axis], self._known[axis] = state[place], True

    def step(
        self, asked: Float[np.ndarray, " dim"] | None, state: np.ndarray | None = None
    ) -> tuple[Float[np.ndarray, " dim"], tuple[str, ...]]:
        """The command for what is asked, and the limits that bent it. None asks to stand still.

        Raises:
            DataError: it is to stand still, and the state that has to say where never did.
        """
        causes: list[str] = []
        # A sum of deltas drifts from where the robot is; a commanded position is where it will be.
        self._see(state, self._delta | ~self._known)
        if asked is None and (lost := self._measured & ~self._known).any():
            raise DataError(  # any command would be a jump to a place that nobody chose
                f"nobody said where the robot is along {np.flatnonzero(lost).tolist()}: reset the guard with its state"
            )
        brake = self._braking(self._v, self._a)
        if asked is None:
            wanted = np.where(self._idles, self._towards(self._rest, []), brake)
        else:
            new = ~self._known
            self._q[new] = np.clip(asked, self._floor, self._ceiling)[new]
            wanted = self._towards(asked, causes)
        self._known[:] = True  # by this command
        a = self._stoppable(brake, wanted, causes)
        if self._zoned and self._enters(a):
            causes.append("forbidden zone" if self.limits.forbidden else "workspace")
            a = brake
        self._a, self._v, self._q = self._after(self._q, self._v, a)
        command = np.clip(np.where(self._delta, self._v * self._dt / self._scale, self._q), self._low, self._high)
        if asked is None:
            return command, ()
        if (np.abs(command - asked) <= 1e-6 * (self._high - self._low)).all():
            return np.clip(asked, self._low, self._high), ()  # to the last bit what was asked
        return command, tuple(dict.fromkeys(causes))

    def _towards(self, asked: Vector, causes: list[str]) -> Vector:
        """The acceleration that leads to what is asked, within velocity, acceleration and jerk."""
        inside = np.clip(asked, self._low, self._high)
        causes += [_BEYOND[self.limits.kinds[axis]] for axis in np.flatnonzero(inside != asked)]
        speed = np.where(self._delta, inside * self._scale, inside - self._q) / self._dt
        a = (_within(speed, self._velocity, "velocity", causes) - self._v) / self._dt
        a = _within(a, self._acceleration, "acceleration", causes)
        return self._a + _within(a - self._a, self._jolt, "jerk", causes)

    def _braking(self, v: np.ndarray, a: np.ndarray) -> np.ndarray:
        """The next acceleration of the shortest stop: one from which ramps of the greatest jerk end at rest exactly."""
        ramps = np.abs(v) / (self._dt * self._jolt)  # the velocity in units of what one ramp's tick takes away
        whole = np.floor((np.sqrt(8 * ramps + 1) - 1) / 2)
        rest = (ramps - whole * (whole + 1) / 2) / (whole + 1)
        a_star = -np.sign(v) * (whole + rest) * self._jolt
        return np.clip(np.clip(a_star, a - self._jolt, a + self._jolt), -self._acceleration, self._acceleration)

    def _after(self, q: np.ndarray, v: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        v = v + a * self._dt
        return a, v, q + v * self._dt

    def _stoppable(self, brake: Vector, wanted: Vector, causes: list[str]) -> Vector:
        """For each dimension the acceleration nearest to the wanted one whose stop stays in place and in speed."""
        tries = brake + _TRIES * (wanted - brake)
        a, v, q = self._after(self._q, self._v, tries)
        least, most, fastest = q, q, np.abs(v)
        for _ in range(self.ticks):
            a, v, q = self._after(q, v, self._braking(v, a))
            least, most, fastest = np.minimum(least, q), np.maximum(most, q), np.maximum(fastest, np.abs(v))
            if self._rests(v, a):
                break
        # A robot that is outside already (it was pushed) may come back but not go further.
        placed = (least >= np.minimum(self._floor, least[0]) - SLACK) & (
            most <= np.maximum(self._ceiling, most[0]) + SLACK
        )
        slow = fastest <= np.maximum(self._velocity, fastest[0]) * (1 + SLACK)
        best = len(_TRIES) - 1 - np.argmax((placed & slow)[::-1], axis=0)
        short = best < len(_TRIES) - 1
        if (over := short & ~placed[-1]).any():
            spatial = self.limits.workspace is not None and over[list(self.limits.hand)].any()
            causes.append("workspace" if spatial else "position")
        if (short & placed[-1]).any():
            causes.append("velocity")
        return tries[best, np.arange(len(best))]

    def _enters(self, a: Vector) -> bool:
        """Whether the way to the end of the stop touches a forbidden zone or leaves the workspace."""
        path, v, q = [self._q], self._v, self._q
        for _ in range(self.ticks + 1):
            a, v, q = self._after(q, v, a)
            path.append(q)
            a = self._braking(v, a)
        way, space = self._hand(np.stack(path)), self.limits.workspace
        return (space is not None and not space.holds(way[1:])) or any(
            zone.crossed(way) for zone in self.limits.forbidden
        )

    def _rests(self, v: np.ndarray, a: np.ndarray) -> bool:
        return bool((np.abs(v) <= self._velocity * 1e-9).all() and (np.abs(a) <= self._acceleration * 1e-9).all())

    def _longest_stop(self) -> int:
        a, v, q = self._acceleration.copy(), self._velocity.copy(), np.zeros_like(self._velocity)
        for tick in range(_LONGEST):
            if self._rests(v, a):
                return tick
            a, v, q = self._after(q, v, self._braking(v, a))
        raise ConfigError(
            f"with these limits of acceleration and jerk the robot needs more than {_LONGEST} ticks to stop"
        )


def _within(x: Vector, most: Vector, name: str, causes: list[str]) -> Vector:
    if (np.abs(x) > most * (1 + 1e-6)).any():
        causes.append(name)
    return np.clip(x, -most, most)
