"""Ops undo themselves, and `plan` lists everything that is wrong at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from polymodal.weights.files import Checkpoint, write_shards
from polymodal.weights.rules import (
    Cat,
    Copy,
    Op,
    Plan,
    RopePermute,
    Rule,
    Split,
    Squeeze,
    Stack,
    Transpose,
    drop,
    init,
    plan,
    read_only,
    rule,
    to_theirs,
    unplan,
)

sizes = st.integers(1, 5)
Shape = tuple[int, ...]
# An op's class, its arguments, and the shapes of theirs. Not yet an op: the check of its annotations draws from
# `random`, which a strategy must not.
Case = tuple[type[Op], tuple[Any, ...], list[Shape]]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kind = draw(st.sampled_from([Copy, Split, Cat, Stack, Transpose, Squeeze, RopePermute]))
    shape = draw(st.lists(sizes, min_size=1, max_size=4).map(tuple))
    dim = draw(st.integers(0, len(shape) - 1))
    before, after = shape[:dim], shape[dim + 1 :]
    if kind is Copy:
        return kind, (), [shape]
    if kind is Split:
        parts = draw(sizes)
        return kind, (parts, dim), [(*before, shape[dim] * parts, *after)]
    if kind is Cat:
        lengths = draw(st.lists(sizes, min_size=1, max_size=4).map(tuple))
        return kind, (lengths, dim), [(*before, n, *after) for n in lengths]
    if kind is Stack:
        return kind, (draw(st.integers(0, len(shape))),), [shape] * draw(sizes)
    if kind is Transpose:
        return kind, (dim, draw(st.integers(0, len(shape) - 1))), [shape]
    if kind is Squeeze:
        dims = tuple(sorted(draw(st.sets(st.integers(0, len(shape)), min_size=1, max_size=2))))
        long = list(shape)
        for d in dims:
            long.insert(d, 1)
        return kind, (dims,), [tuple(long)]
    heads = draw(sizes)
    return kind, (heads,), [(heads * 2 * draw(sizes), *after)]


def made(case: Case) -> tuple[Op, list[Tensor]]:
    """The op, and tensors of theirs in which every value is different, so that a wrong order shows."""
    kind, arguments, shapes = case
    counts = [math.prod(shape) for shape in shapes]
    values = torch.arange(sum(counts), dtype=torch.float32).split(counts)
    return kind(*arguments), [v.reshape(s) for v, s in zip(values, shapes, strict=True)]


@given(cases())
def test_every_op_undoes_itself(case: Case) -> None:
    op, theirs = made(case)
    ours = op.to_ours(theirs)
    again = op.to_theirs(ours)
    assert [t.shape for t in again] == [t.shape for t in theirs]
    assert all(torch.equal(a, b) for a, b in zip(again, theirs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(op.to_ours(again), ours, strict=True))
    values = torch.cat([t.flatten() for t in ours]).sort().values
    assert torch.equal(values, torch.arange(len(values))), "a permutation of the values"


@given(cases())
def test_every_op_runs_on_shapes_alone(case: Case) -> None:
    op, theirs = made(case)
    assert [t.shape for t in op.to_ours([t.to("meta") for t in theirs])] == [t.shape for t in op.to_ours(theirs)]


@given(cases())
def test_what_an_op_makes_can_be_written(tmp_path_factory: pytest.TempPathFactory, case: Case) -> None:
    op, theirs = made(case)
    folder = tmp_path_factory.mktemp("weights")
    again = op.to_theirs(op.to_ours(theirs))
    write_shards(folder, [(str(i), t) for i, t in enumerate(again)])
    with Checkpoint(folder) as checkpoint:
        assert all(torch.equal(checkpoint.read(str(i)), t) for i, t in enumerate(theirs))


def test_rope_permute_is_the_published_one() -> None:
    """Rows (pair 0: first, second; pair 1: first, second) of a head become (firsts; seconds)."""
    (ours,) = RopePermute(2).to_ours([torch.arange(8)])
    assert ours.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


# ---- plan ----

RULES = [
    rule("embed", "embed"),
    rule("layers.{i}.qkv.{p}", [f"blocks.{{i}}.{n}.{{p}}" for n in "qkv"], Split(3)),
    rule(["layers.{i}.gate", "layers.{i}.up"], "blocks.{i}.mlp", Cat((4, 4))),
    rule("probe", "probe", Squeeze((0, 1))),
    drop("position_ids", "counts up"),
    init("steps", "starts at zero"),
]


def theirs() -> dict[str, Tensor]:
    out = {"embed": torch.randn(5, 2), "probe": torch.randn(1, 1, 2), "position_ids": torch.arange(3)}
    for i in range(2):
        out |= {f"layers.{i}.qkv.weight": torch.randn(6, 2), f"layers.{i}.qkv.bias": torch.randn(6)}
        out |= {f"layers.{i}.gate": torch.randn(4, 2), f"layers.{i}.up": torch.randn(4, 2)}
    return out


def ours() -> dict[str, Tensor]:
    out = {"embed": torch.empty(5, 2), "probe": torch.empty(2), "steps": torch.empty(1)}
    for i in range(2):
        for n in "qkv":
            out |= {f"blocks.{i}.{n}.weight": torch.empty(2, 2), f"blocks.{i}.{n}.bias": torch.empty(2)}
        out[f"blocks.{i}.mlp"] = torch.empty(8, 2)
    return out


def fill(todo: Plan, source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor
        for step in todo.steps
        for name, tensor in zip(step.ours, step.op.to_ours([source[n] for n in step.theirs]), strict=True)
    }


def test_a_whole_checkpoint_has_no_problem_and_comes_back() -> None:
    source = theirs()
    todo = plan(RULES, source, ours())
    assert todo.problems == []
    assert todo.dropped == {"position_ids": "counts up"}
    assert todo.initialised == {"steps": "starts at zero"}
    filled = fill(todo, source)
    assert filled.keys() | {"steps"} == ours().keys()
    again = to_theirs(RULES, filled | {"steps": torch.zeros(1)})
    assert again.keys() | {"position_ids"} == source.keys()
    assert all(torch.equal(again[n], source[n]) for n in again)


def test_all_problems_are_listed_at_once() -> None:
    source = theirs()
    source["stranger"] = torch.randn(7)  # extra
    source["embedding"] = source.pop("embed")  # renamed
    source["layers.2.qkv.weight"] = torch.randn(6, 2)  # a layer too many
    del source["layers.0.up"]  # half of a pair
    del source["layers.0.qkv.bias"]
    source["layers.1.qkv.weight"] = torch.randn(7, 2)  # does not split
    source["layers.1.up"] = torch.randn(4, 3)  # does not join
    source["probe"] = torch.zeros(1, 1, 2, dtype=torch.int64)  # integers for floats
    problems = "\n".join(sorted(plan(RULES, source, ours()).problems))
    for expected in (
        "unexpected: stranger (7,): no rule takes it",
        "unexpected: embedding (5, 2): no rule takes it",
        "missing from the checkpoint: embed for embed (5, 2)",
        "unexpected: layers.2.qkv.weight: this configuration has no blocks.2.q.weight, blocks.2.k.weight",
        "missing from the checkpoint: layers.0.up (needed with layers.0.gate)",
        "missing from the checkpoint: layers.0.qkv.bias for blocks.0.q.bias (2,)",
        "wrong shape: layers.1.qkv.weight: axis 0 of (7, 2) does not split into 3 equal parts",
        "wrong shape: layers.1.gate, layers.1.up",
        "wrong dtype: probe is torch.int64, probe is torch.float32",
    ):
        assert expected in problems, problems
    assert len(problems.splitlines()) == 11  # one bias of each of q, k and v is missing


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (rule("embed", "probe"), "checkpoint tensor embed is claimed by two rules"),
        (drop("embed", "twice"), "checkpoint tensor embed is claimed by two rules"),
        (rule("position_ids", "embed"), "parameter embed is claimed by two rules"),
        (init("embed", "twice"), "parameter embed is claimed by two rules"),
    ],
)
def test_nothing_is_claimed_twice(more: Rule, problem: str) -> None:
    assert any(problem in p for p in plan([*RULES, more], theirs(), ours()).problems)


@pytest.mark.parametrize(
    "op", [Split(3), Split(2, 3), Cat((4,)), Stack(4), Transpose(0, 5), Squeeze((0,)), RopePermute(2)]
)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (0, 5), (1, 2, 3)])
def test_an_op_that_does_not_fit_is_a_problem_and_no_crash(op: Op, shape: tuple[int, ...]) -> None:
    many = [f"ours.{i}" for i in range(3)] if isinstance(op, Split) else "ours"
    names = [many] if isinstance(many, str) else many
    target = {n: torch.empty(9, 9, 9, 9) for n in names}
    assert plan([rule("theirs", many, op)], {"theirs": torch.empty(shape)}, target).problems


def test_two_names_of_one_tensor_are_read_and_one_is_written() -> None:
    rules = [rule("new.{p}", "ours.{p}"), *read_only([rule("old.{p}", "ours.{p}")])]
    target = {"ours.weight": torch.empty(2)}
    for name in ("new.weight", "old.weight"):
        assert plan(rules, {name: torch.zeros(2)}, target).problems == []
    assert plan(rules, {"new.weight": torch.zeros(2), "old.weight": torch.zeros(2)}, target).problems
    assert [s.theirs for s in unplan(rules, target)] == [("new.weight",)]


def test_a_placeholder_is_one_segment_of_a_name() -> None:
    todo = plan([rule("a.{i}.b", "a.{i}.b")], {"a.0.0.b": torch.zeros(1), "a.0xb": torch.zeros(1)}, {})
    assert len(todo.problems) == 2
    assert all("no rule takes it" in p for p in todo.problems)


def test_writing_needs_a_rule_for_every_tensor() -> None:
    with pytest.raises(AssertionError, match="stranger"):
        unplan(RULES, ["embed", "stranger"])


def test_planning_holds_no_memory() -> None:
    """A shape of petabytes is compared, never allocated."""
    huge = torch.empty(2**30, 2**20, device="meta")
    assert "wrong shape" in plan([rule("w", "w")], {"w": huge}, {"w": torch.empty(2)}).problems[0]
    assert plan([rule("w", "w")], {"w": huge}, {"w": huge}).problems == []


def test_written_shards_hold_what_they_say(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(3, 4) for i in range(5)}
    files = write_shards(tmp_path, tensors.items(), shard_bytes=100)
    assert files == [f"model-{i + 1:05d}-of-00003.safetensors" for i in range(3)]
    with Checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.meta()) == set(tensors)
        assert all(torch.equal(checkpoint.read(n), t) for n, t in tensors.items())
    assert write_shards(tmp_path, tensors.items()) == ["model.safetensors"]
    assert not (tmp_path / "model.safetensors.index.json").exists()
    write_shards(tmp_path, tensors.items(), shard_bytes=100)
    assert not (tmp_path / "model.safetensors").exists()
    with Checkpoint(tmp_path) as checkpoint:
        assert len(checkpoint.files) == 3
