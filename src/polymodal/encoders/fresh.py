"""Fresh weights for a Vision Transformer of any shape."""

from __future__ import annotations

import torch
from torch import nn

from polymodal.encoders.stem import Stem
from polymodal.encoders.vision_families import VISION_FAMILIES
from polymodal.encoders.vit import ViT


@torch.no_grad()
def init_tower(tower: ViT) -> None:
    """As the paper of the tower that is built like it: SigLIP without a class token, CLIP with a norm before the first
    block, EVA else. Registers and the mask token start as its class token; scales of layers where their config says."""
    c = tower.config
    kind = "clip_vision_model" if c.pre_norm else "blip_2_vision_model"
    VISION_FAMILIES[kind if c.class_token else "siglip_vision_model"].init(tower)
    if isinstance(tower.stem, Stem):
        tower.stem.init_weights()
    for tokens in (tower.registers, tower.mask_token):
        if tokens is not None:
            nn.init.trunc_normal_(tokens, std=0.02, a=-0.04, b=0.04)
