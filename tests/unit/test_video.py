"""Clips: the frame that a viewer sees at each time, which times are asked for, and files that are not what they say."""

from __future__ import annotations

import contextlib
import io
import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polymodal.core.errors import ConfigError, MediaError, MissingDependency
from polymodal.core.sample import Image, Sample, Text, Video
from polymodal.modalities import video as module
from polymodal.modalities.video import (
    Adaptive,
    Fps,
    SceneChange,
    Uniform,
    VideoInfo,
    chunks,
    clock,
    decode,
    frames_of,
    open_video,
    read,
    spread,
)

av = pytest.importorskip("av", reason="the extra video is not installed")

KINDS = [("mp4", "libx264"), ("mov", "mpeg4"), ("matroska", "libx264"), ("webm", "libvpx"), ("avi", "mpeg4")]
BITS, CELL = 10, 16


def numbered(index: int) -> np.ndarray:
    """A picture that says its number in black and white stripes, which survive any codec."""
    stripes = [255 * (index >> bit & 1) for bit in range(BITS)]
    return np.repeat(np.broadcast_to(np.repeat(np.uint8(stripes), CELL), (48, BITS * CELL))[..., None], 3, axis=2)


def number(picture: np.ndarray) -> int:
    levels = picture[16:32].reshape(16, BITS, CELL, 3).mean(axis=(0, 2, 3))
    return sum(1 << bit for bit, level in enumerate(levels) if level > 127)


def encoded(
    pictures: Iterable[np.ndarray],
    *,
    fps: Fraction | int = 30,
    container: str = "mp4",
    codec: str = "libx264",
    milliseconds: Sequence[int] | None = None,
    rotation: float = 0,
    options: dict[str, str] | None = None,
    colours: int | None = None,
    **container_options: str,
) -> bytes:
    """A clip; ``milliseconds`` gives each frame its own time."""
    stream: Any = None
    with tempfile.NamedTemporaryFile() as file:
        with av.open(file.name, "w", format=container, options=container_options) as out:
            for i, picture in enumerate(pictures):
                if stream is None:
                    stream = out.add_stream(codec, rate=fps, options={"g": "12", **(options or {})})
                    stream.height, stream.width, stream.pix_fmt = *picture.shape[:2], "yuv420p"
                    if rotation:
                        stream.set_display_rotation(rotation)
                    if milliseconds:
                        stream.codec_context.time_base = Fraction(1, 1000)
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24")
                if colours is not None:
                    frame = frame.reformat(format="yuv420p", dst_colorspace=colours)
                    stream.codec_context.colorspace = colours
                if milliseconds:
                    frame.pts, frame.time_base = milliseconds[i], Fraction(1, 1000)
                out.mux(stream.encode(frame))
            out.mux(stream.encode())
        return Path(file.name).read_bytes()


def clip(count: int = 60, **how: Any) -> bytes:
    return encoded((numbered(i) for i in range(count)), **how)


def numbers(video: Video, times: Sequence[float]) -> list[int]:
    return [number(frame) for _, frame in decode(video, times)]


# ---- decoding ----


@pytest.mark.parametrize(("container", "codec"), KINDS)
@pytest.mark.parametrize("fps", [30, Fraction(30000, 1001)], ids=str)
def test_each_index_gives_its_frame(container: str, codec: str, fps: Fraction | int) -> None:
    video = Video(clip(60, fps=fps, container=container, codec=codec))
    info = open_video(video)
    assert (info.size, info.rotation, info.frames) == ((160, 48), 0, 60)
    assert info.fps == pytest.approx(float(fps), rel=1e-3)
    assert info.duration == pytest.approx(60 / fps, abs=2e-3)
    times = [i / float(fps) for i in range(60)]
    assert numbers(video, times) == list(range(60))
    assert numbers(video, spread(info, 60, "closed")) == list(range(60))
    # Alone, each after its own search, also in the middle of its time; and in leaps.
    assert [numbers(video, [t + 0.4 / fps])[0] for t in times[::7]] == list(range(0, 60, 7))
    assert numbers(video, times[5::20]) == [5, 25, 45]
    assert [time for time, _ in decode(video, times[::9])] == times[::9]


