"""Where a run stands, on disk: safetensors and JSON in a folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from polymodal.core.errors import TrainError, WeightsError
from polymodal.core.files import read_json, write_json, write_tensors
from polymodal.train.distributed import placed_like, wait_for_all, whole

FORMAT = 1
KEEP = 2
HIDDEN = ".unfinished-"  # what is being written or removed
NAME = re.compile(r"step-(\d{9})-stage-(\d+)")


@dataclass(kw_only=True)
class State:
    """Where a run stands."""

    step: int = 0  # optimiser steps of all stages so far
    stage: int = 0  # the stage to go on with; the number of stages when all is done
    stage_step: int = 0  # optimiser steps of that stage so far
    items: int = 0  # length of that stage's source, which the order of the data depends on
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    loss: float = float("inf")
    metrics: dict[str, float] = field(default_factory=dict)  # of the last evaluation


def save(
    folder: Path,
    *,
    run: Mapping[str, Any],
    state: State,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    ema: Mapping[str, Tensor] | None,
    write: bool,
) -> None:
    """Adds a checkpoint to ``folder`` and keeps the last two. Every rank calls; the one with ``write`` writes.

    Sharded tensors are gathered, so that a checkpoint does not depend on the number of processes. A process killed at
    any moment leaves the checkpoints before it untouched and at worst a hidden folder that the next save removes.

    Raises:
        OSError: the disk is full, for example.
    """
    target = folder / f"step-{state.step:09d}-stage-{state.stage}"
    parts = {"model": _gathered(tensors_of(model), write)}
    if optimizer is not None:
        parts["optimizer"] = _gathered(_optimizer_tensors(model, optimizer), write)
    if ema is not None:
        parts["ema"] = _gathered(ema, write)
    if write and not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"{HIDDEN}*"):
            shutil.rmtree(left)
        unfinished = folder / f"{HIDDEN}{uuid.uuid4().hex}"
        unfinished.mkdir()
        for name, tensors in parts.items():
            write_tensors(unfinished / f"{name}.safetensors", tensors)
            _flush(unfinished / f"{name}.safetensors")
        write_json(unfinished / "state.json", {"format": FORMAT, "run": run, "state": asdict(state)})
        unfinished.rename(target)
        _flush(folder)
        for old in found(folder)[:-KEEP]:
            shutil.rmtree(old.rename(folder / f"{HIDDEN}{uuid.uuid4().hex}"))  # hidden first: half of one is none
    wait_for_all()


def found(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, the oldest first."""
    named = [(match, path) for path in folder.glob("step-*") if (match := NAME.fullmatch(path.name))]
    return [path for _, _, path in sorted((int(match[1]), int(match[2]), path) for match, path in named)]


def read_state(checkpoint: Path, run: Mapping[str, Any]) -> State:
    """Where the run stood; the run may have got further stages at its end since.

    Raises:
        TrainError: the checkpoint is of another run; the message lists each field that differs.
    """
    content = read_json(checkpoint / "state.json")
    if content.get("format") != FORMAT:
        raise TrainError(f"{checkpoint} has format {content.get('format')}, this version reads {FORMAT}")
    ours = json.loads(json.dumps(run))
    known = len(content["run"]["stages"])
    if content["run"] != ours | {"stages": ours["stages"][:known]}:
        changes = "\n".join(f"  - {line}" for line in _differences(content["run"], ours, ""))
        raise TrainError(
            f"{checkpoint} belongs to a run with another configuration:\n{changes}\n"
            "Restore these values, or train into another folder, or start over with resume=False."
        )
    return State(**{f.name: content["state"][f.name] for f in fields(State)})


def load_model(checkpoint: Path, model: nn.Module) -> None:
    """Fills ``model``, one tensor at a time.

    Raises:
        WeightsError: names or shapes differ; nothing was changed.
    """
    _fill(checkpoint / "model.safetensors", tensors_of(model))


def load_ema(checkpoint: Path, ema: Mapping[str, Tensor]) -> None:
    """Sets the moving average of the weights, in place; raises as `load_model` does."""
    _fill(checkpoint / "ema.safetensors", ema)


def load_optimizer(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Sets the state of each parameter that the optimiser holds."""
    parameters = dict(model.named_parameters())
    path = checkpoint / "optimizer.safetensors"
    with _opened(path) as file:
        for key in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
            kind, _, name = key.partition(":")
            value = file.get_tensor(key)
            if name not in parameters:
                raise WeightsError(str(path), [f"{name} is no parameter of the model"])
            moment = value.shape == parameters[name].shape and kind != "step"  # counters stay on the CPU
            optimizer.state[parameters[name]][kind] = placed_like(value, parameters[name]) if moment else value


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, tied ones once."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert isinstance(tensor, Tensor), f"{name}: only tensors can be state"
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {f"{kind}:{names[p]}": value for p, kinds in optimizer.state.items() for kind, value in kinds.items()}


def _gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    gathered = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if keep:
            gathered[name] = full.cpu().contiguous()
    return gathered


@torch.no_grad()
def _fill(path: Path, targets: Mapping[str, Tensor]) -> None:
    with _opened(path) as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        problems = [f"{name} is missing" for name in targets if name not in shapes]
        problems += [f"{name} is not of this model" for name in shapes if name not in targets]
        problems += [
            f"{name} has shape {shape}, the model has {tuple(targets[name].shape)}"
            for name, shape in shapes.items()
            if name in targets and shape != tuple(targets[name].shape)
        ]
        if problems:
            raise WeightsError(str(path), problems)
        for name, target in targets.items():
            target.copy_(placed_like(file.get_tensor(name), target))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        file = safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise TrainError(
            f"{path} cannot be read ({error}): remove {path.parent} to go on from the checkpoint before it"
        ) from None
    with file:
        yield file


def _differences(theirs: Any, ours: Any, where: str) -> Iterator[str]:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted(theirs.keys() | ours.keys()):
            yield from _differences(theirs.get(key), ours.get(key), f"{where}.{key}" if where else key)
    elif isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        for i, (a, b) in enumerate(zip(theirs, ours, strict=True)):
            yield from _differences(a, b, f"{where}[{i}]")
    elif theirs != ours:
        yield f"{where}: was {theirs!r}, is {ours!r}"


def _flush(path: Path) -> None:
    """Asks the disk to keep a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
