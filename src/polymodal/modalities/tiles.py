"""Pictures as tiles: one view of the whole, and pieces of an enlarged copy (LLaVA-NeXT's "any resolution")."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image as PILImage
from torch import Tensor

from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError, MediaError
from polymodal.modalities.image import Alpha, CenterCrop, Exact, ImageProcessor, View


class Grid(NamedTuple):
    """A canvas in pixels that tiles of one size fill."""

    height: int
    width: int


def best_grid(width: int, height: int, grids: Sequence[Grid]) -> Grid:
    """The canvas on which most of the picture's own pixels are kept; of equals the one that wastes least."""

    def keeps(grid: Grid) -> tuple[int, int]:
        scale = min(grid.width / width, grid.height / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - grid.width * grid.height

    return max(grids, key=keeps)


def shown(width: int, height: int, columns: int, rows: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the picture on a canvas of so many feature columns and rows, its padding cut off."""
    if width / height > columns / rows:
        used = int(round(height * (columns / width), 7))
        border = (rows - used) // 2
        return 0, border, columns, rows - border
    used = int(round(width * (rows / height), 7))
    border = (columns - used) // 2
    return border, 0, columns - border, rows


@dataclass(frozen=True, kw_only=True)
class TileProcessor:
    """The whole picture squeezed into one tile, then the tiles of the canvas that suits it, row by row."""

    side: int
    grids: tuple[Grid, ...]
    colour: ImageProcessor  # filter, scale and normalisation; its resize and crop are not used

    def __post_init__(self) -> None:
        wrong = [tuple(g) for g in self.grids if g.height % self.side or g.width % self.side]
        if wrong or not self.grids:
            raise ConfigError(f"canvases {wrong or '(none)'} are not whole numbers of tiles of {self.side} pixels")

    @property
    def alpha(self) -> Alpha:
        """What is made of transparent pixels."""
        return self.colour.alpha

    def view(self, width: int, height: int) -> View:
        """Where the pixels of the whole, which comes first, lie in an upright picture of that size."""
        scale = (self.side / width, self.side / height)
        return View(original=(width, height), seen=(self.side, self.side), scale=scale, offset=(0.0, 0.0))

    def tiles(self, picture: PILImage.Image) -> UInt8[Tensor, "tiles 3 side side"]:
        """The tiles of one RGB picture, 8 bits."""
        grid = best_grid(*picture.size, self.grids)
        scale = min(grid.width / picture.width, grid.height / picture.height)
        across = picture.height * grid.width / picture.width <= grid.height
        width = grid.width if across else min(math.ceil(picture.width * scale), grid.width)
        height = min(math.ceil(picture.height * scale), grid.height) if across else grid.height
        if min(width, height) < 1:
            raise MediaError(f"a picture of {picture.width} x {picture.height} pixels is too narrow for tiles")
        canvas = PILImage.new("RGB", (grid.width, grid.height))
        exact = ImageProcessor(resize=Exact(height=height, width=width), resample=self.colour.resample)
        enlarged = PILImage.fromarray(exact.pixels([picture])[0].permute(1, 2, 0).numpy())
        canvas.paste(enlarged, ((grid.width - width) // 2, (grid.height - height) // 2))
        whole = ImageProcessor(resize=Exact(height=self.side, width=self.side), resample=self.colour.resample)
        pieces = torch.from_numpy(np.array(canvas)).permute(2, 0, 1)
        pieces = pieces.unfold(1, self.side, self.side).unfold(2, self.side, self.side)
        return torch.cat([whole.pixels([picture]), pieces.permute(1, 2, 0, 3, 4).flatten(0, 1)])

    def from_pil(self, picture: PILImage.Image) -> Float[Tensor, "tiles 3 side side"]:
        return self.colour.normalise(self.tiles(picture))

    def pictures(self, batch: Batch) -> list[PILImage.Image]:
        """What a model got under the name ``tiles``, as pictures again: the whole first."""
        return self.colour.denormalise(batch["tiles"].flatten(0, 1))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> TileProcessor:
        """Reads the ``preprocessor_config.json`` of LLaVA-NeXT."""
        rest = {k: v for k, v in config.items() if k not in ("image_grid_pinpoints", "do_pad")}
        plain = ImageProcessor.from_hf(rest | {"image_processor_type": "CLIPImageProcessor"})
        if not isinstance(plain.crop, CenterCrop) or plain.crop.height != plain.crop.width:
            raise ConfigError("preprocessor config: tiles are squares of crop_size")
        grids = config.get("image_grid_pinpoints") or GRIDS
        return cls(side=plain.crop.height, grids=read_grids(grids), colour=plain)

    def to_hf(self) -> dict[str, Any]:
        """A ``preprocessor_config.json`` that transformers reads to the same effect."""
        side = {"height": self.side, "width": self.side}
        return self.colour.to_hf() | {
            "image_processor_type": "LlavaNextImageProcessor", "do_resize": True, "size": {"shortest_edge": self.side},
            "do_center_crop": True, "crop_size": side, "do_pad": True,
            "image_grid_pinpoints": [list(grid) for grid in self.grids],
        }  # fmt: skip


GRIDS: Final = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def read_grids(values: Any) -> tuple[Grid, ...]:
    """Canvases from pairs of height and width.

    Raises:
        ConfigError: the values are something else.
    """
    ok = isinstance(values, list | tuple) and all(
        isinstance(v, list | tuple) and len(v) == 2 and all(isinstance(n, int) and 0 < n <= 2**14 for n in v)
        for v in values
    )
    if not ok:
        raise ConfigError(f"image_grid_pinpoints is {values!r:.80}, expected pairs of height and width")
    return tuple(Grid(*v) for v in values)
