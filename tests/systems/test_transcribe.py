"""Files of sound to files of text: the command, the pipe, what is kept beside the output, and a run that is killed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import polymodal
from polymodal.backbones.decoder import Learned
from polymodal.cli import main
from polymodal.cli.show import plain
from polymodal.core.errors import ConfigError, DataError, MediaError, UnsupportedError
from polymodal.core.sample import Audio, Sample
from polymodal.core.transcript import Heard, Listening, Segment
from polymodal.core.verbs import Transcribes
from polymodal.modalities.audio import write
from polymodal.samplers.speech import Decoding
from polymodal.systems.whisper import Whisper
from polymodal.systems.whisper_files import speech_tokens
from polymodal.tokenizers.speech import train_speech_bpe
from polymodal.transcribing import spooled, transcribe_file
from tests.nano import NANO, nano

pytest.importorskip("av")


def untaught(seed: int = 0) -> Whisper:
    """A Whisper that learned nothing; what it says depends on what it hears."""
    words = train_speech_bpe(
        ["the quick brown fox", "jumps over a lazy dog"] * 2, 400, languages=("en", "de"), seconds=1.0
    )
    config = NANO["whisper"]
    tokens = speech_tokens(words)
    backbone = replace(
        config.backbone, vocab_size=words.vocab_size, start_id=tokens.start, pad_id=tokens.end, fixed_id=tokens.end,
        position=Learned(count=24),
    )  # fmt: skip
    torch.manual_seed(seed)
    model = polymodal.build(replace(config, backbone=backbone))
    assert isinstance(model, Whisper)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(2.0)
    model.tokenizer, model.tokens = words, tokens
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untaught().save(tmp_path_factory.mktemp("model") / "whisper")


@pytest.fixture
def model(folder: Path) -> Whisper:
    system = polymodal.load(folder)
    assert isinstance(system, Whisper)
    system.decoding = Decoding(temperatures=(0.0,), no_speech=2.0)
    return system


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    """Noise that grows and fades, in 22 kHz stereo."""
    generator = torch.Generator().manual_seed(0)
    wave = torch.randn(2, 4 * 22050, generator=generator) * torch.linspace(0, 12, 4 * 22050).sin() * 0.3
    write(tmp_path / "noise.wav", wave.clamp(-1, 1), 22050)
    return tmp_path / "noise.wav"


def test_the_model_comes_back_whole(folder: Path) -> None:
    before, after = untaught(), polymodal.load(folder)
    assert isinstance(after, Whisper)
    assert isinstance(after, Transcribes)
    assert (before.tokens, before.mel, before.fingerprint) == (after.tokens, after.mel, after.fingerprint)
    assert after.tokens == speech_tokens(after.tokenizer or before.words())
    assert after.tokens is not None
    assert after.words().decode([after.tokens.no_speech], skip_special=False) == "<|nospeech|>"
    assert after.words().decode([after.tokens.first_time + 25], skip_special=False) == "<|0.50|>"


def test_transformers_reads_its_files(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.WhisperTokenizerFast.from_pretrained(folder)
    ours = polymodal.load(folder)
    assert isinstance(ours, Whisper)
    ids = ours.words().encode("the lazy fox", special=False)
    assert theirs("the lazy fox", add_special_tokens=False).input_ids == ids
    assert theirs.decode(ids) == "the lazy fox"
    assert transformers.WhisperFeatureExtractor.from_pretrained(folder).feature_size == 16


def test_from_python(model: Whisper, noise: Path) -> None:
    segments = model.transcribe(noise, language="en", words=True)
    assert segments
    assert all(isinstance(s, Segment) and s.text.strip() for s in segments)
    assert all("".join(w.text for w in s.words) == s.text for s in segments)
    assert [s.start for s in segments] == sorted(s.start for s in segments)
    assert model.transcribe(noise.read_bytes(), language="en", words=True) == segments
    assert model.transcribe(Audio(noise, end=1.0), language="en")[0].text == segments[0].text
    assert model.count(Sample((Audio(noise),))) == 4 * 50


@pytest.mark.parametrize("after", [1, 3])
def test_a_run_that_was_cut_ends_with_the_same_text(model: Whisper, noise: Path, tmp_path: Path, after: int) -> None:
    whole = transcribe_file(model, noise, tmp_path / "whole.json", Listening()).read_text()
    shown: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        shown.append((done, total))
        if len(shown) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        transcribe_file(model, noise, tmp_path / "cut.json", Listening(), progress=stop)
    assert not (tmp_path / "cut.json").exists()
    part = tmp_path / ".cut.json.part"
    assert len(json.loads(part.read_text())["heard"]) in (after - 1, after)
    transcribe_file(model, noise, tmp_path / "cut.json", Listening(), progress=lambda *_: shown.append(_))
    assert (tmp_path / "cut.json").read_text() == whole
    assert not part.exists()
    assert all(total == 4 for _, total in shown)


def test_what_was_heard_of_another_task_is_not_taken(model: Whisper, noise: Path, tmp_path: Path) -> None:
    out, part = tmp_path / "a.txt", tmp_path / ".a.txt.part"
    expected = transcribe_file(model, noise, out, Listening()).read_text()
    part.write_text(json.dumps({"sound": "another", "heard": []}))
    assert transcribe_file(model, noise, out, Listening()).read_text() == expected
    part.write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        transcribe_file(model, noise, out, Listening())


def test_what_was_heard_before_a_sound_breaks_off_is_written(model: Whisper, tmp_path: Path) -> None:
    wave = torch.rand(1, 13 * 16000, generator=torch.Generator().manual_seed(1)) - 0.5
    write(tmp_path / "whole.wav", wave, 16000)
    cut, out = tmp_path / "cut.wav", tmp_path / "cut.json"
    cut.write_bytes((tmp_path / "whole.wav").read_bytes()[: 44 + 2 * 16000 * 12])  # the recorder lost its power
    with pytest.raises(
        MediaError, match=r"header says 13\.00 s, and 12\.00 s are there.* before that is in .*cut\.json"
    ):
        transcribe_file(model, cut, out, Listening())
    heard = [(one["start"], one["text"]) for one in json.loads(out.read_text())["segments"]]
    assert heard
    assert heard == [(one.start, one.text) for one in model.transcribe(tmp_path / "whole.wav")][: len(heard)]
    assert not (tmp_path / ".cut.json.part").exists()


def test_what_cannot_be(model: Whisper, noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match="'xx', but: de, en"):
        model.transcribe(noise, language="xx")
    with pytest.raises(ConfigError, match=r"known: \.txt"):
        transcribe_file(model, noise, tmp_path / "a.doc", Listening())
    with pytest.raises(UnsupportedError, match="does not write down"):
        transcribe_file(nano("clip"), noise, tmp_path / "a.txt", Listening())
    (tmp_path / "b.wav").write_bytes(b"RIFF" + bytes(100))
    with pytest.raises(MediaError, match=r"b\.wav"):
        transcribe_file(model, tmp_path / "b.wav", tmp_path / "b.txt", Listening())
    assert not (tmp_path / "b.txt").exists()
    with pytest.raises(DataError, match="gave nothing"):
        spooled(io.BytesIO())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "spool"))
    (tmp_path / "spool").mkdir()

    class Cut(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        spooled(Cut())
    assert not list((tmp_path / "spool").iterdir()), "a recording is not left behind"
    bare = nano("whisper")
    assert isinstance(bare, Whisper)
    with pytest.raises(UnsupportedError, match="generation_config"):
        bare.transcribe(noise)


# ---- the command


def test_formats_and_places(folder: Path, noise: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str, code: int = 0) -> tuple[str, str]:
        capsys.readouterr()
        assert main(["transcribe", *arguments, "--model", str(folder)]) == code
        return capsys.readouterr()

    text, _ = run(str(noise))
    assert run(str(noise), "--out", str(tmp_path / "a.txt"))[0] == f"{tmp_path / 'a.txt'}\n"
    assert plain((tmp_path / "a.txt").read_bytes().decode(), keep="\n") == text
    assert json.loads(run(str(noise), "--format", "json", "--words")[0])["segments"][0]["words"]
    run(str(noise), "--out", str(tmp_path / "a.vtt"))
    assert (tmp_path / "a.vtt").read_text().startswith("WEBVTT")
    other = tmp_path / "other.wav"
    other.write_bytes(noise.read_bytes())
    run(str(noise), str(other), "--format", "srt", "--out", str(tmp_path / "folder"))
    assert (tmp_path / "folder" / "noise.srt").read_text() == (tmp_path / "folder" / "other.srt").read_text()
    assert "--out FOLDER" in run(str(noise), str(other), "--format", "srt", code=1)[1]
    assert "both be written" in run(str(noise), str(noise), "--out", str(tmp_path / "folder"), code=1)[1]
    assert "--out" in run(str(noise), str(other), "--out", str(tmp_path / "a.srt"), code=1)[1]
    assert "notes.md" in run(str(noise), "--out", str(tmp_path / "notes.md"), code=1)[1]
    assert "--format vtt" in run(str(noise), "--out", str(tmp_path / "a.srt"), "--format", "vtt", code=1)[1]
    run(str(noise), "--out", str(tmp_path / "A.SRT"))
    assert (tmp_path / "A.SRT").read_text().startswith("1\n")
    said, error = run(str(noise), str(tmp_path / "nothing.wav"), code=1)
    assert "nothing.wav: there is no such file" in error
    assert not said, "told before anything is heard"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_what_is_said_goes_where_the_shell_sends_it(
    folder: Path, noise: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``transcribe a.wav > a.txt`` at a terminal: the bar is on the terminal, the words are in the file."""
    main(["transcribe", str(noise), "--model", str(folder)])
    text = capsys.readouterr().out
    screen, terminal = os.openpty()

    def look() -> bytes:
        out = b""
        with contextlib.suppress(OSError):  # the terminal is closed
            while piece := os.read(screen, 4096):
                out += piece
        return out

    with ThreadPoolExecutor(1) as pool:
        shown = pool.submit(look)
        with open(terminal, "w") as errors:
            monkeypatch.setattr(sys, "stderr", errors)
            assert main(["transcribe", str(noise), "--model", str(folder)]) == 0
            monkeypatch.undo()
    os.close(screen)
    assert b"noise.wav" in shown.result()
    assert capsys.readouterr().out == text


