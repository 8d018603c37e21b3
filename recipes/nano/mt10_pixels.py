"""Ten tasks of Meta-World from two cameras and their words: one small trunk of convolutions, any head.

command   polymodal train recipes/nano/mt10_pixels.py --out runs/nano-mt10-pixels
machine   1 CPU core
time      half an hour: 12 minutes record, 10 train, and the rest tries it out
expected  see `BARS`; in closed loop, told in words that were never trained

As `recipes.nano.mt10`, but of the state the hand's place and opening alone are read: where things and goals are is to
be seen. ``run(head=Flow())`` trains another head; all share the demonstrations, the trunk and the budget.
"""

from __future__ import annotations

from typing import Final

from torch import nn

from polymodal.encoders.trunk import PixelTrunk
from polymodal.systems.behaviour import BehaviourCloning
from polymodal.systems.chunk_heads import L1, Head
from polymodal.train.run import Bar, Cosine, Header, Run, Stage
from recipes.nano.acting import Demonstrations, Lessons, framed, fresh
from recipes.nano.mt10 import HORIZON, demonstrations, succeed

TRUNK: Final = PixelTrunk(cameras=("zoom", "wrist"), image_size=48, channels=32, keypoints=32, state_width=4)
STEPS: Final = 2600  # ten minutes of a core without AVX-512
BARS: Final = {"new wordings": Bar(value=0.75)}  # set before the first run


def shown() -> Demonstrations:
    return demonstrations(cameras=TRUNK.cameras, size=TRUNK.image_size)


def policy(head: Head) -> BehaviourCloning:
    """A fresh one that knows the robot and the words of the demonstrations."""
    return fresh("metaworld", shown(), TRUNK, head, HORIZON)


def evaluate(model: nn.Module) -> dict[str, float]:
    assert isinstance(model, BehaviourCloning)
    return {"new wordings": succeed(model, reworded=True, cameras=TRUNK.cameras, size=TRUNK.image_size)}


def run(head: Head | None = None, steps: int = STEPS) -> Run:
    head = L1() if head is None else head
    return Run(
        name="nano-mt10-pixels",
        header=Header(
            command="polymodal train recipes/nano/mt10_pixels.py --out runs/nano-mt10-pixels",
            machine="1 CPU core", time="half an hour", expected="new wordings 0.75",
        ),
        model=lambda: policy(head),
        stages=[
            Stage(
                name="clone", steps=steps, batch_size=128, lr=2e-3,
                source=lambda: Lessons(policy(head), shown(), framed),
                schedule=Cosine(warmup=min(100, steps // 10)), weight_decay=1e-4, betas=(0.9, 0.95), clip=1.0, ema=0.99,
                precision="auto", workers=0,
            )
        ],
        evaluate=evaluate,
        expect=BARS,
    )  # fmt: skip
