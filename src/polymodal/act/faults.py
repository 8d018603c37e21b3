"""Faults that are put between a robot and its policy on purpose, and how many of them the guard catches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, TypeAlias

import numpy as np
from jaxtyping import Float

from polymodal.act.guard import Guard
from polymodal.act.limits import Limits
from polymodal.act.runner import Controller, Environment, run
from polymodal.core.errors import ConfigError, did_you_mean
from polymodal.core.interval import Interval, wilson
from polymodal.core.observation import Observation

QUICK: Final = 2  # ticks after which a hard fault must be caught
_AGE: Final = 3  # ticks that a stale observation is old
_WATCHED: Final = 10  # ticks that a hard fault lasts
_WAY_OUT: Final = 150  # ticks that the others last: a robot may first show at a wall what is wrong

See: TypeAlias = Callable[["Injection", Observation], Observation | None]
Ask: TypeAlias = Callable[["Injection", np.ndarray, Observation | None], np.ndarray | None]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One way to fail: of what is seen, or of what is asked. A hard one must be caught within `QUICK` ticks."""

    hard: bool = True
    see: See | None = None
    ask: Ask | None = None


def _frozen(fault: Injection, now: Observation) -> Observation:
    return _with(now, fault.camera, fault.past[-1].images[fault.camera])


def _black(fault: Injection, now: Observation) -> Observation:
    return _with(now, fault.camera, np.zeros_like(now.images[fault.camera]))


def _swapped(fault: Injection, now: Observation) -> Observation:
    names = list(now.images)
    return replace(now, images=dict(zip(names, [now.images[n] for n in [*names[1:], names[0]]], strict=True)))


def strange(now: Observation) -> Observation:
    """The scene under another light, with something large in it that was never there."""
    return replace(now, images={name: _strange(picture) for name, picture in now.images.items()})


