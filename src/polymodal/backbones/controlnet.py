"""A trainable copy of a U-Net's way down that looks at a picture, and tells the frozen U-Net through zeros.

    control picture -> convolutions, the last zero --+
    noisy latents -> the copy's first convolution ---+-> way down, middle -> 1x1 convolutions of zeros -> residuals

Source: Zhang et al., "Adding Conditional Control to Text-to-Image Diffusion Models", 2023,
https://arxiv.org/abs/2302.05543; official code lllyasviel/ControlNet. Files are of diffusers' ``ControlNetModel``.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from polymodal.backbones.unet import Residuals, UNetConfig, UNetEncoder, init_unet_, zero_
from polymodal.backbones.unet_files import encoder_rules, read_unet, write_unet
from polymodal.core.errors import ConfigError
from polymodal.weights.fields import MOST_LEVELS, Fields
from polymodal.weights.rules import Rule, rule

CLASS: Final = "ControlNetModel"
LEAST: Final = 0.1  # of the finest residual where the control picture alone leads


@dataclass(frozen=True, kw_only=True)
class ControlConfig:
    """Attributes:
    channels: of a control picture.
    widths: of the convolutions that look at it; a side is halved between two.
    """

    channels: int = 3
    widths: tuple[int, ...] = (16, 32, 96, 256)

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 1:
            raise ConfigError(f"{self.widths} are no widths of convolutions")

    @property
    def factor(self) -> int:
        """Pixels of a control picture along a side of a latent."""
        return 2 ** (len(self.widths) - 1)


class Look(nn.Module):
    """A control picture as features that are added to the copy's first ones; at first they are zeros."""

    def __init__(self, config: ControlConfig, dim: int) -> None:
        super().__init__()
        c = config
        self.first = nn.Conv2d(c.channels, c.widths[0], 3, padding=1)
        self.layers = nn.ModuleList(
            layer
            for dim, out in pairwise(c.widths)
            for layer in (nn.Conv2d(dim, dim, 3, padding=1), nn.Conv2d(dim, out, 3, padding=1, stride=2))
        )
        self.last = nn.Conv2d(c.widths[-1], dim, 3, padding=1)

    def forward(self, picture: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim rows columns"]:
        x = F.silu(self.first(picture))
        for layer in self.layers:
            x = F.silu(layer(x))
        return self.last(x)


class ControlEncoder(nn.Module):
    """See the module; ``unet`` is the config of the U-Net that it is a copy of."""

    def __init__(self, config: ControlConfig, unet: UNetConfig) -> None:
        super().__init__()
        c = unet
        self.encoder = UNetEncoder(c)
        self.look = Look(config, c.levels[0].dim)
        dims = [c.levels[0].dim]
        for number, level in enumerate(c.levels):
            dims += [level.dim] * (c.num_blocks + (number < len(c.levels) - 1))
        self.zeros = nn.ModuleList(nn.Conv2d(dim, dim, 1) for dim in dims)
        self.middle_zero = nn.Conv2d(dims[-1], dims[-1], 1)

    @torch.no_grad()
    def init_weights(self) -> None:
        """A fresh U-Net's (to be overwritten by `copy`), and zeros where it touches the frozen one."""
        init_unet_(self)
        for layer in (self.look.last, *self.zeros, self.middle_zero):
            assert isinstance(layer, nn.Conv2d)
            zero_(layer)

    def copy(self, encoder: UNetEncoder) -> None:
        """Takes the weights of the U-Net that it is to tell."""
        self.encoder.load_state_dict(encoder.state_dict())

    def forward(
        self,
        x: Float[Tensor, "batch latent rows columns"],
        when: Shaped[Tensor, " batch"],
        context: Float[Tensor, "batch tokens context_dim"],
        shown: Float[Tensor, "batch dim rows columns"],
        *,
        weight: Float[Tensor, " batch"],
        guess: bool = False,
    ) -> Residuals:
        """What is added in the U-Net.

        Args:
            x: noisy latents.
            when: steps.
            context: the tokens of a text.
            shown: what `look` made of control pictures.
            weight: by which a row's residuals are multiplied.
            guess: whether finer residuals count less, from a tenth on: the control picture leads, without a prompt.
        """
        left, middle = self.encoder(x, self.encoder.step(when), context, shown)
        scales = torch.logspace(0, 1, len(left) + 1, device=x.device) * LEAST if guess else x.new_ones(len(left) + 1)
        rows = weight.to(x.dtype).view(-1, 1, 1, 1)
        down = [zero(h) * rows * scale for zero, h, scale in zip(self.zeros, left, scales, strict=False)]
        return Residuals(down, self.middle_zero(middle) * rows * scales[-1])


def read_control(f: Fields) -> tuple[ControlConfig, UNetConfig]:
    """The config of a ControlNet, and of the U-Net that it is a copy of (which it says half of).

    What is wrong is added to the problems of ``f``.
    """
    f.require("controlnet_conditioning_channel_order", "rgb")
    f.require("global_pool_conditions", False)
    default = (16, 32, 96, 256)
    name = "conditioning_embedding_out_channels"
    widths = f.numbers(name, int, longest=MOST_LEVELS) if f.has(name) else default
    if min(widths, default=0) < 1:
        f.problems.append(f"controlnet: {name} {widths} are no widths of convolutions")
        widths = default
    channels = f.take("conditioning_channels", int, 3)
    return ControlConfig(channels=channels, widths=widths), read_unet(f, up=False)


def write_control(c: ControlConfig, unet: UNetConfig) -> dict[str, Any]:
    """The fields that `read_control` reads."""
    return write_unet(unet, up=False) | {
        "controlnet_conditioning_channel_order": "rgb", "global_pool_conditions": False,
        "conditioning_channels": c.channels, "conditioning_embedding_out_channels": list(c.widths),
    }  # fmt: skip


def control_rules(theirs: str, ours: str, unet: UNetConfig) -> list[Rule]:
    """The tensors of a ControlNet; both prefixes end in a dot, or are empty."""
    look = f"{theirs}controlnet_cond_embedding."
    return [
        *encoder_rules(theirs, f"{ours}encoder.", unet),
        rule(f"{look}conv_in.{{p}}", f"{ours}look.first.{{p}}"),
        rule(f"{look}blocks.{{i}}.{{p}}", f"{ours}look.layers.{{i}}.{{p}}"),
        rule(f"{look}conv_out.{{p}}", f"{ours}look.last.{{p}}"),
        rule(f"{theirs}controlnet_down_blocks.{{i}}.{{p}}", f"{ours}zeros.{{i}}.{{p}}"),
        rule(f"{theirs}controlnet_mid_block.{{p}}", f"{ours}middle_zero.{{p}}"),
    ]
