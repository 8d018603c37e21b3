"""Waveforms as the audio models of the Hub read them: Whisper's and CLAP's log-mel spectrograms, wav2vec 2.0's norm.

Each is a frozen config that is called; the kind is its type. They are read from and written as the Hub's
``preprocessor_config.json``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from polymodal.core.errors import ConfigError, MediaError, did_you_mean
from polymodal.core.files import read_json
from polymodal.nn.mel import MelScale, mel_filters

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
_FLOOR = 1e-10  # of a power: -100 dB
_FRAMES = 4096  # of a spectrum, that are held at once
_KIND = "feature_extractor_type"
# What transformers writes beside: it follows from the rest, or asks for nothing.
_DERIVED = frozenset(
    {
        _KIND, "processor_class", "return_attention_mask", "padding_side", "n_samples", "nb_max_frames", "mel_filters",
        "nb_max_samples", "nb_frequency_bins", "mel_filters_slaney", "feature_size", "sampling_rate", "dither",
        "padding_value", "image_processor_type",
    }
)  # fmt: skip


def power_spectrum(wave: Float[Tensor, "batch samples"], fft: int, hop: int) -> Float[Tensor, "batch bins frames"]:
    """Squared magnitudes of Hann windows of ``fft`` samples, one every ``hop``, the first centred on the first sample.

    Raises:
        MediaError: the sound is too short to be mirrored at its ends.
    """
    return _power(_mirrored(wave, fft), fft, hop)


def _mirrored(wave: Tensor, fft: int) -> Tensor:
    if wave.shape[1] <= fft // 2:
        raise MediaError(f"a sound of {wave.shape[1]} samples; a spectrum of {fft} needs more than {fft // 2}")
    return F.pad(wave, (fft // 2, fft // 2), "reflect")


def _power(wave: Tensor, fft: int, hop: int) -> Tensor:
    window = torch.hann_window(fft, dtype=wave.dtype, device=wave.device)
    return torch.stft(wave, fft, hop, window=window, center=False, return_complex=True).abs() ** 2


@dataclass(frozen=True, kw_only=True)
class WhisperMel:
    """Whisper's: log10 of 80 mels (128 for large-v3), the range cut to 8 decades below the loudest, (x + 4) / 4."""

    num_mels: int = 80
    sample_rate: int = 16_000
    fft: int = 400
    hop: int = 160
    seconds: int = 30

    @property
    def num_samples(self) -> int:
        """Of the window that the model always reads."""
        return self.seconds * self.sample_rate

    @property
    def num_frames(self) -> int:
        return self.num_samples // self.hop

    def whole(self, wave: Float[Tensor, "batch samples"]) -> Float[Tensor, "batch mels frames"]:
        """Of sound of any length: a frame for every ``hop`` samples. The cut is by the loudest of each row."""
        power = power_spectrum(wave.float(), self.fft, self.hop)[..., :-1].contiguous()
        filters = mel_filters(self.fft // 2 + 1, self.num_mels, self.sample_rate, high=8000.0)
        logs = (filters.T.to(power) @ power).clamp_min(_FLOOR).log10()
        return (torch.maximum(logs, logs.amax((1, 2), keepdim=True) - 8) + 4) / 4

    def __call__(self, wave: Float[Tensor, "batch samples"]) -> Float[Tensor, "batch mels frames"]:
        """`whole` of sound that is filled with silence to the window.

        Raises:
            MediaError: it is longer: nothing is cut.
        """
        if wave.shape[1] > self.num_samples:
            raise MediaError(
                f"{wave.shape[1] / self.sample_rate:g} s of sound; a window holds {self.seconds} s: read it in pieces"
            )
        return self.whole(F.pad(wave, (0, self.num_samples - wave.shape[1])))

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> WhisperMel:
        """Of a WhisperFeatureExtractor.

        Raises:
            ConfigError: a field asks for what ours does not do.
        """
        names = {"feature_size": "num_mels", "sampling_rate": "sample_rate", "n_fft": "fft", "hop_length": "hop"}
        fields = _read(raw, names | {"chunk_length": "seconds"}, {"do_normalize": False})
        return cls(**fields)

    def to_hf(self) -> dict[str, Any]:
        """What `from_hf` and transformers read."""
        return {
            _KIND: "WhisperFeatureExtractor", "processor_class": "WhisperProcessor", "feature_size": self.num_mels,
            "sampling_rate": self.sample_rate, "n_fft": self.fft, "hop_length": self.hop, "chunk_length": self.seconds,
            "n_samples": self.num_samples, "nb_max_frames": self.num_frames, "padding_side": "right",
            "padding_value": 0.0, "return_attention_mask": False,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ClapMel:
    """CLAP's: decibels of 64 mels over 10 s.

    Attributes:
        long: of longer sound, either ``rand_trunc``, a piece (librosa's filters), or ``fusion``, the whole shrunk to
            the window and a piece of each third (torchaudio's filters).
        short: shorter sound is repeated as often as it fits whole and then filled with silence (``repeatpad``),
            repeated and cut (``repeat``), or filled with silence (``pad``).
    """

    num_mels: int = 64
    sample_rate: int = 48_000
    fft: int = 1024
    hop: int = 480
    seconds: int = 10
    low: float | int = 0.0
    high: float | int = 14_000.0
    long: Literal["fusion", "rand_trunc"] = "fusion"
    short: Literal["repeatpad", "repeat", "pad"] = "repeatpad"

    def __post_init__(self) -> None:
        if self.long not in ("fusion", "rand_trunc"):
            raise ConfigError(f"truncation {self.long!r}; understood: fusion, rand_trunc")
        if self.short not in ("repeatpad", "repeat", "pad"):
            raise ConfigError(f"padding {self.short!r}; understood: repeatpad, repeat, pad")
        if not 0 <= self.low < self.high:
            raise ConfigError(f"mels from {self.low} Hz to {self.high} Hz; the first should be lower")

    @property
    def num_samples(self) -> int:
        """Of the window that the model always reads."""
        return self.seconds * self.sample_rate

    @property
    def num_frames(self) -> int:
        return self.num_samples // self.hop + 1

    def spectrogram(self, wave: Float[Tensor, " samples"]) -> Float[Tensor, "frames mels"]:
        """Decibels of sound of any length, by the filters that belong to ``long``."""
        scale: MelScale = "htk" if self.long == "fusion" else "slaney"
        filters = mel_filters(
            self.fft // 2 + 1, self.num_mels, self.sample_rate, low=float(self.low), high=float(self.high), scale=scale,
            normalise=scale == "slaney",
        )  # fmt: skip
        padded, size, pieces = _mirrored(wave[None], self.fft), (_FRAMES - 1) * self.hop + self.fft, []
        # In pieces: the spectrum of an hour is gigabytes, its mels are not. Decibels of silence need fp64.
        for start in range(0, padded.shape[1] - self.fft + 1, _FRAMES * self.hop):
            power = _power(padded[:, start : start + size].double(), self.fft, self.hop)[0]
            pieces.append((10 * (power.T @ filters).clamp_min(_FLOOR).log10()).float())
        return torch.cat(pieces)

    def __call__(
        self, waves: Sequence[Float[Tensor, " _"]], generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "batch views frames mels"], Bool[Tensor, "batch 1"]]:
        """Spectrograms (four views of each under ``fusion``, else one), and which sounds were longer than the window.

        Args:
            waves: mono, at ``sample_rate``, at least one sample each.
            generator: chooses the pieces of longer sounds, as in training; their middles without it.
        """
        views, longer = zip(*(self._views(wave, generator) for wave in waves), strict=True)
        return torch.stack(views), torch.tensor(longer)[:, None]

    def _views(self, wave: Tensor, generator: torch.Generator | None) -> tuple[Tensor, bool]:
        over = len(wave) - self.num_samples
        if over > 0 and self.long == "rand_trunc":
            start = _pick(range(over + 1), generator)
            return self.spectrogram(wave[start : start + self.num_samples])[None], True
        mel = self.spectrogram(self._filled(wave))
        if len(mel) > self.num_frames:
            room = len(mel) - self.num_frames + 1
            thirds = torch.arange(room).tensor_split(3)
            return self.fuse(mel, [_pick(third.tolist() or [0], generator) for third in thirds]), True
        return mel.expand(4 if self.long == "fusion" else 1, -1, -1), False

    def fuse(self, mel: Float[Tensor, "long mels"], starts: Sequence[int]) -> Float[Tensor, "views frames mels"]:
        """The whole, shrunk to the window, and the pieces that begin at these frames."""
        shape = (self.num_frames, self.num_mels)
        small = F.interpolate(mel[None, None], size=shape, mode="bilinear", align_corners=False)[0, 0]
        return torch.stack([small, *(mel[start : start + self.num_frames] for start in starts)])

    def _filled(self, wave: Tensor) -> Tensor:
        missing = self.num_samples - len(wave)
        if missing <= 0:
            return wave
        times = {"repeatpad": self.num_samples // len(wave), "repeat": math.ceil(self.num_samples / len(wave))}
        wave = wave.repeat(times.get(self.short, 1))[: self.num_samples]
        return F.pad(wave, (0, self.num_samples - len(wave)))

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> ClapMel:
        """Of a ClapFeatureExtractor.

        Raises:
            ConfigError: a field asks for what ours does not do.
        """
        names = {
            "feature_size": "num_mels", "sampling_rate": "sample_rate", "fft_window_size": "fft", "hop_length": "hop",
            "max_length_s": "seconds", "frequency_min": "low", "frequency_max": "high", "truncation": "long",
            "padding": "short",
        }  # fmt: skip
        return cls(**_read(raw, names, {"top_db": None}))

    def to_hf(self) -> dict[str, Any]:
        """What `from_hf` and transformers read."""
        return {
            _KIND: "ClapFeatureExtractor", "processor_class": "ClapProcessor", "feature_size": self.num_mels,
            "sampling_rate": self.sample_rate, "fft_window_size": self.fft, "hop_length": self.hop,
            "max_length_s": self.seconds, "frequency_min": self.low, "frequency_max": self.high,
            "truncation": self.long, "padding": self.short, "top_db": None, "nb_max_samples": self.num_samples,
            "nb_frequency_bins": self.fft // 2 + 1, "padding_side": "right", "padding_value": 0.0,
            "return_attention_mask": False,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RawWave:
    """wav2vec 2.0's: the waveform itself; with ``normalise``, of zero mean and unit variance."""

    sample_rate: int = 16_000
    normalise: bool = True
    masked: bool = False  # the model is told where sounds end (the "layer norm" models), else it reads zeros there

    def __call__(
        self, waves: Sequence[Float[Tensor, " _"]]
    ) -> tuple[Float[Tensor, "batch samples"], Int[Tensor, " batch"]]:
        """Filled with zeros to the longest, and the length of each in samples."""
        if self.normalise:
            waves = [(w - w.mean()) / (w.var(correction=0) + 1e-7).sqrt() for w in waves]
        return torch.nn.utils.rnn.pad_sequence(list(waves), batch_first=True), torch.tensor([len(w) for w in waves])

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> RawWave:
        """Of a Wav2Vec2FeatureExtractor.

        Raises:
            ConfigError: a field asks for what ours does not do.
        """
        fields = _read(raw, {"sampling_rate": "sample_rate", "do_normalize": "normalise"}, {"feature_size": 1})
        return cls(**fields, masked=bool(raw.get("return_attention_mask", False)))

    def to_hf(self) -> dict[str, Any]:
        """What `from_hf` and transformers read."""
        return {
            _KIND: "Wav2Vec2FeatureExtractor", "processor_class": "Wav2Vec2Processor", "feature_size": 1,
            "sampling_rate": self.sample_rate, "do_normalize": self.normalise, "return_attention_mask": self.masked,
            "padding_side": "right", "padding_value": 0.0,
        }  # fmt: skip


Sounds: TypeAlias = WhisperMel | ClapMel | RawWave
KINDS: dict[str, type[WhisperMel] | type[ClapMel] | type[RawWave]] = {
    "WhisperFeatureExtractor": WhisperMel,
    "ClapFeatureExtractor": ClapMel,
    "Wav2Vec2FeatureExtractor": RawWave,
}


def declared_sounds(folder: Path) -> Sounds | None:
    """The pre-processing of sound that a checkpoint's folder declares, None where it declares none.

    Raises:
        ConfigError: ours cannot follow it.
    """
    for name in (PREPROCESSOR, PROCESSOR):
        if not (folder / name).is_file():
            continue
        raw = read_json(folder / name)
        raw = raw.get("feature_extractor", raw) if name == PROCESSOR and isinstance(raw, dict) else raw
        if isinstance(raw, dict) and _KIND in raw:
            if raw[_KIND] not in KINDS:
                raise ConfigError(f"{folder / name}: {raw[_KIND]!r} is not supported{did_you_mean(raw[_KIND], KINDS)}")
            return KINDS[raw[_KIND]].from_hf(raw)
    return None


def declared_whisper(folder: Path, own: WhisperMel) -> WhisperMel:
    """The same for a tower that reads spectrograms as ``own`` makes them: ``own`` where none is declared.

    Raises:
        ConfigError: they would have other mels, or more frames than the tower has places for.
    """
    declared = declared_sounds(folder)
    if not isinstance(declared, WhisperMel):
        return own
    if declared.num_mels != own.num_mels or declared.num_frames > own.num_frames:
        raise ConfigError(
            f"{folder}: spectrograms of {declared.num_mels} mels x {declared.num_frames} frames; its tower reads "
            f"{own.num_mels} x {own.num_frames}"
        )
    return declared


def _read(raw: Mapping[str, Any], names: Mapping[str, str], required: Mapping[str, Any]) -> dict[str, Any]:
    """The fields by our names; every other one must be known to change nothing."""
    problems = [
        f"{field} = {value!r} asks for a step that ours does not have"
        for field, value in raw.items()
        if (field in required and value != required[field])
        or (field in ("dither", "padding_value") and value)
        or (field == "padding_side" and value != "right")
    ]
    known = {*names, *required, *_DERIVED}
    problems += [f"{n} = {raw[n]!r} is not known{did_you_mean(n, known)}" for n in raw if n not in known]
    problems += [f"{name} is {raw[name]!r}" for name in names if name in raw and not _fine(name, raw[name])]
    if problems:
        raise ConfigError("preprocessor config: " + "; ".join(problems))
    return {ours: raw[theirs] for theirs, ours in names.items() if theirs in raw}


def _fine(name: str, value: Any) -> bool:
    if name in ("truncation", "padding", "do_normalize"):
        return isinstance(value, bool if name == "do_normalize" else str)
    hertz = name in ("frequency_min", "frequency_max")
    return type(value) in ((int, float) if hertz else (int,)) and (0 if hertz else 1) <= value < 2**20


def _pick(places: Sequence[int], generator: torch.Generator | None) -> int:
    chosen = len(places) // 2 if generator is None else int(torch.randint(len(places), (), generator=generator))
    return places[chosen]
