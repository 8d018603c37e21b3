"""MiniWoB: twelve tasks on web pages from screenshots, by real mouse and keyboard, in a real browser.

command   polymodal train recipes/nano/miniwob.py --out runs/nano-miniwob
machine   1 CPU core
time      10 minutes: 5 record, 2 train, and the rest tries it out
expected  see `BARS`; in closed loop, on pages that were never shown

One policy does all. Five tasks are of one click, two of them told which by a word on the page; grid-coordinate and
focus-text-2 are of places, click-widget and click-color of kinds, and in the last three it types what it is told.
Some 0.25 GB of screenshots are kept in memory.
"""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from functools import cache
from itertools import count, islice
from typing import Final

import numpy as np
from torch import nn

from polymodal.act.envs import make
from polymodal.data.lerobot_writer import Episode
from polymodal.recording import demonstrate
from polymodal.systems.screen import ScreenConfig, ScreenPolicy, spoken
from polymodal.tokenizers.words import split
from polymodal.train.run import Bar, Cosine, Header, Run, Stage
from recipes.nano.acting import Demonstrations, Lessons, tried

TASKS: Final = (
    "click-test-2", "click-dialog", "click-tab", "click-button-sequence", "click-collapsible-nodelay", "click-widget",
    "click-color", "focus-text-2", "grid-coordinate", "enter-text", "enter-password", "login-user",
)  # fmt: skip
EPISODES = 94  # of each task
RARE = 0.005  # a word of fewer instructions is to be typed and not to be known
# Set before the first run, which reached 0.925 of 120 episodes; the least were 0.8.
BARS: Final = {"mean": Bar(value=0.8)}


@cache
def demonstrations(episodes: int = EPISODES, tasks: tuple[str, ...] = TASKS) -> Demonstrations:
    """What the scripts do, of all tasks one after the other."""
    done: list[Episode] = []
    for number, task in enumerate(tasks):
        with closing(make(f"miniwob/{task}")) as env:
            attempts = (demonstrate(env, [number, attempt]) for attempt in count())
            done += islice((one for one in attempts if one is not None), episodes)
    return Demonstrations(
        pictures={"screen": np.concatenate([one.images["screen"] for one in done])},
        states=np.concatenate([one.state for one in done]),
        actions=np.concatenate([one.action for one in done]),
        episode=np.repeat(np.arange(len(done)), [len(one.action) for one in done]),
        told=tuple(one.task for one in done),
    )


def policy(shown: Demonstrations) -> ScreenPolicy:
    """A fresh one that knows the words that instructions have in common."""
    often = Counter(word for told in shown.told for word in set(split(spoken(told))))
    known = sorted(word for word, number in often.items() if number >= RARE * len(shown.told))
    model = ScreenPolicy.build(ScreenConfig(words=tuple(known)))
    model.use_statistics({"miniwob": shown.statistics})
    return model


def run(
    *,
    recorded: int = EPISODES,
    tasks: tuple[str, ...] = TASKS,
    steps: int = 1200,
    batch_size: int = 16,
    episodes: int = 25,
) -> Run:
    def shown() -> Demonstrations:
        return demonstrations(recorded, tasks)

    def trials(model: nn.Module) -> dict[str, float]:
        assert isinstance(model, ScreenPolicy)
        found = {task: tried(model, f"miniwob/{task}", episodes).success.value for task in tasks}
        return {"mean": sum(found.values()) / len(found), **found}

    return Run(
        name="nano-miniwob",
        header=Header(
            command="polymodal train recipes/nano/miniwob.py --out runs/nano-miniwob",
            machine="1 CPU core", time="10 minutes", expected="mean of 12 tasks 0.80",
        ),
        model=lambda: policy(shown()),
        stages=[
            Stage(
                name="clone", steps=steps, batch_size=batch_size, source=lambda: Lessons(policy(shown()), shown()),
                lr=2e-3, schedule=Cosine(warmup=min(200, steps // 10)), weight_decay=1e-2, betas=(0.9, 0.95), ema=0.99,
                precision="auto", workers=0,
            )
        ],
        evaluate=trials,
        expect=BARS,
    )  # fmt: skip
