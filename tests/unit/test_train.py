"""What a run says: schedules, what trains, recipes; and what the loop does with it."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from polymodal.core.errors import ConfigError, DataError, MissingDependency, TrainError
from polymodal.core.precision import fast_bf16
from polymodal.train import Bar, Constant, Cosine, Linear, Run, Stage, fit, load_run
from polymodal.train import loop as loop_module
from polymodal.train.log import read_curve
from polymodal.train.loop import make_optimizer
from polymodal.train.run import learning_rates
from tests.unit.toy_run import PLAIN, STAGE, Rows, Toy, run


def plain(**changes: Any) -> Run:
    return replace(PLAIN, stages=[replace(STAGE, **changes)])


def curve(folder: Path) -> list[dict[str, Any]]:
    return read_curve(folder / "metrics.jsonl")


# ---- schedules ----


def test_schedules_have_the_published_values() -> None:
    cosine = Cosine(warmup=10, final=0.1)
    assert [cosine.factor(step, 110) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert cosine.factor(60, 110) == pytest.approx(0.55)  # half way between 1 and 0.1
    assert cosine.factor(35, 110) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert cosine.factor(110, 110) == pytest.approx(0.1)
    linear = Linear(warmup=10, final=0.2)
    assert [linear.factor(step, 110) for step in (4, 10, 60, 110)] == pytest.approx([0.5, 1.0, 0.6, 0.2])
    assert [Constant(warmup=4).factor(step, 9) for step in (0, 1, 3, 4, 8)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    assert Constant().factor(0, 9) == 1.0


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"accumulate": 0},
        {"accumulate": 3},
        {"lr": 0.0},
        {"lr": math.nan},
        {"ema": 1.0},
        {"clip": 0.0},
        {"workers": -1},
        {"schedule": Cosine(warmup=25)},
        {"schedule": Constant(warmup=-1)},
    ],
)
def test_impossible_stages_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="stage 'one' is impossible"):
        replace(STAGE, **change)


def test_runs_without_stages_or_without_evaluation_are_refused() -> None:
    with pytest.raises(ConfigError, match="no stage"):
        replace(PLAIN, stages=[])
    with pytest.raises(ConfigError, match="expects score but has no evaluate"):
        replace(PLAIN, expect={"score": Bar(value=1.0)})


# ---- what trains ----


def test_patterns_choose_what_trains_and_how_fast() -> None:
    model = Toy()
    rates = learning_rates(model, replace(STAGE, trainable={"*": 1.0, "a": 0.1, "a.bias": 0.0}))
    assert rates == {"scale": 1.0, "a.weight": 0.1, "b.weight": 1.0, "b.bias": 1.0}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(rates)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"visoin": 1.0}, "no parameter matches 'visoin'"),
        ({"teacher": 1.0}, "'teacher' matches only what the model itself keeps frozen"),
        ({"a": 0.0}, "trains nothing"),
        ({"scal": 1.0}, "Did you mean 'scale'"),
    ],
)
def test_patterns_that_do_nothing_are_refused(patterns: dict[str, float], message: str) -> None:
    with pytest.raises(TrainError, match=message):
        learning_rates(Toy(), replace(STAGE, trainable=patterns))


def test_decay_spares_vectors_and_what_the_model_names() -> None:
    model = Toy()
    stage = replace(STAGE, trainable={"*": 1.0, "a": 0.5}, weight_decay=0.3)
    optimizer = make_optimizer(model, stage, learning_rates(model, stage))
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {names[p]: (g["rate"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert found == {
        "a.weight": (0.5, 0.3),
        "a.bias": (0.5, 0.0),
        "b.weight": (1.0, 0.0),
        "b.bias": (1.0, 0.0),
        "scale": (1.0, 0.0),
    }


def test_no_decay_of_an_unknown_name_is_refused(tmp_path: Path) -> None:
    class Wrong(Toy):
        def no_decay(self) -> list[str]:
            return ["b.wait"]

    with pytest.raises(TrainError, match=r"names 'b.wait'. Did you mean 'b.weight'"):
        fit(replace(PLAIN, model=Wrong), tmp_path)


def test_frozen_parts_stay_and_rates_scale_the_step(tmp_path: Path) -> None:
    """Adam's first step moves every weight by the learning rate."""
    stages = {"steps": 1, "schedule": Constant(), "weight_decay": 0.0, "clip": None, "lr": 1e-3, "batch_size": 64}
    start = fit(plain(**stages, trainable={"scale": 1.0}), tmp_path / "0").model.state_dict()
    moved = fit(plain(**stages, trainable={"b": 0.25, "scale": 1.0}), tmp_path / "1").model.state_dict()
    assert torch.equal(start["a.weight"], moved["a.weight"])
    assert torch.equal(start["scale"], moved["scale"])
    torch.testing.assert_close((start["b.bias"] - moved["b.bias"]).abs(), torch.tensor([2.5e-4]), rtol=1e-3, atol=0)


