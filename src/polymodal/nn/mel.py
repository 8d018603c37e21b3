"""The mel scale: the triangular filters between a spectrum and what an ear, or a model, tells apart; a distance."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Final, Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

MelScale: TypeAlias = Literal["slaney", "htk"]
"""``slaney`` is librosa's default: linear to 1 kHz, then logarithmic. ``htk`` is torchaudio's: 2595 log10(1 + f / 700).
"""


@lru_cache(maxsize=32)
def mel_filters(
    num_bins: int,
    num_mels: int,
    sample_rate: int,
    *,
    low: float | int = 0.0,
    high: float | int | None = None,
    scale: MelScale = "slaney",
    normalise: bool = True,
) -> Float[Tensor, "bins mels"]:
    """Triangles whose corners are evenly spaced on the mel scale, in fp64; the tensor is shared: do not write to it.

    Args:
        num_bins: of the spectrum, from 0 to half the sample rate: ``fft // 2 + 1``.
        num_mels: filters.
        sample_rate: samples a second.
        low: where the first filter begins, in Hz.
        high: where the last one ends, in Hz; half the sample rate if not given.
        scale: which mel scale.
        normalise: every triangle has the same area (librosa's ``norm="slaney"``), else the same height.
    """
    bins = torch.linspace(0, sample_rate // 2, num_bins, dtype=torch.float64)
    first, last = _mel(low, scale), _mel(sample_rate / 2 if high is None else high, scale)
    corners = _hertz(torch.linspace(first, last, num_mels + 2, dtype=torch.float64), scale)
    width = corners.diff()
    away = corners - bins[:, None]
    filters = torch.minimum(-away[:, :-2] / width[:-1], away[:, 2:] / width[1:]).clamp_min(0)
    return filters * (2 / (corners[2:] - corners[:-2])) if normalise else filters


_LINEAR, _KNEE = 3 / 200, 1000.0  # mels a Hz below the knee
_STEP = 27 / math.log(6.4)  # mels a factor of e above it


def _mel(hertz: float | int, scale: MelScale) -> float:
    if scale == "htk":
        return 2595 * math.log10(1 + hertz / 700)
    return hertz * _LINEAR if hertz < _KNEE else _KNEE * _LINEAR + math.log(hertz / _KNEE) * _STEP


def _hertz(mels: Float[Tensor, " mels"], scale: MelScale) -> Float[Tensor, " mels"]:
    if scale == "htk":
        return 700 * (10 ** (mels / 2595) - 1)
    above = _KNEE * torch.exp((mels - _KNEE * _LINEAR) / _STEP)
    return torch.where(mels < _KNEE * _LINEAR, mels / _LINEAR, above)


_SCALES: Final = {32: 5, 64: 10, 128: 20, 256: 40, 512: 80, 1024: 160, 2048: 320}  # windows and their bands
LONGEST_WINDOW: Final = max(_SCALES)


def log_mel_distance(
    made: Float[Tensor, "batch channels samples"], wave: Float[Tensor, "batch channels samples"], rate: int
) -> Float[Tensor, ""]:
    """DAC's: L1 of the logarithms of mel magnitudes at seven scales, added up (arXiv 2306.06546, 3.5).

    The waveforms must be longer than half of `LONGEST_WINDOW`.
    """
    total = made.new_zeros((), dtype=torch.float32)
    with torch.autocast(made.device.type, enabled=False):
        rows = torch.cat([made, wave]).float().flatten(0, 1)
        for window, bands in _SCALES.items():
            shape = torch.hann_window(window, device=made.device)
            spectra = torch.stft(rows, window, window // 4, window=shape, return_complex=True).abs()
            mels = mel_filters(window // 2 + 1, bands, rate).to(rows).T @ spectra
            mine, theirs = mels.clamp(min=1e-5).log10().chunk(2)
            total = total + F.l1_loss(mine, theirs)
    return total
