"""What holds for every test: checked annotations, fixed seeds, two threads, no network, recorded proofs."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

# Before torch and the Hub client are imported, and for the processes that tests start too.
os.environ.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))
if "--network" not in sys.argv:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
from jaxtyping import install_import_hook

assert "polymodal" not in sys.modules, "polymodal was imported before its annotations could be checked"
install_import_hook("polymodal", "beartype.beartype")

if TYPE_CHECKING:
    from polymodal.train import Result, Run

pytest_plugins = ["tests.proofs"]

try:
    from hypothesis import settings
except ImportError:
    pass  # only the tests that use it need it
else:
    # No deadline: a busy machine is not a bug. Derandomised: a run says the same thing twice.
    settings.register_profile("polymodal", deadline=None, derandomize=True, max_examples=50)
    settings.load_profile("polymodal")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--network", action="store_true", help="run the tests that need the network")
    parser.addoption(
        "--runs", type=Path, metavar="DIR", help="whole runs of recipes go on with what is in DIR/NAME, and stay there"
    )


@pytest.fixture
def run_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Path]:
    """Where the whole run of a recipe lives, by its name."""
    kept: Path | None = request.config.getoption("--runs")
    return lambda name: (kept or tmp_path) / name


@pytest.fixture
def whole_run(run_folder: Callable[[str], Path]) -> Callable[[Run], Result]:
    """Trains a recipe to its end (or goes on, see ``--runs``) and holds it to its bars, then and with today's code."""
    from polymodal.train import fit
    from tests.bars import missed

    def reached(run: Run) -> Result:
        result = fit(run, run_folder(run.name))
        assert result.finished
        assert all(result.reached.values()), result.metrics
        assert not (below := missed(run, result.model)), below
        return result

    return reached


@pytest.hookimpl(trylast=True)  # after -m has taken tests away: those that it left out need no reason
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def skip(marker: str, reason: str) -> None:
        for item in items:
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))

    if not config.getoption("--network"):
        skip("network", "needs the network: run with --network")
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not torch.cuda.is_available():
            skip("gpu", "needs a CUDA device")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """The same random numbers in each test, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
