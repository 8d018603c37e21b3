"""What a user passes in: an ordered list of parts, decoded only when somebody looks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from polymodal.core.errors import MediaError


@dataclass(frozen=True)
class Text:
    """A piece of text."""

    text: str

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise MediaError(f"Text takes a str, not {type(self.text).__name__}")


@dataclass(frozen=True, eq=False)
class Image:
    """A picture: a path, encoded bytes, a PIL image, or a uint8 array ``(height, width[, 3 or 4])``.

    Decoding happens in `polymodal.modalities.image` when a processor asks for the pixels.
    """

    source: Any
    name: str = field(default="", kw_only=True)

    @property
    def where(self) -> str:
        """What to call this picture in a message."""
        return _where(self.name, self.source)


@dataclass(frozen=True, eq=False)
class Video:
    """A clip: a path, encoded bytes, or a uint8 array ``(frames, height, width, 3)`` with its ``fps``.

    ``start`` and ``end`` are seconds from the first frame and choose a piece; the whole clip where they are None.
    Decoding happens in `polymodal.modalities.video` when a processor asks for frames.
    """

    source: Any
    start: float | int | None = field(default=None, kw_only=True)
    end: float | int | None = field(default=None, kw_only=True)
    fps: float | int | None = field(default=None, kw_only=True)  # of an array; a file says its own
    name: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        _check_piece(self.where, self.start, self.end)
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise MediaError(f"{self.where}: fps must be positive, not {self.fps}")

    @property
    def where(self) -> str:
        """What to call this clip in a message."""
        return _where(self.name, self.source)


@dataclass(frozen=True, eq=False)
class Audio:
    """Sound: a path (also of a video), encoded bytes, or a float array ``([channels, ]samples)`` with its ``rate``.

    ``start`` and ``end`` are seconds from the first sample and choose a piece; all of it where they are None. Decoding
    happens in `polymodal.modalities.audio` when a processor asks for samples.
    """

    source: Any
    start: float | int | None = field(default=None, kw_only=True)
    end: float | int | None = field(default=None, kw_only=True)
    rate: int | None = field(default=None, kw_only=True)  # samples a second of an array; a file says its own
    name: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        _check_piece(self.where, self.start, self.end)
        if self.rate is not None and not 0 < self.rate < math.inf:
            raise MediaError(f"{self.where}: rate must be positive, not {self.rate}")

    @property
    def where(self) -> str:
        """What to call this sound in a message."""
        return _where(self.name, self.source)


Part: TypeAlias = Text | Image | Video | Audio
IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".jp2"}
)
VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi"})
AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".aac"})


@dataclass(frozen=True)
class Sample:
    """An ordered list of parts that belong together, e.g. ``Sample.of([Image("cup.jpg"), "What colour?"])``."""

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise MediaError("a sample needs at least one part")

    @classmethod
    def of(cls, value: Any) -> Sample:
        """Makes a sample of a part, a sample, a str (text), a Path (by its suffix), a picture, or a list of these.

        Raises:
            MediaError: the value is none of these, or a path's suffix names no known medium.
        """
        if isinstance(value, Sample):
            return value
        if isinstance(value, list | tuple):
            return cls(tuple(part for item in value for part in cls.of(item).parts))
        return cls((_part(value),))

    @property
    def texts(self) -> list[Text]:
        return [p for p in self.parts if isinstance(p, Text)]

    @property
    def images(self) -> list[Image]:
        return [p for p in self.parts if isinstance(p, Image)]

    @property
    def videos(self) -> list[Video]:
        return [p for p in self.parts if isinstance(p, Video)]

    @property
    def audios(self) -> list[Audio]:
        return [p for p in self.parts if isinstance(p, Audio)]


def is_sound(path: str | Path) -> bool:
    """Whether a file's name says that it is sound."""
    return Path(path).suffix.lower() in AUDIO_SUFFIXES


def _check_piece(where: str, start: float | int | None, end: float | int | None) -> None:
    if not 0 <= (0.0 if start is None else start) < (math.inf if end is None else end):
        raise MediaError(f"{where}: a piece needs 0 <= start < end, in seconds, not {start} to {end}")


def _where(name: str, source: Any) -> str:
    if name:
        return name
    return str(source) if isinstance(source, str | Path) else f"<{type(source).__name__}>"


def _part(value: Any) -> Part:
    if isinstance(value, Text | Image | Video | Audio):
        return value
    if isinstance(value, str):
        return Text(value)
    if isinstance(value, Path):
        if value.suffix.lower() in IMAGE_SUFFIXES:
            return Image(value)
        if value.suffix.lower() in VIDEO_SUFFIXES:
            return Video(value)
        if is_sound(value):
            return Audio(value)
        ending = value.suffix or "nothing"
        raise MediaError(
            f"{value}: no known medium ends in {ending!r}. Rename it, or wrap it: Image(path), Video(path), Audio(path)"
        )
    if isinstance(value, bytes) or type(value).__module__.split(".")[0] in {"PIL", "numpy"}:
        return Image(value)
    raise MediaError(
        f"a sample is made of Text, Image, Video, Audio, str, Path, bytes, PIL images and numpy arrays, not "
        f"{type(value).__name__}"
    )


def samples(values: Any) -> list[Sample]:
    """A list of samples from a list of anything that `Sample.of` takes; a lone value becomes a list of one."""
    if isinstance(values, Sequence) and not isinstance(values, str | bytes):
        return [Sample.of(v) for v in values]
    if (
        isinstance(values, Iterable)
        and not isinstance(values, str | bytes | Path)
        and type(values).__module__ == "builtins"
    ):
        return [Sample.of(v) for v in values]
    return [Sample.of(values)]
