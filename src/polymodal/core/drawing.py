"""How a picture is made of a text: what `Draws` is told, and what it tells on the way."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from jaxtyping import Float
from torch import Tensor

from polymodal.core.errors import ConfigError

MOST_STEPS: Final = 1_000
LARGEST_SIDE: Final = 16_384


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How pictures are to be made; None leaves it to the model.

    Attributes:
        steps: of the sampler.
        guidance: how closely to follow the prompt; 1 is no guidance.
        rescale: how much of the larger deviation that guidance makes is taken back, 0 to 1.
        interval: from and to which share of the way from noise to the picture there is guidance.
        seed: of the first picture; the next ones have the numbers behind it. Each is the same alone and among others.
        size: width and height in pixels.
        negative: what is not to be seen.
        strength: how much of a picture that is begun with is changed: at 1 nothing of it is left.

    Raises:
        ConfigError: a value is out of its range.
    """

    steps: int | None = None
    guidance: float | int | None = None
    rescale: float | int = 0.0
    interval: tuple[float, float] = (0.0, 1.0)
    seed: int | None = None
    size: tuple[int, int] | None = None
    negative: str = ""
    strength: float | int | None = None

    @property
    def of_guidance(self) -> str:
        """What is asked for that there is with guidance only, by name."""
        given = {
            "a negative prompt": bool(self.negative), "rescale": self.rescale > 0,
            "an interval": self.interval != (0.0, 1.0),
        }  # fmt: skip
        return ", ".join(name for name, here in given.items() if here)

    def __post_init__(self) -> None:
        if self.steps is not None and not 1 <= self.steps <= MOST_STEPS:
            raise ConfigError(f"a picture takes 1 to {MOST_STEPS:,} steps, not {self.steps}")
        if self.guidance is not None and not 0 <= self.guidance < math.inf:
            raise ConfigError(f"guidance is a number from 0 on (1 is none), not {self.guidance}")
        if not 0 <= self.rescale <= 1:
            raise ConfigError(f"guidance is rescaled by a share from 0 to 1, not {self.rescale}")
        if not 0 <= self.interval[0] <= self.interval[1] <= 1:
            raise ConfigError(f"guidance lasts from one share of the way to another, 0 to 1, not {self.interval}")
        if self.seed is not None and not 0 <= self.seed < 2**62:
            raise ConfigError(f"a seed is a whole number from 0 to 2 ** 62 - 1, not {self.seed}")
        if self.size is not None and not all(1 <= side <= LARGEST_SIDE for side in self.size):
            width, height = self.size
            raise ConfigError(f"the sides of a picture have 1 to {LARGEST_SIDE:,} pixels, not {width} x {height}")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise ConfigError(
                f"strength is more than 0 (which would change nothing) and at most 1; not {self.strength}"
            )


def any_seed() -> int:
    """One that nothing decides, for a drawing that has none."""
    return random.SystemRandom().randrange(2**31)


def check_sides(makes: str, size: tuple[int, int], multiple: int) -> None:
    """Raises a `ConfigError` where a side is no multiple of so many pixels; ``makes``: who does what with sides."""
    if any(side % multiple for side in size):
        near = [max(multiple, round(side / multiple) * multiple) for side in size]
        raise ConfigError(
            f"{makes} sides that are multiples of {multiple} pixels, not {size[0]} x {size[1]}; {near[0]} x {near[1]} "
            "is near"
        )


@dataclass(frozen=True, kw_only=True)
class Settled(Drawing):
    """A drawing of which nothing is left to the model.

    Attributes:
        strength: None where no picture is begun with.
        control_scale: how much a control picture counts, if the model looks at one.
        control_guess: whether the control picture leads, and not the prompt.

    Raises:
        ConfigError: a value is out of its range, or is of guidance where there is none.
    """

    steps: int
    guidance: float | int
    seed: int
    size: tuple[int, int]
    control_scale: float | None = None
    control_guess: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.of_guidance and self.guidance == 1:
            raise ConfigError(f"{self.of_guidance}: this is said of guidance; at a guidance of 1 there is none")


@dataclass(frozen=True, kw_only=True)
class Glimpse:
    """What there is of pictures that are still being made.

    Attributes:
        step: how many of the ``steps`` are done.
        pictures: what the model expects them to become, in [0, 1]; costs a decoding.
    """

    step: int
    steps: int
    pictures: Callable[[], Float[Tensor, "pictures 3 height width"]]
