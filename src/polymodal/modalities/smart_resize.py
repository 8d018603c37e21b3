"""Pictures and clips of any size for the Qwen-VL family: sides rounded to whole tokens, aspect kept, cut into patches.

Sources: Wang et al., "Qwen2-VL", 2024, https://arxiv.org/abs/2409.12191, and the official qwen-vl-utils.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from PIL import Image as PILImage
from torch import Tensor

from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError, MediaError
from polymodal.core.files import read_json
from polymodal.core.sample import Video
from polymodal.modalities.image import (
    CLIP_MEAN,
    CLIP_STD,
    OPENAI,
    Alpha,
    Filter,
    View,
    affine,
    bad_config,
    colour_to_hf,
    hf_colour,
    pillow_filter,
    read_fields,
)
from polymodal.modalities.video import Fps, Sampling, decode, open_video

_STEEPEST = 200  # a longer side over the shorter one


def smart_resize(width: int, height: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Width and height that a picture is resized to: multiples of ``factor`` of about its aspect and of its size.

    The minimum may be passed by what rounding up adds; a very flat picture of few pixels may pass the maximum.

    Raises:
        MediaError: one side is more than 200 times as long as the other.
    """
    if max(width, height) > _STEEPEST * min(width, height):
        raise MediaError(
            f"a picture of {width} x {height} pixels: its sides are too unequal for this model, at most {_STEEPEST} to "
            "1; cut it first"
        )
    across, down = (round(side / factor) * factor for side in (width, height))
    if across * down > max_pixels:
        shrink = math.sqrt(width * height / max_pixels)
        across, down = (max(factor, math.floor(side / shrink / factor) * factor) for side in (width, height))
    elif across * down < min_pixels:
        grow = math.sqrt(min_pixels / (width * height))
        across, down = (math.ceil(side * grow / factor) * factor for side in (width, height))
    return across, down


_SAMPLING = Fps(fps=2.0)


@dataclass(frozen=True, kw_only=True)
class ClipSize:
    """Which frames of a clip are taken and how large they become; the defaults are those of qwen-vl-utils.

    A frame has ``min_pixels`` to ``max_pixels``, less in a clip of so many frames that they would pass ``total_pixels``
    together.
    """

    sampling: Sampling = _SAMPLING
    min_pixels: int = 128 * 28 * 28
    max_pixels: int = 768 * 28 * 28
    total_pixels: int = 115_200 * 28 * 28

    def most(self, frames: int, temporal_size: int) -> int:
        """The most pixels that each of so many frames may have."""
        share = self.total_pixels * temporal_size // frames
        return max(min(self.max_pixels, share), int(self.min_pixels * 1.05))


class _Plan(NamedTuple):
    """What a medium becomes."""

    size: tuple[int, int]  # width and height
    grid: tuple[int, int, int]  # steps in time, rows and columns of patches
    times: list[float]  # of the frames of a clip
    seconds: float  # from one step in time to the next


