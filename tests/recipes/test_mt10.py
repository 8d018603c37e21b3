"""Ten tasks of Meta-World: what is recorded, with cameras and without, and (slow) whole runs."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch

pytest.importorskip("metaworld")

from polymodal.encoders.trunk import PixelTrunk
from polymodal.systems.chunk_heads import L1
from polymodal.train import Result, Run
from recipes.nano import acting, mt10, mt10_pixels

CAMERAS = ("zoom",)


def test_with_cameras_the_same_is_done_and_only_the_hand_is_told() -> None:
    states = mt10.demonstrations(2)
    pixels = mt10.demonstrations(2, cameras=CAMERAS, size=16)
    assert states.told == pixels.told
    np.testing.assert_array_equal(states.actions, pixels.actions)
    np.testing.assert_array_equal(states.states[:, :4], pixels.states)
    assert states.states.shape[1] == 39
    for camera in CAMERAS:
        pictures = pixels.pictures[camera]
        assert pictures.shape == (len(pixels.actions), 16, 16, 3)
        assert (pictures[0] != pictures[len(pictures) // 2]).any()


def test_a_policy_of_pixels_learns_all_that_it_has() -> None:
    shown = mt10.demonstrations(2, cameras=CAMERAS, size=16)
    trunk = PixelTrunk(cameras=CAMERAS, image_size=16, channels=8, keypoints=4, state_width=4, dim=16, num_layers=1)
    torch.manual_seed(0)
    model = acting.fresh("metaworld", shown, trunk, L1(), mt10.HORIZON)
    batch = acting.Lessons(model, shown, acting.framed).batch(range(8), np.random.default_rng(0))
    loss = model.loss(batch)
    loss.total.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(recipe, id=name, marks=pytest.mark.proves("behaviour_cloning", f"recipe nano/{name}: ten tasks"))
        for name, recipe in (("mt10", mt10), ("mt10_pixels", mt10_pixels))
    ],
)
def test_a_whole_run_reaches_its_numbers(recipe: ModuleType, whole_run: Callable[[Run], Result]) -> None:
    whole_run(recipe.run())
