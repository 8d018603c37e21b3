"""Drawing from Python: `draw` for pictures of a prompt, each with its settings; `Picture.save` marks them.

>>> (picture,) = polymodal.draw(model, "a red cube left of a blue sphere", polymodal.Drawing(seed=7))
>>> picture.save("cube.png")
>>> polymodal.pictures.settings_of("cube.png").seed
7
"""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image as PILImage
from torch import Tensor

from polymodal import __version__
from polymodal.core.drawing import Drawing, Glimpse
from polymodal.core.errors import ConfigError, MediaError, UnsupportedError
from polymodal.core.sample import Image
from polymodal.core.verbs import Draws
from polymodal.modalities.generated import check_settings, read_settings, to_pil, write_generated
from polymodal.modalities.image import MAX_PIXELS, decode
from polymodal.systems.base import System

STRETCH = 0.1  # how much of its shape a control picture may lose, as where sides are rounded


@dataclass(frozen=True, kw_only=True)
class Made:
    """How a picture was made: with this it can be made again. Pictures that went in are named, not kept.

    Whoever is given the picture can read it: files are named without the folders that they lie in.

    Attributes:
        model: its name on the Hub, or its folder's.
        seed: of this picture.
        image, mask, control: names of the pictures that it was made of, and the beginning of their pixels' SHA-256.
        control_scale, control_guess: how ``control`` counted, see `core.drawing.Settled`.
        lora: name of the adapter that the model had, and the beginning of the file's SHA-256.
    """

    prompt: str
    model: str
    seed: int
    width: int
    height: int
    steps: int
    guidance: float
    negative: str = ""
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)
    strength: float | None = None
    image: str | None = None
    mask: str | None = None
    control: str | None = None
    control_scale: float | None = None
    control_guess: bool | None = None
    lora: str | None = None
    version: str = __version__


@dataclass(frozen=True, kw_only=True)
class Preview(Glimpse):
    """What there is of pictures that are still being made, and how each is made."""

    made: Sequence[Made]

    def save(self, path: str | Path) -> None:
        """Writes what is expected of them as a PNG that is marked as the pictures will be, whole or not at all.

        Raises:
            MediaError: the name does not end in ``.png``.
        """
        save(path, sheet([to_pil(picture) for picture in self.pictures()]), self.made)


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture that a model made, and how."""

    image: PILImage.Image
    made: Made

    def save(self, path: str | Path) -> None:
        """Writes a PNG that says how it was made and that a model made it, whole or not at all.

        Raises:
            MediaError: the name does not end in ``.png``.
        """
        save(path, self.image, [self.made])


def save(path: str | Path, picture: PILImage.Image, made: Sequence[Made]) -> None:
    """Writes a picture that was made as the one, or holds all the ones (a sheet), that ``made`` describes.

    Raises:
        MediaError: the name does not end in ``.png``.
    """
    first = made[0]
    settings = asdict(first) if len(made) == 1 else {"sheet": [asdict(each) for each in made]}
    write_generated(
        check_png(path), picture, settings, prompt=first.prompt, system=first.model, version=first.version,
        composite=first.image is not None,
    )  # fmt: skip


def check_png(path: str | Path) -> Path:
    """The path, if it is that of a PNG.

    Raises:
        MediaError: it is not.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() != ".png":
        raise MediaError(f"{path}: pictures are written as .png, which keeps how they were made")
    return path


def settings_of(path: str | Path) -> Made | list[Made]:
    """How a picture was made that Polymodal wrote; of a sheet, how each of its pictures was.

    Raises:
        MediaError: it says nothing of that, or what it says is broken.
    """
    raw = read_settings(path)
    sheet = raw.get("sheet")
    if isinstance(sheet, list):
        return [_made(path, each) for each in sheet]
    return _made(path, raw)


