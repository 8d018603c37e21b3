"""What the guard makes of clean episodes and of faults, with polymodal/nano-reach at the table-top.

    python -m benchmarks.bench_guard [--calibrate 100] [--clean 400] [--injected 3]

Bars: at most 1 % of the clean episodes are held or stopped; the score of what is seen tells clean pictures from strange
ones with an AUROC of at least 0.9; every fault is caught, a hard one within two ticks. Calibration and survey take
different scenes. The policy has one camera: that two are swapped cannot happen to it.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch

import polymodal
from benchmarks._report import machine, report
from polymodal.act.chunks import Player, Receding
from polymodal.act.envs import make
from polymodal.act.faults import FAULTS, survey
from polymodal.act.guard import Guard
from polymodal.act.novelty import Novelty
from polymodal.act.runner import run
from polymodal.core.observation import Observation

CALIBRATED = 2**24  # the first seed of calibration


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibrate", type=int, default=100, help="episodes that say what is normal")
    parser.add_argument("--clean", type=int, default=400)
    parser.add_argument("--injected", type=int, default=3, help="episodes of each fault")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    about = machine()
    policy: Any = polymodal.load("polymodal/nano-reach")
    views: dict[int, list[Observation]] = {}
    sent: dict[int, list[np.ndarray]] = {}

    def seen(number: int, view: Observation, command: np.ndarray) -> None:
        views.setdefault(number, []).append(view)
        sent.setdefault(number, []).append(command)

    with make("tabletop/reach", size=policy.config.trunk.image_size, cameras=policy.cameras) as env:
        player = Player(policy, Receding(execute=2), generator=torch.Generator().manual_seed(0))
        episodes = arguments.calibrate
        done = run(
            env, player, Guard(env.limits(), fps=env.fps), episodes=episodes, seed=CALIBRATED, seen=seen
        ).episodes
        good = [number for number, one in enumerate(done) if one.success]
        actions = [np.stack(sent[number]) for number in good]
        limits = env.limits().learned(actions, env.fps)
        novelty = Novelty.fit([views[number] for number in good], actions, limits)
        found = survey(
            env, player, lambda: Guard(limits, fps=env.fps, novelty=novelty), clean=arguments.clean,
            injected=arguments.injected, names=[name for name in FAULTS if name != "swapped cameras"],
        )  # fmt: skip
    hard = [found.faults[name] for name in found.faults if FAULTS[name].hard]
    report(
        "guard",
        {
            "machine": about,
            "calibrated on": f"{len(good)} successful of {episodes}",
            "false stops": str(found.false_stops),
            "ticks of clean episodes that were limited": round(found.limited, 5),
            "AUROC of strange scenes": round(found.auroc, 4),
            "faults caught": f"{sum(one.caught for one in found.faults.values())} of "
            f"{sum(one.injected for one in found.faults.values())}",
            "hard ones caught within two ticks": f"{sum(one.quick for one in hard)} of "
            f"{sum(one.injected for one in hard)}",
            "missed": {name: one.missed for name, one in found.faults.items() if one.missed},
            "bar": {"false stops": 0.01, "AUROC": 0.9, "missed": 0},
        },
    )


if __name__ == "__main__":
    main()
