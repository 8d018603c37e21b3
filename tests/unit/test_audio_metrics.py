"""Scores of speech and sound: against Whisper's own normaliser, by their definitions, and on bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from polymodal.core.errors import DataError
from polymodal.data.worlds import sentences, speech
from polymodal.evaluate.audio_metrics import (
    character_error_rate,
    log_spectral_distance,
    mel_distance,
    si_sdr,
    word_error_rate,
)
from polymodal.evaluate.spoken_text import basic, english

PHRASES = """
it is two hundred dollars|It's $200.|twenty $20 million|one oh one|twenty twenty-one|nineteen eighty four
two hundred and five birds|one hundred twenty three thousand four hundred five|the twenty first of May|fifty percent
ten per cent, per cent|two point five million|minus five degrees|Mr. Smith won't go|he's gone; she's been there
double seven three|a hundred|three hundred and the dog|one|the ones|nineteen hundred|the fifties|five and a half
[noise] hello (laughs) um I'm|café naïve|5,000 men|10% off|two dollars and seven cents|A1 steak and 3rd man
first second third|hundreds of people|one two three four|ten ten|twenty o five|zero|oh my|two thousand nineteen
thirty three hundred|seven million two hundred thousand and six|$5.50|2.5 million|twenty-third|sixes and sevens
1980s|they've 'cause y'all can't|<b>bold</b> mm-hm, "quoted" — dash
"""
PHRASES = [phrase for line in PHRASES.strip().splitlines() for phrase in line.split("|")]


def test_english_is_normalised_as_whisper_does() -> None:
    oracle = pytest.importorskip("transformers.models.whisper.english_normalizer").EnglishTextNormalizer({})
    rng = np.random.default_rng(0)
    texts = PHRASES + [f"there are {sentences.number(int(n))} birds" for n in 10 ** rng.uniform(0, 5.99, 200)]
    texts += [speech.utterance("words", i).text for i in range(150)]
    assert {text: english(text) for text in texts} == {text: oracle(text) for text in texts}


def test_other_languages_are_normalised_as_whisper_does_but_for_vowel_signs() -> None:
    oracle = pytest.importorskip("transformers.models.whisper.english_normalizer").BasicTextNormalizer()
    for text in ("Où est-ce, l'été?", "¿Qué tal? [música]", "Straße - ÜBER (ha) <x>", "«Привет», мир!", "50 % 我们。"):
        assert basic(text) == oracle(text).strip()
    assert basic("हिन्दी") == "हिन्दी"


@pytest.mark.parametrize("normalise", [english, basic])
def test_normalising_twice_changes_nothing(normalise: type[str]) -> None:
    for i in range(100):
        once = normalise(speech.utterance("train", i).text)
        assert normalise(once) == once


def test_british_and_american_spelling_are_one() -> None:
    assert english("My favourite colour is grey") == english("my favorite color is gray")


def test_error_rates_are_of_the_corpus() -> None:
    texts, references = ["a b c d e f g h", "x"], ["a b c d e f g h", "y"]
    assert word_error_rate(texts, references).value == 1 / 9, "not the mean of 0 and 1"
    assert word_error_rate(["the the cat"], ["the dog sat"]).edits == (2,)
    assert word_error_rate([""], ["three words here"]).value == 1
    assert word_error_rate(["a b c d"], ["e"]).value == 4, "added words count: a rate may be above 1"
    assert character_error_rate(["cat sat"], ["cat sit"]).value == 1 / 7
    assert word_error_rate(["It's $200."], ["it is two hundred dollars"]).value == 0
    assert word_error_rate(["It's $200."], ["it is two hundred dollars"], normalise=str.lower).value == 1


def test_words_are_counted_as_the_plain_definition_does() -> None:
    def slow(a: list[str], b: list[str]) -> int:
        row = list(range(len(b) + 1))
        for i, word in enumerate(a, 1):
            before, row[0] = row[0], i
            for j, other in enumerate(b, 1):
                before, row[j] = row[j], min(before + (word != other), row[j] + 1, row[j - 1] + 1)
        return row[-1]

    rng = np.random.default_rng(0)
    for _ in range(100):
        a, b = ([str(w) for w in rng.integers(0, 300, rng.integers(1, 12))] for _ in range(2))
        assert word_error_rate([" ".join(a)], [" ".join(b)], normalise=str).edits == (slow(a, b),)


def test_the_interval_holds_the_rate_and_narrows() -> None:
    rng = np.random.default_rng(0)

    def rate(n: int) -> tuple[float, float, float]:
        texts = [" ".join("x" if rng.random() < 0.2 else "a" for _ in range(rng.integers(3, 12))) for _ in range(n)]
        found = word_error_rate(texts, [" ".join("a" for _ in text.split()) for text in texts]).estimate()
        return found.low, found.value, found.high

    few, many = rate(20), rate(200)
    assert few[0] <= few[1] <= few[2]
    assert many[2] - many[0] < few[2] - few[0]
    assert many[0] <= 0.2 <= many[2]


@pytest.mark.parametrize(("texts", "references"), [([], []), (["a"], []), (["a"], [""]), (["a"], ["..."])])
def test_bad_corpora(texts: list[str], references: list[str]) -> None:
    with pytest.raises(DataError):
        word_error_rate(texts, references)


# ---- waveforms ----


def wave(seed: int = 0, samples: int = 8000) -> torch.Tensor:
    noise = torch.randn(1, samples, generator=torch.Generator().manual_seed(seed))
    return 0.1 * torch.nn.functional.avg_pool1d(noise, 5, 1, 2) + 0.1 * torch.sin(torch.arange(samples) * 0.2)


def test_distances_are_nothing_for_equals_and_grow_with_noise() -> None:
    sound = wave()
    for distance in (lambda a, b: mel_distance(a, b, 16_000), log_spectral_distance, lambda a, b: -si_sdr(a, b)):
        found = [distance(sound + level * wave(1), sound) for level in (0.0, 0.01, 0.1, 1.0)]
        assert found == sorted(found)
        assert found[0] < found[1]
    assert mel_distance(sound, sound, 16_000) == log_spectral_distance(sound, sound) == 0
    assert mel_distance(sound, sound + wave(1), 16_000) == pytest.approx(mel_distance(sound + wave(1), sound, 16_000))


def test_si_sdr_knows_no_loudness_and_tells_the_ratio() -> None:
    sound = wave() - wave().mean()
    other = torch.randn_like(sound)
    other -= other.mean() + (other * sound).sum() / sound.square().sum() * sound  # at right angles
    noisy = sound + other * sound.norm() / other.norm() * 0.1
    assert si_sdr(noisy, sound) == pytest.approx(20, abs=0.05)
    assert si_sdr(7 * noisy + 3, sound) == pytest.approx(si_sdr(noisy, sound), abs=1e-3)
    assert si_sdr(sound, sound) == pytest.approx(200)


def test_the_log_spectral_distance_of_twice_as_loud_is_that_of_four_times_the_power() -> None:
    sound = torch.randn(2, 8192)
    assert log_spectral_distance(2 * sound, sound) == pytest.approx(math.log10(4), abs=1e-3)


def test_bad_waveforms() -> None:
    with pytest.raises(DataError, match="cut them"):
        si_sdr(wave(), wave()[:, 1:])
    with pytest.raises(DataError, match="2048 at least"):
        mel_distance(wave(samples=100), wave(samples=100), 16_000)
    with pytest.raises(DataError, match="silent"):
        si_sdr(wave(), torch.zeros_like(wave()))
