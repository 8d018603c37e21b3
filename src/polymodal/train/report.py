"""What a run leaves for people: the curve as a picture, and expected beside reached as JSON."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from polymodal.core.errors import MissingDependency
from polymodal.core.files import atomic_path, write_json
from polymodal.train.checkpoint import State
from polymodal.train.log import read_curve
from polymodal.train.run import Run


def require_curve() -> None:
    """Fails before the hours of training and not after them.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingDependency("the picture of the loss curve", "matplotlib", "train")


def reached(run: Run, metrics: Mapping[str, float]) -> dict[str, bool]:
    """Which expected metrics are there and high enough."""
    return {name: metrics.get(name, float("-inf")) >= bar.value for name, bar in run.expect.items()}


def write_result(path: Path, run: Run, state: State, *, device: torch.device, world: int) -> None:
    """Writes ``result.json``."""
    expected = {
        name: {
            "expected": bar.value,
            "chance": bar.chance,
            "reached": state.metrics.get(name),
            "passed": reached(run, state.metrics)[name],
        }
        for name, bar in run.expect.items()
    }
    write_json(
        path,
        {
            "run": run.name,
            "header": vars(run.header),
            "finished": state.step == run.steps,
            "steps": state.step,
            "loss": state.loss,
            "expected": expected,
            "metrics": state.metrics,
            "seconds": round(state.seconds, 1),
            "cpu_seconds": round(state.cpu_seconds, 1),
            "machine": machine(device, world),
            "versions": {name: importlib.metadata.version(name) for name in ("polymodal", "torch", "numpy")},
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        },
    )


def machine(device: torch.device, world: int) -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "processes": world,
    }


def draw_curve(metrics: Path, picture: Path, title: str) -> None:
    """Draws the loss of each step with its running mean, the learning rate, and every evaluated metric."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    records = read_curve(metrics)
    steps = [r["step"] for r in records]
    evaluated = [r for r in records if r.get("evaluation")]
    figure = Figure(figsize=(9, 8 if evaluated else 5))  # a layout engine would double the time
    axes = figure.subplots(2 if evaluated else 1, 1, sharex=True, squeeze=False)[:, 0]
    losses = [r["loss"] for r in records]
    axes[0].plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8)
    axes[0].plot(steps, _running_mean(losses), color="tab:blue")
    axes[0].set(ylabel="loss", title=title)
    rates = axes[0].twinx()
    rates.plot(steps, [r["lr"] for r in records], color="tab:gray", linewidth=0.8, linestyle="--")
    rates.set_ylabel("learning rate")
    for name in sorted({name for r in evaluated for name in r["evaluation"]}):
        points = [(r["step"], r["evaluation"][name]) for r in evaluated if name in r["evaluation"]]
        axes[1].plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    if evaluated:
        axes[1].set_ylabel("evaluation")
        axes[1].legend(fontsize="small")
    axes[-1].set_xlabel("step")
    with atomic_path(picture) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _running_mean(values: list[float], decay: float = 0.98) -> list[float]:
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        means.append(total / weight)
    return means
