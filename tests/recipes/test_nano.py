"""Recipes: whole runs reach their numbers (slow: `make test-all`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import polymodal
from polymodal.core.errors import DataError
from polymodal.data.worlds import pictograms, sources
from polymodal.train import Run, fit, load_run

RECIPES = ("vit", "mae", "dinov2", "clip", "siglip", "siglip2")  # each is called after the system that it trains


def recipe(name: str) -> Run:
    try:
        sources.require(sorted({p for artist in pictograms.ARTISTS for p in pictograms.PACKAGES[artist]}))
    except DataError as error:
        pytest.skip(str(error))
    return load_run(f"recipes.nano.{name}")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.proves(name, f"recipe nano/{name}: its numbers on held-out data"))
        for name in RECIPES
    ],
)
def test_a_whole_run_reaches_its_numbers(name: str, run_folder: Callable[[str], Path]) -> None:
    run = recipe(name)
    result = fit(run, run_folder(run.name))
    assert result.finished
    assert run.evaluate is not None
    with torch.no_grad():  # again, with today's code, of a run that was kept
        metrics = run.evaluate(result.model)
    missed = [f"{m}: {metrics[m]:.3f} < {bar.value}" for m, bar in run.expect.items() if metrics[m] < bar.value]
    assert not missed, missed


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # long descriptions are cut, and it says so
@pytest.mark.proves("clip", "polymodal/nano-clip: the shipped files reach the recipe's numbers")
def test_the_shipped_model_reaches_the_numbers_of_its_recipe() -> None:
    run = recipe("clip")
    assert run.evaluate is not None
    with torch.inference_mode():
        metrics = run.evaluate(polymodal.load("polymodal/nano-clip"))
    missed = [f"{m}: {metrics[m]:.3f} < {bar.value}" for m, bar in run.expect.items() if metrics[m] < bar.value]
    assert not missed, missed
