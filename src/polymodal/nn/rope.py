"""Rotary positions: frequencies, their scalings for longer contexts, and several axes (M-RoPE).

Source: Su et al., "RoFormer", 2021, https://arxiv.org/abs/2104.09864. Vectors are rotated in halves, as the Hub stores
them: dimension ``i`` goes with ``i + head_dim / 2``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from polymodal.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Positions divided by ``factor`` (position interpolation)."""

    factor: float

    def apply(self, frequencies: Tensor, theta: float) -> tuple[Tensor, float]:
        return frequencies / self.factor, 1.0


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1: low frequencies are divided, high ones kept, those between blended."""

    factor: float
    low: float
    high: float
    original: int  # context that the model was first trained with

    def apply(self, frequencies: Tensor, theta: float) -> tuple[Tensor, float]:
        waves = self.original * frequencies / (2 * math.pi)  # turns within the original context
        blend = ((waves - self.low) / (self.high - self.low)).clamp(0, 1)
        return (1 - blend) * frequencies / self.factor + blend * frequencies, 1.0


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN: a ramp over dimensions between interpolation and the original, and hotter attention.

    Source: Peng et al. 2023, https://arxiv.org/abs/2309.00071. ``attention`` None is the paper's 0.1 ln(factor) + 1.
    """

    factor: float
    original: int
    fast: float = 32.0
    slow: float = 1.0
    attention: float | None = None

    def apply(self, frequencies: Tensor, theta: float) -> tuple[Tensor, float]:
        dim = 2 * len(frequencies)

        def index(turns: float) -> float:
            return dim * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low = max(math.floor(index(self.fast)), 0)
        high = min(math.ceil(index(self.slow)), dim - 1)
        ramp = (torch.arange(dim // 2, dtype=torch.float32, device=frequencies.device) - low) / max(high - low, 0.001)
        keep = 1 - ramp.clamp(0, 1)
        scaled = frequencies / self.factor * (1 - keep) + frequencies * keep
        attention = 0.1 * math.log(self.factor) + 1.0 if self.attention is None else self.attention
        return scaled, attention if self.factor > 1 else 1.0


@dataclass(frozen=True, kw_only=True)
class LongScaling:
    """LongRoPE (Phi-3): one divisor a frequency, another list beyond the original context.

    Which list applies is decided once for all that is read together: by its longest position, or by the most tokens
    that a cache can hold. The reference decides at each step, and makes the cache anew when it changes its mind.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original: int
    factor: float  # extended context over the original one

    def __post_init__(self) -> None:
        if len(self.short) != len(self.long):
            raise ConfigError(f"LongRoPE has {len(self.short)} short and {len(self.long)} long factors")

    @property
    def attention(self) -> float:
        return 1.0 if self.factor <= 1 else math.sqrt(1 + math.log(self.factor) / math.log(self.original))


Scaling: TypeAlias = LinearScaling | Llama3Scaling | YarnScaling | LongScaling


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions of one backbone.

    ``fraction`` of each head's dimensions are rotated. ``sections`` share the frequencies out among the axes of a
    position (time, height, width), as M-RoPE does; None reads the first axis only.
    """

    theta: float = 10000.0
    fraction: float = 1.0
    scaling: Scaling | None = None
    sections: tuple[int, ...] | None = None

    def dims(self, head_dim: int) -> int:
        """How many dimensions of a head are rotated."""
        return int(head_dim * self.fraction)

    def angles(
        self, position: Int[Tensor, "batch tokens axes"], head_dim: int, reach: int | None = None
    ) -> tuple[Float[Tensor, "batch 1 tokens half"], Float[Tensor, "batch 1 tokens half"]]:
        """Cosines and sines for these positions, in fp32; ``reach`` is how many positions there may come to be."""
        dim, device = self.dims(head_dim), position.device
        steps = torch.arange(0, dim, 2, device=device, dtype=torch.int64).float() / dim
        frequencies, attention = 1.0 / self.theta**steps, 1.0
        if isinstance(self.scaling, LongScaling):
            if reach is None:
                reach = int(position.max()) + 1 if position.numel() else 0
            beyond = reach > self.scaling.original
            divisors = self.scaling.long if beyond else self.scaling.short
            if len(divisors) != dim // 2:
                raise ConfigError(f"LongRoPE has {len(divisors)} factors for {dim // 2} frequencies")
            # The reference's order of operations: factors multiply the power before the division.
            frequencies = 1.0 / (torch.tensor(divisors, device=device) * self.theta**steps)
            attention = self.scaling.attention
        elif self.scaling is not None:
            frequencies, attention = self.scaling.apply(frequencies, self.theta)
        if self.sections is None:
            angle = position[..., :1].float() * frequencies
        else:
            assert sum(self.sections) == dim // 2, f"sections {self.sections} do not share out {dim // 2} frequencies"
            axis = torch.repeat_interleave(
                torch.arange(len(self.sections), device=device), torch.tensor(self.sections, device=device)
            )
            every = position.expand(-1, -1, len(self.sections)) if position.shape[-1] == 1 else position
            angle = every[..., axis].float() * frequencies
        angle = angle.unsqueeze(1)
        return angle.cos() * attention, angle.sin() * attention


@dataclass(frozen=True, kw_only=True)
class AxialRope:
    """Each axis of the positions turns dimensions of its own, with a whole range of frequencies (FLUX).

    ``dims`` are how many dimensions of a head each axis has. `Rope` with sections, in contrast, shares out one range.
    """

    dims: tuple[int, ...]
    theta: float = 10000.0

    def __post_init__(self) -> None:
        if not self.dims or any(dim < 2 or dim % 2 for dim in self.dims):
            raise ConfigError(f"axes turn even numbers of dimensions, not {self.dims}")

    def angles(
        self, position: Int[Tensor, "batch tokens axes"]
    ) -> tuple[Float[Tensor, "batch 1 tokens half"], Float[Tensor, "batch 1 tokens half"]]:
        """Cosines and sines for these positions, in fp32."""
        assert position.shape[-1] == len(self.dims), "as many positions as axes"
        every = []
        for axis, dim in enumerate(self.dims):
            steps = torch.arange(0, dim, 2, device=position.device, dtype=torch.float64) / dim
            every.append(position[..., axis, None].double() * self.theta**-steps)
        angle = torch.cat(every, -1).unsqueeze(1)
        return angle.cos().float(), angle.sin().float()


def rotate(
    x: Float[Tensor, "batch heads tokens head_dim"],
    cos: Float[Tensor, "batch 1 tokens half"],
    sin: Float[Tensor, "batch 1 tokens half"],
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """Turns the first ``2 * half`` dimensions of each head; the rest passes."""
    half = cos.shape[-1]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second = x[..., :half], x[..., half : 2 * half]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return torch.cat([*turned, x[..., 2 * half :]] if x.shape[-1] > 2 * half else turned, -1)
