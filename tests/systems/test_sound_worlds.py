"""The worlds that sound: the same twice, true in what they say, and nothing of a test is heard in training."""

from __future__ import annotations

import concurrent.futures
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest

from polymodal.core.errors import DataError
from polymodal.core.sample import Audio
from polymodal.data.worlds import events, instruments, sentences, soundbox, sources, speech
from polymodal.data.worlds.speech import Utterance, Voice
from polymodal.modalities import audio


def needs(*packages: str) -> pytest.MarkDecorator:
    absent = sources.missing(packages)
    return pytest.mark.skipif(bool(absent), reason=f"needs {sources.install_command(absent)}")


ESPEAK, FLITE = needs("espeak-ng"), needs("flite")
FLUID = needs("libfluidsynth3", "timgm6mb-soundfont")
US = Voice(synthesiser="espeak", name="gmw/en-US")

# ---- sentences ----


def words_of(text: str) -> set[str]:
    return {word.strip(",.?!").lower() for word in text.split()}


def test_sentences_and_words_of_tests_never_occur_in_training() -> None:
    hidden = sentences.held_out_words()
    texts = {split: [speech.utterance(split, i).text for i in range(100)] for split in speech.SPLITS}
    assert not any(words_of(text) & hidden for split in set(texts) - {"words"} for text in texts[split])
    assert all(words_of(text) & hidden for text in texts["words"])
    assert not any(sentences.held_out(text) for text in texts["train"])
    assert all(sentences.held_out(text) for split in ("sentences", "voices", "noisy", "flite") for text in texts[split])
    assert 0.05 < len(hidden) / len({*sentences.NOUNS, *sentences.ADJECTIVES}) < 0.2
    assert len(set(texts["train"])) > 97


def test_voices_of_tests_never_speak_in_training() -> None:
    assert not set(speech.VARIANTS) & set(speech.HELD_OUT_VARIANTS)
    variants = {
        split: {speech.utterance(split, i).voice.name.partition("+")[2] for i in range(120)} for split in speech.SPLITS
    }
    assert variants["train"] <= set(speech.VARIANTS)
    assert variants["voices"] | variants["words"] | variants["noisy"] == set(speech.HELD_OUT_VARIANTS)
    assert {u.voice.synthesiser for u in islice(speech.utterances("flite"), 50)} == {"flite"}


def test_utterances_are_counted() -> None:
    assert [*islice(speech.utterances("train", start=3), 2)] == [speech.utterance("train", n) for n in (3, 4)]
    assert speech.utterance("train", 3, seed=1) != speech.utterance("train", 3)
    with pytest.raises(DataError, match="Did you mean 'voices'"):
        speech.utterance("voice", 0)


def test_vocabulary_has_no_word_twice() -> None:
    for of in (sentences.NOUNS, sentences.ADJECTIVES, sentences.VERBS, sentences.PATHS, sentences.NAMES):
        assert len(set(of)) == len(of)
    assert {len(verb) for verb in (*sentences.VERBS, *sentences.PATHS)} == {3}


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "zero"), (13, "thirteen"), (40, "forty"), (999, "nine hundred ninety nine"), (70_001, "seventy thousand one")],
)
def test_numbers(n: int, text: str) -> None:
    assert sentences.number(n) == text


def test_plurals() -> None:
    assert [sentences.plural(n) for n in ("city", "box", "boy", "mouse", "dish")] == [
        "cities",
        "boxes",
        "boys",
        "mice",
        "dishes",
    ]


# ---- speech ----


@ESPEAK
def test_speech_is_the_same_after_other_speech_and_in_threads() -> None:
    wanted = [speech.utterance("train", i) for i in range(6)]
    first = [speech.render(one)[0] for one in wanted]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for one, wave in zip(reversed(wanted), pool.map(lambda u: speech.render(u)[0], reversed(wanted)), strict=True):
            np.testing.assert_array_equal(wave, first[wanted.index(one)])


@ESPEAK
def test_words_have_times_where_they_sound() -> None:
    text = "The red bird, isn't it, sleeps at the end of the twenty-three old bridges."
    wave, words = speech.render(Utterance(text=text, voice=US))
    assert wave.dtype == np.float32
    assert [word.text for word in words] == text.split()
    for word, following in pairwise(words):
        assert word.start < word.end <= following.start + 1e-9
    assert "".join(words[2].phonemes) == "bɜːd"  # noqa: RUF001
    assert words[3].start - words[2].end > 0.1, "a comma is a pause"
    level = [np.abs(wave[int(w.start * 16_000) : int(w.end * 16_000)]).mean() for w in words]
    pause = np.abs(wave[int(words[2].end * 16_000) + 400 : int(words[3].start * 16_000)]).mean()
    assert min(level) > 5 * pause


