"""Figures with the machine that they were taken on."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from polymodal.core.files import write_json

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """What ran, and how busy it was with other things: ratios on a busy machine are worth more than times."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    return {
        "cpu": ", ".join(sorted(names)) or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def report(name: str, figures: dict[str, Any]) -> None:
    """Prints the figures as JSON and keeps them in ``results/NAME.json``."""
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / f"{name}.json", figures)
    print(json.dumps(figures, indent=2))
