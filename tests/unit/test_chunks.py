"""Carrying out chunks: which action of which chunk is used at which step."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from polymodal.act.chunks import Asynchronous, Ensemble, Player, RealTime, Receding
from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError, UnsupportedError
from polymodal.core.observation import Observation
from polymodal.samplers.flow import Velocity, continued, euler


class Clock:
    """Its actions say (time of the observation, step in the chunk)."""

    horizon, action_dim = 8, 2

    def observe(self, observations: Sequence[Observation]) -> Batch:
        return Batch(time=torch.tensor([o.time for o in observations]))

    def act(self, batch: Batch, *, generator: torch.Generator | None = None) -> Tensor:
        out = torch.zeros(batch.size, self.horizon, 2)
        out[..., 0], out[..., 1] = batch["time"][:, None], torch.arange(self.horizon)
        return out

    def lesson(self, observations: Any, actions: Any, valid: Any) -> Batch:
        raise AssertionError


class Continuing(Clock):
    """Writes down what it is asked to go on from."""

    def __init__(self) -> None:
        self.asked: list[tuple[Tensor, int]] = []

    def continue_chunk(self, batch: Batch, previous: Tensor, frozen: int, *, generator: Any = None) -> Tensor:
        self.asked.append((previous, frozen))
        return self.act(batch)


def play(policy: Clock, way: Any, steps: int) -> tuple[list[tuple[float, float]], Player]:
    player = Player(policy, way)
    actions = [player.action(Observation(time=float(t))) for t in range(steps)]
    assert all(a.shape == (2,) and a.dtype == np.float32 for a in actions)
    player.close()
    return [(float(a[0]), float(a[1])) for a in actions], player


@pytest.mark.parametrize(("execute", "every"), [(None, 8), (3, 3), (1, 1)])
def test_receding(execute: int | None, every: int) -> None:
    actions, player = play(Clock(), Receding(execute=execute), 20)
    assert actions == [(t - t % every, t % every) for t in range(20)]
    assert len(player.played.borders) == 19 // every


def test_ensemble_weighs_the_oldest_most() -> None:
    decay = 0.1
    actions, _ = play(Clock(), Ensemble(decay=decay), 20)
    for t, (time, step) in enumerate(actions):
        begins = np.arange(max(0, t - 7), t + 1)
        weights = np.exp(-decay * np.arange(len(begins)))
        assert time == pytest.approx(weights @ begins / weights.sum(), rel=1e-5)
        assert time + step == pytest.approx(t, abs=1e-4)  # each said something about this very step


@pytest.mark.parametrize(("execute", "delay"), [(4, 0), (4, 1), (4, 4), (2, 4), (1, 3), (5, 3)])
def test_asynchronous_counts_the_delay(execute: int, delay: int) -> None:
    actions, player = play(Clock(), Asynchronous(execute=execute, delay=delay), 30)
    assert all(time + step == t for t, (time, step) in enumerate(actions))  # never an action of another step
    begins = sorted({time for time, _ in actions})
    assert begins == [0, *(t for t in range(execute, 30, max(execute, delay)) if t + delay < 30)]
    assert set(player.played.delays) == {delay}
    assert player.played.stalls == 0
    assert all(step >= delay for time, step in actions if time)


def test_real_time_is_told_what_is_being_done() -> None:
    policy = Continuing()
    play(policy, RealTime(execute=4, delay=2), 16)
    assert len(policy.asked) == 3
    for number, (previous, frozen) in enumerate(policy.asked):
        assert frozen == 2
        assert previous.shape == (1, 4, 2)  # what is left of eight steps after four
        assert previous[0, :, 0].eq(number * 4).all()
        assert previous[0, :, 1].tolist() == [4, 5, 6, 7]


class Slow(Continuing):
    """Waits to be let go."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Semaphore(1)

    def act(self, batch: Batch, *, generator: torch.Generator | None = None) -> Tensor:
        assert self.go.acquire(timeout=30)
        return super().act(batch)


@pytest.fixture
def slow() -> Iterator[tuple[Slow, Player]]:
    policy = Slow()
    player = Player(policy, RealTime(execute=3, expect=2))
    yield policy, player
    policy.go.release()
    player.close()


def wait_for(player: Player) -> None:
    assert player._next is not None
    player._next.result(timeout=30)


def test_delay_is_measured(slow: tuple[Slow, Player]) -> None:
    policy, player = slow
    actions = [player.action(Observation(time=float(t))) for t in range(6)]  # begun at 3
    policy.go.release()
    wait_for(player)
    actions += [player.action(Observation(time=float(t))) for t in range(6, 8)]
    assert [a[0] for a in actions] == [0] * 6 + [3] * 2
    assert [a.sum() for a in actions] == list(range(8))
    assert player.played.delays == [3]
    policy.go.release()
    wait_for(player)
    player.action(Observation(time=8.0))
    assert [frozen for _, frozen in policy.asked] == [2, 3]  # expected, then measured


def test_robot_waits_when_a_chunk_is_too_late(slow: tuple[Slow, Player]) -> None:
    policy, player = slow
    for t in range(8):
        player.action(Observation(time=float(t)))
    timer = threading.Timer(0.05, policy.go.release)
    timer.start()
    assert player.action(Observation(time=8.0)).tolist() == [3.0, 5.0]
    timer.join()
    assert (player.played.stalls, player.played.delays) == (1, [5])


class Looking(Clock):
    """Its actions say when the observations were made that it is shown."""

    horizon, history = 1, 3

    def observe(self, observations: Sequence[Observation]) -> Batch:
        (shown,) = observations
        assert all(not o.past for o in shown.past)  # a chain would keep the whole episode
        return Batch(times=torch.tensor([[o.time for o in shown.window(3)]]))

    def act(self, batch: Batch, *, generator: torch.Generator | None = None) -> Tensor:
        return torch.tensor([[[batch["times"].shape[1], batch["times"].sum()]]])


