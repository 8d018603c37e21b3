"""What a chunk that comes four steps late costs: synchronous, naive asynchronous and real-time chunking, one policy.

    python -m benchmarks.bench_delay [--episodes 100] [--delay 4] [--out runs/delay]

A flow policy learns pick-and-place at the table-top from the state of what is named (five minutes of a core; a run that
was stopped goes on), and to begin a chunk with up to four actions that are given. Each way then gets the same scenes.
The robot waits for nobody but under the first way; under the others a chunk is begun every four steps and arrives
``--delay`` steps later.

Bar: real-time chunking loses at most 5 points of success where naive asynchrony loses more, and where one chunk follows
another its actions change at most 1.2 times as much as within one.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks._report import machine, report
from polymodal.act.chunks import Asynchronous, RealTime, Receding, Way, jump
from polymodal.systems.behaviour import BehaviourCloning
from polymodal.systems.chunk_heads import Flow
from polymodal.train import Cosine, Header, Run, Stage, fit
from recipes.nano.stated import Pointed, Stated

PLACING = Stated(task="pick-place", episodes=1200, noise=0.07, horizon=12, execute=4, head=Flow(given=4))


def learned(out: Path, steps: int) -> BehaviourCloning:
    """The policy, trained or (where it was already) read from its run."""
    run = Run(
        name="delay",
        header=Header(
            command="python -m benchmarks.bench_delay", machine="1 CPU core", time="5 minutes", expected="a policy"
        ),
        model=PLACING.policy,
        stages=[
            Stage(
                name="clone", steps=steps, batch_size=256, source=PLACING.lessons_of_carrying, lr=2e-3,
                schedule=Cosine(warmup=min(100, steps // 10)), weight_decay=1e-4, betas=(0.9, 0.95), ema=0.99,
                workers=0,
            )
        ],
    )  # fmt: skip
    model = fit(run, out).model
    assert isinstance(model, BehaviourCloning)
    return model


def tried(model: BehaviourCloning, way: Way, episodes: int) -> dict[str, Any]:
    done, played = PLACING.trial(model, episodes, way)
    return {
        "success": str(done.success),
        "points": round(100 * done.success.value, 1),
        "steps": round(float(np.mean([one.steps for one in done.episodes])), 1),
        "jump at borders / inside": round(jump(played), 2),
        "of the hand": round(jump(played, slice(3)), 2),
        "of the opening": round(jump(played, slice(3, 4)), 2),
        "jerk": round(done.jerk, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--delay", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6000, help="of the training")
    parser.add_argument("--out", type=Path, default=Path("runs/delay"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    about = machine()
    model, execute = learned(arguments.out, arguments.steps), PLACING.execute
    ways: dict[str, Way] = {
        "synchronous": Receding(execute=execute),
        "naive asynchronous": Asynchronous(execute=execute, delay=arguments.delay),
        "real-time chunking": RealTime(execute=execute, delay=arguments.delay),
    }
    found = {name: tried(model, way, arguments.episodes) for name, way in ways.items()}
    report(
        "delay",
        {
            "machine": about,
            "delay": f"{arguments.delay} steps of {1000 // Pointed.fps} ms",
            "ways": found,
            "points lost": {
                name: round(found["synchronous"]["points"] - found[name]["points"], 1) for name in list(ways)[1:]
            },
            "bar": {"points lost by real-time chunking": 5, "its jump": 1.2},
        },
    )


if __name__ == "__main__":
    main()
