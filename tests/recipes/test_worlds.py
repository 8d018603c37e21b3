"""Recipes of world models: what is held out is never learned, a few steps reach no bar, whole runs do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from polymodal.data.worlds import clips
from polymodal.train import Result, Run, fit
from recipes.nano import world_diffusion, world_tokens, worlds


def test_no_wandering_goes_where_training_may_not() -> None:
    for number, colour in enumerate(clips.COLOURS * 5):
        actions = worlds.wandering(np.random.default_rng(number), colour)
        (name,) = (way for c, way in clips.HELD_OUT if c == colour)
        assert (actions @ np.array(clips.DIRECTIONS[name]) <= 0).all()
        assert 0 < abs(actions).max() <= worlds.FASTEST
    assert any((worlds.wandering(np.random.default_rng(n), "red") == 0).all(1).any() for n in range(5)), "it rests, too"


def test_what_is_judged_is_new_and_turns_back_otherwise() -> None:
    one = worlds.asked(12)
    shown = worlds.CONTEXT
    assert torch.equal(one.frames[:, :shown], one.instead[:, :shown])
    assert torch.equal(one.actions[:, : shown - 1], one.others[:, : shown - 1])
    assert torch.equal(one.actions[:, shown - 1 :], -one.others[:, shown - 1 :])
    assert not torch.equal(one.frames[:, shown], one.instead[:, shown])
    for index, (moved, back) in enumerate(zip(one.actions.numpy(), one.others.numpy(), strict=True)):
        clip = clips.item("unseen", index, frames=worlds.LENGTH, size=worlds.SIZE)
        (name,) = clip.motions[0].directions
        assert (clip.start.things[0].colour, name) in clips.HELD_OUT
        assert (moved @ np.array(clips.DIRECTIONS[name]) > 0).all(), "what is foreseen is held out, too"
        assert (back[shown - 1 :] @ np.array(clips.DIRECTIONS[name]) < 0).all()


def test_lessons_are_windows_of_films() -> None:
    model = world_diffusion.model()
    source = worlds.Windows(model, 5, films=4)
    batch = source.batch([2, 1], np.random.default_rng(0))
    assert batch["frames"].shape == (2, 5, 3, 32, 32)
    frames, actions = worlds.film(2)
    places = [n for n in range(12) if np.allclose(worlds.pixels([frames[n : n + 5]])[0] * 2 - 1, batch["frames"][0])]
    assert places
    scaled = torch.from_numpy(actions[places[0] : places[0] + 4]) / torch.tensor(worlds.SCALE)
    torch.testing.assert_close(batch["actions"][0], scaled)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "run",
    [
        pytest.param(world_diffusion.run(1, rows=2, films=4, asked=2), id="diamond"),
        pytest.param(world_tokens.run((1, 1), rows=(2, 2), films=4, asked=2), id="iris"),
    ],
)
def test_it_trains_and_a_few_steps_reach_no_bar(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    small = {"FITTED": 2, "DRIVEN": 1, "STEPS": 1, "FUTURE": 2, "LENGTH": worlds.CONTEXT + 2, "FPS": 2}
    for name, value in small.items():
        monkeypatch.setattr(worlds, name, value)
    for remembers in (worlds.film, worlds.asked, worlds.beside):  # films of another length
        remembers.cache_clear()
        request.addfinalizer(remembers.cache_clear)
    result = fit(run, tmp_path, device="cpu")
    assert result.finished
    assert set(result.reached) <= set(result.metrics)
    assert not any(result.reached.values())
    if "tokens" in result.metrics:
        before = run.model().world.vision.state_dict()  # type: ignore[attr-defined]
        assert before.keys() == result.model.world.vision.state_dict().keys()  # type: ignore[attr-defined, union-attr]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(
            world_diffusion, marks=pytest.mark.proves("diamond", "recipe nano/world_diffusion: it foresees and listens")
        ),
        pytest.param(
            world_tokens, marks=pytest.mark.proves("iris", "recipe nano/world_tokens: it foresees and listens")
        ),
    ],
)
def test_a_whole_run_reaches_its_numbers(recipe: ModuleType, whole_run: Callable[[Run], Result]) -> None:
    whole_run(recipe.run())