@ESPEAK
def test_every_voice_speaks() -> None:
    for variant in (*speech.VARIANTS[::9], *speech.HELD_OUT_VARIANTS[::4]):
        wave, words = speech.render(
            Utterance(text="Hello.", voice=Voice(synthesiser="espeak", name=f"gmw/en+{variant}"))
        )
        assert 0.1 < words[0].end <= len(wave) / 16_000
        assert 0.01 < np.sqrt(np.mean(wave**2)) < 0.5


@FLITE
def test_flite_speaks_with_times() -> None:
    for name in soundbox.FLITE_VOICES[::3]:
        voice = Voice(synthesiser="flite", name=name)
        wave, words = speech.render(Utterance(text="Don't wait, it's 23.", voice=voice))
        assert [word.text for word in words] == ["Don't", "wait,", "it's", "23."]
        assert all(0 <= a.end <= b.start + 1e-6 for a, b in pairwise(words))
        assert words[-1].end <= len(wave) / 16_000
    again, _ = speech.render(Utterance(text="Don't wait, it's 23.", voice=voice))
    np.testing.assert_array_equal(again, wave)


@ESPEAK
def test_noise_is_as_loud_as_it_says() -> None:
    clean, words = speech.render(Utterance(text="A quiet morning.", voice=US))
    for noise in speech.NOISES:
        noisy, same = speech.render(Utterance(text="A quiet morning.", voice=US, snr=10.0, noise=noise, seed=3))
        assert same == words
        ratio = 10 * np.log10(np.mean(clean**2) / np.mean((noisy - clean) ** 2))
        assert ratio == pytest.approx(10, abs=0.1)


def test_a_room_keeps_time_length_and_power() -> None:
    rng = np.random.default_rng(0)
    clap = np.zeros(8_000, np.float32)
    clap[1_000] = 1.0
    heard = speech.in_room(clap, 0.3, rng)
    assert heard.shape == clap.shape
    assert np.argmax(np.abs(heard)) == 1_000
    assert not np.abs(heard[:999]).max() > 1e-6
    assert np.sum(heard**2) == pytest.approx(1, rel=1e-3)
    early, late = (np.sum(heard[1_100 + at : 2_100 + at] ** 2) for at in (0, 3_000))
    assert early > 30 * late > 0


@ESPEAK
def test_what_cannot_be_said() -> None:
    with pytest.raises(DataError, match="no such voice"):
        speech.render(Utterance(text="Hello.", voice=Voice(synthesiser="espeak", name="martian")))
    with pytest.raises(DataError, match="says nothing"):
        speech.render(Utterance(text="", voice=US))
    with pytest.raises(DataError, match="no noise"):
        speech.render(Utterance(text="Hello.", voice=US, snr=3.0, noise="green"))
    assert len(speech.render(Utterance(text="Hello.", voice=US))[0]), "the process lives on"


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ('input(); print(\'{"error": "missing"}\', flush=True)', "Run: apt-get install .* espeak-ng$"),
        ("input(); raise SystemExit", "its process has ended"),
    ],
)
def test_an_absent_library_names_its_package(
    program: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "box.py").write_text(program)
    monkeypatch.setattr(soundbox, "__file__", str(tmp_path / "box.py"))
    with pytest.raises(DataError, match=message):
        soundbox.Soundbox().sound({"synthesiser": "espeak", "voice": "gmw/en", "text": "Hello."})


# ---- instruments ----


def pitch_of(wave: np.ndarray, rate: int = 16_000) -> float:
    """The fundamental by autocorrelation, as a MIDI number."""
    wave = wave - wave.mean()
    size = 2 * len(wave)
    together = np.fft.irfft(np.abs(np.fft.rfft(wave, size)) ** 2)[: len(wave)]
    low, high = rate // 1_000, rate // 50
    return 69 + 12 * np.log2(rate / (low + np.argmax(together[low:high])) / 440)


@FLUID
def test_a_note_sounds_at_its_pitch_and_time() -> None:
    for instrument in ("clarinet", "violin", "trombone"):
        rng = np.random.default_rng(1)
        piece = instruments.compose(instrument, "A", rng, kind="note")
        wave = instruments.render(piece)
        assert len(wave) == pytest.approx(piece.seconds * 16_000, abs=64)
        off = pitch_of(wave[2_000:8_000]) - piece.notes[0].pitch
        assert min(abs(off), abs(off + 12), abs(off - 12)) < 0.6, "or an octave away: the method's weakness"


@FLUID
def test_pieces_are_the_same_after_others_and_at_other_rates() -> None:
    of = [*islice(instruments.pieces("train"), 4)]
    first = [instruments.render(piece) for piece in of]
    for piece, wave in [*zip(of, first, strict=True)][::-1]:
        np.testing.assert_array_equal(instruments.render(piece), wave)
    assert len(instruments.render(of[0], 32_000)) == pytest.approx(2 * len(first[0]), abs=128)
    assert all(0.005 < np.abs(wave).max() <= 1 for wave in first)