def _made(path: str | Path, raw: Any) -> Made:
    kinds: dict[str, tuple[type, ...]] = {
        **dict.fromkeys(("prompt", "model", "negative", "version"), (str,)), "interval": (list,),
        **dict.fromkeys(("seed", "width", "height", "steps"), (int,)),
        **dict.fromkeys(("guidance", "rescale"), (int, float)),
        **dict.fromkeys(("strength", "control_scale"), (int, float, type(None))),
        **dict.fromkeys(("image", "mask", "control", "lora"), (str, type(None))), "control_guess": (bool, type(None)),
    }  # fmt: skip
    check_settings(path, raw, kinds)
    ends = raw["interval"]
    if len(ends) != 2 or not all(isinstance(end, int | float) for end in ends):
        raise MediaError(f"{path}: what it says of how it was made is broken (interval)")
    return Made(**{**raw, "interval": (float(ends[0]), float(ends[1]))})


def draw(
    model: System,
    prompt: str,
    drawing: Drawing | None = None,
    *,
    n: int = 1,
    image: Any = None,
    mask: Any = None,
    control: Any = None,
    watch: Callable[[Preview], None] | None = None,
) -> list[Picture]:
    """Pictures of a prompt.

    Args:
        model: draws.
        prompt: what is to be seen.
        drawing: how to make them.
        n: how many; the seeds of the next ones are the numbers behind the first.
        image: a picture to begin with, as `Image` takes it; it is brought to the size that is asked for.
        mask: a picture of the size of ``image``: white is made anew, black is kept. Something has to be white.
        control: what has to be where, for models that look at such. Where neither the settings nor ``image`` give a
            size, it does.
        watch: is told after each step.

    Raises:
        UnsupportedError: the model draws nothing.
        ConfigError: a setting is out of range, or no multiple of what the model paints.
        MediaError: a picture cannot be read or has another size, ``mask`` has nothing white, ``control`` would be
            stretched, or a prompt is longer than the model reads.
    """
    ask = drawing or Drawing()
    return list(drawn(model, prompt, ask, n=n, image=image, mask=mask, control=control, watch=watch, at_once=n))


def drawn(
    model: System,
    prompt: str,
    drawing: Drawing,
    *,
    n: int = 1,
    image: Any = None,
    mask: Any = None,
    control: Any = None,
    lora: Path | None = None,
    watch: Callable[[Preview], None] | None = None,
    at_once: int = 1,
) -> Iterator[Picture]:
    """`draw`, ``at_once`` pictures at a time, each as soon as it is there.

    ``lora`` is the file of the adapter that the model was given before: that it had it is said of the pictures.
    """
    if not isinstance(model, Draws):
        raise UnsupportedError(f"{model.source} is a {type(model).__name__}, which draws nothing")
    if n < 1 or at_once < 1:
        raise ConfigError(f"{n} pictures: ask for one or more")
    if mask is not None and image is None:
        raise ConfigError("a mask says what of a picture is made anew: give the picture, too")
    prompt, size = clean(prompt), drawing.size
    first, covered, looked = (None if given is None else Given.of(given) for given in (image, mask, control))
    begun = None if first is None else pixels_of(first.rgb, size)
    anew = None if covered is None or first is None else _mask(covered, first, size)
    shape = None if begun is None else (begun.shape[3], begun.shape[2])
    if looked is not None and begun is None and size is None:
        drawing = replace(drawing, size=looked.rgb.size)
    d = model.settled(replace(drawing, negative=clean(drawing.negative)), begun=shape, masked=mask is not None)
    shown = None if looked is None else _control(looked, d.size)
    pairs = (("image", first), ("mask", covered), ("control", looked))
    names = {what: given.name for what, given in pairs if given is not None}
    made = Made(
        prompt=prompt, model=called(model.source), seed=d.seed, width=d.size[0], height=d.size[1], steps=d.steps,
        guidance=float(d.guidance), negative=d.negative, rescale=float(d.rescale), interval=d.interval,
        strength=d.strength, **names,
        control_scale=None if control is None else d.control_scale,
        control_guess=None if control is None else d.control_guess, lora=None if lora is None else _file(lora),
    )  # fmt: skip
    for start in range(0, n, at_once):
        rows = min(at_once, n - start)
        way, each = replace(d, seed=d.seed + start), [replace(made, seed=d.seed + start + row) for row in range(rows)]
        tell = None if watch is None else _telling(watch, each)
        pictures = model.draw([prompt] * rows, way, image=begun, mask=anew, control=shown, watch=tell)
        for picture, how in zip(pictures, each, strict=True):
            yield Picture(to_pil(picture), how)


