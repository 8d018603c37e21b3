"""A regression that trains in a second: what the tests of the loop run, here and in processes that they kill."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from polymodal.core.batch import Batch, Loss
from polymodal.train import Bar, Cosine, Header, Run, Stage

ITEMS = 64


class Toy(nn.Module):
    """Two blocks, a parameter without an axis, a buffer, a frozen copy; a loss over the rows that ``keep`` names."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.a = nn.Linear(4, 16)
        self.b = nn.Linear(16, 1)
        self.scale = nn.Parameter(torch.zeros(()))
        self.dropout = nn.Dropout(dropout)
        self.teacher = nn.Linear(4, 16).requires_grad_(False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def loss(self, batch: Batch) -> Loss:
        predicted = self.b(self.dropout(torch.relu(self.a(batch["x"])))).squeeze(1) * self.scale.exp()
        error = (predicted - batch["y"]) * batch["keep"]
        return Loss(
            (error**2).sum(), float(batch["keep"].sum()), {"mae": error.detach().abs().sum() / batch["keep"].sum()}
        )

    def after_step(self, step: int, total_steps: int) -> None:
        self.steps += 1
        self.scale.clamp_(-0.5, 0.5)
        for mine, theirs in zip(self.teacher.parameters(), self.a.parameters(), strict=True):
            mine.lerp_(theirs, 0.1)

    def no_decay(self) -> Iterable[str]:
        return ["b.weight"]

    def blocks(self) -> Iterable[nn.Module]:
        return [self.a, self.b, self.teacher]


class Noisy(Toy):
    """Draws random numbers in the forward."""

    def __init__(self) -> None:
        super().__init__(dropout=0.2)


class Rows:
    """Rows with very different numbers of supervised items; ``noise`` is drawn for each batch."""

    def __init__(self, noise: float = 0.0, poison: int | None = None) -> None:
        rng = np.random.default_rng(0)
        self.x = rng.normal(size=(ITEMS, 4)).astype(np.float32)
        self.y = self.x.sum(1)
        self.keep = (rng.random(ITEMS) < 0.6).astype(np.float32)
        self.noise = noise
        if poison is not None:
            self.y[poison], self.keep[poison] = np.nan, 1

    def __len__(self) -> int:
        return ITEMS

    def batch(self, indices: Sequence[int], rng: np.random.Generator) -> Batch:
        x = self.x[indices] + self.noise * rng.normal(size=(len(indices), 4)).astype(np.float32)
        values = {"x": x, "y": self.y[indices], "keep": self.keep[indices]}
        return Batch({name: torch.from_numpy(value) for name, value in values.items()})


def score(model: nn.Module) -> dict[str, float]:
    assert isinstance(model, Toy)
    assert not model.training
    return {"score": -float(model.loss(Rows().batch(range(32), np.random.default_rng(0))).mean)}


HEADER = Header(command="polymodal train toy", machine="any", time="a second", expected="score -0.5")
STAGE = Stage(name="one", steps=24, batch_size=16, source=Rows, lr=0.02, schedule=Cosine(warmup=3), weight_decay=0.1)
PLAIN = Run(name="toy", header=HEADER, model=Toy, stages=[STAGE])


def run() -> Run:
    """Two stages, everything random, an average of the weights, and an evaluation."""
    first = replace(STAGE, source=lambda: Rows(noise=0.1), accumulate=2, ema=0.9)
    second = replace(first, name="two", steps=12, lr=0.005, trainable={"b": 0.5, "scale": 1.0}, ema=None, accumulate=1)
    return replace(
        PLAIN,
        model=Noisy,
        stages=[first, second],
        evaluate=score,
        evaluate_every=10,
        expect={"score": Bar(value=-0.5, chance=-4.0)},
    )