def test_pairs_of_instrument_and_key_are_held_out() -> None:
    pairs = {
        split: {(p.instrument, p.key) for p in islice(instruments.pieces(split), 600)} for split in ("train", "keys")
    }
    assert not pairs["train"] & instruments.HELD_OUT
    assert pairs["keys"] <= instruments.HELD_OUT
    assert {name for name, _ in pairs["train"]} == set(instruments.INSTRUMENTS)
    assert {p.font for p in islice(instruments.pieces("recording"), 9)} == {"fluidr3"}
    with pytest.raises(DataError, match="Known"):
        instruments.piece("x", 0)


def test_captions_of_pieces_are_true() -> None:
    rng = np.random.default_rng(0)
    for piece in islice(instruments.pieces("train"), 300):
        text = instruments.caption(piece, rng)
        assert piece.instrument in text
        assert piece.kind in text
        assert "fast" not in text.split() or piece.tempo > instruments.FAST
        assert "slow" not in text.split() or piece.tempo < instruments.SLOW
        assert " in " not in text or f"in {piece.key} {piece.mode}" in text
        _, low, high = instruments.INSTRUMENTS[piece.instrument]
        degrees = {(note.pitch - instruments.KEYS.index(piece.key)) % 12 for note in piece.notes}
        assert degrees <= set(instruments.MODES[piece.mode])
        assert all(low <= note.pitch <= high and note.end > note.start for note in piece.notes)


@needs("libfluidsynth3", "fluid-soundfont-gm")
def test_the_other_font_is_another_recording_of_the_same_notes() -> None:
    piece = instruments.piece("recording", 2)
    theirs = instruments.render(piece)
    assert len(theirs) == pytest.approx(piece.seconds * 16_000, abs=64)
    assert np.abs(theirs).max() > 0.005


def test_an_absent_font_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(instruments.FONTS, "fluidr3", ("none.sf2", "fluid-soundfont-gm"))
    with pytest.raises(DataError, match=r"apt-get install .* fluid-soundfont-gm"):
        instruments.render(instruments.piece("recording", 0))


# ---- events ----


def test_each_event_sounds_and_is_like_no_other() -> None:
    spectra = {}
    for label in events.SOUNDS:
        waves = [
            events.sound(events.Event(label=label, start=1.0, end=3.0, gain=-10.0, seed=seed)) for seed in range(2)
        ]
        assert not np.array_equal(*waves)
        for wave in waves:
            assert np.isfinite(wave).all()
            assert 20 * np.log10(np.sqrt(np.mean(wave**2)) / 0.7) == pytest.approx(-10, abs=0.1)
        size = np.abs(np.fft.rfft(waves[0])) ** 2
        spectra[label] = [float(part.sum() / size.sum()) for part in np.array_split(size, 64)]
    rows = np.array(list(spectra.values())) ** 0.5
    alike = rows @ rows.T - np.eye(len(rows))
    assert alike.max() < 0.99


def test_scenes_say_what_sounds_when() -> None:
    for scene in islice(events.scenes("train"), 20):
        wave = events.render(scene)
        np.testing.assert_array_equal(wave, events.render(scene))
        assert len(wave) == round(scene.seconds * events.RATE)
        first = scene.events[0]
        inside = np.mean(wave[int(first.start * events.RATE) : int(first.end * events.RATE)] ** 2)
        before = np.mean(wave[: int(first.start * events.RATE)] ** 2) if first.start > 0.01 else 0.0
        assert inside > 10 * before
        assert events.describe(scene).startswith(events.SOUNDS[first.label][0])
        assert all(0 <= event.start < event.end <= scene.seconds + 1e-9 for event in scene.events)


def test_pairs_of_events_are_held_out() -> None:
    def pairs(scene: events.Scene) -> set[tuple[str, str]]:
        labels = sorted(event.label for event in scene.events)
        return {(a, b) for i, a in enumerate(labels) for b in labels[i + 1 :]}

    assert not any(pairs(scene) & events.HELD_OUT for scene in islice(events.scenes("train"), 500))
    assert all(pairs(scene) & events.HELD_OUT for scene in islice(events.scenes("pairs"), 100))
    with pytest.raises(DataError, match="events"):
        events.scene("pears", 0)


@needs("sound-theme-freedesktop")
def test_sounds_of_the_desktop_are_read() -> None:
    for path in sources.files("sound-theme-freedesktop", ".oga"):
        wave = audio.decode(Audio(path), 16_000)
        assert wave.abs().max() <= 1
        assert wave.shape[1] > 1_000
