"""Clips: files to frames at the times that a model asks for, and which times to ask for.

Times are seconds from the first frame. The frame at a time is the one that a viewer sees then: the last that has been
presented, so a variable frame rate needs no special case. Memory is bounded by a handful of frames whatever the
length; FFmpeg (PyAV, the extra ``video``) decodes.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image as PILImage

from polymodal.core.errors import ConfigError, MediaError, MissingDependency, did_you_mean
from polymodal.core.sample import Image, Text, Video
from polymodal.modalities.files import check_bytes, open_medium

if TYPE_CHECKING:
    from av import Packet, VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

MAX_PIXELS = 2**25  # of a frame: 8K is 33 million
MAX_SECONDS = 4 * 3600.0  # of the piece that is asked for
MAX_BYTES = 2**33  # of a file; it is read piece by piece and never held
MAX_HELD = 2**31  # bytes of frames that `read` holds at once

# What may run on a stranger's file. Demuxers that open other files (playlists, scripts) and rare decoders stay out.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"
_CODECS = "h264,hevc,libdav1d,av1,vp8,vp9,mpeg4,mpeg2video,mpeg1video,mjpeg,prores"
_BUFFER = 2**16
_MAX_FPS = 1000  # a container that declares more does not know
_FAR = 2**62  # FFmpeg's times have 64 bits
_BARREN = 500  # packets in a row that give no frame: what follows is given up, or a tiny file could take for ever
_ROUNDING = 0.1  # of a frame: containers round times, Matroska to milliseconds
_SCAN_FPS, _SCAN_SIZE = 4.0, (32, 18)

Picture: TypeAlias = UInt8[np.ndarray, "height width 3"]


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What the header says, and the piece that is asked for. A file that is cut off has less than it says."""

    duration: float  # seconds of the whole clip
    fps: float  # frames a second on average
    size: tuple[int, int]  # width and height of the upright picture
    rotation: int  # degrees clockwise by which stored frames are turned to be upright: 0, 90, 180 or 270
    start: float  # the piece, in seconds of the whole clip
    end: float

    @property
    def first(self) -> int:
        """Index of the frame that is seen at the start of the piece, counted at the average rate."""
        return math.floor(self.start * self.fps + _ROUNDING)

    @property
    def frames(self) -> int:
        """Frames that are seen in the piece, counted at the average rate; at least one."""
        return max(1, math.ceil(self.end * self.fps - _ROUNDING) - self.first)


@dataclass(frozen=True, eq=False, kw_only=True)
class Frames:
    """Some frames of a clip and the times at which a viewer sees them."""

    pixels: UInt8[np.ndarray, "frames height width 3"]
    times: tuple[float, ...]

    @property
    def timestamps(self) -> list[str]:
        """The times as text for a model, e.g. ``0:12`` or ``1:02:03``; with tenths where frames share a second."""
        whole = [clock(time) for time in self.times]
        return whole if len(set(whole)) == len(whole) else [clock(time, tenths=True) for time in self.times]


def clock(seconds: float, *, tenths: bool = False) -> str:
    """A time as a viewer shows it: ``0:12``, ``0:12.5``, ``1:02:03``. Seconds that are not over yet do not count."""
    parts = math.floor(seconds * (10 if tenths else 1) + 1e-6)
    whole, part = divmod(parts, 10) if tenths else (parts, 0)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    start = f"{hours}:{minute:02}" if hours else str(minute)
    return f"{start}:{second:02}" + (f".{part}" if tenths else "")


# ---- decoding ----