def test_streams_without_keyframes_but_the_first() -> None:
    video = Video(clip(90, options={"g": "20", "x264-params": "intra-refresh=1"}))
    assert numbers(video, [i / 30 for i in range(90)]) == list(range(90))
    assert numbers(video, [70 / 30]) == [70]


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_a_variable_frame_rate_is_followed(container: str) -> None:
    milliseconds = [0, 40, 80, 1000, 1033, 1500, 4000, 4020, 4040, 6000]
    data = clip(10, fps=25, container=container, milliseconds=milliseconds, options={"bf": "0"})
    wanted = [0.0, 0.05, 0.5, 0.99, 1.0, 1.02, 1.2, 3.9, 4.0, 4.03, 5.9, 6.0]
    assert numbers(Video(data), wanted) == [0, 1, 2, 2, 3, 3, 4, 5, 6, 7, 8, 9]
    info = open_video(Video(data))
    assert 6.0 < info.duration < 6.1
    times = Uniform(count=4).times(Video(data))
    assert times == sorted(times)
    assert len(numbers(Video(data), times)) == 4


def test_the_decoder_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    data, decoded, searched = clip(300), [], []
    original, seconds = module._Clip._decoded, module._Clip._seconds
    monkeypatch.setattr(module._Clip, "_decoded", lambda self, t: searched.append(t) or original(self, t))
    monkeypatch.setattr(module._Clip, "_seconds", lambda self, t: decoded.append(t) or seconds(self, t))
    assert numbers(Video(data), [9.0, 9.1, 9.9]) == [270, 273, 297]
    assert len(decoded) < 80  # of 300: keyframes lie 12 frames apart
    assert len(searched) <= 4
    searched.clear()
    assert numbers(Video(data), [i / 30 for i in range(100, 111)]) == list(range(100, 111))
    assert len(searched) <= 2  # times near each other share a pass


