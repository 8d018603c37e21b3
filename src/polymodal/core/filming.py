"""How a film is made of a text or of a first picture: what `Films` is told. What it tells on the way is a `Glimpse`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from polymodal.core.drawing import Drawing
from polymodal.core.errors import ConfigError

MOST_FRAMES: Final = 10_000
FASTEST: Final = 240


@dataclass(frozen=True, kw_only=True)
class Filming:
    """How a film is to be made; None leaves it to the model.

    Attributes:
        frames: how many.
        fps: frames a second.
        motion: how much is to move, 1 to 255, for models that are told so.
        steps: of the sampler.
        guidance: how closely to follow the text or the picture; 1 is no guidance.
        seed: the same gives the same film.
        size: width and height in pixels.

    Raises:
        ConfigError: a value is out of its range.
    """

    frames: int | None = None
    fps: int | None = None
    motion: int | None = None
    steps: int | None = None
    guidance: float | int | None = None
    seed: int | None = None
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        Drawing(steps=self.steps, guidance=self.guidance, seed=self.seed, size=self.size)
        for name, value, most in (("frames", self.frames, MOST_FRAMES), ("fps", self.fps, FASTEST)):
            if value is not None and not 1 <= value <= most:
                raise ConfigError(f"{name} is a whole number from 1 to {most:,}, not {value}")
        if self.motion is not None and not 1 <= self.motion <= 255:
            raise ConfigError(f"motion is a whole number from 1 to 255, not {self.motion}")


@dataclass(frozen=True, kw_only=True)
class SettledFilm(Filming):
    """A film of which nothing is left to the model; ``motion`` is None where the model is not told of it."""

    frames: int
    fps: int
    steps: int
    guidance: float | int
    seed: int
    size: tuple[int, int]
