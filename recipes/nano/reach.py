"""The table-top from pixels and language: touch the thing that is named, among three others.

command   polymodal train recipes/nano/reach.py --out runs/nano-reach
machine   1 CPU core
time      5 minutes: 1 records, 3 train, and the rest tries it out
expected  see `BARS`; in closed loop, in scenes and wordings that were never shown

Two colours meet two kinds of things in each scene: neither says alone which of the four is meant. A thing whose
colour and kind were never told together ("new combinations") is missed: nine pairs are learned as nine things.
"""

from __future__ import annotations

from typing import Final

from polymodal.encoders.trunk import PixelTrunk
from polymodal.train.run import Bar, Cosine, Header, Run, Stage
from recipes.nano.acting import Cloning

REACH: Final = Cloning(
    task="tabletop/reach",
    trunk=PixelTrunk(
        cameras=("front",), image_size=48, channels=32, keypoints=32, state_width=4, dim=128, num_layers=2
    ),
    episodes=4000, noise=0.5, horizon=8, execute=2,
)  # fmt: skip
BARS: Final = {  # set before the first run
    "new wordings": Bar(value=0.95, chance=0.25),
    "swapped, told of normal": Bar(value=0.9),
    "swapped, shown left alone": Bar(value=0.95),
}


def run(cloning: Cloning = REACH, *, steps: int = 2400, batch_size: int = 128) -> Run:
    return Run(
        name="nano-reach",
        header=Header(
            command="polymodal train recipes/nano/reach.py --out runs/nano-reach",
            machine="1 CPU core", time="5 minutes", expected="new wordings 0.95",
        ),
        model=cloning.policy,
        stages=[
            Stage(
                name="clone", steps=steps, batch_size=batch_size, source=cloning.lessons, lr=2e-3,
                schedule=Cosine(warmup=min(100, steps // 10)), weight_decay=1e-4, betas=(0.9, 0.95), ema=0.99,
                precision="auto", workers=0,
            )
        ],
        evaluate=cloning.trials,
        expect=BARS,
    )  # fmt: skip
