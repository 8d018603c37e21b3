"""What holds for every test: checked annotations, fixed seeds, two threads, no network, recorded proofs."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

# Before torch and the Hub client are imported, and for the processes that tests start too.
os.environ.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))
if "--network" not in sys.argv:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
from jaxtyping import install_import_hook

assert "polymodal" not in sys.modules, "polymodal was imported before its annotations could be checked"
install_import_hook("polymodal", "beartype.beartype")

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
