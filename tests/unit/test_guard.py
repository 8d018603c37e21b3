"""Limits hold whatever is asked, every kind of distrust holds the robot, and a stop stays."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polymodal.act.guard import Guard, GuardConfig, spread
from polymodal.act.limiter import Limiter
from polymodal.act.limits import Limits, Zone
from polymodal.act.novelty import Novelty, tail, thumbnail
from polymodal.act.stops import stop_on_key, stop_on_signals, watchdog
from polymodal.core.errors import ConfigError, DataError, UnsupportedError
from polymodal.core.observation import Observation
from tests.toy_robot import FPS, LIMITS, STEP, demonstrations

WILD = [0.01, 1.0, 100.0]


def rates(limits: Limits, sent: np.ndarray, fps: float) -> list[np.ndarray]:
    """Velocity, acceleration and jerk of commands that began at rest at the first of them."""
    delta = np.array([kind == "delta" for kind in limits.kinds])
    scale = np.ones(limits.dim) if limits.scale is None else np.array(limits.scale)
    v = np.where(delta, sent * scale, np.diff(sent, axis=0, prepend=sent[:1])) * fps
    a = np.diff(v, axis=0, prepend=0 * v[:1]) * fps
    return [v, a, np.diff(a, axis=0, prepend=0 * a[:1]) * fps]


def check(limits: Limits, sent: np.ndarray, fps: float) -> None:
    assert np.isfinite(sent).all()
    assert (sent >= np.array(limits.low) - 1e-7).all()
    assert (sent <= np.array(limits.high) + 1e-7).all()
    for values, name in zip(rates(limits, sent, fps), ("velocity", "acceleration", "jerk"), strict=True):
        most = getattr(limits, name)
        assert most is None or (np.abs(values) <= np.array(most) * (1 + 1e-6) + 1e-9).all(), name


@given(
    st.integers(1, 8),
    st.sampled_from([5.0, 20.0, 50.0]),
    st.integers(0, 2**31),
    st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_limits_hold_whatever_is_asked(dim: int, fps: float, seed: int, limited: list[bool]) -> None:
    rng = np.random.default_rng(seed)
    velocity = rng.uniform(0.2, 3, dim)
    acceleration = velocity * rng.uniform(1, 2 * fps, dim)
    jerk = acceleration * rng.uniform(2, 2 * fps, dim)
    rates = [tuple(x) if on else None for x, on in zip((velocity, acceleration, jerk), limited, strict=True)]
    limits = Limits(
        low=tuple(-rng.uniform(0.05, 1, dim)), high=tuple(rng.uniform(0.05, 1, dim)),
        kinds=tuple(rng.choice(["position", "delta", "torque"], dim).tolist()),
        velocity=rates[0], acceleration=rates[1], jerk=rates[2],
    )  # fmt: skip
    limiter = Limiter(limits, fps)
    asked = rng.normal(0, 1, (40, dim)) * rng.choice(WILD, (40, 1)) + rng.choice([-9.0, 0.0, 9.0], (1, dim))
    sent = np.stack([limiter.step(None if n % 7 == 3 else each)[0] for n, each in enumerate(asked)])
    check(limits, sent, fps)


def wide(dim: int, rng: np.random.Generator) -> Limits:
    """Slow enough that a stop takes many ticks: walls and zones must be foreseen."""
    low, high = -rng.uniform(0.3, 1, dim), rng.uniform(0.3, 1, dim)
    v = rng.uniform(0.5, 2, dim)
    a = v * rng.uniform(4, 20, dim)
    return Limits(
        low=tuple(low),
        high=tuple(high),
        velocity=tuple(v),
        acceleration=tuple(a),
        jerk=tuple(a * rng.uniform(10, 50, dim)),
    )


def test_a_hundred_thousand_random_actions() -> None:
    rng = np.random.default_rng(0)
    limits = wide(100, rng)
    limiter, asked = Limiter(limits, 50.0), rng.normal(0, 1, (1000, 100))
    asked = asked * rng.choice(WILD, (1000, 1)) + rng.choice([-1.0, 0.0, 1.0], (20, 1, 100)).repeat(50, 1).reshape(
        1000, 100
    )
    check(limits, np.stack([limiter.step(each)[0] for each in asked]), 50.0)


ZONES = (Zone(low=(-0.1, -0.1, -0.1), high=(0.1, 0.1, 0.1)), Zone(low=(0.3, -0.5, -0.5), high=(0.32, 0.5, 0.5)))


def zoned(rng: np.random.Generator, steps: int) -> None:
    space = Zone(low=(-0.5, -0.5, -0.5), high=(0.5, 0.5, 0.5))
    at = {"measured": (0, 1, 2, -1), "workspace": space, "forbidden": ZONES}
    limits = replace(wide(4, rng), low=(-1.0,) * 4, high=(1.0,) * 4, **at)
    limiter = Limiter(limits, 50.0)
    sent = [limiter.step(np.array([-0.3, -0.3, 0.0, 0.0]))[0]]
    for _ in range(steps // 20):
        goal = rng.normal(0, 0.5, 4) * rng.choice([1.0, 100.0])
        sent += [limiter.step(goal + rng.normal(0, 0.1, 4))[0] for _ in range(20)]
    path = np.array(sent)
    check(limits, path, 50.0)
    assert space.holds(path[:, :3])
    assert not any(zone.crossed(path[:, :3]) for zone in ZONES)
    assert np.ptp(path[:, :3], axis=0).min() > 0.2, "it moved"


def test_a_hand_never_enters_a_forbidden_zone_nor_leaves_its_workspace() -> None:
    zoned(np.random.default_rng(1), 1500)


@pytest.mark.slow
def test_a_hundred_thousand_actions_among_zones() -> None:
    for seed in range(20):
        zoned(np.random.default_rng(seed), 5000)


def test_a_zone_is_found_between_two_points_too() -> None:
    zone = ZONES[1]
    assert zone.crossed(np.array([[0.0, 0, 0], [1.0, 0, 0]]))  # straight through a thin wall
    assert not zone.crossed(np.array([[0.0, 0, 0.6], [1.0, 0, 0.6]]))
    assert not zone.crossed(np.array([[0.0, 0, 0], [0.29, 0.4, 0.4]]))
    assert zone.crossed(np.array([[0.31, 0, 0], [0.31, 0, 0]]))


def test_what_is_inside_the_limits_is_sent_to_the_last_bit() -> None:
    guard = Guard(LIMITS, fps=FPS)
    guard.reset(np.array([0.0, 0, 0.5, 0]))
    rng = np.random.default_rng(0)
    for n in range(50):
        action = np.float32([*rng.uniform(-0.02, 0.02, 3), 0.5])
        np.testing.assert_array_equal(guard(action, seen(n)), action)
    assert not guard.interventions


def test_a_robot_that_was_pushed_out_may_come_back_but_not_go_further() -> None:
    limiter = Limiter(LIMITS, FPS)
    state = np.array([1.2, 0, 0.5, 0])  # beyond its workspace
    limiter.reset(state)
    assert limiter.step(np.array([0.05, 0, 0, 0]), state)[0][0] == pytest.approx(0)
    assert limiter.step(np.array([-0.05, 0, 0, 0]), state)[0][0] == pytest.approx(-0.05)


def test_torques_and_choices_rest_where_they_are_told() -> None:
    limits = Limits(
        low=(-1.0, 0.0, 0.0), high=(1.0, 9.0, 1.0), kinds=("torque", "choice", "position"), rest=(0.0, 2.0, 0.0)
    )
    guard = Guard(limits, fps=10)
    guard(np.array([0.7, 5, 0.4]), Observation())
    np.testing.assert_allclose(guard(None, Observation(time=0.1)), [0, 2, 0.4], atol=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"low": (0.0,), "high": (0.0,)},
        {"low": (0.0,), "high": (np.inf,)},
        {"low": (0.0,), "high": (1.0, 2.0)},
        {"low": (0.1,), "high": (1.0,), "kinds": ("delta",)},
        {"low": (0.0,), "high": (1.0,), "kinds": ("speed",)},
        {"low": (0.0,), "high": (1.0,), "velocity": (0.0,)},
        {"low": (0.0,), "high": (1.0,), "workspace": {"low": [0, 0, 0], "high": [1, 1, 1]}},
        {"low": (0.0,), "high": (1.0,), "speed": (1.0,)},
        {"low": 3, "high": 4},
        {"low": (0.0,) * 3, "high": (1.0,) * 3, "forbidden": [{"low": [0, 0], "high": [1, 1]}]},
    ],
)
def test_impossible_limits_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Limits.from_json(wrong)


def test_limits_survive_json() -> None:
    limits = replace(LIMITS, forbidden=ZONES, velocity=(1.0, 2.0, 3.0, 4.0))
    assert Limits.from_json(json.loads(json.dumps(limits.to_json()))) == limits


# -- distrust


def seen(tick: int, **changes: Any) -> Observation:
    return replace(Observation(state=np.array([0, 0, 0.5, 0], np.float32), time=tick / FPS), **changes)


GOOD = np.array([0.02, 0, 0, 0.5])


@pytest.mark.parametrize(
    ("action", "changes", "cause"),
    [
        (None, {}, "no action"),
        (np.array([np.nan, 0, 0, 0]), {}, "non-finite action"),
        (np.array([np.inf, 0, 0, 0]), {}, "non-finite action"),
        (np.zeros(3), {}, "malformed action"),
        (np.zeros((1, 4)), {}, "malformed action"),
        (GOOD, {"time": -1.0}, "stale observation"),
        (GOOD, {"time": 9.0}, "stale observation"),
        (GOOD, {"state": np.array([np.nan, 0, 0, 0], np.float32)}, "non-finite state"),
    ],
)
def test_what_cannot_be_trusted_holds_the_robot(action: Any, changes: dict[str, Any], cause: str) -> None:
    guard = Guard(LIMITS, fps=FPS)
    guard.reset(seen(0).state)
    for tick in range(3):
        guard(GOOD, seen(tick))
    sent = guard(action, seen(3, **changes))
    assert np.isfinite(sent).all()
    np.testing.assert_allclose(sent, [0, 0, 0, 0.5], atol=1e-7)
    (record,) = guard.interventions
    assert (record.decision, record.causes, record.tick) == ("held", (cause,), 3)
    np.testing.assert_array_equal(guard(GOOD, seen(4)), GOOD.astype(np.float32))  # it goes on when all is well again


def test_a_hold_that_does_not_end_stops_the_robot_until_a_person_has_looked() -> None:
    guard = Guard(LIMITS, fps=FPS, config=GuardConfig(patience=0.5))
    for tick in range(12):
        guard(None, seen(tick))
    assert "no action" in (guard.stopped or "")
    assert not guard(GOOD, seen(12))[:3].any()
    guard.reset()
    assert not guard(GOOD, seen(0))[:3].any(), "an episode does not end a stop"
    guard.release()
    assert guard(GOOD, seen(1))[:3].any()


def test_a_state_beyond_its_limits_stops() -> None:
    guard = Guard(replace(LIMITS, state_high=(9.0, 9.0, 0.4, 9.0)), fps=FPS)
    assert not guard(GOOD, seen(0))[:3].any()
    assert "state[2]" in (guard.stopped or "")


def test_samples_that_disagree_hold() -> None:
    rng = np.random.default_rng(0)
    assert spread(np.zeros((4, 8, 4)), LIMITS) == 0
    apart = spread(rng.choice([-0.05, 0.05], (8, 8, 4)), LIMITS)
    assert apart > 0.4
    guard = Guard(LIMITS, fps=FPS)
    guard(GOOD, seen(0), disagreement=apart)
    assert guard.interventions[0].causes == ("disagreement",)


def test_every_intervention_is_a_line_of_json(tmp_path: Path) -> None:
    guard = Guard(LIMITS, fps=FPS, log=tmp_path / "log.jsonl")
    guard(np.array([np.nan, 0, 0, 0]), seen(0))
    guard(np.array([9.0, 0, 0, 0]), seen(1))
    guard.stop()
    guard(GOOD, seen(2))
    guard(GOOD, seen(3))
    lines = [
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        for line in (tmp_path / "log.jsonl").read_text().splitlines()
    ]
    assert [(line["decision"], line["causes"]) for line in lines] == [
        ("held", ["non-finite action"]),
        ("limited", ["velocity"]),
        ("stopped", ["emergency stop"]),
    ]
    assert lines[0]["asked"][0] == "nan"
    assert guard.counts["limited: velocity"] == 1


# -- stops


def test_the_watchdog_stops_a_robot_whose_loop_is_silent_and_speaks_for_it() -> None:
    guard, sent, spoke = Guard(LIMITS, fps=FPS), [], threading.Event()

    def send(command: np.ndarray) -> None:
        sent.append(command)
        spoke.set()

    guard(GOOD, seen(0))
    with watchdog(guard, send, timeout=0.1):
        assert spoke.wait(30)
    assert "watch-dog" in (guard.stopped or "")
    assert not np.array(sent)[:, :3].any()


def test_a_loop_that_comes_back_does_not_brake_together_with_the_watchdog() -> None:
    guard, spoke, sent = Guard(LIMITS, fps=FPS), threading.Event(), []

    def send(command: np.ndarray) -> None:
        sent.append(command)
        if len(sent) == 1:
            raise OSError("the bus is busy")
        spoke.set()  # also after a command that could not be sent

    guard(GOOD, seen(0))
    with watchdog(guard, send, timeout=2.0):
        assert spoke.wait(30)
        before = len(sent)
        for _ in range(15):  # it is back, and never silent for two seconds
            guard(GOOD, None)
            time.sleep(1 / FPS)
        assert len(sent) <= before + 1  # what was on its way when it came back
    assert "watch-dog" in (guard.stopped or "")


def test_a_signal_stops_once_and_then_does_what_it_did_before() -> None:
    guard = Guard(LIMITS, fps=FPS)
    with pytest.raises(KeyboardInterrupt), stop_on_signals(guard, (signal.SIGINT,)):  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        assert guard.stopped == "emergency stop: SIGINT"
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_key_stops(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    guard = Guard(LIMITS, fps=FPS)
    with open(theirs) as terminal, open(ours, "wb", buffering=0) as keyboard:
        with stop_on_key(guard, terminal):
            keyboard.write(b" ")
            until = time.monotonic() + 30
            while guard.stopped is None and time.monotonic() < until:
                time.sleep(0.005)
        with stop_on_key(Guard(LIMITS, fps=FPS), terminal):
            pass  # none was pressed: it ends
    assert guard.stopped == "emergency stop: a key"
    (tmp_path / "no terminal").touch()
    with (tmp_path / "no terminal").open() as file, pytest.raises(UnsupportedError), stop_on_key(guard, file):
        pass


# -- novelty


def test_a_thumbnail_is_the_mean_of_each_cell() -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 40, 3), dtype=np.uint8)
    expected = image.reshape(8, 8, 8, 5, 3).mean((1, 3))
    np.testing.assert_allclose(thumbnail(image).reshape(8, 8, 3), expected, rtol=1e-5)
    assert np.isfinite(thumbnail(image[:5, :3])).all()


def test_a_tail_is_beyond_what_was_seen() -> None:
    rng = np.random.default_rng(0)
    maxima = rng.normal(size=(60, 20)).max(1, keepdims=True)
    assert 0.99 < (rng.normal(size=(20000, 20)).max(1) < tail(maxima)).mean() < 1


def test_novelty_is_kept_and_read_back(tmp_path: Path) -> None:
    episodes, actions = demonstrations(12)
    novelty = Novelty.fit(episodes, actions)
    novelty.save(tmp_path / "normal.safetensors")
    again = Novelty.load(tmp_path / "normal.safetensors")
    view = episodes[0][3]
    assert again.score(view) == novelty.score(view) < 1
    assert again.cameras == novelty.cameras
    assert novelty.score(replace(view, images={})) == np.inf
    assert novelty.score(replace(view, state=None)) == np.inf
    (tmp_path / "other").write_bytes(b"not this")
    for path in ("other", "missing"):
        with pytest.raises(ConfigError, match=path):
            Novelty.load(tmp_path / path)
    with pytest.raises(DataError, match="episodes"):
        Novelty.fit(episodes[:3], actions[:3])
    with pytest.raises(DataError, match="two steps"):
        Novelty.fit([*episodes[:11], episodes[11][:1]], [*actions[:11], actions[11][:1]])


# -- what once came through


def test_no_command_is_no_number_whatever_the_robot_says_at_first() -> None:
    limits = Limits(low=(-1.0,), high=(1.0,), velocity=(0.1,), measured=(0,))
    guard = Guard(limits, fps=10)
    guard.reset(np.array([np.nan]))
    first = guard(np.array([0.5]), Observation(state=np.array([0.3], np.float32)))
    np.testing.assert_allclose(first, [0.3], atol=0.011)  # from where it says that it is, when it says it


def test_a_robot_that_never_said_where_it_is_is_sent_nowhere() -> None:
    guard, nowhere = Guard(Limits(low=(-1.0,), high=(1.0,), measured=(0,)), fps=10), np.array([np.nan], np.float32)
    guard.reset(nowhere)
    for tick, action in enumerate([None, np.array([0.8])]):  # once it was sent to 0 at once, and taken to be there
        with pytest.raises(DataError, match="reset the guard with its state"):
            guard(action, Observation(state=nowhere, time=tick / 10))
    np.testing.assert_allclose(guard(None, Observation(state=np.array([0.8], np.float32))), [0.8], atol=1e-6)


def test_the_first_answer_after_none_is_limited_too() -> None:
    guard = Guard(Limits(low=(-1.0,), high=(1.0,), velocity=(0.1,)), fps=10)
    held = guard(None, None)
    assert abs(guard(np.array([0.9]), Observation(time=0.1)) - held) <= 0.011


@pytest.mark.parametrize("state", [None, np.zeros(2, np.float32)])
def test_a_state_that_the_limits_cannot_look_at_holds(state: Any) -> None:
    guard = Guard(replace(LIMITS, state_high=(9.0,) * 4), fps=FPS)
    assert not guard(GOOD, Observation(state=state))[:3].any()
    assert guard.interventions[0].causes == ("malformed state",)


def test_samples_of_which_one_is_none_hold() -> None:
    guard = Guard(LIMITS, fps=FPS)
    guard(GOOD, seen(0), disagreement=float("nan"))
    assert guard.interventions[0].causes == ("disagreement",)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rest": (float("nan"),)},
        {"rest": (2.0,)},
        {"state_high": (float("nan"),)},
        {"measured": (0.0,)},
        {
            "low": [-1.0] * 3,
            "high": [1.0] * 3,
            "kinds": ["position"] * 3,
            "workspace": {"low": [0] * 3, "high": [1] * 3},
        },
    ],
)
def test_limits_that_would_not_hold_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Limits.from_json({"low": [-1.0], "high": [1.0], "kinds": ["torque"], **wrong})


def test_an_emergency_outlives_the_end_of_a_stop_of_the_guards_own() -> None:
    guard = Guard(LIMITS, fps=FPS, config=GuardConfig(patience=0.0))
    for tick in range(3):
        guard(None, seen(tick))
    assert "no action" in (guard.stopped or "")
    guard.stop()
    guard.resume()
    assert guard.stopped == "emergency stop"
    guard.release()
    assert guard.stopped is None


@pytest.mark.parametrize("action", [[9.0, 0, 0, 0.5], np.array([None, 1, 1, 1]), "up", [[1], [1, 2]], [10**400] * 4])
def test_what_is_no_action_at_all_gets_a_command_too(action: Any) -> None:
    guard = Guard(LIMITS, fps=FPS)
    guard.reset(seen(0).state)
    assert np.abs(guard(action, seen(0))[:3]).max() <= STEP
    assert guard.interventions[0].decision == ("limited" if action[0] == 9 else "held")


@pytest.mark.parametrize("shape", [(32, 32, 4), (32, 32), (0, 0, 3)])
def test_a_picture_that_is_none_holds(shape: tuple[int, ...]) -> None:
    episodes, actions = demonstrations(12)
    view = episodes[0][0]
    guard = Guard(LIMITS, fps=FPS, novelty=Novelty.fit(episodes, actions))
    guard.reset(np.zeros(2))  # nor is that a state of this robot
    broken = replace(view, images={**view.images, "wrist": np.full(shape, 9, np.uint8)})
    assert not guard(actions[0][0], broken)[:3].any()
    assert guard.interventions[0].causes == ("malformed picture",)


def test_a_log_that_fails_leaves_the_robot_its_commands(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "logs").mkdir()
    guard = Guard(LIMITS, fps=FPS, log=tmp_path / "logs" / "log.jsonl")
    shutil.rmtree(tmp_path / "logs")
    assert not guard(None, seen(0))[:3].any()
    assert "log.jsonl" in caplog.text
    with pytest.raises(ConfigError, match="log"):
        Guard(LIMITS, fps=FPS, log=tmp_path / "logs" / "log.jsonl")
