"""HTSAT, the audio tower of CLAP: a Swin Transformer over a spectrogram that is folded into a square.

Chen et al., "HTS-AT: A Hierarchical Token-Semantic Audio Transformer", 2022, https://arxiv.org/abs/2202.00874; windows:
Liu et al., "Swin Transformer", 2021, https://arxiv.org/abs/2103.14030; fusion of long sounds: Wu et al., 2022,
https://arxiv.org/abs/2211.06687.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from polymodal.core.errors import ConfigError
from polymodal.nn.mlp import MLP, ActivationName


@dataclass(frozen=True, kw_only=True)
class HTSATConfig:
    """A tower.

    Attributes:
        num_mels: bands of the spectrogram; ``spec_size`` is a multiple of it.
        spec_size: side of the square that the spectrogram is folded into.
        patch_size: side of a patch.
        patch_stride: from one patch to the next.
        dim: of the patches; each stage but the last doubles it and halves the grid.
        depths: blocks of each stage.
        num_heads: of each stage.
        window: side of the windows that attention stays in.
        mlp_ratio: width of the feed-forward layers over that of the stage.
        fusion: divisor of the width inside the fusion of long sounds; None for a tower without it.
    """

    num_mels: int = 64
    spec_size: int = 256
    patch_size: int = 4
    patch_stride: int = 4
    dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (4, 8, 16, 32)
    window: int = 8
    mlp_ratio: float = 4.0
    activation: ActivationName = "gelu"
    norm_eps: float = 1e-5
    qkv_bias: bool = True
    fusion: int | None = None

    def __post_init__(self) -> None:
        last = self.grid >> (len(self.depths) - 1)
        if self.spec_size % self.num_mels or self.spec_size % self.patch_stride or self.patch_size < self.patch_stride:
            raise ConfigError("spec_size is a multiple of num_mels and of patch_stride, which is at most patch_size")
        if len(self.depths) != len(self.num_heads) or self.grid != last << (len(self.depths) - 1) or last % self.window:
            raise ConfigError(
                f"{len(self.depths)} stages over a grid of {self.grid}: the last has {last}, which windows of "
                f"{self.window} have to fill, and each has its num_heads"
            )

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.spec_size // self.patch_stride

    @property
    def frames(self) -> int:
        """The most that a spectrogram may have."""
        return self.spec_size * self.spec_size // self.num_mels

    @property
    def out_dim(self) -> int:
        """Of the vector of a sound."""
        return self.dim * 2 ** (len(self.depths) - 1)


class WindowAttention(nn.Module):
    """Attention inside windows, with a learned bias for each distance; the windows may be shifted by half of one."""

    def __init__(self, dim: int, num_heads: int, window: int, shift: int, *, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads, self.window, self.shift = num_heads, window, shift
        self.q_proj = nn.Linear(dim, dim, bias=qkv_bias)
        self.k_proj = nn.Linear(dim, dim, bias=qkv_bias)
        self.v_proj = nn.Linear(dim, dim, bias=qkv_bias)
        self.o_proj = nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.zeros((2 * window - 1) ** 2, num_heads))

    def _distances(self) -> Int[Tensor, "query key"]:
        """Which row of the table of biases each pair of places of a window has."""
        place = torch.arange(self.window, device=self.bias.device)
        rows, columns = (t.flatten() for t in torch.meshgrid(place, place, indexing="ij"))
        down, across = (t[:, None] - t[None] + self.window - 1 for t in (rows, columns))
        return down * (2 * self.window - 1) + across

    def _apart(self, side: int) -> Bool[Tensor, "windows query key"]:
        """Pairs that a shift has brought into one window from opposite borders."""
        place = torch.arange(side, device=self.bias.device)
        region = (place >= side - self.window).int() + (place >= side - self.shift).int()
        region = region[:, None] * 3 + region[None]
        inside = rearrange(region, "(a r) (b c) -> (a b) (r c)", r=self.window, c=self.window)
        return inside[:, None] != inside[:, :, None]

    def forward(self, x: Float[Tensor, "batch side side dim"]) -> Float[Tensor, "batch side side dim"]:
        side, w, heads = x.shape[1], self.window, self.num_heads
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
        x = rearrange(x, "b (a r) (e c) d -> b (a e) (r c) d", r=w, c=w)
        q, k, v = (
            rearrange(proj(x), "b w n (h d) -> b w h n d", h=heads) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)
        scores = scores + self.bias[self._distances()].permute(2, 0, 1)
        if self.shift:
            scores = scores.masked_fill(self._apart(side)[:, None], -torch.inf)
        x = self.o_proj(rearrange(scores.softmax(-1) @ v, "b w h n d -> b w n (h d)"))
        x = rearrange(x, "b (a e) (r c) d -> b (a r) (e c) d", a=side // w, r=w)
        return x.roll((self.shift, self.shift), (1, 2)) if self.shift else x


class SwinBlock(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``, over a grid."""

    def __init__(self, config: HTSATConfig, dim: int, num_heads: int, shift: int) -> None:
        super().__init__()
        c = config
        self.attn_norm = nn.LayerNorm(dim, eps=c.norm_eps)
        self.attn = WindowAttention(dim, num_heads, c.window, shift, qkv_bias=c.qkv_bias)
        self.mlp_norm = nn.LayerNorm(dim, eps=c.norm_eps)
        self.mlp = MLP(dim, int(c.mlp_ratio * dim), c.activation)

    def forward(self, x: Float[Tensor, "batch side side dim"]) -> Float[Tensor, "batch side side dim"]:
        x = x + self.attn(self.attn_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Merge(nn.Module):
    """Four neighbours become one, twice as wide."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Float[Tensor, "batch side side dim"]) -> Float[Tensor, "batch half half wide"]:
        return self.reduction(self.norm(rearrange(x, "b (a r) (e c) d -> b a e (c r d)", r=2, c=2)))


class Stage(nn.Module):
    """Blocks over one grid, every second one shifted, and a `Merge` behind all stages but the last."""

    def __init__(self, config: HTSATConfig, number: int) -> None:
        super().__init__()
        c, dim, side = config, config.dim << number, config.grid >> number
        shift = c.window // 2 if side > c.window else 0
        self.blocks = nn.ModuleList(
            SwinBlock(c, dim, c.num_heads[number], shift * (i % 2)) for i in range(c.depths[number])
        )
        self.merge = Merge(dim) if number < len(c.depths) - 1 else None

    def forward(self, x: Float[Tensor, "batch side side dim"]) -> Float[Tensor, "batch out out wide"]:
        for block in self.blocks:
            x = block(x)
        return x if self.merge is None else self.merge(x)


class Fusion(nn.Module):
    """Attentional feature fusion: of two maps, how much of each, by place and over all."""

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__()
        inner = channels // ratio

        def squeeze() -> list[nn.Module]:
            first, second = nn.Conv2d(channels, inner, 1), nn.Conv2d(inner, channels, 1)
            return [first, nn.BatchNorm2d(inner), nn.ReLU(), second, nn.BatchNorm2d(channels)]

        self.local = nn.Sequential(*squeeze())
        self.whole = nn.Sequential(nn.AdaptiveAvgPool2d(1), *squeeze())

    def forward(
        self, x: Float[Tensor, "batch channels height width"], other: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        both = x + other
        share = torch.sigmoid(self.local(both) + self.whole(both))
        return 2 * x * share + 2 * other * (1 - share)


class HTSAT(nn.Module):
    """Spectrograms to one vector each."""

    def __init__(self, config: HTSATConfig) -> None:
        super().__init__()
        c = self.config = config
        padding = (c.patch_size - c.patch_stride) // 2
        self.input_norm = nn.BatchNorm2d(c.num_mels)
        self.patch_embed = nn.Conv2d(1, c.dim, c.patch_size, c.patch_stride, padding)
        self.fusion = None if c.fusion is None else Fusion(c.dim, c.fusion)
        # Of the three pieces of a long sound: as high as a patch, as wide as three.
        self.local = (
            None
            if c.fusion is None
            else nn.Conv2d(1, c.dim, (c.patch_size, 3 * c.patch_size), (c.patch_stride, 3 * c.patch_stride), padding)
        )
        self.patch_norm = nn.LayerNorm(c.dim)
        self.stages = nn.ModuleList(Stage(c, number) for number in range(len(c.depths)))
        self.norm = nn.LayerNorm(c.out_dim)

    @torch.no_grad()
    def init_weights(self) -> None:
        """The official code's: truncated normals of 0.02 for linear layers and biases by distance; torch's else."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, WindowAttention):
                nn.init.trunc_normal_(module.bias, std=0.02)

    def square(self, mel: Float[Tensor, "batch views frames mels"]) -> Float[Tensor, "batch views side side"]:
        """The time stretched to fill the square, and folded: pieces of time one below the other.

        Raises:
            ConfigError: the spectrogram has other bands, or more frames than the square has room for.
        """
        c, frames = self.config, self.config.frames
        if mel.shape[3] != c.num_mels or mel.shape[2] > frames:
            raise ConfigError(
                f"a spectrogram of {mel.shape[2]} x {mel.shape[3]}; this tower reads {frames} x {c.num_mels}"
            )
        mel = self.input_norm(mel.transpose(1, 3)).transpose(1, 3)
        if mel.shape[2] < frames:
            mel = F.interpolate(mel, (frames, c.num_mels), mode="bicubic", align_corners=True)
        return rearrange(mel, "b v (r t) f -> b v (r f) t", r=c.spec_size // c.num_mels)

    def forward(
        self, mel: Float[Tensor, "batch views frames mels"], longer: Bool[Tensor, "batch 1"]
    ) -> Float[Tensor, "batch out_dim"]:
        """The mean over all places after the last stage.

        Args:
            mel: one view, or four with fusion: the whole and three pieces.
            longer: which sounds have pieces that differ from the whole.
        """
        x = self.square(mel.to(self.patch_embed.weight.dtype))
        rows, whole = longer[:, 0].nonzero()[:, 0], self.patch_embed(x[:, :1])
        if self.fusion is not None and self.local is not None and len(rows):
            pieces = self.local(x[rows, 1:].flatten(0, 1)[:, None])
            pieces = rearrange(pieces, "(b v) d h w -> b d h (v w)", v=x.shape[1] - 1)
            pieces = F.pad(pieces, (0, whole.shape[3] - pieces.shape[3]))
            whole = whole.index_copy(0, rows, self.fusion(whole[rows], pieces))
        x = self.patch_norm(whole.permute(0, 2, 3, 1))
        for stage in self.stages:
            x = stage(x)
        return self.norm(x).flatten(1, 2).mean(1)
