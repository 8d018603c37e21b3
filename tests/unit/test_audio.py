"""Sound: every container to the same samples, pieces and blocks of the whole, and files that are not what they say."""

from __future__ import annotations

import io
import math
import struct
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from polymodal.core.errors import MediaError
from polymodal.core.sample import Audio, Sample
from polymodal.modalities import audio as sound

av = pytest.importorskip("av")
soundfile = pytest.importorskip("soundfile")
soxr = pytest.importorskip("soxr")

RATE = 22_050
LOSSLESS = ("wav", "wav24", "wavf", "flac", "aiff")
LOSSY = ("ogg", "mp3", "opus.ogg", "m4a", "webm", "mp4", "mkv")


def tune(seconds: float = 3.0, rate: int = RATE) -> np.ndarray:
    """Two sliding notes, so that every moment sounds unlike every other; (2, samples)."""
    t = np.arange(round(seconds * rate)) / rate
    return np.stack([0.5 * np.sin(2 * np.pi * (f + 60 * t) * t) for f in (220, 331)]).astype(np.float32)


def encoded(kind: str, wave: np.ndarray, rate: int = RATE) -> bytes:
    out = io.BytesIO()
    flat = {"wav": "PCM_16", "wav24": "PCM_24", "wavf": "FLOAT", "flac": "PCM_16", "aiff": "PCM_16"}
    flat |= {"ogg": "VORBIS", "mp3": "MPEG_LAYER_III"}
    if kind in flat:
        soundfile.write(out, wave.T, rate, format=kind[:3] if kind[:3] == "wav" else kind, subtype=flat[kind])
        return out.getvalue()
    codec = {"mkv": "flac", "m4a": "aac", "mp4": "aac"}.get(kind, "libopus")
    rate_in, rate = rate, 48_000 if codec == "libopus" else rate
    with av.open(out, "w", format={"opus.ogg": "ogg", "m4a": "ipod", "mkv": "matroska"}.get(kind, kind)) as box:
        film = (
            box.add_stream("libvpx" if kind == "webm" else "mpeg4", rate=5) if kind in ("mp4", "mkv", "webm") else None
        )
        track = box.add_stream(codec, rate=rate, layout="stereo")
        track.bit_rate = 192_000
        if film is not None:  # a video: its pictures come first
            film.width, film.height, film.pix_fmt = 32, 32, "yuv420p"
            for _ in range(5):
                frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
                box.mux(film.encode(frame))
            box.mux(film.encode())
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave), format="fltp", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = rate_in, 0, Fraction(1, rate_in)
        resampler = av.AudioResampler(track.format, "stereo", rate, frame_size=track.codec_context.frame_size or None)
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            box.mux(track.encode(piece))
        box.mux(track.encode())
    return out.getvalue()


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return {kind: encoded(kind, tune()) for kind in LOSSLESS + LOSSY}


def whole(source: object, rate: int = RATE, channels: int = 2, **more: float) -> np.ndarray:
    return sound.decode(Audio(source, **more), rate, channels).numpy()


@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_files_give_back_their_samples(files: dict[str, bytes], kind: str) -> None:
    steps = {"wav24": 2**23, "wavf": 2**30}.get(kind, 2**15)
    assert np.abs(whole(files[kind]) - tune()).max() <= 1.01 / steps
    assert sound.seconds(Audio(files[kind])) == pytest.approx(3.0)


@pytest.mark.parametrize("kind", LOSSY)
def test_lossy_files_sound_alike_and_in_time(files: dict[str, bytes], kind: str) -> None:
    got, true = whole(files[kind]), tune()
    shared = min(got.shape[1], true.shape[1])
    assert abs(got.shape[1] - true.shape[1]) < 0.1 * RATE
    got, true = got[:, :shared], true[:, :shared]
    error = np.sqrt(((got - true)[:, 2000:-2000] ** 2).mean() / (true**2).mean())
    assert error < 0.1, f"{kind}: {error:.3f}"
    assert sound.seconds(Audio(files[kind])) == pytest.approx(3.0, abs=0.1)


