"""What neural codecs learn from: mel spectra at several scales, discriminators of spectra, balanced gradients.

After EnCodec (Defossez et al. 2022, arXiv 2210.13438) and its official code, whose numbers are the defaults.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from polymodal.core.distributed import gather_with_grad
from polymodal.nn.mel import mel_filters


@dataclass(frozen=True, kw_only=True)
class MelScales:
    """Windows (hops are a quarter of each) and mel bands of a multi-scale loss."""

    rate: int
    windows: tuple[int, ...] = (64, 128, 256, 512, 1024)
    num_mels: int = 64
    low: float = 64.0  # hertz
    floor: float = 1e-5


def spectrum(wave: Float[Tensor, "rows samples"], window: int, hop: int) -> Tensor:
    """Complex (rows, bins, frames) under a Hann window, scaled to the window's energy; the ends are not padded."""
    shape = torch.hann_window(window, device=wave.device)
    out = torch.stft(wave, window, hop, window=shape, center=False, return_complex=True)
    return out / shape.pow(2).sum().sqrt()


def mel_spectrum(
    wave: Float[Tensor, "batch channels samples"], scales: MelScales, window: int
) -> Float[Tensor, "rows mels frames"]:
    """Energies in mel bands, ``ceil(samples / hop)`` frames of each channel."""
    hop = window // 4
    rows = wave.float().flatten(0, 1)
    rows = F.pad(rows, ((window - hop) // 2,) * 2, "reflect")
    rows = F.pad(rows, (0, (window - rows.shape[1]) % hop))
    bands = mel_filters(window // 2 + 1, scales.num_mels, scales.rate, low=scales.low, scale="htk", normalise=False)
    return bands.to(rows).T @ spectrum(rows, window, hop).abs().pow(2)


def multi_scale_mel(
    made: Float[Tensor, "batch channels samples"], wave: Float[Tensor, "batch channels samples"], scales: MelScales
) -> Float[Tensor, ""]:
    """L1 of mel energies and squared distance of their logarithms, averaged over scales and terms.

    The waveforms must be longer than three eighths of the largest window.
    """
    total = made.new_zeros((), dtype=torch.float32)
    with torch.autocast(made.device.type, enabled=False):
        for window in scales.windows:
            mine, theirs = mel_spectrum(made, scales, window), mel_spectrum(wave, scales, window)
            logs = (scales.floor + mine).log10(), (scales.floor + theirs).log10()
            total = total + F.l1_loss(mine, theirs) + F.mse_loss(logs[0], logs[1])
    return total / (2 * len(scales.windows))


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """Discriminators of complex spectra, one for each window (hops are a quarter of it)."""

    channels: int = 1
    filters: int = 32
    windows: tuple[int, ...] = (1024, 2048, 512, 256, 128)
    dilations: tuple[int, ...] = (1, 2, 4)  # over time, while frequency is halved
    slope: float = 0.3  # of the leaky ReLU


class Verdict(NamedTuple):
    """What a discriminator says of waveforms: high for real ones."""

    logits: Float[Tensor, "batch 1 frames bins"]
    features: Sequence[Tensor]  # of each hidden layer


class SpectrumDiscriminator(nn.Module):
    """Convolutions over time and frequency, on real and imaginary parts as channels."""

    def __init__(self, config: DiscriminatorConfig, window: int) -> None:
        super().__init__()
        self.window, self.slope, width = window, config.slope, config.filters
        layers: list[nn.Module] = [nn.Conv2d(2 * config.channels, width, (3, 9), padding=(1, 4))]
        for dilation in config.dilations:
            spread = nn.Conv2d(width, width, (3, 9), (1, 2), padding=(dilation, 4), dilation=(dilation, 1))
            layers.append(weight_norm(spread))
        self.layers = nn.ModuleList([*layers, weight_norm(nn.Conv2d(width, width, 3, padding=1))])
        self.last = weight_norm(nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, wave: Float[Tensor, "batch channels samples"]) -> Verdict:
        complex_ = spectrum(wave.float().flatten(0, 1), self.window, self.window // 4)
        x = rearrange(torch.view_as_real(complex_), "(b c) f t two -> b (two c) t f", b=len(wave))
        features = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), self.slope)
            features.append(x)
        return Verdict(self.last(x), features)


class MultiScaleSpectrum(nn.Module):
    """A `SpectrumDiscriminator` of each window."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.scales = nn.ModuleList(SpectrumDiscriminator(config, window) for window in config.windows)

    def forward(self, wave: Float[Tensor, "batch channels samples"]) -> list[Verdict]:
        return [scale(wave) for scale in self.scales]


def mean(values: Sequence[Tensor]) -> Float[Tensor, ""]:
    """The mean of scalars."""
    return torch.stack(list(values)).mean()


def hinge(real: Sequence[Verdict], made: Sequence[Verdict]) -> Float[Tensor, ""]:
    """What the discriminators pay for real waveforms below 1 and for made ones above -1."""
    pairs = zip(real, made, strict=True)
    return mean([F.relu(1 - r.logits).mean() + F.relu(1 + m.logits).mean() for r, m in pairs])


def adversarial(made: Sequence[Verdict]) -> Float[Tensor, ""]:
    """What the codec pays for being recognised."""
    return mean([-verdict.logits.mean() for verdict in made])


def feature_matching(real: Sequence[Verdict], made: Sequence[Verdict]) -> Float[Tensor, ""]:
    """L1 between the hidden layers that real and made waveforms bring about; the real ones are the target."""
    pairs = zip(real, made, strict=True)
    return mean(
        [mean([F.l1_loss(b, a.detach()) for a, b in zip(r.features, m.features, strict=True)]) for r, m in pairs]
    )


class Balancer(nn.Module):
    """Weights that are shares of the gradient at the codec's output, whatever the sizes of the losses.

    Each gradient is divided by a moving average of its norm (a mean over rows, free of the bias of its start).
    """

    norms: Tensor
    mass: Tensor

    def __init__(self, weights: Mapping[str, float], *, decay: float = 0.999) -> None:
        super().__init__()
        self.weights, self.decay = dict(weights), decay
        self.register_buffer("norms", torch.zeros(len(weights)))
        self.register_buffer("mass", torch.zeros(len(weights)))

    def forward(
        self, losses: Mapping[str, Tensor], output: Float[Tensor, "batch channels samples"]
    ) -> Float[Tensor, "batch channels samples"]:
        """The gradient that ``output`` should get, of norm 1 a row where all losses pull one way.

        Args:
            losses: scalars with a graph to ``output``, by names of ``weights``; those that are left out have no share.
        """
        gradients = [torch.autograd.grad(loss, output, retain_graph=True)[0] for loss in losses.values()]
        places = [[*self.weights].index(name) for name in losses]
        with torch.no_grad():
            now = torch.stack([gradient.flatten(1).norm(dim=1).mean() for gradient in gradients])
            self.norms[places] = self.norms[places] * self.decay + gather_with_grad(now[None]).mean(0)
            self.mass[places] = self.mass[places] * self.decay + 1
            shares = now.new_tensor([self.weights[name] for name in losses])
            factors = shares / shares.sum() / (self.norms / self.mass)[places].clamp(min=1e-12)
            return torch.einsum("n,nbct->bct", factors, torch.stack(gradients))
