"""Recipes of what makes sound: a codec whose entries are in use, MusicGen and VALL-E on it, and who judges them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

import polymodal
from polymodal.core.batch import IGNORE
from polymodal.core.errors import ConfigError
from polymodal.data.worlds import instruments, sources, speech
from polymodal.systems.codec import Adversarial
from polymodal.systems.encodec import EnCodec
from polymodal.systems.valle import VALLE
from polymodal.tokenizers.phonemes import PAUSE, Alphabet
from polymodal.tokenizers.rvq import usage
from polymodal.train import Result, Run, fit
from polymodal.weights.hub import shipped
from recipes.nano import coded, encodec, musicgen, valle, wav2vec2
from recipes.nano.judges import Comparer, Namer, statistics


def needs(*packages: str) -> pytest.MarkDecorator:
    absent = sources.missing(packages)
    return pytest.mark.skipif(bool(absent), reason=f"needs {sources.install_command(absent)}")


NOTES = needs("libfluidsynth3", "timgm6mb-soundfont")
SPEECH = needs("espeak-ng")
BOTH = needs("libfluidsynth3", "timgm6mb-soundfont", "fluid-soundfont-gm", "espeak-ng")


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a codec of random weights."""
    torch.manual_seed(0)
    made = encodec.model().codec
    assert isinstance(made, EnCodec)
    return str(made.save(tmp_path_factory.mktemp("codec") / "model"))


