"""Log-mel spectrograms against transformers' feature extractors, and their configs both ways."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from polymodal.core.errors import ConfigError, MediaError
from polymodal.core.files import write_json
from polymodal.modalities import mel
from polymodal.modalities.mel import ClapMel, RawWave, WhisperMel, declared_sounds
from polymodal.nn.mel import mel_filters

transformers = pytest.importorskip("transformers")


def noise(seconds: float, rate: int, seed: int = 0) -> np.ndarray:
    """A note in noise that swells, with silence at the end."""
    n = round(seconds * rate)
    rng, t = np.random.default_rng(seed), np.arange(n) / rate
    wave = (np.sin(2 * np.pi * 440 * t) + rng.standard_normal(n)) * 0.2 * np.minimum(t, 1)
    wave[-n // 5 :] = 0
    return wave.astype(np.float32)


@pytest.mark.parametrize("scale", ["slaney", "htk"])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(
    ("bins", "mels", "rate", "low", "high"), [(201, 80, 16000, 0, 8000), (513, 64, 48000, 50, 14000)]
)
def test_filters_are_those_of_the_reference(
    scale: str, normalise: bool, bins: int, mels: int, rate: int, low: float, high: float
) -> None:
    from transformers.audio_utils import mel_filter_bank

    expected = mel_filter_bank(bins, mels, low, high, rate, norm="slaney" if normalise else None, mel_scale=scale)
    got = mel_filters(bins, mels, rate, low=low, high=high, scale=scale, normalise=normalise)
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("mels", [80, 128])
def test_whisper_mel_is_the_reference(mels: int) -> None:
    theirs = transformers.WhisperFeatureExtractor(feature_size=mels)
    waves = [noise(2.3, 16000), noise(4, 16000, seed=1)]
    expected = theirs(waves, sampling_rate=16000, return_tensors="pt").input_features
    ours = WhisperMel(num_mels=mels)
    got = torch.cat([ours(torch.from_numpy(wave)[None]) for wave in waves])
    assert got.shape == (2, mels, 3000)
    assert (got - expected).abs().max() <= 1e-5
    assert torch.equal(ours(torch.zeros(1, 1)), torch.full((1, mels, 3000), -1.5))


def test_whisper_windows_of_a_long_sound_are_its_frames() -> None:
    ours, wave = WhisperMel(seconds=2), torch.from_numpy(noise(5, 16000))[None]
    assert ours.whole(wave).shape == (1, 80, 500)
    with pytest.raises(MediaError, match="5 s of sound"):
        ours(wave)


@pytest.mark.parametrize("short", ["repeatpad", "repeat", "pad"])
@pytest.mark.parametrize("long", ["fusion", "rand_trunc"])
@pytest.mark.parametrize("seconds", [0.3, 1.0, 1.004])
def test_clap_mel_is_the_reference(short: str, long: str, seconds: float) -> None:
    shape = {"max_length_s": 1, "frequency_min": 50, "truncation": long, "padding": short}
    theirs = transformers.ClapFeatureExtractor(**shape)
    ours = ClapMel.from_hf(theirs.to_dict())
    wave = noise(seconds, 48000)
    cut = seconds > 1 and long == "rand_trunc"  # the middle is read, where the reference draws a piece
    middle = (len(wave) - 48000 + 1) // 2
    expected = theirs(wave[middle : middle + 48000] if cut else wave, sampling_rate=48000, return_tensors="pt")
    got, longer = ours([torch.from_numpy(wave)])
    assert got.shape == expected["input_features"].shape
    assert (got - expected["input_features"]).abs().max() <= 1e-5 * 100  # decibels: relative to the range of 100
    assert longer.all() == cut  # the reference calls one of a batch of short ones long, so that all layers learn


def test_clap_pieces_of_a_long_sound_are_the_reference() -> None:
    wave = noise(2.7, 48000)
    theirs = transformers.ClapFeatureExtractor(max_length_s=1)
    np.random.seed(3)
    expected = theirs(wave, sampling_rate=48000, return_tensors="pt")
    np.random.seed(3)
    starts = [int(np.random.choice(third)) for third in np.array_split(np.arange(271 - 101 + 1), 3)]
    ours = ClapMel(seconds=1)
    mel = ours.spectrogram(torch.from_numpy(wave))
    assert (ours.fuse(mel, starts) - expected["input_features"][0]).abs().max() <= 1e-3
    got, longer = ours([torch.from_numpy(wave)])
    assert got.shape == (1, 4, 101, 64)
    assert longer.all()
    assert expected["is_longer"].all()
    cut = ClapMel(seconds=1, long="rand_trunc")
    one, other = (cut([torch.from_numpy(wave)], torch.Generator().manual_seed(s))[0] for s in (1, 2))
    assert not torch.equal(one, other)
    assert torch.equal(cut([torch.from_numpy(wave)])[0], cut([torch.from_numpy(wave)])[0])


def test_a_long_sound_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    wave = torch.from_numpy(noise(0.3, 48000))
    for long in ("fusion", "rand_trunc"):
        monkeypatch.setattr(mel, "_FRAMES", 4096)
        whole = ClapMel(long=long).spectrogram(wave)  # type: ignore[arg-type]
        monkeypatch.setattr(mel, "_FRAMES", 7)
        assert torch.equal(ClapMel(long=long).spectrogram(wave), whole)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="should be lower"):
        ClapMel(low=100, high=100)


def test_wav2vec2_norm_is_the_reference() -> None:
    theirs = transformers.Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    waves = [noise(0.1, 16000), noise(0.2, 16000, seed=1) + 0.3]
    expected = theirs(waves, sampling_rate=16000, padding=True, return_tensors="pt")
    got, lengths = RawWave.from_hf(theirs.to_dict())([torch.from_numpy(w) for w in waves])
    assert (got - expected.input_values).abs().max() <= 1e-5
    assert lengths.tolist() == expected.attention_mask.sum(1).tolist()


@pytest.mark.parametrize("ours", [WhisperMel(num_mels=128), ClapMel(low=50, long="rand_trunc"), RawWave(masked=True)])
def test_configs_go_both_ways(tmp_path: Path, ours: WhisperMel | ClapMel | RawWave) -> None:
    write_json(tmp_path / "preprocessor_config.json", ours.to_hf())
    assert declared_sounds(tmp_path) == ours
    theirs = transformers.AutoFeatureExtractor.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path)
    assert declared_sounds(tmp_path) == ours
    (tmp_path / "preprocessor_config.json").unlink()
    write_json(tmp_path / "processor_config.json", {"feature_extractor": ours.to_hf()})
    assert declared_sounds(tmp_path) == ours


@pytest.mark.parametrize(
    "change",
    [{"dither": 0.1}, {"hop_length": "160"}, {"hop_length": 0}, {"hop_length": 1.5}, {"sampling_rate": 0},
     {"chunk_length": 10**9}, {"feature_size": -1}, {"surprise": 1}, {"do_normalize": True},
     {"feature_extractor_type": "Other"}, {"padding_side": "left"}],
)  # fmt: skip
def test_configs_that_ask_for_more_are_refused(tmp_path: Path, change: dict[str, object]) -> None:
    write_json(tmp_path / "preprocessor_config.json", WhisperMel().to_hf() | change)
    with pytest.raises(ConfigError):
        declared_sounds(tmp_path)
