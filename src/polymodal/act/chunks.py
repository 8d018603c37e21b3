"""Carrying out chunks of actions: one action a control step, from one queue.

- `Receding`: a chunk is computed when its forerunner is used up; the robot waits.
- `Ensemble`: a chunk at every step, and the mean of what all of them say about it (ACT, arXiv 2304.13705).
- `Asynchronous`: the next chunk is computed while the current one runs, and simply takes its place.
- `RealTime`: the same, but the next chunk is told what the robot will have done by then (arXiv 2506.07339).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float32

from polymodal.core.errors import ConfigError, UnsupportedError
from polymodal.core.observation import Observation
from polymodal.core.verbs import Acts, Continues, history_of

Action: TypeAlias = Float32[np.ndarray, " action_dim"]
Chunk: TypeAlias = Float32[np.ndarray, "horizon action_dim"]
Left: TypeAlias = Float32[np.ndarray, "left action_dim"]


@dataclass(frozen=True, kw_only=True)
class Receding:
    """Some steps of a chunk, then the next one.

    Attributes:
        execute: steps of a chunk that are carried out; None: all.
    """

    execute: int | None = None


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """The weighted mean of all chunks that reach the step.

    Attributes:
        decay: the i-th oldest chunk weighs ``exp(-decay * i)``: what was said first counts most.
    """

    decay: float = 0.01


@dataclass(frozen=True, kw_only=True)
class Asynchronous:
    """The next chunk while the current one runs.

    Attributes:
        execute: steps of a chunk after which the next one is begun.
        delay: steps that the next chunk takes. None: it is computed in a thread, and takes what it takes; a number: it
            is computed at once and held back so long, which makes an episode in a simulator repeatable.
    """

    execute: int
    delay: int | None = None


@dataclass(frozen=True, kw_only=True)
class RealTime(Asynchronous):
    """The next chunk while the current one runs, in agreement with it.

    Attributes:
        expect: the delay that is reckoned with before one was measured; then it is the longest of the last ten.
    """

    expect: int = 1


Way: TypeAlias = Receding | Ensemble | Asynchronous


@dataclass(kw_only=True)
class Playback:
    """What was measured since the last reset.

    Attributes:
        delays: of each chunk that was computed beside another, in control steps.
        stalls: how often the robot had nothing to do, and waited.
        borders: change of each number of the action where one chunk follows another, in the robot's units.
        insides: the same between the actions of one chunk.
    """

    delays: list[int] = field(default_factory=list)
    stalls: int = 0
    borders: list[Action] = field(default_factory=list)
    insides: list[Action] = field(default_factory=list)

    @property
    def jump(self) -> float:
        """How much more an action changes, as a length, from chunk to chunk than within one; NaN without a border."""
        return jump([self])


def jump(played: Sequence[Playback], numbers: slice = slice(None)) -> float:
    """`Playback.jump` over episodes, of some of an action's ``numbers``: metres and openings do not add up."""
    borders = [np.linalg.norm(change[numbers]) for one in played for change in one.borders]
    insides = [np.linalg.norm(change[numbers]) for one in played for change in one.insides]
    if not borders or not insides:
        return math.nan
    return float(np.mean(borders)) / max(float(np.mean(insides)), 1e-12)


