"""The targets that people and CI call exist, say what they do, and install by the constraints only."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TARGETS = ("help", "demo", "test", "check", "test-all", "bench", "docs", "format", "clean")


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # A make that runs these tests must not lend its flags to the make under test.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A checkout with nothing installed."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_help_is_the_default_and_lists_every_target() -> None:
    done = make(ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == make(ROOT, "help").stdout
    assert set(re.findall(r"make ([a-z-]+) ", done.stdout)) == set(TARGETS)


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_can_be_planned_with_nothing_installed(target: str, copy: Path) -> None:
    done = make(copy, "-n", target, f"PYTHON={sys.executable}")
    assert done.returncode == 0, done.stderr
    installs = [line for line in done.stdout.splitlines() if "pip install" in line]
    assert bool(installs) == (target not in {"help", "clean"})
    assert all("-c constraints.txt" in line for line in installs)
    assert all(("[search,worlds]" in line) == (target == "demo") for line in installs)


def test_environment_is_kept_while_nothing_changed_and_renewed_when_stale(copy: Path) -> None:
    def plan() -> str:
        return make(copy, "-n", "check", f"PYTHON={sys.executable}").stdout

    stamps = copy / ".venv" / "stamps"
    stamps.mkdir(parents=True)
    (stamps / f"python-{sys.version.split()[0]}").touch()
    (stamps / "dev").touch()
    assert "pip install" not in plan()
    later = (stamps / "dev").stat().st_mtime + 10
    os.utime(copy / "constraints.txt", (later, later))
    assert "pip install" in plan()
    os.utime(stamps / "dev", (later + 10, later + 10))
    assert "pip install" not in plan()
    (stamps / f"python-{sys.version.split()[0]}").rename(stamps / "python-3.10.0")
    assert "-m venv" in plan()


def test_no_python_is_said_plainly(copy: Path) -> None:
    done = make(copy, "demo", "PYTHON=false")
    assert done.returncode != 0
    assert "No Python >= 3.11" in done.stdout


def test_missing_system_package_names_the_command(tmp_path: Path) -> None:
    """A user who is not root is told the command, and nothing is installed."""
    for name, body in {"dpkg-query": "exit 1", "id": "echo 1000", "apt-get": "touch called"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    script = ["sh", str(ROOT / "tools" / "system_packages.sh"), "fonts-a", "fonts-b"]
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Run: sudo apt-get install -y --no-install-recommends fonts-a fonts-b" in done.stdout
    assert not (tmp_path / "called").exists()


def test_ci_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in script.read_text()
    assert "make test" in script.read_text()
