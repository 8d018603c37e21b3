"""Asking about sound, from Python and from the command line: real files, a real model at nano size."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polymodal.asking import answers, ask, stream
from polymodal.cli import main
from polymodal.core.chat import Chat
from polymodal.core.errors import MediaError, UnsupportedError
from polymodal.core.sample import Audio
from polymodal.modalities.audio import write
from polymodal.nn.feature_cache import FeatureCache
from polymodal.samplers.autoregressive import Settings
from polymodal.systems.qwen2_audio import Qwen2Audio
from polymodal.tokenizers.language import LanguageTokenizer
from tests.nano import NANO
from tests.talking import WORDS, talking

MARK = "<|audio|>"


def hearing() -> Qwen2Audio:
    """Weights that say something else of everything."""
    words = LanguageTokenizer.train_bpe(WORDS * 20, 320, special=(MARK,))
    torch.manual_seed(0)
    config = NANO["qwen2_audio"]
    backbone = replace(config.backbone, vocab_size=words.vocab_size, context=400)
    model = Qwen2Audio.build(replace(config, backbone=backbone, audio_id=words.backend.token_to_id(MARK)))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)
    model.use_tokenizer(words)
    model.eval()
    return model


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two short ones and one that is longer than a window of this model."""
    place, rng = tmp_path_factory.mktemp("sounds"), np.random.default_rng(0)
    for number, (seconds, rate) in enumerate(((0.7, 16_000), (0.33, 8_000), (1.5, 16_000))):
        wave = torch.from_numpy(0.2 * rng.standard_normal((1, int(seconds * rate))).astype(np.float32))
        write(place / f"{number}.wav", wave, rate)
    return sorted(place.iterdir())


@pytest.mark.proves("qwen2_audio", "generation: answers about sound are the same alone, together and in pieces")
def test_answers(sounds: list[Path]) -> None:
    model, settings = hearing(), Settings(max_new_tokens=8)
    first, second = (Audio(path) for path in sounds[:2])
    questions: list[Any] = [[first, "what is it?"], [second, first, "how many?"], "yes or no?"]
    together = answers(model, questions, settings)
    assert together == [ask(model, question, settings) for question in questions]
    assert together[0] == "".join(step.text for step in stream(model, questions[0], settings))
    scores = [model.prefill(model.prompt([Chat.of(q)]), model.new_memory(1, 300)) for q in questions]
    other = model.prefill(model.prompt([Chat.of([second, "what is it?"])]), model.new_memory(1, 300))
    assert not torch.allclose(scores[0], other), "another sound is answered differently"
    model.feature_cache = FeatureCache(2**20)
    assert [ask(model, questions[0], settings) for _ in range(2)] == [together[0]] * 2
    assert (model.feature_cache.hits, model.feature_cache.misses) == (1, 1)


def test_lessons_learn_answers_only(sounds: list[Path]) -> None:
    model = hearing()
    batch = model.lesson([Chat.of([Audio(sounds[0]), "what is it?"]).reply("a ring")])
    learned = batch["labels"][batch["labels"] >= 0]
    assert model.tokenizer is not None
    assert model.tokenizer.decode(learned.tolist()) == "a ring"
    model.loss(batch).mean.backward()
    assert all(p.grad is not None for p in (model.connector.weight, model.audio.conv1.weight))


def test_what_cannot_be_heard_is_refused(sounds: list[Path]) -> None:
    model = hearing()
    with pytest.raises(MediaError, match=r"2\.wav: this model hears 1 s at a time"):
        ask(model, [Audio(sounds[2]), "what is it?"])
    assert ask(model, [Audio(sounds[2], end=0.9), "what is it?"], Settings(max_new_tokens=2)) is not None
    with pytest.raises((MediaError, UnsupportedError), match=r"no place for the kind image|reads no pictures"):
        ask(model, [np.zeros((8, 8, 3), np.uint8), "what is it?"])
    with pytest.raises(MediaError, match=r"audio|hears no sound"):
        ask(talking("llava"), [Audio(sounds[0]), "what is it?"])


def test_the_commands(sounds: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = hearing()
    folder = model.save(tmp_path / "model")
    asked = [str(sounds[0]), "what is it?", "--model", str(folder), "--max-tokens", "6"]
    assert main(["listen", *asked, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["files"] == [str(sounds[0])]
    for command in ("ask", "listen"):
        assert main([command, *asked]) == 0
        assert capsys.readouterr().out.rstrip("\n") == row["answer"].rstrip("\n")
    assert main(["listen", str(sounds[2]), "what is it?", "--model", str(folder)]) == 1
    assert "cut it, or choose a piece" in capsys.readouterr().err
