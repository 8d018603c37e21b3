from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from polymodal.core.batch import Batch
from polymodal.encoders.vit import ViTConfig
from polymodal.heads.reconstruction import PatchDecoderConfig
from polymodal.modalities.image import ImageProcessor
from polymodal.systems.mae import MAE, MAEConfig
from polymodal.train.run import Bar, Cosine, Header, Run, Stage
from recipes.nano.scenes import Questions, close_up, render

SIZE = 32
CONFIG = MAEConfig(
    vision=ViTConfig(image_size=SIZE, patch_size=4, dim=128, num_layers=5, num_heads=4, hidden_dim=512),
    decoder=PatchDecoderConfig(dim=64, num_layers=2, num_heads=4, hidden_dim=256),
)


@dataclass(frozen=True)
class Pictures:
    images: ImageProcessor

    def __len__(self) -> int:
        return 100_000  # all different: each is drawn when it is asked for

    def batch(self, indices: Sequence[int], rng: np.random.Generator) -> Batch:
        return Batch(pixels=self.images.normalise(render([close_up(rng) for _ in indices], SIZE)))
