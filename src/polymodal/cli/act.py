"""The commands that act: record, act, serve-policy."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from polymodal.cli.common import Commands, command, count, with_json
from polymodal.cli.show import bar, plain, print_json

if TYPE_CHECKING:
    from polymodal.act.chunks import Way
    from polymodal.act.envs.base import RobotEnv
    from polymodal.act.limits import Limits
    from polymodal.act.novelty import Novelty
    from polymodal.core.precision import Precision
    from polymodal.core.verbs import Acts

KEY = "POLYMODAL_KEY"  # the environment variable of a server's key: what a command line says, others on the machine see


def _record(arguments: argparse.Namespace) -> int:
    from polymodal.act.envs import make
    from polymodal.core.errors import ConfigError
    from polymodal.recording import record

    if not arguments.expert:
        raise ConfigError("say who acts: --expert records the environment's own scripted demonstrator")
    chosen = {"size": arguments.size, "cameras": arguments.cameras}
    env = make(arguments.env, **{name: value for name, value in chosen.items() if value is not None})
    with env, bar("recording", "episodes") as show:
        done = record(
            env, arguments.out, name=arguments.env, episodes=arguments.episodes, seed=arguments.seed,
            noise=arguments.noise, lossless=arguments.lossless, progress=show,
        )  # fmt: skip
    print(
        f"{plain(str(arguments.out))}: {done.episodes} episodes, {done.frames} frames, {done.tasks} instructions"
        + (f"; the expert failed {done.failed} more, which are left out" if done.failed else "")
    )
    return 0


def _act(arguments: argparse.Namespace) -> int:
    from polymodal.act.envs import make
    from polymodal.act.guard import Guard
    from polymodal.act.limits import Limits
    from polymodal.act.novelty import Novelty
    from polymodal.act.runner import run
    from polymodal.act.stops import stop_on_signals
    from polymodal.core.files import read_json
    from polymodal.modalities.film import film

    pace = arguments.pace or _is_address(arguments.policy)
    novelty = Novelty.load(arguments.guard) if arguments.guard else None
    local = arguments.policy != "expert" and not _is_address(arguments.policy)
    policy = _policy(arguments.policy, arguments.dataset, arguments.precision) if local else None
    chosen = {"size": arguments.size or _size(arguments.env, policy), "cameras": arguments.cameras}
    with contextlib.ExitStack() as stack:
        env = stack.enter_context(make(arguments.env, **{name: of for name, of in chosen.items() if of is not None}))
        limits = env.limits() if novelty is None or novelty.limits is None else novelty.limits
        if arguments.limits:
            limits = Limits.from_json(read_json(arguments.limits))
        guard = Guard(limits, fps=env.fps, novelty=novelty, log=arguments.log, clock=time.monotonic if pace else None)
        controller = stack.enter_context(contextlib.closing(_controller(arguments, policy, env, limits)))
        out = stack.enter_context(film(arguments.film, env.fps)) if arguments.film else None
        if pace:
            stack.enter_context(stop_on_signals(guard))
        views: list[list[Any]] = []
        show = stack.enter_context(bar("acting", "episodes"))
        report = run(
            env, controller, guard, episodes=arguments.episodes, seed=arguments.seed, swapped=arguments.swapped,
            instruction=arguments.task, pace=pace, film=out, progress=show,
            seen=(lambda number, *seen: _keep(views, number, seen)) if arguments.fit_guard else None,
        )  # fmt: skip
        if arguments.fit_guard:
            _fit([views[n] for n, one in enumerate(report.episodes) if one.success], env).save(arguments.fit_guard)
    for said in dict.fromkeys(controller.errors) if _is_address(arguments.policy) else ():  # why there was no action
        print(f"polymodal: {plain(said)}", file=sys.stderr)
    if arguments.json:
        print_json(report.to_json())
        return 0
    print(f"success: {report.success}" + (" of what was told" if arguments.swapped else ""))
    if report.success_shown is not None:
        print(f"success: {report.success_shown} of what was shown, and not told")
    times = ", ".join(f"{name} {value:.2f} ms" for name, value in report.latency_ms.items())
    print(f"a tick: {times}; the policy and the guard could hold {report.rate:.0f} Hz of {env.fps}")
    if pace:
        print(f"missed ticks: {report.missed} of {sum(one.steps for one in report.episodes)}")
    print(f"jerk: {report.jerk:.4g}")
    for what, ticks in sorted(report.interventions.items(), key=lambda each: -each[1]):
        print(f"guard: {plain(what)} ({ticks} ticks)")
    for path in (arguments.film, arguments.fit_guard):
        if path:
            print(f"written: {plain(path)}")
    return 0


def _is_address(policy: str) -> bool:
    return policy.startswith(("ws://", "wss://"))


def _size(env: str, policy: Any) -> int | None:
    """The side of the pictures that a policy reads: drawn larger and made smaller, they look otherwise to it."""
    from polymodal.act.envs import FAMILIES
    from polymodal.modalities.image import Exact

    family, reads = FAMILIES.get(env.partition("/")[0]), getattr(getattr(policy, "images", None), "resize", None)
    if family is None or not family.any_size or not isinstance(reads, Exact) or reads.height != reads.width:
        return None
    return reads.height


def _controller(arguments: argparse.Namespace, policy: Any, env: Any, limits: Limits) -> Any:
    """What acts: the environment's expert, a policy here, or one behind an address."""
    import torch

    from polymodal.act.chunks import Player
    from polymodal.act.client import Client, RemotePlayer
    from polymodal.act.runner import Expert, Sampled

    if arguments.policy == "expert":
        return Expert(env)
    if _is_address(arguments.policy):
        client = Client(arguments.policy, key=os.environ.get(KEY))
        return RemotePlayer(client, fps=env.fps, execute=arguments.execute or max(1, client.horizon // 2))
    assert policy is not None
    if arguments.samples > 1:
        policy = Sampled(policy, arguments.samples, limits)
    return Player(policy, _way(arguments, policy), generator=torch.Generator().manual_seed(arguments.seed))


def _policy(name: str, dataset: str | None, precision: Precision) -> Acts:
    import torch

    from polymodal.api import load
    from polymodal.core.errors import UnsupportedError
    from polymodal.core.verbs import verbs_of

    model: Any = load(name, precision=precision)
    if "act" not in verbs_of(type(model)):
        raise UnsupportedError(f"{name} is a {type(model).__name__}, which does not act")
    if dataset is not None:
        model.use_statistics(model.statistics, dataset)
    return (model.cuda() if torch.cuda.is_available() else model).eval()


def _way(arguments: argparse.Namespace, policy: Acts) -> Way:
    from polymodal.act.chunks import Asynchronous, Ensemble, RealTime, Receding

    half = arguments.execute or max(1, policy.horizon // 2)
    ways: dict[str, Way] = {
        "receding": Receding(execute=arguments.execute),
        "ensemble": Ensemble(),
        "async": Asynchronous(execute=half, delay=arguments.delay),
        "realtime": RealTime(execute=half, delay=arguments.delay),
    }
    return ways[arguments.chunks]


def _keep(views: list[list[Any]], number: int, seen: tuple[Any, ...]) -> None:
    views.extend([] for _ in range(number + 1 - len(views)))
    views[number].append(seen)


def _fit(episodes: list[list[Any]], env: RobotEnv) -> Novelty:
    import numpy as np

    from polymodal.act.novelty import Novelty

    actions = [np.stack([command for _, command in episode]) for episode in episodes]
    limits = env.limits().learned(actions, env.fps)
    return Novelty.fit([[view for view, _ in episode] for episode in episodes], actions, limits)


def _serve_policy(arguments: argparse.Namespace) -> int:
    from polymodal.act.server import PolicyServer, ServerConfig

    config = ServerConfig(host=arguments.host, port=arguments.port, key=arguments.key or os.environ.get(KEY) or None)
    policy = _policy(arguments.policy, arguments.dataset, arguments.precision)
    server = PolicyServer(policy, config, metadata={"policy": arguments.policy})
    print(f"{plain(arguments.policy)}: ws://{plain(arguments.host)}:{server.port}, Ctrl-C ends it", flush=True)
    with contextlib.suppress(KeyboardInterrupt), contextlib.closing(server):  # robots that are connected, too
        server.serve_forever()
    return 0


def add(commands: Commands) -> None:
    """Declares the commands."""
    _add_record(commands)
    _add_act(commands)
    serve = command(
        commands,
        "serve-policy",
        _serve_policy,
        "answer robots over the network, in openpi's protocol",
        f"""\
examples:
  polymodal serve-policy polymodal/nano-reach
  polymodal serve-policy polymodal/nano-reach --port 9000
  {KEY}=secret polymodal serve-policy polymodal/nano-reach --host 0.0.0.0
openpi's own client speaks to it, and so does: polymodal act ws://127.0.0.1:8000 --env tabletop/reach""",
    )
    serve.add_argument("policy", metavar="POLICY", help="a folder or a Hub name")
    _with_policy(serve)
    serve.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: 127.0.0.1)")
    serve.add_argument("--port", type=int, default=8000, help="(default: 8000; 0: any that is free)")
    serve.add_argument("--key", help=f"that clients must send; better in ${KEY}, where others do not see it")


def _add_act(commands: Commands) -> None:
    act = command(
        commands,
        "act",
        _act,
        "run a policy in closed loop, guarded, and count how often it succeeds",
        """\
examples:
  polymodal act polymodal/nano-reach --env tabletop/reach --episodes 100 --film reach.mp4
  polymodal act polymodal/nano-reach --env tabletop/reach --swapped     does it listen, or only look?
  polymodal act expert --env tabletop/reach --episodes 100 --fit-guard reach.guard
  polymodal act polymodal/nano-reach --env tabletop/reach --guard reach.guard --log interventions.jsonl
The guard always holds the robot's limits; with --guard it knows what is normal, too.""",
    )
    act.add_argument("policy", metavar="POLICY", help="a folder, a Hub name, ws://HOST:PORT of a server, or: expert")
    act.add_argument("--env", required=True, metavar="ENV", help="such as tabletop, metaworld/push-v3")
    act.add_argument("--task", metavar="TEXT", help="told instead of the environment's own words")
    act.add_argument("--episodes", type=count, default=10, metavar="N", help="(default: 10)")
    act.add_argument("--seed", type=int, default=0, help="of the first episode, and of what the policy samples")
    act.add_argument("--swapped", action="store_true", help="show the scene of one target, tell another")
    act.add_argument("--film", metavar="FILE", help="an mp4 of all episodes")
    act.add_argument(
        "--chunks", choices=("receding", "ensemble", "async", "realtime"), default="receding",
        help="how chunks of actions are carried out (default: receding)",
    )  # fmt: skip
    act.add_argument(
        "--execute", type=count, metavar="STEPS", help="of a chunk, before the next (default: all or half)"
    )
    act.add_argument("--delay", type=int, metavar="STEPS", help="of async and realtime (default: what it takes)")
    act.add_argument("--samples", type=count, default=1, metavar="N", help="the guard sees whether N samples agree")
    act.add_argument("--guard", metavar="FILE", help="what --fit-guard wrote")
    act.add_argument("--fit-guard", metavar="FILE", help="learn from the successful episodes what is normal")
    act.add_argument("--limits", metavar="FILE", help="JSON of limits, instead of the environment's own")
    act.add_argument("--log", metavar="FILE", help="every intervention of the guard is appended, as JSON lines")
    act.add_argument("--pace", action="store_true", help="hold the environment's rate by the clock")
    _with_policy(act)
    act.add_argument(
        "--size", type=count, metavar="PIXELS", help="side of the pictures (default: what the policy reads)"
    )
    act.add_argument("--cameras", nargs="+", metavar="NAME", help="which cameras (default: all of them)")
    with_json(act)


def _with_policy(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--dataset", metavar="NAME", help="whose robot it is, where the policy knows several")
    sub.add_argument("--precision", choices=("fp32", "bf16", "auto"), default="fp32", help="(default: fp32)")


def _add_record(commands: Commands) -> None:
    record = command(
        commands,
        "record",
        _record,
        "write demonstrations as a LeRobot data set",
        """\
examples:
  polymodal record tabletop/reach --expert --episodes 500 --out data/reach
  polymodal record metaworld/mt10 --expert --episodes 300 --size 128 --out data/mt10
The same command again goes on where it stopped; more --episodes add to what is there.
polymodal record tabletop/pick-place+randomised varies light, table, cameras, masses and delay.""",
    )
    record.add_argument("env", metavar="ENV", help="such as tabletop, metaworld/push-v3, babyai/GoToLocal")
    record.add_argument("--expert", action="store_true", help="the scripted demonstrator acts")
    record.add_argument("--episodes", type=count, default=100, metavar="N", help="successful episodes (default: 100)")
    record.add_argument("--out", required=True, metavar="DIR", help="the folder of the data set")
    record.add_argument(
        "--noise", type=float, default=0.0, metavar="PART",
        help="disturb what is done by this part of its range; the expert's own actions are recorded (default: 0)",
    )  # fmt: skip
    record.add_argument("--lossless", action="store_true", help="exact films, somewhat larger")
    record.add_argument("--seed", type=int, default=0, help="the same seed gives the same episodes (default: 0)")
    record.add_argument("--size", type=count, metavar="PIXELS", help="side of the pictures")
    record.add_argument("--cameras", nargs="+", metavar="NAME", help="which cameras (default: all of them)")
