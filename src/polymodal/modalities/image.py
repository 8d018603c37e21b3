"""Pictures: files of any origin to RGB, and RGB to the tensors that a vision tower reads.

Pixels are resized with Pillow on 8-bit samples, filter and rounding included, because that is what the public
processors of CLIP, SigLIP, ViT, MAE and DINOv2 did when their models were trained.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image as PILImage
from torch import Tensor

from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError, MediaError, did_you_mean
from polymodal.core.files import read_json
from polymodal.core.sample import Image
from polymodal.modalities.files import check_bytes, open_medium

# Decoders that may run on a stranger's file. Formats that are programs or containers (eps, svg, pdf, wmf) stay out.
PILImage.init()
FORMATS = tuple(
    name for name in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000") if name in PILImage.OPEN
)
MAX_PIXELS = 2**26  # 67 million: 200 MB of RGB
MAX_BYTES = 2**27  # of an encoded file

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)

Alpha: TypeAlias = Literal["white", "drop"]
"""What becomes of transparency: laid on white, or dropped, which shows the colours stored under transparent pixels.

transformers >= 5 lays on white; open_clip, OpenAI's clip and older transformers drop.
"""
Filter: TypeAlias = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]
_FILTERS: tuple[Filter, ...] = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # in Pillow's numbering
_UPRIGHT = {
    2: PILImage.Transpose.FLIP_LEFT_RIGHT,
    3: PILImage.Transpose.ROTATE_180,
    4: PILImage.Transpose.FLIP_TOP_BOTTOM,
    5: PILImage.Transpose.TRANSPOSE,
    6: PILImage.Transpose.ROTATE_270,
    7: PILImage.Transpose.TRANSVERSE,
    8: PILImage.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112
_MAX_RESIZED = 2**25  # pixels of a resized picture before its crop


# ---- from anything to RGB ----


def decode(
    image: Image, *, alpha: Alpha = "white", max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES
) -> PILImage.Image:
    """The picture in 8-bit RGB, upright.

    The first frame of an animation is taken, EXIF orientation is applied, 16-bit grey is divided by 257, CMYK is
    converted without its colour profile. Size limits are checked on the header, before any pixel is decoded.

    Raises:
        MediaError: not a picture of a known format, broken, cut off, too large, or not the type that `Image` takes.
    """
    where, opened = image.where, open_picture(image, max_pixels=max_pixels, max_bytes=max_bytes)
    width, height = opened.size
    kind = opened.format or "picture"
    # A decoder raises whatever a hostile file provokes in it: OSError, SyntaxError, struct.error, KeyError...
    try:
        opened.load()
        rgb = _to_rgb(where, opened, alpha)
    except MediaError:
        raise
    except MemoryError as error:
        raise MediaError(f"{where}: not enough memory for {width} x {height} pixels") from error
    except Exception as error:
        raise MediaError(f"{where}: the {kind} data is broken or cut off") from error
    turn = _UPRIGHT.get(_orientation(opened))
    return rgb if turn is None else rgb.transpose(turn)


def decode_still(image: Image, *, alpha: Alpha = "white") -> PILImage.Image:
    """`decode`, where an answer about the first frame would be about less than was asked.

    What cameras put behind a JPEG, as a preview or a second view, is no other frame.

    Raises:
        MediaError: as `decode`; or there are several frames or pages.
    """
    opened = open_picture(image)
    try:
        several = opened.format != "MPO" and getattr(opened, "is_animated", False)  # few of Pillow's formats have it
    except Exception as error:  # as in `decode`
        raise MediaError(f"{image.where}: the {opened.format} data is broken or cut off") from error
    if several:
        raise MediaError(
            f"{image.where}: has several frames or pages; pass the one that is meant, or some of them as pictures"
        )
    return decode(Image(opened, name=image.where), alpha=alpha)


def open_picture(image: Image, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES) -> PILImage.Image:
    """The picture as Pillow opens it: header read, size checked, no pixel decoded yet.

    For who needs its metadata and its pixels: pass ``Image(opened)`` on, and the pixels are decoded once.

    Raises:
        MediaError: not a picture of a known format, too large, or not the type that `Image` takes.
    """
    where, source = image.where, image.source
    if isinstance(source, np.ndarray):
        opened = _from_array(where, source)
    elif isinstance(source, PILImage.Image):
        opened = source
    elif isinstance(source, bytes | bytearray):
        check_bytes(where, len(source), max_bytes)
        opened = _open(where, io.BytesIO(source))
    elif isinstance(source, str | Path):
        opened = _open(where, io.BytesIO(read_picture(source, where=where, max_bytes=max_bytes)))
    else:
        raise MediaError(
            f"{where}: a picture is a path, encoded bytes, a PIL image or a uint8 array, not {type(source).__name__}"
        )
    width, height = opened.size
    if width * height > max_pixels:
        raise MediaError(
            f"{where}: {width} x {height} pixels are more than the {max_pixels:,} allowed; shrink it first"
        )
    if not width * height:
        raise MediaError(f"{where}: the picture is empty ({width} x {height} pixels)")
    return opened


def read_picture(path: str | Path, *, where: str, max_bytes: int = MAX_BYTES) -> bytes:
    """The bytes of a picture file; ``where`` names it in errors.

    Raises:
        MediaError: there is no such regular file, it is too large, or it may not be read.
    """
    with open_medium(path, where=where, medium="picture", max_bytes=max_bytes) as file:
        try:
            return file.read(os.fstat(file.fileno()).st_size)  # no more, should it grow
        except OSError as error:
            raise MediaError(f"{where}: cannot be read: {error.strerror}") from error


def _open(where: str, file: io.BytesIO) -> PILImage.Image:
    try:
        return PILImage.open(file, formats=FORMATS)
    except (PILImage.DecompressionBombError, PILImage.DecompressionBombWarning):
        raise MediaError(f"{where}: far more pixels than any picture needs; shrink it first") from None
    except PILImage.UnidentifiedImageError as error:
        if not file.getbuffer().nbytes:
            raise MediaError(f"{where}: the file is empty") from None
        known = ", ".join(name.lower() for name in FORMATS)
        raise MediaError(f"{where}: not a picture, or its header is broken (formats read: {known})") from error
    except Exception as error:  # as in `decode`: header parsers raise anything
        raise MediaError(f"{where}: the header is broken") from error


def _from_array(where: str, array: np.ndarray) -> PILImage.Image:
    shape = " x ".join(map(str, array.shape))
    if array.dtype != np.uint8:
        raise MediaError(
            f"{where}: an array of {array.dtype}; pass uint8 in 0..255, e.g. (array * 255).round().astype('uint8') "
            "for floats in 0..1"
        )
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] > 4:
        raise MediaError(f"{where}: an array of {shape} has its channels first; pass array.transpose(1, 2, 0)")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise MediaError(f"{where}: an array of {shape}; pass (height, width) or (height, width, 3 or 4)")
    if not array.size:
        raise MediaError(f"{where}: the picture is empty (an array of {shape})")
    return PILImage.fromarray(np.ascontiguousarray(array))


def _to_rgb(where: str, picture: PILImage.Image, alpha: Alpha) -> PILImage.Image:
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255, which turns most 16-bit pictures white.
        samples = np.asarray(picture).astype(np.int64)
        if samples.min() < 0 or samples.max() > 65535:
            raise MediaError(f"{where}: samples outside 0..65535; convert the picture to 8 or 16 bits first")
        return PILImage.fromarray(((samples + 128) // 257).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        raise MediaError(f"{where}: floating point samples have no known range; convert the picture to 8 bits first")
    if "transparency" not in picture.info and not picture.has_transparency_data:
        return picture.convert("RGB")
    rgba = picture.convert("RGBA")
    if alpha == "drop":
        return rgba.convert("RGB")
    white = PILImage.new("RGBA", rgba.size, (255, 255, 255, 255))
    return PILImage.alpha_composite(white, rgba).convert("RGB")


def _orientation(picture: PILImage.Image) -> int:
    """1 (upright) to 8, as in EXIF; a picture with unreadable EXIF counts as upright, as in any viewer."""
    try:
        return int(picture.getexif().get(_ORIENTATION, 1))
    except Exception:
        return 1


def thumbnail(picture: PILImage.Image, side: int) -> PILImage.Image:
    """A smaller copy whose longer side is at most ``side`` pixels; never enlarged, aspect kept."""
    scale = min(1.0, side / max(picture.size))
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    # Whole steps by averaging, the rest by the filter: four times as fast as the filter alone, and as good to look at.
    return picture.resize(size, PILImage.Resampling.BICUBIC, reducing_gap=1.1)


@runtime_checkable
class Processor(Protocol):
    """What every image processor of a system can do."""

    @property
    def alpha(self) -> Alpha:
        """What is made of transparent pixels."""
        ...

    def to_hf(self) -> dict[str, Any]:
        """Itself, as the Hub's preprocessor_config.json."""
        ...


