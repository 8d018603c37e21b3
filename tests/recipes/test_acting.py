"""Recipes of policies: what is recorded, what a lesson is, and whole runs: tiny ones, and (slow) those that count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mujoco")

import polymodal
from polymodal.modalities.image import ImageProcessor
from polymodal.train import Result, Run, fit
from recipes.nano import acting, pick_place, reach

TINY = [replace(whole, episodes=4, tried=2) for whole in (reach.REACH, pick_place.PICK_PLACE)]


@pytest.mark.parametrize("cloning", TINY, ids=lambda c: c.task)
def test_a_lesson_is_what_was_seen_and_what_was_done_next(cloning: acting.Cloning) -> None:
    shown, policy, lessons = cloning.demonstrations(), cloning.policy(), cloning.lessons()
    assert isinstance(policy.images, ImageProcessor)
    lengths = np.bincount(shown.episode)
    assert len(lengths) == len(shown.told) == 4
    assert len(lessons) == lengths.sum() == len(shown.actions)
    steps = [0, int(lengths[0]) - 1, int(lengths[0])]  # the first, the last of its episode, the first of the next
    batch = lessons.batch(steps, np.random.default_rng(0))
    assert batch["actions_valid"].sum(1).tolist() == [min(int(n), cloning.horizon) for n in (lengths[0], 1, lengths[1])]
    done = policy.to_robot(batch["actions"][:, 0]).numpy()
    np.testing.assert_allclose(done, shown.actions[steps], atol=1e-5)
    for number, camera in enumerate(cloning.trunk.cameras):
        for step, picture in zip(steps, policy.images.denormalise(batch["pixels"][:, number]), strict=True):
            np.testing.assert_array_equal(np.asarray(picture), shown.pictures[camera][step])


def test_instructions_keep_their_words_in_any_frame() -> None:
    told = {acting.framed("touch the red cube", np.random.default_rng(n)) for n in range(40)}
    assert len(told) > 5
    assert all("touch the red cube" in each for each in told)


def test_the_way_to_the_thing_ends_where_the_hand_closes_and_is_half_of_the_lessons() -> None:
    shown = TINY[1].demonstrations()
    way, taught = pick_place.to_the_thing(shown), pick_place.balanced(shown)
    for episode in range(4):
        opening, mine = (
            shown.actions[shown.episode == episode, 3],
            np.isin(way, np.flatnonzero(shown.episode == episode)),
        )
        assert mine.sum() == np.argmin(opening) > 0
    assert set(taught) == set(range(len(shown.actions)))
    assert np.isin(taught, way).mean() == 0.5
    assert len(TINY[1].lessons(way)) == len(way)


def test_a_run_trains_and_is_tried_out(tmp_path: Path) -> None:
    result = fit(reach.run(TINY[0], steps=3, batch_size=8), tmp_path, device="cpu")
    assert result.finished
    for expected in (reach.run().expect, pick_place.run().expect):
        assert result.metrics.keys() >= expected.keys()


@pytest.mark.proves("behaviour_cloning", "polymodal/nano-reach: it touches what it is told, in scenes that are new")
def test_the_shipped_policy_does_what_it_is_told() -> None:
    found = replace(reach.REACH, tried=15).trials(polymodal.load("polymodal/nano-reach"))
    assert found["new wordings"] >= 0.8
    assert found["swapped, shown left alone"] >= 0.9


def test_the_shipped_policy_puts_what_it_is_told_where_it_is_told() -> None:
    found = replace(pick_place.PICK_PLACE, tried=5).trials(polymodal.load("polymodal/nano-pick-place"))
    assert found["new wordings"] >= 0.8
    assert found["new combinations"] >= 0.6
    assert found["swapped, told of normal"] >= 0.8
    assert found["swapped, shown left alone"] == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "run",
    [
        pytest.param(
            recipe.run,
            id=name,
            marks=pytest.mark.proves(
                "behaviour_cloning", f"recipe nano/{name}: scenes and wordings that are new to it"
            ),
        )
        for name, recipe in (("reach", reach), ("pick_place", pick_place))
    ],
)
def test_a_whole_run_reaches_its_numbers(run: Callable[..., Run], whole_run: Callable[[Run], Result]) -> None:
    whole_run(run())
