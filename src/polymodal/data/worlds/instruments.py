"""Notes, chords, scales and short melodies by fluidsynth, of which everything is known: instrument, notes, tempo.

Training hears the sound font TimGM6mb; FluidR3 holds other recordings of the same instruments and is for tests alone,
and so are some pairs of instrument and key. Piece ``i`` of a split is the same wherever the same fonts are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from jaxtyping import Float32

from polymodal.core.errors import DataError
from polymodal.data.worlds import soundbox
from polymodal.data.worlds.asked import chance
from polymodal.data.worlds.sources import install_command
from polymodal.data.worlds.splits import generator

# The number of each instrument in General MIDI, its lowest and its highest note.
INSTRUMENTS: Final = {
    "piano": (0, 33, 96), "harpsichord": (6, 36, 84), "celesta": (8, 60, 96), "music box": (10, 60, 96),
    "vibraphone": (11, 53, 84), "marimba": (12, 45, 84), "xylophone": (13, 65, 96), "bells": (14, 60, 77),
    "organ": (19, 36, 84), "accordion": (21, 53, 84), "harmonica": (22, 60, 84), "guitar": (24, 40, 76),
    "electric guitar": (27, 40, 76), "distorted guitar": (30, 40, 72), "bass guitar": (33, 28, 52),
    "violin": (40, 55, 91), "cello": (42, 36, 67), "harp": (46, 36, 89), "strings": (48, 40, 84), "choir": (52, 48, 79),
    "trumpet": (56, 55, 80), "trombone": (57, 40, 67), "tuba": (58, 28, 53), "horn": (60, 41, 72),
    "saxophone": (65, 49, 76), "oboe": (68, 58, 86), "bassoon": (70, 34, 67), "clarinet": (71, 50, 84),
    "piccolo": (72, 74, 98), "flute": (73, 60, 91), "pan flute": (75, 60, 86), "ocarina": (79, 60, 84),
    "synthesizer": (80, 40, 84), "sitar": (104, 48, 77), "banjo": (105, 48, 79), "koto": (107, 48, 79),
    "kalimba": (108, 55, 84), "bagpipe": (109, 48, 72), "fiddle": (110, 55, 88), "steel drum": (114, 52, 79),
}  # fmt: skip
KINDS: Final = ("note", "chord", "scale", "melody")
KEYS: Final = ("C", "C sharp", "D", "E flat", "E", "F", "F sharp", "G", "A flat", "A", "B flat", "B")
MODES: Final = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}
FONTS: Final = {  # name: (file, Debian's package)
    "timgm6mb": ("TimGM6mb.sf2", "timgm6mb-soundfont"),
    "fluidr3": ("FluidR3_GM.sf2", "fluid-soundfont-gm"),
}
SPLITS: Final = ("train", "keys", "recording")  # all but the held-out pairs; these alone; everything, by FluidR3
HELD_OUT: Final = frozenset(pair for pair in itertools.product(INSTRUMENTS, KEYS) if chance("instrument", *pair) < 0.12)
SLOW, FAST = 80, 130  # beats a minute: below, above

_BLOCK: Final = 64  # samples: fluidsynth starts notes at the borders of its blocks


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """``pitch`` is MIDI's (60 is the C in the middle), ``velocity`` 1 to 127; times are in beats."""

    start: float
    end: float
    pitch: int
    velocity: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """What is played, on what, how fast (beats a minute), and from which sound font."""

    instrument: str
    kind: str
    key: str
    mode: str
    tempo: int
    notes: tuple[Note, ...]
    font: str = "timgm6mb"

    @property
    def seconds(self) -> float:
        """With a second for the last note to die away."""
        return max(note.end for note in self.notes) * 60 / self.tempo + 1.0


def piece(split: str, index: int, *, seed: int = 0) -> Piece:
    """The piece number ``index`` of a split; another ``seed`` is another series.

    Raises:
        DataError: there is no such split.
    """
    rng = generator("instruments", SPLITS, split, index, seed)
    names = tuple(INSTRUMENTS)
    while True:
        instrument, key = names[rng.integers(len(names))], KEYS[rng.integers(len(KEYS))]
        if split == "recording" or ((instrument, key) in HELD_OUT) == (split == "keys"):
            break
    return compose(instrument, key, rng, font="fluidr3" if split == "recording" else "timgm6mb")


def pieces(split: str, *, seed: int = 0, start: int = 0) -> Iterator[Piece]:
    """`piece` for ``start``, ``start`` + 1, ... without end."""
    return (piece(split, index, seed=seed) for index in itertools.count(start))


