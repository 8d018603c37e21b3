"""A voice is copied only where its owner says so in the very recording, and what is made can be found again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from polymodal import voice
from polymodal.cli import main
from polymodal.core.errors import ConsentError, UnsupportedError
from polymodal.core.transcript import Heard, Listening, Segment
from polymodal.modalities import audio
from polymodal.modalities.watermark import embed_watermark
from polymodal.systems.base import System

RATE = 16_000


class Deaf(System):
    """A model that hears nothing at all."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)


class Ear(Deaf):
    """Hears what it is told to."""

    sample_rate = RATE

    def __init__(self, *said: str) -> None:
        super().__init__()
        self.said = said

    def transcribe_stream(
        self, blocks: Iterable[Tensor], listening: Listening, *, after: Heard | None = None
    ) -> Iterator[Heard]:
        until = sum(len(block) for block in blocks)
        for text in self.said:
            yield Heard(segments=(Segment(start=0.0, end=1.0, text=f" {text}"),), until=until)


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    path = tmp_path / "me.wav"
    audio.write(path, 0.1 * torch.randn(1, RATE, generator=torch.Generator().manual_seed(0)), RATE)
    return path


def test_who_says_the_phrase_is_on_record(recording: Path) -> None:
    ear = Ear("My name is Ada Lovelace.", "I agree that the computer learns to speak with my voice")
    made = voice.record_consent(recording, " Ada  Lovelace", ear)
    assert voice.consent_of(recording) == made
    assert made.who == "Ada Lovelace"
    assert made.when.endswith("+00:00")
    given = voice.consenting_voice(recording)
    assert given.text == voice.phrase("Ada Lovelace")
    assert given.sound.source == recording


@pytest.mark.parametrize(
    "said",
    [
        "",
        "Good morning, how are you?",
        "My name is Ada Lovelace. I do not agree at all, and you may never use it for anything else.",
        "My name is Ada Lovelace. I agree that a computer learns to speak with my voice. " * 2,
        "My name is Ada Lovelace. I do not agree that a computer learns to speak with my voice.",
        "My name is Ada Lovelace. I don't think I agree that a computer learns to speak with my voice.",
        "My name is Ada Lovelace. I disagree that a computer learns to speak with my voice.",
        "My name is Ada Lovelace. I agree that a computer never learns to speak with my voice.",
    ],
)
def test_who_says_something_else_is_not(recording: Path, said: str) -> None:
    with pytest.raises(ConsentError, match="No consent is recorded"):
        voice.record_consent(recording, "Ada Lovelace", Ear(said))
    assert not voice.record_path(recording).exists()


def test_a_name_that_is_none_and_a_model_that_hears_nothing(recording: Path) -> None:
    for name in ("", "  ", "42", "A\x1b[31m"):
        with pytest.raises(ConsentError, match="no name"):
            voice.phrase(name)
    talk = "whatever somebody else once said in public, long enough to be nearly all of the phrase, " * 3
    for name in (talk, "x" * 10_000):
        with pytest.raises(ConsentError, match="at most 6 words"):
            voice.record_consent(recording, name, Ear(talk))
    with pytest.raises(UnsupportedError, match="does not write down speech"):
        voice.record_consent(recording, "Ada", Deaf())


def test_records_that_do_not_hold(recording: Path) -> None:
    command = "polymodal consent .*me.wav --who"
    with pytest.raises(ConsentError, match=f"no record .*{command}"):
        voice.consent_of(recording)
    voice.record_consent(recording, "Ada", Ear(voice.phrase("Ada")))
    path = voice.record_path(recording)
    good = json.loads(path.read_text())
    for bad, problem in (
        ({**good, "phrase": "Anything goes."}, "does not agree"),
        ({**good, "heard": "Good morning."}, "does not agree"),
        ({**good, "who": 3}, "not a record"),
        ({"who": "Ada"}, "not a record"),
        ([], "not a record"),
        ({**good, "sound": "0" * 64}, "another recording"),
    ):
        path.write_text(json.dumps(bad))
        with pytest.raises(ConsentError, match=f"{problem}.*{command}"):
            voice.consent_of(recording)
    path.write_text(json.dumps(good))
    audio.write(recording, torch.zeros(1, RATE), RATE)
    with pytest.raises(ConsentError, match="another recording"):
        voice.consenting_voice(recording)


def test_commands(recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["speak", "hello", "--model", "none", "--voice", str(recording), "--out", "x.wav"]) == 1
    assert "polymodal consent" in capsys.readouterr().err
    assert main(["consent", str(tmp_path / "new.wav"), "--who", "Ada"]) == 1
    assert voice.phrase("Ada") in capsys.readouterr().err

    wave = 0.001 * torch.randn(1, 4 * RATE).cumsum(1)  # brown: most of it below the mark, as speech has
    audio.write(tmp_path / "made.flac", embed_watermark(wave, RATE), RATE)
    assert main(["detect-watermark", str(tmp_path / "made.flac"), str(recording)]) == 0
    made, own = capsys.readouterr().out.splitlines()
    assert "made.flac: watermark of Polymodal" in made
    assert "me.wav: no watermark found" in own
    assert main(["detect-watermark", str(tmp_path / "made.flac"), "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert told["marked"]
    assert told["false_alarm"] < 1e-4
    (tmp_path / "broken.wav").write_bytes(b"RIFF no sound")
    assert main(["detect-watermark", str(tmp_path / "broken.wav"), str(tmp_path / "made.flac")]) == 1
    said = capsys.readouterr()
    assert "broken.wav" in said.err
    assert "made.flac: watermark of Polymodal" in said.out  # one that cannot be read hides no other
    assert main(["detect-watermark", str(tmp_path / "none.wav")]) == 1
