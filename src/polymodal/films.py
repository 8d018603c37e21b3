"""Films from Python: `film` makes one of a text or of a picture, with its settings; `Film.save` marks it.

>>> made = polymodal.film(model, "a red circle moves to the left", polymodal.Filming(seed=7))
>>> made.save("circle.mp4")
>>> polymodal.films.settings_of("circle.mp4").seed
7
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import ImageOps

from polymodal import __version__
from polymodal.core.drawing import Glimpse
from polymodal.core.errors import MediaError, UnsupportedError
from polymodal.core.files import check_target
from polymodal.core.filming import Filming
from polymodal.core.verbs import Films
from polymodal.modalities.film import check_av
from polymodal.modalities.generated import check_settings, read_settings, to_uint8, write_generated_film
from polymodal.pictures import Given, called, clean, pixels_of
from polymodal.systems.base import System


@dataclass(frozen=True, kw_only=True)
class MadeFilm:
    """How a film was made: with this it can be made again. A picture that it begins with is named, not kept.

    Attributes:
        model: its name on the Hub, or its folder's.
        image: name of the picture that it begins with, and the beginning of its pixels' SHA-256.
    """

    prompt: str
    model: str
    seed: int
    width: int
    height: int
    frames: int
    fps: int
    steps: int
    guidance: float
    motion: int | None = None
    image: str | None = None
    version: str = __version__


@dataclass(frozen=True, eq=False)
class Film:
    """Frames that a model made, and how."""

    frames: UInt8[np.ndarray, "time height width 3"]
    made: MadeFilm

    def save(self, path: str | Path) -> None:
        """Writes an mp4 that says how it was made and that a model made it, whole or not at all.

        Raises:
            MediaError: the name does not end in ``.mp4``.
            MissingDependency: PyAV is not installed.
            OSError: it cannot be written there.
        """
        m = self.made
        write_generated_film(
            check_mp4(path), self.frames, m.fps, asdict(m), prompt=m.prompt, system=m.model, version=m.version,
            composite=m.image is not None,
        )  # fmt: skip


def check_mp4(path: str | Path) -> Path:
    """The path, if it is that of an mp4 that can be written: told before anything is computed.

    Raises:
        MediaError: it is not that of an mp4.
        MissingDependency: PyAV is not installed.
        OSError: no file can be written there.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() != ".mp4":
        raise MediaError(f"{path}: films are written as .mp4, which keeps how they were made")
    check_av()
    check_target(path)
    return path


def film(
    model: System,
    prompt: str = "",
    filming: Filming | None = None,
    *,
    image: Any = None,
    watch: Callable[[Glimpse], None] | None = None,
) -> Film:
    """A film of a text, or of a picture that it begins with.

    Args:
        model: makes films.
        prompt: what is to be seen; empty for models that read no text.
        filming: how to make it.
        image: a picture to begin with, as `Image` takes it; its middle, in the film's shape, is brought to its size.
        watch: is told after each step.

    Raises:
        UnsupportedError: the model makes no films, reads no text, or begins with no picture.
        ConfigError: a setting is out of range, or none that the model makes.
        MediaError: the picture cannot be read, or the text is longer than the model reads.
    """
    if not isinstance(model, Films):
        raise UnsupportedError(f"{model.source} is a {type(model).__name__}, which makes no films")
    prompt, given = clean(prompt), None if image is None else Given.of(image)
    f = model.settled_film(filming or Filming())
    begun = None if given is None else pixels_of(ImageOps.fit(given.rgb, f.size), None)[0]
    frames = model.film(prompt, f, image=begun, watch=watch)
    made = MadeFilm(
        prompt=prompt, model=called(model.source), seed=f.seed, width=f.size[0], height=f.size[1], frames=f.frames,
        fps=f.fps, steps=f.steps, guidance=float(f.guidance), motion=f.motion,
        image=None if given is None else given.name,
    )  # fmt: skip
    return Film(to_uint8(frames), made)


def settings_of(path: str | Path) -> MadeFilm:
    """How a film was made that Polymodal wrote.

    Raises:
        MediaError: it says nothing of that, or what it says is broken.
    """
    raw = read_settings(path)
    kinds: dict[str, tuple[type, ...]] = {
        **dict.fromkeys(("prompt", "model", "version"), (str,)), "guidance": (int, float),
        **dict.fromkeys(("seed", "width", "height", "frames", "fps", "steps"), (int,)),
        "motion": (int, type(None)), "image": (str, type(None)),
    }  # fmt: skip
    check_settings(path, raw, kinds)
    return MadeFilm(**raw)