def open_video(
    video: Video, *, max_pixels: int = MAX_PIXELS, max_seconds: float = MAX_SECONDS, max_bytes: int = MAX_BYTES
) -> VideoInfo:
    """Reads the header and checks the limits; then one frame is decoded, which alone tells the rotation.

    Raises:
        MediaError: not a clip of a known container and codec, broken, too large, too long, or without the piece.
        MissingDependency: a file, and PyAV is not installed.
    """
    if isinstance(video.source, np.ndarray):
        array = _array(video)
        assert video.fps is not None
        count, height, width = array.shape[:3]
        _check_size(video.where, width, height, max_pixels)
        start, end = _piece(video, count / video.fps, max_seconds)
        return VideoInfo(
            duration=count / video.fps, fps=float(video.fps), size=(width, height), rotation=0, start=start, end=end
        )
    with _Clip.opened(video, max_pixels=max_pixels, max_bytes=max_bytes) as clip:
        duration, fps = clip.length()
        start, end = _piece(video, duration, max_seconds)
        first = next(clip.frames(0.0), None)
        if first is None:
            raise MediaError(f"{video.where}: no frame can be decoded; the file is broken or cut off")
        rotation = _rotation(first.frame)
        width, height = clip.size if rotation % 180 == 0 else clip.size[::-1]
        return VideoInfo(duration=duration, fps=fps, size=(width, height), rotation=rotation, start=start, end=end)


def decode(video: Video, times: Sequence[float]) -> Iterator[tuple[float, Picture]]:
    """What a viewer sees at each time: ``(time, upright RGB)``, one at a time, in the order of ``times``.

    Seeks to the keyframe before a time where that is ahead of the decoder, and decodes on where it is not; holds two
    decoded frames. Colours follow the matrix and range that the file declares, BT.601 where it declares none.

    Args:
        times: seconds from the first frame, in order; a time may come twice.

    Raises:
        MediaError: as `open_video`; or there is no frame at a time because the file is broken or cut off, after the
            frames before it were given.
    """
    quarters: int | None = None
    for time, frame, size in _shown(video, times):
        if isinstance(frame, np.ndarray):
            yield time, frame.copy()
            continue
        if quarters is None:
            quarters = _rotation(frame) // 90
        # A stream may change its size on the way; a clip has one.
        pixels = _converted(video.where, frame, size, "rgb24", "BILINEAR")
        yield time, np.ascontiguousarray(np.rot90(pixels, -quarters))


def chunks(video: Video, times: Sequence[float], size: int = 8) -> Iterator[Frames]:
    """`decode` in pieces of at most ``size`` frames, for clips whose frames do not fit in memory together."""
    assert size >= 1, "a chunk holds at least one frame"
    held: list[tuple[float, Picture]] = []
    for pair in decode(video, times):
        held.append(pair)
        if len(held) == size:
            yield _stack(held)
            held = []
    if held:
        yield _stack(held)


def read(video: Video, sampling: Sampling) -> Frames:
    """The frames that a sampling asks for, all at once.

    Raises:
        MediaError: as `decode`; or the frames together take more than ``MAX_HELD`` bytes.
    """
    times = sampling.times(video)
    width, height = open_video(video).size
    if len(times) * width * height * 3 > MAX_HELD:
        raise MediaError(
            f"{video.where}: {len(times)} frames of {width} x {height} pixels take "
            f"{len(times) * width * height * 3 / 2**30:.1f} GiB at once; ask for fewer, or go through them by `chunks`"
        )
    return _stack(list(decode(video, times)))


def frames_of(video: Video, sampling: Sampling, *, times: bool = True) -> list[Text | Image]:
    """The frames of a clip as pictures, for models that read no clips; before each the time at which it is seen.

    Args:
        video: the clip, or the piece of it that is meant.
        sampling: which frames.
        times: with ``0:12: `` before each picture.

    Raises:
        MediaError: as `read`.
    """
    frames = read(video, sampling)
    out: list[Text | Image] = []
    for pixels, stamp in zip(frames.pixels, frames.timestamps, strict=True):
        picture = Image(pixels, name=f"{video.where} at {stamp}")
        out += [Text(f"{stamp}: "), picture] if times else [picture]
    return out


def _stack(pairs: Sequence[tuple[float, Picture]]) -> Frames:
    return Frames(pixels=np.stack([frame for _, frame in pairs]), times=tuple(time for time, _ in pairs))


