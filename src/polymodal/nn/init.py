"""Initialisations that several systems share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

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


def cut_normal_(weight: torch.Tensor, std: float) -> None:
    """A normal of this deviation, cut at three of them (audiocraft)."""
    nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)


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


@torch.no_grad()
def siglip_(
    *,
    blocks: Iterable[nn.Module],
    layers: Iterable[nn.Linear | nn.Conv2d],
    tables: Iterable[torch.Tensor],
) -> None:
    """big_vision's scheme for SigLIP: the blocks of both towers, the linear layers at their ends, and tables of vectors
    (positions, tokens), normal with a standard deviation of one over the root of their width."""
    siglip_tower_(blocks)
    for layer in layers:
        lecun_normal_(layer)
    for table in tables:
        nn.init.normal_(table, std=table.shape[-1] ** -0.5)


@torch.no_grad()
def openai_vision_(blocks: Iterable[nn.Module]) -> None:
    """The vision blocks of CLIP's official code: torch's own defaults, which fuse q, k and v into one matrix."""
    for block in blocks:
        assert isinstance(block, Block)
        for proj in (block.attn.q_proj, block.attn.k_proj, block.attn.v_proj):
            bound = math.sqrt(6 / (4 * proj.in_features))  # Xavier over the fused (3 dim, dim) matrix
            nn.init.uniform_(proj.weight, -bound, bound)
            nn.init.zeros_(proj.bias)
        nn.init.zeros_(block.attn.o_proj.bias)


@torch.no_grad()
def openai_text_(blocks: Sequence[nn.Module] | nn.ModuleList) -> None:
    """The text blocks of CLIP's official code: normals scaled by width, what joins the residual also by depth."""
    for block in blocks:
        assert isinstance(block, Block)
        assert isinstance(block.mlp, MLP)
        std = block.attn.q_proj.in_features**-0.5
        residual = std * (2 * len(blocks)) ** -0.5
        for proj in (block.attn.q_proj, block.attn.k_proj, block.attn.v_proj):
            nn.init.normal_(proj.weight, std=std)
            nn.init.zeros_(proj.bias)
        nn.init.normal_(block.attn.o_proj.weight, std=residual)
        nn.init.zeros_(block.attn.o_proj.bias)
        nn.init.normal_(block.mlp.up_proj.weight, std=std * 2**-0.5)
        nn.init.normal_(block.mlp.down_proj.weight, std=residual)
