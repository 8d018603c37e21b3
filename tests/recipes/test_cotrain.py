"""The recipe of co-training: what is asked and done in a scene, a tiny run, and (slow) what it keeps of language."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from polymodal.core.batch import IGNORE
from polymodal.data.worlds import shapes
from polymodal.train import Result, Run, fit
from recipes.nano import cotrain


def test_answers_and_actions_are_those_of_the_scene() -> None:
    shown, policy = cotrain.Shown(40, 0), cotrain.policy()
    assert policy.tokenizer is not None
    for scene, chat, seen in zip(shown.scenes, shown.asked, shown.observations, strict=True):
        assert chat.turns[1].text == scene.things[0].colour
        assert seen.instruction.endswith(scene.things[0].shape)
        np.testing.assert_array_equal(seen.images["image"], shapes.render(scene, cotrain.SIZE))
    np.testing.assert_array_equal(shown.places[3, 0], cotrain.PLACES[shown.things[3].colour].astype(np.float32))
    talk = policy.lesson(shown.asked)
    act = policy.lesson(shown.observations, torch.from_numpy(shown.places), torch.ones(40, 1, dtype=torch.bool))
    for batch, said in ((talk, [chat.turns[1].text for chat in shown.asked]), (act, None)):
        for row, labels in enumerate(batch["labels"]):
            *ids, end = labels[labels != IGNORE].tolist()
            assert end == policy.stop_ids[0]
            text = policy.tokenizer.decode(ids)
            if said is not None:
                assert text == said[row]
            else:
                assert np.abs(policy.to_robot(policy.bins.decode([text])).numpy() - shown.places[row]).max() <= 1 / 256


def test_what_is_asked_later_was_never_shown() -> None:
    known, new = (cotrain.Shown(30, seed).scenes for seed in (0, 1))
    assert not {scene.things for scene in known} & {scene.things for scene in new}


@pytest.mark.parametrize("alone", [False, True])
def test_a_run_trains_and_is_tried_out(alone: bool, tmp_path: Path) -> None:
    result = fit(cotrain.run(alone=alone, learned=40, asked=3, steps=(2, 2)), tmp_path, device="cpu")
    assert result.finished
    assert result.metrics.keys() >= cotrain.BARS.keys()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.proves("rt2", "recipe nano/cotrain: language survives actions, in pictures that are new")
def test_a_whole_run_keeps_what_actions_alone_lose(
    whole_run: Callable[[Run], Result], run_folder: Callable[[str], Path]
) -> None:
    kept, lost = whole_run(cotrain.run()), fit(cotrain.run(alone=True), run_folder("nano-cotrain-alone"))
    assert lost.metrics["answers"] < kept.metrics["answers"] - 0.3
    assert lost.metrics["actions"] < kept.metrics["actions"] + 0.1


def test_places_are_apart() -> None:
    places = np.stack(list(cotrain.PLACES.values()))
    apart = np.abs(places[:, None] - places).max(-1) + np.eye(len(places))
    assert apart.min() > cotrain.NEAR