def _shown(video: Video, times: Sequence[float]) -> Iterator[tuple[float, Any, tuple[int, int]]]:
    """(time, frame of PyAV or of the array, stored width and height): `decode` before the conversion to RGB."""
    if any(a > b for a, b in itertools.pairwise(times)) or not all(0 <= time < math.inf for time in times):
        raise MediaError(f"{video.where}: times must be in order, none of them negative or infinite")
    if isinstance(video.source, np.ndarray):
        array = _array(video)
        assert video.fps is not None
        for time in times:
            index = math.floor(time * video.fps + 1e-6)
            if index >= len(array):
                raise _missing(video, time, len(array) / video.fps)
            yield time, array[index], (array.shape[2], array.shape[1])
        return
    with _Clip.opened(video) as clip:
        current: _Shown | None = None
        upcoming: _Shown | None = None
        decoder: Iterator[_Shown] | None = None
        for time in times:
            newest = upcoming or current
            if decoder is None or newest is None or clip.keyframe(time) > newest.time:
                current, decoder = None, clip.frames(time)
                upcoming = next(decoder, None)
            while upcoming is not None and upcoming.time <= time + clip.slack:
                current, upcoming = upcoming, next(decoder, None)
            # Held until the next frame, unless that one is late because what lies between could not be decoded.
            lost = upcoming is None or upcoming.after_damage
            if current is None or (lost and time + clip.slack >= current.until):
                raise _missing(video, time, None if current is None else current.until)
            yield time, current.frame, clip.size


def _missing(video: Video, time: float, until: float | None) -> MediaError:
    known = "" if until is None else f"; the last frame before it ends at {until:.2f} s"
    return MediaError(
        f"{video.where}: there is no frame at {time:.2f} s{known}. The file is cut off or broken there; choose the "
        "part that is whole with start and end"
    )


class _Shown(NamedTuple):
    """A decoded frame, when it is presented, and until when at least."""

    time: float
    until: float
    frame: VideoFrame
    after_damage: bool  # something between the frame before and this one could not be decoded


