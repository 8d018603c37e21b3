"""Films of episodes: the cameras side by side, and below them what the robot was told."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw

from polymodal.core.errors import MediaError, MissingDependency
from polymodal.core.files import atomic_path
from polymodal.core.observation import Observation

HEIGHT: Final = 256  # of a camera's picture
_LINE: Final = 18


def frame(observation: Observation, caption: Sequence[str], cameras: int) -> PILImage.Image:
    """One picture of the film; a camera that is missing stays black, as do all of an observation without pictures."""
    views = [PILImage.fromarray(picture) for picture in observation.images.values()]
    scaled = [view.resize((max(1, HEIGHT * view.width // view.height), HEIGHT)) for view in views]
    width = max([sum(view.width for view in scaled), cameras * HEIGHT])
    out = PILImage.new("RGB", (width + width % 2, HEIGHT + _LINE * len(caption) + 6))
    at = 0
    for view in scaled:
        out.paste(view, (at, 0))
        at += view.width
    draw = ImageDraw.Draw(out)
    for n, text in enumerate(caption):
        draw.text((6, HEIGHT + 3 + _LINE * n), text, fill=(255, 255, 255), font_size=13)
    return out


class Film:
    """A film that grows frame by frame; all have the size of the first."""

    def __init__(self, container: Any, fps: float | int) -> None:
        self._container = container
        self._stream: Any = None
        self._fps = Fraction(fps).limit_denominator(1000)

    def add(self, picture: PILImage.Image) -> None:
        """The next frame. It is cut or filled up with black to the size of the first."""
        import av

        if self._stream is None:
            self._stream = self._container.add_stream("libx264", rate=self._fps)
            self._stream.width, self._stream.height = picture.width, picture.height // 2 * 2
            self._stream.pix_fmt = "yuv420p"
            self._stream.options = {"preset": "veryfast", "crf": "20"}
        picture = picture.crop((0, 0, self._stream.width, self._stream.height))
        for packet in self._stream.encode(av.VideoFrame.from_ndarray(np.asarray(picture), format="rgb24")):
            self._container.mux(packet)

    def finish(self) -> None:
        """Writes what the encoder still holds."""
        if self._stream is not None:
            for packet in self._stream.encode(None):
                self._container.mux(packet)


@contextlib.contextmanager
def film(path: str | Path, fps: float | int) -> Iterator[Film]:
    """A film that is at ``path``, whole, when the block has ended without an error.

    Raises:
        MissingDependency: PyAV is not installed.
        MediaError: no film was made of no frames.
    """
    try:
        import av
    except ModuleNotFoundError:
        raise MissingDependency("writing a film", "av", "video") from None
    with atomic_path(path) as temporary:
        with av.open(str(temporary), "w", format="mp4") as container:
            out = Film(container, fps)
            yield out
            out.finish()
        if temporary.stat().st_size == 0:
            raise MediaError(f"{path}: a film of no frames")