@runtime_checkable
class Shows(Protocol):
    """Can show what a model gets of a picture."""

    def pictures(self, batch: Batch) -> list[PILImage.Image]:
        """The pixels of a system's batch as pictures again, for people to look at."""
        ...


# ---- geometry ----


@dataclass(frozen=True, kw_only=True)
class View:
    """Where a model's pixels lie in the picture: ``seen = original * scale + offset``, in x then y.

    Coordinates are continuous: pixel ``i`` covers ``[i, i + 1]``, so a box over the whole picture is ``0, 0, width,
    height``. "Original" is the upright picture, as a viewer shows it.
    """

    original: tuple[int, int]  # width, height
    seen: tuple[int, int]
    scale: tuple[float, float]
    offset: tuple[float, float]

    def to_seen(self, points: Float[Tensor, "*points 2"]) -> Float[Tensor, "*points 2"]:
        """Points ``(x, y)``, or boxes as pairs of points, from the picture to the model's pixels."""
        return points * points.new_tensor(self.scale) + points.new_tensor(self.offset)

    def to_original(self, points: Float[Tensor, "*points 2"]) -> Float[Tensor, "*points 2"]:
        """The inverse of `to_seen`. Points in the padding fall outside the picture."""
        return (points - points.new_tensor(self.offset)) / points.new_tensor(self.scale)


