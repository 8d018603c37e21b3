"""Everyday sounds, synthesised: what is heard and when is known to the sample.

Each sound is a small recipe of tones, noise and envelopes whose numbers are drawn, so that no two knocks are the same.
They are told apart as a child would tell them; they are no recordings. Some pairs of sounds never occur together in
training. Scene ``i`` of a split is the same on every machine.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from jaxtyping import Float32

from polymodal.data.worlds.asked import chance
from polymodal.data.worlds.splits import generator

RATE: Final = 16_000
SPLITS: Final = ("train", "pairs")

_Wave: TypeAlias = np.ndarray
_Real: TypeAlias = float | int


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One sound of a scene, in seconds; ``gain`` is in dB, ``seed`` draws its numbers."""

    label: str
    start: float
    end: float
    gain: float
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """Sounds over faint noise."""

    seconds: float
    events: tuple[Event, ...]
    noise: float  # dB below full scale
    seed: int


# ---- recipes: (time in seconds, rng) to a wave of any level ----


def _sweep(time: _Wave, hertz: _Wave | _Real) -> _Wave:
    return np.sin(2 * np.pi * np.cumsum(np.broadcast_to(hertz, time.shape)) / RATE)


def _filtered(time: _Wave, rng: np.random.Generator, low: _Real, high: _Real) -> _Wave:
    """Noise between two frequencies."""
    spectrum = np.fft.rfft(rng.standard_normal(len(time)))
    frequency = np.fft.rfftfreq(len(time), 1 / RATE)
    return np.fft.irfft(spectrum * ((frequency > low) & (frequency < high)), len(time))


def _struck(time: _Wave, at: _Real, tones: tuple[_Real, ...], decay: _Real) -> _Wave:
    """Tones that begin at once and die away, the higher ones faster."""
    since = np.maximum(time - at, 0)
    rings = sum(
        np.exp(-since * decay * (1 + 0.5 * i)) * np.sin(2 * np.pi * tone * since) / (1 + i)
        for i, tone in enumerate(tones)
    )
    return np.where(time >= at, rings, 0.0)


def _every(time: _Wave, rng: np.random.Generator, period: _Real, wobble: _Real = 0.0) -> list[float]:
    """Times of something that comes again and again."""
    times, at = [], 0.0
    while at < time[-1]:
        times.append(at)
        at += period * (1 + wobble * rng.uniform(-1, 1))
    return times


def _alarm(time: _Wave, rng: np.random.Generator) -> _Wave:
    beeps = (time % rng.uniform(0.3, 0.6)) < rng.uniform(0.1, 0.2)
    return beeps * np.sign(_sweep(time, rng.uniform(1_500, 2_500)))


def _siren(time: _Wave, rng: np.random.Generator) -> _Wave:
    low, high = rng.uniform(400, 600), rng.uniform(900, 1_400)
    swing = np.sin(2 * np.pi * rng.uniform(0.3, 1.0) * time)
    return _sweep(time, (low + high) / 2 + (high - low) / 2 * swing)


def _bell(time: _Wave, rng: np.random.Generator) -> _Wave:
    base = rng.uniform(350, 900)
    tones = tuple(base * ratio for ratio in (1.0, 2.0, 2.4, 3.0, 4.5, 5.3))
    return sum(
        (_struck(time, at, tones, rng.uniform(1, 3)) for at in _every(time, rng, rng.uniform(0.9, 1.6))), 0 * time
    )


def _knock(time: _Wave, rng: np.random.Generator) -> _Wave:
    tones = tuple(rng.uniform(120, 400, 3))
    return sum((_struck(time, at, tones, rng.uniform(40, 70)) for at in _every(time, rng, 0.22, 0.2)), 0 * time)


def _rain(time: _Wave, rng: np.random.Generator) -> _Wave:
    drops = rng.standard_normal(len(time)) * (rng.random(len(time)) < 0.01) * 6
    return _filtered(time, rng, 1_000, 7_500) + np.convolve(drops, np.exp(-np.arange(60) / 8), "same")


def _wind(time: _Wave, rng: np.random.Generator) -> _Wave:
    gusts = 1.1 + np.sin(2 * np.pi * rng.uniform(0.2, 0.5) * time + rng.uniform(0, 6))
    return gusts * _filtered(time, rng, 150, rng.uniform(500, 900))


