"""The table-top from pixels and language: put the thing that is named on the plate that is named.

command   polymodal train recipes/nano/pick_place.py --out runs/nano-pick-place
machine   1 CPU core
time      75 minutes: 10 record, 60 train, the rest tries it out
expected  see `BARS`; in closed loop, in scenes and wordings that were never shown. Not reached: docs/decisions.md 71

As `recipes.nano.reach`, and the two plates look alike: only their places say which is the left one. Some 2.4 GB of
pictures are kept in memory, and twice as many while they are recorded.
"""

from __future__ import annotations

from typing import Final

from polymodal.encoders.trunk import PixelTrunk
from polymodal.train.run import Bar, Cosine, Header, Run, Stage
from recipes.nano.acting import Cloning

PICK_PLACE: Final = Cloning(
    task="tabletop/pick-place",
    trunk=PixelTrunk(cameras=("front", "wrist"), image_size=48, channels=48, keypoints=48, state_width=4),
    episodes=5000, noise=0.2, horizon=8, execute=4,
)  # fmt: skip
BARS: Final = {  # set before the first run
    "new wordings": Bar(value=0.8),
    "new combinations": Bar(value=0.6),
    "swapped, told of normal": Bar(value=0.9),
    "swapped, shown left alone": Bar(value=0.95),
}


def run(cloning: Cloning = PICK_PLACE, *, steps: int = 15_000, batch_size: int = 128) -> Run:
    return Run(
        name="nano-pick-place",
        header=Header(
            command="polymodal train recipes/nano/pick_place.py --out runs/nano-pick-place",
            machine="1 CPU core", time="75 minutes", expected="new wordings 0.80",
        ),
        model=cloning.policy,
        stages=[
            Stage(
                name="clone", steps=steps, batch_size=batch_size, source=cloning.lessons, lr=2e-3,
                schedule=Cosine(warmup=min(200, steps // 10)), weight_decay=1e-4, betas=(0.9, 0.95), ema=0.995,
                precision="auto", workers=0,
            )
        ],
        evaluate=cloning.trials,
        expect=BARS,
    )  # fmt: skip