@dataclass(frozen=True, kw_only=True)
class SmartResize:
    """The processor. Holds no state, so threads may share it.

    Attributes:
        merge_size: squares of so many patches a side become one token.
        temporal_size: frames that a patch spans; pictures are doubled, an odd clip's last frame is repeated.
    """

    patch_size: int = 14
    merge_size: int = 2
    temporal_size: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 1280 * 28 * 28
    clips: ClipSize = ClipSize()
    resample: Filter = "bicubic"
    rescale: float = 1 / 255
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    alpha: Alpha = "white"

    def __post_init__(self) -> None:
        sizes = (self.patch_size, self.merge_size, self.temporal_size, self.min_pixels)
        if any(size < 1 for size in sizes) or self.max_pixels < self.min_pixels:
            raise ConfigError(f"sizes must be positive, and min_pixels at most max_pixels: {self}")

    def count(self, medium: PILImage.Image | Video) -> int:
        """How many tokens a medium becomes; of a clip its header is read."""
        return self._tokens(self._plan(medium))

    def target(self, width: int, height: int) -> tuple[int, int]:
        """Width and height that a picture is resized to."""
        factor = self.patch_size * self.merge_size
        return smart_resize(width, height, factor=factor, min_pixels=self.min_pixels, max_pixels=self.max_pixels)

    def view(self, width: int, height: int) -> View:
        """Where the pixels that the model sees lie in an upright picture of that size."""
        seen = self.target(width, height)
        return View(original=(width, height), seen=seen, scale=(seen[0] / width, seen[1] / height), offset=(0.0, 0.0))

    def __call__(self, media: Sequence[PILImage.Image | Video]) -> tuple[list[int], Batch]:
        """The number of tokens of each medium; and the tensors of all, ragged over media.

        The batch has ``patches`` (tokens, the patches of each, numbers), ``grid`` (media, 3: steps in time, rows and
        columns of patches) and ``seconds`` (media: from one step in time to the next, 0 of a picture), each with its
        ``_row``.

        Args:
            media: pictures that `image.decode` made, and clips, whose frames are decoded here one by one.

        Raises:
            MediaError: a medium cannot be decoded or is too flat.
        """
        plans = [self._plan(medium) for medium in media]
        counts = [self._tokens(plan) for plan in plans]
        number = torch.arange(len(plans))
        patches = [self._cut(self._frames(medium, plan)) for medium, plan in zip(media, plans, strict=True)]
        return counts, Batch(
            patches=torch.cat(patches), patches_row=number.repeat_interleave(torch.tensor(counts)),
            grid=torch.tensor([plan.grid for plan in plans]), grid_row=number,
            seconds=torch.tensor([plan.seconds for plan in plans]), seconds_row=number,
        )  # fmt: skip

    def _tokens(self, plan: _Plan) -> int:
        return math.prod(plan.grid) // self.merge_size**2

    def _plan(self, medium: PILImage.Image | Video) -> _Plan:
        times, seconds, steps = [], 0.0, 1
        if isinstance(medium, Video):
            info, times = open_video(medium), self.clips.sampling.times(medium)
            steps = math.ceil(len(times) / self.temporal_size)
            seconds = self.temporal_size * info.frames / info.fps / len(times)
            most, factor = self.clips.most(len(times), self.temporal_size), self.patch_size * self.merge_size
            size = smart_resize(*info.size, factor=factor, min_pixels=self.clips.min_pixels, max_pixels=most)
        else:
            assert medium.mode == "RGB", "pictures come from `decode`"
            size = self.target(*medium.size)
        return _Plan(size, (steps, size[1] // self.patch_size, size[0] // self.patch_size), times, seconds)

    def _frames(self, medium: PILImage.Image | Video, plan: _Plan) -> UInt8[Tensor, "frames height width 3"]:
        """Resized frames, as many as the patches span."""
        pictures: Iterable[PILImage.Image] = (
            [medium]
            if not isinstance(medium, Video)
            else (PILImage.fromarray(frame) for _, frame in decode(medium, plan.times))
        )
        filter = pillow_filter(self.resample)
        frames = [torch.from_numpy(np.array(picture.resize(plan.size, filter))) for picture in pictures]
        frames += frames[-1:] * (plan.grid[0] * self.temporal_size - len(frames))
        return torch.stack(frames)

    def _cut(self, frames: UInt8[Tensor, "frames height width 3"]) -> Float[Tensor, "tokens neighbours patch_dim"]:
        scale, shift = affine(self.rescale, self.mean, self.std, frames.device)
        return rearrange(
            frames.float().mul_(scale).add_(shift),
            "(t i) (h a p) (w b q) c -> (t h w) (a b) (c i p q)",
            i=self.temporal_size, a=self.merge_size, b=self.merge_size, p=self.patch_size, q=self.patch_size,
        )  # fmt: skip

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> SmartResize:
        """Reads a ``preprocessor_config.json`` of Qwen2-VL or Qwen2.5-VL, every field of it.

        Raises:
            ConfigError: another kind of processor, a field that is not known, or a step that ours does not have.
        """
        kind = str(config.get("image_processor_type")).removesuffix("Fast").removesuffix("Pil")
        if kind not in ("Qwen2VLImageProcessor", "Qwen2_5_VLImageProcessor"):
            raise ConfigError(f"preprocessor config: {config.get('image_processor_type')} is not Qwen2VLImageProcessor")
        read, problems = read_fields(config, _HUB)
        if not read["do_resize"]:
            problems.append("do_resize = False leaves pictures that are no whole number of tokens")
        size = read["size"] if isinstance(read["size"], Mapping) else {}
        read["min_pixels"] = read["min_pixels"] or size.get("shortest_edge")
        read["max_pixels"] = read["max_pixels"] or size.get("longest_edge")
        whole = (*_SIZES, "min_pixels", "max_pixels")
        problems += [f"{n} = {read[n]!r} is not a whole number" for n in whole if type(read[n]) is not int]
        if problems:
            raise bad_config(problems)
        sizes = {ours: read[theirs] for theirs, ours in _SIZES.items()}
        limits = {name: read[name] for name in ("min_pixels", "max_pixels")}
        return cls(**sizes, **limits, **hf_colour(read), alpha=read["alpha"])

    def to_hf(self) -> dict[str, Any]:
        """A ``preprocessor_config.json`` that transformers reads to the same effect."""
        return {
            "image_processor_type": "Qwen2VLImageProcessor",
            "do_resize": True,
            **{theirs: getattr(self, ours) for theirs, ours in _SIZES.items()},
            "size": {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels},
            "min_pixels": self.min_pixels,
            "max_pixels": self.max_pixels,
            **colour_to_hf(self),
        }


_SIZES = {"patch_size": "patch_size", "temporal_patch_size": "temporal_size", "merge_size": "merge_size"}
_HUB: dict[str, Any] = {
    **OPENAI, "do_resize": True, "resample": 3, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
    "min_pixels": None, "max_pixels": None, "default_to_square": False,
    "size": {"shortest_edge": 56 * 56, "longest_edge": 1280 * 28 * 28},
}  # fmt: skip


def load_smart_resize(folder: Path) -> SmartResize | None:
    """The processor of a checkpoint folder; None where it declares none.

    Raises:
        ConfigError: it declares another kind.
    """
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            read = read_json(folder / name)
            read = read.get("image_processor", read) if isinstance(read, dict) else read
            if not isinstance(read, dict):
                raise ConfigError(f"{folder / name} is not a JSON object")
            return SmartResize.from_hf(read)
    return None
