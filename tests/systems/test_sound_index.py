"""Sounds are indexed and found like pictures: by words and by sounds, with a picture of each."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import Float
from PIL import Image as PILImage
from torch import Tensor

from polymodal.cli import main
from polymodal.core.batch import Batch
from polymodal.core.errors import MediaError
from polymodal.core.sample import AUDIO_SUFFIXES, Audio, Image, Sample, samples
from polymodal.core.verbs import Embeds
from polymodal.modalities.audio import decode, write
from polymodal.modalities.waveform import waveform
from polymodal.retrieve import Index
from polymodal.retrieve.gallery import Shelf, page
from polymodal.retrieve.ingest import thumbnail_of
from tests.histogram import Histogram
from tests.nano import nano

pytest.importorskip("lancedb")
pytest.importorskip("soundfile")
RATE = 8_000
NOTES = {"low": 130.0, "middle": 520.0, "high": 2080.0}


class Pitch:
    """`Embeds` without weights: how much of a sound lies in each of 24 bands, and where a word says that it lies."""

    embedding_dim = 24
    fingerprint = "pitch"
    suffixes = AUDIO_SUFFIXES

    def prepare(self, items: Sequence[Sample]) -> Batch:
        return Batch(bands=torch.stack([self._bands(item) for item in items]))

    def _bands(self, item: Sample) -> Float[Tensor, " bands"]:
        wave = decode(item.audios[0], RATE)[0] if item.audios else tone(NOTES[item.texts[0].text], 0.2)[0]
        power = torch.fft.rfft(wave[: RATE // 5], RATE // 5).abs() ** 2
        place = (torch.arange(len(power)).clamp_min(1).log2() * 24 / math.log2(len(power))).long().clamp_max(23)
        return torch.zeros(24).scatter_add_(0, place, power)

    def encode(self, batch: Batch) -> Float[Tensor, "samples dim"]:
        return torch.nn.functional.normalize(batch["bands"], dim=1)

    def embed(
        self, items: Any, *, batch_size: int = 64, progress: Callable[[int], None] | None = None
    ) -> Float[Tensor, "samples dim"]:
        return self.encode(self.prepare(samples(items)))


def tone(pitch: float, seconds: float = 0.5) -> Tensor:
    return 0.4 * torch.sin(2 * math.pi * pitch * torch.arange(round(seconds * RATE)) / RATE)[None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "sounds"
    for name, pitch in NOTES.items():
        write(place / f"{name}.wav", tone(pitch), RATE)
        write(place / "more" / f"{name} too.flac", tone(pitch * 1.02), RATE)
    PILImage.new("RGB", (9, 9)).save(place / "picture.png")
    (place / "broken.mp3").write_bytes(b"nothing of the kind")
    return place


def test_sounds_are_found_by_words_and_by_sounds(tmp_path: Path, folder: Path) -> None:
    model = Pitch()
    assert isinstance(model, Embeds)
    index = Index.create(tmp_path / "index", model)
    report = index.update(model, [folder])
    assert (report.added, [Path(path).name for path, _ in report.failed]) == (6, ["broken.mp3"])
    assert "not sound" in report.failed[0][1]
    for name, pitch in NOTES.items():
        for query in (name, Audio(tone(pitch).numpy(), rate=RATE), folder / f"{name}.wav"):
            hits = index.search(query, model=model, top=2, group=False)
            assert {Path(hit.path).stem for hit in hits} == {name, f"{name} too"}
    assert index.update(model).unchanged == 6
    (folder / "low.wav").rename(folder / "lowest.wav")
    write(folder / "high.wav", tone(NOTES["low"]), RATE)
    report = index.update(model)
    assert (report.added, report.changed, report.moved, report.deleted) == (0, 1, 1, 0)
    (hit, *_) = index.search("low", model=model)
    assert sorted(Path(p).name for p in (hit.path, *hit.duplicates)) == ["high.wav", "low too.flac", "lowest.wav"]


def test_a_model_of_pictures_leaves_sounds_alone(tmp_path: Path, folder: Path) -> None:
    report = Index.create(tmp_path / "index", Histogram()).update(Histogram(), [folder])
    assert (report.added, report.failed) == (1, [])


def test_the_page_shows_a_drawn_sound(tmp_path: Path, folder: Path) -> None:
    model = Pitch()
    index = Index.create(tmp_path / "index", model)
    index.update(model, [folder])
    hits = index.search("high", model=model, top=3)
    shown = page("high", "sounds", [Shelf(query="high", hits=hits)], index.thumbnails([h.path for h in hits]))
    assert shown.count("data:image/jpeg;base64,") == len(hits)
    assert "&times;" not in shown
    assert all(hit.size == (0, 0) for hit in hits)


def test_a_drawn_sound_is_as_loud_as_the_sound() -> None:
    quiet, loud = 0.1 * torch.ones(1, RATE), torch.ones(1, RATE)
    drawn = np.asarray(waveform(Audio(torch.cat([quiet, loud], 1), rate=RATE), 100, 60))
    inked = (drawn[..., 0] < 128).sum(0)
    assert inked[:48].max() <= 8
    assert inked[52:].min() >= 54
    assert (np.asarray(waveform(Audio(torch.zeros(1, 3), rate=RATE), 40, 20))[..., 0] < 128).sum(0).max() <= 2


def test_thumbnails_of_files(tmp_path: Path, folder: Path) -> None:
    for name, size in (("low.wav", (160, 80)), ("picture.png", (9, 9))):
        with PILImage.open(io.BytesIO(thumbnail_of(folder / name))) as drawn:
            assert (drawn.format, drawn.size) == ("JPEG", size)
    with pytest.raises(MediaError):
        thumbnail_of(folder / "broken.mp3")
    with pytest.raises(MediaError):
        Histogram().prepare([Sample((Image(folder / "broken.mp3"),))])


def test_sounds_at_the_command_line(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, index = str(nano("clap").save(tmp_path / "model")), str(tmp_path / "index")
    assert main(["index", str(folder), "--model", model, "--index", index, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["added"], len(report["failed"])) == (6, 1)
    assert main(["embed", str(folder / "low.wav"), "--model", model, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    (hit,) = Index.open(index).nearest(row["vector"], top=1)
    assert Path(hit.path).name == "low.wav"
    assert hit.score == pytest.approx(1, abs=1e-5)
