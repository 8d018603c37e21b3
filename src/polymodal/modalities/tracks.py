"""The sound track of a file, as it is stored: FFmpeg (PyAV) on what strangers wrote."""

from __future__ import annotations

import contextlib
import io
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from jaxtyping import Float

from polymodal.core.errors import MediaError, MissingDependency
from polymodal.core.sample import Audio
from polymodal.modalities.files import check_bytes, open_medium

if TYPE_CHECKING:
    from av import AudioFrame
    from av.audio.stream import AudioStream
    from av.container import InputContainer

MAX_BYTES = 2**33  # of a file; it is read piece by piece and never held
MAX_RATE = 768_000
MAX_CHANNELS = 64

# What may run on a stranger's file. Demuxers that open other files (playlists, scripts) and rare decoders stay out.
_FORMATS = "wav,w64,aiff,flac,ogg,mp3,aac,mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"
_CODECS = (
    "pcm_s16le,pcm_s24le,pcm_s32le,pcm_f32le,pcm_f64le,pcm_u8,pcm_s16be,pcm_s24be,pcm_s32be,pcm_alaw,pcm_mulaw,"
    "flac,alac,vorbis,libvorbis,opus,libopus,mp3,mp3float,aac,ac3"
)
# Containers whose lengths and times are exact to the sample; in others nothing is searched, and less is promised.
_EXACT = frozenset({"wav", "w64", "aiff", "flac", "ogg", "mov,mp4,m4a,3gp,3g2,mj2"})
_PREROLL = 1.0  # seconds decoded before a piece: lossy codecs need what came before
_TORN = 0.1  # seconds by which a header may be wrong about a file that is whole
_FAR = 2**62  # FFmpeg's times have 64 bits

Samples: TypeAlias = Float[np.ndarray, "_ _"]  # channels, samples


def check_rate(audio: Audio, rate: int, channels: int) -> None:
    """Refuses what no sound has.

    Raises:
        MediaError: the rate or the number of channels is impossible.
    """
    if not (0 < rate <= MAX_RATE and 0 < channels <= MAX_CHANNELS):
        raise MediaError(f"{audio.where}: {rate:,} samples a second in {channels} channels; it is broken")


def check_piece(audio: Audio, whole: float, start: float, end: float) -> None:
    """Refuses a piece that lies outside; times are seconds.

    Raises:
        MediaError: it does.
    """
    if start >= whole or end > whole + 1:  # "to 10 s" may be said of a sound of 9.97 s
        raise MediaError(f"{audio.where}: lasts {whole:.2f} s, so it has no piece from {start:g} s to {end:g} s")


def length(audio: Audio) -> float:
    """Seconds of a whole file by its header; all of it is decoded where that does not say."""
    with _opened(audio) as (container, stream, _):
        if stream.duration and stream.time_base is not None:
            return float(stream.duration * stream.time_base)
        if container.duration:
            return container.duration / 1e6
    whole = sum(samples.shape[1] / rate for rate, _, samples in decoded(Audio(audio.source, name=audio.where)))
    if not whole:
        raise MediaError(f"{audio.where}: holds no sound; it is empty, broken or cut off")
    return whole


