"""EfficientNet: mobile inverted bottlenecks, scaled in width, depth and resolution together; with or without FiLM.

Source: Tan and Le 2019, https://arxiv.org/abs/1905.11946; Keras' ``applications/efficientnet.py``. FiLM behind each
block is RT-1's (Brohan et al. 2022, https://arxiv.org/abs/2212.06817; google-research/robotics_transformer).

Where a layer halves the picture, libraries pad differently, and the features of one are not those of another: see
`Padding`. transformers builds its batch norms with Keras' momentum of 0.99, which torch reads as 0.01: here running
averages keep 0.99, as in Keras.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from polymodal.core.errors import ConfigError
from polymodal.nn.block import DropPath
from polymodal.nn.film import FiLM

Padding: TypeAlias = Literal["same", "open", "symmetric"]
"""How a layer that halves ``n`` pixels pads them. TensorFlow's "same": to ``ceil(n / 2)``, with the odd pixel behind.
Keras of a network that is open to any size ("open"): as if each size were even, to ``floor(n / 2)``. "symmetric":
torchvision's, to ``ceil(n / 2)`` with as much in front as behind."""


class Stage(NamedTuple):
    """Blocks of one width, of B0: the first one has the stride."""

    kernel: int
    stride: int
    expand: int
    target: int
    repeats: int


STAGES: Final = (
    Stage(3, 1, 1, 16, 1), Stage(3, 2, 6, 24, 2), Stage(5, 2, 6, 40, 2), Stage(3, 2, 6, 80, 3), Stage(5, 1, 6, 112, 3),
    Stage(5, 2, 6, 192, 4), Stage(3, 1, 6, 320, 1),
)  # fmt: skip
_STEM, _TOP = 32, 1280


class Shape(NamedTuple):
    """One block: where it is (stage, number in the stage) and its sizes."""

    stage: int
    number: int
    source: int
    target: int
    kernel: int
    stride: int
    expand: int