def test_history_is_of_control_steps() -> None:
    actions, _ = play(Looking(), Receding(), 5)
    assert actions == [(1, 0), (2, 1), (3, 3), (3, 6), (3, 9)]


def test_reset_forgets() -> None:
    policy = Clock()
    player = Player(policy, Asynchronous(execute=4, delay=4))
    for t in range(6):
        player.action(Observation(time=float(t)))
    player.reset()
    action = player.action(Observation(time=100.0))
    assert action.tolist() == [100.0, 0.0]
    action[:] = torch.nan  # what becomes of an action does not reach its chunk
    left = player.left
    assert left is not None
    assert np.isfinite(left).all()
    assert not player.played.borders


def test_error_of_the_thread_is_raised() -> None:
    class Broken(Clock):
        def act(self, batch: Batch, *, generator: torch.Generator | None = None) -> Tensor:
            if batch["time"].item():
                raise ConfigError("broken")
            return super().act(batch)

    player = Player(Broken(), Asynchronous(execute=1))
    with pytest.raises(ConfigError, match="broken"):
        [player.action(Observation(time=float(t))) for t in range(12)]
    player.close()


def test_jump_compares_borders_with_insides() -> None:
    class Ramp(Clock):
        def act(self, batch: Batch, *, generator: torch.Generator | None = None) -> Tensor:
            return (batch["time"][:, None, None] + torch.arange(8)[:, None]).expand(-1, -1, 2) + self.offset()

        def offset(self) -> float:
            return 0.0

    class Jumping(Ramp):
        count = 0

        def offset(self) -> float:
            self.count += 1
            return 5.0 * self.count

    assert play(Ramp(), Receding(execute=4), 40)[1].played.jump == pytest.approx(1.0)
    assert play(Jumping(), Receding(execute=4), 40)[1].played.jump == pytest.approx(6.0)
    assert np.isnan(play(Ramp(), Receding(), 8)[1].played.jump)


@pytest.mark.parametrize(
    "way",
    [
        Receding(execute=0), Receding(execute=9), Asynchronous(execute=5, delay=4), Asynchronous(execute=1, delay=5),
        Asynchronous(execute=4, delay=-1), RealTime(execute=9),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_horizon(way: Any) -> None:
    with pytest.raises(ConfigError):
        Player(Continuing(), way)


def test_real_time_needs_a_policy_that_goes_on() -> None:
    with pytest.raises(UnsupportedError, match="continue_chunk"):
        Player(Clock(), RealTime(execute=4))


class Homing(Clock):
    """The exact flow of a robot on a line that goes half of the way home at each step, plus a unit of chance.

    Its chunks hang together as those of a demonstrator do that sees what chance did: what one action overdoes, the
    next ones make up for.
    """

    horizon, action_dim = 12, 1

    def __init__(self) -> None:
        steps, back = torch.arange(self.horizon), 0.5
        since = (steps[:, None] - steps - 1).clamp(min=0)
        root = torch.eye(self.horizon) - (back * (1 - back) ** since).tril(-1)
        self.mean, self.covariance = -back * (1 - back) ** steps[:, None].float(), root @ root.T

    def observe(self, observations: Sequence[Observation]) -> Batch:
        return Batch(place=torch.from_numpy(np.stack([o.state for o in observations if o.state is not None])))

    def velocity(self, batch: Batch) -> Velocity:
        mean = (batch["place"] @ self.mean.T)[..., None]
        return lambda x, t: self.gain(float(t[0])) @ (x - (1 - t) * mean) - mean

    @cache  # noqa: B019
    def gain(self, time: float) -> Tensor:
        eye = torch.eye(self.horizon)
        total = time**2 * eye + (1 - time) ** 2 * self.covariance
        return (time * eye - (1 - time) * self.covariance) @ torch.linalg.inv(total)

    def act(self, batch: Batch, *, generator: torch.Generator | None = None) -> Tensor:
        return euler(self.velocity(batch), torch.randn(1, self.horizon, 1, generator=generator))

    def continue_chunk(self, batch: Batch, previous: Tensor, frozen: int, *, generator: Any = None) -> Tensor:
        noise = torch.randn(1, self.horizon, 1, generator=generator)
        return continued(self.velocity(batch), noise, previous, frozen)


def away(way: Any) -> tuple[float, float]:
    """How far from home, root mean square: while nothing happens, and from 14 steps after a push of ten on."""
    calm: list[float] = []
    pushed: list[float] = []
    for seed in range(4):
        player, place = Player(Homing(), way, generator=torch.Generator().manual_seed(seed)), 0.0
        for t in range(60):
            place += 10.0 * (t == 22)
            place += float(player.action(Observation(state=np.array([place], np.float32)))[0])
            (calm if 8 <= t < 22 else pushed if t >= 36 else []).append(place)
    return float(np.sqrt(np.square(calm).mean())), float(np.sqrt(np.square(pushed).mean()))


def test_real_time_chunks_make_up_for_what_was_done_meanwhile() -> None:
    """Whole way round with a policy that is known exactly: which steps are left, which are frozen, the pull's sign."""
    waited = away(Receding(execute=4))
    naive, real = (away(way(execute=4, delay=4)) for way in (Asynchronous, RealTime))
    assert real[0] < 1.3 * waited[0]
    assert naive[0] > 1.8 * waited[0]
    assert real[1] < 2.2 * waited[1]
    assert naive[1] > 5 * waited[1]
