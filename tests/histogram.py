"""A model small enough for tests of what stands around a model: it sees colours, and knows their English names."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image as PILImage
from PIL import ImageColor
from torch import Tensor

from polymodal.core.batch import Batch
from polymodal.core.sample import IMAGE_SUFFIXES, Image, Sample, samples
from polymodal.modalities.image import decode

LEVELS = 4  # of each colour channel


class Histogram:
    """`Embeds` and `Classifies` without weights: the vector of a picture is its histogram over 64 colours.

    Args:
        pause: seconds that a batch takes, to give a test time to interrupt.
        salt: makes the fingerprint that of another model.
    """

    embedding_dim = LEVELS**3
    suffixes = IMAGE_SUFFIXES

    def __init__(self, *, pause: float = 0.0, salt: str = "") -> None:
        self.pause = pause
        self.fingerprint = f"histogram{salt}"
        self.encoded = 0  # pictures and texts

    def prepare(self, items: Sequence[Sample]) -> Batch:
        pictures = [self._picture(sample) for sample in items]
        pixels = [torch.frombuffer(bytearray(p.resize((32, 32)).tobytes()), dtype=torch.uint8) for p in pictures]
        return Batch(pixels=torch.stack(pixels).view(len(items), -1, 3))

    def _picture(self, sample: Sample) -> PILImage.Image:
        (part,) = sample.parts
        if isinstance(part, Image):
            return decode(part)
        colours = [ImageColor.colormap[w] for w in part.text.lower().split() if w in ImageColor.colormap]
        return PILImage.new("RGB", (32, 32), colours[0] if colours else "grey")

    def encode(self, batch: Batch) -> Float[Tensor, "samples dim"]:
        time.sleep(self.pause)
        self.encoded += batch.size
        level = batch["pixels"].long() * LEVELS // 256
        colour = (level[..., 0] * LEVELS + level[..., 1]) * LEVELS + level[..., 2]
        counts = torch.zeros(batch.size, self.embedding_dim).scatter_add_(1, colour, torch.ones_like(colour).float())
        return torch.nn.functional.normalize(counts, dim=1)

    def embed(
        self, items: Any, *, batch_size: int = 64, progress: Callable[[int], None] | None = None
    ) -> Float[Tensor, "samples dim"]:
        vectors = self.encode(self.prepare(samples(items)))
        if progress is not None:
            progress(len(vectors))
        return vectors

    def logits(
        self, images: Float[Tensor, "images dim"], texts: Float[Tensor, "texts dim"]
    ) -> Float[Tensor, "images texts"]:
        return 10 * images @ texts.T