def compose(
    instrument: str, key: str, rng: np.random.Generator, *, kind: str | None = None, font: str = "timgm6mb"
) -> Piece:
    """A random piece for an instrument in a key; the kind is drawn where it is not given."""
    _, low, high = INSTRUMENTS[instrument]
    kind = kind or KINDS[rng.integers(len(KINDS))]
    mode = ("major", "minor")[rng.integers(2)]
    tempo = int(rng.integers(50, 181))
    ladder = [pitch for pitch in range(low, high + 1) if (pitch - KEYS.index(key)) % 12 in MODES[mode]]
    roots = [i for i, pitch in enumerate(ladder) if pitch % 12 == KEYS.index(key)]
    velocity = int(rng.integers(45, 121))
    steps: list[tuple[int, ...]]
    if kind == "note":
        at = roots[rng.integers(len(roots))]
        steps, beats = [(at,)], [float(rng.uniform(1, 3))]
    elif kind == "chord":
        fitting = [at for at in roots if at + 4 < len(ladder)] or roots[:1]
        at = fitting[rng.integers(len(fitting))]
        steps, beats = [tuple(i for i in (at, at + 2, at + 4) if i < len(ladder))], [float(rng.uniform(1.5, 4))]
    elif kind == "scale":
        at = roots[rng.integers(len(roots))]
        up = list(range(at, min(at + 8, len(ladder))))
        if len(up) < 5:
            up = list(range(max(0, at - 7), at + 1))[::-1]
        steps, beats = [(i,) for i in (up if rng.random() < 0.5 else up[::-1])], [0.5] * len(up)
    else:
        at, steps = roots[rng.integers(len(roots))], []
        for _ in range(int(rng.integers(6, 13))):
            steps.append((at,))
            at = int(np.clip(at + rng.choice([-3, -2, -1, -1, 0, 1, 1, 2, 3]), 0, len(ladder) - 1))
        beats = [float(rng.choice([0.5, 0.5, 1.0, 1.0, 1.5])) for _ in steps]
    begins = np.cumsum([0.0, *beats])
    notes = tuple(
        Note(start=float(begins[i]), end=float(begins[i + 1]), pitch=ladder[step], velocity=velocity)
        for i, chord in enumerate(steps)
        for step in chord
    )
    return Piece(instrument=instrument, kind=kind, key=key, mode=mode, tempo=tempo, notes=notes, font=font)


def caption(piece: Piece, rng: np.random.Generator) -> str:
    """A true description: always the instrument and the kind; pace, height, loudness and key now and then."""
    _, low, high = INSTRUMENTS[piece.instrument]
    pitch = float(np.mean([note.pitch for note in piece.notes]))
    words = []
    if piece.kind in ("scale", "melody") and rng.random() < 0.6:
        words += ["slow"] if piece.tempo < SLOW else ["fast"] if piece.tempo > FAST else []
    if rng.random() < 0.4:
        place = (pitch - low) / (high - low)
        words += ["low"] if place < 0.35 else ["high"] if place > 0.65 else []
    if rng.random() < 0.3:
        velocity = piece.notes[0].velocity
        words += ["quiet"] if velocity < 65 else ["loud"] if velocity > 100 else []
    keyed = f" in {piece.key} {piece.mode}" if piece.kind != "note" and rng.random() < 0.4 else ""
    if rng.random() < 0.5:
        words += [piece.instrument, piece.kind]
        rest = keyed
    else:
        words += [piece.kind]
        rest = f"{keyed} on {_a(piece.instrument)}"
    return _a(" ".join(words)) + rest


def font_path(name: str) -> Path:
    """The file of a sound font.

    Raises:
        DataError: it is not installed; the message is the command.
    """
    file, package = FONTS[name]
    path = Path("/usr/share/sounds/sf2") / file
    if not path.is_file():
        raise DataError(f"the sound font {file} is not installed. Run: {install_command([package])}")
    return path


def render(piece: Piece, rate: int = 16_000) -> Float32[np.ndarray, " samples"]:
    """The waveform in [-1, 1], both channels mixed; a note begins at most 64 samples before its time.

    Raises:
        DataError: fluidsynth or the sound font is not installed; the message is the command.
    """
    blocks_a_beat = 60 / piece.tempo * rate / _BLOCK
    events = [
        event
        for note in piece.notes
        for event in (
            (int(note.start * blocks_a_beat), "on", note.pitch, note.velocity),
            (int(note.end * blocks_a_beat), "off", note.pitch, 0),
        )
    ]
    program = INSTRUMENTS[piece.instrument][0]
    order = {
        "synthesiser": "fluidsynth",
        "font": str(font_path(piece.font)),
        "rate": rate,
        "length": int(piece.seconds * rate / _BLOCK),
        "events": [(0, "program", 0, program), *sorted(events, key=lambda e: (e[0], e[1] == "on"))],
    }
    _, raw = soundbox.here().sound(order)
    wave = np.frombuffer(raw, np.int16).reshape(-1, 2).mean(1, dtype=np.float32) / 32768
    return wave.astype(np.float32)


def _a(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words
