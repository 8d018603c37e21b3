"""Weight maps as data: (their pattern, our pattern, op), with ops that can be undone.

A pattern is a dotted name in which ``{word}`` stands for one segment: ``layers.{i}.mlp.{p}``. A rule whose op joins or
splits tensors has a tuple of patterns on that side. `plan` matches rules against the names and shapes of a checkpoint
and of a model, runs every op on meta tensors, and returns either steps or all the problems.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Protocol, runtime_checkable

import torch
from einops import rearrange
from torch import Tensor

from polymodal.core.errors import WeightsError


@runtime_checkable
class Op(Protocol):
    """An invertible map between a list of their tensors and a list of ours."""

    def to_ours(self, tensors: list[Tensor]) -> list[Tensor]: ...

    def to_theirs(self, tensors: list[Tensor]) -> list[Tensor]: ...


@dataclass(frozen=True)
class Copy:
    """One to one, unchanged."""

    def to_ours(self, tensors: list[Tensor]) -> list[Tensor]:
        return tensors

    def to_theirs(self, tensors: list[Tensor]) -> list[Tensor]:
        return tensors


@dataclass(frozen=True)
class Split:
    """One of theirs becomes parts of ours along ``dim`` (a fused ``in_proj_weight`` into q, k, v).

    ``parts`` is a number of equal parts, or their lengths.
    """

    parts: int | tuple[int, ...]
    dim: int = 0

    def to_ours(self, tensors: list[Tensor]) -> list[Tensor]:
        (tensor,) = tensors
        length = tensor.shape[self.dim]
        if isinstance(self.parts, tuple):
            if length != sum(self.parts):
                raise ValueError(f"axis {self.dim} of {tuple(tensor.shape)} does not split into {self.parts}")
            return [t.contiguous() for t in tensor.split(self.parts, self.dim)]
        if length % self.parts:
            raise ValueError(f"axis {self.dim} of {tuple(tensor.shape)} does not split into {self.parts} equal parts")
        return [t.contiguous() for t in tensor.chunk(self.parts, self.dim)]

    def to_theirs(self, tensors: list[Tensor]) -> list[Tensor]:
        return [torch.cat(tensors, self.dim)]


@dataclass(frozen=True)
class Cat:
    """Several of theirs, ``sizes`` long along ``dim``, become one of ours."""

    sizes: tuple[int, ...]
    dim: int = 0

    def to_ours(self, tensors: list[Tensor]) -> list[Tensor]:
        lengths = tuple(t.shape[self.dim] for t in tensors)
        if lengths != self.sizes:
            raise ValueError(f"axis {self.dim} has lengths {lengths}, expected {self.sizes}")
        return [torch.cat(tensors, self.dim)]

    def to_theirs(self, tensors: list[Tensor]) -> list[Tensor]:
        return [t.contiguous() for t in tensors[0].split(self.sizes, self.dim)]


@dataclass(frozen=True)
class Stack:
    """Several of theirs become one of ours with a new axis (experts, for example)."""

    dim: int = 0

    def to_ours(self, tensors: list[Tensor]) -> list[Tensor]:
        return [torch.stack(tensors, self.dim)]

    def to_theirs(self, tensors: list[Tensor]) -> list[Tensor]:
        return [t.contiguous() for t in tensors[0].unbind(self.dim)]


@dataclass(frozen=True)
class Transpose:
    """Swaps two axes (a projection stored as ``x @ W``)."""

    first: int = 0
    second: int = 1

    def to_ours(self, tensors: list[Tensor]) -> list[Tensor]:
        return [tensors[0].transpose(self.first, self.second).contiguous()]

    to_theirs = to_ours


@dataclass(frozen=True)
class Chain:
    """Ops one after the other, on the way to ours; backwards on the way to theirs."""

    ops: tuple[Op, ...]

    def to_ours(self, tensors: list[Tensor]) -> list[Tensor]:
        for op in self.ops:
            tensors = op.to_ours(tensors)
        return tensors

    def to_theirs(self, tensors: list[Tensor]) -> list[Tensor]:
        for op in reversed(self.ops):
            tensors = op.to_theirs(tensors)
        return tensors


@dataclass(frozen=True)
class Squeeze:
    """Removes axes of length one; theirs has them at these places (given in ascending order)."""

    dims: tuple[int, ...]

    def to_ours(self, tensors: list[Tensor]) -> list[Tensor]:
        (tensor,) = tensors
        if tensor.ndim <= max(self.dims) or any(tensor.shape[d] != 1 for d in self.dims):
            raise ValueError(f"axes {self.dims} of {tuple(tensor.shape)} are not all of length one")
        for dim in reversed(self.dims):
            tensor = tensor.squeeze(dim)
        return [tensor]

    def to_theirs(self, tensors: list[Tensor]) -> list[Tensor]:
        (tensor,) = tensors
        for dim in self.dims:
            tensor = tensor.unsqueeze(dim)
        return [tensor]


@dataclass(frozen=True)
class Flatten:
    """The last axes, of this shape, become one (a convolution over patches that do not overlap: a linear layer)."""

    shape: tuple[int, ...]

    def to_ours(self, tensors: list[Tensor]) -> list[Tensor]:
        (tensor,) = tensors
        if tuple(tensor.shape[-len(self.shape) :]) != self.shape or tensor.ndim <= len(self.shape):
            raise ValueError(f"the last axes of {tuple(tensor.shape)} are not {self.shape}")
        return [tensor.flatten(-len(self.shape))]

    def to_theirs(self, tensors: list[Tensor]) -> list[Tensor]:
        return [tensors[0].unflatten(-1, self.shape)]


@dataclass(frozen=True)
class SwapHalves:
    """The halves of the first axis change places (a scale and a shift that one layer makes)."""

    def to_ours(self, tensors: list[Tensor]) -> list[Tensor]:
        (tensor,) = tensors
        if tensor.shape[0] % 2:
            raise ValueError(f"axis 0 of {tuple(tensor.shape)} has no halves")
        return [torch.cat(tensor.chunk(2)[::-1])]

    to_theirs = to_ours


@dataclass(frozen=True)
class Same:
    """Theirs has ``count`` copies of what is one tensor here; copies that differ are refused."""

    count: int

    def to_ours(self, tensors: list[Tensor]) -> list[Tensor]:
        first, *rest = tensors
        if len(tensors) != self.count or any(other.shape != first.shape for other in rest):
            raise ValueError(f"not {self.count} copies of one tensor")
        if not first.is_meta and not all(torch.equal(first, other) for other in rest):
            raise ValueError(f"{self.count} tensors that should be copies of one differ")
        return [first]

    def to_theirs(self, tensors: list[Tensor]) -> list[Tensor]:
        return [tensors[0].clone() for _ in range(self.count)]


@dataclass(frozen=True)
class RopePermute:
    """Rows of a q or k projection from interleaved rotary pairs (Meta) to halves (the Hub), head by head."""

    num_heads: int

    def to_ours(self, tensors: list[Tensor]) -> list[Tensor]:
        return [rearrange(tensors[0], "(h d two) ... -> (h two d) ...", h=self.num_heads, two=2)]

    def to_theirs(self, tensors: list[Tensor]) -> list[Tensor]:
        return [rearrange(tensors[0], "(h two d) ... -> (h d two) ...", h=self.num_heads, two=2)]


@dataclass(frozen=True)
class Drop:
    """Theirs has no counterpart here; the reason is written down."""

    reason: str


@dataclass(frozen=True)
class Init:
    """Ours has no counterpart there and is initialised; the reason is written down."""

    reason: str


@dataclass(frozen=True)
class Rule:
    """One line of a weight map; ``theirs`` or ``ours`` is empty for `Init` or `Drop`."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    op: Op | Drop | Init = field(default_factory=Copy)
    written: bool = True  # False for a second name of the same tensor, see `read_only`


