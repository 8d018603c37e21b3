"""Two real gloo processes: collectives and their gradients, DDP = one process, FSDP2 = DDP, and checkpoints of each."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from polymodal.core.distributed import gather_with_grad, rank, ring_shift, world_size
from polymodal.train import Run, fit
from polymodal.train.checkpoint import found
from polymodal.train.distributed import gradient_norm
from polymodal.train.log import read_curve
from tests.unit.toy_run import Rows, Toy, run

ROOT = Path(__file__).parents[2]
ROWS = 3


def quiet_run() -> Run:
    """The toy run without what is drawn for each rank, so that one process and two do the same arithmetic."""
    first, second = run().stages
    stages = [replace(stage, source=Rows, batch_size=16) for stage in (first, second)]
    return replace(run(), model=Toy, stages=stages)


def features(of_rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(of_rank)
    return torch.randn(ROWS, 4, generator=generator)


def loss_of(mine: torch.Tensor, everyone: torch.Tensor, following: torch.Tensor, number: int) -> torch.Tensor:
    """A total that depends on all rows in a different way on each rank."""
    return (mine @ everyone.T * (number + 1)).exp().sum() + (mine * following**2).sum() * (number + 2)


def child(folder: Path) -> None:
    """What each of the two processes does."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    here = rank()
    x = features(here).requires_grad_()
    everyone = gather_with_grad(x)
    following = ring_shift(x, 1)
    loss_of(x, everyone, following, here).backward()
    facts = {"everyone": everyone, "following": following, "grad": x.grad, "around": ring_shift(ring_shift(x, 1), 1)}
    torch.save({k: v.detach() for k, v in facts.items() if v is not None}, folder / f"collectives-{here}.pt")
    fit(quiet_run(), folder / "ddp", parallel="ddp")
    fit(quiet_run(), folder / "fsdp", parallel="fsdp")
    fit(quiet_run(), folder / "mixed", parallel="fsdp", until_step=13)
    fit(quiet_run(), folder / "mixed", parallel="ddp", until_step=29)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that two processes have written."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = f"from pathlib import Path; from tests.unit.test_distributed import child; child(Path({str(folder)!r}))"
    shared = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", script],
            env={**os.environ, **shared, "RANK": str(number), "WORLD_SIZE": "2", "LOCAL_RANK": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in (0, 1)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in children]
    finally:
        for process in children:
            process.kill()
    assert [process.returncode for process in children] == [0, 0], "\n".join(outputs)
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    fit(quiet_run(), folder)
    return folder


def assert_same_run(a: Path, b: Path) -> None:
    ours, theirs = (read_curve(folder / "metrics.jsonl") for folder in (a, b))
    assert [r["step"] for r in ours] == list(range(1, 37))
    for mine, other in zip(ours, theirs, strict=True):
        for name in ("loss", "grad_norm", "mae", "lr"):
            assert mine[name] == pytest.approx(other[name], rel=2e-5, abs=1e-6), (mine["step"], name)
        assert ("evaluation" in mine) == ("evaluation" in other)
    first, second = (load_file(found(folder / "checkpoints")[-1] / "model.safetensors") for folder in (a, b))
    torch.testing.assert_close(first, second, rtol=1e-5, atol=2e-6)


def test_ddp_equals_one_process(one: Path, two: Path) -> None:
    assert_same_run(one, two / "ddp")


def test_fsdp_equals_ddp(two: Path) -> None:
    assert_same_run(two / "ddp", two / "fsdp")


def test_a_checkpoint_does_not_depend_on_who_wrote_it(one: Path, two: Path) -> None:
    """FSDP to step 13, DDP to 29, one process to the end."""
    assert fit(quiet_run(), two / "mixed").finished
    assert_same_run(one, two / "mixed")


def test_collectives_and_their_gradients(two: Path) -> None:
    """One process that holds the rows of both ranks is the truth."""
    xs = [features(number).requires_grad_() for number in (0, 1)]
    everyone = torch.cat(xs)
    sum(loss_of(xs[number], everyone, xs[1 - number], number) for number in (0, 1)).backward()
    for number in (0, 1):
        facts = torch.load(two / f"collectives-{number}.pt", weights_only=True)
        assert torch.equal(facts["everyone"], everyone)
        assert torch.equal(facts["following"], xs[1 - number])
        assert torch.equal(facts["around"], xs[number])
        torch.testing.assert_close(facts["grad"], xs[number].grad, rtol=1e-5, atol=1e-6)


def test_alone_the_collectives_are_the_identity() -> None:
    x = torch.randn(2, 3)
    assert gather_with_grad(x) is x
    assert ring_shift(x, 1) is x
    assert (rank(), world_size()) == (0, 1)


def test_gradient_norm_is_that_of_torch() -> None:
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 4), (5,), ())]
    unused = torch.nn.Parameter(torch.randn(2))
    sum(p.pow(3).sum() for p in parameters).backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    torch.testing.assert_close(gradient_norm([*parameters, unused]), expected)
