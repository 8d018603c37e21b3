"""The recipe of BabyAI: what is recorded is what the bot wanted, and a tiny run, in the real rooms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from polymodal.train import Result, Run, fit

pytest.importorskip("minigrid")

from recipes.nano import babyai
from recipes.nano.acting import Lessons

TINY = 0.001  # 6 and 12 episodes


def test_a_lesson_is_what_was_seen_and_what_the_bot_wanted() -> None:
    shown = babyai.demonstrations(TINY)
    assert len(shown.told) == 18
    assert sum(told.startswith("put") for told in shown.told) == 12
    np.testing.assert_array_equal(np.bincount(shown.actions.argmax(1), minlength=7)[5:], 0)  # nothing is opened
    model = babyai.policy(shown)
    batch = Lessons(model, shown).batch([0, 5], np.random.default_rng(0))
    np.testing.assert_array_equal(model.to_robot(batch["actions"])[:, 0].argmax(-1), shown.actions[[0, 5]].argmax(1))
    assert batch["pixels"].shape == (2, 1, 3, 56, 56)


def test_recording_repeats() -> None:
    one, other = (babyai.demonstrations.__wrapped__(TINY, seed) for seed in (0, 1))
    np.testing.assert_array_equal(one.actions, babyai.demonstrations(TINY).actions)
    assert one.told != other.told


def test_a_run_trains_and_is_tried_out(tmp_path: Path) -> None:
    result = fit(babyai.run(scale=TINY, steps=3, batch_size=8, episodes=2), tmp_path, device="cpu")
    assert result.finished
    assert result.metrics.keys() >= babyai.BARS.keys()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.proves("behaviour_cloning", "recipe nano/babyai: rooms that are new to it")
def test_a_whole_run_reaches_its_numbers(whole_run: Callable[[Run], Result]) -> None:
    whole_run(babyai.run())