class _Clip:
    """An open file and its video stream; times in and out are seconds from the first frame."""

    def __init__(self, where: str, container: InputContainer, stream: VideoStream, errors: type[Exception]) -> None:
        self._where, self._container, self._stream, self._errors = where, container, stream, errors
        assert stream.time_base is not None
        self._tick = float(stream.time_base)
        self._origin = stream.start_time or 0
        self._period = float(1 / stream.average_rate) if stream.average_rate else 0.0
        self.size = (stream.codec_context.width, stream.codec_context.height)
        # Matroska rounds to whole milliseconds: a frame may be declared up to half a tick after its time.
        self.slack = min(self._tick / 2, 1e-3) + 1e-6

    @classmethod
    @contextlib.contextmanager
    def opened(cls, video: Video, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES) -> Iterator[_Clip]:
        """Opens, checks the container, the codec and the size of a frame, and closes."""
        try:
            import av
        except ImportError:
            raise MissingDependency("reading video", "av", "video") from None
        where = video.where
        if video.fps is not None:
            raise MediaError(f"{where}: fps belongs to an array of frames; a file says its own")
        # Against frames that grow after the header; with room for the decoder's own alignment of small ones.
        limits = {"max_pixels": str(2 * max_pixels + 2**16)}
        rules = {"format_whitelist": _FORMATS, "codec_whitelist": _CODECS, "protocol_whitelist": "none"}
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(_file(video, max_bytes))
            try:
                container = av.open(file, "r", options=rules | limits, buffer_size=_BUFFER, metadata_errors="replace")
            except Exception as error:  # whatever a hostile header provokes
                empty = file.seek(0, io.SEEK_END) == 0
                reason = (
                    "the file is empty"
                    if empty
                    else "not a video, or its header is broken or cut off (containers read: mp4, mov, mkv, webm, avi)"
                )
                raise MediaError(f"{where}: {reason}") from error
            stack.enter_context(container)
            # A cover picture is a video stream to FFmpeg.
            cover = av.stream.Disposition.attached_pic
            streams = [stream for stream in container.streams.video if not stream.disposition & cover]
            if not streams:
                raise MediaError(f"{where}: holds no video, only sound or other data")
            stream = streams[0]
            codec = stream.codec_context
            if codec is None or codec.name not in _CODECS.split(","):
                raise MediaError(f"{where}: its codec is not read here (codecs read: {_CODECS.replace(',', ', ')})")
            _check_size(where, codec.width, codec.height, max_pixels)
            # A few hostile bytes can stand for any number of frames, in which a search would never end; an honest entry
            # takes four bytes of index or more.
            if 4 * len(stream.index_entries) > container.size:
                raise MediaError(f"{where}: its index promises more frames than the file can hold; it is broken")
            codec.options = limits
            codec.thread_type, codec.thread_count = "AUTO", min(4, os.cpu_count() or 1)
            yield cls(where, container, stream, av.FFmpegError)

    def length(self) -> tuple[float, float]:
        """Seconds and average frames a second, from the header; all packets are read where that does not say."""
        stream, container = self._stream, self._container
        seconds, rate = 0.0, float(stream.average_rate or 0)
        if stream.duration:
            seconds = stream.duration * self._tick
        elif tag := stream.metadata.get("DURATION"):
            with contextlib.suppress(ValueError):
                hours, minutes, rest = tag.split(":")
                seconds = int(hours) * 3600 + int(minutes) * 60 + float(rest)
        elif container.duration and rate:  # of all streams: the sound may be the longest
            seconds = container.duration / 1e6
            if stamps := self._stamps(max(0.0, seconds - 10)):
                seconds = min(seconds, self._seconds(max(stamps)) + 1 / rate)
        if not (0 < seconds < math.inf and 0 < rate <= _MAX_FPS):
            stamps = self._stamps(0.0)
            if not stamps:
                raise MediaError(f"{self._where}: holds no frames, or is broken or cut off")
            span = (max(stamps) - min(stamps)) * self._tick
            rate = (len(stamps) - 1) / span if span > 0 else 1.0
            seconds = span + 1 / rate
            if rate > _MAX_FPS:
                raise MediaError(f"{self._where}: declares {rate:,.0f} frames a second; it is broken")
        return seconds, rate

    def _stamps(self, time: float) -> list[int]:
        """When the frames from the keyframe before ``time`` on are presented; nothing is decoded."""
        self._seek(time)
        return [stamp for packet in self._packets() if packet and (stamp := _stamp(packet)) is not None]

    def keyframe(self, time: float) -> float:
        """Time of the last keyframe up to ``time`` that the index knows of; minus infinity where it knows none."""
        entries = self._stream.index_entries
        found = entries.search_timestamp(self._ticks(time), backward=True)
        return self._seconds(entries[found].timestamp) if found >= 0 else -math.inf

    def frames(self, time: float) -> Iterator[_Shown]:
        """Frames in the order of presentation, from one that is presented by ``time`` if there is any."""
        # An index may say when a keyframe is decoded, which is before it is presented: then one more step back. The
        # longer steps are for files in which the way to ``time`` is broken.
        for back in (0.0, 2.0, 10.0, 60.0, math.inf):
            decoded = self._decoded(max(0.0, time - back))
            first = next(decoded, None)
            if time <= back or (first is not None and first.time <= time + self.slack):
                break
        if first is not None:
            yield first
            yield from decoded

    def _decoded(self, time: float) -> Iterator[_Shown]:
        self._seek(time)
        damage, barren = False, 0
        smear, broken_to = math.inf, -math.inf  # ticks: from where on frames are not believed, and the last bad packet
        recent: deque[float] = deque(maxlen=self._stream.codec_context.thread_count)  # a thread reports late
        for packet in self._packets():
            if barren > _BARREN:
                return
            if packet is not None:
                stamp = _stamp(packet)
                recent.append(-math.inf if stamp is None else stamp)
            try:
                broken = packet is not None and packet.is_corrupt
                frames = [] if broken else self._stream.decode(packet)
            except self._errors:
                broken, frames = True, []
            if broken and recent:
                damage, smear, broken_to = True, min(smear, *recent), max(broken_to, *recent)
            barren = 0 if frames else barren + 1
            for frame in frames:
                stamp = _stamp(frame)
                if stamp is None or frame.is_corrupt:
                    damage = True
                    continue
                if frame.key_frame and stamp > broken_to:
                    smear = math.inf
                if stamp >= smear:  # predicted from what is lost
                    damage = True
                    continue
                at = self._seconds(stamp)
                yield _Shown(at, at + (frame.duration * self._tick or self._period), frame, damage)
                damage = False

    def _seek(self, time: float) -> None:
        # Where a file cannot be searched, reading goes on from where it is.
        with contextlib.suppress(self._errors):
            self._container.seek(self._ticks(time), stream=self._stream, backward=True)

    def _packets(self) -> Iterator[Packet | None]:
        """The packets of the stream to the end of what can be read, then None."""
        with contextlib.suppress(self._errors):
            yield from (packet for packet in self._container.demux(self._stream) if packet.size)
        yield None

    def _ticks(self, time: float) -> int:
        return max(-_FAR, min(self._origin + round(time / self._tick), _FAR))

    def _seconds(self, ticks: int) -> float:
        return (ticks - self._origin) * self._tick


