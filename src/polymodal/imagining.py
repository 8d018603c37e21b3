"""What a world model foresees, beside what really happened: of the world `clips`, or of recorded demonstrations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from PIL import Image as PILImage
from torch import Tensor

from polymodal import __version__
from polymodal.act.film import frame
from polymodal.core.errors import ConfigError, DataError, UnsupportedError
from polymodal.core.observation import Observation
from polymodal.core.verbs import Imagines
from polymodal.data.lerobot import Demonstrations
from polymodal.data.worlds import clips
from polymodal.evaluate.rollouts import Growth, copy_last, growth
from polymodal.films import check_mp4
from polymodal.modalities.generated import to_uint8, write_generated_film
from polymodal.systems.base import System

CLIPS_FPS: Final = 8.0  # of the world `clips`


@dataclass(frozen=True, kw_only=True, eq=False)
class Happened:
    """A film of what really happened.

    Attributes:
        actions: what was done between each two frames.
        name: for people.
    """

    frames: UInt8[np.ndarray, "time height width 3"]
    actions: Float32[np.ndarray, "steps action"]
    fps: float
    name: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Foreseen:
    """What a model made of the first frames of a film and of the actions.

    Attributes:
        context: frames that were shown.
        frames: those that it foresaw, behind these.
        opposite: what it foresees if each action were the opposite one, where that was asked for.
        growth: of its error.
        copied: that of repeating the last frame that was shown.
    """

    happened: Happened
    context: int
    frames: UInt8[np.ndarray, "future height width 3"]
    opposite: UInt8[np.ndarray, "future height width 3"] | None
    growth: Growth
    copied: Growth


def world_model(model: System) -> Imagines:
    """The model, if it foresees.

    Raises:
        UnsupportedError: it does not.
    """
    if not isinstance(model, Imagines):
        raise UnsupportedError(f"{model.source} is a {type(model).__name__}, which foresees nothing; take a Diamond")
    return model


def from_clips(model: Imagines, count: int, *, steps: int, seed: int = 0) -> Iterator[Happened]:
    """Films of the split ``unseen`` of the world `clips`.

    From the first frame to the last, the first shape goes in the direction that is held out for its colour; a second
    one, where there is one, in another, or nowhere. How far it goes does not depend on the number of frames: in a
    longer film it goes more slowly, so that films of two lengths do not measure the same.

    Args:
        model: whose size and history they are for.
        count: of films.
        steps: frames to be foreseen.
        seed: of the first film; the next ones have the numbers behind it.

    Raises:
        ConfigError: the model does not read square frames and the two numbers of that world's actions; no film is
            asked for, or the seed is negative.
    """
    _check(count, seed)
    (width, height), frames = model.size, _context(model) + steps
    if width != height or model.action_dim != 2:
        raise ConfigError(
            f"the world clips has square frames and actions of 2 numbers; this model sees {width} x {height} pixels "
            f"and is told {model.action_dim}: give it the data that it was trained on"
        )
    for index in range(seed, seed + count):
        clip = clips.item("unseen", index, frames=frames, size=width, legs=1)
        yield Happened(frames=clip.frames, actions=clip.actions, fps=CLIPS_FPS, name=clip.caption)


def from_demonstrations(
    model: Imagines, data: Demonstrations, count: int, *, camera: str, steps: int, seed: int = 0
) -> Iterator[Happened]:
    """The beginnings of recorded episodes that are long enough, brought to the model's size; arguments as `from_clips`.

    Raises:
        ConfigError: the actions have another number than the model is told; no film is asked for, or the seed is
            negative.
        DataError: too few episodes are that long.
    """
    _check(count, seed)
    if data.action.shape[1] != model.action_dim:
        raise ConfigError(
            f"actions of {data.action.shape[1]} numbers in {data.folder}, {model.action_dim} in the model"
        )
    length = _context(model) + steps
    long = [start for start, end in data.episodes if end - start >= length]
    if len(long) < seed + count:
        raise DataError(f"{data.folder}: {len(long)} episodes of {length} frames or more; {seed + count} are asked for")
    for start in long[seed : seed + count]:
        seen = [PILImage.fromarray(p) for p in data.pictures(camera, range(start, start + length))]
        frames = np.stack([np.asarray(picture.resize(model.size, PILImage.Resampling.BOX)) for picture in seen])
        told = data.instructions[data.task_index[start]]
        yield Happened(frames=frames, actions=data.action[start : start + length - 1], fps=data.fps, name=told)


def _check(count: int, seed: int) -> None:
    if count < 1 or seed < 0:
        raise ConfigError(f"{count} films from number {seed} on: one at least, and no number is negative")


def _context(model: Imagines) -> int:
    """Frames that are shown: what it makes use of, but a second at the most."""
    return min(model.history, int(CLIPS_FPS))


def foresee(model: Imagines, happened: Happened, *, seed: int = 0, opposite: bool = False) -> Foreseen:
    """Shows the model the beginning of a film and all actions."""
    context = _context(model)
    real = torch.from_numpy(happened.frames.copy()).permute(0, 3, 1, 2)[None].float() / 255
    actions = torch.from_numpy(happened.actions.copy())[None]
    made: list[Tensor] = []

    def imagine(frames: Tensor, actions: Tensor, *, seed: int) -> Tensor:
        made.append(model.imagine(frames, actions, seed=seed))
        return made[-1]

    ours = growth(imagine, real, actions, context=context, seed=seed)
    if opposite:
        imagine(real[:, :context], torch.cat([actions[:, : context - 1], -actions[:, context - 1 :]], 1), seed=seed)
    films = [to_uint8(each[0]) for each in made]
    return Foreseen(
        happened=happened, context=context, frames=films[0], opposite=films[1] if opposite else None, growth=ours,
        copied=growth(copy_last, real, actions, context=context),
    )  # fmt: skip


def write_film(path: str | Path, foreseen: Sequence[Foreseen], model: System) -> Path:
    """All of them one after the other: what happened, what was foreseen, and what would be if the opposite were done.

    The film is marked: a part of it was made by a model.

    Raises:
        MediaError: the name does not end in ``.mp4``.
        MissingDependency: PyAV is not installed.
        OSError: it cannot be written there.
    """
    path = check_mp4(path)
    frames = [np.asarray(picture) for one in foreseen for picture in _side_by_side(one)]
    names = [one.happened.name for one in foreseen]
    write_generated_film(
        path, np.stack(frames), round(foreseen[0].happened.fps), {"foreseen": names, "model": type(model).__name__},
        prompt="; ".join(names), system=type(model).__name__, version=__version__, composite=True,
    )  # fmt: skip
    return path


def _side_by_side(one: Foreseen) -> Iterator[PILImage.Image]:
    for number, real in enumerate(one.happened.frames):
        later = number - one.context
        views = {"happened": real, "foreseen": real if later < 0 else one.frames[later]}
        if one.opposite is not None:
            views["opposite"] = real if later < 0 else one.opposite[later]
        how = "shown" if later < 0 else f"foreseen: {float(one.growth.psnr[0, later]):.1f} dB"
        yield frame(Observation(images=views), [one.happened.name[:80], " | ".join(views), how], len(views))
