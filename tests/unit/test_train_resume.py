"""A run that is killed and goes on is the run that was not."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from polymodal.core.errors import TrainError, WeightsError
from polymodal.train import Cosine, Run, fit
from polymodal.train.checkpoint import State, found, save
from polymodal.train.log import Curve, read_curve
from tests.unit.toy_run import PLAIN, STAGE, Noisy, Rows, Toy, run

ROOT = Path(__file__).parents[2]
CHILD = """
import os, signal, sys
import torch
from polymodal.train import checkpoint, fit, load_run

torch.set_num_threads(1)
out, step, where = sys.argv[1], int(sys.argv[2]), sys.argv[3]

def strike(record):
    if where == "between" and record["step"] == step:
        os.kill(os.getpid(), signal.SIGKILL)

write = checkpoint.write_json

def struck(path, content):
    if where == "saving" and content["state"]["step"] >= step:
        os.kill(os.getpid(), signal.SIGKILL)  # the tensors are written, the folder is not in place
    write(path, content)

checkpoint.write_json = struck
fit(load_run("tests.unit.toy_run"), out, checkpoint_steps=5, log=strike)
"""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def child(out: Path, step: int, where: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", CHILD, str(out), str(step), where]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)


def learned(folder: Path) -> list[dict[str, Any]]:
    """The curve without what the clock says."""
    return [
        {k: v for k, v in r.items() if k not in ("items_per_s", "waiting")}
        for r in read_curve(folder / "metrics.jsonl")
    ]


def weights(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(found(folder / "checkpoints")[-1].glob("*.safetensors"))}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    torch.set_num_threads(1)
    fit(run(), folder)
    return folder


def test_killed_twice_and_resumed_is_bitwise_the_unbroken_run(unbroken: Path, tmp_path: Path) -> None:
    """SIGKILL between two checkpoints of the first stage, and in the middle of writing one of the second."""
    done = child(tmp_path, 13, "between")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [r["step"] for r in learned(tmp_path)] == list(range(1, 14))
    assert found(tmp_path / "checkpoints")[-1].name == "step-000000010-stage-0"
    done = child(tmp_path, 30, "saving")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert "going on from step 10" in done.stderr
    assert found(tmp_path / "checkpoints")[-1].name == "step-000000025-stage-1"
    assert list((tmp_path / "checkpoints").glob(".unfinished-*"))
    result = fit(run(), tmp_path)
    assert result.finished
    assert learned(tmp_path) == learned(unbroken)
    assert weights(tmp_path) == weights(unbroken)
    assert not list((tmp_path / "checkpoints").glob(".unfinished-*"))


@pytest.mark.parametrize(("signum", "raised"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_polite_signal_saves_before_the_end(
    signum: int, raised: type[BaseException], unbroken: Path, tmp_path: Path
) -> None:
    before = signal.getsignal(signum)

    def strike(record: dict[str, Any]) -> None:
        if record["step"] == 17:
            os.kill(os.getpid(), signum)

    with pytest.raises(raised):
        fit(run(), tmp_path, log=strike)
    saved = json.loads((found(tmp_path / "checkpoints")[-1] / "state.json").read_text())
    assert saved["state"]["step"] == 18  # the signal came when step 17 had asked for signals already
    assert signal.getsignal(signum) is before
    fit(run(), tmp_path)
    assert learned(tmp_path) == learned(unbroken)


@pytest.mark.parametrize("cuts", [(1, 7, 23), (24,), (25, 36)])
def test_stopping_anywhere_changes_nothing(cuts: tuple[int, ...], unbroken: Path, tmp_path: Path) -> None:
    for cut in cuts:
        result = fit(run(), tmp_path, until_step=cut)
        assert result.step == cut
        assert result.finished == (cut == 36)
    fit(run(), tmp_path)
    assert learned(tmp_path) == learned(unbroken)
    assert weights(tmp_path) == weights(unbroken)


def test_a_finished_run_gives_its_result_again(unbroken: Path, tmp_path: Path) -> None:
    first = fit(run(), tmp_path)
    again = fit(run(), tmp_path)
    assert again.finished
    assert (again.step, again.loss, again.metrics, again.reached) == (36, first.loss, first.metrics, first.reached)
    torch.testing.assert_close(again.model.state_dict(), first.model.state_dict(), rtol=0, atol=0)


def test_starting_over_forgets_what_was_there(unbroken: Path, tmp_path: Path) -> None:
    fit(replace(run(), seed=9), tmp_path, until_step=7)
    assert learned(tmp_path) != learned(unbroken)[:7]
    fit(run(), tmp_path, resume=False)
    assert learned(tmp_path) == learned(unbroken)


def test_the_last_two_checkpoints_are_kept_without_pickle(tmp_path: Path) -> None:
    fit(replace(PLAIN, stages=[replace(STAGE, ema=0.9)]), tmp_path, checkpoint_steps=3, until_step=20)
    kept = found(tmp_path / "checkpoints")
    assert [path.name for path in kept] == ["step-000000018-stage-0", "step-000000020-stage-0"]
    names = {"state.json", "model.safetensors", "optimizer.safetensors", "ema.safetensors"}
    assert {path.name for path in kept[-1].iterdir()} == names
    assert load_file(kept[-1] / "optimizer.safetensors").keys() == {
        f"{kind}:{name}"
        for kind in ("step", "exp_avg", "exp_avg_sq")
        for name in ("a.weight", "a.bias", "b.weight", "b.bias", "scale")
    }


def test_a_full_disk_is_an_error_of_the_system_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    """The command line says such errors in a line; safetensors has an error of its own for them."""
    model = torch.nn.Linear(256, 256)

    def keep(step: int) -> None:
        save(tmp_path, run={}, state=State(step=step), model=model, optimizer=None, ema=None, write=True)

    keep(1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))  # no file may be longer
    try:
        with pytest.raises(OSError, match=r"File too large: .*model\.safetensors"):
            keep(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in found(tmp_path)] == ["step-000000001-stage-0"]
    keep(2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000001-stage-0", "step-000000002-stage-0"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: replace(r, seed=1), "seed: was 0, is 1"),
        (lambda r: replace(r, stages=[replace(STAGE, lr=0.01)]), r"stages\[0\]\.lr: was 0\.02, is 0\.01"),
        (lambda r: replace(r, stages=[replace(STAGE, schedule=Cosine())]), r"schedule\.warmup: was 3, is 0"),
        (lambda r: replace(r, stages=[replace(STAGE, trainable={"a": 1.0})]), r"trainable\.a: was None, is 1\.0"),
    ],
)
def test_another_configuration_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    fit(PLAIN, tmp_path, until_step=2)
    with pytest.raises(TrainError, match=message):
        fit(change(PLAIN), tmp_path)
    assert len(learned(tmp_path)) == 2


def test_a_stage_can_be_added_at_the_end(tmp_path: Path) -> None:
    longer = replace(PLAIN, stages=[STAGE, replace(STAGE, name="more", lr=0.01)])
    fit(longer, tmp_path / "at once")
    fit(PLAIN, tmp_path / "later")
    fit(longer, tmp_path / "later")
    assert learned(tmp_path / "later") == learned(tmp_path / "at once")
    with pytest.raises(TrainError, match="stages: was"):
        fit(PLAIN, tmp_path / "later")


def test_another_model_or_other_data_are_refused(tmp_path: Path) -> None:
    class Wider(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Linear(4, 17)
            self.b = torch.nn.Linear(17, 2)
            self.c = torch.nn.Linear(1, 1)

    class Fewer(Rows):
        def __len__(self) -> int:
            return 60

    fit(PLAIN, tmp_path, until_step=2)
    with pytest.raises(WeightsError) as failed:
        fit(replace(PLAIN, model=Wider), tmp_path)
    assert sum("has shape" in problem for problem in failed.value.problems) == 4
    assert "c.weight is missing" in failed.value.problems
    with pytest.raises(TrainError, match="began with 64 items and now has 60"):
        fit(replace(PLAIN, stages=[replace(STAGE, source=Fewer)]), tmp_path)


def test_workers_and_dropped_data_paths_may_change(tmp_path: Path) -> None:
    fit(PLAIN, tmp_path, until_step=2)
    assert fit(replace(PLAIN, stages=[replace(STAGE, workers=0)]), tmp_path).finished


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def _other_tensors(path: Path) -> None:
    save_file({"x": torch.zeros(1)}, path)


@pytest.mark.parametrize(
    ("damage", "error"), [(_truncate, TrainError), (Path.unlink, TrainError), (_other_tensors, WeightsError)]
)
@pytest.mark.parametrize("name", ["model", "optimizer"])
def test_a_damaged_checkpoint_is_named(name: str, damage: Any, error: type[Exception], tmp_path: Path) -> None:
    fit(PLAIN, tmp_path, checkpoint_steps=2, until_step=4)
    last = found(tmp_path / "checkpoints")[-1]
    damage(last / f"{name}.safetensors")
    with pytest.raises(error, match=f"step-000000004-stage-0/{name}"):
        fit(PLAIN, tmp_path)


def test_removing_a_damaged_checkpoint_goes_on_from_the_one_before(tmp_path: Path) -> None:
    plain: Run = replace(PLAIN, model=Noisy)
    fit(plain, tmp_path / "whole")
    fit(plain, tmp_path / "cut", checkpoint_steps=3, until_step=9)
    last = found(tmp_path / "cut" / "checkpoints")[-1]
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    fit(plain, tmp_path / "cut")
    assert learned(tmp_path / "cut") == learned(tmp_path / "whole")


def test_a_curve_drops_what_is_past_the_checkpoint_and_a_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 6)) + '{"step": 6, "lo')
    assert [r["step"] for r in read_curve(path)] == [1, 2, 3, 4, 5]
    curve = Curve(path, 3)
    curve.append({"step": 4})
    curve.close()
    assert [r["step"] for r in read_curve(path)] == [1, 2, 3, 4]