def test_letters_that_python_cannot_print_come_out_whole(
    folder: Path, noise: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """French blanks, the joiners of Persian; in JSON control characters, too, are what they were."""
    said = "Bonjour\u00a0! \u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \u6771\u4eac\u3000\u5927\u962a"

    def says(words: str) -> None:
        def heard(*_: Any, **__: Any) -> Iterator[Heard]:
            yield Heard(segments=(Segment(start=0.0, end=1.0, text=words),), until=1)

        monkeypatch.setattr(Whisper, "transcribe_stream", heard)

    says(said)
    assert main(["transcribe", str(noise), "--model", str(folder)]) == 0
    assert capsys.readouterr().out == said + "\n"
    says(said + "\x9b\u202e\x85")
    assert main(["transcribe", str(noise), "--model", str(folder), "--format", "json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out)["text"] == (said + "\x9b\u202e\x85").strip()
    assert not {"\x9b", "\u202e"} & set(out), "no terminal is told anything"


def test_a_pipe(folder: Path, noise: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    main(["transcribe", str(noise), "--model", str(folder)])
    text = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(noise.read_bytes())))
    assert main(["transcribe", "-", "--model", str(folder)]) == 0
    assert capsys.readouterr().out == text


@pytest.mark.slow
def test_killed_and_run_again(folder: Path, tmp_path: Path) -> None:
    """kill -9 in the middle; the same command then ends with the text of a run that was left alone."""
    generator = torch.Generator().manual_seed(1)
    write(tmp_path / "long.wav", torch.rand(1, 40 * 16000, generator=generator) - 0.5, 16000)

    def command(out: str) -> list[str]:
        where = [str(tmp_path / "long.wav"), "--model", str(folder), "--out", str(tmp_path / out)]
        return [sys.executable, "-m", "polymodal", "transcribe", *where]

    subprocess.run(command("whole.json"), check=True)
    killed = subprocess.Popen(command("cut.json"))
    part = tmp_path / ".cut.json.part"
    for _ in parts_of(part, killed):
        pass
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert len(json.loads(part.read_text())["heard"]) >= 2
    subprocess.run(command("cut.json"), check=True)
    assert (tmp_path / "cut.json").read_text() == (tmp_path / "whole.json").read_text()


def parts_of(part: Path, process: subprocess.Popen[Any]) -> Iterator[None]:
    """Until two windows are kept."""
    while process.poll() is None and (not part.is_file() or len(json.loads(part.read_text())["heard"]) < 2):
        time.sleep(0.05)
        yield
    assert process.poll() is None, "it was done before it could be killed"