def _strange(picture: np.ndarray) -> np.ndarray:
    out = (picture[..., [1, 2, 0]] * 0.8 + 20).astype(np.uint8)
    height, width = out.shape[:2]
    out[height // 3 : 2 * height // 3, width // 8 : width // 2] = (230, 60, 200)
    return out


def _with(now: Observation, camera: str, picture: np.ndarray) -> Observation:
    return replace(now, images={**now.images, camera: picture})


def _one(value: float) -> Ask:
    def ask(fault: Injection, action: np.ndarray, _: Observation | None) -> np.ndarray:
        return np.where(np.arange(len(action)) == fault.axis, value, action)

    return ask


def _spike(fault: Injection, action: np.ndarray, _: Observation | None) -> np.ndarray:
    if fault.tick > fault.at:
        return action
    away = 5 * (fault.high - fault.low)[fault.axis] * (1 if action[fault.axis] >= fault.middle[fault.axis] else -1)
    return action + away * (np.arange(len(action)) == fault.axis)


def _flipped(fault: Injection, action: np.ndarray, _: Observation | None) -> np.ndarray:
    return 2 * fault.middle - action


def _scaled(fault: Injection, action: np.ndarray, _: Observation | None) -> np.ndarray:
    return fault.middle + (action - fault.middle) * 4 + 0.4 * (fault.high - fault.low)


def _fast(fault: Injection, action: np.ndarray, _: Observation | None) -> np.ndarray:
    """Three times as fast as allowed, in the direction of the motion."""
    out = action.copy()
    if fault.limits.kinds[fault.axis] == "delta":
        out[fault.axis] = 3 * (fault.high if action[fault.axis] >= 0 else fault.low)[fault.axis]
    else:
        out[fault.axis] = fault.middle[fault.axis] + 3 * (fault.tick - fault.at + 1) * fault.pace
    return out


def _outwards(fault: Injection, action: np.ndarray, _: Observation | None) -> np.ndarray:
    """To the wall and on, as fast as the limits allow; away from where the robot was going, lest it arrive."""
    out = action.copy()
    if fault.limits.kinds[fault.axis] == "delta":
        out[fault.axis] = (fault.low if fault.start[fault.axis] > 0 else fault.high)[fault.axis]
    else:
        out[fault.axis] = fault.start[fault.axis] + (fault.tick - fault.at + 1) * fault.pace
    return out


FAULTS: Final[Mapping[str, Kind]] = {
    "nan": Kind(ask=_one(np.nan)),
    "inf": Kind(ask=_one(np.inf)),
    "spike": Kind(ask=_spike),
    "velocity": Kind(ask=_fast),
    "workspace exit": Kind(ask=_outwards),  # begins where the robot would leave: braking before that is in time
    "sign flip": Kind(ask=_flipped, hard=False),
    "wrong scale": Kind(ask=_scaled, hard=False),
    "late chunk": Kind(ask=lambda fault, action, now: None),
    "dropped frames": Kind(see=lambda fault, now: None),
    "stale observation": Kind(see=lambda fault, now: fault.past[0]),
    "black frame": Kind(see=_black),
    "frozen camera": Kind(see=_frozen),
    "swapped cameras": Kind(see=_swapped),
    "unseen scene": Kind(see=lambda fault, now: strange(now), hard=False),
}


class Injection:
    """One fault from the tick ``at`` on, see `runner.Fault`.

    Args:
        name: of `FAULTS`.
        limits: of the robot that it strikes.
        fps: its actions a second.
        at: the first tick.
        axis: of the action that is struck, where one is.
        camera: that is struck, where one is.
    """

    def __init__(
        self, name: str, limits: Limits, *, fps: float | int, at: int, axis: int = 0, camera: str = ""
    ) -> None:
        if name not in FAULTS:
            raise ConfigError(f"no fault {name!r}{did_you_mean(name, FAULTS)}")
        self.kind, self.limits, self.at, self.axis, self.camera = FAULTS[name], limits, at, axis, camera
        self.low, self.high = np.array(limits.low), np.array(limits.high)
        delta = np.array([kind == "delta" for kind in limits.kinds])
        self.middle = np.where(delta, 0.0, (self.low + self.high) / 2)
        fastest = (self.high - self.low)[axis] * fps if limits.velocity is None else limits.velocity[axis]
        self.pace = fastest / fps  # the farthest that a tick may lead
        self.reset(0)

    def reset(self, episode: int) -> None:
        """Nothing is broken yet."""
        self.tick = 0
        self.past: list[Observation] = []
        self.start = self.middle

    def seen(self, observation: Observation) -> Observation | None:
        """What arrives of an observation."""
        if self.kind.see is not None and self.tick >= self.at:
            return self.kind.see(self, observation)
        self.past = [*self.past[1 - _AGE :], observation] if self.tick < self.at else self.past
        return observation

    def asked(self, action: np.ndarray | None, observation: Observation | None) -> np.ndarray | None:
        """What arrives of an action; the tick ends."""
        if action is not None and self.tick < self.at:
            self.start = np.asarray(action, np.float64)
        elif action is not None and self.kind.ask is not None:
            action = self.kind.ask(self, np.asarray(action, np.float64), observation)
        self.tick += 1
        return action


@dataclass(frozen=True, kw_only=True)
class Caught:
    """Of one kind of fault: how many were injected, caught, caught within `QUICK` ticks; the slowest, in ticks."""

    injected: int
    caught: int
    quick: int
    slowest: int
    causes: tuple[str, ...]

    @property
    def missed(self) -> int:
        return self.injected - self.caught


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What the guard makes of faults and of clean episodes.

    Attributes:
        faults: by name.
        false_stops: clean episodes in which the robot was held or stopped.
        limited: share of the ticks of clean episodes in which an action was limited.
        auroc: of telling the pictures of clean episodes from strange ones by their score.
    """

    faults: Mapping[str, Caught]
    false_stops: Interval
    limited: float
    auroc: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def survey(
    env: Environment,
    controller: Controller,
    guard: Callable[[], Guard],
    *,
    clean: int,
    injected: int,
    seed: int = 0,
    names: Sequence[str] = tuple(FAULTS),
) -> Survey:
    """Runs clean episodes and, for every fault, episodes in which it strikes while the robot moves.

    A fault is caught by the first intervention from its tick on that the same episode without it does not have. One
    that is not hard may be caught any time before the episode ends.

    Args:
        env: where.
        controller: what acts; it should succeed.
        guard: makes a fresh guard.
        clean: episodes without a fault.
        injected: episodes of each fault; at most ``clean``.
        seed: of the first episode.
        names: of the faults.
    """
    rng = np.random.default_rng(seed)
    runs, scores, odd, held, limited, ticks = [], [], [], 0, 0, 0
    for number in range(clean):
        one = guard()
        commands: list[np.ndarray] = []
        views: list[Observation] = []
        run(env, controller, one, episodes=1, seed=seed + number, seen=_keeps(commands, views))
        runs.append((commands, {(i.tick, i.causes) for i in one.interventions}))
        cameras = list(views[0].images)
        held += any(i.decision != "limited" for i in one.interventions)
        limited += sum(i.decision == "limited" for i in one.interventions)
        ticks += len(commands)
        if one.novelty is not None:
            scores += [one.novelty.score(view) for view in views]
            odd += [one.novelty.score(strange(view)) for view in views]
    found = {}
    for name in names:
        delays: list[int] = []
        causes: dict[str, None] = {}
        for number in range(injected):
            commands, usual = runs[number]
            one = guard()
            at, axis = _moment(commands, one.limits, rng)
            fault = Injection(
                name, one.limits, fps=one.fps, at=at, axis=axis, camera=cameras[int(rng.integers(len(cameras)))]
            )
            lasts = _WATCHED if FAULTS[name].hard and name != "workspace exit" else _WAY_OUT
            run(env, controller, one, episodes=1, seed=seed + number, steps=at + lasts, fault=fault)
            first = next((i for i in one.interventions if i.tick >= at and (i.tick, i.causes) not in usual), None)
            if first is not None:
                delays.append(0 if name == "workspace exit" else first.tick - at)
                causes |= dict.fromkeys(first.causes)
        quick = sum(delay < QUICK for delay in delays)
        found[name] = Caught(
            injected=injected, caught=len(delays), quick=quick, slowest=max(delays, default=-1), causes=tuple(causes)
        )
    area = auroc(np.array(scores), np.array(odd)) if scores else float("nan")
    return Survey(faults=found, false_stops=wilson(held, clean), limited=limited / max(ticks, 1), auroc=area)


def _keeps(commands: list[np.ndarray], views: list[Observation]) -> Callable[[int, Observation, np.ndarray], None]:
    def seen(_: int, view: Observation, command: np.ndarray) -> None:
        commands.append(command)
        views.append(view)

    return seen


def _moment(commands: Sequence[np.ndarray], limits: Limits, rng: np.random.Generator) -> tuple[int, int]:
    """A tick at which the robot moves, and the axis along which it moves the most there."""
    delta = np.array([kind == "delta" for kind in limits.kinds])
    motion = np.where(delta, commands, np.diff(commands, axis=0, prepend=commands[:1]))
    motion = np.abs(motion) / np.subtract(limits.high, limits.low)
    if limits.workspace is not None:
        motion = motion[:, list(limits.hand)]
    fast = np.flatnonzero(motion.max(1) >= 0.5 * motion.max())
    # There is a before, and an after in which the way to a wall has room.
    fast = fast[(fast > _AGE) & (fast < min(len(commands) // 2 + _AGE, len(commands) - QUICK))]
    at = int(rng.choice(fast)) if len(fast) else len(commands) // 2
    return at, int(motion[at].argmax())


def auroc(usual: Float[np.ndarray, " n"], odd: Float[np.ndarray, " m"]) -> float:
    """The chance that an odd one scores above a usual one; ties count half."""
    both = np.concatenate([usual, odd])
    order = np.sort(both)
    ranks = (np.searchsorted(order, both, "left") + np.searchsorted(order, both, "right") + 1) / 2
    return float((ranks[len(usual) :].sum() - len(odd) * (len(odd) + 1) / 2) / (len(usual) * len(odd)))
