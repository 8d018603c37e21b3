"""Spoken English whose words and times are known: espeak-ng speaks, in voices, rooms and noise; flite speaks for tests.

Training never hears the held-out variants, the held-out sentences, the held-out words or flite. Sentence ``i`` of a
split is the same on every machine with the same espeak-ng: `utterance` counts, nothing is kept on disk.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from jaxtyping import Float32

from polymodal.core.errors import DataError, MissingDependency, did_you_mean
from polymodal.data.worlds import soundbox
from polymodal.data.worlds.sentences import Sentences, listed
from polymodal.data.worlds.splits import generator

RATE: Final = 16_000
ACCENTS: Final = (
    "gmw/en-US", "gmw/en", "gmw/en-GB-x-rp", "gmw/en-GB-scotland", "gmw/en-GB-x-gbclan", "gmw/en-GB-x-gbcwmd",
    "gmw/en-029",
)  # fmt: skip
# Variants of espeak-ng that training never hears, with all of their kin: Steph, Steph2 and Steph3 are one voice.
HELD_OUT_VARIANTS: Final = listed(
    """
    Andy AnxiousAndy Gene Gene2 Lee Michael antonio belinda boris edward edward2 f2 linda m3 max michel quincy steph
    steph2 steph3 zac
    """
)
VARIANTS: Final = listed(
    """
    Alex Alicia Andrea Annie Demonic Denis Diogo Henrique Hugo Jacky Marco Mario Mike Nguyen RicishayMax RicishayMax2
    RicishayMax3 Storm Tweaky UniRobot adam anika anikaRobot announcer aunty benjamin caleb croak david ed f1 f3 f4 f5
    fast grandma grandpa gustave iven iven2 iven3 iven4 john kaukovalta klatt klatt2 klatt3 klatt4 klatt5 klatt6 m1 m2
    m4 m5 m6 m7 m8 marcelo miguel norbert pablo paul pedro rob robert robosoft robosoft2 robosoft3 robosoft4 robosoft5
    robosoft6 robosoft7 robosoft8 sandro shelby travis victor whisper whisperf
    """
)
NOISES: Final = ("white", "pink", "brown", "hum", "crowd")

Synthesiser = Literal["espeak", "flite"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Voice:
    """Who speaks. ``name`` is what the synthesiser calls it: ``gmw/en-US+f2`` for espeak-ng, ``slt`` for flite.

    ``rate`` is in words a minute (80 to 450), ``pitch`` and ``range`` (how lively the melody is) run from 0 to 100.
    """

    synthesiser: Synthesiser
    name: str
    rate: int = 175
    pitch: int = 50
    range: int = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class Utterance:
    """What is said, by whom, and where. ``snr`` is in dB (None: no noise), ``echo`` in seconds (RT60; 0: no room)."""

    text: str
    voice: Voice
    snr: float | None = None
    noise: str = "white"
    echo: float = 0.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Word:
    """One word as it stands in the text, with its punctuation, from ``start`` to ``end`` in seconds.

    ``phonemes`` are in the alphabet of the IPA. Where a synthesiser runs words together ("of the"), their time is
    shared by their letters and the first holds all phonemes; flite names none.
    """

    text: str
    start: float
    end: float
    phonemes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Which utterances: words and sentences of training or not, whose voices, how much noise."""

    about: str
    voices: Literal["training", "held out", "flite"]
    unseen: bool = True
    new_words: bool = False
    snr: float | None = None


SPLITS: Final = {
    "train": Split(about="half clean, half with noise or a room", voices="training", unseen=False),
    "sentences": Split(about="unseen sentences, known voices", voices="training"),
    "voices": Split(about="unseen sentences, unseen variants of espeak-ng", voices="held out"),
    "words": Split(about="each sentence holds an unseen word; unseen variants", voices="held out", new_words=True),
    "noisy": Split(about="unseen sentences and variants at 10 dB", voices="held out", snr=10.0),
    "flite": Split(about="unseen sentences, another synthesiser", voices="flite"),
}

# ---- what is said ----


