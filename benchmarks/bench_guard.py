"""What the guard makes of clean episodes and of faults, with polymodal/nano-reach at the table-top.

    python -m benchmarks.bench_guard [--calibrate 100] [--clean 400] [--injected 10]

Bars: at most 1 % of the clean episodes are held or stopped; the score of what is seen tells clean pictures from an
unseen scene, a black frame and swapped cameras with an AUROC of at least 0.9 each; every fault is caught, a hard one
within two ticks. Calibration, survey and scores take different scenes. The policy looks through one camera; the robot
has two, and the guard watches both.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float32

import polymodal
from benchmarks._report import machine, report
from polymodal.act.chunks import Player, Receding, Way
from polymodal.act.envs import make
from polymodal.act.faults import FAULTS, Injection, auroc, survey
from polymodal.act.guard import Guard
from polymodal.act.limits import Limits
from polymodal.act.novelty import Novelty
from polymodal.act.runner import run
from polymodal.core.observation import Observation
from polymodal.core.verbs import Acts

CALIBRATED: Final = 2**24  # the first seed; the survey's is 0
SCORED: Final = 2**25
CAMERAS: Final = ("front", "wrist")
ODD: Final = ("unseen scene", "black frame", "swapped cameras")  # what pictures alone must show


class Clipped(Player):
    """Asks for no more than the robot's range. What was regressed onto a hand at full speed is now and then a hundredth
    too fast, and a guard that limits every other clean tick says little where it limits a fault."""

    def __init__(self, policy: Acts, way: Way, limits: Limits) -> None:
        super().__init__(policy, way)
        self._low, self._high = np.array(limits.low, np.float32), np.array(limits.high, np.float32)

    def action(self, observation: Observation) -> Float32[np.ndarray, " action_dim"]:
        return np.clip(super().action(observation), self._low, self._high)


def seen_by(env: Any, player: Player, episodes: int, seed: int) -> tuple[list[list[Observation]], list[np.ndarray]]:
    """Observations and actions of those episodes that succeed."""
    views: list[list[Observation]] = [[] for _ in range(episodes)]
    sent: list[list[np.ndarray]] = [[] for _ in range(episodes)]

    def seen(number: int, view: Observation, command: np.ndarray) -> None:
        views[number].append(view)
        sent[number].append(command)

    done = run(env, player, Guard(env.limits(), fps=env.fps), episodes=episodes, seed=seed, seen=seen).episodes
    good = [number for number, one in enumerate(done) if one.success]
    return [views[number] for number in good], [np.stack(sent[number]) for number in good]


def told_apart(novelty: Novelty, guard: Guard, views: Sequence[Observation]) -> dict[str, float]:
    """The AUROC of the score of each kind of odd picture against the clean ones; cameras are struck in turn."""
    clean = np.array([novelty.score(view) for view in views])
    out = {}
    for name in ODD:
        odd = []
        for number, view in enumerate(views):
            camera = CAMERAS[number % len(CAMERAS)]
            struck = Injection(name, guard.limits, fps=guard.fps, at=0, camera=camera).seen(view)
            assert struck is not None
            odd.append(novelty.score(struck))
        out[name] = round(auroc(clean, np.array(odd)), 4)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibrate", type=int, default=100, help="episodes that say what is normal")
    parser.add_argument("--clean", type=int, default=400)
    parser.add_argument("--injected", type=int, default=10, help="episodes of each fault")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    about = machine()
    policy: Any = polymodal.load("polymodal/nano-reach")
    with make("tabletop/reach", size=policy.config.trunk.image_size, cameras=CAMERAS) as env:
        player = Clipped(policy, Receding(execute=2), env.limits())
        normal, actions = seen_by(env, player, arguments.calibrate, CALIBRATED)
        limits = env.limits().learned(actions, env.fps)
        novelty = Novelty.fit(normal, actions, limits)

        def guard() -> Guard:
            return Guard(limits, fps=env.fps, novelty=novelty)

        new, _ = seen_by(env, player, arguments.calibrate, SCORED)
        found = survey(env, player, guard, clean=arguments.clean, injected=arguments.injected)
    report(
        "guard",
        {
            "machine": about,
            "calibrated on": f"{len(normal)} successful of {arguments.calibrate}",
            "clean episodes held or stopped": str(found.false_stops),
            "ticks of clean episodes that were limited": round(found.limited, 5),
            "AUROC against clean pictures": told_apart(novelty, guard(), [view for one in new for view in one]),
            "faults": {
                name: {
                    "caught": f"{one.caught} of {one.injected}",
                    "within two ticks": one.quick,
                    "slowest, in ticks": one.slowest,
                    "hard": FAULTS[name].hard,
                    "causes": list(one.causes),
                }
                for name, one in found.faults.items()
            },
            "bar": {"held or stopped": 0.01, "AUROC": 0.9, "missed": 0, "hard ones: within ticks": 2},
        },
    )


if __name__ == "__main__":
    main()
