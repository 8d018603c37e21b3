"""A robot's loop at 50 Hz: a nano policy behind two cameras, its guard, a simulator; and what the wire adds.

    python -m benchmarks.bench_control [--seconds 600] [--size 64] [--asynchronous]

Bar, on a machine that does nothing else: p99 of a tick (from observation to command) below 20 ms and no missed tick in
ten minutes; p95 of the wire below 1 ms. The policy has random weights: what it asks is of no use, what it costs is.
A tick is missed where policy, guard, physics and both cameras' pictures together take longer than 20 ms.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any, ClassVar

import numpy as np
import torch

from benchmarks._report import machine, report
from polymodal.act.chunks import Asynchronous, Player, Receding
from polymodal.act.client import Client
from polymodal.act.envs.tabletop import Tabletop
from polymodal.act.guard import Guard, GuardConfig
from polymodal.act.novelty import Novelty
from polymodal.act.runner import Expert, run
from polymodal.act.server import PolicyServer, ServerConfig
from polymodal.core.batch import Batch
from polymodal.core.observation import Observation
from polymodal.encoders.trunk import PixelTrunk
from polymodal.modalities.action import Statistics
from polymodal.systems.behaviour import BehaviourCloning, BehaviourConfig
from polymodal.systems.chunk_heads import Flow


class Robot(Tabletop):
    """The table-top, told fifty actions a second, that never ends an episode."""

    fps: ClassVar[int] = 50

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        raw, reward, _, _, info = super().step(action)
        return raw, reward, False, False, info


def policy(env: Robot) -> BehaviourCloning:
    """Two cameras, a state and words; a flow head of ten steps; chunks of 16 actions."""
    torch.manual_seed(0)
    trunk = PixelTrunk(cameras=env.cameras, image_size=env.size, state_width=4)
    words = ("put", "touch", "red", "blue", "cup", "ball", "plate")
    model = BehaviourCloning.build(BehaviourConfig(trunk=trunk, head=Flow(), words=words, horizon=16, action_width=4))
    rows = np.random.default_rng(0).normal(size=(100, 4))
    model.use_statistics({"robot": {"state": Statistics.from_array(rows), "action": Statistics.from_array(rows / 100)}})
    return model.eval()


def normal(env: Robot) -> Novelty:
    """What a guard knows of clean episodes: its full cost is in the tick."""
    views: list[list[Observation]] = [[] for _ in range(12)]
    sent: list[list[np.ndarray]] = [[] for _ in range(12)]

    def seen(number: int, view: Observation, command: np.ndarray) -> None:
        views[number].append(view)
        sent[number].append(command)

    run(env, Expert(env), Guard(env.limits(), fps=env.fps), episodes=12, steps=30, seen=seen)
    return Novelty.fit(views, [np.stack(each) for each in sent])


class Nothing:
    """A policy that costs nothing: what is left is the wire."""

    horizon, action_dim = 50, 7

    def observe(self, observations: Any) -> Batch:
        return Batch(state=torch.zeros(1, 1))

    def act(self, batch: Batch, *, generator: torch.Generator | None = None) -> torch.Tensor:
        return torch.zeros(1, self.horizon, self.action_dim)

    def lesson(self, observations: Any, actions: Any, valid: Any) -> Batch:
        raise NotImplementedError


def wire(rounds: int) -> dict[str, float]:
    """Milliseconds of a round trip of two 224 x 224 pictures and a chunk of 50 x 7."""
    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 256, (224, 224, 3), dtype=np.uint8) for name in ("front", "wrist")}
    view = Observation(images=images, state=np.zeros(8, np.float32), instruction="put the cup on the plate")
    took, busy = [], time.process_time()
    with PolicyServer(Nothing(), ServerConfig(port=0)) as server, Client(f"ws://127.0.0.1:{server.port}") as client:
        for _ in range(rounds):
            began = time.perf_counter()
            client.infer(view)
            took.append(time.perf_counter() - began)
    figures = {f"p{p}": round(1e3 * float(np.percentile(took[rounds // 10 :], p)), 3) for p in (50, 95, 99)}
    return figures | {"cpu of both sides": round(1e3 * (time.process_time() - busy) / rounds, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--asynchronous", action="store_true", help="compute the next chunk in a thread")
    parser.add_argument("--rounds", type=int, default=2000, help="of the wire")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    about = machine()
    with Robot("pick-place", size=arguments.size) as env:
        way = Asynchronous(execute=8) if arguments.asynchronous else Receding(execute=8)
        player = Player(policy(env), way, generator=torch.Generator().manual_seed(0))
        novelty = normal(env)
        run(env, player, Guard(env.limits(), fps=env.fps, novelty=novelty), episodes=1, steps=50)  # warm
        steps, busy = arguments.seconds * env.fps, time.process_time()
        began = time.monotonic()
        # A policy of random weights strays: its guard must count that, not end the run.
        patient = GuardConfig(patience=math.inf)
        guard = Guard(env.limits(), fps=env.fps, novelty=novelty, config=patient, clock=time.monotonic)
        done = run(env, player, guard, episodes=1, steps=steps, pace=True)
        figures = {
            "machine": about,
            "cameras": [f"{name} {env.size} px" for name in env.cameras],
            "chunks": type(way).__name__,
            "seconds": round(time.monotonic() - began, 1),
            "cpu ms a tick, with physics and pictures": round(1e3 * (time.process_time() - busy) / steps, 2),
            "ticks": steps,
            "stopped": done.episodes[0].stopped,
            "missed ticks": done.missed,
            "tick, ms": dict(done.latency_ms),
            "bar": {"p99 ms": 20, "missed": 0, "wire p95 ms": 1},
        }
        player.close()
    figures["wire, ms"] = wire(arguments.rounds)
    report("control-asynchronous" if arguments.asynchronous else "control", figures)


if __name__ == "__main__":
    main()
