"""The recipe of MiniWoB: lessons of what the scripts do, and a tiny run, in a real browser."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from polymodal.train import Result, Run, fit

pytest.importorskip("miniwob")
pytest.importorskip("playwright")
if shutil.which("chromium") is None:
    pytest.skip("needs Chromium", allow_module_level=True)

from polymodal.act.envs.web.actions import from_vector
from polymodal.act.envs.web.oracles import ORACLES
from recipes.nano import miniwob
from recipes.nano.acting import Lessons

FEW = ("click-test-2", "login-user")


def test_there_are_twelve_tasks_with_demonstrators() -> None:
    assert len(set(miniwob.TASKS) & set(ORACLES)) == 12


def test_lessons_a_tiny_run_and_what_it_does(tmp_path: Path) -> None:
    shown = miniwob.demonstrations(2, FEW)
    assert len(shown.told) == 4
    model, lessons = miniwob.policy(shown), Lessons(miniwob.policy(shown), shown)
    assert {"button", "username"} <= set(model.config.words)
    batch = lessons.batch(range(len(lessons)), np.random.default_rng(0))
    acts = [from_vector(action) for action in shown.actions]
    typed = [act.text for act in acts if act.kind == "type"]
    assert len(typed) == 4
    letters = batch["letters"][batch["actions_kind"] == model.config.typed]
    chosen = letters[range(4), batch["actions_word"][batch["actions_word"] >= 0]]
    assert ["".join(map(chr, row)).rstrip("\0") for row in chosen.tolist()] == typed

    result = fit(miniwob.run(recorded=2, tasks=FEW, steps=3, batch_size=4, episodes=1), tmp_path, device="cpu")
    assert result.finished
    assert result.metrics.keys() == {"mean", *FEW}


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.proves("screen", "recipe nano/miniwob: twelve tasks on pages that are new to it")
def test_a_whole_run_reaches_its_numbers(whole_run: Callable[[Run], Result]) -> None:
    whole_run(miniwob.run())