@pytest.mark.parametrize(("container", "codec"), [("mp4", "libx264"), ("matroska", "libx264")])
def test_one_keyframe_and_many_b_frames(container: str, codec: str) -> None:
    data = clip(90, container=container, codec=codec, options={"g": "1000", "bf": "4", "b_strategy": "0"})
    for index in (0, 1, 44, 89):
        assert numbers(Video(data), [index / 30]) == [index]


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotated_clips_are_turned_upright(rotation: int) -> None:
    picture = np.zeros((48, 80, 3), np.uint8)
    picture[:24, :40] = [255, 0, 0]  # a red corner, top left as stored
    data = encoded([picture] * 3, rotation=rotation)
    # The header's matrix by the standard: x' = a x + c y, y' = b x + d y, with y downwards.
    at = data.index(b"tkhd") + 4 + 40
    a, b, _, c, d = struct.unpack(">5i", data[at : at + 20])
    x, y = (a * -1 + c * -1) / 65536, (b * -1 + d * -1) / 65536  # where the matrix puts the top left corner
    info = open_video(Video(data))
    assert info.rotation in (90, 180, 270)
    assert info.size == ((48, 80) if rotation % 180 else (80, 48))
    ((_, upright),) = decode(Video(data), [0.0])
    assert upright.shape == (info.size[1], info.size[0], 3)
    height, width = upright.shape[:2]
    red = upright[height // 4 if y < 0 else 3 * height // 4, width // 4 if x < 0 else 3 * width // 4]
    assert red[0] > 180 > 60 > red[1]


def test_declared_colours_are_followed() -> None:
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[...] = [30, 200, 60]
    for colours in (1, 5):  # BT.709 and BT.601
        ((_, seen),) = decode(Video(encoded([picture] * 2, colours=colours, options={"qp": "1"})), [0.0])
        assert np.abs(seen.astype(int) - picture).max() <= 6


def test_every_kind_of_source_gives_the_same_frames(tmp_path: Path) -> None:
    data = clip(20)
    path = tmp_path / "clip.mp4"
    path.write_bytes(data)
    expected = read(Video(data), Uniform(count=5))
    for source in (path, str(path), bytearray(data)):
        frames = read(Video(source), Uniform(count=5))
        np.testing.assert_array_equal(frames.pixels, expected.pixels)
        assert frames.times == expected.times
    array = np.stack([numbered(i) for i in range(20)])
    frames = read(Video(array, fps=30), Uniform(count=5))
    assert frames.times == expected.times
    assert (
        [number(frame) for frame in frames.pixels] == [number(frame) for frame in expected.pixels] == [0, 5, 10, 14, 19]
    )


def test_frames_belong_to_the_caller() -> None:
    array = np.zeros((3, 8, 8, 3), np.uint8)
    for source in (Video(array, fps=1), Video(encoded([array[0]] * 3, fps=1))):
        frames = [frame for _, frame in decode(source, [0.0, 0.0, 0.5])]
        frames[0][:] = 255
        assert frames[1].max() < 32
        assert array.max() == 0


def test_chunks_hold_no_more_than_their_size() -> None:
    data, times = clip(20), [i / 30 for i in range(0, 20, 3)]
    pieces = list(chunks(Video(data), times, size=3))
    assert [len(piece.times) for piece in pieces] == [3, 3, 1]
    assert [number(frame) for piece in pieces for frame in piece.pixels] == list(range(0, 20, 3))
    assert pieces[1].timestamps == ["0:00.3", "0:00.4", "0:00.5"]


def test_times_are_written_as_a_viewer_shows_them() -> None:
    for seconds, whole, tenths in (
        (0.0, "0:00", "0:00.0"),
        (12.97, "0:12", "0:12.9"),
        (3723.0, "1:02:03", "1:02:03.0"),
    ):
        assert (clock(seconds), clock(seconds, tenths=True)) == (whole, tenths)
    clip = Video(np.stack([numbered(i) for i in range(20)]), fps=10, name="a.mp4")
    parts = frames_of(clip, Uniform(count=3))
    assert [part.text for part in parts[::2] if isinstance(part, Text)] == ["0:00.0: ", "0:01.0: ", "0:01.9: "]
    assert [(part.where, number(part.source)) for part in parts[1::2] if isinstance(part, Image)] == [
        ("a.mp4 at 0:00.0", 0), ("a.mp4 at 0:01.0", 10), ("a.mp4 at 0:01.9", 19)
    ]  # fmt: skip
    assert all(isinstance(part, Image) for part in frames_of(clip, Uniform(count=3), times=False))


def test_a_piece_of_a_clip() -> None:
    data = clip(90)
    for video in (
        Video(data, start=1.0, end=2.0),
        Video(np.stack([numbered(i) for i in range(90)]), fps=30, start=1, end=2),
    ):
        info = open_video(video)
        assert (info.first, info.frames) == (30, 30)
        assert numbers(video, Uniform(count=3, spacing="closed-floor").times(video)) == [30, 44, 59]
        assert len(numbers(video, Fps(fps=4).times(video))) == 4
    slide = Video(clip(3, fps=1), start=1.2, end=1.4)  # no frame begins in it
    assert numbers(slide, Uniform(count=8).times(slide)) == [1]
    for start, end in ((3.0, None), (1.0, 4.5)):
        with pytest.raises(MediaError, match=r"lasts 3\.00 s, so it has no piece"):
            open_video(Video(data, start=start, end=end))
    assert open_video(Video(data, end=3.4)).end == 3.0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory's high-water mark from /proc")
def test_thirty_minutes_pass_through_little_memory(tmp_path: Path) -> None:
    path, fps = tmp_path / "long.mp4", 10
    rng = np.random.default_rng(0)
    base = rng.integers(0, 200, (18, 32, 3), dtype=np.uint8).repeat(10, 0).repeat(10, 1)
    still, event = base, np.full_like(base, 255)
    moving = [np.roll(base, shift, 1) for shift in range(0, 320, 10)]
    path.write_bytes(
        encoded(
            (
                event if 12340 <= i < 12350 else moving[i % 32] if 6000 <= i < 7000 else still
                for i in range(30 * 60 * fps)
            ),
            fps=fps,
            options={"preset": "ultrafast", "g": "250"},
        )
    )
    script = """if True:
        import json, sys
        from polymodal.core.sample import Video
        from polymodal.modalities.video import Adaptive, Fps, SceneChange, chunks, open_video

        def peak():
            return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

        video = Video(sys.argv[1])
        open_video(video)
        before = peak()
        seen = [time for piece in chunks(video, Fps(fps=1, most=2000).times(video), 16) for time in piece.times]
        found = [sampling.times(video) for sampling in (Adaptive(count=32), SceneChange(most=8))]
        print(json.dumps([len(seen), (peak() - before) / 1024, found]))
    """
    out = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True).stdout
    count, grown, found = json.loads(out)
    assert count == 1800
    assert grown < 128  # MiB; the bar of 3 GiB leaves the rest to the model
    for times in found:
        assert any(1234 <= time < 1235 for time in times)


