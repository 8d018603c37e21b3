"""What the systems share that act: statistics, observations, lessons, actions. Not a system itself."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from PIL import Image as PILImage
from torch import Tensor

from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError, MediaError, did_you_mean
from polymodal.core.files import read_json, write_json
from polymodal.core.observation import Observation
from polymodal.modalities.action import Kind, Normaliser, Statistics, without_outliers
from polymodal.modalities.image import ImageProcessor
from polymodal.modalities.stacked import StackedProcessor
from polymodal.systems.base import System

STATISTICS: Final = "dataset_statistics.json"


class Policy(System):
    """Base of the systems that act: the `Acts` protocol over `chunk`.

    A batch has ``pixels`` (batch, cameras, channels, height, width) where there are `cameras`, the normalised ``state``
    where `state_width` is not 0, and what `instruct` makes of the instructions; for training the normalised ``actions``
    and ``actions_valid``. A robot with fewer numbers than the network's widths is padded with zeros, which are learned
    like the others where a policy says nothing else.

    A policy that writes its actions as text is a `Generator`, too: ``class RT2(Policy, Generator)``.
    """

    normalisation: Kind = "quantile"
    horizon: int
    action_width: int  # of the network: at least the robot's
    state_width: int = 0  # 0: the state is not read
    cameras: tuple[str, ...] = ()  # in the order of the network
    history: int = 1  # observations that it looks at: this one and those before it (`Observation.past`)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.statistics: dict[str, dict[str, Statistics]] = {}
        self.dataset: str | None = None

    # -- what subclasses give

    def instruct(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Tensors of the instructions; none for a policy that knows one task only."""
        return {}

    def chunk(
        self, batch: Batch, generator: torch.Generator | None = None
    ) -> Float[Tensor, "batch horizon action_width"]:
        """Normalised actions for what `observe` made, on the model's device."""
        raise NotImplementedError

    # -- statistics

    def use_statistics(self, statistics: Mapping[str, Mapping[str, Statistics]], dataset: str | None = None) -> None:
        """Takes the statistics (``action``, ``state``) of data sets; ``dataset`` is the one whose robot is meant.

        Raises:
            ConfigError: there is no such data set, or a robot has more numbers than the network.
        """
        if dataset is not None and dataset not in statistics:
            raise ConfigError(f"no statistics of a data set {dataset!r}{did_you_mean(dataset, statistics)}")
        for name, each in statistics.items():
            for what, width in (("action", self.action_width), ("state", self.state_width)):
                if what in each and width and each[what].dim > width:
                    raise ConfigError(f"{name} has {each[what].dim} numbers of {what}; the network has {width}")
        self.statistics = {name: dict(each) for name, each in statistics.items()}
        self.dataset = next(iter(statistics)) if dataset is None and len(statistics) == 1 else dataset
        self._fingerprint = None

    def normaliser(self, what: str) -> Normaliser:
        """Of the ``action`` or ``state`` of the data set that is chosen.

        Raises:
            ConfigError: none is chosen, or its statistics are missing: nothing is ever passed on as it is.
        """
        if not self.statistics:
            raise ConfigError(
                f"{type(self).__name__} ({self.source}) has no statistics of its robot: {STATISTICS} is not beside the "
                "weights; give those of the training data (policy.use_statistics)"
            )
        if self.dataset is None or self.dataset not in self.statistics:
            hint = did_you_mean(self.dataset or "", self.statistics)
            raise ConfigError(f"say whose robot it is (policy.dataset), not {self.dataset!r}{hint}")
        if what not in self.statistics[self.dataset]:
            raise ConfigError(f"the statistics of {self.dataset} say nothing of its {what}")
        return Normaliser(statistics=self.statistics[self.dataset][what], kind=self.normalisation)

    @property
    def action_normaliser(self) -> Normaliser:
        return self.normaliser("action")

    @property
    def state_normaliser(self) -> Normaliser:
        return self.normaliser("state")

    @property
    def action_dim(self) -> int:
        """Numbers of one action of the robot."""
        return self.action_normaliser.statistics.dim

    def load_processors(self, folder: Path) -> None:
        super().load_processors(folder)
        if (folder / STATISTICS).is_file():
            self.use_statistics(read_statistics(folder / STATISTICS))

    def save_processors(self, folder: Path) -> None:
        super().save_processors(folder)
        if self.statistics:
            write_json(folder / STATISTICS, self._statistics_json())

    def _statistics_json(self) -> dict[str, Any]:
        return {name: {what: s.to_json() for what, s in each.items()} for name, each in self.statistics.items()}

    @property
    def fingerprint(self) -> str:
        """Hash of the weights, the config, the pre-processing and the robot's statistics."""
        parts = (super().fingerprint, self._statistics_json(), self.dataset)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    # -- acting

    def observe(self, observations: Sequence[Observation]) -> Batch:
        """Pictures, states and instructions as tensors.

        Raises:
            MediaError: a camera is missing, or a state is, or has another length, or numbers that are not finite.
            ConfigError: the statistics are missing.
        """
        out = Batch()
        if self.cameras:
            out["pixels"] = self._pixels(observations)
        if self.state_width:
            out["state"] = _widened(self.states(observations), self.state_width)
        out.update(self.instruct([o.instruction for o in observations]))
        return out

    def states(self, observations: Sequence[Observation]) -> Float[Tensor, "batch state_dim"]:
        """Normalised states, not padded; errors as of `observe`."""
        normaliser = self.state_normaliser
        states = [_state(o, n, normaliser.statistics.dim) for n, o in enumerate(observations)]
        return normaliser.normalise(torch.stack(states))

    def _pixels(self, observations: Sequence[Observation]) -> Float[Tensor, "batch cameras channels height width"]:
        if not isinstance(self.images, ImageProcessor | StackedProcessor):
            raise ConfigError(f"{type(self).__name__} ({self.source}) has no image processor (set policy.images)")
        pictures = [_picture(o, n, camera) for n, o in enumerate(observations) for camera in self.cameras]
        return self.images.from_pil(pictures).unflatten(0, (len(observations), len(self.cameras)))

    def to_network(self, actions: Float[Tensor, "*batch action_dim"]) -> Float[Tensor, "*batch action_width"]:
        """Actions in the robot's units as the network knows them: normalised, padded with zeros."""
        return _widened(self.action_normaliser.normalise(actions), self.action_width)

    def to_robot(self, actions: Float[Tensor, "*batch action_width"]) -> Float[Tensor, "*batch action_dim"]:
        """The inverse of `to_network`, in fp32."""
        return self.action_normaliser.restore(actions[..., : self.action_dim].float())

    def lesson(
        self,
        observations: Sequence[Observation],
        actions: Float[Tensor, "batch horizon action_dim"],
        valid: Bool[Tensor, "batch horizon"],
    ) -> Batch:
        """What `loss` reads: `observe`, the normalised ``actions`` and which of their steps are ``actions_valid``."""
        return Batch(self.observe(observations), actions=self.to_network(actions), actions_valid=valid)

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Without gradients; where weights are bf16, products are, too, whatever pictures, states and noise are."""
        low = any(p.dtype == torch.bfloat16 for p in self.parameters())
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=low):
            yield

    def act(
        self, batch: Batch, *, generator: torch.Generator | None = None
    ) -> Float[Tensor, "batch horizon action_dim"]:
        """Actions in the robot's own units, on the CPU, for what `observe` made."""
        with self.acting():
            return self.to_robot(self.chunk(batch.to(self.device), generator)).cpu()


