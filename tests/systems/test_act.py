"""The closed loop: episodes, intervals, films, the swapped instruction, faults of a policy, and the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from polymodal.act.chunks import Player, Receding
from polymodal.act.guard import Guard
from polymodal.act.runner import Expert, Sampled, run
from polymodal.act.server import PolicyServer, ServerConfig
from polymodal.api import load
from polymodal.cli import main
from polymodal.cli.act import _size
from polymodal.core.errors import MediaError
from polymodal.core.interval import wilson
from polymodal.core.observation import Observation
from polymodal.encoders.trunk import PixelTrunk
from polymodal.modalities.action import Statistics
from polymodal.modalities.film import film
from polymodal.systems.behaviour import BehaviourCloning, BehaviourConfig
from polymodal.systems.chunk_heads import Flow
from tests.toy_robot import FPS, LIMITS, ToyPolicy, ToyRobot


def test_an_expert_succeeds_and_does_what_it_is_told() -> None:
    env = ToyRobot()
    seen: list[tuple[int, Observation]] = []
    report = run(env, Expert(env), Guard(LIMITS, fps=FPS), episodes=6, seen=lambda n, view, _: seen.append((n, view)))
    assert (report.success.k, report.success.n) == (6, 6)
    assert report.success == wilson(6, 6)
    assert report.success_shown is None
    assert report.interventions == {}
    assert [one.seed for one in report.episodes] == list(range(6))
    assert len(seen) == sum(one.steps for one in report.episodes)
    assert report.latency_ms["p50"] <= report.latency_ms["p99"]
    swapped = run(env, Expert(env), Guard(LIMITS, fps=FPS), episodes=6, swapped=True)
    assert (swapped.success.k, swapped.success_shown) == (6, wilson(0, 6))
    json.dumps(report.to_json())
    again = run(env, Expert(env), Guard(LIMITS, fps=FPS), episodes=6)
    assert again.episodes == report.episodes, "an episode is a function of its seed"


def test_a_policy_runs_by_its_chunks_and_hears_other_words() -> None:
    env, ends = ToyRobot(), {}
    for words in ("touch the red thing", "touch the blue thing"):
        player = Player(ToyPolicy(), Receding(execute=2))
        report = run(env, player, Guard(LIMITS, fps=FPS), episodes=1, instruction=words, steps=25)
        ends[words] = env.hand[0]
        assert report.episodes[0].instruction == words
    assert ends["touch the red thing"] > 0.2
    assert ends["touch the blue thing"] < -0.2


def test_samples_that_disagree_hold_the_robot() -> None:
    env = ToyRobot()
    for noise, held in ((0.0, False), (0.2, True)):
        policy = Sampled(ToyPolicy(noise), 8, LIMITS)
        report = run(env, Player(policy, Receding(execute=2)), Guard(LIMITS, fps=FPS), episodes=1, steps=10)
        assert ("held: disagreement" in report.interventions) == held


def test_cameras_draw_what_a_policy_reads_where_they_can() -> None:
    policy = load("polymodal/nano-reach")
    assert _size("tabletop/reach", policy) == _size("metaworld", policy) == 48
    assert _size("babyai/GoToLocal", policy) is None  # its cells are whole pixels
    assert _size("tabletop/reach", None) is None


class Broken(ToyPolicy):
    """Asks for what is no number, from its third chunk on."""

    calls = 0

    def act(self, batch, *, generator=None):  # type: ignore[no-untyped-def]
        self.calls += 1
        return super().act(batch) * (np.nan if self.calls > 2 else 1)


def test_a_policy_that_breaks_is_held_then_stopped_and_an_emergency_ends_the_run() -> None:
    env = ToyRobot()  # its step refuses what is not finite
    guard = Guard(LIMITS, fps=FPS)
    report = run(env, Player(Broken(), Receding(execute=2)), guard, episodes=2)
    assert (report.success.k, report.success.n) == (0, 2), "a stopped episode is a failed one"
    assert "non-finite action" in (report.episodes[0].stopped or "")
    assert report.interventions["stopped: held for 2 s: non-finite action"] == 2
    emergency = run(env, Expert(env), guard, episodes=5, seen=lambda n, *_: guard.stop() if n == 1 else None)
    assert [one.stopped for one in emergency.episodes] == [None, "emergency stop"]
    assert guard.stopped, "until a person has looked"


class Glitch(ToyRobot):
    """Its state is once no number while it moves."""

    def _observe(self) -> dict[str, Any]:
        seen = super()._observe()
        return seen | ({"state": seen["state"] * np.float32(np.nan)} if self.steps == 4 else {})


class Picky(ToyPolicy):
    """Refuses such a state, as every policy of ours does; and what it is shown from the given step on."""

    def __init__(self, refuses: int = 10**9) -> None:
        super().__init__()
        self.left = refuses

    def observe(self, observations: Any) -> Any:
        self.left -= 1
        if self.left < 0 or not np.isfinite(observations[0].state).all():
            raise MediaError("no such picture")
        return super().observe(observations)


def test_a_state_that_is_no_number_holds_the_robot_and_does_not_end_the_run() -> None:
    report = run(Glitch(), Player(Picky(), Receding(execute=1)), Guard(LIMITS, fps=FPS), episodes=1, steps=8)
    assert report.episodes[0].steps == 8
    assert report.interventions["held: non-finite state"] == 1


def test_a_loop_that_ends_by_an_error_leaves_the_robot_standing() -> None:
    env, sent = ToyRobot(), []
    env.step = lambda action, step=env.step: (sent.append(action), step(action))[1]  # type: ignore[method-assign]
    guard = Guard(replace(LIMITS, acceleration=(0.5,) * 4), fps=FPS)
    with pytest.raises(MediaError, match="no such picture"):
        run(env, Player(Picky(refuses=5), Receding(execute=1)), guard, episodes=1)
    assert len(sent) > 5
    assert np.abs(sent[4][:3]).max() > 1e-3, "it moved"
    assert not sent[-1][:3].any()
    assert "MediaError" in (guard.stopped or "")


def test_a_film_shows_every_tick_of_all_cameras_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    env = ToyRobot()
    with film(tmp_path / "out.mp4", env.fps) as out:
        report = run(env, Expert(env), Guard(LIMITS, fps=FPS), episodes=2, film=out)
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]
    with av.open(str(tmp_path / "out.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == FPS
    assert len(frames) == sum(one.steps for one in report.episodes)
    height, width, _ = frames[0].shape
    assert width == 512, "two cameras side by side"
    assert height > 256
    assert frames[0][256:].max() > 150, "words below them"
    first, _ = env.reset(seed=0)
    small = frames[0][:256, :256].reshape(32, 8, 32, 8, 3).mean((1, 3))
    assert np.abs(small - first["images"]["front"]).mean() < 12
    with pytest.raises(MediaError, match="no frames"), film(tmp_path / "none.mp4", FPS):
        pass
    with pytest.raises(RuntimeError), film(tmp_path / "half.mp4", FPS):
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]


def test_the_command_line_fits_a_guard_and_uses_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guard, log, out = tmp_path / "normal.guard", tmp_path / "log.jsonl", tmp_path / "film.mp4"
    base = ["act", "expert", "--env", "tabletop/reach", "--size", "32"]
    assert main([*base, "--episodes", "14", "--seed", "100", "--fit-guard", str(guard)]) == 0
    assert "100 %" in capsys.readouterr().out
    more = ["--episodes", "2", "--guard", str(guard), "--log", str(log), "--film", str(out), "--json"]
    assert main([*base, *more]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["success"]["k"] == 2
    assert out.stat().st_size > 1000
    # A guard that knows another size of world holds the robot at once, and says why.
    assert main([*base, "--cameras", "front", "--episodes", "1", "--guard", str(guard), "--log", str(log)]) == 0
    assert "held: no picture" in capsys.readouterr().out
    assert json.loads(log.read_text().splitlines()[-1])["decision"] == "stopped"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A policy of random weights on disk, for the table-top's front camera."""
    trunk = PixelTrunk(cameras=("front",), image_size=32, channels=8, keypoints=8, state_width=4, dim=32, num_layers=1)
    config = BehaviourConfig(trunk=trunk, head=Flow(), words=("touch", "red"), horizon=8, action_width=4)
    model = BehaviourCloning.build(config)
    rows = np.random.default_rng(0).uniform(-0.01, 0.01, (50, 4))
    model.use_statistics({"table": {"state": Statistics.from_array(rows), "action": Statistics.from_array(rows)}})
    return str(model.save(tmp_path_factory.mktemp("policy")))


