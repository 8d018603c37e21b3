"""Find things: index, search, groups of near-duplicates."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polymodal.retrieve.index import Index, Progress, Report
    from polymodal.retrieve.reader import Hit, Reader, Stats

__all__ = ["Hit", "Index", "Progress", "Reader", "Report", "Stats"]
_READS = ("Hit", "Reader", "Stats")  # these need no torch


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"polymodal.retrieve.{'reader' if name in _READS else 'index'}"), name)
