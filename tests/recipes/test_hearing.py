"""Recipes of CLAP, wav2vec 2.0 and Whisper: what they hear and are asked, tiny runs, and (slow) those that count."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, islice
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from polymodal.core.batch import Batch
from polymodal.data.worlds import events, instruments, sources, speech
from polymodal.train import Result, Run, fit
from recipes.nano import clap, wav2vec2, whisper


def needs(*packages: str) -> pytest.MarkDecorator:
    absent = sources.missing(packages)
    return pytest.mark.skipif(bool(absent), reason=f"needs {sources.install_command(absent)}")


FLUID = needs("libfluidsynth3", "timgm6mb-soundfont", "fluid-soundfont-gm")
SPEECH = needs("espeak-ng")

# ---- CLAP ----


def test_questions_are_in_words_that_no_caption_has() -> None:
    rng = np.random.default_rng(0)
    scenes, pieces = islice(events.scenes("train"), 300), islice(instruments.pieces("train"), 300)
    captions = [*(clap.of_scene(one, rng) for one in scenes), *(clap.of_piece(one, rng) for one in pieces)]
    words = {word.strip(",:") for caption in captions for word in caption.split()}
    assert words.isdisjoint({"one", "can", "before", "play"})
    assert all(clap.tokenizer().count(text) <= clap.CONTEXT for text in captions)
    scene, piece = events.scene("pairs", 0), instruments.piece("keys", 0)
    assert {"one", "can", "before"} <= {*clap.told(scene).split()}
    assert {"one", "can", "play"} <= {*clap.played(piece).split()}


def test_training_holds_no_pair_and_no_recording_of_the_questions() -> None:
    scenes = [*islice(events.scenes("train"), 300)]
    heard = {pair for one in scenes for pair in combinations(sorted(event.label for event in one.events), 2)}
    asked = [*islice(events.scenes("train", seed=1), 300)]
    assert heard.isdisjoint(events.HELD_OUT)
    assert {one.seed for one in scenes}.isdisjoint(one.seed for one in asked)
    for scene in islice(events.scenes("pairs", seed=1), 100):
        assert events.HELD_OUT & {*combinations(sorted(event.label for event in scene.events), 2)}
    pieces = [*islice(instruments.pieces("train"), 300)]
    assert {(one.instrument, one.key) for one in pieces}.isdisjoint(instruments.HELD_OUT)
    assert {one.font for one in pieces} == {"timgm6mb"}
    assert {one.font for one in islice(instruments.pieces("recording", seed=1), 9)} == {"fluidr3"}


@FLUID
def test_a_pair_is_a_sound_and_its_caption() -> None:
    source, rng = clap.Captioned(pool=4), np.random.default_rng(0)
    mel, caption = source.piece(1, rng)
    assert instruments.piece("train", 1).instrument in caption
    assert mel.shape == (clap.SOUNDS.num_frames, clap.SOUNDS.num_mels)
    change = source.piece(1, rng)[0] - mel  # another microphone: a line over the bands, the same at all times
    torch.testing.assert_close(change, change[:1].expand_as(change), atol=1e-3, rtol=0)
    torch.testing.assert_close(change[0].diff(n=2), torch.zeros(len(change[0]) - 2), atol=1e-3, rtol=0)
    caption = source.scene(1, rng)[1]
    begins = [caption.index(events.SOUNDS[event.label][0]) for event in events.scene("train", 1).events]
    assert begins == sorted(begins)
    assert source.batch([1, 3], rng)["mel"].shape == (2, 1, *mel.shape)


@FLUID
def test_clap_trains_and_a_few_steps_reach_no_bar_of_names(tmp_path: Path) -> None:
    result = fit(clap.run(steps=2, batch_size=4, asked=12), tmp_path, device="cpu")
    assert result.finished
    assert set(result.reached) <= set(result.metrics)
    assert not any(passed for name, passed in result.reached.items() if name.endswith("/named"))


# ---- wav2vec 2.0 ----


def test_sentences_are_spelled_in_the_vocabulary() -> None:
    for index in range(200):
        text = wav2vec2.letters(speech.utterance("train", index).text)
        ids = wav2vec2.LETTERS.encode(text)
        assert min(ids) > wav2vec2.LETTERS.ids["<unk>"]
        assert wav2vec2.LETTERS.decode(ids) == text.lower()


def test_codes_are_drawn_ever_more_surely() -> None:
    learner = wav2vec2.Learner(30)
    drawn = []
    for step in range(1, 31):
        learner.after_step(step, 30)
        drawn.append(learner.listener.head.gumbel)
    assert drawn == sorted(drawn, reverse=True)
    assert drawn[0] > 1.8
    assert drawn[18] > drawn[20] == pytest.approx(0.5)


def test_both_networks_learn_to_write_and_one_of_them_listens() -> None:
    torch.manual_seed(0)
    learner = wav2vec2.Learner(10).train()
    wave = torch.randn(2, wav2vec2.TOWER.samples(60))
    lengths = torch.tensor([wave.shape[1], wave.shape[1] // 2])
    learner.loss(Batch(wave=wave, lengths=lengths)).total.backward()
    moved = {name for name, parameter in learner.named_parameters() if parameter.grad is not None}
    assert moved == {name for name, _ in learner.named_parameters() if name.startswith("listener.")}
    learner.zero_grad()
    labels = torch.tensor([[5, 6, 7], [8, 9, -100]])
    learner.loss(Batch(wave=wave, lengths=lengths, labels=labels)).total.backward()
    still = {name for name, parameter in learner.named_parameters() if parameter.grad is None}
    assert {name.split(".")[1] for name in still if name.startswith("listener.")} == {"head"}
    assert not any(name.startswith("bare.") for name in still)
    assert learner.taught.audio is learner.listener.audio
    assert learner.taught.audio is not learner.bare.audio


@SPEECH
def test_wav2vec2_listens_writes_and_a_few_steps_reach_no_bar(tmp_path: Path) -> None:
    result = fit(wav2vec2.run(listen=2, write=2, batch_size=2, pool=8, asked=2), tmp_path, device="cpu")
    assert result.finished
    assert set(result.reached) <= set(result.metrics)
    assert not any(passed for name, passed in result.reached.items() if name != "gain")
    assert {f"bare/{name}" for name in result.reached if name != "gain"} <= set(result.metrics)


# ---- Whisper ----


@SPEECH
def test_whisper_spells_what_is_said_and_nothing_in_silence() -> None:
    rng = np.random.default_rng(0)
    assert whisper.letters(" Dog's -- 12!").tolist() == [1 + whisper.LETTERS.index(c) for c in "dog's  "]
    batch = whisper.Spoken(40, spell=True).batch(range(3), rng)
    said = ["".join(whisper.LETTERS[i - 1] for i in row[row >= 1]) for row in batch["letters"]]
    texts = {"".join(c for c in speech.utterance("train", i).text.lower() if c in whisper.LETTERS) for i in range(40)}
    assert set(said) <= texts
    assert (batch["steps"] * 2 <= batch["features"].shape[-1] + 1).all()
    rows = [whisper.Spoken(40)._single(0, np.random.default_rng(seed))[1] for seed in range(60)]
    assert 0 < sum(not row for row in rows) < 20


@SPEECH
def test_whisper_spells_then_listens_and_a_few_steps_reach_no_bar(tmp_path: Path) -> None:
    result = fit(whisper.run((2, 2, 1), batch_size=2, pool=12, asked=1), tmp_path, device="cpu")
    assert result.finished
    assert set(result.reached) <= set(result.metrics)
    assert not any(result.reached[name] for name in ("voices", "flite", "noisy"))


# ---- whole runs ----


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(clap, id="clap", marks=[FLUID, pytest.mark.proves("clap", "recipe nano/clap: its numbers")]),
        pytest.param(
            wav2vec2,
            id="wav2vec2",
            marks=[SPEECH, pytest.mark.proves("wav2vec2", "recipe nano/wav2vec2: its numbers")],
        ),
        pytest.param(
            whisper, id="whisper", marks=[SPEECH, pytest.mark.proves("whisper", "recipe nano/whisper: its numbers")]
        ),
    ],
)
def test_a_whole_run_reaches_its_numbers(recipe: ModuleType, whole_run: Callable[[Run], Result]) -> None:
    whole_run(recipe.run())