def _widened(x: Tensor, width: int) -> Tensor:
    return F.pad(x, (0, width - x.shape[-1]))


def _picture(observation: Observation, number: int, camera: str) -> PILImage.Image:
    picture = observation.images.get(camera)
    if picture is None:
        there = ", ".join(observation.images) or "none"
        raise MediaError(f"observation {number}: the policy looks through the camera {camera!r}; there is {there}")
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3 or not picture.size:
        raise MediaError(
            f"observation {number}, {camera}: uint8 (height, width, 3), not {picture.dtype} {picture.shape}"
        )
    return PILImage.fromarray(picture)


def _state(observation: Observation, number: int, dim: int) -> Float[Tensor, " state_dim"]:
    state = observation.state
    if state is None or state.shape != (dim,):
        found = "none" if state is None else f"one of shape {state.shape}"
        raise MediaError(f"observation {number}: the policy reads a state of {dim} numbers; there is {found}")
    if not np.isfinite(state).all():
        raise MediaError(f"observation {number}: its state has numbers that are not finite")
    return torch.from_numpy(state.astype(np.float32))


def read_statistics(path: Path) -> dict[str, dict[str, Statistics]]:
    """Reads ``dataset_statistics.json``, ours or OpenVLA's, or openpi's ``norm_stats.json`` (named after its folder).

    Raises:
        ConfigError: the file is none of these.
    """
    raw = read_json(path)
    if isinstance(raw, Mapping) and raw.keys() == {"norm_stats"}:
        raw = {path.absolute().parent.name: raw["norm_stats"]}
    return parse_statistics(raw, str(path))


def parse_statistics(raw: Any, where: str) -> dict[str, dict[str, Statistics]]:
    """Statistics by data set: ours, or OpenVLA's (in its configs, too: ``norm_stats``)."""
    if not isinstance(raw, Mapping) or not all(isinstance(each, Mapping) for each in raw.values()):
        raise ConfigError(f"{where}: statistics are a table of data sets")
    out: dict[str, dict[str, Statistics]] = {}
    for name, each in raw.items():
        out[name] = {}
        for theirs, entry in each.items():
            if theirs in _COUNTS:
                continue
            if theirs not in _NAMES:
                raise ConfigError(f"{where}: {name} has {theirs!r}, which is none of {', '.join(_NAMES)}")
            try:
                s = Statistics.from_json(entry)
            except ConfigError as error:
                raise ConfigError(f"{where}: {name}, {theirs}: {error}") from None
            if "num_transitions" in each:  # OpenVLA's: it clips at the quantiles
                s = without_outliers(replace(s, count=int(each["num_transitions"])))
            out[name][_NAMES[theirs]] = s
    return out


_NAMES: Final = {"action": "action", "actions": "action", "state": "state", "proprio": "state"}
_COUNTS: Final = ("num_transitions", "num_trajectories")
