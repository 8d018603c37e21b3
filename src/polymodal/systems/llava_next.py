"""LLaVA-NeXT (1.6): LLaVA that reads a picture whole and in tiles of its own resolution.

Paper: Liu et al., "LLaVA-NeXT: Improved reasoning, OCR, and world knowledge", 2024,
https://llava-vl.github.io/blog/2024-01-30-llava-next. Official code: haotian-liu/LLaVA.
Hub: llava-hf/llava-v1.6-mistral-7b-hf, llava-hf/llava-v1.6-vicuna-7b-hf, ...

    picture -> whole + tiles -> ViT -> connector -> joined as one grid, padding cut off, a newline after each row
    -> scatter -> decoder -> next-token loss; the view of the whole comes first

Training details kept here: as LLaVA's; the newline vector starts normal with a deviation of one over the root of the
width. The tower trains, too, in the paper's second stage, at 2e-6.

Deviations: the tower's last layer and last norm, which nothing reads, are kept for the file's sake and never train.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image as PILImage
from torch import Tensor, nn

from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError, UnsupportedError
from polymodal.core.verbs import TensorSpec
from polymodal.modalities.image import CLIP_MEAN, CLIP_STD, ImageProcessor, declared_processor
from polymodal.modalities.marks import Brackets
from polymodal.modalities.tiles import GRIDS, Grid, TileProcessor, best_grid, read_grids, shown
from polymodal.systems.tower import (
    CLIP_336,
    VICUNA,
    TowerConfig,
    TowerGenerator,
    read_parts,
    rules_of_parts,
    write_parts,
)
from polymodal.weights.fields import Fields
from polymodal.weights.format import Format, Reference
from polymodal.weights.rules import Rule, rule


@dataclass(frozen=True, kw_only=True)
class LlavaNextConfig(TowerConfig):
    """LLaVA's parts, and the canvases (in pixels) that tiles fill."""

    grids: tuple[Grid, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_class:
            raise ConfigError("a grid of tiles has no place for class tokens")


@final
class LlavaNext(TowerGenerator):
    """A vision-language model that reads tiles."""

    config: LlavaNextConfig
    notation = Brackets(of="square")  # as LLaVA's data, whatever the tiles

    def __init__(self, config: LlavaNextConfig) -> None:
        super().__init__(config)
        self.newline = nn.Parameter(torch.empty(config.backbone.dim))

    @torch.no_grad()
    def init_weights(self) -> None:
        super().init_weights()
        nn.init.normal_(self.newline, std=self.config.backbone.dim**-0.5)

    def inputs_spec(self) -> dict[str, TensorSpec]:
        c, side = self.config, self.config.vision.image_size
        width, height = 2 * side, side
        n, high = self.length(width, height), min(self.vocab_size, c.image_id)
        grid = best_grid(width, height, c.grids)
        tiles = 1 + (grid.height // side) * (grid.width // side)
        return {
            "ids": TensorSpec(shape=(n + 6,), dtype=torch.int64, low=3, high=high, head=(c.image_id,) * n),
            "labels": TensorSpec(shape=(n + 6,), dtype=torch.int64, high=high),
            "tiles": TensorSpec(shape=(tiles, c.vision.num_channels, side, side)),
            "tiles_row": TensorSpec(shape=(), dtype=torch.int64, rows=True),
            "sizes": TensorSpec(shape=(2,), dtype=torch.int64, head=(height, width)),
            "sizes_row": TensorSpec(shape=(), dtype=torch.int64, rows=True),
        }

    def _cells(self, width: int, height: int) -> tuple[Grid, int, tuple[int, int, int, int]]:
        """The canvas of a picture, features along one side of a tile, and what is left of the joined grid."""
        c, side = self.config, self.config.vision.image_size
        grid, cells = best_grid(width, height, c.grids), c.vision.grid
        return grid, cells, shown(width, height, grid.width // side * cells, grid.height // side * cells)

    def length(self, width: int, height: int) -> int:
        """Tokens that a picture of this size becomes."""
        _, cells, (left, top, right, bottom) = self._cells(width, height)
        return cells**2 + (bottom - top) * (right - left + 1)

    def features(self, batch: Batch) -> Float[Tensor, "features dim"]:
        side, parts = self.config.vision.image_size, []
        sizes = batch["sizes"].tolist()
        counts = [1 + (g.height // side) * (g.width // side) for g in (self._cells(w, h)[0] for h, w in sizes)]
        whole = [tiles[:count] for tiles, count in zip(batch["tiles"], counts, strict=True)]
        # In one run, since processes that share out the tower's weights must call it equally often.
        every = self.project(torch.cat(whole)).split(counts)
        for x, (height, width) in zip(every, sizes, strict=True):
            grid, cells, (left, top, right, bottom) = self._cells(width, height)
            joined = rearrange(
                x[1:], "(rows columns) (h w) d -> (rows h) (columns w) d", rows=grid.height // side, h=cells
            )[top:bottom, left:right]
            newline = self.newline.to(x.dtype).expand(len(joined), 1, -1)
            parts += [x[0], torch.cat([joined, newline], 1).flatten(0, 1)]
        return torch.cat(parts)

    def see(self, pictures: Sequence[PILImage.Image]) -> tuple[list[list[int]], Batch]:
        if not isinstance(self.images, TileProcessor):
            raise UnsupportedError(f"{self.source} has no image processor for tiles")
        each = [self.images.from_pil(picture) for picture in pictures]
        tiles = each[0].new_zeros(len(each), max(map(len, each)), *each[0].shape[1:])
        for row, pieces in enumerate(each):
            tiles[row, : len(pieces)] = pieces
        order = torch.arange(len(pictures))
        sizes = torch.tensor([[p.height, p.width] for p in pictures])
        spelled = [[self.config.image_id] * self.length(*picture.size) for picture in pictures]
        return spelled, Batch(tiles=tiles, tiles_row=order, sizes=sizes, sizes_row=order)

    def default_images(self) -> TileProcessor:
        colour = ImageProcessor(resize=None, resample="bicubic", mean=CLIP_MEAN, std=CLIP_STD)
        return TileProcessor(side=self.config.vision.image_size, grids=self.config.grids, colour=colour)

    def load_images(self, folder: Path, fmt: Format) -> TileProcessor:
        declared = declared_processor(folder)
        if declared is None:
            return self.default_images()
        images = TileProcessor.from_hf(declared)
        if (images.side, images.grids) != (self.config.vision.image_size, self.config.grids):
            raise ConfigError(f"{folder}: preprocessor_config.json and config.json name different tiles")
        return images

    reference = Reference(
        package="transformers", cls="LlavaNextForConditionalGeneration",
        inputs={"ids": "input_ids", "labels": "labels", "tiles": "pixel_values", "sizes": "image_sizes"},
        output="logits",
    )  # fmt: skip


def read_hf(raw: Mapping[str, Any]) -> tuple[LlavaNextConfig, dict[str, str]]:
    f = Fields(raw)
    f.require("model_type", "llava_next")
    f.require("use_image_newline_parameter", True)
    parts = read_parts(f)
    grids = read_grids(f.take("image_grid_pinpoints", list, GRIDS))
    report = f.done()
    return LlavaNextConfig(**parts, grids=grids), report


def write_hf(c: LlavaNextConfig) -> dict[str, Any]:
    grids = [list(grid) for grid in c.grids]
    return {
        "architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next", **write_parts(c),
        "image_grid_pinpoints": grids,
    }  # fmt: skip


def rules_hf(c: LlavaNextConfig) -> list[Rule]:
    return [*rules_of_parts(c), rule("image_newline", "newline")]


LlavaNext.formats = {"hf": Format(read=read_hf, write=write_hf, rules=rules_hf)}

MISTRAL = {"model_type": "mistral", "vocab_size": 32064, "max_position_embeddings": 32768, "sliding_window": None}
MISTRAL |= {"rope_theta": 1e6, "rms_norm_eps": 1e-5}
PRESETS = {
    f"llava-hf/llava-v1.6-{name}-hf": partial(
        lambda text: read_hf({"model_type": "llava_next", "vision_config": CLIP_336, "text_config": text})[0], text
    )
    for name, text in (("mistral-7b", MISTRAL), ("vicuna-7b", VICUNA))
}
