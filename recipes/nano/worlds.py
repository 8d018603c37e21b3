"""What the nano world models share: films of shapes of which one is moved by actions, and how foresight is judged.

Trained on motions of `data.worlds.clips` and on wanderings, none of which goes where the held-out split has shapes of
their colour go. Judged on motions that go there from the first frame to the last. A second is eight frames.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor, nn

from polymodal.act.planning import InImagination, Planner, Search
from polymodal.core.batch import Batch
from polymodal.core.observation import Observation
from polymodal.core.verbs import Imagines
from polymodal.data.worlds import clips
from polymodal.evaluate.rollouts import Growth, Linear, copy_last, counterfactual, growth
from polymodal.modalities.generated import to_uint8
from polymodal.systems.imagining import WorldModel
from polymodal.train.run import Bar

SIZE, FPS = 32, 8
CONTEXT, FUTURE = 4, 12
LENGTH = CONTEXT + FUTURE
SCALE: Final = (0.03, 0.03)  # of an action, in sides of the picture
FASTEST: Final = 0.06
FILMS = 1500  # that are rendered for training
JUDGED = 60  # held-out films
AT_ONCE = 20
DRIVEN, STEPS = 4, 7  # films in which a shape is driven to a goal, in so many steps
FITTED = 40  # films that the linear predictor is fitted to
BARS = {
    "copy/least": Bar(value=0.0), "linear/least": Bar(value=0.0), "nearer/least": Bar(value=0.8, chance=0.5),
    "response": Bar(value=1.5, chance=1.0),
}  # fmt: skip


def wandering(rng: np.random.Generator, colour: str) -> Float32[np.ndarray, "steps 2"]:
    """Actions of a few steps each, some of none, but never in the direction that is held out for the colour."""
    out = np.zeros((LENGTH - 1, 2), np.float32)
    start = 0
    while start < len(out):
        size = int(rng.integers(2, 6))
        out[start : start + size] = rng.uniform(-FASTEST, FASTEST, 2) * (rng.random() < 0.85)
        start += size
    for name, sign in clips.DIRECTIONS.items():
        if (colour, name) in clips.HELD_OUT:
            axis = int(sign[1] != 0)
            out[:, axis] = np.where(out[:, axis] * sign[axis] > 0, -out[:, axis], out[:, axis])
    return out


@functools.lru_cache(maxsize=FILMS)
def film(index: int) -> tuple[UInt8[np.ndarray, "time size size 3"], Float32[np.ndarray, "steps 2"]]:
    """A film to learn from, and its actions: every second one is of a shape that wanders."""
    clip = clips.item("train", index, frames=LENGTH, size=SIZE, legs=3)
    if index % 2:
        return clip.frames, clip.actions
    actions = wandering(np.random.default_rng([index, 1]), clip.start.things[0].colour)
    return clip.under(actions), actions


def pixels(films: Sequence[UInt8[np.ndarray, "time size size 3"]]) -> Float[Tensor, "films time 3 size size"]:
    return torch.from_numpy(np.stack(films)).permute(0, 1, 4, 2, 3).float() / 255


@dataclass(frozen=True)
class Windows:
    """So many frames from anywhere in a film, for a model."""

    model: WorldModel
    frames: int
    films: int = FILMS

    def __len__(self) -> int:
        return self.films

    def batch(self, indices: Sequence[int], rng: np.random.Generator) -> Batch:
        rows = []
        for index in indices:
            shown, actions = film(int(index))
            start = int(rng.integers(LENGTH - self.frames + 1))
            rows.append((shown[start : start + self.frames], actions[start : start + self.frames - 1]))
        shown, actions = zip(*rows, strict=True)
        return self.model.lesson(pixels(shown), torch.from_numpy(np.stack(actions)))


# ---- the judge


@dataclass(frozen=True, eq=False)
class Asked:
    """Held-out films, and what they would be if their shape went back from the last frame that is shown on.

    Back is a direction that training has: what is held out is foreseen in ``frames`` alone.
    """

    frames: Float[Tensor, "films time 3 size size"]
    actions: Float[Tensor, "films steps 2"]
    instead: Float[Tensor, "films time 3 size size"]
    others: Float[Tensor, "films steps 2"]


@functools.lru_cache(maxsize=2)
def asked(count: int) -> Asked:
    """Of the split ``unseen``, with one leg: the first shape never goes where its colour was learned to go.

    What is done never changes in its films: a model that is deaf to actions is found out by the others alone.
    """
    shown = [clips.item("unseen", index, frames=LENGTH, size=SIZE, legs=1) for index in range(count)]
    others = [clip.actions.copy() for clip in shown]
    for each in others:
        each[CONTEXT - 1 :] *= -1  # back
    return Asked(
        pixels([clip.frames for clip in shown]),
        torch.from_numpy(np.stack([clip.actions for clip in shown])),
        pixels([clip.under(each) for clip, each in zip(shown, others, strict=True)]),
        torch.from_numpy(np.stack(others)),
    )


@functools.lru_cache(maxsize=2)
def beside(count: int) -> dict[str, Growth]:
    """What `copy_last` and a linear predictor make of the held-out films."""
    shown, actions = zip(*(film(index) for index in range(FITTED)), strict=True)
    linear = Linear.fit(pixels(shown), torch.from_numpy(np.stack(actions)))
    ways = {"copy": copy_last, "linear": linear.imagine}
    one = asked(count)
    return {name: growth(way, one.frames, one.actions, context=CONTEXT) for name, way in ways.items()}


def evaluate(trained: nn.Module, count: int = JUDGED) -> dict[str, float]:
    """Decibels after half a second, one and one and a half; gains over both others; other actions; and planning."""
    assert isinstance(trained, Imagines)
    one = asked(count)

    def imagine(frames: Tensor, actions: Tensor, *, seed: int = 0) -> Tensor:
        rows = zip(frames.split(AT_ONCE), actions.split(AT_ONCE), strict=True)
        return torch.cat([trained.imagine(f, a, seed=seed + n * AT_ONCE) for n, (f, a) in enumerate(rows)])

    ours = growth(imagine, one.frames, one.actions, context=CONTEXT)
    told = counterfactual(imagine, one.frames, one.actions, one.instead, one.others, context=CONTEXT)
    out = {}
    for name, way in {"": ours, **{f"{name}/": way for name, way in beside(count).items()}}.items():
        for step in (1, FPS // 2, FPS, FUTURE):
            out[f"{name}psnr/{step}"] = float(way.psnr[:, step - 1].mean())
        out[f"{name}ssim/{FPS}"] = float(way.ssim[:, FPS - 1].mean())
    for name, way in beside(count).items():
        gain = ours.over(way, FPS)
        out |= {f"{name}/gain": gain.value, f"{name}/least": gain.low}
    ways = [driven(trained, 100 * number) for number in range(DRIVEN)]
    out["driven"] = float(np.mean([1 - end / start for start, end in ways]))  # of the way to a goal
    return out | {
        "response": told.response / max(told.spread, 1e-6), "nearer": told.nearer.value,
        "nearer/least": told.nearer.low, "along": told.along.value, "moved": told.response / told.true,
    }  # fmt: skip


def driven(model: Imagines, index: int) -> tuple[float, float]:
    """Plans with a model where a lone shape is to go, and acts in the true world.

    Returns:
        How far from its goal it was at the beginning, and is at the end, in sides of the picture.
    """
    clip = lone(index)
    colour = clip.start.things[0].colour
    start = clips.track(clip.frames[:1], colour)[0]
    goal = np.clip(start + np.where(start < 0.5, 0.25, -0.25), 0.2, 0.8)

    def price(films: Tensor) -> np.ndarray:
        places = np.stack([clips.track(frame[None], colour)[0] for frame in to_uint8(films[:, -1])])
        return np.nan_to_num(np.linalg.norm(places - goal, axis=1), nan=2.0)

    search = Search(low=(-FASTEST,) * 2, high=(FASTEST,) * 2, steps=3, plans=12, rounds=2, best=3, held=3)
    planner, done = Planner(InImagination(model, price, "front"), search), np.zeros((0, 2), np.float32)
    for _ in range(STEPS):
        seen = Observation(images={"front": clip.under(done)[-1]})
        done = np.concatenate([done, planner.action(seen)[None]])
    end = clips.track(clip.under(done)[-1:], colour)[0]
    return float(np.linalg.norm(goal - start)), float(np.linalg.norm(goal - end))


def lone(index: int) -> clips.Clip:
    """A held-out film of one shape."""
    while len((clip := clips.item("unseen", index, frames=LENGTH, size=SIZE)).start.things) > 1:
        index += 1
    return clip