@pytest.fixture(scope="module")
def listener(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a listener of random weights."""
    torch.manual_seed(0)
    return str(wav2vec2.writer().save(tmp_path_factory.mktemp("listener") / "model"))


# ---- the codec


@BOTH
@pytest.mark.proves("encodec", "recipe nano/encodec: entries are in use from the first steps on")
def test_entries_are_in_use_while_vectors_move() -> None:
    torch.manual_seed(0)
    learner = encodec.model()
    learner.discriminators.requires_grad_(False)
    (stage, _), rng = encodec.run().stages, np.random.default_rng(0)
    codec, half = learner.codec.train(), encodec.LEARNED["notes"]
    assert isinstance(codec, EnCodec)
    adam = torch.optim.AdamW(codec.parameters(), lr=stage.lr, betas=stage.betas)
    batch = encodec.Cuts().batch([*range(6), *range(half, half + 6)], rng)
    first = codec.latents(batch["wave"]).detach()
    assert first.std(2).mean() > 0.05, "what is heard moves them, and not biases alone"
    for _ in range(4):
        adam.zero_grad()
        learner.loss(batch).mean.backward()
        adam.step()
    used = usage(codec.quantize(batch["wave"]), codec.codebook_size)
    assert used[:4].min() > 0.4, used  # 0.68 here, and 0.02 with torch's own weights


@BOTH
def test_what_the_codec_is_judged_on_is_never_learned() -> None:
    fonts = {instruments.piece(encodec.HELD_OUT["notes"], i).font for i in range(20)}
    assert fonts.isdisjoint(instruments.piece("train", i).font for i in range(20))
    heard = [speech.utterance("train", i) for i in range(encodec.LEARNED["speech"])]
    asked = [speech.utterance(encodec.HELD_OUT["speech"], i) for i in range(encodec.JUDGED)]
    assert {one.text for one in heard}.isdisjoint(one.text for one in asked)
    assert {_variant(one.voice) for one in heard}.isdisjoint(_variant(one.voice) for one in asked)
    assert len(encodec.Cuts()) == sum(encodec.LEARNED.values())


@BOTH
@pytest.mark.filterwarnings("default")
def test_the_codec_trains_and_a_few_steps_reach_no_bar(tmp_path: Path) -> None:
    run = encodec.run(steps=1, joined=1, rows=2, asked=3)
    result = fit(run, tmp_path, device="cpu")
    assert result.finished
    assert set(result.reached) <= set(result.metrics)
    assert not any(result.reached.values())
    kinds = {name.removeprefix("speech/") for name in result.metrics if name.startswith("speech/")}
    assert set(result.metrics) == kinds | {f"speech/{name}" for name in kinds} | {"use/both"}
    assert isinstance(result.model, Adversarial)
    folder = result.model.codec.save(tmp_path / "model", dtype=torch.float16)
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 4 << 20


def _variant(voice: speech.Voice) -> str:
    return voice.name.split("+")[1]


# ---- what builds on it


@pytest.mark.parametrize("recipe", [musicgen, valle])
def test_without_a_codec_it_says_how_to_make_one(recipe: object, listener: str) -> None:
    made = {"listener": listener} if recipe is valle else {}
    with pytest.raises(ConfigError, match=r"polymodal train recipes/nano/encodec.py, which leaves runs/nano-encodec"):
        recipe.run(name="polymodal/no-codec", **made).model()  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="no codec"):
        recipe.run(name=listener, **made).model()  # type: ignore[attr-defined]


def test_without_a_listener_nothing_begins(codec: str) -> None:
    with pytest.raises(ConfigError, match=r"polymodal train recipes/nano/whisper.py"):
        valle.run(name=codec, listener="polymodal/no-listener").model()
    with pytest.raises(ConfigError, match="writes down no speech"):
        valle.run(name=codec, listener=codec).model()


def test_codes_are_the_same_alone_and_beside_others(codec: str) -> None:
    base, rng = coded.codec(codec), np.random.default_rng(0)
    waves = [rng.uniform(-0.5, 0.5, n).astype(np.float32) for n in (4000, 6400, 3200)]
    together = coded.coded(base, waves, 4)
    assert [row.shape for row in together] == [(4, 12), (4, 20), (4, 10)]
    for wave, row in zip(waves, together, strict=True):
        assert torch.equal(coded.coded(base, [wave], 4)[0], row)


def test_a_lower_bit_rate_has_the_first_books(codec: str) -> None:
    base, made = coded.codec(codec), musicgen.model(codec)
    wave = torch.randn(1, 1, 3200) * 0.1
    codes = made.quantize(wave)
    assert codes.shape == (1, 4, 10)
    assert torch.equal(codes, base.quantize(wave, 4))
    torch.testing.assert_close(made.reconstruct(codes), base.reconstruct(codes))


# ---- MusicGen


@NOTES
def test_a_clip_is_described_and_coded(codec: str) -> None:
    source, rng = musicgen.described(codec, 4), np.random.default_rng(0)
    assert source.codes.shape == (4, 4, 100)
    batch = source.batch([2, 0], rng)
    torch.testing.assert_close(batch["codes"], source.codes[[2, 0]].long())
    for i, ids, valid in zip((2, 0), batch["ids"], batch["valid"], strict=True):
        said = musicgen.tokenizer().decode(ids[valid].tolist())
        assert instruments.piece("train", i).instrument in said
    words = {word for i in range(200) for word in instruments.caption(instruments.piece("train", i), rng).split()}
    assert all(len(musicgen.tokenizer().encode(f" {word}", special=True)) == 1 for word in words)


@NOTES
def test_music_is_asked_for_that_was_never_learned() -> None:
    learned = [instruments.piece("train", i) for i in range(300)]
    asked = [instruments.piece("keys", i) for i in range(musicgen.ASKED)]
    assert {(one.instrument, one.key) for one in learned}.isdisjoint((one.instrument, one.key) for one in asked)
    assert learned != [instruments.piece("train", i, seed=1) for i in range(300)], "the judge knows other pieces"


@NOTES
def test_musicgen_trains_and_a_few_steps_reach_no_bar(codec: str, tmp_path: Path) -> None:
    run = musicgen.run(steps=2, name=codec, pieces=4, batch_size=2, asked=4, known=1)
    result = fit(run, tmp_path, device="cpu")
    assert result.finished
    assert set(result.metrics) == {"recorded", "coded", "instrument", "instrument/least", "instrument/other"}
    assert not any(result.reached.values())
    assert not _moved(result.model, codec, "codec.")


# ---- VALL-E


@SPEECH
def test_a_pair_is_one_voice_and_two_sentences() -> None:
    for first, second in islice(valle.pairs("train"), 5):
        assert first.voice == second.voice
        assert first.text != second.text
        assert max(len(first.text), len(second.text)) <= valle.LETTERS
        assert valle.spelled(first, second).count(PAUSE) >= 2
    first, _ = next(valle.pairs("train"))
    wave = first.wave()
    loud = np.abs(wave) > 0.02 * np.abs(wave).max()
    assert loud[: speech.RATE // 5].any()
    assert loud[-speech.RATE // 5 :].any()


@SPEECH
def test_nothing_that_valle_is_asked_to_say_was_learned() -> None:
    said = {split: {one for pair in islice(valle.pairs(split), 60) for one in pair} for split in ("train", *_ASKED)}
    judged = {one for pair in islice(valle.pairs("train", seed=1), 60) for one in pair}
    for split in _ASKED:
        assert {one.text for one in said["train"]}.isdisjoint(one.text for one in said[split])
    assert {_variant(one.voice) for one in said["train"]}.isdisjoint(_variant(one.voice) for one in said["voices"])
    assert judged.isdisjoint(one for each in said.values() for one in each)


_ASKED = ("sentences", "voices")


@SPEECH
def test_lessons_are_pairs_of_about_one_length(codec: str) -> None:
    source = valle.spoken(codec, 4)
    lengths = [row.shape[1] for row in source.codes]
    assert lengths == sorted(lengths)
    batch = source.batch([0, 1, 2], np.random.default_rng(0))
    assert batch["codes"].shape[:2] == (3, 8)
    frames = (batch["codes"][:, 0] != IGNORE).sum(1)
    assert frames.tolist() in (lengths[:3], lengths[1:])
    alphabet = Alphabet(valle.ENGLISH)
    said = {tuple(alphabet(valle.spelled(*pair))) for pair in islice(valle.pairs("train"), 4)}
    assert {tuple(ids[valid].tolist()) for ids, valid in zip(batch["ids"], batch["valid"], strict=True)} <= said


@SPEECH
def test_valle_trains_and_a_few_steps_reach_no_words(codec: str, listener: str, tmp_path: Path) -> None:
    run = valle.run(steps=2, name=codec, listener=listener, number=4, batch_size=2, asked=2, known=4)
    result = fit(run, tmp_path, device="cpu")
    assert result.finished
    assert isinstance(result.model, VALLE)
    alike = {"like", "like/least", "like/most", "nearest"}
    words = {"words", "words/real", "words/coded", "words/other", "like/real"}
    assert set(result.metrics) == words | alike | {f"voices/{name}" for name in alike | {"words"}}
    assert not result.reached["words"]
    assert not _moved(result.model, codec, "codec.")


def _moved(model: nn.Module, folder: str, prefix: str) -> set[str]:
    learned = coded.codec(folder).codec.state_dict()
    parts = {name.removeprefix(prefix): t for name, t in model.state_dict().items() if name.startswith(prefix)}
    return {name for name, tensor in parts.items() if not torch.equal(tensor, learned[name])}


# ---- who judges


def test_the_judges_tell_kinds_apart_and_not_by_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(5, 30, generator=generator)
    kinds = torch.arange(5).repeat(40)
    nuisance = torch.randn(2, 30, generator=generator) * 8  # what differs most says nothing

    def sounds(centres: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(200, 30, generator=generator) * 0.3
        return centres + noise + torch.randn(200, 2, generator=generator) @ nuisance

    known, asked = sounds(centres[kinds]), sounds(centres[kinds])
    namer = Namer.fit(known, kinds)
    assert (namer.names(asked) == kinds).float().mean() > 0.8
    assert (namer.names(sounds(torch.zeros(200, 30))) == kinds).float().mean() < 0.4
    alike = Comparer.fit(known, kinds).alike(asked[:5], asked[5:10])
    assert alike.argmax(1).tolist() == [0, 1, 2, 3, 4]


@SPEECH
def test_real_voices_are_more_like_themselves() -> None:
    """Voices that the judge never heard: their second sentences, beside their first ones and those of others."""
    judge, said = valle.judge(40), [*islice(valle.pairs("voices"), 12)]
    found = valle.likeness(judge, [second.wave() for _, second in said], said)
    assert found["like/least"] > 0.2
    assert found["nearest"] > 0.4  # chance: 0.08
    assert statistics(torch.zeros(320)).isfinite().all()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.proves("encodec", "recipe nano/encodec: use of entries, and its distance beside opus at the same bit rate")
def test_a_whole_run_of_the_codec_reaches_its_numbers(whole_run: Callable[[Run], Result]) -> None:
    whole_run(encodec.run())


@BOTH
@pytest.mark.slow
def test_the_shipped_codec_has_the_figures_of_its_card() -> None:
    found = encodec.evaluate(polymodal.load("polymodal/nano-encodec"))
    assert found["use"] >= 0.8
    assert found["distance"] < 0.7  # opus at the same rate: 0.47


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.skipif("polymodal/nano-encodec" not in shipped(), reason="needs the shipped codec")
@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(musicgen, marks=pytest.mark.proves("musicgen", "recipe nano/musicgen: the instrument is heard")),
        pytest.param(valle, marks=pytest.mark.proves("valle", "recipe nano/valle: words and voice are heard")),
    ],
)
def test_a_whole_run_reaches_its_numbers(recipe: ModuleType, whole_run: Callable[[Run], Result]) -> None:
    whole_run(recipe.run())