def utterance(split: str, index: int, *, seed: int = 0) -> Utterance:
    """The utterance number ``index`` of a split; another ``seed`` is another series.

    Raises:
        DataError: there is no such split.
    """
    rng = generator("speech", SPLITS, split, index, seed)
    of = SPLITS[split]
    text = _SENTENCES[of.new_words, of.unseen].draw(rng)
    voice = _voice(of, rng)
    noise, own = NOISES[rng.integers(len(NOISES))], int(rng.integers(2**31))
    if split != "train":
        return Utterance(text=text, voice=voice, snr=of.snr, noise=noise, seed=own)
    snr = float(rng.uniform(5, 35)) if rng.random() < 0.35 else None
    echo = float(rng.uniform(0.1, 0.6)) if rng.random() < 0.25 else 0.0
    return Utterance(text=text, voice=voice, snr=snr, noise=noise, echo=echo, seed=own)


def utterances(split: str, *, seed: int = 0, start: int = 0) -> Iterator[Utterance]:
    """`utterance` for ``start``, ``start`` + 1, ... without end."""
    return (utterance(split, index, seed=seed) for index in itertools.count(start))


_SENTENCES: Final = {
    (new, unseen): Sentences(new_words=new, unseen=unseen)
    for new, unseen in itertools.product((False, True), (False, True))
}


def _voice(of: Split, rng: np.random.Generator) -> Voice:
    if of.voices == "flite":
        return Voice(synthesiser="flite", name=soundbox.FLITE_VOICES[rng.integers(len(soundbox.FLITE_VOICES))])
    variants = VARIANTS if of.voices == "training" else HELD_OUT_VARIANTS
    accent = ACCENTS[0] if rng.random() < 0.5 else ACCENTS[rng.integers(len(ACCENTS))]
    return Voice(
        synthesiser="espeak",
        name=f"{accent}+{variants[rng.integers(len(variants))]}",
        rate=int(rng.integers(130, 211)),
        pitch=int(rng.integers(25, 76)),
        range=int(rng.integers(30, 81)),
    )


# ---- how it sounds ----


def render(utterance: Utterance) -> tuple[Float32[np.ndarray, " samples"], list[Word]]:
    """The waveform at 16 kHz, in [-1, 1], and its words in their order.

    Raises:
        DataError: the synthesiser is not installed (the message is the command), or has no such voice.
        MissingDependency: soxr is not installed.
    """
    try:
        import soxr
    except ImportError:
        raise MissingDependency("synthesised speech", "soxr", "audio") from None
    voice = utterance.voice
    order = {"synthesiser": voice.synthesiser, "voice": voice.name, "text": utterance.text}
    answer, raw = soundbox.here().sound({**order, "rate": voice.rate, "pitch": voice.pitch, "range": voice.range})
    wave = np.frombuffer(raw, np.int16).astype(np.float32) / 32768
    listen = _espeak_words if voice.synthesiser == "espeak" else _flite_words
    words = listen(utterance.text, answer["marks"], answer["rate"])
    if not words:
        raise DataError(f"{voice.synthesiser} says nothing for {utterance.text!r}")
    if answer["rate"] != RATE:
        wave = soxr.resample(wave, answer["rate"], RATE)
    rng = np.random.default_rng(utterance.seed)
    if utterance.echo:
        wave = in_room(wave, utterance.echo, rng)
    if utterance.snr is not None:
        wave = with_noise(wave, utterance.snr, utterance.noise, rng)
    return (wave / max(1.0, float(np.abs(wave).max()))).astype(np.float32), words


def _espeak_words(text: str, marks: list[Any], rate: int) -> list[Word]:
    """Words by what espeak-ng reports: where each begins, its phonemes, and nameless phonemes for pauses."""
    spans = [match.span() for match in re.finditer(r"\S+", text)]
    begins: dict[int, float] = {}
    phonemes: dict[int, list[str]] = {}
    pauses: list[float] = []
    current = None
    for kind, character, sample, phoneme in marks:
        if kind == "word":
            current = next((i for i, (start, end) in enumerate(spans) if start <= character < end), None)
            if current is not None and current not in begins:
                begins[current], phonemes[current] = sample / rate, []
        elif not phoneme:
            pauses.append(sample / rate)
        elif current is not None:
            phonemes[current].append(phoneme)
    known = sorted(begins)
    if not known:
        return []
    words = []
    # Words from one that is reported up to the next share the time between.
    for at, (first, following) in enumerate(zip(known, [*known[1:], len(spans)], strict=True)):
        first_of_all = 0 if at == 0 else first
        start = begins[first]
        end = begins[following] if following < len(spans) else pauses[-1] if pauses else start
        end = min([end, *(pause for pause in pauses if pause > start)])
        group = [text[slice(*span)] for span in spans[first_of_all:following]]
        cuts = start + (end - start) * np.cumsum([0, *map(len, group)]) / sum(map(len, group))
        for i, word in enumerate(group):
            sounds = tuple(phonemes[first]) if i == 0 else ()
            words.append(Word(text=word, start=float(cuts[i]), end=float(cuts[i + 1]), phonemes=sounds))
    return words


