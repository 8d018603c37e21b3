"""A config of each system of the table that builds and trains in milliseconds, for tests of all systems alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import polymodal
from polymodal.core.batch import Batch
from polymodal.encoders.text import TextConfig
from polymodal.encoders.vit import ViTConfig
from polymodal.heads.distillation import DistillationConfig
from polymodal.heads.reconstruction import PatchDecoderConfig
from polymodal.systems.base import System
from polymodal.systems.clip import CLIPConfig
from polymodal.systems.dinov2 import DINOv2Config
from polymodal.systems.mae import MAEConfig
from polymodal.systems.siglip import SigLIPConfig
from polymodal.systems.siglip2 import NaFlexConfig, SigLIP2Config
from polymodal.systems.vit import VisionTransformerConfig

SHAPE: dict[str, Any] = {"dim": 32, "num_layers": 2, "num_heads": 4, "hidden_dim": 64}
TOWER: dict[str, Any] = SHAPE | {"image_size": 16, "patch_size": 4}
TEXT: dict[str, Any] = SHAPE | {"vocab_size": 40, "context": 8}

NANO: dict[str, Any] = {
    "vit": VisionTransformerConfig(vision=ViTConfig(**TOWER), labels=("a", "b", "c")),
    "mae": MAEConfig(vision=ViTConfig(**TOWER), decoder=PatchDecoderConfig(**SHAPE)),
    "dinov2": DINOv2Config(
        vision=ViTConfig(**TOWER, layer_scale=1.0, mask_token=True),
        objective=DistillationConfig(
            global_size=16,
            local_size=8,
            num_locals=2,
            num_prototypes=24,
            hidden_dim=32,
            bottleneck_dim=16,
            ibot_bottleneck_dim=16,
        ),
    ),
    "clip": CLIPConfig(
        vision=ViTConfig(**TOWER, activation="quick_gelu", patch_bias=False, pre_norm=True),
        text=TextConfig(**TEXT),
        embed_dim=24,
        eot_id=39,
    ),
    "siglip": SigLIPConfig(vision=ViTConfig(**TOWER, class_token=False), text=TextConfig(**TEXT, causal=False)),
    "siglip2": SigLIP2Config(
        vision=NaFlexConfig(**SHAPE, patch_size=4, num_patches=16), text=TextConfig(**TEXT, causal=False)
    ),
}


def every_system(claim: str) -> pytest.MarkDecorator:
    """Runs a test once for each system, as ``name``, and counts it as a proof of ``claim`` for that system."""
    cases = [pytest.param(name, marks=pytest.mark.proves(name, claim), id=name) for name in NANO]
    return pytest.mark.parametrize("name", cases)


def nano(name: str, seed: int = 0) -> System:
    """A system of this name at nano size, initialised as its paper says."""
    torch.manual_seed(seed)
    return polymodal.build(NANO[name])


def nano_batch(model: System, size: int = 6, seed: int = 0) -> Batch:
    """Random inputs for `loss`, as the system's spec asks for them."""
    generator = torch.Generator().manual_seed(seed)
    return Batch({key: spec.random(size, generator) for key, spec in model.inputs_spec().items()})