# ---- bad input ----


def test_one_frame() -> None:
    for video in (Video(clip(1)), Video(numbered(0)[None], fps=30)):
        assert open_video(video).frames == 1
        assert Uniform(count=8).times(video) == [0.0]
        assert Fps(fps=2).times(video) == [0.0, 0.0]  # even, for patches of two frames
        assert SceneChange(most=4).times(video) == Adaptive(count=4).times(video) == [0.0]
        assert read(video, Fps(fps=2)).pixels.shape == (2, 48, 160, 3)


@pytest.mark.parametrize(
    ("container", "codec", "how"),
    [
        ("mp4", "libx264", {"movflags": "faststart"}),
        ("mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}),
        ("matroska", "libx264", {}),
        ("webm", "libvpx", {}),
        ("avi", "mpeg4", {}),
    ],
    ids=["mp4", "fragmented", "mkv", "webm", "avi"],
)
def test_a_cut_file_gives_what_is_there_and_says_what_is_not(container: str, codec: str, how: dict[str, str]) -> None:
    data = clip(120, container=container, codec=codec, **how)
    video = Video(data[: int(len(data) * 0.8)], name="holiday.x")
    times = [i / 30 for i in range(120)]
    seen = []
    with pytest.raises(MediaError, match=r"^holiday\.x: there is no frame at .*cut off or broken") as caught:
        seen.extend(number(frame) for _, frame in decode(video, times))
    assert 30 < len(seen) < 115
    assert seen[:-4] == list(range(len(seen) - 4))  # at the cut, frames between others may be gone
    assert "Error" not in str(caught.value)
    assert "truncated" not in str(caught.value).lower()
    with pytest.raises(MediaError, match=r"there is no frame at 3\.97"):
        list(decode(video, [0.5, 119 / 30]))
    whole = Video(video.source, end=1.0)
    assert numbers(whole, Uniform(count=3).times(whole)) == [0, 14, 29]


def test_damage_in_the_middle_is_not_passed_over_in_silence() -> None:
    data = bytearray(clip(240))
    start = data.index(b"mdat")
    middle = start + (data.index(b"moov") - start) // 2
    data[middle : middle + 1500] = bytes(1500)
    video, right = Video(bytes(data)), 0
    for index in range(0, 240, 6):
        with contextlib.suppress(MediaError):
            assert numbers(video, [index / 30]) == [index]
            right += 1
    assert 10 < right < 40


@pytest.mark.parametrize("share", [0, 0.02, 0.3, 0.9])
def test_a_file_without_its_index_is_refused_by_name(share: float) -> None:
    data = clip(30)  # the index of an mp4 is at its end
    with pytest.raises(MediaError, match=r"^a\.mp4: (the file is empty|not a video)"):
        open_video(Video(data[: int(len(data) * share)], name="a.mp4"))


@given(st.sampled_from(KINDS), st.data())
def test_a_damaged_file_gives_frames_or_a_media_error(kind: tuple[str, str], data: st.DataObject) -> None:
    damaged = bytearray(SMALL[kind])
    for _ in range(6):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    video = Video(bytes(damaged))
    with contextlib.suppress(MediaError):
        for _, frame in decode(video, Uniform(count=3).times(video)):
            assert frame.ndim == 3


SMALL = {kind: encoded([numbered(i) for i in range(6)], container=kind[0], codec=kind[1]) for kind in KINDS}


@pytest.mark.parametrize(
    "data",
    [
        b"#EXTM3U\n#EXT-X-VERSION:3\n#EXTINF:10,\nfile.ts\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile '/etc/hostname'\n",
        b"<?xml version='1.0'?><MPD/>",
        b"%PDF-1.7\n" + bytes(2000),
        b"RIFF" + bytes(60),
        bytes(5000),
        b"GIF89a" + bytes(200),
    ],
    ids=["playlist", "concat", "dash", "pdf", "riff", "zeros", "gif"],
)
def test_what_is_no_video_is_refused(data: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(data)
    for source in (data, path):
        with pytest.raises(MediaError, match="not a video"):
            open_video(Video(source))
    assert capfd.readouterr() == ("", "")


def test_sound_alone_is_no_video() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.rate = 16000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    with pytest.raises(MediaError, match="holds no video"):
        open_video(Video(file.getvalue()))


def test_a_codec_that_is_not_on_the_list_is_refused() -> None:
    with pytest.raises(MediaError, match="codec is not read here"):
        open_video(Video(encoded([numbered(0)], container="matroska", codec="ffv1")))


def test_a_hostile_length_is_refused_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(clip(30))
    times = data.index(b"stts") + 8  # count of runs, then samples and ticks of each
    struct.pack_into(">3I", data, times, 1, 30, 2**24)
    struct.pack_into(">I", data, data.index(b"mdhd") + 20, 2**31 - 1)
    struct.pack_into(">I", data, data.index(b"elst") + 12, 2**31 - 1)
    monkeypatch.setattr(module._Clip, "frames", lambda *_: pytest.fail("decoded"))
    for hostile in (bytes(data), longer(clip(30, container="matroska"), "99:59:59")):
        with pytest.raises(MediaError, match=r"s are more than the 14,400 allowed; choose a piece"):
            open_video(Video(hostile))
    with pytest.raises(MediaError, match=r"1 s are more than the 0 allowed"):
        open_video(Video(clip(30)), max_seconds=0.5)


def test_an_index_of_millions_in_a_small_file_is_refused() -> None:
    data = bytearray(clip(30, options={"bf": "0"}))
    count = 1_000_000
    struct.pack_into(">2I", data, data.index(b"stsz") + 8, 1, count)  # one byte each
    struct.pack_into(">3I", data, data.index(b"stts") + 8, 1, count, 1)
    struct.pack_into(">I", data, data.index(b"stsc") + 16, count)  # all in one chunk
    with pytest.raises(MediaError, match="more frames than the file can hold"):
        open_video(Video(bytes(data)))


def longer(data: bytes, length: str) -> bytes:
    """A Matroska file whose video claims another length."""
    assert data.count(b"00:00:01.") == 1
    return data.replace(b"00:00:01.", f"{length}.".encode())


def test_a_length_that_is_not_there_is_noticed_at_the_frames() -> None:
    video = Video(longer(clip(30, container="matroska"), "00:09:59"))
    assert open_video(video).duration >= 599
    with pytest.raises(MediaError, match=r"no frame at .* ends at 1\.00 s"):
        read(video, Uniform(count=4))
    whole = Video(video.source, end=0.9)
    assert numbers(whole, Uniform(count=2).times(whole)) == [0, 26]


@pytest.mark.parametrize("sound", [0.0, 3.0])
def test_a_length_that_is_not_declared_is_found(sound: float) -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as out:
        stream = out.add_stream("libx264", rate=30, options={"g": "12"})
        stream.height, stream.width, stream.pix_fmt = 48, BITS * CELL, "yuv420p"
        voice = out.add_stream("aac", rate=16000)
        for i in range(45):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(numbered(i)), "rgb24")))
        out.mux(stream.encode())
        for _ in range(int(sound * 16000) // 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.rate = 16000
            out.mux(voice.encode(frame))
        out.mux(voice.encode())
    video = Video(file.getvalue().replace(b"DURATION", b"NOTHING!"))
    info = open_video(video)
    assert (info.frames, info.fps) == (45, 30)
    assert numbers(video, Uniform(count=2).times(video)) == [0, 44]


def test_size_and_bytes_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = clip(3)
    path = tmp_path / "a.mp4"
    path.write_bytes(data)
    for source in (data, path):
        assert open_video(Video(source), max_pixels=160 * 48, max_bytes=len(data)).size == (160, 48)
        with pytest.raises(MediaError, match=r"160 x 48 pixels a frame are more than the 7,679"):
            open_video(Video(source), max_pixels=160 * 48 - 1)
        with pytest.raises(MediaError, match="bytes are more than"):
            open_video(Video(source), max_bytes=len(data) - 1)
    with pytest.raises(MediaError, match="pixels a frame"):
        open_video(Video(np.zeros((1, 9, 9, 3), np.uint8), fps=1), max_pixels=80)
    monkeypatch.setattr(module, "MAX_HELD", 1000)
    with pytest.raises(MediaError, match="by `chunks`"):
        read(Video(data), Uniform(count=2))


def test_sources_that_are_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    cases: list[tuple[Video, str]] = [
        (Video(tmp_path / "none.mp4"), "no such file"),
        (Video(tmp_path), "is a folder"),
        (Video(tmp_path / "pipe.mp4"), "not a regular file"),
        (Video("https://example.org/a.mp4"), "addresses are not fetched"),
        (Video("a\0b.mp4"), "cannot be read"),
        (Video(b""), "the file is empty"),
        (Video(3), "a clip is a path"),
        (Video(clip(1), fps=3), "fps belongs to an array"),
        (Video(np.zeros((2, 4, 4, 3), np.uint8)), "needs its rate"),
        (Video(np.zeros((2, 4, 4, 3), np.float32), fps=1), "array of float32"),
        (Video(np.zeros((4, 4, 3), np.uint8), fps=1), "pass uint8 of"),
        (Video(np.zeros((0, 4, 4, 3), np.uint8), fps=1), "at least one"),
    ]
    for video, reason in cases:
        with pytest.raises(MediaError, match=reason):
            open_video(video)
    for wrong in (dict(start=2, end=1), dict(start=-1), dict(end=0), dict(start=float("nan")), dict(fps=0)):
        with pytest.raises(MediaError):
            Video(b"", **wrong)
    for times in ([1.0, 0.5], [-1.0], [float("nan")], [float("inf")]):
        with pytest.raises(MediaError, match="times must be in order"):
            list(decode(Video(clip(1)), times))
    with pytest.raises(MediaError, match="there is no frame at"):
        list(decode(Video(clip(1)), [1e200]))
    with pytest.raises(MediaError, match=r"no frame at 2\.00 s"):
        list(decode(Video(np.zeros((2, 4, 4, 3), np.uint8), fps=1), [2.0]))


def test_without_pyav_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    data = clip(1)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingDependency, match=r"polymodal\[video\]"):
        open_video(Video(data))
    assert open_video(Video(numbered(0)[None], fps=1)).frames == 1


