"""Errors that a user can cause, each with what was wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class PolymodalError(Exception):
    """Base of every error that is the user's to mend."""


class ConfigError(PolymodalError):
    """A configuration is impossible, incomplete or holds a field that is not understood."""


class WeightsError(PolymodalError):
    """A checkpoint does not fit: the message lists every problem, not the first one."""

    def __init__(self, where: str, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        count = f"{len(self.problems)} problem" + ("s" if len(self.problems) != 1 else "")
        super().__init__(f"{where}: {count}, nothing was loaded\n" + "\n".join(f"  - {p}" for p in self.problems))


class MediaError(PolymodalError):
    """A file or array is not the medium it should be: broken, hostile, too large, wrong shape."""


class DataError(PolymodalError):
    """Training or evaluation data is missing or malformed."""


class UnsupportedError(PolymodalError):
    """A system was asked for something that it does not do."""


class IndexStateError(PolymodalError):
    """An index is missing, locked, or was made by another model."""


class TrainError(PolymodalError):
    """A training run cannot start or go on."""


class ConsentError(PolymodalError):
    """A voice may not be copied: nobody is on record as having agreed."""


class MissingDependency(PolymodalError):
    """An optional package is needed; the message names the extra to install."""

    def __init__(self, what: str, package: str, extra: str) -> None:
        super().__init__(f"{what} needs the package {package}: pip install 'polymodal[{extra}]'")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint such as ``. Did you mean 'clip'?``, or the list of what is known."""
    known = sorted(known)
    close = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    if close:
        return ". Did you mean " + " or ".join(repr(c) for c in close) + "?"
    return f". Known: {', '.join(known)}"
