"""Recipes: whole runs reach their numbers (slow: `make test-all`)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import polymodal
from polymodal.core.errors import DataError
from polymodal.data.worlds import pictograms, sources
from polymodal.train import Result, Run, load_run
from tests.bars import missed

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
def test_a_whole_run_reaches_its_numbers(name: str, whole_run: Callable[[Run], Result]) -> None:
    whole_run(recipe(name))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # long descriptions are cut, and it says so
@pytest.mark.proves("clip", "polymodal/nano-clip: the shipped files reach the recipe's numbers")
def test_the_shipped_model_reaches_the_numbers_of_its_recipe() -> None:
    assert not (below := missed(recipe("clip"), polymodal.load("polymodal/nano-clip"))), below
