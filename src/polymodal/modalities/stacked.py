"""One picture for several towers: processed for each, and stacked as channels of one tensor (Prismatic, OpenVLA)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, TypeAlias

import torch
from jaxtyping import Float
from PIL import Image as PILImage
from torch import Tensor

from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError
from polymodal.modalities.image import Alpha, CenterCrop, Exact, ImageProcessor, ShortestEdge, View, bad_config

Fit: TypeAlias = Literal["letterbox", "resize-naive", "resize-crop"]
FITS: Final[tuple[Fit, ...]] = ("letterbox", "resize-naive", "resize-crop")
MAX_SIDE: Final = 2**13  # in pixels, of a picture with borders: a strip would need a square of gigabytes
Colour: TypeAlias = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class StackedProcessor:
    """Pictures to squares of ``size`` pixels, once for each mean and deviation. Holds no state.

    Attributes:
        fit: ``letterbox`` adds borders in the mean colour, ``resize-naive`` squeezes, ``resize-crop`` cuts.
        means: of each tower, the first first; ``stds`` likewise.
    """

    size: int
    fit: Fit
    means: tuple[Colour, ...]
    stds: tuple[Colour, ...]
    alpha: Alpha = "drop"  # as PIL's convert("RGB")

    def __post_init__(self) -> None:
        if self.fit not in FITS or self.size < 1 or not self.means or len(self.means) != len(self.stds):
            raise ConfigError(f"sizes are positive, fits are {', '.join(FITS)}, a std for each mean: {self}")
        _ = self.each  # raises what is wrong with a mean or a deviation

    @property
    def each(self) -> list[ImageProcessor]:
        """The processor of each tower, behind the borders."""
        square = {"height": self.size, "width": self.size}
        naive = self.fit == "resize-naive"
        shape: dict[str, Any] = {
            "resize": Exact(**square) if naive else ShortestEdge(size=self.size),
            "crop": None if naive else CenterCrop(**square),
        }
        return [ImageProcessor(**shape, mean=m, std=s) for m, s in zip(self.means, self.stds, strict=True)]

    def borders(self, width: int, height: int) -> tuple[int, int]:
        """Columns on either side, and rows above and below, that make a picture square, but for one pixel."""
        longest = max(width, height) if self.fit == "letterbox" else 0
        return max(longest - width, 0) // 2, max(longest - height, 0) // 2

    def from_pil(self, pictures: Sequence[PILImage.Image]) -> Float[Tensor, "images channels height width"]:
        """RGB pictures, three channels for each tower."""
        rows = [torch.cat([each.from_pil([self._framed(p, each.mean)]) for each in self.each], 1) for p in pictures]
        return torch.cat(rows)

    def _framed(self, picture: PILImage.Image, mean: Colour) -> PILImage.Image:
        x, y = self.borders(*picture.size)
        shrunk = max(self.size, MAX_SIDE) / max(picture.size)
        if shrunk < 1 and (x or y):
            width, height = (max(1, round(side * shrunk)) for side in picture.size)
            picture = picture.resize((width, height))
            x, y = self.borders(*picture.size)
        if not x and not y:
            return picture
        canvas = PILImage.new("RGB", (picture.width + 2 * x, picture.height + 2 * y), tuple(int(m * 255) for m in mean))
        canvas.paste(picture, (x, y))
        return canvas

    def pictures(self, batch: Batch) -> list[PILImage.Image]:
        """What the first tower got of each picture."""
        return self.each[0].denormalise(batch["pixels"][:, :3])

    def view(self, width: int, height: int) -> View:
        """Where the pixels that the towers see lie in an upright picture of that size."""
        x, y = self.borders(width, height)
        inner = self.each[0].view(width + 2 * x, height + 2 * y)
        offset = (inner.offset[0] + x * inner.scale[0], inner.offset[1] + y * inner.scale[1])
        return replace(inner, original=(width, height), offset=offset)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> StackedProcessor:
        """Reads the ``preprocessor_config.json`` of Prismatic and OpenVLA.

        Raises:
            ConfigError: another kind of processor, a field that is not known, or a step that ours does not have.
        """
        sizes, fit = config.get("input_sizes"), config.get("image_resize_strategy")
        means, stds = config.get("means"), config.get("stds")
        problems = [f"{name} = {config[name]!r} is not known" for name in config.keys() - _KNOWN]
        kind = config.get("image_processor_type")
        if kind != _KIND:
            problems.append(f"image_processor_type = {kind!r} is not {_KIND}")
        if fit not in FITS:
            problems.append(f"image_resize_strategy = {fit!r} is none of {', '.join(FITS)}")
        filters = config.get("interpolations") or []
        if not isinstance(filters, list) or any(name != "bicubic" for name in filters):
            problems.append(f"interpolations = {filters!r}: only bicubic is supported")
        if not (isinstance(sizes, list) and sizes and all(s == sizes[0] and _square(s) for s in sizes)):
            problems.append(f"input_sizes = {sizes!r} are not equal squares of three channels")
        if not (_colours(means, sizes, -math.inf) and _colours(stds, sizes, 0.0)):
            problems.append(f"means = {means!r} and stds = {stds!r} are not three numbers for each of input_sizes")
        if problems:
            raise bad_config(sorted(problems))
        assert isinstance(sizes, list)
        colours = [tuple(tuple(map(float, colour)) for colour in values) for values in (means or (), stds or ())]
        return cls(size=sizes[0][1], fit=fit, means=colours[0], stds=colours[1])  # type: ignore[arg-type]

    def to_hf(self) -> dict[str, Any]:
        """A ``preprocessor_config.json`` that their code reads to the same effect."""
        count, side = len(self.means), self.size
        return {
            "image_processor_type": _KIND, "image_resize_strategy": self.fit, "input_sizes": [[3, side, side]] * count,
            "interpolations": ["bicubic"] * count, "means": [list(mean) for mean in self.means],
            "stds": [list(std) for std in self.stds], "use_fused_vision_backbone": count > 1,
        }  # fmt: skip


_KIND: Final = "PrismaticImageProcessor"
# The fields that begin with tvf_ repeat the others, as torchvision's keywords.
_KNOWN: Final = {
    "image_processor_type", "image_resize_strategy", "input_sizes", "interpolations", "means", "stds", "auto_map",
    "processor_class", "use_fused_vision_backbone", *(f"tvf_{name}" for name in (
        "resize_params", "crop_params", "normalize_params", "do_letterbox", "letterbox_fill"
    )),
}  # fmt: skip


def _square(size: Any) -> bool:
    return isinstance(size, list) and len(size) == 3 and size[0] == 3 and size[1] == size[2] and _side(size[1])


def _side(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 2**14


def _colours(values: Any, sizes: Any, above: float) -> bool:
    return isinstance(values, list) and isinstance(sizes, list) and len(values) == len(sizes) and all(
        isinstance(colour, list) and len(colour) == 3
        and all(isinstance(v, int | float) and above < v < math.inf for v in colour)
        for colour in values
    )  # fmt: skip
