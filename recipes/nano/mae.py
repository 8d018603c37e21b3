"""MAE of half a million parameters on drawings of lone objects.

command   polymodal train recipes/nano/mae.py --out runs/nano-mae
machine   1 CPU core
time      4 minutes
expected  a linear probe names the shape of 25 % of objects in pairs of colour and shape that were never seen
          (untrained 7 %, chance 12 %) and the colour of 86 % (untrained 56 %); among known pairs 43 % and 86 %
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from polymodal.core.batch import Batch
from polymodal.encoders.vit import ViTConfig
from polymodal.heads.reconstruction import PatchDecoderConfig
from polymodal.modalities.image import IMAGENET_MEAN, IMAGENET_STD, Exact, ImageProcessor
from polymodal.systems.base import Embedder
from polymodal.systems.mae import MAE, MAEConfig
from polymodal.train.run import Bar, Cosine, Header, Run, Stage
from recipes.nano.scenes import CHANCE, Questions, close_up, render

STEPS = 2000
SIZE = 32
CONFIG = MAEConfig(
    vision=ViTConfig(image_size=SIZE, patch_size=4, dim=96, num_layers=4, num_heads=4, hidden_dim=384),
    decoder=PatchDecoderConfig(dim=64, num_layers=1, num_heads=4, hidden_dim=256),
)
IMAGES = ImageProcessor(resize=Exact(height=SIZE, width=SIZE), mean=IMAGENET_MEAN, std=IMAGENET_STD)


def model() -> Embedder:
    return MAE.build(CONFIG)


@dataclass(frozen=True)
class Pictures:
    """A new picture for each row of each step."""

    def __len__(self) -> int:
        return 100_000  # they are drawn when they are asked for: the number only gives an epoch its length

    def batch(self, indices: Sequence[int], rng: np.random.Generator) -> Batch:
        return Batch(pixels=IMAGES.normalise(render([close_up(rng) for _ in indices], SIZE)))


def evaluate(trained: nn.Module) -> dict[str, float]:
    assert isinstance(trained, Embedder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        untrained = model().eval()
    return Questions.draw().compare(trained, untrained, IMAGES, SIZE)


def run(steps: int = STEPS) -> Run:
    return Run(
        name="nano-mae",
        header=Header(
            command="polymodal train recipes/nano/mae.py --out runs/nano-mae",
            machine="1 CPU core", time="4 minutes",
            expected="shape/probe 0.25 (untrained 0.07), colour/probe 0.86 (untrained 0.56), on held-out pairs",
        ),
        model=model,
        stages=[
            Stage(
                name="reconstruct", steps=steps, batch_size=64, source=Pictures, lr=2e-3,
                schedule=Cosine(warmup=steps // 10), weight_decay=0.05, betas=(0.9, 0.95), precision="auto", workers=1,
            )
        ],
        evaluate=evaluate,
        # Set on other pictures of known pairs before anything held out was looked at. The first run, of 1200 steps,
        # missed it with 0.17; only the number of steps was changed.
        expect={"shape/probe": Bar(value=0.20, chance=CHANCE["shape"])},
    )  # fmt: skip
