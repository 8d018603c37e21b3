"""Films that are written frame by frame, as mp4, and what may be told in boxes of their own beside the pictures.

Source: ISO/IEC 14496-12 for boxes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image as PILImage

from polymodal.core.errors import MediaError, MissingDependency
from polymodal.core.files import atomic_path

_LONGEST: Final = 2**20  # bytes of a box that is read


class Film:
    """A film that grows frame by frame; all have the size of the first, with sides that H.264 takes: even ones."""

    def __init__(self, container: Any, fps: float | int, crf: int) -> None:
        self._container, self._crf = container, crf
        self._stream: Any = None
        self._fps = Fraction(fps).limit_denominator(1000)

    def add(self, picture: PILImage.Image) -> None:
        """The next frame. It is cut or filled up with black to the film's size."""
        import av

        if self._stream is None:
            self._stream = self._container.add_stream("libx264", rate=self._fps)
            self._stream.width, self._stream.height = (side + side % 2 for side in picture.size)
            self._stream.pix_fmt = "yuv420p"
            self._stream.options = {"preset": "veryfast", "crf": str(self._crf)}
        picture = picture.crop((0, 0, self._stream.width, self._stream.height))
        for packet in self._stream.encode(av.VideoFrame.from_ndarray(np.asarray(picture), format="rgb24")):
            self._container.mux(packet)

    def finish(self) -> None:
        """Writes what the encoder still holds."""
        if self._stream is not None:
            for packet in self._stream.encode(None):
                self._container.mux(packet)


def check_av() -> None:
    """Raises a `MissingDependency` where PyAV is not installed."""
    if importlib.util.find_spec("av") is None:
        raise MissingDependency("writing a film", "av", "video")


@contextlib.contextmanager
def film(path: str | Path, fps: float | int, *, crf: int = 20, comment: str = "", tail: bytes = b"") -> Iterator[Film]:
    """A film that is at ``path``, whole, when the block has ended without an error.

    Args:
        path: the mp4.
        fps: frames a second, a thousandth at least.
        crf: how coarse it is, 0 to 51 (H.264's).
        comment: what players show of it.
        tail: boxes that are put behind the others, see `box`.

    Raises:
        MissingDependency: PyAV is not installed.
        MediaError: no film was made of no frames, or at no such speed.
    """
    check_av()
    import av

    if not 0.001 <= fps < math.inf:
        raise MediaError(f"{path}: a film of {fps} frames a second")
    with atomic_path(path) as temporary:
        with av.open(str(temporary), "w", format="mp4") as container:
            container.metadata["comment"] = comment
            out = Film(container, fps, crf)
            yield out
            out.finish()
        if temporary.stat().st_size == 0:
            raise MediaError(f"{path}: a film of no frames")
        if tail:
            with temporary.open("ab") as file:
                file.write(tail)


def box(name: bytes, content: bytes) -> bytes:
    """A box of an mp4 that is somebody's own: ``name`` has 16 bytes (a UUID)."""
    assert len(name) == 16, "a UUID has 16 bytes"
    return struct.pack(">I", 24 + len(content)) + b"uuid" + name + content


def boxes(path: str | Path) -> dict[bytes, bytes] | None:
    """The content of an mp4's `box`es by their names, the last of each; None where the file is no mp4.

    Raises:
        MediaError: there is no such file, or what it says of its boxes is broken.
    """
    path, found, at = Path(path), dict[bytes, bytes](), 0
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            while at < end:
                file.seek(at)
                head = file.read(24)
                length, kind = int.from_bytes(head[:4], "big"), head[4:8]
                if at == 0 and kind != b"ftyp":
                    return None
                if length == 1:  # it stands behind the kind, in 8 bytes
                    length = int.from_bytes(head[8:16], "big")
                length = length or end - at  # 0: to the end
                if length < 8 or at + length > end:
                    raise MediaError(f"{path}: the mp4 is broken or cut off")
                if kind == b"uuid" and 24 <= length <= _LONGEST:
                    found[head[8:24]] = file.read(length - 24)
                at += length
    except OSError as error:
        raise MediaError(f"{path}: {error.strerror}") from error
    return found
