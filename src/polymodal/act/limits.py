"""How far and how fast a robot may be moved: what a `Limiter` holds it to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Final, Literal, TypeAlias, get_args

import numpy as np
from jaxtyping import Float

from polymodal.core.errors import ConfigError, did_you_mean

Kind: TypeAlias = Literal["position", "delta", "torque", "choice"]
Vector: TypeAlias = Float[np.ndarray, " dim"]
Path: TypeAlias = Float[np.ndarray, "points xyz"]

SLACK: Final = 1e-9  # of rounding
_LEAST: Final = 0.02  # of the range, that a command may change in a tick


@dataclass(frozen=True, kw_only=True)
class Zone:
    """A box in the robot's space, in its own units."""

    low: tuple[float, ...]
    high: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.low) != 3 or len(self.high) != 3 or not np.all(np.less(self.low, self.high)):
            raise ConfigError(f"a zone is three lower and three upper bounds, not {self.low} and {self.high}")

    def holds(self, path: Path) -> bool:
        """Whether every point is inside."""
        return bool(((path >= np.array(self.low) - SLACK) & (path <= np.array(self.high) + SLACK)).all())

    def crossed(self, path: Path) -> bool:
        """Whether a path touches the box, between its points too."""
        start, way = path[:-1], np.diff(path, axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            ends = np.stack([(np.array(self.low) - start) / way, (np.array(self.high) - start) / way])
        still = way == 0
        inside = (start >= self.low) & (start <= self.high)
        near = np.where(still, np.where(inside, -np.inf, np.inf), ends.min(0)).max(-1)
        far = np.where(still, np.where(inside, np.inf, -np.inf), ends.max(0)).min(-1)
        return bool(((near <= far) & (far >= 0) & (near <= 1)).any())


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a robot may be told, each dimension of its actions for itself.

    Attributes:
        low: the least command, in the robot's units. For torques this is the limit of torque.
        high: the greatest.
        kinds: what each command means: a "position" to be at, a "delta" to move by in one step, a "torque", or a
            "choice" (a key, a kind of click). All positions where it is not given.
        rest: torques and choices that mean standing still; zeros where it is not given.
        velocity: the most that what is commanded may change, a second; with ``acceleration`` and ``jerk`` of it. Of a
            "delta" it is the place that the deltas add up to. None: as fast as ``low`` and ``high`` let it be.
        scale: units of place for one unit of a "delta".
        measured: for each dimension the place in the state where the robot says where it is; -1 where it does not.
        workspace: where the hand must stay.
        forbidden: where it must not be.
        hand: the dimensions that are the hand's x, y and z.
        state_low: the least that each number of the state may be (measured torques, joints); beyond it the robot stops.
        state_high: the greatest.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    kinds: tuple[Kind, ...] = ()
    rest: tuple[float, ...] | None = None
    velocity: tuple[float, ...] | None = None
    acceleration: tuple[float, ...] | None = None
    jerk: tuple[float, ...] | None = None
    scale: tuple[float, ...] | None = None
    measured: tuple[int, ...] | None = None
    workspace: Zone | None = None
    forbidden: tuple[Zone, ...] = ()
    hand: tuple[int, ...] = (0, 1, 2)
    state_low: tuple[float, ...] | None = None
    state_high: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not self.kinds:
            object.__setattr__(self, "kinds", ("position",) * self.dim)
        for name in ("high", "kinds", "rest", "velocity", "acceleration", "jerk", "scale", "measured"):
            if (value := getattr(self, name)) is not None and len(value) != self.dim:
                raise ConfigError(f"limits of {self.dim} numbers of action have {len(value)} of {name}")
        if not np.isfinite([self.low, self.high]).all() or not np.less(self.low, self.high).all():
            raise ConfigError(f"limits are finite, the lower ones below the upper ones: {self.low} and {self.high}")
        for name in ("velocity", "acceleration", "jerk", "scale"):
            if (value := getattr(self, name)) is not None and not (np.greater(value, 0) & np.isfinite(value)).all():
                raise ConfigError(f"limits of {name} are positive: {value}")
        if (
            self.rest is not None
            and not (np.less_equal(self.low, self.rest) & np.less_equal(self.rest, self.high)).all()
        ):
            raise ConfigError(f"rest is between the limits: {self.rest}")
        if any(end is not None and np.isnan(end).any() for end in (self.state_low, self.state_high)):
            raise ConfigError(f"limits of the state are numbers: {self.state_low} and {self.state_high}")
        if unknown := set(self.kinds) - set(get_args(Kind)):
            raise ConfigError(f"an action is one of {', '.join(get_args(Kind))}, not {', '.join(sorted(unknown))}")
        if any(k == "delta" and not a < 0 < b for k, a, b in zip(self.kinds, self.low, self.high, strict=True)):
            raise ConfigError("a delta that cannot be 0 leaves no way to stand still")
        if not all(type(place) is int for place in (*self.hand, *(self.measured or ()))):
            raise ConfigError(f"places are whole numbers: {self.measured} of measured, {self.hand} of hand")
        placed = len(self.hand) == 3 and all(0 <= axis < self.dim for axis in self.hand)
        if (self.workspace or self.forbidden) and not placed:
            raise ConfigError(f"zones need the hand's three dimensions; {self.hand} are not among {self.dim}")
        if (self.workspace or self.forbidden) and min(
            (self.measured or (-1,) * self.dim)[axis] for axis in self.hand
        ) < 0:
            raise ConfigError("zones need to know where the hand is: say where the state has it (measured)")

    @property
    def dim(self) -> int:
        return len(self.low)

    @classmethod
    def from_json(cls, raw: Any) -> Limits:
        """What `to_json` gave.

        Raises:
            ConfigError: it has other fields, or values that are no limits.
        """
        if not isinstance(raw, Mapping):
            raise ConfigError("limits are a table")
        names = [f.name for f in fields(cls)]
        for name in raw:
            if name not in names:
                raise ConfigError(f"limits have no {name!r}{did_you_mean(str(name), names)}")
        try:
            given: dict[str, Any] = {name: value for name, value in raw.items() if value is not None}
            zones = [given.get("workspace"), *given.get("forbidden", ())]
            space, *forbidden = [z and Zone(**{end: _numbers(z[end]) for end in ("low", "high")}) for z in zones]
            whole: dict[str, Any] = {
                name: tuple(given[name]) for name in ("kinds", "measured", "hand") if name in given
            }
            rest = given.keys() - whole.keys() - {"workspace", "forbidden"}
            rates: dict[str, Any] = {name: _numbers(given[name]) for name in rest}
            return cls(**rates, **whole, workspace=space, forbidden=tuple(forbidden))
        except (TypeError, KeyError, ValueError) as error:
            raise ConfigError(f"these are no limits: {error}") from None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def learned(
        self, episodes: Sequence[Float[np.ndarray, "_ dim"]], fps: float | int, *, margin: float = 1.25
    ) -> Limits:
        """These limits with the velocities, accelerations and jerks of demonstrations, times ``margin``."""
        delta, scale = np.array([k == "delta" for k in self.kinds]), vector(self.scale, np.ones(self.dim))
        # What a demonstrator never moves, a policy moves a little.
        least = _LEAST * np.subtract(self.high, self.low) * np.where(delta, scale, 1.0) * fps
        most = least * fps ** np.arange(3)[:, None]
        for actions in episodes:
            speed = np.where(delta, actions * scale * fps, np.diff(actions, axis=0, prepend=actions[:1]) * fps)
            speed = np.concatenate([np.zeros((2, self.dim)), speed])  # they begin at rest
            for order in range(3):
                of = np.diff(speed, order, axis=0) * fps**order
                most[order] = np.maximum(most[order], np.abs(of).max(0, initial=0))
        velocity, acceleration, jerk = (tuple(float(x) for x in row * margin) for row in most)
        return replace(self, velocity=velocity, acceleration=acceleration, jerk=jerk)


def _numbers(value: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(x) for x in value)


def vector(value: Sequence[float] | None, default: Vector) -> Vector:
    """What a limit says of each dimension, or a default where it says nothing."""
    return default if value is None else np.asarray(value, np.float64)
