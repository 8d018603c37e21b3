"""DIAMOND of half a million parameters: it foresees where a shape goes that is moved by actions.

command   polymodal train recipes/nano/world_diffusion.py --out runs/nano-diamond
machine   1 CPU core
time      not yet run to its end (a step: 0.2 CPU-seconds); half of it beat neither baseline (docs/decisions.md 68)
expected  see `worlds.BARS`: after a second nearer to the truth than the last frame and than a linear predictor; other
          actions lead elsewhere, and where the world would go
"""

from __future__ import annotations

import functools

from polymodal.backbones.adaptive_unet import AdaptiveUNetConfig
from polymodal.systems.diamond import Diamond, DiamondConfig
from polymodal.train.run import Cosine, Header, Run, Stage
from recipes.nano import worlds

STEPS, ROWS = 1500, 32
LEARNED = 1  # frames behind the history, of which the second and later ones are told the model's own
CONFIG = DiamondConfig(
    backbone=AdaptiveUNetConfig(
        in_channels=3 * (worlds.CONTEXT + 1), widths=(16, 32, 48), blocks=(1, 1, 1), condition_dim=64, group=8
    ),
    action_scale=worlds.SCALE, width=worlds.SIZE, height=worlds.SIZE, history=worlds.CONTEXT,
)  # fmt: skip


def model() -> Diamond:
    return Diamond.build(CONFIG)


def run(steps: int = STEPS, *, rows: int = ROWS, films: int = worlds.FILMS, asked: int = worlds.JUDGED) -> Run:
    return Run(
        name="nano-diamond",
        header=Header(
            command="polymodal train recipes/nano/world_diffusion.py --out runs/nano-diamond",
            machine="1 CPU core", time="not yet run to its end",
            expected="more decibels after a second than copy-last and a linear predictor; other actions, other futures",
        ),
        model=model,
        stages=[
            Stage(
                name="foresee", steps=steps, batch_size=rows,
                source=lambda: worlds.Windows(model(), worlds.CONTEXT + LEARNED, films),
                lr=2e-3, schedule=Cosine(warmup=min(50, steps), final=0.02), weight_decay=0.01, precision="auto",
                ema=0.995, workers=1,
            )
        ],
        evaluate=functools.partial(worlds.evaluate, count=asked),
        expect=worlds.BARS,
    )  # fmt: skip