def _engine(time: _Wave, rng: np.random.Generator) -> _Wave:
    turns = rng.uniform(25, 60) * (1 + 0.15 * np.sin(2 * np.pi * rng.uniform(0.1, 0.4) * time))
    tones = sum(_sweep(time, k * turns) / k**0.7 for k in range(1, 12))
    return tones * (1 + 0.4 * _sweep(time, turns / 2)) + 0.3 * _filtered(time, rng, 50, 900)


def _dog(time: _Wave, rng: np.random.Generator) -> _Wave:
    wave, base = 0 * time, rng.uniform(300, 550)
    for at in _every(time, rng, rng.uniform(0.4, 0.7), 0.2):
        since = np.clip(time - at, 0, 0.16)
        bark = np.sin(np.pi * since / 0.16) ** 0.7
        pitch = base * (1 + 0.6 * np.sin(np.pi * since / 0.16))
        wave = wave + bark * (
            sum(_sweep(time, k * pitch) / k for k in range(1, 8)) + 0.3 * rng.standard_normal(len(time))
        )
    return wave


def _bird(time: _Wave, rng: np.random.Generator) -> _Wave:
    wave, base = 0 * time, rng.uniform(2_500, 4_500)
    for at in _every(time, rng, rng.uniform(0.18, 0.35), 0.3):
        since = np.clip(time - at, 0, 0.1)
        wave = wave + np.sin(np.pi * since / 0.1) * _sweep(time, base + 12_000 * since * rng.choice([-1, 1]))
    return wave


def _telephone(time: _Wave, rng: np.random.Generator) -> _Wave:
    rings = (time % 1.4) < 0.8
    return rings * (_sweep(time, 440) + _sweep(time, 480)) * ((time * rng.uniform(18, 25)) % 1 < 0.6)


def _clock(time: _Wave, rng: np.random.Generator) -> _Wave:
    tick, tock = rng.uniform(2_000, 3_500, 2)
    beats = enumerate(_every(time, rng, rng.uniform(0.4, 0.55)))
    return sum((_struck(time, at, (tock if n % 2 else tick,), 250) for n, at in beats), 0 * time)


def _steps(time: _Wave, rng: np.random.Generator) -> _Wave:
    wave = 0 * time
    for at in _every(time, rng, rng.uniform(0.45, 0.65), 0.1):
        since = np.maximum(time - at, 0)
        wave = wave + (time >= at) * np.exp(-since * 45) * _filtered(time, rng, 60, 1_200)
    return wave


def _applause(time: _Wave, rng: np.random.Generator) -> _Wave:
    claps = (rng.random(len(time)) < 60 / RATE) * rng.uniform(0.3, 1.0, len(time))
    size = 2 * len(time)
    bursts = np.fft.irfft(np.fft.rfft(claps, size) * np.fft.rfft(np.exp(-np.arange(len(time)) / 120), size), size)
    return bursts[: len(time)] * _filtered(time, rng, 700, 4_000)


def _horn(time: _Wave, rng: np.random.Generator) -> _Wave:
    base = rng.uniform(300, 420)
    blows = (time % rng.uniform(0.8, 1.5)) < 0.6
    return blows * sum(_sweep(time, k * f) / k for f in (base, base * 1.26) for k in range(1, 8))


def _drip(time: _Wave, rng: np.random.Generator) -> _Wave:
    wave = 0 * time
    for at in _every(time, rng, rng.uniform(0.35, 0.7), 0.2):
        since = np.maximum(time - at, 0)
        wave = wave + (time >= at) * np.exp(-since * 40) * np.sin(2 * np.pi * since * (900 + 6_000 * since))
    return wave


def _whistle(time: _Wave, rng: np.random.Generator) -> _Wave:
    pitch = rng.uniform(1_000, 1_800) * (1 + 0.25 * np.sin(2 * np.pi * rng.uniform(0.5, 1.5) * time))
    return _sweep(time, pitch) + 0.05 * _filtered(time, rng, 1_000, 4_000)


