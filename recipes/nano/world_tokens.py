"""IRIS of under a million parameters: it writes the codes of the frames that a shape's actions lead to.

A first stage teaches the tokenizer, a second one the Transformer, which the tokenizer learns nothing from.

command   polymodal train recipes/nano/world_tokens.py --out runs/nano-iris
machine   1 CPU core
time      not yet run to its end
expected  see `worlds.BARS`: after a second nearer to the truth than the last frame and than a linear predictor; other
          actions lead elsewhere, and where the world would go
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from torch import nn

from polymodal.backbones.decoder import AttentionConfig, DecoderConfig, Gated
from polymodal.core.batch import Batch, Loss
from polymodal.evaluate.pictures import psnr
from polymodal.nn.norm import RMS
from polymodal.nn.rope import Rope
from polymodal.systems.iris import Iris, IrisConfig
from polymodal.tokenizers.fsq import FiniteCodes
from polymodal.tokenizers.pyramid import PlainConfig
from polymodal.tokenizers.vq import VQConfig
from polymodal.train.run import Cosine, Header, Run, Stage
from recipes.nano import worlds
from recipes.nano.learners import Around

STEPS, ROWS = (2000, 2500), (64, 16)  # of frames, of films
VISION = VQConfig(
    net=PlainConfig(latent_dim=64, num_halvings=3), codes=FiniteCodes(levels=(8, 5, 5, 5)), resolution=worlds.SIZE
)
CONFIG = IrisConfig(
    vision=VISION, action_scale=worlds.SCALE, moments=worlds.LENGTH,
    backbone=DecoderConfig(
        vocab_size=VISION.codes.size, context=worlds.LENGTH * (VISION.num_codes + 1), dim=96, num_layers=4,
        attention=AttentionConfig(num_heads=3, num_kv_heads=3, head_dim=32, qk_norm=RMS()),
        mlp=Gated(hidden_dim=256), norm=RMS(), position=Rope(sections=(6, 5, 5)),
    ),
)  # fmt: skip


class Learner(Around):
    """An Iris, whose tokenizer learns from ``pixels`` alone, and the rest from films."""

    inner = "world"

    def __init__(self, world: Iris) -> None:
        super().__init__()
        self.world = world
        world.vision.requires_grad_(True)  # the first stage trains it; the second one names what it trains

    def loss(self, batch: Batch) -> Loss:
        if "pixels" not in batch:
            return self.world.loss(batch)
        made, coded = self.world.vision(batch["pixels"])
        return Loss(total=batch.size * (F.l1_loss(made, batch["pixels"]) + coded.penalty), weight=batch.size)


@dataclass(frozen=True)
class Frames:
    """A frame of each film."""

    films: int

    def __len__(self) -> int:
        return self.films

    def batch(self, indices: Sequence[int], rng: np.random.Generator) -> Batch:
        shown = [worlds.film(int(index))[0][rng.integers(worlds.LENGTH)][None] for index in indices]
        return Batch(pixels=worlds.pixels(shown)[:, 0] * 2 - 1)


def model() -> Learner:
    return Learner(Iris.build(CONFIG))


def evaluate(trained: nn.Module, count: int = worlds.JUDGED) -> dict[str, float]:
    """`worlds.evaluate`, and the decibels of the tokenizer alone, which nothing can be better than."""
    world = trained.world if isinstance(trained, Learner) else trained
    assert isinstance(world, Iris)
    return worlds.evaluate(world, count) | {"tokens": decibels(world, count)}


def decibels(model: Iris, count: int) -> float:
    """Of held-out frames that went through a tokenizer alone."""
    frames = worlds.asked(count).frames[:, ::5]
    again = model.paint(model.codes(frames * 2 - 1)) / 2 + 0.5
    return float(psnr(again.clamp(0, 1).flatten(0, 1), frames.flatten(0, 1)).mean())


def run(
    steps: tuple[int, int] = STEPS, *, rows: tuple[int, int] = ROWS, films: int = worlds.FILMS,
    asked: int = worlds.JUDGED,
) -> Run:  # fmt: skip
    return Run(
        name="nano-iris",
        header=Header(
            command="polymodal train recipes/nano/world_tokens.py --out runs/nano-iris",
            machine="1 CPU core", time="not yet run to its end",
            expected="more decibels after a second than copy-last and a linear predictor; other actions, other futures",
        ),
        model=model,
        stages=[
            Stage(
                name="tokenize", steps=steps[0], batch_size=rows[0], source=lambda: Frames(films), lr=2e-3,
                schedule=Cosine(warmup=min(50, steps[0]), final=0.02), trainable={"world.vision": 1.0}, ema=0.995,
                workers=1,
            ),
            Stage(
                name="foresee", steps=steps[1], batch_size=rows[1],
                source=lambda: worlds.Windows(Iris.build(CONFIG), worlds.LENGTH, films), lr=2e-3,
                schedule=Cosine(warmup=min(50, steps[1]), final=0.02), precision="auto",
                trainable={"world.backbone": 1.0, "world.act": 1.0}, weight_decay=0.01, ema=0.995, workers=1,
            ),
        ],
        evaluate=functools.partial(evaluate, count=asked),
        expect=worlds.BARS,
    )  # fmt: skip
