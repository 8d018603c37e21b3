"""What is recorded as proven is what the tests have shown, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from polymodal.core.registry import Entry
from tools.systems_doc import merge, page

ROOT = Path(__file__).parents[2]
TESTS = """
import pytest
@pytest.mark.proves("clip", "parity: outputs")
def test_passes(): pass
@pytest.mark.proves("clip", "parity: loss")
def test_fails(): assert False
@pytest.mark.proves("clip", "parity: skipped")
def test_skips(): pytest.skip("no reference")
@pytest.fixture
def broken(): raise ValueError
@pytest.mark.proves("vit", "spec")
def test_breaks_before_it_starts(broken): pass
@pytest.mark.slow
@pytest.mark.proves("vit", "spec")
@pytest.mark.proves("mae", "trains")
def test_left_out(): pass
def test_proves_nothing(): pass
"""


def pytest_run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "tests.proofs", "-c", str(ROOT / "pyproject.toml")]
    command += ["--rootdir", str(folder), "-p", "no:cacheprovider", "--proofs", "out.json", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("workers", [(), ("-n", "2", "-p", "xdist")], ids=["alone", "two workers"])
def test_outcomes_are_recorded_and_runs_add_up(workers: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text(TESTS)
    (tmp_path / "test_b.py").write_text("import pytest\n@pytest.mark.proves('vit', 'loss')\ndef test_b(): pass\n")
    pytest_run(tmp_path, "-m", "not slow", "test_b.py")
    done = pytest_run(tmp_path, "-m", "not slow", "test_a.py", *workers)
    results = json.loads((tmp_path / "out.json").read_text())
    assert {name.split("::")[1]: result["outcome"] for name, result in results.items()} == {
        "test_passes": "passed",
        "test_fails": "failed",
        "test_skips": "skipped",
        "test_breaks_before_it_starts": "failed",
        "test_left_out": "not run",
        "test_b": "passed",
    }, done.stdout
    assert sorted(results["test_a.py::test_left_out"]["proves"]) == [["mae", "trains"], ["vit", "spec"]]


def test_a_mark_without_a_claim_is_refused(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text("import pytest\n@pytest.mark.proves('clip')\ndef test_a(): pass\n")
    done = pytest_run(tmp_path, "test_a.py")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "proves takes a system and a claim" in done.stderr


def result(claim: str, outcome: str) -> dict:
    return {"proves": [["clip", claim]], "outcome": outcome}


def test_a_claim_takes_its_worst_outcome_and_keeps_what_was_not_run() -> None:
    results = {
        "1": result("a", "passed"),
        "2": result("a", "failed"),
        "3": result("b", "passed"),
        "4": result("b", "not run"),
        "5": result("c", "skipped"),
        "6": result("d", "passed"),
    }
    recorded = {"clip": {"a": "passed", "b": "passed", "d": "failed", "gone": "passed"}, "gone": {"x": "passed"}}
    assert merge(results, recorded) == {"clip": {"a": "failed", "b": "passed", "c": "skipped", "d": "passed"}}
    assert merge(results, {})["clip"]["b"] == "skipped", (
        "a claim is not proven before all of its tests have passed once"
    )


def test_the_page_names_every_system_and_ticks_what_passed() -> None:
    table = [
        Entry(name="clip", module="m", cls="C", paper="CLIP paper", year=2021, url="https://example.org/clip"),
        Entry(name="vit", module="m", cls="V", paper="ViT paper", year=2020, url="https://example.org/vit"),
    ]
    results = {"1": result("parity: outputs", "passed"), "2": result("parity: loss", "failed")}
    text = page(table, merge(results, {}), results)
    assert (
        "| `clip` | [CLIP paper](https://example.org/clip) | 2021 | ✗ parity: loss<br>✓ parity: outputs | 2 |" in text
    )
    assert "| `vit` | [ViT paper](https://example.org/vit) | 2020 | nothing yet | 0 |" in text
