"""The one training loop: every loss of the library runs through `fit`."""

from __future__ import annotations

import contextlib
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polymodal.core.errors import TrainError, did_you_mean
from polymodal.core.precision import fast_bf16
from polymodal.core.verbs import Trains
from polymodal.data.loader import Item, Loader, shorten
from polymodal.train import checkpoint, report
from polymodal.train.checkpoint import State
from polymodal.train.distributed import Parallel, Place, Single, agree, gradient_norm, join, local, parallelise
from polymodal.train.log import Curve, Display
from polymodal.train.run import Run, Stage, build, learning_rates

Log = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run came to."""

    model: nn.Module  # whole on every process, in eval mode; averaged where its last stage had an EMA
    finished: bool
    step: int
    loss: float  # of the last step
    metrics: dict[str, float]  # of the last evaluation
    reached: dict[str, bool]  # expected metric -> whether its bar was reached
    seconds: float
    folder: Path


def fit(
    run: Run,
    out: str | Path,
    *,
    resume: bool = True,
    until_step: int | None = None,
    parallel: Parallel | None = None,
    device: str | None = None,
    checkpoint_seconds: float = 300.0,
    checkpoint_steps: int | None = None,
    log: Log | None = None,
) -> Result:
    """Trains ``run`` in the folder ``out``, going on from the last checkpoint there.

    ``out`` receives ``metrics.jsonl`` (a line a step), ``checkpoints/``, and at the end ``curve.png`` and
    ``result.json``. Everything random is a function of (seed, stage, step, rank), so that a run that was killed and
    resumed gives the curve of one that was not. SIGINT and SIGTERM save before they end the process.

    Args:
        resume: go on from what ``out`` holds; False removes its checkpoints and curve and starts over.
        until_step: stop, with a checkpoint, after this many optimiser steps of the whole run.
        parallel: how the processes of a launcher work together; all of them see the same ``out``.
        device: e.g. "cpu"; by default a GPU if there is one.
        checkpoint_seconds: longest time between checkpoints.
        checkpoint_steps: also save every so many steps.
        log: called with every record of the curve, on the first process.

    Raises:
        TrainError: the run cannot start or go on (another configuration, a loss that is not finite).
        DataError: a batch cannot be made.
        MissingDependency: matplotlib is missing.
    """
    report.require_curve()
    place = join(parallel, device)
    trainer = _Trainer(run, Path(out), place, parallel, checkpoint_seconds, checkpoint_steps, log)
    return trainer.run_all(resume=resume, until_step=until_step)


@dataclass(frozen=True, kw_only=True)
class _Active:
    """What one stage trains with."""

    stage: Stage
    wrapped: Single
    optimizer: torch.optim.Optimizer
    trained: Mapping[str, nn.Parameter]
    ema: Mapping[str, Tensor] | None
    bf16: bool


class _Trainer:
    def __init__(
        self,
        run: Run,
        out: Path,
        place: Place,
        parallel: Parallel | None,
        checkpoint_seconds: float,
        checkpoint_steps: int | None,
        log: Log | None,
    ) -> None:
        self.run = run
        self.out = out
        self.place = place
        self.parallel: Parallel | None = parallel
        self.checkpoint_seconds = checkpoint_seconds
        self.checkpoint_steps = checkpoint_steps
        self.log = log
        self.first = place.rank == 0
        self.description = run.description()
        self.state = State()
        self._marked = (time.monotonic(), time.process_time())

    @property
    def checkpoints(self) -> Path:
        return self.out / "checkpoints"

    def run_all(self, *, resume: bool, until_step: int | None) -> Result:
        if not resume and self.first:
            shutil.rmtree(self.checkpoints, ignore_errors=True)
            (self.out / "metrics.jsonl").unlink(missing_ok=True)
        agree(torch.zeros((), device=self.place.device))  # nobody reads what another process is about to remove
        if saved := checkpoint.found(self.checkpoints):
            self.state = checkpoint.read_state(saved[-1], self.description)
        stop = self.run.steps if until_step is None else min(until_step, self.run.steps)
        with contextlib.ExitStack() as stack:
            self.curve = Curve(self.out / "metrics.jsonl", self.state.step) if self.first else None
            if self.curve is not None:
                stack.callback(self.curve.close)
            self.display = stack.enter_context(
                Display(self.run.name, step=self.state.step, steps=self.run.steps, shown=self.first)
            )
            self.signals = stack.enter_context(_Signals())
            if saved:
                self.display.say(f"going on from step {self.state.step}")
            while self.state.stage < len(self.run.stages) and self.state.step < stop:
                self._run_stage(self.run.stages[self.state.stage], stop)
        if self.first:
            report.draw_curve(self.out / "metrics.jsonl", self.out / "curve.png", self.run.name)
            report.write_result(
                self.out / "result.json", self.run, self.state, device=self.place.device, world=self.place.world
            )
        return Result(
            model=self._build().eval(),
            finished=self.state.stage == len(self.run.stages),
            step=self.state.step,
            loss=self.state.loss,
            metrics=self.state.metrics,
            reached=report.reached(self.run, self.state.metrics),
            seconds=self.state.seconds,
            folder=self.out,
        )

    def _build(self) -> nn.Module:
        """The model of the run with the weights of the last checkpoint, if there is one."""
        torch.manual_seed(mixed(self.run.seed))
        model = build(self.run).to(self.place.device)
        if saved := checkpoint.found(self.checkpoints):
            checkpoint.load_model(saved[-1], model)
        return model

    def _run_stage(self, stage: Stage, stop: int) -> None:
        """Trains one stage to its end or to global step ``stop`` and saves.

        Each stage starts from a fresh module and the checkpoint: sharding and DDP fix what trains when they wrap, and
        so going on in a new process and in this one are the same thing.
        """
        state = self.state
        if stage.batch_size % (stage.accumulate * self.place.world):
            raise TrainError(
                f"stage {stage.name!r}: a batch of {stage.batch_size} does not divide into {stage.accumulate} "
                f"micro-batches on each of {self.place.world} processes"
            )
        source = stage.source()
        if state.stage_step and len(source) != state.items:
            raise TrainError(
                f"stage {stage.name!r} began with {state.items} items and now has {len(source)}: their order would "
                "be another one. Restore the data, or start over with resume=False."
            )
        state.items = len(source)
        model = self._build()
        rates = learning_rates(model, stage)
        wrapped = parallelise(model, self.parallel, self.place)
        optimizer = make_optimizer(model, stage, rates)
        trained = {n: p for n, p in model.named_parameters() if n in rates}
        ema = None if stage.ema is None else {n: p.detach().clone() for n, p in trained.items()}
        if state.stage_step:
            saved = checkpoint.found(self.checkpoints)[-1]
            checkpoint.load_optimizer(saved, model, optimizer)
            if ema is not None:
                checkpoint.load_ema(saved, ema)
        bf16 = stage.precision == "bf16" or (stage.precision == "auto" and fast_bf16(self.place.device))
        active = _Active(stage=stage, wrapped=wrapped, optimizer=optimizer, trained=trained, ema=ema, bf16=bf16)
        model.train()
        saved_at = time.monotonic()
        with Loader(
            source,
            batch_size=stage.batch_size,
            seed=mixed(self.run.seed, state.stage),
            start_step=state.stage_step,
            stop_step=min(stage.steps, state.stage_step + stop - state.step),
            workers=stage.workers,
            rank=self.place.rank,
            world=self.place.world,
            pin=self.place.device.type == "cuda",
        ) as loader:
            waited, began = 0.0, time.perf_counter()
            for item in loader:
                late = time.monotonic() - saved_at > self.checkpoint_seconds
                record, save, signum = self._step(active, item, late)
                seconds = time.perf_counter() - began
                record["items_per_s"] = stage.batch_size / seconds
                record["waiting"] = (loader.waited - waited) / seconds
                last = state.stage_step == stage.steps
                if last and ema is not None:
                    _swap(trained, ema)  # the average is what the stage leaves
                every, over = self.run.evaluate_every, state.step == self.run.steps
                if self.run.evaluate is not None and (over or (every and state.step % every == 0)):
                    with contextlib.nullcontext() if last or ema is None else _swapped(trained, ema):
                        record["evaluation"] = self._evaluate(wrapped)
                self._record(record)
                if last:
                    state.stage, state.stage_step = state.stage + 1, 0
                save |= bool(self.checkpoint_steps and state.step % self.checkpoint_steps == 0)
                if save or last or state.step == stop or signum:
                    self._save(model, None if last else optimizer, None if last else ema)
                    saved_at = time.monotonic()
                if signum:
                    self.display.say(f"stopped by a signal at step {state.step}; the same command goes on from there")
                    raise KeyboardInterrupt if signum == signal.SIGINT else SystemExit(128 + signum)
                waited, began = loader.waited, time.perf_counter()

    def _step(self, active: _Active, item: Item, late: bool) -> tuple[dict[str, Any], bool, int]:
        """One optimiser step; gives its record, and what the ranks agree on: whether to save, and a signal's number."""
        stage, wrapped, trained, ema = active.stage, active.wrapped, active.trained, active.ema
        state, device = self.state, self.place.device
        torch.manual_seed(mixed(self.run.seed, state.stage, state.stage_step, self.place.rank))
        active.optimizer.zero_grad(set_to_none=True)
        batch = item.batch.to(device)
        rows = batch.size // stage.accumulate
        sums: dict[str, Tensor] = {}
        for micro in range(stage.accumulate):
            with wrapped.micro_batch(last=micro == stage.accumulate - 1):
                with torch.autocast(device.type, torch.bfloat16, enabled=active.bf16):
                    loss = wrapped.loss(batch.rows(micro * rows, (micro + 1) * rows))
                # Numbers are read before the backward: after it, sharding has freed what a metric may be a view of.
                values: dict[str, float | Tensor] = {"loss": loss.total, "weight": loss.weight}
                for name, value in loss.metrics.items():  # means over the items of the loss; of none, no number
                    values[f"metrics/{name}"] = value * loss.weight if loss.weight else 0.0
                for name, value in values.items():
                    value = torch.as_tensor(value, dtype=torch.float64, device=device).detach()
                    sums[name] = sums[name] + value if name in sums else value
                loss.total.backward()
        wrapped.join(trained.values())
        received = self.signals.received
        flags = torch.tensor([late, received == signal.SIGINT, received == signal.SIGTERM], device=device)
        agreed = agree(torch.cat([torch.stack(list(sums.values())), flags.double()])).tolist()
        *numbers, save, interrupted, terminated = agreed
        totals = dict(zip(sums, numbers, strict=True))
        weight = totals["weight"]
        if not weight > 0:
            raise TrainError(f"step {state.step + 1}: nothing in items {shorten(item.indices)} is supervised")
        # Totals are sums over rows and every wrapper averages over ranks: this factor gives the mean over all rows.
        factor = self.place.world / weight
        parameters = list(trained.values())
        norm = gradient_norm(parameters).item() * factor
        mean = totals["loss"] / weight
        if not np.isfinite([mean, norm]).all():
            raise TrainError(
                f"step {state.step + 1} (stage {stage.name!r}): the loss is {mean}, the gradient's norm {norm}; items "
                f"{shorten(item.indices, 64)}. The last checkpoint is intact: lower lr, raise warmup, or mend the data"
            )
        if stage.clip is not None:
            factor *= min(1.0, stage.clip / (norm + 1e-6))
        torch._foreach_mul_([local(p.grad) for p in parameters if p.grad is not None], factor)
        lr = stage.lr * stage.schedule.factor(state.stage_step, stage.steps)
        for group in active.optimizer.param_groups:
            group["lr"] = lr * group["rate"]
        active.optimizer.step()
        state.step, state.stage_step, state.loss = state.step + 1, state.stage_step + 1, mean
        with torch.no_grad():
            assert isinstance(wrapped.model, Trains)
            wrapped.model.after_step(state.stage_step, stage.steps)
            if ema is not None:
                assert stage.ema is not None
                decay = min(stage.ema, state.stage_step / (9 + state.stage_step))
                current = [local(trained[name]) for name in ema]
                torch._foreach_lerp_([local(e) for e in ema.values()], current, 1 - decay)
        metrics = {n.removeprefix("metrics/"): v / weight for n, v in totals.items() if n.startswith("metrics/")}
        record = {"step": state.step, "stage": stage.name, "loss": mean, "lr": lr, "grad_norm": norm, **metrics}
        signum = signal.SIGINT if interrupted else signal.SIGTERM if terminated else 0
        return record, save > 0, int(signum)

    def _evaluate(self, wrapped: Single) -> dict[str, float]:
        assert self.run.evaluate is not None
        model = wrapped.model
        model.eval()
        with torch.no_grad():
            metrics = {name: float(value) for name, value in self.run.evaluate(model).items()}
        wrapped.settle()
        model.train()
        self.state.metrics = metrics
        self.display.say(
            f"step {self.state.step}: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        )
        return metrics

    def _record(self, record: dict[str, Any]) -> None:
        if self.curve is None:
            return
        self.curve.append(record)
        self.display.step(record["step"], record["loss"], record["items_per_s"], record["waiting"])
        if self.log is not None:
            self.log(record)

    def _save(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None, ema: Mapping[str, Tensor] | None
    ) -> None:
        if self.curve is not None:
            self.curve.sync()
        self._mark_time()
        checkpoint.save(
            self.checkpoints,
            run=self.description,
            state=self.state,
            model=model,
            optimizer=optimizer,
            ema=ema,
            write=self.first,
        )

    def _mark_time(self) -> None:
        """Adds the time since the last call to the run's."""
        before, self._marked = self._marked, (time.monotonic(), time.process_time())
        self.state.seconds += self._marked[0] - before[0]
        self.state.cpu_seconds += self._marked[1] - before[1]


def make_optimizer(model: nn.Module, stage: Stage, rates: Mapping[str, float]) -> torch.optim.AdamW:
    """AdamW over what trains, in groups of equal learning rate and decay.

    Parameters with fewer than two axes and those of the model's `no_decay` take no weight decay. Sharded and whole
    tensors never share a group: no fused operation takes both.

    Raises:
        TrainError: `no_decay` names something that is no parameter.
    """
    assert isinstance(model, Trains)
    named = dict(model.named_parameters())
    spared = set(model.no_decay())
    for name in spared - named.keys():
        raise TrainError(f"no_decay of {type(model).__name__} names {name!r}{did_you_mean(name, named)}")
    groups: dict[tuple[float, bool, type], dict[str, Any]] = {}
    for name, rate in rates.items():
        parameter = named[name]
        decays = parameter.ndim >= 2 and name not in spared
        group = groups.setdefault(
            (rate, decays, type(parameter.data)),
            {"params": [], "rate": rate, "weight_decay": stage.weight_decay if decays else 0.0},
        )
        group["params"].append(parameter)
    return torch.optim.AdamW(list(groups.values()), lr=stage.lr, betas=stage.betas, eps=stage.eps, foreach=True)


def mixed(*numbers: int) -> int:
    """One well mixed 63-bit seed from several small numbers."""
    return int(np.random.SeedSequence([n % 2**64 for n in numbers]).generate_state(1, np.uint64)[0] >> np.uint64(1))


@torch.no_grad()
def _swap(parameters: Mapping[str, nn.Parameter], averages: Mapping[str, Tensor]) -> None:
    for name, average in averages.items():
        mine, theirs = local(parameters[name]), local(average)
        kept = mine.clone()
        mine.copy_(theirs)
        theirs.copy_(kept)


@contextlib.contextmanager
def _swapped(parameters: Mapping[str, nn.Parameter], averages: Mapping[str, Tensor]) -> Iterator[None]:
    """The averages take the place of the parameters inside the block."""
    _swap(parameters, averages)
    try:
        yield
    finally:
        _swap(parameters, averages)


class _Signals:
    """Notes the first SIGINT or SIGTERM, so that the step can end; the second one acts as usual."""

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before.clear()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.received = signum
        self.__exit__()
