"""The recipe of films: captions are its words, the judge is strict, a few steps reach no bar, a whole run does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from polymodal.data.worlds import clips
from polymodal.systems.flow_painter import T5_END
from polymodal.train import Result, Run, fit
from recipes.nano import film


def test_every_word_is_known() -> None:
    words = film.tokenizer()
    for index in range(60):
        caption = clips.item(("train", "unseen")[index % 2], index).caption
        ids = words.encode(caption, special=True)
        assert words.decode(ids).split() == caption.split()
        assert len(ids) < film.config().text_tokens


def test_lessons() -> None:
    rng = np.random.default_rng(0)
    batch = film.Moving(told=True).batch([0, 1, 2], rng)
    assert batch["pixels"].shape == (3, 3, 9, 32, 32)
    assert all(row[valid][-1] == T5_END for row, valid in zip(batch["ids"], batch["valid"], strict=True))
    alone = film.Moving(told=False).batch([0, 1, 2], np.random.default_rng(0))
    assert torch.equal(alone["pixels"], batch["pixels"])
    learner = film.model()
    for lesson in (batch, alone):
        assert torch.isfinite(learner.loss(lesson).mean)


def test_the_judge_is_strict() -> None:
    wanted = [clips.item("unseen", index) for index in range(20)]
    assert all(film.right(one.frames, one) for one in wanted)
    assert not any(film.right(one.frames[::-1].copy(), one) for one in wanted)
    assert not any(film.right(one.frames[[0] * 9], one) for one in wanted)


def test_a_maker_that_is_deaf_to_directions_is_as_often_astray_as_right() -> None:
    wanted = [clips.item("unseen", index) for index in range(20)]
    assert not any(film.astray(one.frames, one) for one in wanted)
    assert not any(film.astray(one.frames[[0] * 9], one) for one in wanted)
    for one in wanted[:4]:
        moves = [0.02 * np.array(way, np.float32) for way in clips.DIRECTIONS.values()]
        shown = [one.under(np.tile(move, (8, 1))) for move in moves if not blocked(one, move)]
        assert {film.right(each, one) + 3 * film.astray(each, one) for each in shown} == {1.0}


def blocked(one: clips.Clip, move: np.ndarray) -> bool:
    """Whether the edge stops the first shape."""
    thing = one.start.things[0]
    end = np.array([thing.x, thing.y]) + 8 * move
    return bool((abs(end - 0.5) > 0.5 - np.array([thing.width, thing.height]) / 2).any())


@pytest.mark.filterwarnings("default")
def test_it_trains_and_a_few_steps_reach_no_bar(tmp_path: Path) -> None:
    result = fit(film.run((1, 1), (2, 2), asked=2), tmp_path, device="cpu")
    assert result.finished
    assert set(result.reached) <= set(result.metrics)
    assert not any(result.reached.values())


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.proves("sora", "recipe nano/film: films of unseen motions go where their captions say")
def test_a_whole_run_reaches_its_numbers(whole_run: Callable[[Run], Result]) -> None:
    whole_run(film.run())
