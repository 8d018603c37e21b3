"""Demonstrations of an environment's expert, written as a LeRobot data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polymodal.core.errors import DataError
from polymodal.core.files import read_json, write_json
from polymodal.data.lerobot_writer import Episode, Writer

if TYPE_CHECKING:
    from polymodal.act.envs.base import RobotEnv

_MOST_FAILURES = 50  # in a row
_RECORDED = 0x5EED  # keeps the seeds of recorded episodes apart from those that policies are tried on


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """What the data set holds now, and how often the expert failed in this run."""

    episodes: int
    frames: int
    tasks: int
    failed: int


def record(
    env: RobotEnv,
    folder: str | Path,
    *,
    name: str,
    episodes: int,
    seed: int = 0,
    noise: float | int = 0.0,
    lossless: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Recorded:
    """Records until the data set holds so many episodes in which the expert succeeded.

    The n-th attempt is a function of ``seed`` and n alone, so that a run that was interrupted and one that was not
    make the same episodes.

    Args:
        env: what `act.envs.make` gives.
        folder: of the data set; one that was recorded in the same way is added to.
        name: of the environment.
        noise: standard deviation of what is added to the actions that are done, as a part of half their range. The
            expert's own are recorded: a policy learns how it comes back (DART, Laskey et al., 2017).
        lossless: exact films.
        progress: is told (done, wanted) after each episode.

    Raises:
        DataError: the folder holds something else, or the expert fails again and again.
    """
    folder = Path(folder)
    spaces: Any = env.observation_space["images"]  # type: ignore[index]
    sizes = {camera: spaces[camera].shape[:2] for camera in env.cameras}
    how = {
        "environment": name, "seed": seed, "noise": noise, "lossless": lossless,
        "cameras": {camera: list(size) for camera, size in sizes.items()},
    }  # fmt: skip
    note = folder / "meta/recording.json"
    if note.exists() and (before := read_json(note)) != how:
        raise DataError(f"{folder} was recorded otherwise ({before}): record the same, or into another folder")
    writer = Writer(
        folder,
        fps=env.fps,
        cameras=sizes,
        state_names=env.state_names,
        action_names=env.action_names,
        robot=name.partition("/")[0],
        lossless=lossless,
    )
    if writer.rows and not note.exists():
        raise DataError(f"{folder} holds a data set that was not recorded here: take another folder")
    write_json(note, how)
    attempt = 1 + max((row["attempt"] for row in writer.rows), default=-1)
    failed = in_a_row = 0
    with writer:
        while writer.episodes < episodes:
            one = demonstrate(env, [_RECORDED, seed, attempt], noise)
            attempt += 1
            if one is None:
                failed, in_a_row = failed + 1, in_a_row + 1
                if in_a_row == _MOST_FAILURES:
                    raise DataError(f"the expert of {name} failed {in_a_row} times in a row")
                continue
            in_a_row = 0
            writer.add(one)
            if progress is not None:
                progress(writer.episodes, episodes)
    return Recorded(episodes=writer.episodes, frames=writer.frames, tasks=writer.tasks, failed=failed)


def demonstrate(env: RobotEnv, seed: list[int], noise: float | int = 0.0) -> Episode | None:
    """One episode of the expert; None if it did not succeed."""
    rng = np.random.default_rng(seed)
    seen, info = env.reset(seed=int(rng.integers(2**31)))
    expert = env.expert()
    low, high = env.action_space.low, env.action_space.high  # type: ignore[attr-defined]
    rows: list[tuple[dict[str, Any], np.ndarray]] = []
    done = False
    while not done:
        action = expert()
        rows.append((seen, action))
        moved = action + noise * (high - low) / 2 * rng.standard_normal(action.shape) if noise else action
        seen, _, ended, cut, after = env.step(np.clip(moved, low, high))
        done = ended or cut
    if not after["success"]:
        return None
    return Episode(
        task=info["instruction"],
        action=np.stack([action for _, action in rows]).astype(np.float32),
        state=np.stack([seen["state"] for seen, _ in rows]).astype(np.float32),
        images={camera: np.stack([seen["images"][camera] for seen, _ in rows]) for camera in env.cameras},
        extra={"attempt": seed[-1]},
    )