def _flite_words(text: str, marks: list[Any], rate: int) -> list[Word]:
    return [
        Word(text=word, start=start / rate, end=end / rate)
        for word, (_, start, end) in zip(text.split(), marks, strict=True)
    ]


def noise(kind: str, samples: int, rng: np.random.Generator) -> Float32[np.ndarray, "{samples}"]:
    """Noise of mean power 1: ``white``, ``pink``, ``brown``, ``hum`` of the mains, or a ``crowd`` far away.

    Raises:
        DataError: there is no such noise.
    """
    if kind not in NOISES:
        raise DataError(f"no noise {kind!r}{did_you_mean(kind, NOISES)}")
    frequency = np.fft.rfftfreq(samples, 1 / RATE)
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    time = np.arange(samples) / RATE
    if kind == "crowd":  # the long-term spectrum of speech, in syllables
        spectrum *= 1 / (1 + (frequency / 500) ** 2) * (frequency > 80)
    else:
        spectrum *= np.maximum(frequency, 20.0) ** -{"white": 0.0, "pink": 0.5, "brown": 1.0, "hum": 0.5}[kind]
    wave = np.fft.irfft(spectrum, samples)
    if kind == "crowd":
        wave *= sum(1.2 + np.sin(2 * np.pi * (f * time + rng.random())) for f in rng.uniform(2, 6, 3))
    if kind == "hum":
        mains = rng.choice([50.0, 60.0])
        tones = sum(np.sin(2 * np.pi * (k * mains * time + rng.random())) / k for k in range(1, 8))
        wave = 0.3 * wave / (np.std(wave) + 1e-9) + tones
    return (wave / (np.sqrt(np.mean(wave**2)) + 1e-9)).astype(np.float32)


def with_noise(
    wave: Float32[np.ndarray, " samples"], snr: float, kind: str, rng: np.random.Generator
) -> Float32[np.ndarray, " samples"]:
    """``wave`` with noise ``snr`` dB below its mean power."""
    power = float(np.mean(wave.astype(np.float64) ** 2))
    return wave + np.float32(np.sqrt(power / 10 ** (snr / 10))) * noise(kind, len(wave), rng)


def in_room(
    wave: Float32[np.ndarray, " samples"], seconds: float, rng: np.random.Generator
) -> Float32[np.ndarray, " samples"]:
    """``wave`` in a room that takes ``seconds`` to fall by 60 dB: direct sound, a few walls, and a decaying tail.

    The direct sound keeps its time and the length stays; the power is that of ``wave``.
    """
    length = int(seconds * RATE)
    time = np.arange(length) / RATE
    response = rng.standard_normal(length) * 10 ** (-3 * time / seconds)
    response[: int(0.004 * RATE)] = 0
    response *= np.sqrt(10 ** (-rng.uniform(0, 12) / 10) / np.sum(response**2))  # direct to reverberant: 0 to 12 dB
    for delay in rng.uniform(0.002, 0.03, 4):
        response[min(int(delay * RATE), length - 1)] += rng.uniform(-0.4, 0.4)
    response[0] = 1.0
    size = 2 ** int(np.ceil(np.log2(len(wave) + length)))
    heard = np.fft.irfft(np.fft.rfft(wave, size) * np.fft.rfft(response, size), size)[: len(wave)]
    power = np.sqrt(np.mean(wave.astype(np.float64) ** 2) / (np.mean(heard**2) + 1e-12))
    return (heard * power).astype(np.float32)
