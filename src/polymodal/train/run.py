"""What a training run is: data, not code. A recipe returns a `Run`; `train.fit` carries it out."""

from __future__ import annotations

import fnmatch
import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias, get_args

from torch import nn

from polymodal.core.errors import ConfigError, TrainError, did_you_mean
from polymodal.core.precision import Precision
from polymodal.core.verbs import Trains
from polymodal.data.loader import Source


@dataclass(frozen=True, kw_only=True)
class Constant:
    """Linear warm-up, then the peak learning rate."""

    warmup: int = 0

    def factor(self, step: int, steps: int) -> float:
        """The share of the peak learning rate at ``step`` (from 0) of ``steps``."""
        return min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Linear warm-up, then half a cosine down to ``final`` of the peak."""

    warmup: int = 0
    final: float = 0.0

    def factor(self, step: int, steps: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, steps - self.warmup)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True, kw_only=True)
class Linear:
    """Linear warm-up, then a straight line down to ``final`` of the peak."""

    warmup: int = 0
    final: float = 0.0

    def factor(self, step: int, steps: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, steps - self.warmup)
        return 1 - (1 - self.final) * done


Schedule: TypeAlias = Constant | Cosine | Linear


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a run with one data source, one optimiser and one choice of what trains.

    ``batch_size`` counts the rows of one optimiser step over all processes. Each process cuts its share into
    ``accumulate`` micro-batches. A loss that compares rows with each other (CLIP, SigLIP) sees fewer negatives then,
    so for it accumulation is another objective, not only a saving of memory.

    Args:
        trainable: glob or name prefix of parameters -> multiplier of ``lr``; the last match counts, parameters without
            a match freeze, and so do those that the model itself made without gradient.
        lr: learning rate at the peak of the schedule.
        clip: largest norm of the whole gradient, or None.
        ema: decay of the moving average of the weights that is evaluated and kept, or None. The first steps use
            (1 + step) / (10 + step) where that is smaller, so that a short run forgets its random start.
        precision: of the forward; weights stay fp32. "auto" is bf16 where the device is faster in it: a CPU without the
            instructions takes ten times as long.
        source: makes the data when the stage begins.
    """

    name: str
    steps: int
    batch_size: int
    source: Callable[[], Source]
    lr: float
    schedule: Schedule = field(default_factory=Cosine)
    trainable: Mapping[str, float] = field(default_factory=lambda: {"*": 1.0})
    accumulate: int = 1
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float | None = 1.0
    precision: Precision = "fp32"
    ema: float | None = None
    workers: int = 2

    def __post_init__(self) -> None:
        wrong = [f"{n} is {v}" for n in ("steps", "batch_size", "accumulate") if (v := getattr(self, n)) < 1]
        wrong += [f"lr is {self.lr}"] * (not self.lr > 0)
        wrong += [f"ema is {self.ema}"] * (self.ema is not None and not 0 <= self.ema < 1)
        wrong += [f"clip is {self.clip}"] * (self.clip is not None and not self.clip > 0)
        wrong += [f"workers is {self.workers}"] * (self.workers < 0)
        warmup = self.schedule.warmup
        wrong += [f"warmup is {warmup} of {self.steps} steps"] * (not 0 <= warmup <= self.steps)
        wrong += [f"precision is {self.precision!r}"] * (self.precision not in get_args(Precision))
        if self.batch_size % max(1, self.accumulate):
            wrong.append(f"a batch of {self.batch_size} does not divide into {self.accumulate} micro-batches")
        if wrong:
            raise ConfigError(f"stage {self.name!r} is impossible: {'; '.join(wrong)}")

    def description(self) -> dict[str, Any]:
        """All that changes what is learned, as JSON values."""
        values = {k: v for k, v in vars(self).items() if k not in ("source", "workers", "schedule")}
        schedule = {"kind": type(self.schedule).__name__, **asdict(self.schedule)}
        return {**values, "trainable": dict(self.trainable), "betas": list(self.betas), "schedule": schedule}


