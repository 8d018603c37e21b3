"""DiT at five million parameters: one shape in one colour, of the pairs that are seen in training; each is a class.

command   polymodal train recipes/nano/draw_dit.py --out runs/nano-dit
machine   1 CPU core with AVX512-BF16
time      not yet run to its end
expected  not trained to a number yet: the bar was set before any run
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from polymodal.backbones.dit import DiTBackboneConfig
from polymodal.core.batch import Batch
from polymodal.core.drawing import Drawing
from polymodal.data.worlds import prompts
from polymodal.data.worlds.prompts import Prompt
from polymodal.systems.dit import DiT, DiTConfig
from polymodal.train.run import Bar, Run
from recipes.nano.painted import AUTOENCODER, SIDE, drawing_run, stages

LABELS = tuple(" ".join(pair) for pair in prompts.pairs(held_out=False))
DRAWING = Drawing(steps=30, guidance=4.0, seed=0)
EXPECT = {"seen/objects": Bar(value=0.85, chance=1 / len(LABELS))}


def painter() -> DiT:
    side, dim = SIDE // AUTOENCODER.pyramid.factor, 192
    backbone = DiTBackboneConfig(
        latent_size=side, dim=dim, num_layers=6, num_heads=6, hidden_dim=4 * dim, num_classes=len(LABELS)
    )
    return DiT.build(DiTConfig(backbone=backbone, vae=AUTOENCODER, labels=LABELS))


def classes(wanted: Sequence[Prompt], pixels: Tensor) -> Batch:
    return Batch(label=torch.tensor([LABELS.index(" ".join(one.kinds[0])) for one in wanted]))


def asked(count: int) -> list[Prompt]:
    rng = np.random.default_rng(11)
    drawn = [prompts.prompt(rng, kind="one") for _ in range(count)]
    return [replace(one, text=" ".join(one.kinds[0])) for one in drawn]


def run(
    steps: tuple[int, int, int] = (700, 6000, 400), rows: tuple[int, int, int] = (16, 32, 16), *, count: int = 120
) -> Run:
    todo = stages(classes, steps, rows, kind="one", trainable=["painter.backbone"])
    return drawing_run("dit", painter, todo, {"seen": asked(count)}, DRAWING, EXPECT)