@runtime_checkable
class Views(Protocol):
    """Knows where what a model sees lies in a picture."""

    def view(self, width: int, height: int) -> View:
        """Where the pixels that the model sees lie in an upright picture of that size."""
        ...


@dataclass(frozen=True, kw_only=True)
class ShortestEdge:
    """The shorter side becomes ``size``; the longer one keeps the aspect, rounded down."""

    size: int

    def target(self, width: int, height: int) -> tuple[int, int]:
        """Width and height that a picture is resized to."""
        longer = int(self.size * max(width, height) / min(width, height))
        return (self.size, longer) if width <= height else (longer, self.size)


@dataclass(frozen=True, kw_only=True)
class Exact:
    """Both sides are given; the aspect is not kept."""

    height: int
    width: int

    def target(self, width: int, height: int) -> tuple[int, int]:
        """Width and height that a picture is resized to."""
        return self.width, self.height


@dataclass(frozen=True, kw_only=True)
class Within:
    """The largest size of the same aspect that fits into a `Frame`, rounded down."""

    height: int
    width: int

    def target(self, width: int, height: int) -> tuple[int, int]:
        """Width and height that a picture is resized to."""
        ratio = max(width / self.width, height / self.height)
        return max(1, int(width / ratio)), max(1, int(height / ratio))


Resize: TypeAlias = ShortestEdge | Exact | Within