def _saw(time: _Wave, rng: np.random.Generator) -> _Wave:
    strokes = np.abs(np.sin(np.pi * rng.uniform(1.5, 2.5) * time))
    return strokes * _filtered(time, rng, 1_200, 5_000) * (1 + _sweep(time, rng.uniform(120, 200)))


SOUNDS: Final[dict[str, tuple[str, Callable[[_Wave, np.random.Generator], _Wave]]]] = {
    "alarm": ("an alarm clock beeps", _alarm),
    "siren": ("a siren wails", _siren),
    "bell": ("a bell rings", _bell),
    "knock": ("somebody knocks on a door", _knock),
    "rain": ("rain falls", _rain),
    "wind": ("the wind blows", _wind),
    "engine": ("an engine runs", _engine),
    "dog": ("a dog barks", _dog),
    "bird": ("a bird sings", _bird),
    "telephone": ("a telephone rings", _telephone),
    "clock": ("a clock ticks", _clock),
    "footsteps": ("somebody walks", _steps),
    "applause": ("people clap their hands", _applause),
    "horn": ("a car honks", _horn),
    "drip": ("water drips", _drip),
    "whistle": ("somebody whistles", _whistle),
    "saw": ("somebody saws wood", _saw),
}
HELD_OUT: Final = frozenset(
    pair for pair in itertools.combinations(sorted(SOUNDS), 2) if chance("events", *pair) < 0.15
)

# ---- scenes ----


def scene(split: str, index: int, *, seed: int = 0) -> Scene:
    """The scene number ``index`` of a split: one to three sounds in four to ten seconds.

    Each scene of "pairs" holds a pair of sounds that training never hears together.

    Raises:
        DataError: there is no such split.
    """
    rng = generator("events", SPLITS, split, index, seed)
    names = tuple(SOUNDS)
    while True:
        count = int(rng.integers(2 if split == "pairs" else 1, 4))
        labels = [names[i] for i in rng.permutation(len(names))[:count]]
        if bool(HELD_OUT & set(itertools.combinations(sorted(labels), 2))) == (split == "pairs"):
            break
    seconds = float(rng.uniform(4, 10))
    events = []
    for label in labels:
        length = float(rng.uniform(1, min(4, seconds)))
        start = float(rng.uniform(0, seconds - length))
        gain = float(rng.uniform(-18, -6))
        events.append(Event(label=label, start=start, end=start + length, gain=gain, seed=int(rng.integers(2**31))))
    ordered = tuple(sorted(events, key=lambda event: event.start))
    return Scene(seconds=seconds, events=ordered, noise=float(rng.uniform(-70, -45)), seed=int(rng.integers(2**31)))


def scenes(split: str, *, seed: int = 0, start: int = 0) -> Iterator[Scene]:
    """`scene` for ``start``, ``start`` + 1, ... without end."""
    return (scene(split, index, seed=seed) for index in itertools.count(start))


def describe(scene: Scene) -> str:
    """``a dog barks, then rain falls``: the sounds in the order in which they begin."""
    return ", then ".join(SOUNDS[event.label][0] for event in scene.events)


def sound(event: Event) -> Float32[np.ndarray, " samples"]:
    """One event by itself, its power at ``gain`` below full scale, faded in and out over a hundredth of a second."""
    time = np.arange(round((event.end - event.start) * RATE)) / RATE
    wave = SOUNDS[event.label][1](time, np.random.default_rng(event.seed))
    wave = wave * np.clip(np.minimum(time, time[-1] - time) / 0.01, 0, 1)
    return (wave / np.sqrt(np.mean(wave**2)) * 10 ** (event.gain / 20) * 0.7).astype(np.float32)


def render(scene: Scene) -> Float32[np.ndarray, " samples"]:
    """The waveform at 16 kHz, in [-1, 1]."""
    rng = np.random.default_rng(scene.seed)
    wave = 10 ** (scene.noise / 20) * rng.standard_normal(round(scene.seconds * RATE))
    for event in scene.events:
        piece = sound(event)
        at = min(round(event.start * RATE), len(wave) - len(piece))
        wave[at : at + len(piece)] += piece
    return (wave / max(1.0, float(np.abs(wave).max()))).astype(np.float32)
