"""The recipe of practice: scenes of practice are none of trials, a tiny run, and (slow) what practice adds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from polymodal.train import Result, Run, fit

pytest.importorskip("mujoco")

from polymodal.train.log import read_curve
from recipes.nano import acting, reach_rl


def test_a_run_clones_practises_and_is_tried_out(tmp_path: Path) -> None:
    stated = replace(reach_rl.REACH, episodes=12)
    result = fit(reach_rl.run(stated, cloned=3, practised=1, tried=2), tmp_path, device="cpu")
    assert result.finished
    assert result.metrics.keys() >= reach_rl.BARS.keys()
    assert [line["stage"] for line in read_curve(tmp_path / "metrics.jsonl") if "reward" in line] == ["practise"]


def test_scenes_of_practice_are_none_of_trials() -> None:
    source = reach_rl.run().stages[1].source()
    assert reach_rl.PRACTISED + len(source) < acting.TRIED


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.proves("behaviour_cloning", "recipe nano/reach_rl: practice adds 15 points to what cloning reached")
def test_a_whole_run_adds_fifteen_points(whole_run: Callable[[Run], Result]) -> None:
    result = whole_run(reach_rl.run())
    before, after = (
        line["evaluation"]["new scenes"] for line in read_curve(result.folder / "metrics.jsonl") if "evaluation" in line
    )
    assert 0.5 <= before <= 0.7
    assert after >= before + 0.15