@dataclass(frozen=True, kw_only=True)
class CenterCrop:
    """The middle of the resized picture; where that is smaller, zeros (black) around it."""

    height: int
    width: int

    def corner(self, width: int, height: int) -> tuple[int, int]:
        """Left and top of the crop in a picture of that size; negative where zeros are added.

        Both roundings are the reference's: an odd surplus is cut more on the far side (floor), an odd lack is padded
        more on the near side (floor of a negative number).
        """
        return (width - self.width) // 2, (height - self.height) // 2


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The resized picture in the middle of black, as openpi has it; an odd lack is more on the far side."""

    height: int
    width: int

    def corner(self, width: int, height: int) -> tuple[int, int]:
        """Left and top of the frame in a picture of that size."""
        return -((self.width - width) // 2), -((self.height - height) // 2)


# ---- one tensor for a batch: CLIP, SigLIP, ViT, MAE, DINOv2 ----


@dataclass(frozen=True, kw_only=True)
class ImageProcessor:
    """Resize, crop, rescale, normalise: pictures to one batch of equal size. Stateless, so threads may share it."""

    resize: Resize | None
    crop: CenterCrop | Frame | None = None
    resample: Filter = "bicubic"
    rescale: float = 1 / 255
    mean: tuple[float, float, float] = HALF
    std: tuple[float, float, float] = HALF
    alpha: Alpha = "white"

    def __post_init__(self) -> None:
        sizes = [v for part in (self.resize, self.crop) if part is not None for v in vars(part).values()]
        if any(size < 1 for size in sizes) or any(s <= 0 for s in self.std) or self.rescale <= 0:
            raise ConfigError(f"sizes, std and rescale of an image processor must be positive: {self}")
        if self.resample not in _FILTERS:
            raise ConfigError(f"no resize filter is called {self.resample!r}{did_you_mean(self.resample, _FILTERS)}")

    def __call__(self, images: Sequence[Image]) -> Float[Tensor, "images 3 height width"]:
        """Decodes and processes.

        Raises:
            MediaError: a picture cannot be decoded, or the results differ in size and cannot be one batch.
        """
        return self.from_pil([decode(image, alpha=self.alpha) for image in images])

    def from_pil(self, pictures: Sequence[PILImage.Image]) -> Float[Tensor, "images 3 height width"]:
        """The same for RGB pictures that `decode` already made."""
        return self.normalise(self.pixels(pictures))

    def pixels(self, pictures: Sequence[PILImage.Image]) -> UInt8[Tensor, "images 3 height width"]:
        """Resized and cropped, still 8 bits: a quarter of the bytes to move to a device before `normalise`."""
        if not pictures:
            raise MediaError("an image processor needs at least one picture")
        arrays = [np.asarray(self._fit(picture)) for picture in pictures]
        if len({array.shape for array in arrays}) > 1:
            sizes = ", ".join(sorted({f"{a.shape[1]} x {a.shape[0]}" for a in arrays}))
            raise MediaError(f"pictures of different sizes ({sizes}) make no batch: set a crop or an exact size")
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)

    def normalise(self, pixels: UInt8[Tensor, "images 3 height width"]) -> Float[Tensor, "images 3 height width"]:
        """``(pixels * rescale - mean) / std``, on the device of ``pixels``."""
        scale, shift = affine(self.rescale, self.mean, self.std, pixels.device)
        floats = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        return floats.mul_(scale[:, None, None]).add_(shift[:, None, None])

    def pictures(self, batch: Batch) -> list[PILImage.Image]:
        """What a model got under the name ``pixels``, as pictures again."""
        return self.denormalise(batch["pixels"])

    def denormalise(self, pixels: Float[Tensor, "images 3 height width"]) -> list[PILImage.Image]:
        """The inverse of `normalise`."""
        scale, shift = affine(self.rescale, self.mean, self.std, pixels.device)
        levels = (pixels.float() - shift[:, None, None]) / scale[:, None, None]
        arrays = levels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return [PILImage.fromarray(array) for array in arrays]

    def view(self, width: int, height: int) -> View:
        """Where the pixels of the result lie in an upright picture of that size."""
        resized = self.resize.target(width, height) if self.resize else (width, height)
        left, top = self.crop.corner(*resized) if self.crop else (0, 0)
        return View(
            original=(width, height),
            seen=(self.crop.width, self.crop.height) if self.crop else resized,
            scale=(resized[0] / width, resized[1] / height),
            offset=(float(-left), float(-top)),
        )

    def _fit(self, picture: PILImage.Image) -> PILImage.Image:
        assert picture.mode == "RGB", "pictures come from `decode`"
        target = self.resize.target(*picture.size) if self.resize else picture.size
        left, top = self.crop.corner(*target) if self.crop else (0, 0)
        if target[0] * target[1] > _MAX_RESIZED:
            picture, left, top = self._middle(picture, target, left, top)
        elif target != picture.size:
            picture = picture.resize(target, pillow_filter(self.resample))
        if self.crop is None:
            return picture
        # Pillow fills what lies outside the picture with zeros.
        return picture.crop((left, top, left + self.crop.width, top + self.crop.height))

    def _middle(
        self, picture: PILImage.Image, target: tuple[int, int], left: int, top: int
    ) -> tuple[PILImage.Image, int, int]:
        """A line of 1 x 60,000 pixels would grow to gigabytes before its crop: only what the crop shows is resized.

        Not bit for bit: Pillow rounds to 8 bits between its two passes and picks their order by the sizes.
        """
        if self.crop is None:
            raise MediaError(
                f"a picture of {picture.width} x {picture.height} pixels would become {target[0]} x {target[1]}: its "
                "sides are too unequal for this model; cut it first"
            )
        x, y = max(left, 0), max(top, 0)
        size = min(target[0] - x, self.crop.width), min(target[1] - y, self.crop.height)
        across, down = picture.width / target[0], picture.height / target[1]
        box = (x * across, y * down, (x + size[0]) * across, (y + size[1]) * down)
        return picture.resize(size, pillow_filter(self.resample), box=box), left - x, top - y

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ImageProcessor:
        """Reads a ``preprocessor_config.json`` of CLIP, SigLIP, ViT (MAE) or BiT (DINOv2), every field of it; or ours.

        Raises:
            ConfigError: another kind of processor, a field that is not known, or a step that ours does not have.
        """
        read = _read_hf(config, _FIXED)
        resize = _hf_size(read["size"], "size", square=read["default_to_square"]) if read["do_resize"] else None
        if _hf_kind(config) == "Framed" and isinstance(resize, Exact):
            sides = vars(resize)
            return cls(resize=Within(**sides), crop=Frame(**sides), **hf_colour(read), alpha=read["alpha"])
        crop = None
        if read["do_center_crop"]:
            size = _hf_size(read["crop_size"], "crop_size", square=True)
            if not isinstance(size, Exact):
                raise ConfigError(f"preprocessor config: crop_size needs height and width, not {read['crop_size']}")
            crop = CenterCrop(height=size.height, width=size.width)
        return cls(resize=resize, crop=crop, **hf_colour(read), alpha=read["alpha"])

    def to_hf(self) -> dict[str, Any]:
        """A ``preprocessor_config.json`` that transformers reads to the same effect; it knows no frames."""
        if isinstance(self.crop, Frame):
            assert isinstance(self.resize, Within)
            return {"image_processor_type": "FramedImageProcessor", "size": vars(self.crop), **colour_to_hf(self)}
        size: dict[str, int] | None = None
        if isinstance(self.resize, ShortestEdge):
            size = {"shortest_edge": self.resize.size}
        elif isinstance(self.resize, Exact):
            size = {"height": self.resize.height, "width": self.resize.width}
        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_resize": size is not None,
            **({"size": size} if size else {}),
            "do_center_crop": self.crop is not None,
            **({"crop_size": {"height": self.crop.height, "width": self.crop.width}} if self.crop else {}),
            **colour_to_hf(self),
        }

    @classmethod
    def from_open_clip(cls, config: Mapping[str, Any], size: int) -> ImageProcessor:
        """Reads the ``preprocess_cfg`` of an ``open_clip_config.json``; ``size`` is the side that the tower takes.

        Raises:
            ConfigError: a field that is not known, or a step that ours does not have.
        """
        if not isinstance(config, Mapping):
            raise ConfigError(f"preprocess_cfg is {config!r}, expected an object")
        read = {**_OPEN_CLIP, "size": size, **{name: value for name, value in config.items() if value is not None}}
        problems = [f"{name} = {config[name]!r} is not known" for name in config.keys() - _OPEN_CLIP.keys() - {"size"}]
        side = read["size"] if isinstance(read["size"], list | tuple) else [read["size"]] * 2
        if len(side) != 2 or side[0] != side[1] or not isinstance(side[0], int):
            problems.append(f"size = {read['size']!r} is not one side of a square")
        if read["resize_mode"] not in ("shortest", "squash"):
            problems.append(f"resize_mode = {read['resize_mode']!r} asks for a step that ours does not have")
        known = {"mode": ["RGB"], "interpolation": ["bicubic", "bilinear", "random"], "alpha": ["white", "drop"]}
        wrong = [name for name, good in known.items() if read[name] not in good]
        problems += [f"{name} = {read[name]!r} is none of {', '.join(known[name])}" for name in wrong]
        if problems:
            raise ConfigError("preprocess_cfg:\n" + "\n".join(f"  - {problem}" for problem in sorted(problems)))
        square = {"height": side[0], "width": side[0]}
        shortest = read["resize_mode"] == "shortest"
        colour = hf_colour({**OPENAI, "image_mean": read["mean"], "image_std": read["std"], "resample": 3})
        return cls(
            resize=ShortestEdge(size=side[0]) if shortest else Exact(**square),
            crop=CenterCrop(**square) if shortest else None,
            **colour | {"resample": "bilinear" if read["interpolation"] == "bilinear" else "bicubic"},
            alpha=read["alpha"],
        )

    def to_open_clip(self) -> dict[str, Any]:
        """A ``preprocess_cfg`` that OpenCLIP reads to the same effect.

        Raises:
            ConfigError: OpenCLIP's format has no words for this processor.
        """
        raw: dict[str, Any] = {
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.resample,
            # Ours alone; OpenCLIP always drops and takes no notice.
            **({"alpha": self.alpha} if self.alpha != "drop" else {}),
        }
        if isinstance(self.resize, ShortestEdge):
            raw |= {"size": self.resize.size, "resize_mode": "shortest"}
        elif isinstance(self.resize, Exact):
            raw |= {"size": [self.resize.height, self.resize.width], "resize_mode": "squash"}
        if "size" not in raw or ImageProcessor.from_open_clip(raw, 1) != self:
            raise ConfigError(f"OpenCLIP's format has no words for this image processor, save it as hf: {self}")
        return raw


# ---- patches of any aspect: SigLIP 2 NaFlex ----


@dataclass(frozen=True, kw_only=True)
class PatchBudget:
    """The largest grid of whole patches with about the picture's aspect and at most ``max_patches`` cells."""

    patch_size: int = 16
    max_patches: int = 256

    def __post_init__(self) -> None:
        if self.patch_size < 1 or self.max_patches < 1:
            raise ConfigError(f"patch_size and max_patches must be positive: {self}")

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of patches.

        The scale is bisected from between 1e-6 and 100 down to 1e-5, as the reference does: a finer search would give
        another grid where a side lies just over a patch border.
        """

        def cells(scale: float) -> tuple[int, int]:
            rows, columns = (max(1, math.ceil(side * scale / self.patch_size)) for side in (height, width))
            return rows, columns

        fits, too_large = 1e-6, 100.0
        while too_large - fits >= 1e-5:
            middle = (fits + too_large) / 2
            if math.prod(cells(middle)) <= self.max_patches:
                fits = middle
            else:
                too_large = middle
        return cells(fits)


class Patches(NamedTuple):
    """A batch of pictures cut into patches, row by row; padding patches are zero and masked out."""

    patches: Float[Tensor, "images patches dim"]  # dim runs over patch rows, patch columns, then RGB
    mask: Bool[Tensor, "images patches"]
    shapes: Int[Tensor, "images 2"]  # rows and columns of each picture's grid


@dataclass(frozen=True, kw_only=True)
class PatchProcessor:
    """Pictures of any aspect to padded batches of patches. Holds no state, so threads may share it."""

    budget: PatchBudget
    resample: Filter = "bilinear"
    rescale: float = 1 / 255
    mean: tuple[float, float, float] = HALF
    std: tuple[float, float, float] = HALF
    alpha: Alpha = "white"

    def count(self, width: int, height: int) -> int:
        """How many patches a picture becomes (without padding)."""
        return math.prod(self.budget.grid(width, height))

    def view(self, width: int, height: int) -> View:
        """Where the pixels of the patches lie in an upright picture of that size."""
        rows, columns = self.budget.grid(width, height)
        seen = columns * self.budget.patch_size, rows * self.budget.patch_size
        return View(original=(width, height), seen=seen, scale=(seen[0] / width, seen[1] / height), offset=(0.0, 0.0))

    def __call__(self, images: Sequence[Image]) -> Patches:
        """Decodes and processes.

        Raises:
            MediaError: a picture cannot be decoded.
        """
        return self.from_pil([decode(image, alpha=self.alpha) for image in images])

    def from_pil(self, pictures: Sequence[PILImage.Image]) -> Patches:
        """The same for RGB pictures that `decode` already made."""
        if not pictures:
            raise MediaError("an image processor needs at least one picture")
        p, most = self.budget.patch_size, self.budget.max_patches
        shapes = torch.tensor([self.budget.grid(*picture.size) for picture in pictures])
        counts = shapes.prod(1)
        pixels = torch.zeros(len(pictures), most, p, p, 3, dtype=torch.uint8)
        for row, picture, (rows, columns) in zip(pixels, pictures, shapes.tolist(), strict=True):
            assert picture.mode == "RGB", "pictures come from `decode`"
            resized = np.array(picture.resize((columns * p, rows * p), pillow_filter(self.resample)))
            cut = torch.from_numpy(resized).view(rows, p, columns, p, 3).transpose(1, 2)
            row[: rows * columns] = cut.reshape(rows * columns, p, p, 3)
        mask = torch.arange(most) < counts[:, None]
        scale, shift = affine(self.rescale, self.mean, self.std, pixels.device)
        patches = pixels.to(torch.float32).mul_(scale).add_(shift).flatten(2)
        return Patches(patches.masked_fill_(~mask[:, :, None], 0.0), mask, shapes)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> PatchProcessor:
        """Reads a ``preprocessor_config.json`` of SigLIP 2 NaFlex, every field of it.

        Raises:
            ConfigError: another kind of processor, a field that is not known, or a step that ours does not have.
        """
        read = _read_hf(config, _FLEXIBLE)
        if not read["do_resize"]:
            raise ConfigError(
                "preprocessor config: do_resize false leaves pictures that are no whole number of patches"
            )
        for field in ("patch_size", "max_num_patches"):
            if not isinstance(read[field], int):
                raise ConfigError(f"preprocessor config: {field} = {read[field]!r} is not a whole number")
        budget = PatchBudget(patch_size=read["patch_size"], max_patches=read["max_num_patches"])
        return cls(budget=budget, **hf_colour(read), alpha=read["alpha"])

    def to_hf(self) -> dict[str, Any]:
        """A ``preprocessor_config.json`` that transformers reads to the same effect."""
        return {
            "image_processor_type": "Siglip2ImageProcessor",
            "do_resize": True,
            "patch_size": self.budget.patch_size,
            "max_num_patches": self.budget.max_patches,
            **colour_to_hf(self),
        }


def declared_processor(folder: Path) -> dict[str, Any] | None:
    """What ``preprocessor_config.json``, or else ``processor_config.json``, says; None if neither is there.

    Raises:
        ConfigError: what it says is no JSON object.
    """
    config, whole = folder / "preprocessor_config.json", folder / "processor_config.json"
    if not config.is_file() and not whole.is_file():
        return None
    read = read_json(config) if config.is_file() else read_json(whole).get("image_processor")
    if not isinstance(read, dict):
        raise ConfigError(f"{folder}: the image processor's config is not a JSON object")
    return read


def load_processor(folder: str | Path) -> ImageProcessor | PatchProcessor:
    """The image processor of a checkpoint folder, from ``preprocessor_config.json`` or ``processor_config.json``.

    Raises:
        ConfigError: neither file is there, or it describes a processor that ours cannot follow.
    """
    read = declared_processor(Path(folder))
    if read is None:
        raise ConfigError(f"{folder} holds neither preprocessor_config.json nor processor_config.json")
    return (PatchProcessor if _hf_kind(read) in _FLEXIBLE else ImageProcessor).from_hf(read)


# ---- reading and writing the Hub's configs ----

_COLOUR: dict[str, Any] = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "alpha": "white"}
OPENAI = {**_COLOUR, "image_mean": CLIP_MEAN, "image_std": CLIP_STD}
_STANDARD = {**_COLOUR, "image_mean": HALF, "image_std": HALF}
_OPEN_CLIP: dict[str, Any] = {
    "mode": "RGB",
    "mean": CLIP_MEAN,
    "std": CLIP_STD,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,  # of the padding that the mode "longest" makes, which is refused
    "alpha": "drop",
}
_SQUARE = {"size": 224, "default_to_square": True, "do_resize": True, "do_center_crop": False, "crop_size": None}
_CUT = {"size": 224, "default_to_square": False, "do_resize": True, "do_center_crop": True, "crop_size": 224}
# What a class of transformers takes for the fields that its config leaves out.
_FIXED: dict[str, dict[str, Any]] = {
    "CLIP": {**OPENAI, **_CUT, "resample": 3},
    "Bit": {**OPENAI, **_CUT, "resample": 3},
    "Siglip": {**_STANDARD, **_SQUARE, "default_to_square": False, "resample": 3},
    "ViT": {**_STANDARD, **_SQUARE, "resample": 2},
    "Blip": {**OPENAI, **_SQUARE, "size": 384, "resample": 3},
    "Chameleon": {
        **_COLOUR,
        **_CUT,
        "size": 512,
        "crop_size": 512,
        "resample": 1,
        "rescale_factor": 0.0078,
        "image_mean": (1.0, 1.0, 1.0),
        "image_std": (1.0, 1.0, 1.0),
    },
    "Framed": {**_STANDARD, **_SQUARE, "resample": 2},  # ours alone
}
_FLEXIBLE: dict[str, dict[str, Any]] = {
    "Siglip2": {**_STANDARD, "do_resize": True, "resample": 2, "patch_size": 16, "max_num_patches": 256},
}
# Fields without effect on the pixels that ours makes, each with the values for which that is true.
_NO_EFFECT: dict[str, Callable[[Any], bool]] = {
    "image_processor_type": lambda v: True,
    "feature_extractor_type": lambda v: True,
    "processor_class": lambda v: True,
    "_valid_processor_keys": lambda v: True,
    "do_convert_rgb": lambda v: True,  # ours always does: a fourth channel would only fail later
    "return_tensors": lambda v: True,
    "device": lambda v: True,
    "disable_grouping": lambda v: True,
    "data_format": lambda v: v in (None, "channels_first"),
    "input_data_format": lambda v: v is None,
    "do_pad": lambda v: not v,
    "pad_size": lambda v: v is None,
}


def _hf_kind(config: Mapping[str, Any]) -> str:
    """``CLIP`` for CLIPImageProcessor, CLIPImageProcessorFast, CLIPImageProcessorPil and CLIPFeatureExtractor."""
    name = config.get("image_processor_type") or config.get("feature_extractor_type")
    if not isinstance(name, str):
        raise ConfigError("preprocessor config: image_processor_type is missing, so its defaults are not known")
    kind = name.removesuffix("Fast").removesuffix("Pil").removesuffix("ImageProcessor").removesuffix("FeatureExtractor")
    if kind not in _FIXED | _FLEXIBLE:
        known = [f"{k}ImageProcessor" for k in _FIXED | _FLEXIBLE]
        raise ConfigError(f"preprocessor config: {name} is not supported{did_you_mean(name, known)}")
    return kind


def read_fields(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The fields of a preprocessor config that have a default, and what is wrong with the others."""
    problems = []
    for field, value in config.items():
        if field in _NO_EFFECT:
            if not _NO_EFFECT[field](value):
                problems.append(f"{field} = {value!r} asks for a step that ours does not have")
        elif field not in defaults:
            problems.append(f"{field} = {value!r} is not known{did_you_mean(field, [*defaults, *_NO_EFFECT])}")
    if config.get("alpha", "white") not in ("white", "drop"):
        problems.append(f"alpha = {config['alpha']!r} is neither white nor drop")
    # A null field means the class default there too.
    read = {field: default if config.get(field) is None else config[field] for field, default in defaults.items()}
    return read, problems