# ---- recipes ----


def test_a_recipe_is_a_file_or_a_module(tmp_path: Path) -> None:
    for where in (Path(__file__).with_name("toy_run.py"), "tests.unit.toy_run"):
        assert load_run(where).name == "toy"
    assert load_run("tests.unit.toy_run").description() == run().description()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("x = 1", "has no function `run"),
        ("run = 3", "has no function `run"),
        ("def run(): return {}", "gave a dict"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_run(path)


def test_a_missing_module_is_told_from_a_module_that_misses_one(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "halfbaked.py").write_text("import not_installed_anywhere")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"no recipe module is called 'recipes\.nowhere\.at_all'"):
        load_run("recipes.nowhere.at_all")
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        load_run("halfbaked")


def test_a_recipe_file_finds_its_own_package(tmp_path: Path, monkeypatch: Any) -> None:
    """Whatever the current folder is."""
    inner = tmp_path / "cookbook" / "small"
    inner.mkdir(parents=True)
    for folder in (inner, inner.parent):
        (folder / "__init__.py").touch()
    (inner / "kitchen.py").write_text("from tests.unit.toy_run import run")
    (inner / "dish.py").write_text("from cookbook.small.kitchen import run")
    monkeypatch.setattr("sys.path", list(sys.path))
    assert load_run(inner / "dish.py").name == "toy"


def test_something_that_cannot_train_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="Linear cannot be trained, it lacks loss, after_step, no_decay, blocks"):
        fit(replace(PLAIN, model=lambda: nn.Linear(1, 1)), tmp_path)


# ---- the loop ----