def _telling(watch: Callable[[Preview], None], made: Sequence[Made]) -> Callable[[Glimpse], None]:
    return lambda g: watch(Preview(step=g.step, steps=g.steps, pictures=g.pictures, made=made))


def clean(text: str) -> str:
    """A prompt that is text.

    Raises:
        MediaError: it holds characters that control machines, or halves of characters.
    """
    bad = [c for c in text if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"]
    if bad:
        raise MediaError(f"the prompt holds {bad[0]!r}, which is no text")
    return text


@dataclass(frozen=True, eq=False)
class Given:
    """A picture that goes into another, or into a film."""

    rgb: PILImage.Image
    where: str

    @classmethod
    def of(cls, picture: Any) -> Given:
        image = picture if isinstance(picture, Image) else Image(picture)
        return cls(decode(image), image.where)

    @property
    def name(self) -> str:
        return _named(self.where, self.rgb.tobytes())


def _file(path: Path) -> str:
    return _named(str(path), path.read_bytes())


def _named(where: str, content: bytes) -> str:
    """The last part of a path, and the beginning of a hash."""
    return f"{Path(where).name} (sha256 {hashlib.sha256(content).hexdigest()[:16]})"


def called(source: str) -> str:
    """A model's name on the Hub, or its folder's without the path to it."""
    folder = Path(source).expanduser()
    return folder.resolve().name if folder.is_absolute() or folder.is_dir() else source


def _control(given: Given, size: tuple[int, int]) -> Float[Tensor, "1 3 height width"]:
    """A control picture, brought to ``size`` where that has about its shape: what it shows has to be somewhere."""
    rgb, (width, height) = given.rgb, size
    stretch = rgb.width * size[1] / (rgb.height * size[0])
    if not 1 - STRETCH < stretch < 1 / (1 - STRETCH):
        raise MediaError(
            f"the control picture {given.where} has {rgb.width} x {rgb.height} pixels: it would be stretched to "
            f"{width} x {height}; cut it to that shape, or ask for a size of its own"
        )
    return pixels_of(rgb, size)


def pixels_of(rgb: PILImage.Image, size: tuple[int, int] | None) -> Float[Tensor, "1 3 height width"]:
    """A picture in [0, 1], brought to ``size``."""
    if size is not None and rgb.size != size:
        rgb = rgb.resize(size, PILImage.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(rgb).copy()).movedim(-1, 0)[None].float() / 255


def _mask(mask: Given, picture: Given, size: tuple[int, int] | None) -> Float[Tensor, "1 1 height width"]:
    """1 where the mask is rather white."""
    seen, whole = mask.rgb, picture.rgb
    if seen.size != whole.size:
        raise MediaError(
            f"the mask {mask.where} has {seen.width} x {seen.height} pixels, its picture {whole.width} x {whole.height}"
        )
    grey = seen.convert("L")
    grey = grey if size is None else grey.resize(size, PILImage.Resampling.NEAREST)
    white = torch.from_numpy(np.asarray(grey).copy()) >= 128
    if not white.any():  # as where 1 stands for white, or a thin line is lost in a smaller picture
        raise MediaError(
            f"the mask {mask.where} has nothing white at {grey.width} x {grey.height} pixels: white is painted, black "
            "is kept; of masks of zeros and ones, multiply by 255"
        )
    return white.float()[None, None]


def sheet(pictures: Sequence[PILImage.Image], *, gap: int = 4) -> PILImage.Image:
    """Pictures of one size side by side and below each other, about as wide as high.

    Where they would be more pixels than `modalities.image.decode` takes, each is made smaller.
    """
    width, height = pictures[0].size
    columns = max(1, min(len(pictures), round(math.sqrt(len(pictures) * height / width))))
    rows = math.ceil(len(pictures) / columns)
    shrink = math.sqrt(MAX_PIXELS / (columns * rows * (width + gap) * (height + gap)))
    if shrink < 1:
        width, height = (max(1, int(side * shrink) - gap) for side in (width, height))
        pictures = [picture.resize((width, height)) for picture in pictures]
    out = PILImage.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for number, picture in enumerate(pictures):
        out.paste(picture, (number % columns * (width + gap), number // columns * (height + gap)))
    return out