def test_a_path_is_a_clip_by_its_suffix() -> None:
    sample = Sample.of([Path("a.MP4"), Path("b.webm"), Path("c.gif"), Video(b"", name="d"), "what happens?"])
    assert [type(part) for part in sample.parts][:4] == [Video, Video, Image, Video]
    assert [video.where for video in sample.videos] == ["a.MP4", "b.webm", "d"]


# ---- which times ----


def info_of(frames: int, fps: float, first: int = 0) -> VideoInfo:
    start, end = first / fps, (first + frames) / fps
    return VideoInfo(duration=end, fps=fps, size=(8, 8), rotation=0, start=start, end=end)


def video_of(frames: int, fps: float) -> Video:
    return Video(np.broadcast_to(np.uint8(0), (frames, 2, 2, 3)), fps=fps)


frame_counts, rates = st.integers(1, 400), st.floats(0.2, 120)
spacings = st.sampled_from(["open", "closed", "closed-floor"])


@given(frame_counts, rates, st.integers(1, 90), spacings)
def test_uniform(frames: int, fps: float, count: int, spacing: Any) -> None:
    video = video_of(frames, fps)
    times = Uniform(count=count, spacing=spacing).times(video)
    assert len(set(times)) == len(times) == min(count, frames)
    assert times == sorted(times)
    assert times[0] == 0
    assert times[-1] < frames / fps
    if spacing != "open" and len(times) > 1:
        assert times[-1] == pytest.approx((frames - 1) / fps)


