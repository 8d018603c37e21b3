"""How sound is made of a text: what `Sounds` is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from polymodal.core.errors import ConfigError
from polymodal.core.sample import Audio

DAY: Final = 86_400


@dataclass(frozen=True, kw_only=True)
class Sounding:
    """How a sound is to be made; None leaves it to the model.

    Attributes:
        seconds: how long it is; the most that it may last, where the text decides.
        temperature: 0 takes what is the most probable.
        top_k: draw from the best ``k`` codes only.
        guidance: how closely to follow the text; 1 is none.
        seed: of the random numbers.

    Raises:
        ConfigError: a value is out of its range.
    """

    seconds: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    guidance: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.seconds is not None and not 0 < self.seconds <= DAY:
            raise ConfigError(f"a sound lasts more than 0 seconds and at most a day, {DAY:,}; not {self.seconds}")


@dataclass(frozen=True)
class Voice:
    """A voice to speak with: a few seconds of it, and the words that are said in them."""

    sound: Audio
    text: str
