"""The policies of the recipes in closed loop, learned from several seeds: success with its interval, and CPU-seconds.

    python -m benchmarks.bench_policies [--policies mt10-l1 reach ...] [--seeds 3] [--out runs/policies]

All seeds share the demonstrations; each starts from other weights, sees them in another order, and is tried in the
same scenes, none of which was shown. The interval is over the trials of all seeds. What is done is kept in ``--out``.

Bars, as the recipes have them: MT10 from state, 60 CPU-seconds, L1 95, flow 92, bins 88 %, and from pixels, 600, 75 %,
heads within 7 points of each other; reach, 240 CPU-seconds, 95 %; pick-and-place, an hour, 80 and 60 %; BabyAI 98 and
90 %; MiniWoB 80 %.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks._report import machine, report
from polymodal.core.files import read_json, write_json
from polymodal.core.interval import wilson
from polymodal.systems.chunk_heads import L1, Bins, Flow
from polymodal.train import Run, fit
from recipes.nano import babyai, miniwob, mt10, mt10_pixels, pick_place, reach


@dataclass(frozen=True)
class Policy:
    run: Callable[[], Run]
    episodes: int  # of each rate
    rates: Sequence[str]  # among the metrics: shares of so many episodes


_TABLE = ("new wordings", "new combinations")
POLICIES: Final = {
    "mt10-l1": Policy(partial(mt10.run, L1()), 100, ("known wordings", "new wordings")),
    "mt10-bins": Policy(partial(mt10.run, Bins()), 100, ("known wordings", "new wordings")),
    "mt10-flow": Policy(partial(mt10.run, Flow()), 100, ("known wordings", "new wordings")),
    "mt10-pixels-l1": Policy(partial(mt10_pixels.run, L1()), 100, ("new wordings",)),
    "mt10-pixels-bins": Policy(partial(mt10_pixels.run, Bins()), 100, ("new wordings",)),
    "mt10-pixels-flow": Policy(partial(mt10_pixels.run, Flow()), 100, ("new wordings",)),
    "reach": Policy(reach.run, 100, _TABLE),
    "pick-place": Policy(pick_place.run, 100, _TABLE),
    "babyai": Policy(babyai.run, 300, ("GoToLocal", "PutNextLocal")),
    "miniwob": Policy(miniwob.run, 300, ("mean",)),
}


def learned(policy: Policy, seed: int, out: Path) -> dict[str, Any]:
    """One seed: the CPU-seconds of learning from demonstrations that are there, and what it does then."""
    if (kept := out / "tried.json").is_file():
        return read_json(kept)
    run = replace(policy.run(), seed=seed, evaluate=None, expect={})
    run.model()  # the demonstrations are kept in memory
    began = time.process_time()
    model, spent = fit(run, out).model, time.process_time() - began
    evaluate = policy.run().evaluate
    assert evaluate is not None
    found = {"cpu_seconds": round(spent), **{name: round(value, 4) for name, value in evaluate(model).items()}}
    write_json(kept, found)
    return found


def summary(policy: Policy, seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The seeds, of each rate its interval, of every other metric its mean."""
    of_all: dict[str, Any] = {}
    for name in seeds[0]:
        values = [seed[name] for seed in seeds]
        if name in policy.rates:
            trials = policy.episodes * len(values)
            of_all[name] = str(wilson(round(sum(values) * policy.episodes), trials))
        else:
            of_all[name] = round(sum(values) / len(values), 3)
    return {"of all": of_all, "seeds": list(seeds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--policies", nargs="+", choices=POLICIES, default=["mt10-l1", "mt10-bins", "mt10-flow", "reach"]
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/policies"))
    args = parser.parse_args()
    about = machine()
    for name in args.policies:
        seeds: list[dict[str, Any]] = []
        for seed in range(args.seeds):
            seeds.append(learned(POLICIES[name], seed, args.out / f"{name}-{seed}"))
            report(f"policies-{name}", {"machine": about, name: summary(POLICIES[name], seeds)})


if __name__ == "__main__":
    main()