@given(frame_counts, rates, st.floats(0.1, 40), st.integers(1, 6), st.integers(0, 90), st.integers(1, 4), spacings)
def test_fps(frames: int, fps: float, rate: float, least: int, more: int, multiple: int, spacing: Any) -> None:
    sampling = Fps(fps=rate, least=least * multiple, most=(least + more) * multiple, multiple=multiple, spacing=spacing)
    times = sampling.times(video_of(frames, fps))
    assert len(times) % multiple == 0
    assert len(times) == sampling.count(info_of(frames, fps))
    assert times == sorted(times)
    assert 0 <= times[0] <= times[-1] < frames / fps
    assert len(times) <= sampling.most
    if frames >= sampling.least:
        assert len(times) >= sampling.least
        assert len(set(times)) == len(times)


@given(st.integers(1, 3000), st.integers(1, 64), st.integers(0, 50))
def test_spacings_are_those_of_the_references(frames: int, count: int, first: int) -> None:
    info = info_of(frames, 25.0, first)
    expected: dict[Any, np.ndarray] = {
        # Exact, where a float step may miss a whole number from below.
        "open": np.array([int(Fraction(frames, count) * i) for i in range(count)]),
        "closed": np.linspace(0, frames - 1, count).round().astype(int),
        "closed-floor": np.linspace(0, frames - 1, count, dtype=int),
    }
    for spacing, indices in expected.items():
        np.testing.assert_allclose(spread(info, count, spacing), (indices + first) / 25)


