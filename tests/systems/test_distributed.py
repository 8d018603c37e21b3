"""Two real gloo processes: collectives and their gradients, DDP = one process, FSDP2 = DDP, and checkpoints of each."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from polymodal.core.batch import Batch
from polymodal.core.distributed import gather_with_grad, rank, ring_shift, world_size
from polymodal.systems.generator import Generator
from polymodal.train import Constant, Run, Stage, fit
from polymodal.train.checkpoint import found
from polymodal.train.distributed import Place, gradient_norm, parallelise, whole
from polymodal.train.log import read_curve
from tests.nano import NANO, every_system, nano, nano_batch
from tests.unit.toy_run import HEADER, Rows, Toy, run

ROOT = Path(__file__).parents[2]
ROWS = 3


def quiet_run() -> Run:
    """The toy run without what is drawn for each rank, so that one process and two do the same arithmetic."""
    first, second = run().stages
    stages = [replace(stage, source=Rows, batch_size=16) for stage in (first, second)]
    return replace(run(), model=Toy, stages=stages)


class FixedRows:
    """Eight random rows that a system's spec describes."""

    def __init__(self, name: str) -> None:
        self.rows = nano_batch(nano(name), size=8)

    def __len__(self) -> int:
        return 8

    def batch(self, indices: Sequence[int], rng: np.random.Generator) -> Batch:
        return Batch({key: value[list(indices)] for key, value in self.rows.items()})


def system_run(name: str) -> Run:
    """Two steps of a system of the table at nano size."""
    stage = Stage(name="short", steps=2, batch_size=8, source=lambda: FixedRows(name), lr=1e-3, schedule=Constant())
    return Run(name=name, header=HEADER, model=lambda: nano(name), stages=[stage])


def features(of_rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(of_rank)
    return torch.randn(ROWS, 4, generator=generator)


def loss_of(mine: torch.Tensor, everyone: torch.Tensor, following: torch.Tensor, number: int) -> torch.Tensor:
    """A total that depends on all rows in a different way on each rank."""
    return (mine @ everyone.T * (number + 1)).exp().sum() + (mine * following**2).sum() * (number + 2)


SEERS = ("llava_next", "prismatic", "blip2", "flamingo", "qwen2_vl")


def unequal(name: str) -> list[Batch]:
    """What each rank learns from: the first has pictures, the second text alone."""
    model, batches = nano(name), [nano_batch(nano(name), size=2, seed=seed) for seed in (0, 1)]
    assert isinstance(model, Generator)
    text = batches[1]["ids"].masked_fill(model.places(batches[1]["ids"]), 3)
    return [batches[0], Batch(ids=text, labels=batches[1]["labels"])]


def exercise(folder: Path) -> None:
    """What each of the two processes does."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    here = rank()
    x = features(here).requires_grad_()
    everyone = gather_with_grad(x)
    following = ring_shift(x, 1)
    loss_of(x, everyone, following, here).backward()
    facts = {"everyone": everyone, "following": following, "grad": x.grad, "around": ring_shift(ring_shift(x, 1), 1)}
    save_file({k: v.detach().clone() for k, v in facts.items()}, folder / f"collectives-{here}.safetensors")
    for name in ("clip", "siglip", "siglip2"):
        model = nano(name)
        loss = model.loss(FixedRows(name).batch(range(here * 4, here * 4 + 4), np.random.default_rng()))
        loss.total.backward()
        facts = {"loss": loss.total.detach() / 8, **{n: p.grad / 8 for n, p in model.named_parameters()}}
        for value in facts.values():
            dist.all_reduce(value)
        save_file(facts, folder / f"{name}-{here}.safetensors")
    for name, parallel in itertools.product(SEERS, ("ddp", "fsdp")):
        side = parallelise(nano(name).train(), parallel, Place(device=torch.device("cpu"), rank=here, world=2))
        side.loss(unequal(name)[here]).total.backward()
        side.join(side.model.parameters())
        gradients = {n: whole(p.grad) for n, p in side.model.named_parameters() if p.grad is not None}
        save_file(gradients, folder / f"{name}-{parallel}-{here}.safetensors")
    fit(quiet_run(), folder / "ddp", parallel="ddp")
    fit(quiet_run(), folder / "fsdp", parallel="fsdp")
    fit(quiet_run(), folder / "mixed", parallel="fsdp", until_step=13)
    fit(quiet_run(), folder / "mixed", parallel="ddp", until_step=29)
    dist.destroy_process_group()


def train_every_system(folder: Path) -> None:
    """The same for the systems of the table."""
    for name, parallel in itertools.product(NANO, ("ddp", "fsdp")):
        fit(system_run(name), folder / f"{name}-{parallel}", parallel=parallel)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that two processes have written."""
    return run_twice("exercise", tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def two_of_every_system(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_twice("train_every_system", tmp_path_factory.mktemp("systems"))


def run_twice(function: str, folder: Path) -> Path:
    """Calls a function of this file in two processes that know of each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = (
        f"from pathlib import Path; import tests.systems.test_distributed as t; t.{function}(Path({str(folder)!r}))"
    )
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
        outputs = [process.communicate(timeout=600)[0] for process in children]
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


@pytest.mark.slow
@every_system("distributed: DDP and FSDP2 over 2 processes equal 1 process")
def test_every_system_trains_alike_on_two_processes(name: str, two_of_every_system: Path, tmp_path: Path) -> None:
    fit(system_run(name), tmp_path)
    expected = read_curve(tmp_path / "metrics.jsonl")
    for parallel in ("ddp", "fsdp"):
        found = read_curve(two_of_every_system / f"{name}-{parallel}" / "metrics.jsonl")
        for key in ("loss", "grad_norm"):
            assert found[0][key] == pytest.approx(expected[0][key], rel=1e-5), (parallel, key)
            # Adam's first step is nearly the sign of the gradient, which noise decides where the gradient is nothing.
            assert found[1][key] == pytest.approx(expected[1][key], rel=2e-3), (parallel, key)


@pytest.mark.parametrize("name", ["clip", "siglip", "siglip2"])
def test_the_loss_over_all_pairs_and_its_gradients_do_not_see_the_ranks(name: str, two: Path) -> None:
    model = nano(name)
    loss = model.loss(FixedRows(name).rows)
    loss.mean.backward()
    expected = {"loss": loss.mean.detach(), **{key: p.grad for key, p in model.named_parameters()}}
    for number in (0, 1):
        found = load_file(two / f"{name}-{number}.safetensors")
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-6 * max(1.0, value.abs().max().item()))


@pytest.mark.parametrize("name", SEERS)
def test_a_rank_may_have_no_picture(name: str, two: Path) -> None:
    """Its tower runs all the same, or the ranks would wait for each other; the gradients are those of one process."""
    model = nano(name).train()
    torch.stack([model.loss(batch).total for batch in unequal(name)]).mean().backward()
    expected = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    for parallel, number in itertools.product(("ddp", "fsdp"), (0, 1)):
        found = load_file(two / f"{name}-{parallel}-{number}.safetensors")
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_collectives_and_their_gradients(two: Path) -> None:
    """One process that holds the rows of both ranks is the truth."""
    xs = [features(number).requires_grad_() for number in (0, 1)]
    everyone = torch.cat(xs)
    sum(loss_of(xs[number], everyone, xs[1 - number], number) for number in (0, 1)).backward()
    for number in (0, 1):
        facts = load_file(two / f"collectives-{number}.safetensors")
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