@contextlib.contextmanager
def _opened(audio: Audio) -> Iterator[tuple[InputContainer, AudioStream, float]]:
    """The container and its first sound track, both of kinds that may be read; and what `_lost` says."""
    try:
        import av
    except ImportError:
        raise MissingDependency("reading sound", "av", "audio") from None
    if audio.rate is not None:
        raise MediaError(f"{audio.where}: rate belongs to an array of samples; a file says its own")
    rules = {"format_whitelist": _FORMATS, "codec_whitelist": _CODECS, "protocol_whitelist": "none"}
    with contextlib.ExitStack() as stack:
        file: Any
        if isinstance(audio.source, bytes | bytearray):
            check_bytes(audio.where, len(audio.source), MAX_BYTES)
            file = io.BytesIO(audio.source)
        else:
            file = stack.enter_context(
                open_medium(audio.source, where=audio.where, medium="sound", max_bytes=MAX_BYTES)
            )
        lost = _lost(file)
        try:
            container = av.open(file, "r", options=rules, metadata_errors="replace")
        except Exception as error:  # whatever a hostile header provokes
            empty = file.seek(0, io.SEEK_END) == 0
            known = "wav, flac, ogg, opus, mp3, m4a, aac, or the sound of mp4, mov, mkv, webm, avi"
            reason = "the file is empty" if empty else f"not sound, or its header is broken or cut off (read: {known})"
            raise MediaError(f"{audio.where}: {reason}") from error
        stack.enter_context(container)
        if not container.streams.audio:
            raise MediaError(f"{audio.where}: holds no sound")
        stream = container.streams.audio[0]
        codec = stream.codec_context
        if codec is None or codec.name not in _CODECS.split(","):
            raise MediaError(f"{audio.where}: its codec is not read here (read: {_CODECS.replace(',', ', ')})")
        check_rate(audio, stream.rate or 0, stream.channels)
        yield container, stream, lost


def decoded(audio: Audio) -> Iterator[tuple[int, int, Samples]]:
    """(rate, number of the first sample, samples) of what is decoded, from some way before the piece on.

    Raises:
        MediaError: it is broken, changes on the way, or ends before its header says.
    """
    with _opened(audio) as (container, stream, lost):
        from av import FFmpegError  # is there, where this is reached

        rate, channels = stream.rate, stream.channels
        assert stream.time_base is not None
        tick, origin = float(stream.time_base), stream.start_time or 0
        exact = container.format.name in _EXACT
        place: int | None = 0
        if exact and (audio.start or 0) > 2 * _PREROLL:
            target = origin + round((float(audio.start or 0) - _PREROLL) / tick)
            with contextlib.suppress(FFmpegError):  # where a file cannot be searched, it is read from its beginning
                container.seek(min(target, _FAR), stream=stream, backward=True)
                place = None
        try:
            for packet in container.demux(stream):
                for frame in stream.decode(packet):
                    if (frame.sample_rate, len(frame.layout.channels)) != (rate, channels):
                        raise MediaError(f"{audio.where}: its rate or its channels change on the way; convert it first")
                    if place is None:
                        place = round(((frame.pts or 0) - origin) * tick * rate)
                        if place > (audio.start or 0) * rate:
                            raise MediaError(f"{audio.where}: its index is broken; convert it, or read it all")
                    yield rate, place, _floats(frame)
                    place += frame.samples
        except FFmpegError as error:
            at = (place or 0) / rate
            raise MediaError(
                f"{audio.where}: is broken or cut off at {at:.2f} s; choose what is whole with end"
            ) from error
        declared = float(stream.duration * tick) * lost if exact and stream.duration else 0.0
        if place and place / rate < declared * (1 - 1e-3) - _TORN:
            raise MediaError(
                f"{audio.where}: is cut off: its header says {declared:.2f} s, and {place / rate:.2f} s are there; "
                "choose what is there with end"
            )


def _floats(frame: AudioFrame) -> Samples:
    samples = frame.to_ndarray()
    if frame.format.is_packed:
        samples = samples.reshape(-1, len(frame.layout.channels)).T
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128) / 128
    if samples.dtype.kind == "i":
        return (samples / float(2 ** (8 * samples.dtype.itemsize - 1))).astype(np.float32)
    return samples.astype(np.float32, copy=False)


def _lost(file: io.BufferedIOBase) -> float:
    """Of a WAV the ratio of the bytes of sound that its header promises to those that are there; else 1.

    FFmpeg takes what is there. Programs that write into a pipe promise as much as they can: that is no promise.
    """
    head = file.read(12)
    place, size = 12, file.seek(0, io.SEEK_END)
    ratio = 1.0
    while head[:4] == b"RIFF" and head[8:] == b"WAVE" and place + 8 < size:
        file.seek(place)
        name, promised = struct.unpack("<4sI", file.read(8))
        if name == b"data":
            ratio = promised / (size - place - 8) if promised < 0x7FFFF000 else 1.0
            break
        place += 8 + promised + promised % 2
    file.seek(0)
    return ratio
