"""The Vision Transformer, the tower of CLIP, SigLIP, MAE, DINOv2 and nearly every vision-language model.

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", 2020, https://arxiv.org/abs/2010.11929.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from polymodal.core.errors import ConfigError, MediaError
from polymodal.core.tokens import Modality, Tokens
from polymodal.encoders.stem import StemConfig
from polymodal.nn.block import Block
from polymodal.nn.mlp import ActivationName
from polymodal.nn.position import resize_grid


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """A Vision Transformer tower. Sizes in pixels; ``drop_path`` is the rate of every block.

    A released model may have an ``image_size`` that is no multiple of its ``patch_size`` (SigLIP so400m: 384 at 14): at
    its native size the last few rows and columns of pixels are then not read, as it was trained.
    """

    image_size: int
    patch_size: int
    dim: int
    num_layers: int
    num_heads: int
    hidden_dim: int
    num_channels: int = 3
    activation: ActivationName | Literal["swiglu"] = "gelu"
    norm_eps: float = 1e-6
    class_token: bool = True
    class_position: bool = True  # whether the class token has a row in the position table
    mask_token: bool = False  # a vector that stands in for patches hidden from the tower (iBOT, DINOv2)
    patch_bias: bool = True
    pre_norm: bool = False  # CLIP's layer norm before the first block
    qkv_bias: bool = True
    layer_scale: float | None = None
    drop_path: float = 0.0
    num_registers: int = 0
    stem: StemConfig | None = None  # convolutions instead of one that cuts out the patches

    def __post_init__(self) -> None:
        if self.stem is not None and self.stem.patch_size != self.patch_size:
            raise ConfigError(f"this stem makes patches of {self.stem.patch_size} pixels, not of {self.patch_size}")
        if self.num_heads < 1 or self.dim % self.num_heads:
            raise ConfigError(f"dim {self.dim} is not a multiple of num_heads {self.num_heads}")
        if self.image_size < self.patch_size:
            raise ConfigError(f"image_size {self.image_size} is smaller than one patch of {self.patch_size}")

    @property
    def grid(self) -> int:
        """Patches along one side at the native size."""
        return self.image_size // self.patch_size

    @property
    def num_prefix(self) -> int:
        """Tokens before the patches: the class token and the registers."""
        return int(self.class_token) + self.num_registers

    def count(self, height: int, width: int) -> int:
        """Tokens that a picture of this size in pixels (after pre-processing) becomes."""
        return self.num_prefix + (height // self.patch_size) * (width // self.patch_size)


class ViT(nn.Module):
    """Patches, a class token and positions through pre-norm blocks and a last norm."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        c = self.config = config
        self.stem = nn.Identity() if c.stem is None else c.stem.build(c.num_channels)
        inputs, size = (c.num_channels, c.patch_size) if c.stem is None else (c.stem.channels[-1], 1)
        self.patch_embed = nn.Conv2d(inputs, c.dim, size, size, bias=c.patch_bias)
        self.class_token = nn.Parameter(torch.empty(c.dim)) if c.class_token else None
        self.mask_token = nn.Parameter(torch.empty(c.dim)) if c.mask_token else None
        self.registers = nn.Parameter(torch.empty(c.num_registers, c.dim)) if c.num_registers else None
        self.position = nn.Parameter(torch.empty(c.grid**2 + int(c.class_token and c.class_position), c.dim))
        self.pre_norm = nn.LayerNorm(c.dim, eps=c.norm_eps) if c.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(
                c.dim,
                c.num_heads,
                c.hidden_dim,
                activation=c.activation,
                norm_eps=c.norm_eps,
                qkv_bias=c.qkv_bias,
                layer_scale=c.layer_scale,
                drop_path=c.drop_path,
            )
            for _ in range(c.num_layers)
        )
        self.norm = nn.LayerNorm(c.dim, eps=c.norm_eps)

    def embed_patches(
        self, pixels: Float[Tensor, "batch channels height width"], masked: Bool[Tensor, "batch patches"] | None = None
    ) -> Float[Tensor, "batch patches dim"]:
        """Patch vectors with positions added, without the tokens before them.

        The mask token stands in for the patches where ``masked`` is True (before positions are added, as iBOT does).

        Raises:
            MediaError: the picture is not a whole number of patches.
        """
        height, width = pixels.shape[-2:]
        size = self.config.patch_size
        native = (self.config.image_size, self.config.image_size)
        if (height % size or width % size) and (height, width) != native:
            raise MediaError(f"a picture of {height} x {width} pixels is not a whole number of {size} x {size} patches")
        x = rearrange(self.patch_embed(self.stem(pixels.to(self.position.dtype))), "b d h w -> b (h w) d")
        if masked is not None:
            assert self.mask_token is not None, "this tower has no mask token"
            x = torch.where(masked.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        grid = self.position[int(self.config.class_token and self.config.class_position) :]
        return x + resize_grid(grid, height // size, width // size).to(x.dtype)

    def add_prefix(self, patches: Float[Tensor, "batch patches dim"]) -> Float[Tensor, "batch tokens dim"]:
        """Puts the class token (with its position) and the registers before the patches."""
        parts = [patches]
        if self.registers is not None:
            parts.insert(0, self.registers.to(patches.dtype).expand(patches.shape[0], -1, -1))
        if self.class_token is not None:
            first = self.class_token + self.position[0] if self.config.class_position else self.class_token
            parts.insert(0, first.to(patches.dtype).expand(patches.shape[0], 1, -1))
        return torch.cat(parts, 1) if len(parts) > 1 else patches

    def encode_patches(
        self, patches: Float[Tensor, "batch patches dim"], layers: int | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        """All tokens from what `embed_patches` gave, or from a part of it; ``layers`` as in `forward`."""
        x = self.pre_norm(self.add_prefix(patches))
        for block in self.blocks[:layers]:
            x = block(x)
        return self.norm(x) if layers is None else x

    def forward(
        self,
        pixels: Float[Tensor, "batch channels height width"],
        *,
        masked: Bool[Tensor, "batch patches"] | None = None,
        layers: int | None = None,
    ) -> Tokens:
        """All tokens after the last norm; with ``layers`` the output of that many blocks instead, without the norm."""
        x = self.encode_patches(self.embed_patches(pixels, masked), layers)
        height, width = (side // self.config.patch_size for side in pixels.shape[-2:])
        return Tokens.of(x, causal=False, modality=Modality.IMAGE, position=self._positions(x, height, width))

    def class_vector(self, pixels: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim"]:
        """The class token after the last norm, equal to ``forward(pixels).x[:, 0]``.

        The last block computes that one row only, which saves most of a layer.
        """
        x = self.pre_norm(self.add_prefix(self.embed_patches(pixels)))
        for block in self.blocks[:-1]:
            x = block(x)
        last = self.blocks[-1]
        assert isinstance(last, Block)
        return self.norm(last.forward_rows(x, x[:, :1]))[:, 0]

    def _positions(self, x: Tensor, height: int, width: int) -> Int[Tensor, "batch tokens 2"]:
        rows = torch.arange(height, device=x.device)[:, None].expand(height, width)
        columns = torch.arange(width, device=x.device)[None].expand(height, width)
        grid = torch.stack([rows, columns], -1).reshape(-1, 2)
        prefix = grid.new_zeros(x.shape[1] - grid.shape[0], 2)
        return torch.cat([prefix, grid]).expand(x.shape[0], -1, -1)