@pytest.mark.parametrize(
    ("frames", "fps", "count"),
    [(300, 30.0, 20), (25, 25.0, 4), (54000, 30.0, 768), (3, 30.0, 2), (1, 30.0, 2), (90, 30.0, 6), (70, 10.0, 14)],
)
def test_the_count_of_qwen2_vl(frames: int, fps: float, count: int) -> None:
    assert Fps(fps=2).count(info_of(frames, fps)) == count


def scene(index: int, *, flash: range = range(0), moving: range = range(0), cuts: Sequence[int] = ()) -> np.ndarray:
    """Still, with noise, but for a flash, a square that moves, and cuts to another level."""
    rng = np.random.default_rng(index)
    level = 60 + 100 * (sum(index >= cut for cut in cuts) % 2)
    picture = (level + rng.integers(-3, 4, (36, 64, 1))) * np.ones((1, 1, 3), int)
    if index in flash:
        picture[:] = 230
    if index in moving:
        left = index * 3 % 54
        picture[10:20, left : left + 10] = 240
    return picture.astype(np.uint8)


@pytest.mark.parametrize(("at", "coded"), [(17, True), (93, True), (125, False)])
def test_a_flash_is_found(at: int, coded: bool) -> None:
    flash = range(at, at + 2)  # 0.4 s of a minute at 5 frames a second
    pictures = np.stack([scene(i, flash=flash) for i in range(300)])
    video = Video(encoded(pictures, fps=5)) if coded else Video(pictures, fps=5)
    assert not any(at / 5 <= t < (at + 2) / 5 for t in Uniform(count=8).times(video))
    for sampling in (Adaptive(count=8), SceneChange(most=4)):
        frames = read(video, sampling)
        bright = [t for t, frame in zip(frames.times, frames.pixels, strict=True) if frame.mean() > 200]
        assert bright, sampling
        assert all(at / 5 <= t < (at + 2) / 5 for t in bright)


