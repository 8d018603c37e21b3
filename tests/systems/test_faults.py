"""Fourteen faults are put in on purpose: all are caught, the hard ones at once, and clean episodes are left alone."""

from __future__ import annotations

import numpy as np
import pytest

from polymodal.act.faults import FAULTS, Injection, Survey, auroc, strange, survey
from polymodal.act.guard import Guard
from polymodal.act.limits import Limits
from polymodal.act.novelty import Novelty
from polymodal.act.runner import Expert
from polymodal.core.errors import ConfigError
from polymodal.core.observation import Observation
from tests.toy_robot import FPS, LIMITS, ToyRobot, demonstrations


@pytest.fixture(scope="module")
def normal() -> tuple[Limits, Novelty]:
    episodes, actions = demonstrations(40)
    return LIMITS.learned(actions, FPS), Novelty.fit(episodes, actions)


@pytest.fixture(scope="module")
def found(normal: tuple[Limits, Novelty]) -> Survey:
    limits, novelty = normal
    env = ToyRobot()
    return survey(env, Expert(env), lambda: Guard(limits, fps=FPS, novelty=novelty), clean=24, injected=3)


def test_there_are_fourteen() -> None:
    assert len(FAULTS) == 14
    assert sum(kind.hard for kind in FAULTS.values()) == 11


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_caught_and_the_hard_ones_within_two_ticks(name: str, found: Survey) -> None:
    one = found.faults[name]
    assert one.injected == 3
    assert one.missed == 0
    assert one.quick == one.injected or not FAULTS[name].hard


def test_clean_episodes_are_left_alone(found: Survey) -> None:
    assert found.false_stops.k == 0
    assert found.limited < 0.05
    assert found.auroc > 0.9


def test_without_a_calibration_what_is_only_odd_is_missed() -> None:
    """The catches are the guard's, not the test's: one without novelty lets odd pictures pass."""
    env = ToyRobot()
    names = ("nan", "black frame", "frozen camera", "swapped cameras", "unseen scene")
    blind = survey(env, Expert(env), lambda: Guard(LIMITS, fps=FPS), clean=2, injected=2, names=names)
    assert {name: one.caught for name, one in blind.faults.items()} == {name: 2 * (name == "nan") for name in names}
    assert np.isnan(blind.auroc)


def test_a_fault_begins_at_its_tick() -> None:
    fault = Injection("nan", LIMITS, fps=FPS, at=2, axis=1)
    view = Observation(state=np.zeros(4, np.float32))
    for episode in range(2):
        fault.reset(episode)
        struck = []
        for _ in range(4):
            assert fault.seen(view) is view
            struck.append(bool(np.isnan(fault.asked(np.zeros(4), view)).any()))
        assert struck == [False, False, True, True]
    with pytest.raises(ConfigError, match="'frozen camera'"):
        Injection("frozen cam", LIMITS, fps=FPS, at=0)


def test_auroc() -> None:
    rng = np.random.default_rng(0)
    low, high = rng.normal(0, 1, 50).round(1), rng.normal(1, 1, 40).round(1)
    pairs = (high[:, None] > low).mean() + (high[:, None] == low).mean() / 2
    assert auroc(low, high) == pytest.approx(pairs)
    assert auroc(low, low) == pytest.approx(0.5)


def test_a_strange_scene_is_another_picture_of_the_same_size() -> None:
    picture = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    view = Observation(images={"a": picture})
    out = strange(view)
    assert out.images["a"].shape == picture.shape
    assert (out.images["a"] != picture).mean() > 0.9
