"""Sound: files to waveforms at the rate that a model asks for, whole or block by block, and back to files.

A waveform is fp32 in [-1, 1]; what is louder is clipped, as players do. FFmpeg (PyAV) decodes, soxr resamples (its
"HQ", what librosa and transformers take) and libsndfile (soundfile) writes: the extra ``audio``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from polymodal.core.errors import MediaError, MissingDependency
from polymodal.core.files import atomic_path
from polymodal.core.sample import Audio
from polymodal.modalities.files import open_medium
from polymodal.modalities.tracks import (
    MAX_BYTES,
    MAX_CHANNELS,
    MAX_RATE,
    Samples,
    check_piece,
    check_rate,
    decoded,
    length,
)

MAX_HELD = 2**31  # bytes of samples that `decode` holds at once
_WRITTEN = {
    ".wav": ("WAV", "PCM_16"), ".flac": ("FLAC", "PCM_16"), ".ogg": ("OGG", "VORBIS"),
    ".mp3": ("MP3", "MPEG_LAYER_III"),
}  # fmt: skip


# ---- reading ----


def check(path: str | Path) -> None:
    """Refuses a file that cannot be opened; what is in it is not looked at.

    Raises:
        MediaError: there is no such file, it may not be read, or it is too large.
    """
    with open_medium(path, where=str(path), medium="sound", max_bytes=MAX_BYTES):
        pass


def check_out(path: Path) -> None:
    """Refuses to write sound where a folder is, or by a name that ends in no format of sound.

    Raises:
        MediaError: one of these.
    """
    if path.is_dir():
        raise MediaError(f"{path}: is a folder; name a file")
    if path.suffix.lower() not in _WRITTEN:
        raise MediaError(f"{path}: sound is written as {', '.join(s[1:] for s in _WRITTEN)}, by the end of the name")


def decode(audio: Audio, rate: int, channels: int = 1) -> Float[Tensor, "channels samples"]:
    """The whole sound, or the piece that is asked for, at ``rate`` samples a second.

    Several channels become one as their mean, and one becomes several as copies.

    Raises:
        MediaError: not sound of a known container and codec, empty, broken or cut off, without the piece, with other
            channels, or too long to be held at once.
        MissingDependency: a package of the extra ``audio`` is not installed.
    """
    held, total = [], 0
    for piece in _resampled(audio, rate, channels):
        held.append(piece)
        total += piece.nbytes
        if total > MAX_HELD:
            raise MediaError(
                f"{audio.where}: takes more than {MAX_HELD / 2**30:.0f} GiB at once; choose a piece with start and "
                "end, or go through it by `blocks`"
            )
    return torch.from_numpy(np.concatenate(held, 1))


def blocks(
    audio: Audio, rate: int, seconds: float | int, channels: int = 1
) -> Iterator[Float[Tensor, "channels samples"]]:
    """`decode` in blocks of ``seconds``, the last one perhaps shorter, in memory that does not grow with the length.

    Raises:
        MediaError: as `decode`; of what is broken on the way, after the blocks before it.
    """
    size = round(seconds * rate)
    assert size >= 1, "a block holds at least one sample"
    held, count = list[Samples](), 0
    for piece in _resampled(audio, rate, channels):
        held.append(piece)
        count += piece.shape[1]
        if count >= size:
            *whole, rest = np.split(np.concatenate(held, 1), [*range(size, count + 1, size)], 1)
            yield from (torch.from_numpy(block.copy()) for block in whole)
            held, count = [rest], rest.shape[1]
    rest = np.concatenate(held, 1)
    if rest.shape[1]:
        yield torch.from_numpy(rest)


def seconds(audio: Audio) -> float:
    """How long the sound or the piece is, by its header; of an mp3 without a header that is FFmpeg's estimate.

    Raises:
        MediaError: as `decode`, of what the header alone shows.
        MissingDependency: PyAV is not installed.
    """
    if not isinstance(audio.source, str | Path | bytes | bytearray):
        array, rate = _array(audio)
        return _length(audio, array.shape[1] / rate)
    return _length(audio, length(audio))


def _length(audio: Audio, whole: float) -> float:
    start, end = float(audio.start or 0), whole if audio.end is None else float(audio.end)
    check_piece(audio, whole, start, end)
    return min(end, whole) - start


def _resampled(audio: Audio, rate: int, channels: int) -> Iterator[Samples]:
    """Pieces of the waveform at the rate and with the channels that are asked for."""
    assert 0 < rate <= MAX_RATE, f"a rate of {rate}"
    assert 1 <= channels <= MAX_CHANNELS, f"{channels} channels"
    stream: Any = None
    source, read, given = 0, 0, 0
    for source, piece in _pieces(audio):
        read += piece.shape[1]
        piece = _mixed(audio, piece, channels)
        if source != rate:
            stream = stream or _resampler(source, rate, channels)
            piece = stream.resample_chunk(np.ascontiguousarray(piece.T)).T
        given += piece.shape[1]
        yield np.clip(piece, -1, 1)
    if stream is not None:
        # The end is rounded up and filled with silence, as transformers and librosa do.
        rest = stream.resample_chunk(np.zeros((0, channels), np.float32), last=True).T
        wanted = max(0, math.ceil(read * rate / source) - given)
        yield np.clip(np.pad(rest, ((0, 0), (0, max(0, wanted - rest.shape[1]))))[:, :wanted], -1, 1)


def _resampler(source: int, rate: int, channels: int) -> Any:
    try:
        import soxr
    except ImportError:
        raise MissingDependency("resampling sound", "soxr", "audio") from None
    return soxr.ResampleStream(source, rate, channels, dtype="float32", quality="HQ")


def _mixed(audio: Audio, piece: Samples, channels: int) -> Samples:
    if not np.isfinite(piece).all():
        raise MediaError(f"{audio.where}: holds samples that are no numbers; it is broken")
    if piece.shape[0] == channels:
        return piece
    if channels == 1:
        return piece.mean(0, keepdims=True)
    if piece.shape[0] == 1:
        return np.repeat(piece, channels, 0)
    raise MediaError(f"{audio.where}: has {piece.shape[0]} channels, not {channels}; ask for one, or mix it first")


def _pieces(audio: Audio) -> Iterator[tuple[int, Samples]]:
    """(rate, samples of the piece that is asked for) as they are stored, at least one sample in all."""
    if isinstance(audio.source, str | Path | bytes | bytearray):
        parts = decoded(audio)
    else:
        array, rate = _array(audio)
        parts = iter([(rate, 0, array)])
    start, end = float(audio.start or 0), math.inf if audio.end is None else float(audio.end)
    rate, stop, given = 1, 0, 0
    for rate, first, samples in parts:
        low, stop = round(start * rate) - first, first + samples.shape[1]
        high = samples.shape[1] if end == math.inf else min(round(end * rate) - first, samples.shape[1])
        if high > max(low, 0):
            given += high - max(low, 0)
            yield rate, samples[:, max(low, 0) : high]
        if end != math.inf and stop >= round(end * rate):
            break
    else:
        if not stop:
            raise MediaError(f"{audio.where}: holds no sound; it is empty, broken or cut off")
        check_piece(audio, stop / rate, start, stop / rate if end == math.inf else end)
    if not given:
        raise MediaError(f"{audio.where}: no sample lies between {start:g} s and {end:g} s")


def _array(audio: Audio) -> tuple[Samples, int]:
    where, source = audio.where, audio.source
    if not isinstance(source, np.ndarray | Tensor):
        raise MediaError(f"{where}: sound is a path, encoded bytes or a float array, not {type(source).__name__}")
    array = source.detach().cpu().numpy() if isinstance(source, Tensor) else source
    shape = " x ".join(map(str, array.shape))
    if not np.issubdtype(array.dtype, np.floating) or array.ndim not in (1, 2) or not array.size:
        raise MediaError(f"{where}: an array of {array.dtype}, {shape}; pass floats in [-1, 1], ([channels, ]samples)")
    array = np.atleast_2d(array).astype(np.float32)
    if array.shape[0] > MAX_CHANNELS:
        raise MediaError(f"{where}: an array of {shape}; channels come first, and at most {MAX_CHANNELS} of them")
    if audio.rate is None:
        raise MediaError(f"{where}: an array of samples needs its rate: Audio(array, rate=...)")
    check_rate(audio, audio.rate, array.shape[0])
    return array, audio.rate


# ---- writing ----


@contextlib.contextmanager
def writing(
    path: str | Path, rate: int, channels: int = 1
) -> Iterator[Callable[[Float[Tensor, "channels samples"]], None]]:
    """Gives a function that adds a block of sound to a file; it is there, whole, when the block of code has ended.

    Args:
        path: ends in wav, flac, ogg or mp3, which decides the format: 16 bits, or what the codec makes of them.
        rate: samples a second.
        channels: of every block.

    Raises:
        MediaError: another suffix, samples that are no numbers, or no room for them.
        MissingDependency: soundfile is not installed.
    """
    path = Path(path)
    check_out(path)
    try:
        import soundfile
    except ImportError:
        raise MissingDependency("writing sound", "soundfile", "audio") from None
    container, codec = _WRITTEN[path.suffix.lower()]
    with atomic_path(path) as temporary, contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(
                soundfile.SoundFile(temporary, "w", rate, channels, subtype=codec, format=container)
            )
        except soundfile.LibsndfileError as error:
            raise MediaError(f"{path}: cannot be written at {rate:,} samples a second, {channels} channels") from error

        def add(wave: Float[Tensor, "channels samples"]) -> None:
            samples = wave.detach().float().cpu().numpy()
            if not np.isfinite(samples).all():
                raise MediaError(f"{path}: not written: the sound holds samples that are no numbers")
            # In short pieces: libsndfile's Vorbis encoder keeps a whole call on its stack.
            for start in range(0, samples.shape[1], rate):
                file.write(np.clip(samples[:, start : start + rate], -1, 1).T)

        try:
            yield add
            stack.close()
        except soundfile.LibsndfileError as error:
            raise MediaError(f"{path}: cannot be written to its end; is the disk full? ({error})") from error


def write(path: str | Path, wave: Float[Tensor, "channels samples"], rate: int) -> None:
    """Writes a sound, whole or not at all; errors as `writing`."""
    with writing(path, rate, wave.shape[0]) as add:
        add(wave)