@dataclass(frozen=True, kw_only=True)
class Header:
    """What somebody who thinks of running a recipe wants to know."""

    command: str
    machine: str
    time: str
    expected: str


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A metric must reach ``value``; ``chance`` is what guessing scores."""

    value: float
    chance: float | None = None


@dataclass(frozen=True, kw_only=True)
class Run:
    """A whole training run.

    Args:
        model: builds the system; called under the run's seed, on every process, at the start of each stage.
        evaluate: metrics of a model in eval mode, without gradients; every process calls it.
        evaluate_every: steps between evaluations beside the one at the end: what a preparing stage leaves, such as an
            encoder whose decoder knows nothing yet, may have no answer to measure.
        expect: metric of the last evaluation -> what it must reach.
    """

    name: str
    header: Header
    model: Callable[[], nn.Module]  # a module that has the verb Trains
    stages: Sequence[Stage]
    seed: int = 0
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None
    evaluate_every: int | None = None
    expect: Mapping[str, Bar] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.stages:
            raise ConfigError(f"run {self.name!r} has no stage")
        if self.expect and self.evaluate is None:
            raise ConfigError(f"run {self.name!r} expects {', '.join(self.expect)} but has no evaluate function")

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def description(self) -> dict[str, Any]:
        return {"name": self.name, "seed": self.seed, "stages": [stage.description() for stage in self.stages]}


def learning_rates(model: nn.Module, stage: Stage) -> dict[str, float]:
    """Parameter name -> learning-rate multiplier for what trains in ``stage``; freezes the rest of ``model``.

    Raises:
        TrainError: a pattern matches nothing, or only what the model itself keeps frozen.
    """
    free = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    every = [name for name, _ in model.named_parameters()]
    rates: dict[str, float] = {}
    for pattern, rate in stage.trainable.items():
        matched = [name for name in free if _matches(name, pattern)]
        if not matched:
            if any(_matches(name, pattern) for name in every):
                raise TrainError(f"stage {stage.name!r}: {pattern!r} matches only what the model itself keeps frozen")
            prefixes = {".".join(name.split(".")[:depth]) for name in every for depth in (1, 2)}
            raise TrainError(f"stage {stage.name!r}: no parameter matches {pattern!r}{did_you_mean(pattern, prefixes)}")
        rates.update(dict.fromkeys(matched, rate))
    rates = {name: rate for name, rate in rates.items() if rate}
    if not rates:
        raise TrainError(f"stage {stage.name!r} trains nothing")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in rates)
    return rates


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")


def build(run: Run) -> nn.Module:
    """The model of a run.

    Raises:
        TrainError: the factory gave something that cannot be trained.
    """
    model = run.model()
    if not isinstance(model, nn.Module) or not isinstance(model, Trains):
        missing = [n for n in ("loss", "after_step", "no_decay", "blocks") if not callable(getattr(model, n, None))]
        raise TrainError(
            f"run {run.name!r}: {type(model).__name__} cannot be trained"
            + (f", it lacks {', '.join(missing)}" if missing else ", it is no torch module")
        )
    return model


def load_run(where: str | Path) -> Run:
    """The `Run` that the function ``run`` of a file (``recipes/nano/clip.py``) or module (``recipes.nano.clip``) gives.

    Raises:
        ConfigError: there is no such file or module, it has no function ``run``, or that gives something else.
    """
    module = _module(str(where))
    make = getattr(module, "run", None)
    if not callable(make):
        raise ConfigError(f"{where} has no function `run() -> Run`")
    made = make()
    if not isinstance(made, Run):
        raise ConfigError(f"run() of {where} gave a {type(made).__name__}, not a polymodal.train.Run")
    return made


def _module(where: str) -> ModuleType:
    path = Path(where)
    if path.suffix == ".py":
        if not path.is_file():
            raise ConfigError(f"the recipe {path} does not exist")
        top = next(p for p in path.resolve().parents if not (p / "__init__.py").is_file())
        if str(top) not in sys.path:
            sys.path.insert(0, str(top))  # it may import its own package
        name = f"polymodal_recipe_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses of a recipe look their module up there
        spec.loader.exec_module(module)
        return module
    try:
        return importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{where}.".startswith(f"{error.name}."):
            raise  # the recipe exists; something that it imports does not
        raise ConfigError(f"no recipe module is called {where!r}: pass a .py file or a dotted name") from None
