"""The mark in generated sound: found after what happens to sound, seldom seen where there is none, and not heard."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from polymodal.core.errors import MediaError
from polymodal.core.sample import Audio
from polymodal.modalities import audio
from polymodal.modalities.watermark import FALSE_ALARM, SNR, detect_watermark, embed_watermark, watermarked

RATE = 16_000


def speechlike(seconds: float = 3.0, seed: int = 0, channels: int = 1, rate: int = RATE) -> Tensor:
    """Syllables: harmonics under moving formants, and pauses of silence."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    pitch = rng.uniform(90, 220) * (1 + 0.1 * np.sin(2 * np.pi * rng.uniform(0.3, 1) * time))
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    formants = [f * (1 + 0.2 * np.sin(2 * np.pi * rng.uniform(1, 3) * time)) for f in (500, 1500, 2600)]
    wave = np.zeros_like(time)
    for k in range(1, 30):
        gain = sum(np.exp(-(((k * pitch - f) / 200) ** 2)) / (1 + i) for i, f in enumerate(formants)) + 0.02
        wave += gain * np.sin(k * phase)
    wave = wave * np.maximum(0, np.sin(2 * np.pi * 3 * time + rng.uniform(0, 6))) + 0.003 * rng.standard_normal(
        len(time)
    )
    return torch.from_numpy(0.3 * wave / np.abs(wave).max()).float().expand(channels, -1).clone()


def test_the_mark_is_found_and_only_with_its_key() -> None:
    for seed in range(4):
        wave = speechlike(seed=seed)
        marked = embed_watermark(wave, RATE)
        assert marked.shape == wave.shape
        assert detect_watermark(marked, RATE).marked
        assert not detect_watermark(wave, RATE).marked
        assert not detect_watermark(marked, RATE, key="another").marked


@pytest.mark.parametrize("rate", [8_000, 16_000, 24_000, 44_100])
def test_the_mark_lies_under_the_sound(rate: int) -> None:
    wave = speechlike(rate=rate)
    change = embed_watermark(wave, rate) - wave
    assert 10 * math.log10(wave.square().mean() / change.square().mean()) >= SNR
    outside = torch.fft.rfft(change[0]).abs().square()
    frequency = torch.fft.rfftfreq(wave.shape[1], 1 / rate)
    assert outside[(frequency > 3_700) | (frequency < 350)].sum() < 0.02 * outside.sum()


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100])
def test_the_mark_survives_resampling(rate: int) -> None:
    marked = embed_watermark(speechlike(), RATE)
    assert detect_watermark(audio.decode(Audio(marked.numpy(), rate=RATE), rate), rate).marked


def test_the_mark_survives_mp3_cutting_and_loudness(tmp_path: Path) -> None:
    marked = embed_watermark(speechlike(4.0), RATE)
    audio.write(tmp_path / "a.mp3", marked, RATE)
    assert detect_watermark(audio.decode(Audio(tmp_path / "a.mp3"), RATE), RATE).marked
    assert detect_watermark(0.05 * marked[:, 12_345:-9_876], RATE).marked
    assert detect_watermark(-marked, RATE).marked


def test_the_mark_of_both_channels_is_one() -> None:
    marked = embed_watermark(speechlike(channels=2), RATE)
    assert torch.equal(marked[0], marked[1])
    assert detect_watermark(marked, RATE).marked
    assert detect_watermark(marked[:1], RATE).marked


def test_blocks_carry_one_mark() -> None:
    wave = speechlike(4.0)
    pieces = list(watermarked(wave.split(7_111, 1), RATE))
    assert [piece.shape[1] for piece in pieces] == [piece.shape[1] for piece in wave.split(7_111, 1)]
    whole = torch.cat(pieces, 1)
    assert detect_watermark(whole, RATE).score > 0.7 * detect_watermark(embed_watermark(wave, RATE), RATE).score
    assert detect_watermark(whole, RATE).marked


def test_chance_is_bounded_whatever_the_sound() -> None:
    """Tones, clicks, noise and repeated loops: no score comes near the threshold."""
    rng = torch.Generator().manual_seed(0)
    time = torch.arange(2 * RATE) / RATE
    sounds = [torch.sin(2 * math.pi * f * time) for f in (500, 1000, 1234.5, 2000)]
    sounds += [torch.randn(4_000 + 1_000 * n, generator=rng) for n in range(30)]
    sounds += [torch.randn(n, generator=rng).repeat(12) for n in (1_000, 4_000, 8_000)]
    sounds += [(torch.arange(2 * RATE) % n == 0).float() for n in (160, 8_000)]
    alarms = sorted(detect_watermark(sound[None], RATE).false_alarm for sound in sounds)
    assert alarms[0] > 100 * FALSE_ALARM
    assert sum(alarm < 0.05 for alarm in alarms) <= 5


def test_silence_short_and_empty_sound_is_unmarked_and_stays_what_it_is() -> None:
    for wave in (torch.zeros(1, RATE), torch.zeros(1, 0), speechlike(0.01)):
        marked = embed_watermark(wave, RATE)
        assert marked.shape == wave.shape
        assert torch.isfinite(marked).all()
        assert not detect_watermark(marked, RATE).marked
    assert not embed_watermark(torch.zeros(1, RATE), RATE).any()


def test_the_marked_sound_is_never_louder_than_full() -> None:
    wave = speechlike()
    wave = (wave / wave.abs().max() * 1.5).clamp(-1, 1)
    marked = embed_watermark(wave, RATE)
    assert marked.abs().max() <= 1
    assert detect_watermark(marked, RATE).marked


def test_telephones_that_are_too_slow_are_refused() -> None:
    for call in (embed_watermark, detect_watermark):
        with pytest.raises(MediaError, match="8,000"):
            call(speechlike(), 4_000)