def rule(theirs: str | Sequence[str], ours: str | Sequence[str], op: Op | Drop | Init | None = None) -> Rule:
    """A `Rule` from single names or sequences of names."""
    return Rule(_names(theirs), _names(ours), op or Copy())


def _names(side: str | Sequence[str]) -> tuple[str, ...]:
    return (side,) if isinstance(side, str) else tuple(side)


def renames(theirs: str, ours: str, names: Mapping[str, str]) -> list[Rule]:
    """Layers that differ in their names only: weights and biases of ``{theirs}.{a}`` are those of ``{ours}.{b}``."""
    return [rule(f"{theirs}.{a}.{{p}}", f"{ours}.{b}.{{p}}") for a, b in names.items()]


def read_only(rules: Iterable[Rule]) -> list[Rule]:
    """The same rules for reading alone: names that some files have, and that are not written."""
    return [replace(r, written=False) for r in rules]


def drop(theirs: str, reason: str) -> Rule:
    """Their tensor is not needed, for a reason that the certificate repeats."""
    return Rule((theirs,), (), Drop(reason))


def init(ours: str, reason: str) -> Rule:
    """Our tensor is in no file and keeps its first values, for a reason that the certificate repeats."""
    return Rule((), (ours,), Init(reason))


@dataclass(frozen=True)
class Step:
    """One op on named tensors."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    op: Op


@dataclass
class Plan:
    """What to do to load a checkpoint, or everything that is wrong with it."""

    steps: list[Step] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)  # their name -> reason
    initialised: dict[str, str] = field(default_factory=dict)  # our name -> reason
    problems: list[str] = field(default_factory=list)

    def tensors(self, read: Callable[[str], Tensor], where: str) -> Iterator[tuple[str, Tensor]]:
        """Our names and their values, read as they are needed.

        Args:
            read: gives one of their tensors.
            where: the checkpoint, for the message.

        Raises:
            WeightsError: there are problems; all are listed.
        """
        if self.problems:
            raise WeightsError(where, self.problems)
        for step in self.steps:
            try:
                made = step.op.to_ours([read(name) for name in step.theirs])
            except ValueError as error:  # of values: shapes were looked at before
                raise WeightsError(where, [f"{', '.join(step.theirs)}: {error}"]) from error
            yield from zip(step.ours, made, strict=True)


@lru_cache(maxsize=2**14)  # large models have thousands, more than `re` remembers
def _compile(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"(\{\w+\})", pattern)
    return re.compile("".join(f"(?P<{p[1:-1]}>[^.]+)" if p.startswith("{") else re.escape(p) for p in parts))


def _bindings(patterns: Iterable[str], names: Iterable[str]) -> list[dict[str, str]]:
    """The distinct bindings under which at least one pattern is a name, in order of appearance."""
    found: dict[tuple[tuple[str, str], ...], None] = {}
    compiled = [_compile(p) for p in patterns]
    for name in names:
        for regex in compiled:
            if match := regex.fullmatch(name):
                found.setdefault(tuple(sorted(match.groupdict().items())))
    return [dict(b) for b in found]


def plan(rules: Sequence[Rule], theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> Plan:
    """Matches every tensor of a checkpoint and of a model; both maps hold meta tensors (or real ones).

    Problems are collected, never raised: names that no rule or two rules take, missing sources, parameters that
    nothing fills, ops that do not fit, shapes that differ, integers where floats belong.
    """
    result = Plan()
    taken: dict[str, str] = {}
    filled: dict[str, str] = {}

    def claim(book: dict[str, str], name: str, by: str, whose: str) -> None:
        if name in book:
            result.problems.append(f"{whose} {name} is claimed by two rules: {book[name]} and {by}")
        book[name] = by

    for r in rules:
        label = f"{' + '.join(r.theirs) or '(nothing)'} -> {' + '.join(r.ours) or '(nothing)'}"
        if isinstance(r.op, Drop):
            for binding in _bindings(r.theirs, theirs):
                name = r.theirs[0].format(**binding)
                claim(taken, name, label, "checkpoint tensor")
                result.dropped[name] = r.op.reason
            continue
        if isinstance(r.op, Init):
            for binding in _bindings(r.ours, ours):
                name = r.ours[0].format(**binding)
                claim(filled, name, label, "parameter")
                result.initialised[name] = r.op.reason
            continue
        for binding in _bindings(r.theirs, theirs):
            sources = tuple(p.format(**binding) for p in r.theirs)
            targets = tuple(p.format(**binding) for p in r.ours)
            missing = [s for s in sources if s not in theirs]
            absent = [t for t in targets if t not in ours]
            for s in sources:
                if s in theirs:
                    claim(taken, s, label, "checkpoint tensor")
            if missing:
                result.problems.append(f"missing from the checkpoint: {', '.join(missing)} (needed with {sources[0]})")
            if absent:
                result.problems.append(
                    f"unexpected: {', '.join(sources)}: this configuration has no {', '.join(absent)}"
                )
            for t in targets:
                if t in ours:
                    claim(filled, t, label, "parameter")
            if missing or absent:
                continue
            result.problems += _check(r.op, sources, targets, theirs, ours)
            result.steps.append(Step(sources, targets, r.op))

    result.problems += [f"unexpected: {n} {_shape(t)}: no rule takes it" for n, t in theirs.items() if n not in taken]
    for name, tensor in ours.items():
        if name not in filled:
            wanted = _sources_of(rules, name)
            result.problems.append(f"missing from the checkpoint: {wanted or 'a source'} for {name} {_shape(tensor)}")
    return result


def _check(
    op: Op, sources: tuple[str, ...], targets: tuple[str, ...], theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]
) -> list[str]:
    try:
        results = op.to_ours([theirs[s].to("meta") for s in sources])
    except (ValueError, RuntimeError, IndexError) as error:
        return [f"wrong shape: {', '.join(sources)}: {error}"]
    if len(results) != len(targets):
        return [f"wrong shape: {', '.join(sources)} gives {len(results)} tensors, not {len(targets)}"]
    problems = []
    for target, got in zip(targets, results, strict=True):
        want = ours[target]
        if got.shape != want.shape:
            problems.append(f"wrong shape: {', '.join(sources)} gives {_shape(got)} for {target} {_shape(want)}")
        elif got.is_floating_point() != want.is_floating_point():
            problems.append(f"wrong dtype: {', '.join(sources)} is {got.dtype}, {target} is {want.dtype}")
    return problems


def _sources_of(rules: Sequence[Rule], name: str) -> str:
    for r in rules:
        for binding in _bindings(r.ours, [name]):
            return " + ".join(p.format(**binding) for p in r.theirs)
    return ""


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def unplan(rules: Sequence[Rule], ours: Iterable[str]) -> list[Step]:
    """The steps that write a model in their format: the same rules, read from right to left."""
    steps: list[Step] = []
    done: set[str] = set()
    names = list(ours)
    for r in rules:
        if isinstance(r.op, Drop) or not r.written:
            continue
        for binding in _bindings(r.ours, names):
            targets = tuple(p.format(**binding) for p in r.ours)
            done.update(targets)
            if not isinstance(r.op, Init):
                steps.append(Step(tuple(p.format(**binding) for p in r.theirs), targets, r.op))
    left = [n for n in names if n not in done]
    assert not left, f"no rule writes {left}"
    return steps


def to_theirs(rules: Sequence[Rule], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's tensors (or their gradients: every op is a permutation) under the names and layouts of the Hub."""
    out: dict[str, Tensor] = {}
    for step in unplan(rules, ours):
        out.update(zip(step.theirs, step.op.to_theirs([ours[n] for n in step.ours]), strict=True))
    return out
