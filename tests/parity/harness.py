"""Running a public implementation and ours on the same weights and inputs."""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from polymodal.core.batch import Batch
from polymodal.systems.base import System

CLAIM = "parity: outputs, loss, first gradients, greedy text, files both ways (transformers)"


def cases(systems: Mapping[str, str]) -> list[Any]:
    """Parameters of a fixture, name -> system: every test that takes the fixture proves `CLAIM` of that system."""
    return [pytest.param(name, marks=pytest.mark.proves(system, CLAIM), id=name) for name, system in systems.items()]


def randomise(model: nn.Module, std: float = 0.05, seed: int = 0) -> None:
    """Adds noise to every parameter, so that a wrong wiring of one that init leaves at zero or one shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * std)


def save_reference(model: Any, folder: Path, scale: float = 0.05) -> Any:
    """A reference model with random parameters, in fp32, saved in its own format."""
    model = model.eval().float()
    randomise(model, scale)
    model.save_pretrained(folder)
    return model


def file_gradients(model: Any, folder: Path) -> dict[str, Tensor]:
    """The reference's gradients under the names of its FILE, which may differ from those in memory."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for mine, other in zip(twin.parameters(), model.parameters(), strict=True):
            mine.copy_(torch.zeros_like(other) if other.grad is None else other.grad)
    twin.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def reference_call(system: System, model: Any, batch: Batch, **more: Any) -> Any:
    """Calls a reference model on our batch through the system's `reference` declaration."""
    assert system.reference is not None
    inputs = {theirs: batch[ours] for ours, theirs in system.reference.inputs.items() if ours in batch}
    return model(**inputs, **(system.reference.extra or {}), **more)


def random_batch(system: System, size: int, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch({name: spec.random(size, generator) for name, spec in system.inputs_spec().items()})


def assert_parity(
    system: System, model: Any, batch: Batch, folder: Path, *, tolerance: float = 1e-5, **more: Any
) -> None:
    """Outputs, loss and first gradients agree in fp32, relative to the largest value of each tensor (or to one)."""
    assert system.reference is not None
    system.train(False)
    result = reference_call(system, model, batch, **more)
    expected = getattr(result, system.reference.output)
    _close("output", system(batch), expected, tolerance)
    if not system.reference.loss:
        return
    loss = system.loss(batch).mean
    _close("loss", loss, result.loss, tolerance)
    result.loss.backward()
    loss.backward()
    compare_gradients(system, file_gradients(model, folder), tolerance)


def compare_gradients(system: System, theirs: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Every gradient of the reference, read as a file of weights is read, equals ours (zero where we have none)."""
    plan = system.plan(system.formats["hf"], theirs)
    assert not plan.problems, plan.problems
    assert not any(theirs[n].abs().max() > 0 for n in plan.dropped), (
        f"a gradient among {set(plan.dropped)} has no counterpart"
    )
    ours = dict(system.state_dict(keep_vars=True))
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in ours.values()), "no gradient at all"
    for step in plan.steps:
        for name, expected in zip(step.ours, step.op.to_ours([theirs[n] for n in step.theirs]), strict=True):
            gradient = ours[name].grad
            _close(
                f"gradient of {name}", torch.zeros_like(expected) if gradient is None else gradient, expected, tolerance
            )


def assert_learns_alike(
    model: System, batch: Batch, reference: Any, logits: Tensor, loss: Tensor, folder: Path, *, padded: bool = True
) -> None:
    """Scores where tokens are valid, loss and first gradients are those that the reference gave for the same batch."""
    ours, expected = model(batch), logits
    if padded:
        ours, expected = ours[batch["valid"]], expected[batch["valid"]]
    _close("output", ours, expected, 1e-5)
    mine = model.loss(batch).mean
    _close("loss", mine, loss, 1e-5)
    mine.backward()
    loss.backward()
    compare_gradients(model, file_gradients(reference, folder))


def alone(batch: Batch, row: int) -> Batch:
    """One row of ragged prompts: without padding, and without media where it has none."""
    part = batch.rows(row, row + 1)
    length = int(part["valid"].sum())
    part |= {name: part[name][:, :length] for name in ("ids", "valid")}
    ragged = [name for name in part if f"{name}_row" in part]
    empty = [n for name in ragged for n in (name, f"{name}_row") if not len(part[f"{name}_row"])]
    return Batch({name: tensor for name, tensor in part.items() if name not in empty})


def assert_greedy_text(
    model: Any, reference: Any, batch: Batch, inputs: Callable[[Batch], dict[str, Any]], steps: int = 8
) -> None:
    """Ragged prompts in one cache, against the reference's greedy text of each alone; ``inputs`` are its keywords."""
    batch = Batch({name: tensor for name, tensor in batch.items() if name != "labels"})
    memory = model.new_memory(len(batch["ids"]), 200)
    scores, got = model.prefill(batch, memory), []
    for _ in range(steps):
        got.append(scores.argmax(1))
        scores = model.step(got[-1], memory)
    for row, ours in enumerate(torch.stack(got, 1).tolist()):
        made = reference.generate(
            **inputs(alone(batch, row)), max_new_tokens=steps, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert ours == made[0, -steps:].tolist()


def assert_same_files(model: System, reference: Any, folder: Path, again: Path) -> Any:
    """What we write is the file that the reference wrote; gives the reference's model as it reads ours."""
    model.save(again)
    before, after = load_file(folder / "model.safetensors"), load_file(again / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.formats["hf"].read(json.loads((again / "config.json").read_text()))[0] == model.config
    return type(reference).from_pretrained(again, attn_implementation="eager").eval()


def _close(what: str, ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)} against {tuple(theirs.shape)}"
    scale = max(1.0, float(theirs.detach().abs().max()))
    error = float((ours - theirs).detach().abs().max()) / scale
    assert error <= tolerance, f"{what} differs by {error:.2e} (relative to {scale:.3g})"


def transformers_class(name: str) -> Any:
    return getattr(importlib.import_module("transformers"), name)
