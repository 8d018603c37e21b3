"""Sound out: blocks while codes are still being chosen, and the commands music and speak."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from polymodal.cli import main
from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError, MediaError, UnsupportedError
from polymodal.core.sample import Audio
from polymodal.core.sounding import Sounding, Voice
from polymodal.core.verbs import Sounds
from polymodal.encoders.seanet import SEANetConfig
from polymodal.modalities.audio import decode
from polymodal.modalities.watermark import detect_watermark
from polymodal.samplers.delayed import whole
from polymodal.systems.musicgen import MusicGen
from polymodal.systems.seanet_codec import EnCodecConfig
from polymodal.tokenizers.language import LanguageTokenizer
from tests.nano import NANO

WORDS = LanguageTokenizer.of_words(["slow", "loud", "piano", "drums"])
RATE, HOP = 8000, 160


def music(channels: int = 1, *, causal: bool = False) -> MusicGen:
    """Of random weights, with books of random entries: it makes noise, but by all rules."""
    torch.manual_seed(0)
    seanet = SEANetConfig(dim=8, filters=4, ratios=(8, 5, 4), causal=causal, shortcut=False, num_lstm_layers=1)
    codec = EnCodecConfig(sample_rate=RATE, bandwidths=(1.0,), codebook_size=32, seanet=seanet)
    text = replace(NANO["musicgen"].text, vocab_size=WORDS.vocab_size)
    config = replace(NANO["musicgen"], text=text, codec=codec, channels=channels, num_codebooks=4 * channels)
    model = MusicGen.build(config).eval()
    with torch.no_grad():
        for book in model.codec.quantizer.books:
            book.entries.normal_()
    model.tokenizer = WORDS
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(music().save(tmp_path_factory.mktemp("model")))


@pytest.mark.proves("musicgen", "sound: blocks are what decoding at the end gives, the first while codes are chosen")
@pytest.mark.parametrize(("channels", "causal"), [(1, False), (2, False), (1, True)])
def test_blocks_are_the_whole(channels: int, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sounding = music(channels, causal=causal), Sounding(seconds=2.0, seed=1)
    assert isinstance(model, Sounds)
    steps: list[int] = []
    given: list[Tensor] = []
    model.backbone.register_forward_hook(lambda *_: steps.append(1))
    whole_sound = model.reconstruct
    monkeypatch.setattr(model, "reconstruct", lambda codes: given.append(codes) or whole_sound(codes))
    blocks, when = [], []
    for block in model.sound("slow piano", sounding):
        blocks.append(block)
        when.append(len(steps))
    expected = whole_sound(given[-1])[0]
    made = torch.cat(blocks, 1)
    assert made.shape == expected.shape == (channels, round(2.0 * RATE / HOP) * HOP)
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=0)
    assert len(blocks) >= 2
    assert when[0] < 0.65 * when[-1], "the first block comes long before the last code"


@pytest.mark.proves("musicgen", "sound: the same seed alone and in a batch, another one is another piece")
def test_seeds() -> None:
    model = music()
    asked = model.prompt(["slow piano", "loud drums", "slow piano"])
    way = model.drawing(Sounding(seconds=0.5, seed=3))
    rows = whole(model, asked, way)
    assert torch.equal(rows[0], rows[2])
    assert torch.equal(rows[1], whole(model, asked.take([1]), way)[0])
    other = whole(model, asked.take([0]), model.drawing(Sounding(seconds=0.5, seed=4)))[0]
    assert not torch.equal(rows[0], other)
    assert way.guidance == 3
    assert way.top_k == 250


@pytest.mark.proves("musicgen", "training: descriptions are dropped with probability 0.3, and frozen parts stay")
def test_descriptions_are_dropped_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    model = music().train()
    assert not model.codec.training
    assert not any(p.requires_grad for part in (model.text, model.codec) for p in part.parameters())
    seen: list[Any] = []
    source = model.condition
    monkeypatch.setattr(model, "condition", lambda given: seen.append(given.get("dropped")) or source(given))
    wave = 0.1 * torch.randn(2, 1, 800)
    batch = model.lesson(["slow piano", "loud drums"], wave).take([0, 1] * 100)
    books = [book.entries.clone() for book in model.codec.quantizer.books]
    model.loss(batch)
    assert 0.22 < float(seen[0].float().mean()) < 0.38
    assert all(torch.equal(a, b.entries) for a, b in zip(books, model.codec.quantizer.books, strict=True))
    model.eval()
    bare = source(Batch(model.prompt(["slow piano"]), dropped=torch.tensor([True])))
    assert all(not k.any() and not v.any() for k, v in bare.layers), "what is dropped adds nothing"
    with torch.no_grad():
        swapped = Batch(batch.take([1, 0]), codes=batch["codes"][:2])
        assert not torch.allclose(model(batch.take([0, 1])), model(swapped), atol=1e-4), "words matter"


def test_what_cannot_be_made_is_refused() -> None:
    model = music()
    with pytest.raises(MediaError, match=r"makes at most 40\.9"):
        model.sound("slow piano", Sounding(seconds=41.0))
    with pytest.raises(MediaError, match="no description"):
        model.sound("  ", Sounding())
    with pytest.raises(UnsupportedError, match="nobody's voice"):
        model.sound("slow piano", Sounding(), voice=Voice(Audio("me.wav"), "hello"))
    model.tokenizer = None
    with pytest.raises(UnsupportedError, match=r"tokenizer\.json"):
        model.sound("slow piano", Sounding())
    with pytest.raises(ConfigError, match="more than 0 seconds"):
        Sounding(seconds=0.0)


# ---- the commands


def test_music_writes_a_file_with_a_watermark(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    waves = []
    for name in ("a.wav", "b.wav"):
        out = tmp_path / name
        arguments = ["music", "slow piano", "--model", folder, "--seconds", "2", "--seed", "5", "--guidance", "2"]
        assert main([*arguments, "--out", str(out)]) == 0
        assert f"{out}: 2.00 s" in capsys.readouterr().out
        waves.append(decode(Audio(out), RATE))
    assert waves[0].shape == (1, 2 * RATE)
    assert torch.equal(*waves)
    assert detect_watermark(waves[0], RATE).marked
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.wav", "b.wav"]


def test_sound_comes_out_of_a_pipe_before_it_is_all_made(folder: str) -> None:
    command = [sys.executable, "-m", "polymodal", "music", "slow piano", "--model", folder, "--seconds", "2"]
    done = subprocess.run([*command, "--out", "-", "--seed", "1"], capture_output=True, check=True)
    assert done.stdout.startswith(b"RIFF")
    assert len(done.stdout) == 44 + 2 * 2 * RATE
    import soundfile

    samples, rate = soundfile.read(io.BytesIO(done.stdout), dtype="float32")
    assert (rate, len(samples)) == (RATE, 2 * RATE)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["music", "slow piano", "--seconds", "99"], "at most 40.9"),
        (["music", " "], "no description"),
        (["music", "slow piano", "--temperature", "-1"], "temperature must be"),
        (["speak", "hello", "--voice", "me.wav"], "consent"),
    ],
)
def test_errors_are_one_message(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], problem: str
) -> None:
    out = tmp_path / "x.wav"
    assert main([*arguments, "--model", folder, "--out", str(out)]) == 1
    assert problem in capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "nothing is left of what failed"