@pytest.mark.parametrize("way", [[], ["--chunks", "ensemble"], ["--chunks", "async", "--delay", "2", "--samples", "3"]])
def test_a_saved_policy_acts_and_repeats_itself(way: list[str], saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["act", saved, "--env", "tabletop/reach", "--size", "32", "--episodes", "2", "--swapped", "--json", *way]
    reports = []
    for _ in range(2):
        assert main(command) == 0
        reports.append(json.loads(capsys.readouterr().out))
    assert reports[0]["success_shown"]["n"] == 2
    assert reports[0]["episodes"] == reports[1]["episodes"]


def test_a_saved_policy_acts_through_a_server(saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    policy: Any = load(saved)
    with PolicyServer(policy, ServerConfig(port=0)) as server:
        address = f"ws://127.0.0.1:{server.port}"
        assert main(["act", address, "--env", "tabletop/reach", "--size", "32", "--episodes", "1"]) == 0
    assert "missed ticks" in capsys.readouterr().out


def test_what_a_server_refuses_is_said(saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    policy: Any = load(saved)
    with PolicyServer(policy, ServerConfig(port=0)) as server:
        address = f"ws://127.0.0.1:{server.port}"
        where = ["--env", "tabletop/reach", "--size", "32", "--cameras", "wrist"]
        assert main(["act", address, *where, "--episodes", "1", "--json"]) == 0
    out, error = capsys.readouterr()
    assert json.loads(out)["success"]["k"] == 0
    assert "the policy looks through the camera 'front'; there is wrist" in error
    assert error.count("looks through") == 1, "not once a tick"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["act", "ws://127.0.0.1:99999", "--env", "tabletop/reach"], "no address"),
        (["serve-policy", "polymodal/nano-reach", "--port", "99999"], "65535"),
        (["act", "expert", "--env", "nowhere"], "nowhere"),
        (["act", "polymodal/nano-clip", "--env", "tabletop/reach"], "does not act"),
        (["act", "expert", "--env", "tabletop/reach", "--guard", "missing.guard"], "missing.guard"),
        (["act", "ws://127.0.0.1:1", "--env", "tabletop/reach"], "does not answer"),
        (["serve-policy", "polymodal/nano-clip"], "does not act"),
        (["serve-policy", "polymodal/nano-clip", "--host", "0.0.0.0"], "key"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("POLYMODAL_KEY", raising=False)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
