"""ResNet-18 and ResNet-34 without a classifier: the feature map of the last stage.

Source: He et al. 2015, https://arxiv.org/abs/1512.03385; layers have torchvision's names, so that its weights load as
they are. A policy trains on batches too small and too alike for batch statistics: those that come with the weights are
kept (frozen), or groups of channels are normed instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polymodal.core.errors import ConfigError
from polymodal.weights.files import SINGLE, Checkpoint
from polymodal.weights.rules import Rule, drop, plan, renames, rule

NormName = Literal["frozen_batch", "batch", "group"]
STAGES: Final = (64, 128, 256, 512)
_GROUP = 16  # channels of one


@dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """A ResNet of basic blocks.

    Attributes:
        depths: blocks of each stage; a stage halves the picture, and so do the stem and its pooling.
        widths: channels of each stage.
    """

    depths: tuple[int, ...] = (2, 2, 2, 2)
    widths: tuple[int, ...] = STAGES
    norm: NormName = "frozen_batch"

    def __post_init__(self) -> None:
        if len(self.depths) != 4 or len(self.widths) != 4 or min(self.depths + self.widths) < 1:
            raise ConfigError(f"a ResNet has four stages, not depths {self.depths} of widths {self.widths}")
        if self.norm == "group" and any(width % _GROUP for width in self.widths):
            raise ConfigError(f"groups are of {_GROUP} channels; the widths are {self.widths}")

    @property
    def dim(self) -> int:
        return self.widths[-1]

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the feature map of a picture."""
        for _ in range(5):
            height, width = (height + 1) // 2, (width + 1) // 2
        return height, width


class FrozenBatchNorm(nn.Module):
    """Batch norm whose statistics, scale and shift never change."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((dim,), value))

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        scale = self.get_buffer("weight") * (self.get_buffer("running_var") + self.eps).rsqrt()
        shift = self.get_buffer("bias") - self.get_buffer("running_mean") * scale
        return x * scale.to(x.dtype)[:, None, None] + shift.to(x.dtype)[:, None, None]


def _norm(kind: NormName, dim: int) -> nn.Module:
    if kind == "group":
        return nn.GroupNorm(dim // _GROUP, dim)
    return FrozenBatchNorm(dim) if kind == "frozen_batch" else nn.BatchNorm2d(dim)


class BasicBlock(nn.Module):
    """Two convolutions of 3 x 3 beside a shortcut."""

    def __init__(self, source: int, dim: int, stride: int, norm: NormName) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(source, dim, 3, stride, 1, bias=False)
        self.bn1 = _norm(norm, dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, 1, 1, bias=False)
        self.bn2 = _norm(norm, dim)
        same = stride == 1 and source == dim
        self.downsample = (
            nn.Identity() if same else nn.Sequential(nn.Conv2d(source, dim, 1, stride, bias=False), _norm(norm, dim))
        )

    def forward(self, x: Float[Tensor, "batch source height width"]) -> Float[Tensor, "batch dim rows columns"]:
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(out + self.downsample(x))


class ResNet(nn.Module):
    """A stem and four stages."""

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        c = self.config = config
        self.conv1 = nn.Conv2d(3, c.widths[0], 7, 2, 3, bias=False)
        self.bn1 = _norm(c.norm, c.widths[0])
        self.pool = nn.MaxPool2d(3, 2, 1)
        source = c.widths[0]
        for number, (depth, dim) in enumerate(zip(c.depths, c.widths, strict=True), 1):
            strides = [1 if number == 1 else 2, *[1] * (depth - 1)]
            blocks = [BasicBlock(source if not n else dim, dim, stride, c.norm) for n, stride in enumerate(strides)]
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
            source = dim

    @torch.no_grad()
    def init_weights(self) -> None:
        """He's normal, for those who have no weights to load; norms are as they are made."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim rows columns"]:
        x = self.pool(torch.relu(self.bn1(self.conv1(pixels))))
        for number in range(1, 5):
            x = self.get_submodule(f"layer{number}")(x)
        return x


def resnet_rules(theirs: str, ours: str) -> list[Rule]:
    """Torchvision's names under ``theirs``; a classifier (``fc``) is nowhere in them."""
    return [
        rule(f"{theirs}.{{layer}}.{{p}}", f"{ours}.{{layer}}.{{p}}"),
        rule(f"{theirs}.{{stage}}.{{i}}.{{layer}}.{{p}}", f"{ours}.{{stage}}.{{i}}.{{layer}}.{{p}}"),
        rule(f"{theirs}.{{stage}}.{{i}}.downsample.{{j}}.{{p}}", f"{ours}.{{stage}}.{{i}}.downsample.{{j}}.{{p}}"),
    ]


def load_torchvision(model: ResNet, folder: Path, file: str = SINGLE) -> None:
    """Fills a ResNet with weights under torchvision's names (a classifier's are left out), all of them.

    Raises:
        WeightsError: the file and the ResNet do not fit; every problem is listed.
    """
    with Checkpoint(folder, file) as checkpoint:
        theirs = {f"resnet.{name}": tensor for name, tensor in checkpoint.meta().items()}
        rules = [
            drop("resnet.fc.{p}", "the classifier"),
            *(r for r in resnet_rules("resnet", "model") if r.theirs != ("resnet.{layer}.{p}",)),
            *renames("resnet", "model", {"conv1": "conv1", "bn1": "bn1"}),
        ]
        ours = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        counts = [
            n for n in theirs if n.endswith("num_batches_tracked") and n.replace("resnet", "model", 1) not in ours
        ]
        todo = plan(rules, {n: t for n, t in theirs.items() if n not in counts}, ours)
        for name, tensor in todo.tensors(lambda n: checkpoint.read(n.removeprefix("resnet.")), str(folder / file)):
            ours[name].copy_(tensor)
