"""How commands print: what a terminal may be given, JSON, tables and a bar."""

from __future__ import annotations

import contextlib
import json
import sys
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any, Final

_JOINERS: Final = "\u200c\u200d"  # Persian, Hindi and many emoji are spelled with them


def plain(text: str, keep: str = "") -> str:
    """``text`` without anything that a terminal would obey: file names are written by strangers."""
    return "".join(c if _harmless(c) or c in keep else c.encode("unicode_escape").decode() for c in text)


def _harmless(c: str) -> bool:
    # No blank but one is printable to Python; French, Chinese and Japanese have blanks of their own.
    return c.isprintable() or c in _JOINERS or unicodedata.category(c) == "Zs"


def print_json(value: Any) -> None:
    """For programs to read."""
    print(json.dumps(value, indent=1))  # ASCII only, so that odd file names survive any pipe


def console(*, stderr: bool = False) -> Any:
    """A `rich` console; where no terminal is, lines are as long as they are."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=not sys.stdout.isatty())


@contextlib.contextmanager
def bar(what: str, unit: str = "pictures") -> Iterator[Callable[[int, int], None]]:
    """A live bar on the error stream, where that is a terminal. Yields ``show(done, total)``."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        ProgressColumn,
        SpinnerColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bar
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:,.{speed < 10:d}f} {unit}/s" if speed else "", style="dim")

    columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate()]
    screen = console(stderr=True)
    live = Bar(
        *columns, TimeRemainingColumn(), console=screen, transient=True, disable=not screen.is_terminal,
        redirect_stdout=sys.stdout.isatty(),  # words for a file do not go above the bar
    )  # fmt: skip
    with live:
        task = live.add_task(what, total=None)
        yield lambda done, total: live.update(task, completed=done, total=total)
