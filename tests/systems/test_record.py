"""`polymodal record`: the same command gives the same data set, whatever comes between."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for package in ("av", "pyarrow", "minigrid"):
    pytest.importorskip(package)

from polymodal.act.envs import make  # noqa: E402
from polymodal.cli import main  # noqa: E402
from polymodal.core.errors import DataError  # noqa: E402
from polymodal.data.lerobot import Demonstrations  # noqa: E402
from polymodal.recording import demonstrate, record  # noqa: E402

ENV = "babyai/GoToLocal"


def command(folder: Path, episodes: int, *more: str) -> list[str]:
    return ["record", ENV, "--expert", "--episodes", str(episodes), "--out", str(folder), *more]


def content(folder: Path) -> list[Any]:
    data = Demonstrations(folder)
    assert data.state is not None
    pictures = np.stack(data.pictures("agent", range(len(data))))
    tasks = [data.instructions[number] for number in data.task_index]
    return [data.action.tobytes(), data.state.tobytes(), pictures.tobytes(), data.episodes, tasks]


def test_recording_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path / "once", 12)) == 0
    assert "12 episodes" in capsys.readouterr().out
    assert main(command(tmp_path / "twice", 5)) == 0
    assert main(command(tmp_path / "twice", 12)) == 0
    assert content(tmp_path / "once") == content(tmp_path / "twice")
    assert main(command(tmp_path / "twice", 3)) == 0  # more than that is there
    assert len(Demonstrations(tmp_path / "twice").episodes) == 12
    assert main(command(tmp_path / "other", 12, "--seed", "1")) == 0
    assert content(tmp_path / "once") != content(tmp_path / "other")


def test_what_is_recorded_is_what_the_expert_saw_and_did(tmp_path: Path) -> None:
    assert main(command(tmp_path, 4, "--lossless")) == 0
    data = Demonstrations(tmp_path)
    env = make(ENV)
    for number, (start, end) in enumerate(data.episodes):
        episode = demonstrate(env, [0x5EED, 0, data.rows[number]["attempt"]])
        assert episode is not None
        assert (data.action[start:end] == episode.action).all()
        assert (np.stack(data.pictures("agent", range(start, end))) == episode.images["agent"]).all()
        assert data.observations([start])[0].instruction == episode.task


def test_an_interrupted_recording_is_whole(tmp_path: Path) -> None:
    def stop(done: int, wanted: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(make(ENV), tmp_path / "cut", name=ENV, episodes=9, progress=stop)
    assert len(Demonstrations(tmp_path / "cut").episodes) == 4
    for folder in ("cut", "whole"):
        record(make(ENV), tmp_path / folder, name=ENV, episodes=9)
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_process_leaves_a_whole_set(tmp_path: Path, sign: signal.Signals) -> None:
    running = subprocess.Popen(
        [sys.executable, "-m", "polymodal", *command(tmp_path, 4000)], stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
    )  # fmt: skip
    while not (tmp_path / "meta/info.json").exists():  # the first hundred are written
        assert running.poll() is None
        time.sleep(0.05)
    running.send_signal(sign)
    _, said = running.communicate()
    if sign == signal.SIGINT:
        assert running.returncode == 130, said
        assert "run the same command again" in said
    there = len(Demonstrations(tmp_path).episodes)
    assert 100 <= there < 4000
    assert main(command(tmp_path, there + 2)) == 0
    assert len(content(tmp_path)[3]) == there + 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda args: args[:2] + args[3:], "--expert"),
        (lambda args: ["record", "babyai/GoToLocl", *args[2:]], "Did you mean 'GoToLocal'"),
        (lambda args: [*args, "--seed", "3"], "recorded otherwise"),
        (lambda args: [*args, "--size", "112"], "recorded otherwise"),
        (lambda args: [*args, "--cameras", "wrist"], "agent"),
        (lambda args: [*args, "--size", "50"], "multiple of 7"),
    ],
)
def test_errors_say_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[list[str]], list[str]], said: str
) -> None:
    assert main(command(tmp_path, 1)) == 0
    before = content(tmp_path)
    assert main(change(command(tmp_path, 2))) == 1
    assert said in capsys.readouterr().err
    assert content(tmp_path) == before


def test_a_set_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    assert main(command(tmp_path, 1)) == 0
    (tmp_path / "meta/recording.json").unlink()
    with pytest.raises(DataError, match="not recorded here"):
        record(make(ENV), tmp_path, name=ENV, episodes=2)
    assert not (tmp_path / "meta/recording.json").exists()


def test_disturbed_demonstrations_are_of_the_expert(tmp_path: Path) -> None:
    pytest.importorskip("mujoco")
    env = make("tabletop/reach", cameras=[])
    calm, shaken = demonstrate(env, [1, 2, 3]), demonstrate(env, [1, 2, 3], noise=0.5)
    assert calm is not None
    assert shaken is not None
    assert (calm.action[0] == shaken.action[0]).all()  # what is recorded is what the expert would do
    assert (calm.state[1] != shaken.state[1]).any()  # and not what came of it
    assert calm.task == shaken.task