def _stamp(timed: Packet | VideoFrame) -> int | None:
    return timed.dts if timed.pts is None else timed.pts  # AVI has no presentation times


@contextlib.contextmanager
def _file(video: Video, max_bytes: int) -> Iterator[BinaryIO]:
    where, source = video.where, video.source
    if isinstance(source, bytes | bytearray):
        check_bytes(where, len(source), max_bytes)
        yield io.BytesIO(source)
        return
    if not isinstance(source, str | Path):
        raise MediaError(
            f"{where}: a clip is a path, encoded bytes or a uint8 array (frames, height, width, 3), not "
            f"{type(source).__name__}"
        )
    with open_medium(source, where=where, medium="clip", max_bytes=max_bytes) as file:
        yield file


def _check_size(where: str, width: int, height: int, limit: int) -> None:
    if width * height > limit:
        raise MediaError(f"{where}: {width} x {height} pixels a frame are more than the {limit:,} allowed")
    if width < 1 or height < 1:
        raise MediaError(f"{where}: the size of its frames is not known; the file is broken or cut off")


def _array(video: Video) -> UInt8[np.ndarray, "frames height width 3"]:
    where, array = video.where, video.source
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3 or not array.size:
        shape = " x ".join(map(str, array.shape))
        raise MediaError(
            f"{where}: an array of {array.dtype}, {shape}; pass uint8 of (frames, height, width, 3), at least one"
        )
    if video.fps is None:
        raise MediaError(f"{where}: an array of frames needs its rate: Video(array, fps=...)")
    return array


def _piece(video: Video, duration: float, max_seconds: float) -> tuple[float, float]:
    start, end = float(video.start or 0), duration if video.end is None else float(video.end)
    if start >= duration or end > duration + 1:  # "to 10 s" may be said of a clip of 9.97 s
        raise MediaError(f"{video.where}: lasts {duration:.2f} s, so it has no piece from {start:g} s to {end:g} s")
    end = min(end, duration)
    if end - start > max_seconds:
        raise MediaError(
            f"{video.where}: {end - start:,.0f} s are more than the {max_seconds:,.0f} allowed; choose a piece with "
            "start and end"
        )
    return start, end


def _converted(where: str, frame: VideoFrame, size: tuple[int, int], pixels: str, scaling: str) -> np.ndarray:
    try:
        return frame.to_ndarray(width=size[0], height=size[1], format=pixels, interpolation=scaling)
    except Exception as error:  # of PyAV or FFmpeg, for formats of pixels that they do not know
        raise MediaError(f"{where}: its frames cannot be converted to {pixels}") from error


def _rotation(frame: VideoFrame) -> int:
    """Degrees clockwise to upright, in quarter turns; FFmpeg counts the other way."""
    return -90 * round(frame.rotation / 90) % 360


# ---- which times ----

Spacing: TypeAlias = Literal["open", "closed", "closed-floor"]
"""Which ``count`` of ``n`` frames are "evenly spaced": references differ, and a model sees other frames.

``open``: floor(i * n / count), the last frame left out: Qwen2-VL, InternVL and Video-LLaMA 3 in transformers.
``closed``: round(i * (n - 1) / (count - 1)), first and last frame taken: qwen_vl_utils, Qwen3-VL.
``closed-floor``: the same rounded down: LLaVA-NeXT-Video, LLaVA-OneVision, SmolVLM.
"""
_SPACINGS = ("open", "closed", "closed-floor")


