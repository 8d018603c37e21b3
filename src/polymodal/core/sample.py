"""What a user passes in: an ordered list of parts, decoded only when somebody looks."""

from __future__ import annotations

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
        if self.name:
            return self.name
        return str(self.source) if isinstance(self.source, str | Path) else f"<{type(self.source).__name__}>"


Part: TypeAlias = Text | Image
IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".jp2"}
)


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


def _part(value: Any) -> Part:
    if isinstance(value, Text | Image):
        return value
    if isinstance(value, str):
        return Text(value)
    if isinstance(value, Path):
        if value.suffix.lower() in IMAGE_SUFFIXES:
            return Image(value)
        raise MediaError(f"{value}: no known medium ends in {value.suffix or 'nothing'!r}. Wrap it: Image(path)")
    if isinstance(value, bytes) or type(value).__module__.split(".")[0] in {"PIL", "numpy"}:
        return Image(value)
    raise MediaError(
        f"a sample is made of Text, Image, str, Path, bytes, PIL images and numpy arrays, not {type(value).__name__}"
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
