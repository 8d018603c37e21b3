from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from polymodal.core.batch import Batch
from polymodal.data.masks import block_masks
from polymodal.encoders.vit import ViTConfig
from polymodal.heads.distillation import DistillationConfig
from polymodal.modalities.image import ImageProcessor
from polymodal.systems.dinov2 import DINOv2Config
from recipes.nano.scenes import close_up, render

SIZE, PATCH = 32, 8
CONFIG = DINOv2Config(
    vision=ViTConfig(
        image_size=SIZE, patch_size=PATCH, dim=96, num_layers=4, num_heads=4, hidden_dim=384, layer_scale=1.0,
        mask_token=True,
    ),
    objective=DistillationConfig(
        global_size=SIZE, local_size=24, num_locals=2, num_prototypes=128, hidden_dim=256, bottleneck_dim=64,
        ibot_bottleneck_dim=64, momentum=0.98, warmup=0.3, frozen=0.02,
    ),
)  # fmt: skip


def random_crops(
    pictures: Float[Tensor, "batch 3 height width"],
    rng: np.random.Generator,
    size: int,
    areas: tuple[float, float],
) -> Float[Tensor, "batch 3 {size} {size}"]:
    """A random part of each picture (its share of the area, aspect 3/4 to 4/3), perhaps mirrored, at a new size."""
    batch = len(pictures)
    area, aspect = rng.uniform(*areas, batch), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), batch))
    extent = np.minimum(np.sqrt(np.stack([area * aspect, area / aspect], 1)), 1.0)  # width, height
    centre = (1 - extent) * rng.uniform(-1, 1, (batch, 2))
    extent[:, 0] *= np.where(rng.random(batch) < 0.5, -1, 1)
    theta = torch.zeros(batch, 2, 3)
    theta[:, [0, 1], [0, 1]], theta[:, :, 2] = torch.from_numpy(extent).float(), torch.from_numpy(centre).float()
    grid = F.affine_grid(theta, [batch, 3, size, size], align_corners=False)
    return F.grid_sample(pictures, grid, padding_mode="reflection", align_corners=False)


def other_colours(pictures: Float[Tensor, "batch 3 height width"], rng: np.random.Generator) -> Tensor:
    """Brightness, contrast, saturation and hue of most, grey for a fifth, solarised a tenth; values from 0 to 1."""

    def draw(low: float, high: float) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, (len(pictures), 1, 1, 1))).float()

    grey = pictures.mean(1, keepdim=True)
    x = (grey + (pictures - grey) * draw(0.8, 1.2)) * draw(0.6, 1.4)
    level = x.mean((1, 2, 3), keepdim=True)
    x = level + (x - level) * draw(0.6, 1.4)
    # Hue: a rotation of colours about the grey axis.
    angle = draw(-1, 1) * np.pi
    shifted = sum(x.roll(k, 1) * (1 + 2 * torch.cos(angle + 2 * np.pi * k / 3)) for k in range(3)) / 3
    x = torch.where(draw(0, 1) < 0.8, shifted, pictures)
    x = torch.where(draw(0, 1) < 0.2, x.mean(1, keepdim=True), x).clamp(0, 1)
    return torch.where((draw(0, 1) < 0.1) & (x > 0.5), 1 - x, x)


@dataclass(frozen=True)
class Views:
    """New pictures for each step; of each two large and four small crops, and masks for the large ones."""

    images: ImageProcessor

    def __len__(self) -> int:
        return 100_000  # all different: each is drawn when it is asked for

    def batch(self, indices: Sequence[int], rng: np.random.Generator) -> Batch:
        o = CONFIG.objective
        assert o is not None
        pictures = render([close_up(rng) for _ in indices], 48).float() / 255
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.images.mean, self.images.std))

        def views(count: int, size: int, areas: tuple[float, float]) -> Tensor:
            crops = [other_colours(random_crops(pictures, rng, size, areas), rng) for _ in range(count)]
            return (torch.stack(crops, 1) - mean) / std

        side = o.global_size // PATCH
        masks = torch.from_numpy(block_masks(rng, 2 * len(indices), side, side))
        return Batch(
            {
                "global": views(2, o.global_size, (0.5, 1.0)),
                "local": views(o.num_locals, o.local_size, (0.2, 0.6)),
                "masks": rearrange(masks, "(b v) n -> b v n", v=2),
            }
        )
