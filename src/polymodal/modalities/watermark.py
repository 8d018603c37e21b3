"""A mark in generated sound that should not be heard and that a detector finds.

A periodic carrier of random phases (they follow from a key) is laid under the sound between 500 and 3,500 Hz, a fixed
number of decibels below what the sound itself has at each place, so that the sound masks it. The detector levels the
spectrum, adds up all periods, keeps the phases alone and slides the carrier over them: it needs no start to hold on to.
Phases of a sound that was made without the key are random against the carrier's, whatever the sound. The cosine of a
random phase has moments below those of a normal variable of variance 1/2 (E exp(tx) <= exp(t^2/4)), so Chernoff's bound
says how often the detector is wrong.

`benchmarks/bench_watermark.py` measures how well it survives; it is not made against people who know the key and remove
it.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from polymodal.core.errors import MediaError
from polymodal.core.sample import Audio
from polymodal.modalities.audio import decode

KEY: Final = "polymodal"  # public: whoever has this package can look for the mark
FALSE_ALARM: Final = 1e-4  # of the decision that a sound is marked
SNR: Final = 30.3  # dB at least, of the marked sound against the change

_RATE = 16_000
_PERIOD = 8_000  # samples of the carrier
_LOW, _HIGH = 500, 3_500  # Hz: what telephones, 8 kHz and low bit rates let through
_DEPTH = 0.16  # the mark's amplitude as a share of the sound's, where the SNR allows it
_FRAME, _HOP = 512, 128


@dataclass(frozen=True, kw_only=True)
class Detection:
    """What the detector says of a sound.

    ``score`` is the correlation in standard deviations of chance; ``false_alarm`` bounds the probability of such a
    score in sound that was made without the key.
    """

    score: float
    false_alarm: float

    @property
    def marked(self) -> bool:
        return self.false_alarm < FALSE_ALARM


def embed_watermark(
    wave: Float[Tensor, "channels samples"], rate: int, *, start: int = 0, key: str = KEY
) -> Float[Tensor, "channels samples"]:
    """The marked sound, on the CPU.

    Args:
        wave: in [-1, 1].
        rate: samples a second.
        start: the number of the first sample, where ``wave`` continues a sound that was marked before.
        key: decides the carrier.

    Raises:
        MediaError: the rate is below 8,000 samples a second, too little for the mark.
        MissingDependency: soxr is not installed, and ``rate`` is not 16,000.
    """
    if rate < 8_000:
        raise MediaError(f"a watermark needs 8,000 samples a second at least, not {rate}")
    wave = wave.detach().float().cpu()
    if not wave.shape[1]:
        return wave
    sound = _at(wave, rate, _RATE)
    length = sound.shape[1]
    first = round(start / rate * _RATE)
    places = (torch.arange(length) + first) % _PERIOD
    carrier = _spectrum(_carrier(key)[places][None])
    size = _spectrum(sound).abs()
    size = (size + size.roll(1, 1) + size.roll(-1, 1)) / 3
    allowed = 10 ** (-SNR / 10)
    level = _clip(_DEPTH * size[:, _band()], allowed * size.square().sum((1, 2)))
    shaped = torch.zeros_like(carrier).expand(len(sound), -1, -1).clone()
    shaped[:, _band()] = level * carrier[:, _band()] / carrier[:, _band()].abs().square().mean().sqrt()
    mark = torch.istft(shaped, _FRAME, _HOP, window=_window(), length=length)
    mark = _at(mark, _RATE, rate)
    mark = torch.nn.functional.pad(mark, (0, wave.shape[1]))[:, : wave.shape[1]]
    power, own = wave.square().mean(1, keepdim=True), mark.square().mean(1, keepdim=True)
    mark = mark * (allowed * power / own.clamp_min(1e-20)).sqrt().clamp_max(1)
    # Where the sound stands at the very edge, the mark must not push it over.
    return torch.where((wave + mark).abs() > 1, wave, wave + mark)


def watermarked(
    blocks: Iterable[Float[Tensor, "channels samples"]], rate: int, *, key: str = KEY
) -> Iterator[Float[Tensor, "channels samples"]]:
    """`embed_watermark` for a sound that comes in blocks; short ones are gathered to a quarter of a second."""
    done, held = 0, []
    for block in blocks:
        held.append(block)
        if sum(piece.shape[1] for piece in held) >= rate // 4:
            yield embed_watermark(whole := torch.cat(held, 1), rate, start=done, key=key)
            done, held = done + whole.shape[1], []
    if held:
        yield embed_watermark(torch.cat(held, 1), rate, start=done, key=key)


def detect_watermark(wave: Float[Tensor, "channels samples"], rate: int, *, key: str = KEY) -> Detection:
    """Looks for the mark anywhere in a sound; a second of sound is about the least.

    Raises:
        MediaError: the rate is below 8,000 samples a second.
        MissingDependency: soxr is not installed, and ``rate`` is not 16,000.
    """
    if rate < 8_000:
        raise MediaError(f"a watermark cannot be in {rate} samples a second: 8,000 are the least")
    mono = wave.detach().float().cpu().mean(0, keepdim=True)
    if mono.shape[1] < _FRAME:
        return Detection(score=0.0, false_alarm=1.0)
    spectrum = _spectrum(_at(mono, rate, _RATE))
    level = torch.zeros_like(spectrum)
    inside = spectrum[:, _band()]
    level[:, _band()] = inside / inside.abs().clamp_min(1e-7)
    flat = torch.istft(level, _FRAME, _HOP, window=_window())[0]
    folded = torch.nn.functional.pad(flat, (0, -len(flat) % _PERIOD)).view(-1, _PERIOD).sum(0)
    phases = torch.fft.rfft(folded.double())[_bins()]
    phases = phases / phases.abs().clamp_min(1e-12)
    against = torch.zeros(_PERIOD // 2 + 1, dtype=torch.complex128)
    against[_bins()] = phases * _phases(key).conj()
    # The real part of a sum of unit vectors, for every shift of the carrier.
    sums = torch.fft.irfft(against, _PERIOD) * _PERIOD / 2
    score = float(sums.abs().max()) / math.sqrt(len(phases) / 2)  # a sound with its sign turned is the same sound
    return Detection(score=score, false_alarm=min(1.0, 2 * _PERIOD * math.exp(-(score**2) / 2)))


def _at(wave: Tensor, source: int, rate: int) -> Tensor:
    if source == rate:
        return wave
    return decode(Audio(wave.numpy(), rate=source), rate, len(wave))


def _bins() -> slice:
    """The carrier's tones, in periods."""
    return slice(_LOW * _PERIOD // _RATE, _HIGH * _PERIOD // _RATE + 1)


def _band() -> slice:
    """The same band in bins of a frame."""
    return slice(_LOW * _FRAME // _RATE, _HIGH * _FRAME // _RATE + 1)


@functools.cache
def _phases(key: str) -> Tensor:
    count = _bins().stop - _bins().start
    raw = hashlib.shake_256(f"watermark:{key}".encode()).digest(4 * count)
    return torch.polar(
        torch.ones(count, dtype=torch.float64),
        torch.from_numpy(np.frombuffer(raw, "<u4") * (2 * math.pi / 2**32)),
    )


@functools.cache
def _carrier(key: str) -> Tensor:
    spectrum = torch.zeros(_PERIOD // 2 + 1, dtype=torch.complex128)
    spectrum[_bins()] = _phases(key)
    return torch.fft.irfft(spectrum, _PERIOD).float()


def _window() -> Tensor:
    return torch.hann_window(_FRAME)


def _spectrum(wave: Tensor) -> Tensor:
    return torch.stft(wave, _FRAME, _HOP, window=_window(), return_complex=True, pad_mode="constant")


def _clip(level: Tensor, power: Tensor) -> Tensor:
    """``level``, its highest places cut to the one height at which the sum of squares is ``power`` of each channel."""
    low, high = torch.zeros(len(level)), level.amax((1, 2))
    for _ in range(24):
        middle = (low + high) / 2
        over = level.minimum(middle[:, None, None]).square().sum((1, 2)) > power
        low, high = torch.where(over, low, middle), torch.where(over, middle, high)
    return level.minimum(high[:, None, None])
