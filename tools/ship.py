"""Turns a finished run into a model that the package ships: half-precision weights, and a card with fresh figures.

    python -m tools.ship recipes/nano/clip.py runs/nano-clip nano-clip

The figures of the card are measured on the shipped files, not copied from the run.
"""

from __future__ import annotations

import argparse
import ast
from pathlib import Path

import torch

import polymodal
from polymodal.core.files import atomic_write, read_json
from polymodal.train import load_run

SHIPPED = Path(__file__).resolve().parents[1] / "src/polymodal/shipped"
CARD = """\
---
license: apache-2.0
library_name: polymodal
---
# polymodal/{name}

{about}

Where a bar stands and is not reached, it was missed.

| question on held-out data | reached | bar | chance |
|---|---|---|---|
{rows}

Trained in {minutes:.0f} minutes ({cpu_minutes:.0f} CPU-minutes) by `{command}`; figures of
`python -m tools.ship`, measured on these files.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="the recipe that trained it")
    parser.add_argument("run", type=Path, help="the folder of the finished run")
    parser.add_argument("name", help="what to call it: polymodal/NAME")
    parser.add_argument("--numbers", nargs="*", default=[], metavar="METRIC", help="figures that are no shares")
    arguments = parser.parse_args()
    run = load_run(arguments.recipe)
    folder = SHIPPED / arguments.name
    polymodal.load(arguments.run / "model").save(folder, dtype=torch.float16)
    model = polymodal.load(folder)
    assert run.evaluate is not None
    with torch.inference_mode():
        metrics = run.evaluate(model)
    rows = []
    for metric, value in metrics.items():
        bar = run.expect.get(metric)
        form = ".2f" if any(f"/{metric}".endswith(f"/{name}") for name in arguments.numbers) else ".1%"
        limits = ["" if limit is None else format(limit, form) for limit in (bar and bar.value, bar and bar.chance)]
        rows.append(f"| {metric} | {value:{form}} | {limits[0]} | {limits[1]} |")
    result = read_json(arguments.run / "result.json")
    card = CARD.format(
        name=arguments.name,
        about=(ast.get_docstring(ast.parse(Path(arguments.recipe).read_text())) or "").partition("\n\ncommand")[0],
        rows="\n".join(rows),
        minutes=result["seconds"] / 60,
        cpu_minutes=result["cpu_seconds"] / 60,
        command=run.header.command,
    )
    atomic_write(folder / "README.md", card)
    size = sum(p.stat().st_size for p in folder.iterdir())
    print(f"{folder}: {size / 1e6:.2f} MB\n{card}")


if __name__ == "__main__":
    main()