@pytest.mark.parametrize("kind", LOSSLESS[::3] + LOSSY)
@pytest.mark.parametrize(("start", "end"), [(0.25, 0.75), (2.5, None)])
def test_a_piece_is_a_piece_of_the_whole(files: dict[str, bytes], kind: str, start: float, end: float | None) -> None:
    native = 48_000 if "opus" in kind or kind == "webm" else RATE
    all_of_it = whole(files[kind], native)
    stop = all_of_it.shape[1] if end is None else round(end * native)
    piece = sound.decode(Audio(files[kind], start=start, end=end), native, 2).numpy()
    expected = all_of_it[:, round(start * native) : stop]
    assert piece.shape == expected.shape
    # Opus goes on predicting from what it heard longest ago, so a decoder that starts later differs a little.
    assert np.abs(piece - expected).max() < (0.05 if "opus" in kind or kind == "webm" else 1e-3)


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 48_000])
@pytest.mark.parametrize("seconds", [0.05, 0.7, 30.0])
def test_blocks_are_the_whole_and_a_stream_is_one_shot(files: dict[str, bytes], rate: int, seconds: float) -> None:
    parts = list(sound.blocks(Audio(files["wavf"]), rate, seconds))
    got = torch.cat(parts, 1)
    assert torch.equal(got, sound.decode(Audio(files["wavf"]), rate))
    assert all(part.shape[1] == round(seconds * rate) for part in parts[:-1])
    mono = tune().mean(0)
    expected = soxr.resample(mono, RATE, rate, quality="HQ") if rate != RATE else mono
    assert got.shape[1] == math.ceil(len(mono) * rate / RATE)
    assert np.abs(got[0, : len(expected)].numpy() - expected).max() < 1e-6


def test_channels_are_mixed_and_copied(files: dict[str, bytes]) -> None:
    np.testing.assert_allclose(whole(files["wavf"], channels=1)[0], tune().mean(0), atol=1e-6)
    mono = encoded("wavf", tune()[:1])
    assert np.array_equal(*whole(mono, channels=2))
    with pytest.raises(MediaError, match="2 channels, not 3"):
        whole(files["wavf"], channels=3)


def test_arrays_and_tensors_are_sound(tmp_path: Path) -> None:
    wave = tune()
    assert torch.equal(sound.decode(Audio(wave, rate=RATE), RATE, 2), torch.from_numpy(wave))
    assert torch.equal(sound.decode(Audio(torch.from_numpy(wave[0]), rate=RATE), RATE), torch.from_numpy(wave[:1]))
    assert sound.seconds(Audio(wave, rate=RATE, start=1)) == pytest.approx(2.0)
    loud = sound.decode(Audio(wave * 9, rate=RATE), RATE, 2)
    assert loud.abs().max() == 1


@pytest.mark.parametrize("ending", ["wav", "flac", "ogg", "mp3"])
def test_what_is_written_is_read(tmp_path: Path, ending: str) -> None:
    path, wave = tmp_path / f"a.{ending}", torch.from_numpy(tune())
    sound.write(path, wave, RATE)
    assert [part.source for part in Sample.of(path).audios] == [path]
    got = sound.decode(Audio(path), RATE, 2)
    if ending in ("wav", "flac"):
        assert (got - wave).abs().max() < 1e-4
    else:
        assert (got - wave)[:, 4000:-4000].square().mean().sqrt() < 0.05
    assert [f.name for f in tmp_path.iterdir()] == [path.name]


def write_in_blocks(path: Path, *parts: torch.Tensor) -> None:
    with sound.writing(path, RATE) as add:
        for part in parts:
            add(part)


def test_nothing_is_written_of_what_is_no_sound(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="no numbers"):
        sound.write(tmp_path / "a.wav", torch.full((1, 9), math.nan), RATE)
    with pytest.raises(MediaError, match="wav, flac"):
        sound.write(tmp_path / "a.xyz", torch.zeros(1, 9), RATE)
    with pytest.raises(MediaError, match="no numbers"):
        write_in_blocks(tmp_path / "a.wav", torch.zeros(1, 9), torch.full((1, 9), math.inf))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit of file sizes")
@pytest.mark.parametrize("ending", ["wav", "flac", "ogg", "mp3"])
def test_a_full_disk_is_an_error_that_says_so(tmp_path: Path, ending: str) -> None:
    import resource

    own = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, own[1]))
    try:
        with pytest.raises(MediaError, match=rf"a\.{ending}: cannot be written to its end; is the disk full"):
            sound.write(tmp_path / f"a.{ending}", torch.rand(1, 4 * RATE) - 0.5, RATE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, own)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["wav", "flac", "m4a"])