def bad_config(problems: Sequence[str]) -> ConfigError:
    """What is wrong with a preprocessor config, all of it."""
    return ConfigError("preprocessor config:\n" + "\n".join(f"  - {problem}" for problem in problems))


def _read_hf(config: Mapping[str, Any], kinds: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    kind = _hf_kind(config)
    if kind not in kinds:
        raise ConfigError(f"preprocessor config: a {kind} processor is not read here; use load_processor")
    read, problems = read_fields(config, kinds[kind])
    if problems:
        raise bad_config(problems)
    return read


def _hf_size(size: Any, field: str, *, square: bool) -> Resize:
    """A number (one side, of a square or of the shorter edge), a pair (height, width), or an object with names."""
    if isinstance(size, int):
        named = {"height": size, "width": size} if square else {"shortest_edge": size}
    elif isinstance(size, list | tuple) and len(size) == 2:
        named = {"height": size[0], "width": size[1]}
    elif isinstance(size, Mapping):
        named = {name: side for name, side in size.items() if side is not None}
    else:
        named = {}
    if all(isinstance(side, int) for side in named.values()):
        if named.keys() == {"height", "width"}:
            return Exact(height=named["height"], width=named["width"])
        if named.keys() == {"shortest_edge"}:
            return ShortestEdge(size=named["shortest_edge"])
    raise ConfigError(
        f"preprocessor config: {field} = {size!r} is not understood: a number, height and width, or shortest_edge"
    )


def hf_colour(read: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of our processors that concern filter and colour."""
    number = read["resample"]
    if number not in range(len(_FILTERS)):
        raise ConfigError(f"preprocessor config: resample = {number!r} is none of Pillow's filters 0 to 5")

    def numbers(field: str, count: int) -> list[float]:
        value = read[field]
        values = value if isinstance(value, list | tuple) else [value] * count
        if len(values) != count or not all(isinstance(v, int | float) for v in values):
            raise ConfigError(f"preprocessor config: {field} needs {count} number(s), not {value!r}")
        return [float(v) for v in values]

    return {
        "resample": _FILTERS[number],
        "rescale": numbers("rescale_factor", 1)[0] if read["do_rescale"] else 1.0,
        "mean": tuple(numbers("image_mean", 3)) if read["do_normalize"] else (0.0, 0.0, 0.0),
        "std": tuple(numbers("image_std", 3)) if read["do_normalize"] else (1.0, 1.0, 1.0),
    }


@runtime_checkable
class Colours(Protocol):
    """How a processor resamples, rescales and normalises."""

    @property
    def resample(self) -> Filter: ...
    @property
    def rescale(self) -> float: ...
    @property
    def mean(self) -> tuple[float, float, float]: ...
    @property
    def std(self) -> tuple[float, float, float]: ...
    @property
    def alpha(self) -> Alpha: ...


def colour_to_hf(processor: Colours) -> dict[str, Any]:
    """The inverse of `hf_colour`, with what else every processor of ours does."""
    return {
        "resample": _FILTERS.index(processor.resample),
        "do_rescale": True,
        "rescale_factor": processor.rescale,
        "do_normalize": True,
        "image_mean": list(processor.mean),
        "image_std": list(processor.std),
        "do_convert_rgb": True,
        # Ours alone; transformers has the one rule and takes no notice.
        **({"alpha": processor.alpha} if processor.alpha != "white" else {}),
    }


def pillow_filter(name: Filter) -> PILImage.Resampling:
    """Pillow's filter of this name."""
    return PILImage.Resampling(_FILTERS.index(name))


def affine(
    rescale: float, mean: Sequence[float], std: Sequence[float], device: torch.device
) -> tuple[Float[Tensor, " channels"], Float[Tensor, " channels"]]:
    """Rescaling and normalising as one multiplication and one addition."""
    scale = [rescale / s for s in std]
    shift = [-m / s for m, s in zip(mean, std, strict=True)]
    return torch.tensor(scale, device=device), torch.tensor(shift, device=device)
