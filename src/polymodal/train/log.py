"""The curve of a run as JSON lines, and the progress that a person watches."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from polymodal.core.files import atomic_write

LINE_SECONDS = 10.0  # between lines where there is no terminal


def read_curve(path: Path, until: int | None = None) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl` up to a step; a line that a crash cut short ends it."""
    records: list[dict[str, Any]] = []
    if not path.exists():
        return records
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if until is None or record["step"] <= until:
            records.append(record)
    return records


class Curve:
    """Appends one line a step, after it drops the lines past the checkpoint: no step is there twice."""

    def __init__(self, path: Path, step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, "".join(json.dumps(record) + "\n" for record in read_curve(path, step)))
        self._file = path.open("a", encoding="utf-8")

    def append(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()  # a killed process keeps what the system holds

    def sync(self) -> None:
        """Makes the lines as durable as the checkpoint that relies on them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class Display:
    """A live bar on a terminal, else a line now and then, on the standard error; nothing where ``shown`` is false."""

    def __init__(self, name: str, *, step: int, steps: int, shown: bool) -> None:
        self.name = name
        self.steps = steps
        self._console = Console(stderr=True, quiet=not shown, soft_wrap=True, highlight=False)
        self._live = self._console.is_terminal and shown
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.completed}/{task.total} [cyan]{task.fields[facts]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._live,
            redirect_stdout=sys.stdout.isatty(),  # what is printed for a file does not go above the bar
        )
        self._task = self._bar.add_task(name, total=steps, completed=step, facts="")
        self._first = step
        self._began = self._said = time.perf_counter()

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def step(self, step: int, loss: float, rate: float, waiting: float) -> None:
        """Shows where the run is; ``rate`` is rows a second, ``waiting`` the share of time without data."""
        facts = f"loss {loss:.4f} · {rate:,.1f}/s · {waiting:.0%} waiting for data"
        if self._live:
            self._bar.update(self._task, completed=step, facts=facts)
            return
        now = time.perf_counter()
        if now - self._said >= LINE_SECONDS:
            self._said = now
            left = (now - self._began) / (step - self._first) * (self.steps - step)
            self._console.print(f"{self.name} {step}/{self.steps} · {facts} · {_clock(left)} left", markup=False)

    def say(self, text: str) -> None:
        self._console.print(f"{self.name}: {text}", markup=False)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