class Player:
    """Answers each observation with one action, by the chunks of a policy.

    Args:
        policy: whose chunks.
        way: how they are carried out.
        generator: seeds policies that sample.

    Raises:
        ConfigError: the steps or the delay do not fit the horizon.
        UnsupportedError: `RealTime` with a policy that cannot go on from a chunk.
    """

    def __init__(self, policy: Acts, way: Way, *, generator: torch.Generator | None = None) -> None:
        _check(policy, way)
        self.policy, self.way, self._generator = policy, way, generator
        threaded = isinstance(way, Asynchronous) and way.delay is None
        self._pool = ThreadPoolExecutor(1, "polymodal-chunks") if threaded else None
        self._next: Future[Chunk] | None = None
        self.reset()

    def reset(self) -> None:
        """Forgets everything: an episode begins."""
        self._drop_next()
        self.played = Playback()
        self._step = 0
        self._past: deque[Observation] = deque(maxlen=history_of(self.policy) - 1)
        self._chunks: deque[tuple[int, Chunk]] = deque()  # (step of its first action, actions); the last is carried out
        self._last: tuple[int, Action] | None = None  # the chunk of the action before, and the action

    def close(self) -> None:
        """Ends the thread, if there is one."""
        self._drop_next()
        if self._pool is not None:
            self._pool.shutdown()

    def _drop_next(self) -> None:
        if self._next is not None and not self._next.cancel():
            self._next.exception()  # waits: it must not write into the next episode's generator
        self._next = None

    @property
    def left(self) -> Left | None:
        """What is left of the chunk that is carried out, from the next step on."""
        return self._chunks[-1][1][self._step - self._chunks[-1][0] :] if self._chunks else None

    def action(self, observation: Observation) -> Action:
        """The action of this control step; a policy with a history is shown what came before, too."""
        seen, observation = observation, replace(observation, past=tuple(self._past))
        self._past.append(seen)
        if isinstance(self.way, Ensemble):
            action = self._averaged(observation, self.way.decay)
        else:
            if isinstance(self.way, Asynchronous):
                self._overlap(observation, self.way)
            elif self._used_up(self.way.execute or self.policy.horizon):
                self._put(self._step, self._compute(observation))
            begin, chunk = self._chunks[-1]
            action = chunk[self._step - begin].copy()
            self._measure(begin, action)
        self._step += 1
        return action

    def _used_up(self, execute: int) -> bool:
        return not self._chunks or self._step - self._chunks[-1][0] >= execute

    def _compute(self, observation: Observation, previous: Left | None = None, frozen: int = 0) -> Chunk:
        batch = self.policy.observe([observation])
        if previous is None:
            out = self.policy.act(batch, generator=self._generator)
        else:
            assert isinstance(self.policy, Continues)
            left = torch.from_numpy(previous)[None]
            out = self.policy.continue_chunk(batch, left, frozen, generator=self._generator)
        return out[0].float().cpu().numpy()

    def _put(self, begin: int, chunk: Chunk) -> None:
        self._chunks.clear()
        self._chunks.append((begin, chunk))

    def _measure(self, begin: int, action: Action) -> None:
        if self._last is not None:
            (self.played.insides if begin == self._last[0] else self.played.borders).append(action - self._last[1])
        self._last = (begin, action)

    # -- several chunks for one step

    def _averaged(self, observation: Observation, decay: float) -> Action:
        if self._chunks and self._step - self._chunks[0][0] >= self.policy.horizon:
            self._chunks.popleft()
        self._chunks.append((self._step, self._compute(observation)))
        said = np.stack([chunk[self._step - begin] for begin, chunk in self._chunks])
        weights = np.exp(-decay * np.arange(len(said), dtype=np.float32))
        return (weights @ said / weights.sum()).astype(np.float32)

    # -- the next chunk while one is carried out

    def _overlap(self, observation: Observation, way: Asynchronous) -> None:
        if not self._chunks:
            self._put(self._step, self._compute(observation))
            return
        self._arrive(way)
        if self._next is None and self._used_up(way.execute):
            self._begun, self._next = self._step, self._begin(observation, way)
            self._arrive(way)

    def _arrive(self, way: Asynchronous) -> None:
        if self._next is None:
            return
        waited = self._step - self._begun
        ready = self._next.done() if way.delay is None else waited >= way.delay
        if ready or self._used_up(self.policy.horizon):
            self.played.stalls += not ready
            chunk, self._next = self._next.result(), None
            self.played.delays.append(waited)
            self._put(self._begun, chunk)

    def _begin(self, observation: Observation, way: Asynchronous) -> Future[Chunk]:
        previous: Left | None = None
        frozen = 0
        if isinstance(way, RealTime):
            previous = self.left
            assert previous is not None
            frozen = max(self.played.delays[-10:], default=way.expect) if way.delay is None else way.delay
            frozen = min(frozen, len(previous))
        if self._pool is not None:
            return self._pool.submit(self._compute, observation, previous, frozen)
        done: Future[Chunk] = Future()
        done.set_result(self._compute(observation, previous, frozen))
        return done


def _check(policy: Acts, way: Way) -> None:
    horizon = policy.horizon
    if isinstance(way, Ensemble):
        return
    execute = horizon if way.execute is None else way.execute
    if not 1 <= execute <= horizon:
        raise ConfigError(f"{execute} steps of a chunk cannot be carried out: it has {horizon}")
    if isinstance(way, Asynchronous) and way.delay is not None:
        needed = max(execute, way.delay) + way.delay
        if way.delay < 0 or needed > horizon:
            raise ConfigError(
                f"{execute} steps and a delay of {way.delay} need chunks of {needed}, and they have {horizon}"
            )
    if isinstance(way, RealTime) and not isinstance(policy, Continues):
        raise UnsupportedError(
            f"{type(policy).__name__} cannot go on from a chunk (no continue_chunk): use Asynchronous"
        )