@dataclass(frozen=True, kw_only=True)
class EfficientNetConfig:
    """An EfficientNet without its classifier: B3 if nothing is said.

    Attributes:
        width: channels, as a multiple of B0's.
        depth: blocks, as a multiple of B0's.
        resolution: the side of the pictures that it is meant for; it reads any.
        drop_path: how often the last block's branch is dropped in training; those before it less.
    """

    width: float = 1.2
    depth: float = 1.4
    resolution: int = 300
    padding: Padding = "same"
    norm_eps: float = 1e-3
    drop_path: float = 0.2

    def __post_init__(self) -> None:
        if self.width <= 0 or self.depth <= 0 or not 0 <= self.drop_path < 1:
            raise ConfigError(
                f"an EfficientNet is wider and deeper than nothing, and keeps some of its branches: {self}"
            )

    def channels(self, base: int) -> int:
        """So many of B0's at this width: a multiple of 8 that is at most a tenth too few."""
        wanted = base * self.width
        rounded = max(8, int(wanted + 4) // 8 * 8)
        return rounded + 8 if rounded < 0.9 * wanted else rounded

    @property
    def dim(self) -> int:
        """Channels of the features."""
        return self.channels(_TOP)

    @property
    def shapes(self) -> tuple[Shape, ...]:
        out: list[Shape] = []
        source = self.channels(_STEM)
        for number, stage in enumerate(STAGES):
            for place in range(math.ceil(self.depth * stage.repeats)):
                target = self.channels(stage.target)
                stride = stage.stride if place == 0 else 1
                out.append(Shape(number, place, source, target, stage.kernel, stride, stage.expand))
                source = target
        return tuple(out)

    def grid(self, size: int) -> int:
        """Features along a side of so many pixels."""
        for _ in range(1 + sum(stage.stride == 2 for stage in STAGES)):
            size = size // 2 if self.padding == "open" else (size + 1) // 2
        return size


def _pads(padding: Padding, kernel: int, size: int) -> tuple[int, int]:
    """Before and behind ``size`` pixels that are halved."""
    shorter = padding == "open" or (padding == "same" and size % 2 == 0)
    return kernel // 2 - shorter, kernel // 2


class ConvNorm(nn.Module):
    """A convolution without bias, batch norm, and SiLU or nothing."""

    def __init__(
        self, c: EfficientNetConfig, source: int, target: int, kernel: int = 1, *, stride: int = 1, groups: int = 1,
        activation: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.halving = c.padding if stride == 2 else None
        padding = 0 if self.halving else kernel // 2
        self.conv = nn.Conv2d(source, target, kernel, stride, padding, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(target, eps=c.norm_eps, momentum=0.01)
        self.activation = nn.SiLU() if activation else nn.Identity()

    def forward(self, x: Float[Tensor, "images source height width"]) -> Float[Tensor, "images target rows columns"]:
        if self.halving is not None:
            kernel = self.conv.kernel_size[0]
            x = F.pad(x, [*_pads(self.halving, kernel, x.shape[3]), *_pads(self.halving, kernel, x.shape[2])])
        return self.activation(self.norm(self.conv(x)))


class SqueezeExcite(nn.Module):
    """Each channel times what the means of all channels say of it."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(dim, hidden_dim, 1)
        self.expand = nn.Conv2d(hidden_dim, dim, 1)

    def forward(self, x: Float[Tensor, "images dim height width"]) -> Float[Tensor, "images dim height width"]:
        return x * self.expand(F.silu(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()


class MBConv(nn.Module):
    """Wider, a convolution of each channel, squeeze and excitation, narrower; added to its input where it fits."""

    def __init__(self, c: EfficientNetConfig, shape: Shape, drop_path: float) -> None:
        super().__init__()
        s, hidden = shape, shape.source * shape.expand
        self.expand = ConvNorm(c, s.source, hidden) if s.expand > 1 else nn.Identity()
        self.depthwise = ConvNorm(c, hidden, hidden, s.kernel, stride=s.stride, groups=hidden)
        self.excite = SqueezeExcite(hidden, max(1, s.source // 4))
        self.project = ConvNorm(c, hidden, s.target, activation=False)
        self.drop_path = DropPath(drop_path)
        self.residual = s.stride == 1 and s.source == s.target

    def forward(self, x: Float[Tensor, "images source height width"]) -> Float[Tensor, "images target rows columns"]:
        y = self.project(self.excite(self.depthwise(self.expand(x))))
        return x + self.drop_path(y) if self.residual else y


class EfficientNet(nn.Module):
    """Stem, blocks and the last convolution; ``condition_dim`` puts FiLM behind each block."""

    def __init__(self, config: EfficientNetConfig, condition_dim: int | None = None) -> None:
        super().__init__()
        c = self.config = config
        shapes = c.shapes
        self.stem = ConvNorm(c, 3, shapes[0].source, 3, stride=2)
        self.blocks = nn.ModuleList(MBConv(c, s, c.drop_path * n / len(shapes)) for n, s in enumerate(shapes))
        self.films = None if condition_dim is None else nn.ModuleList(FiLM(condition_dim, s.target) for s in shapes)
        self.top = ConvNorm(c, shapes[-1].target, c.dim)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Keras': normals cut at two deviations, of variance 2 / fan-out; FiLM zero."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                std = math.sqrt(2 / module.weight[:, 0].numel() * module.groups) / 0.87962566103423978
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, FiLM):
                module.init_weights()

    def forward(
        self,
        pixels: Float[Tensor, "images 3 height width"],
        condition: Float[Tensor, "images condition"] | None = None,
    ) -> Float[Tensor, "images dim rows columns"]:
        """Features; ``condition`` is what FiLM reads, where there is FiLM."""
        x = self.stem(pixels)
        for number, block in enumerate(self.blocks):
            x = block(x)
            if self.films is not None:
                x = self.films[number](x, condition)
        return self.top(x)
