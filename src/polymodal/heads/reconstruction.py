"""Reconstructing what a tower was not shown: MAE's decoder and its loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from polymodal.core.batch import Loss
from polymodal.core.errors import ConfigError
from polymodal.nn.block import Block
from polymodal.nn.mlp import ActivationName


@dataclass(frozen=True, kw_only=True)
class PatchDecoderConfig:
    """A small Transformer from the tokens of visible patches to the pixels of all patches."""

    dim: int = 512
    num_layers: int = 8
    num_heads: int = 16
    hidden_dim: int = 2048
    activation: ActivationName = "gelu"
    norm_eps: float = 1e-6
    qkv_bias: bool = True

    def __post_init__(self) -> None:
        if self.dim % self.num_heads:
            raise ConfigError(f"decoder dim {self.dim} is not a multiple of num_heads {self.num_heads}")


class PatchDecoder(nn.Module):
    """Puts visible tokens and mask tokens back in their places and predicts the values of each patch.

    Source: He et al. 2021, https://arxiv.org/abs/2111.06377.
    """

    def __init__(self, config: PatchDecoderConfig, *, encoder_dim: int, num_patches: int, patch_values: int) -> None:
        super().__init__()
        c = config
        self.embed = nn.Linear(encoder_dim, c.dim)
        self.mask_token = nn.Parameter(torch.empty(c.dim))
        # The first row is the class token's. Fixed: sin-cos values that nothing trains.
        self.position = nn.Parameter(torch.empty(1 + num_patches, c.dim), requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(
                c.dim, c.num_heads, c.hidden_dim, activation=c.activation, norm_eps=c.norm_eps, qkv_bias=c.qkv_bias
            )
            for _ in range(c.num_layers)
        )  # fmt: skip
        self.norm = nn.LayerNorm(c.dim, eps=c.norm_eps)
        self.predict = nn.Linear(c.dim, patch_values)

    def forward(
        self, tokens: Float[Tensor, "batch visible dim"], restore: Int[Tensor, "batch patches"]
    ) -> Float[Tensor, "batch patches values"]:
        """``tokens`` are the class token and the visible patches.

        Patch i of the picture is number ``restore[i]`` of the visible patches, followed by the masked ones.
        """
        x = self.embed(tokens)
        masked = self.mask_token.to(x.dtype).expand(x.shape[0], restore.shape[1] + 1 - x.shape[1], -1)
        shuffled = torch.cat([x[:, 1:], masked], 1)
        patches = shuffled.gather(1, restore.unsqueeze(-1).expand(-1, -1, x.shape[2]))
        x = torch.cat([x[:, :1], patches], 1) + self.position.to(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.predict(self.norm(x))[:, 1:]


def patchify(pixels: Float[Tensor, "batch channels height width"], size: int) -> Float[Tensor, "batch patches values"]:
    """The values of each patch: rows, then columns, then channels."""
    return rearrange(pixels, "b c (h p) (w q) -> b (h w) (p q c)", p=size, q=size)


def unpatchify(
    patches: Float[Tensor, "batch patches values"], size: int, height: int, width: int
) -> Float[Tensor, "batch channels height width"]:
    """The picture of ``height`` x ``width`` pixels whose `patchify` is ``patches``."""
    rows = height // size
    return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, p=size, q=size, w=width // size)


def patch_norm(patches: Float[Tensor, "batch patches values"]) -> Float[Tensor, "batch patches values"]:
    """Each patch at mean zero and variance one (unbiased variance + 1e-6, as the official code has it)."""
    variance = patches.var(-1, keepdim=True)
    return (patches - patches.mean(-1, keepdim=True)) / (variance + 1e-6).sqrt()


def reconstruction_loss(
    predicted: Float[Tensor, "batch patches values"],
    target: Float[Tensor, "batch patches values"],
    masked: Bool[Tensor, "batch patches"],
) -> Loss:
    """Mean squared error of each masked patch, summed over the masked patches; visible ones do not count."""
    error = (predicted.float() - target).square().mean(-1)
    return Loss(total=(error * masked).sum(), weight=int(masked.sum()))
