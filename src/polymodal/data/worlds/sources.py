"""Finds, and on request installs, the Debian packages that the worlds draw on."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from polymodal.core.errors import DataError


def install_command(packages: Sequence[str]) -> str:
    """The line that a person runs to install ``packages``."""
    return "apt-get install -y --no-install-recommends " + " ".join(packages)


def version(package: str) -> str | None:
    """The installed version of a Debian package, or None where it (or dpkg itself) is absent."""
    if shutil.which("dpkg-query") is None:
        return None
    query = ["dpkg-query", "-W", "-f", "${db:Status-Status} ${Version}", package]
    state, _, found = subprocess.run(query, capture_output=True, text=True, check=False).stdout.partition(" ")
    return found if state == "installed" else None


def missing(packages: Sequence[str]) -> list[str]:
    """Those of ``packages`` that are not installed."""
    return [package for package in packages if version(package) is None]


def require(packages: Sequence[str]) -> None:
    """Checks that every package is installed.

    Raises:
        DataError: some are not; the message is the command that installs them.
    """
    if absent := missing(packages):
        raise DataError(f"missing system packages: {', '.join(absent)}. Run: {install_command(absent)}")


def ensure(packages: Sequence[str]) -> None:
    """Installs what is missing when running as root on a system with apt.

    Raises:
        DataError: packages are missing and cannot be installed from here; the message names the command.
    """
    absent = missing(packages)
    if not absent:
        return
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        require(absent)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in ("apt-get update", install_command(absent)):
        done = subprocess.run(command.split(), env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise DataError(f"`{install_command(absent)}` failed: {(done.stderr or done.stdout).strip()[-500:]}")


def files(package: str, *suffixes: str) -> list[Path]:
    """The regular files of an installed package whose names end in one of ``suffixes``, sorted; links are left out.

    Raises:
        DataError: the package is not installed.
    """
    require([package])
    listing = subprocess.run(["dpkg", "-L", package], capture_output=True, text=True, check=True).stdout
    paths = (Path(line) for line in listing.splitlines() if line.endswith(suffixes))
    # Containers are often built without documentation or locales: what dpkg lists need not be there.
    return sorted(path for path in paths if path.is_file() and not path.is_symlink())