def test_a_file_that_was_cut_is_refused_and_its_whole_part_is_read(files: dict[str, bytes], kind: str) -> None:
    torn = files[kind][: len(files[kind]) * 6 // 10]
    with pytest.raises(MediaError, match="cut off"):
        whole(torn)
    if kind in ("wav", "flac"):
        assert np.array_equal(whole(torn, end=1.0), whole(files[kind], end=1.0))


def test_a_wav_of_unknown_length_is_read_to_its_end(files: dict[str, bytes]) -> None:
    """What programs write into a pipe: they cannot go back to fill in the size."""
    data = bytearray(files["wav"])
    place = data.index(b"data") + 4
    data[4:8] = data[place : place + 4] = b"\xff" * 4
    assert np.array_equal(whole(bytes(data)), whole(files["wav"]))


def test_one_sample_is_sound() -> None:
    one = encoded("wavf", np.full((1, 1), 0.5, np.float32))
    assert sound.decode(Audio(one), RATE).tolist() == [[0.5]]
    assert sound.decode(Audio(one), 16_000).shape == (1, 1)


def wav_header(rate: int, channels: int, size: int, code: int = 1, bits: int = 16) -> bytes:
    form = struct.pack(
        "<HHIIHH", code, channels, rate, rate * channels * bits // 8 & 0xFFFFFFFF, channels * 2 & 0xFFFF, bits
    )
    head = b"fmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", size)
    return b"RIFF" + struct.pack("<I", 4 + len(head) + size) + b"WAVE" + head


def hostile() -> Iterator[tuple[str, bytes, str]]:
    yield "nothing", b"", "empty"
    yield "text", b"this is no sound" * 50, "not sound"
    yield "a playlist", b"#EXTM3U\n/etc/passwd\n", "not sound"
    yield "a picture", b"\x89PNG\r\n\x1a\n" + bytes(200), "not sound"
    yield "no samples", encoded("wav", np.zeros((1, 0), np.float32)), "no sound"
    yield "1 GB declared", wav_header(RATE, 1, 2**30) + bytes(2000), "cut off"
    yield "a rate of 4 GHz", wav_header(2**32 - 1, 1, 2000) + bytes(2000), "broken|not sound|no sound"
    yield "60,000 channels", wav_header(RATE, 60_000, 2000) + bytes(2000), "broken|not sound|no sound|not read"
    yield "not a number", encoded("wavf", np.array([[0.1, np.nan, 0.2]], np.float32)), "no numbers"
    yield "half a header", encoded("flac", tune())[:20], "not sound|no sound|cut off"


@pytest.mark.parametrize(("what", "data", "message"), [pytest.param(*case, id=case[0]) for case in hostile()])
def test_hostile_files_are_errors_that_say_why(what: str, data: bytes, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        sound.decode(Audio(data, name=what), 16_000)


def test_random_damage_gives_sound_or_an_error(files: dict[str, bytes]) -> None:
    rng = np.random.default_rng(0)
    for kind in ("wav", "flac", "ogg", "mp3", "m4a"):
        for _ in range(8):
            data = bytearray(files[kind])
            for place in rng.integers(0, len(data), 20):
                data[place] = rng.integers(256)
            try:
                got = sound.decode(Audio(bytes(data)), 16_000)
            except MediaError:
                continue
            assert got.isfinite().all()
            assert got.abs().max() <= 1


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: Audio("a.wav", start=3, end=2), "start < end"),
        (lambda: Audio("a.wav", rate=0), "rate must be positive"),
        (lambda: whole("/nowhere.wav"), "no such file"),
        (lambda: whole("https://example.org/a.wav"), "not fetched"),
        (lambda: whole(object()), "not object"),
        (lambda: sound.decode(Audio(np.zeros(9, np.float32)), RATE), "needs its rate"),
        (lambda: sound.decode(Audio(np.zeros(9, np.int16), rate=RATE), RATE), "int16"),
        (lambda: sound.decode(Audio(np.zeros((9000, 2)), rate=RATE), RATE), "channels come first"),
        (lambda: sound.decode(Audio(tune(), rate=RATE, start=5), RATE, 2), "lasts 3.00 s"),
        (lambda: sound.decode(Audio(tune(), rate=RATE, end=9), RATE, 2), "lasts 3.00 s"),
        (lambda: sound.decode(Audio(tune(), rate=RATE, end=1e-9), RATE, 2), "no sample"),
        (lambda: sound.decode(Audio(encoded("wav", tune()), rate=RATE), RATE), "says its own"),
    ],
)
def test_wrong_use_is_an_error_that_says_why(made: object, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        made()  # type: ignore[operator]


def test_what_a_decode_may_hold_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sound, "MAX_HELD", 2**16)
    with pytest.raises(MediaError, match="blocks"):
        sound.decode(Audio(tune(), rate=RATE), RATE, 2)
    assert sum(part.shape[1] for part in sound.blocks(Audio(tune(), rate=RATE), RATE, 0.1)) == 3 * RATE