@pytest.mark.parametrize("accumulate", [2, 4, 16])
def test_accumulation_equals_one_batch(accumulate: int, tmp_path: Path) -> None:
    """The rows hold different numbers of supervised items, so a mean of means would differ."""
    kinds = {"clip": None, "schedule": Constant(), "steps": 4}
    one = fit(plain(**kinds), tmp_path / "one")
    many = fit(plain(**kinds, accumulate=accumulate), tmp_path / "many")
    for a, b in zip(curve(one.folder), curve(many.folder), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
    torch.testing.assert_close(one.model.state_dict(), many.model.state_dict(), rtol=1e-4, atol=1e-6)


def test_loss_falls_and_the_end_is_reported(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    result = fit(run(), tmp_path, log=seen.append)
    assert result.finished
    assert result.reached == {"score": True}
    assert seen == curve(tmp_path)
    assert [record["step"] for record in seen] == list(range(1, 37))
    assert [record["step"] for record in seen if "evaluation" in record] == [10, 20, 30, 36]
    assert seen[-1]["loss"] < seen[0]["loss"] / 3
    assert {"stage", "lr", "mae", "items_per_s", "waiting"} <= seen[0].keys()
    report = json.loads((tmp_path / "result.json").read_text())
    assert report["expected"]["score"] == {
        "expected": -0.5,
        "chance": -4.0,
        "reached": result.metrics["score"],
        "passed": True,
    }
    assert report["finished"]
    assert report["cpu_seconds"] > 0
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert not result.model.training


def test_a_bar_that_is_missed_is_said(tmp_path: Path) -> None:
    result = fit(replace(run(), expect={"score": Bar(value=1.0), "other": Bar(value=0.0)}), tmp_path)
    assert result.reached == {"score": False, "other": False}


def test_the_learning_rate_follows_the_schedule(tmp_path: Path) -> None:
    fit(plain(), tmp_path)
    expected = [STAGE.lr * STAGE.schedule.factor(step, STAGE.steps) for step in range(STAGE.steps)]
    assert [record["lr"] for record in curve(tmp_path)] == expected


def test_clipping_bounds_the_step(tmp_path: Path) -> None:
    """With an eps far above the gradient, Adam's first step is lr / eps times the clipped gradient."""
    kinds = {"steps": 1, "schedule": Constant(), "eps": 1e6, "weight_decay": 0.0, "trainable": {"a": 1.0, "b": 1.0}}
    start = fit(plain(**kinds, lr=1e-30), tmp_path / "start").model
    moved = {}
    for clip in (None, 0.5):
        end = fit(plain(**kinds, lr=1e6, clip=clip), tmp_path / str(clip)).model
        steps = [(end.get_parameter(n) - p).flatten() for n, p in start.named_parameters() if n[0] in "ab"]
        moved[clip] = torch.cat(steps).norm().item()
    norm = curve(tmp_path / "0.5")[0]["grad_norm"]  # what is logged is the norm before clipping
    assert norm > 0.5
    assert moved == {None: pytest.approx(norm, rel=1e-3), 0.5: pytest.approx(0.5, rel=1e-3)}


def test_the_average_is_evaluated_and_kept(tmp_path: Path) -> None:
    """Replays the average from the weights after each step."""
    weights: list[torch.Tensor] = []
    evaluated: list[torch.Tensor] = []

    class Watched(Toy):
        def after_step(self, step: int, total_steps: int) -> None:
            super().after_step(step, total_steps)
            weights.append(self.b.weight.detach().clone())

    def evaluate(model: nn.Module) -> dict[str, float]:
        evaluated.append(model.get_parameter("b.weight").detach().clone())
        return {"x": 0.0}

    torch.manual_seed(loop_module.mixed(0))
    average = Watched().b.weight.detach().clone()
    result = fit(replace(plain(ema=0.8), model=Watched, evaluate=evaluate, evaluate_every=10), tmp_path)
    averages = []
    for step, weight in enumerate(weights):
        average = average.lerp(weight, 1 - min(0.8, (1 + step) / (10 + step)))
        averages.append(average)
    for found, step in zip(evaluated, (10, 20, 24), strict=True):
        torch.testing.assert_close(found, averages[step - 1])
    torch.testing.assert_close(result.model.get_parameter("b.weight").detach(), averages[-1])
    assert not torch.allclose(averages[-1], weights[-1], atol=1e-4)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_that_is_not_finite_stops_the_run(accumulate: int, tmp_path: Path) -> None:
    stage = replace(STAGE, source=lambda: Rows(poison=7), accumulate=accumulate)
    with pytest.raises(TrainError, match=r"step \d+ \(stage 'one'\): the loss is nan.* items \[.*\b7\b.*\]"):
        fit(replace(PLAIN, stages=[stage]), tmp_path, checkpoint_steps=1)
    left = list(tmp_path.glob("checkpoints/step-*/model.safetensors"))
    assert all(np.isfinite(record["loss"]) for record in curve(tmp_path))
    assert len(left) == min(2, len(curve(tmp_path)))


def test_a_batch_without_supervision_is_refused(tmp_path: Path) -> None:
    class Empty(Rows):
        def __init__(self) -> None:
            super().__init__()
            self.keep[:] = 0

    with pytest.raises(TrainError, match=r"step 1: nothing in items .* is supervised"):
        fit(plain(source=Empty), tmp_path)


def test_too_little_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="batch of 128 cannot be drawn from 64"):
        fit(plain(batch_size=128), tmp_path)


@pytest.mark.parametrize("precision", ["bf16", "auto", "fp32"])
def test_a_forward_in_bf16_has_master_weights_in_fp32(precision: Any, tmp_path: Path) -> None:
    fast = fast_bf16(torch.device("cpu"))
    seen: list[torch.dtype] = []

    class Watched(Toy):
        def loss(self, batch: Any) -> Any:
            if self.training:
                seen.append(self.a(batch["x"]).dtype)
            return super().loss(batch)

    result = fit(replace(plain(precision=precision), model=Watched), tmp_path, device="cpu")
    assert set(seen) == {torch.bfloat16 if precision == "bf16" or (precision == "auto" and fast) else torch.float32}
    assert {p.dtype for p in result.model.parameters()} == {torch.float32}
    assert curve(tmp_path)[-1]["loss"] < curve(tmp_path)[0]["loss"] / 2


def test_several_processes_need_a_word_and_a_launcher(tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(TrainError, match="needs a launcher: torchrun"):
        fit(PLAIN, tmp_path, parallel="ddp")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainError, match="pass parallel="):
        fit(PLAIN, tmp_path)


@pytest.mark.parametrize("device", ["gpu", "cpu:x", "xpu"])
def test_a_device_that_is_not_here_is_named(device: str, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=f"no device '{device}' to train on here"):
        fit(PLAIN, tmp_path, device=device)


def test_a_missing_picture_library_is_said_before_the_training(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"polymodal\[train\]"):
        fit(PLAIN, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_default_stage_is_frozen_and_by_keyword() -> None:
    with pytest.raises(TypeError):
        Stage("one", 3)  # type: ignore[misc]
    with pytest.raises(AttributeError):
        STAGE.lr = 1.0  # type: ignore[misc]