def spread(info: VideoInfo, count: int, spacing: Spacing) -> list[float]:
    """Times of ``count`` evenly spaced frames of the piece; frames repeat where the piece has fewer."""
    n = info.frames
    if spacing == "open":
        indices = [i * n // count for i in range(count)]
    else:
        places = np.linspace(0, n - 1, count)
        indices = (places if spacing == "closed-floor" else places.round()).astype(int).tolist()
    return [max(info.start, (info.first + index) / info.fps) for index in indices]


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """``count`` evenly spaced frames; all frames where the piece has fewer."""

    count: int
    spacing: Spacing = "closed"

    def __post_init__(self) -> None:
        _check_sampling(self, self.count >= 1, "count must be positive")
        _check_spacing(self.spacing)

    def times(self, video: Video) -> list[float]:
        """Seconds from the first frame, in order."""
        info = open_video(video)
        return spread(info, min(self.count, info.frames), self.spacing)


@dataclass(frozen=True, kw_only=True)
class Fps:
    """About ``fps`` evenly spaced frames a second: at least ``least``, at most ``most``, a multiple of ``multiple``.

    The count is that of Qwen2-VL: the length times ``fps`` is brought between the limits, ``most`` being no more than
    the piece has, and is then rounded down. A piece shorter than ``multiple`` frames repeats its frames.
    """

    fps: float | int
    least: int = 4
    most: int = 768
    multiple: int = 2
    spacing: Spacing = "closed"

    def __post_init__(self) -> None:
        _check_sampling(self, self.fps > 0 and self.multiple >= 1, "fps and multiple must be positive")
        _check_sampling(self, 1 <= self.least <= self.most, "it needs 1 <= least <= most")
        whole = self.least % self.multiple == 0 and self.most % self.multiple == 0
        _check_sampling(self, whole, "least and most must be multiples of multiple")
        _check_spacing(self.spacing)

    def count(self, info: VideoInfo) -> int:
        """How many frames are taken of such a piece."""
        available = info.frames // self.multiple * self.multiple
        wanted = min(max(info.frames / info.fps * self.fps, self.least), self.most, available)
        return max(math.floor(wanted / self.multiple), 1) * self.multiple

    def times(self, video: Video) -> list[float]:
        """Seconds from the first frame, in order."""
        info = open_video(video)
        return spread(info, self.count(info), self.spacing)


@dataclass(frozen=True, kw_only=True)
class SceneChange:
    """The first frame, and the first frame of each new scene; the ``most`` strongest changes where there are more.

    Four frames a second are compared by their histograms of luminance; a change is the share of the picture, 0 to 1,
    that moved to another level. What is seen for less than a quarter of a second may go unnoticed.
    """

    most: int
    threshold: float = 0.25

    def __post_init__(self) -> None:
        _check_sampling(self, self.most >= 1, "most must be positive")
        _check_sampling(self, 0 < self.threshold <= 1, "threshold is a share between 0 and 1")

    def times(self, video: Video) -> list[float]:
        """Seconds from the first frame, in order."""
        times, pictures = _scan(video, open_video(video), 0)
        levels = np.stack([_histogram(picture) for picture in pictures])
        changes = np.concatenate([[0.0], np.abs(np.diff(levels, axis=0)).sum(1) / 2])
        strongest = np.argsort(-changes, kind="stable")[: self.most - 1]
        chosen = [0, *sorted(int(i) for i in strongest if changes[i] > self.threshold)]
        return [times[i] for i in chosen]


@dataclass(frozen=True, kw_only=True)
class Adaptive:
    """``count`` frames, dense where the picture moves and sparse where it is still; all where the piece has fewer.

    Frames are spent in proportion to motion, the mean change of luminance between frames a quarter of a second apart
    or less; the share ``floor`` of them is spread evenly whatever moves. No moment gets two, so that one cut does not
    take all. Of each stretch of time that is due a frame, the middle is taken, or what stands out from the rest of it.
    """

    count: int
    floor: float = 0.25

    def __post_init__(self) -> None:
        _check_sampling(self, self.count >= 1, "count must be positive")
        _check_sampling(self, 0 < self.floor <= 1, "floor is a share between 0 and 1")

    def times(self, video: Video) -> list[float]:
        """Seconds from the first frame, in order."""
        info = open_video(video)
        if self.count >= info.frames:
            return spread(info, info.frames, "open")
        times, pictures = _scan(video, info, 2 * self.count)
        motion = np.array([0.0, *(_difference(a, b) for a, b in itertools.pairwise(pictures))])
        stretches = _stretches(motion, self.count, self.floor)
        return sorted(times[_standing_out(pictures, stretch, middle)] for stretch, middle in stretches)


Sampling: TypeAlias = Uniform | Fps | SceneChange | Adaptive


def _check_sampling(sampling: Any, good: bool, rule: str) -> None:
    if not good:
        raise ConfigError(f"{sampling}: {rule}")


def _check_spacing(spacing: str) -> None:
    if spacing not in _SPACINGS:
        raise ConfigError(f"no spacing is called {spacing!r}{did_you_mean(spacing, _SPACINGS)}")


Luminance: TypeAlias = UInt8[np.ndarray, "moments rows columns"]


def _scan(video: Video, info: VideoInfo, least: int) -> tuple[list[float], Luminance]:
    """Times a quarter of a second apart or less, at least ``least`` if there are, and small grey pictures at them."""
    seconds = info.frames / info.fps
    times = spread(info, min(info.frames, max(least, math.ceil(seconds * _SCAN_FPS))), "open")
    return times, np.stack([_luminance(video.where, frame) for _, frame, _ in _shown(video, times)])


def _luminance(where: str, frame: VideoFrame | Picture) -> UInt8[np.ndarray, "rows columns"]:
    if isinstance(frame, np.ndarray):
        small = PILImage.fromarray(frame).convert("L").resize(_SCAN_SIZE, PILImage.Resampling.BOX)
        return np.asarray(small)
    return _converted(where, frame, _SCAN_SIZE, "gray", "AREA")


def _histogram(luminance: UInt8[np.ndarray, "rows columns"], bins: int = 16) -> Float[np.ndarray, " bins"]:
    # Shared between the two nearest levels: with hard borders, an even grey on a border would jump with the noise.
    place = luminance.ravel() / 255 * (bins - 1)
    low = place.astype(int)
    high = np.minimum(low + 1, bins - 1)
    counts = np.bincount(low, 1 - (place - low), bins) + np.bincount(high, place - low, bins)
    return counts / place.size


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    """Mean difference of luminance, 0..255; up to two levels of a cell are noise of the camera or the codec."""
    return float(np.maximum(np.abs(a.astype(np.float32) - b) - 2, 0).mean())


def _stretches(motion: Float[np.ndarray, " moments"], count: int, floor: float) -> list[tuple[np.ndarray, int]]:
    """Splits the moments into ``count`` stretches that are due a frame each; the moments of each, and its middle."""
    n, total = len(motion), motion.sum()
    share = np.full(n, 1 / n) if total <= 0 else floor / n + (1 - floor) * motion / total
    # A moment is due one frame at most; what is above goes to the others, which may bring more of them to one.
    certain = np.zeros(n, bool)
    while True:
        due = np.where(certain, 0.0, share)
        due *= (count - certain.sum()) / due.sum()
        more = due > 1 - 1e-6
        if not more.any():
            break
        certain |= more
    # The others' dues are laid end to end and cut at each whole frame. None is due a whole one: no stretch is empty.
    centre = np.cumsum(due) - due / 2
    number = np.where(certain, -1, centre.astype(int))
    stretches = [(np.array([i]), int(i)) for i in np.flatnonzero(certain)]
    for k in range(count - len(stretches)):
        inside = np.flatnonzero(number == k)
        stretches.append((inside, int(inside[np.abs(centre[inside] - k - 0.5).argmin()])))
    return stretches


def _standing_out(pictures: Luminance, stretch: np.ndarray, middle: int) -> int:
    """The moment of a stretch that is unlike the others, so that a short event is seen; the middle if none is."""
    inside = pictures[stretch]
    mean = inside.mean(0)
    unlike = np.array([_difference(picture, mean) for picture in inside])
    return int(stretch[unlike.argmax()]) if unlike.max() > 2 * np.median(unlike) + 0.05 else middle
