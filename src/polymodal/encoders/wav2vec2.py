"""The tower of wav2vec 2.0: strided convolutions over the waveform, convolutional positions, a Transformer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from polymodal.core.errors import ConfigError, MediaError
from polymodal.nn.attention import Attention
from polymodal.nn.block import Block
from polymodal.nn.mlp import MLP, ActivationName


@dataclass(frozen=True, kw_only=True)
class Wav2Vec2TowerConfig:
    """A tower.

    Attributes:
        conv_norm: ``group`` norms each channel of the first convolution over time (BASE), ``layer`` all channels of
            every convolution at each time (LARGE).
        pre_norm: whether norms stand before attention and feed-forward (LARGE) or behind the additions (BASE).
    """

    dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    hidden_dim: int = 3072
    activation: ActivationName = "gelu"
    norm_eps: float = 1e-5
    conv_dims: tuple[int, ...] = (512,) * 7
    conv_kernels: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_bias: bool = False
    conv_norm: Literal["group", "layer"] = "group"
    position_kernel: int = 128
    position_groups: int = 16
    pre_norm: bool = False

    def __post_init__(self) -> None:
        if not len(self.conv_dims) == len(self.conv_kernels) == len(self.conv_strides) > 0:
            raise ConfigError("conv_dims, conv_kernels and conv_strides need an entry for each convolution")
        if self.dim % self.num_heads or self.dim % self.position_groups:
            raise ConfigError(f"dim {self.dim} is not a multiple of num_heads and position_groups")

    @property
    def stride(self) -> int:
        """Samples from one vector to the next."""
        return math.prod(self.conv_strides)

    def samples(self, frames: int) -> int:
        """The fewest samples that become so many vectors."""
        for kernel, stride in zip(reversed(self.conv_kernels), reversed(self.conv_strides), strict=True):
            frames = kernel + (frames - 1) * stride
        return frames

    def frames(self, samples: Int[Tensor, " *batch"]) -> Int[Tensor, " *batch"]:
        """How many vectors so many samples become; none or fewer where they are too short."""
        for kernel, stride in zip(self.conv_kernels, self.conv_strides, strict=True):
            samples = torch.div(samples - kernel, stride, rounding_mode="floor") + 1
        return samples


class ConvLayer(nn.Module):
    """A strided convolution over time, a norm of its kind or none, GELU."""

    def __init__(
        self, channels: tuple[int, int], kernel: int, stride: int, *, bias: bool, norm: Literal["group", "layer"] | None
    ) -> None:
        super().__init__()
        self.conv = nn.Conv1d(*channels, kernel, stride, bias=bias)
        out = channels[1]
        self.norm = {"group": nn.GroupNorm(out, out), "layer": nn.LayerNorm(out)}[norm] if norm else None

    def forward(self, x: Float[Tensor, "batch channels time"]) -> Float[Tensor, "batch out_channels out_time"]:
        x = self.conv(x)
        if isinstance(self.norm, nn.LayerNorm):
            x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        elif self.norm is not None:
            x = self.norm(x)
        return F.gelu(x)


class PostNormBlock(nn.Module):
    """``norm(x + attention(x))``, then ``norm(x + mlp(x))``."""

    def __init__(
        self, dim: int, num_heads: int, hidden_dim: int, *, activation: ActivationName, norm_eps: float
    ) -> None:
        super().__init__()
        self.attn = Attention(dim, num_heads)
        self.attn_norm = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = MLP(dim, hidden_dim, activation)
        self.mlp_norm = nn.LayerNorm(dim, eps=norm_eps)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], *, mask: Bool[Tensor, "batch 1 1 tokens"] | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        x = self.attn_norm(x + self.attn(x, mask=None if mask is None else mask.expand(-1, -1, x.shape[1], -1)))
        return self.mlp_norm(x + self.mlp(x))


class Wav2Vec2Tower(nn.Module):
    """`features`, which may be masked, and `forward` over them."""

    def __init__(self, config: Wav2Vec2TowerConfig) -> None:
        super().__init__()
        c = self.config = config
        ins = (1, *c.conv_dims[:-1])
        self.convs = nn.ModuleList(
            ConvLayer(
                (ins[i], c.conv_dims[i]), c.conv_kernels[i], c.conv_strides[i], bias=c.conv_bias,
                norm=c.conv_norm if i == 0 or c.conv_norm == "layer" else None,
            )
            for i in range(len(ins))
        )  # fmt: skip
        self.feature_norm = nn.LayerNorm(c.conv_dims[-1], eps=c.norm_eps)
        self.projection = nn.Linear(c.conv_dims[-1], c.dim)
        self.position = weight_norm(
            nn.Conv1d(c.dim, c.dim, c.position_kernel, padding=c.position_kernel // 2, groups=c.position_groups), dim=2
        )
        self.norm = nn.LayerNorm(c.dim, eps=c.norm_eps)
        block = Block if c.pre_norm else PostNormBlock
        self.blocks = nn.ModuleList(
            block(c.dim, c.num_heads, c.hidden_dim, activation=c.activation, norm_eps=c.norm_eps)
            for _ in range(c.num_layers)
        )

    @torch.no_grad()
    def init_weights(self) -> None:
        """The paper's code: He for convolutions, normals of 0.02 for the Transformer, their own for what is between."""
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for layer in self.convs:
            assert isinstance(layer, ConvLayer)
            nn.init.kaiming_normal_(layer.conv.weight)
        bound = self.projection.in_features**-0.5
        nn.init.uniform_(self.projection.weight, -bound, bound)
        nn.init.uniform_(self.projection.bias, -bound, bound)
        c = self.config
        self.position.weight = torch.randn_like(self.position.weight) * 2 / math.sqrt(c.position_kernel * c.dim)
        nn.init.zeros_(self.position.bias)

    def features(self, wave: Float[Tensor, "batch samples"]) -> Float[Tensor, "batch frames channels"]:
        """Normed vectors of pieces of the waveform: what is masked, and what is quantised.

        Raises:
            MediaError: the sound is shorter than one piece.
        """
        if int(self.config.frames(torch.tensor(wave.shape[1]))) < 1:
            raise MediaError(f"a sound of {wave.shape[1]} samples is too short for a single vector")
        x = wave[:, None].to(self.projection.weight.dtype)
        for layer in self.convs:
            x = layer(x)
        return self.feature_norm(x.transpose(1, 2))

    def forward(
        self, x: Float[Tensor, "batch frames dim"], valid: Bool[Tensor, "batch frames"] | None = None
    ) -> Float[Tensor, "batch frames dim"]:
        """Projected features, perhaps masked, through positions and blocks; ``valid`` is False behind a sound's end."""
        if valid is not None:
            x = x * valid[..., None]
        place = self.position(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        x = x + F.gelu(place)
        x = x if self.config.pre_norm else self.norm(x)
        mask = None if valid is None else valid[:, None, None]
        for block in self.blocks:
            x = block(x, mask=mask)
        return self.norm(x) if self.config.pre_norm else x