def test_frames_go_where_it_moves() -> None:
    video = Video(encoded((scene(i, moving=range(100, 150)) for i in range(300)), fps=5))
    times = np.array(Adaptive(count=24).times(video))
    inside = ((times >= 20) & (times <= 30.3)).sum()
    assert inside >= 16  # a sixth of the time, three quarters of the frames and its part of the floor
    assert (times < 20).sum() >= 2
    assert (times > 30.3).sum() >= 2


@pytest.mark.parametrize("video", [video_of(400, 10), Video(np.stack([scene(i) for i in range(120)]), fps=3)])
def test_where_nothing_moves_frames_are_spread_evenly(video: Video) -> None:
    gaps = np.diff(Adaptive(count=10).times(video))
    assert gaps.min() > 3
    assert gaps.max() < 5
    assert SceneChange(most=5).times(video) == [0.0]


def test_scene_changes() -> None:
    video = Video(np.stack([scene(i, cuts=(25, 60, 150)) for i in range(200)]), fps=5)
    times = SceneChange(most=8).times(video)
    np.testing.assert_allclose(times, [0, 5, 12, 30], atol=0.26)
    assert SceneChange(most=8, threshold=0.9).times(video) == times  # 100 of 255 levels are other histograms
    assert len(SceneChange(most=2).times(video)) == 2
    assert SceneChange(most=1).times(video) == [0.0]


@given(st.integers(2, 200), st.integers(1, 60), st.floats(0.01, 1), st.integers(0, 2**32 - 1), st.booleans())
def test_adaptive_spends_exactly_its_frames(n: int, count: int, floor: float, seed: int, sparse: bool) -> None:
    count = min(count, n - 1)
    motion = np.random.default_rng(seed).exponential(size=n) ** 3
    if sparse:
        motion[np.random.default_rng(seed).random(n) < 0.9] = 0
    stretches = module._stretches(motion, count, floor)
    assert len(stretches) == count
    assert sorted(i for stretch, _ in stretches for i in stretch) == list(range(n))
    assert all(middle in stretch for stretch, middle in stretches)
    # The floor holds: no gap is much longer than the even share alone would leave.
    assert max(np.diff([-1, *sorted(middle for _, middle in stretches), n])) <= 2 * n / (floor * count) + 2
    if motion.max() * (1 - floor) * count >= motion.sum() > 0:
        assert any(stretch.tolist() == [motion.argmax()] for stretch, _ in stretches)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Uniform(count=0),
        lambda: Fps(fps=0),
        lambda: Fps(fps=1, least=3),
        lambda: Fps(fps=1, least=8, most=4),
        lambda: Fps(fps=1, multiple=0),
        lambda: SceneChange(most=0),
        lambda: SceneChange(most=1, threshold=0.0),
        lambda: Adaptive(count=0),
        lambda: Adaptive(count=1, floor=0.0),
    ],
)
def test_impossible_samplings_are_refused(make: Any) -> None:
    with pytest.raises(ConfigError):
        make()
