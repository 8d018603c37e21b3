"""Where the nano painters' autoencoder begins: as one that keeps the mean colour of each square."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from polymodal.backbones.unet import zero_
from polymodal.tokenizers.pyramid import Decoder, Double, Encoder, Halve, ResidualBlock
from polymodal.tokenizers.vae import VAE
from polymodal.tokenizers.vq import VQModel

_LEVEL = 4.0  # of channels that never change; also where SiLU is nearly a straight line
_STILL = slice(4, 8)  # which these are
_SPREAD = 1.4  # of colours, so that codes that are bounded take all their levels
_QUIET = -6.0  # logarithm of the first variance of latents


@torch.no_grad()
def averaging_(codec: VAE | VQModel) -> None:
    """Begins with the mean colour of each square in the first three latents, and squares of it in the picture.

    Drawn at random, an autoencoder of this size shows paper without objects after 2,000 pictures, and brightness
    without colours after 6,000: its norms take away what is the same everywhere. Here a few channels that never change
    outweigh it, so that norms begin as almost fixed scales. What is learned is the form within a square.
    """
    colours = 3
    for part in (codec.encoder, codec.decoder):
        assert isinstance(part, Encoder | Decoder)
        for module in part.modules():
            if isinstance(module, ResidualBlock):
                zero_(module.conv2)
                if isinstance(module.shortcut, nn.Conv2d):
                    _keep(module.shortcut, module.shortcut.out_channels)
            elif isinstance(module, Halve):
                _keep(module.conv, module.conv.in_channels, corner=True)
            elif isinstance(module, Double):
                _keep(module.conv, module.conv.in_channels)
        _keep(part.first, colours)
        assert part.first.bias is not None
        part.first.weight[_STILL] = 0
        part.first.bias[_STILL] = torch.tensor([-1.0, 1.0, -1.0, 1.0]) * _LEVEL
        _straight(part.norm, part.last, colours)
    if isinstance(codec, VAE):
        last = codec.encoder.last
        assert isinstance(last, nn.Conv2d)
        assert last.bias is not None
        last.bias[codec.config.pyramid.latent_dim :] = _QUIET
    else:
        for conv, gain in ((codec.quant_conv, _SPREAD), (codec.post_quant_conv, 1 / _SPREAD)):
            _keep(conv, colours)
            conv.weight *= gain


def _keep(conv: nn.Conv2d, count: int, *, corner: bool = False) -> None:
    """The first channels pass, as they are or as the mean of two by two; others mix at random."""
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    conv.weight[:count] = 0
    middle = conv.kernel_size[0] // 2
    for i in range(min(count, conv.in_channels)):
        if corner:
            conv.weight[i, i, :2, :2] = 0.25
        else:
            conv.weight[i, i, middle, middle] = 1


def _straight(norm: nn.GroupNorm, last: nn.Conv2d, count: int) -> None:
    """The first channels pass norm and SiLU almost as they are."""
    deviation = (4 * _LEVEL**2 / norm.num_channels) ** 0.5
    norm.bias[:count] = _LEVEL
    _keep(last, count)
    assert last.bias is not None
    slope = float(F.silu(torch.tensor(_LEVEL + 0.5)) - F.silu(torch.tensor(_LEVEL - 0.5)))
    last.weight[:count] *= deviation / slope
    last.bias[:count] = -float(F.silu(torch.tensor(_LEVEL))) * deviation / slope
