"""Karras et al.'s way from noise to data: the deviation of the noise is the clock, and the data stay as large.

Source: https://arxiv.org/abs/2206.00364; the loop and the solvers are those of `samplers.diffusion`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from polymodal.core.errors import ConfigError
from polymodal.nn.edm import Preconditioning
from polymodal.samplers.diffusion import END, Euler, Heun, Point, Sampler


@dataclass(frozen=True)
class Deviation(Point):
    """``sample + deviation * noise``; the model's answer is scaled as it was in training."""

    deviation: float
    scaling: Preconditioning

    @property
    def signal(self) -> float:
        return 1.0

    @property
    def rest(self) -> float:
        return self.deviation

    @property
    def scale(self) -> float:
        return 1.0

    def read(self, predicted: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        deviation, s = torch.tensor(self.deviation, device=x.device), self.scaling
        sample = s.kept(deviation) * x + s.added(deviation) * predicted
        return sample, (x - sample) / self.deviation


@dataclass(frozen=True, kw_only=True)
class Karras(Sampler):
    """Deviations from ``most`` to ``least``, even in their ``1 / rho``-th powers, and a last step to none."""

    scaling: Preconditioning = field(default_factory=Preconditioning)
    solver: Euler | Heun = field(default_factory=Heun)
    most: float = 80.0
    least: float = 0.002
    rho: float = 7.0
    clip: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.least < self.most or self.rho <= 0:
            raise ConfigError(f"deviations fall from one to a smaller one, which is not none; not {self}")

    def points(self, steps: int) -> list[Deviation]:
        """Where ``steps`` of the solver lead.

        Raises:
            ConfigError: fewer than one.
        """
        if steps < 1:
            raise ConfigError(f"{steps} steps: one at least")
        roots = np.linspace(self.most ** (1 / self.rho), self.least ** (1 / self.rho), steps)
        levels = [Deviation(d, d, self.scaling) for d in (roots**self.rho).tolist()]
        return [*levels, Deviation(END, 0.0, self.scaling)]
