"""How unlike its training data is what a robot sees and does: Gaussians, calibrated on held-out episodes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
from jaxtyping import Float, UInt8

from polymodal.act.limits import Limits
from polymodal.core.errors import ConfigError, DataError
from polymodal.core.files import atomic_path
from polymodal.core.observation import Observation

GRID: Final = 8  # cells of a picture along each side
FOLDS: Final = 3
_AXES: Final = 32
_MOST_ROWS: Final = 3000
_FEWEST: Final = 12
_FORMAT: Final = "polymodal-novelty-1"


def is_picture(value: Any) -> bool:
    """Whether it is what `thumbnail` takes."""
    return isinstance(value, np.ndarray) and value.ndim == 3 and value.shape[-1] == 3 and value.size > 0


def thumbnail(image: UInt8[np.ndarray, "height width 3"]) -> Float[np.ndarray, " features"]:
    """The mean colour of each cell of a grid, in 0..255. Pictures smaller than the grid repeat pixels."""
    for axis in (0, 1):
        edges = np.linspace(0, image.shape[axis], GRID + 1).astype(int)
        sums = np.add.reduceat(image, edges[:-1], axis=axis, dtype=np.float32)
        shape = [1, 1, 1]
        shape[axis] = GRID
        image = sums / np.maximum(np.diff(edges), 1).reshape(shape)
    return image.ravel()


@dataclass(frozen=True, kw_only=True, eq=False)
class Gaussian:
    """Vectors as their strongest directions and what is left.

    An odd whole shows in the Mahalanobis distance along the directions, an odd combination in the energy of what is
    left, one odd cell in its largest part. ``worst`` is how far these three go in normal episodes.
    """

    mean: Float[np.ndarray, " dim"]
    scale: Float[np.ndarray, " dim"]
    axes: Float[np.ndarray, "axes dim"]
    spread: Float[np.ndarray, " axes"]
    left: Float[np.ndarray, " dim"]  # the standard deviation of what is left
    worst: Float[np.ndarray, " 3"]

    @classmethod
    def fit(cls, episodes: Sequence[Float[np.ndarray, "_ dim"]], *, floor: float) -> Gaussian:
        """To the vectors of some episodes, each of which in turn also serves as a new one, to see how odd those are.

        Args:
            episodes: at least `FOLDS`.
            floor: the least standard deviation that is believed, in the unit of the vectors.
        """
        maxima = []
        for fold in range(FOLDS):
            known = cls._fit(np.concatenate([e for n, e in enumerate(episodes) if n % FOLDS != fold]), floor)
            maxima += [known.oddness(e).max(0) for e in episodes[fold::FOLDS]]
        return replace(cls._fit(np.concatenate(episodes), floor), worst=tail(np.array(maxima)))

    @classmethod
    def _fit(cls, rows: Float[np.ndarray, "rows dim"], floor: float) -> Gaussian:
        rows = rows[:: len(rows) // _MOST_ROWS + 1]
        mean, scale = rows.mean(0), np.maximum(rows.std(0), floor)
        z = (rows - mean) / scale
        _, values, directions = np.linalg.svd(z, full_matrices=False)
        axes = min(_AXES, len(rows) // 8 + 1, len(directions))
        spread, directions = np.maximum(values[:axes] / np.sqrt(len(rows)), 1e-2), directions[:axes]
        left = np.maximum((z - z @ directions.T @ directions).std(0), 0.05)
        return cls(mean=mean, scale=scale, axes=directions, spread=spread, left=left, worst=np.ones(3))

    def oddness(self, x: Float[np.ndarray, "*rows dim"]) -> Float[np.ndarray, "*rows 3"]:
        """The three distances, not yet measured by ``worst``."""
        z = (x - self.mean) / self.scale
        along = z @ self.axes.T
        left = ((z - along @ self.axes) / self.left) ** 2
        return np.sqrt(np.stack([((along / self.spread) ** 2).mean(-1), left.mean(-1), left.max(-1)], -1))

    def score(self, x: Float[np.ndarray, " dim"]) -> float:
        """Above 1 is odder than normal episodes get."""
        return float((self.oddness(x) / self.worst).max())


def tail(maxima: Float[np.ndarray, "episodes *rest"], share: float = 0.002) -> Float[np.ndarray, "*rest"]:
    """What the maximum of so small a share of episodes exceeds: a Gumbel distribution, by its moments."""
    beta = maxima.std(0, ddof=1) * np.sqrt(6) / np.pi
    return np.maximum(maxima.mean(0) + beta * (-np.log(-np.log1p(-share)) - np.euler_gamma), maxima.max(0))


@dataclass(frozen=True, kw_only=True, eq=False)
class Novelty:
    """What is known of the training data. Scores above 1 are odder than normal episodes get.

    Attributes:
        cameras: in the order of the features.
        still: for each camera how far the state moves at most while its picture stays the same, in standard deviations
            (ticks, for a robot without a state).
        contrast: the least standard deviation of each camera's pixels.
        limits: with the rates of motion of the same episodes.
    """

    cameras: tuple[str, ...]
    sight: Gaussian
    motion: Gaussian
    still: Float[np.ndarray, " cameras"]
    contrast: Float[np.ndarray, " cameras"]
    state_scale: Float[np.ndarray, " state_dim"]
    limits: Limits | None = None

    @classmethod
    def fit(
        cls,
        episodes: Sequence[Sequence[Observation]],
        actions: Sequence[Float[np.ndarray, "_ dim"]],
        limits: Limits | None = None,
    ) -> Novelty:
        """From demonstrations, or from any episodes that went well.

        Raises:
            DataError: there are fewer than twelve, one has a single step, or their cameras differ.
        """
        if len(episodes) < _FEWEST or len(actions) != len(episodes):
            raise DataError(f"to know what is normal takes {_FEWEST} episodes with their actions, not {len(episodes)}")
        if min(map(len, actions)) < 2:
            raise DataError("an episode of less than two steps does not tell how a robot moves: leave it out")
        cameras = tuple(episodes[0][0].images)
        if any(tuple(sorted(o.images)) != tuple(sorted(cameras)) for episode in episodes for o in episode):
            raise DataError(f"some observations have other cameras than {', '.join(cameras)}")
        states = [o.state for episode in episodes for o in episode if o.state is not None]
        scale = np.maximum(np.std(states, axis=0), 1e-4).astype(np.float64) if states else np.ones(0)
        features = [np.stack([_features(o, cameras, scale) for o in episode]) for episode in episodes]
        steps = [np.stack([_step(a, b) for a, b in zip(rows[1:], rows[:-1], strict=True)]) for rows in actions]
        still = np.array([[_stillness(episode, name, scale) for name in cameras] for episode in episodes])
        return cls(
            cameras=cameras,
            sight=Gaussian.fit(features, floor=1.0),
            motion=Gaussian.fit(steps, floor=max(1e-4, 0.02 * float(np.concatenate(list(actions)).std()))),
            still=tail(still),
            contrast=np.array([min(float(o.images[name].std()) for e in episodes for o in e) for name in cameras]),
            state_scale=scale,
            limits=limits,
        )

    def score(self, observation: Observation) -> float:
        """Of what is seen; infinite where a camera or the state is missing, or a picture is none."""
        missing = not all(is_picture(observation.images.get(name)) for name in self.cameras)
        if missing or np.size(observation.state if observation.state is not None else ()) != len(self.state_scale):
            return float("inf")
        return self.sight.score(_features(observation, self.cameras, self.state_scale))

    def action_score(self, action: Float[np.ndarray, " dim"], before: Float[np.ndarray, " dim"]) -> float:
        """Of an action after the one before it."""
        return self.motion.score(_step(action, before))

    def moved(self, now: Observation, before: Observation) -> float:
        """How far the robot moved, as ``still`` has it."""
        return _moved(now, before, self.state_scale)

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, whole or not at all."""
        from safetensors.numpy import save_file

        arrays = {f"{part}.{n}": v for part in ("sight", "motion") for n, v in vars(getattr(self, part)).items()}
        arrays |= {name: getattr(self, name) for name in ("still", "contrast", "state_scale")}
        limits = None if self.limits is None else self.limits.to_json()
        about = {"format": _FORMAT, "cameras": json.dumps(self.cameras), "limits": json.dumps(limits)}
        with atomic_path(path) as temporary:
            save_file({n: np.ascontiguousarray(v, np.float64) for n, v in arrays.items()}, temporary, metadata=about)

    @classmethod
    def load(cls, path: str | Path) -> Novelty:
        """What `save` wrote.

        Raises:
            ConfigError: there is no such file, or it is something else.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                about = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from None
        if about.get("format") != _FORMAT:
            raise ConfigError(f"{path} does not say what is normal for a robot (polymodal act --fit-guard writes it)")
        if broken := sorted(n for n, v in arrays.items() if not np.isfinite(v).all()):
            raise ConfigError(f"{path} is broken: {', '.join(broken)} are not finite")  # nothing would be odd
        parts: dict[str, Mapping[str, np.ndarray]] = {
            part: {n.partition(".")[2]: v for n, v in arrays.items() if n.startswith(f"{part}.")}
            for part in ("sight", "motion")
        }
        rest: dict[str, Any] = {n: v for n, v in arrays.items() if "." not in n}
        sight, motion = (Gaussian(**of) for of in parts.values())
        limits = json.loads(about["limits"])
        return cls(
            cameras=tuple(json.loads(about["cameras"])),
            sight=sight,
            motion=motion,
            limits=None if limits is None else Limits.from_json(limits),
            **rest,
        )


def _features(observation: Observation, cameras: Sequence[str], state_scale: np.ndarray) -> np.ndarray:
    parts = [thumbnail(observation.images[name]) for name in cameras]
    if len(state_scale):
        assert observation.state is not None
        parts.append(observation.state / state_scale * 16)  # a standard deviation weighs as much as one of a cell
    return np.concatenate(parts).astype(np.float64)


def _step(action: np.ndarray, before: np.ndarray) -> np.ndarray:
    return np.concatenate([action, action - before]).astype(np.float64)


def _moved(now: Observation, before: Observation, state_scale: np.ndarray) -> float:
    if now.state is None or before.state is None or not len(state_scale):
        return 1.0
    return float((np.abs(now.state - before.state) / state_scale).max())


def _stillness(episode: Sequence[Observation], camera: str, state_scale: np.ndarray) -> float:
    longest = way = 0.0
    for before, now in pairwise(episode):
        same = np.array_equal(before.images[camera], now.images[camera])
        way = way + _moved(now, before, state_scale) if same else 0.0
        longest = max(longest, way)
    return longest
