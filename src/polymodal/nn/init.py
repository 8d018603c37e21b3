"""Initialisations that several systems share."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from polymodal.nn.block import Block
from polymodal.nn.mlp import MLP


def lecun_normal_(layer: nn.Linear | nn.Conv2d) -> None:
    """Truncated normal of variance 1 / fan-in, zero bias (flax's default for dense layers and convolutions)."""
    fan_in = layer.weight[0].numel()
    # The constant restores unit variance after truncation at two standard deviations.
    std = math.sqrt(1 / fan_in) / 0.87962566103423978
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def siglip_mlp_(mlp: MLP) -> None:
    """big_vision's MLP: Xavier-uniform weights, biases of standard deviation 1e-6."""
    for layer in (mlp.up_proj, mlp.down_proj):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.normal_(layer.bias, std=1e-6)


@torch.no_grad()
def siglip_tower_(blocks: Iterable[nn.Module]) -> None:
    """big_vision's Transformer blocks (ViT and SigLIP): Xavier-uniform matrices, zero attention biases."""
    for block in blocks:
        assert isinstance(block, Block)
        assert isinstance(block.mlp, MLP)
        for proj in (block.attn.q_proj, block.attn.k_proj, block.attn.v_proj, block.attn.o_proj):
            nn.init.xavier_uniform_(proj.weight)
            if proj.bias is not None:
                nn.init.zeros_(proj.bias)
        siglip_mlp_(block.mlp)
