"""What is to become polymodal/nano-whisper: Whisper at 4 million parameters for English of synthetic voices.

It knows espeak-ng's voices, short sentences of some 1,300 common words, and no human being. Its window is 8 seconds.

command   polymodal train recipes/nano/whisper.py --out runs/nano-whisper
machine   1 CPU core
time      not yet run to its end; four hours are reckoned, of a core without AVX-512 (docs/decisions.md 75)
expected  see `expect` below: words that are right on voices and sentences never heard (1 - WER), silence beside
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from polymodal.backbones.decoder import Learned, Plain
from polymodal.backbones.encdec import CrossDecoderConfig, StackConfig
from polymodal.core.batch import IGNORE, Batch, Loss, padded
from polymodal.core.sample import Audio
from polymodal.core.transcript import Segment
from polymodal.data.worlds import speech
from polymodal.encoders.whisper import WhisperEncoderConfig
from polymodal.evaluate.audio_metrics import word_error_rate
from polymodal.heads.ctc import CTCConfig, CTCHead
from polymodal.heads.lm import next_token_loss
from polymodal.nn.norm import Layer
from polymodal.systems.whisper import Whisper, WhisperConfig
from polymodal.systems.whisper_files import speech_tokens
from polymodal.tokenizers.language import LanguageTokenizer
from polymodal.tokenizers.speech import train_speech_bpe
from polymodal.train.run import Bar, Cosine, Header, Run, Stage
from recipes.nano.learners import Around

STEPS, BATCH = (1600, 3000, 8000), 16  # spelling alone, listening, listening on
POOL = 12_000  # utterances that are rendered, each of which is heard a few times
SECONDS, CONTEXT = 8, 112
DIM = 192
ASKED = 200  # held-out utterances of each kind
QUIET, JOINED, WHOLE = 0.06, 0.1, 0.05  # rows without a word; batches of several sentences, and of whole windows
STEP = 320  # samples of one vector of the encoder
LETTERS = " 'abcdefghijklmnopqrstuvwxyz"


@lru_cache(maxsize=1)
def tokenizer() -> LanguageTokenizer:
    """Learned on training sentences only; the same on every machine."""
    texts = (f" {speech.utterance('train', i).text}" for i in range(6000))
    return train_speech_bpe(texts, 1100, languages=("en",), seconds=SECONDS)


def config() -> WhisperConfig:
    words = tokenizer()
    tokens = speech_tokens(words)
    return WhisperConfig(
        encoder=WhisperEncoderConfig(
            dim=DIM, num_layers=6, num_heads=3, hidden_dim=4 * DIM, positions=50 * SECONDS
        ),
        backbone=CrossDecoderConfig(
            vocab_size=words.vocab_size, dim=DIM, norm=Layer(), position=Learned(count=CONTEXT), post_norm=False,
            start_id=tokens.start, pad_id=tokens.end, fixed_id=tokens.end,
            decoder=StackConfig(
                num_layers=2, num_heads=3, head_dim=64, mlp=Plain(hidden_dim=4 * DIM), bias=True, key_bias=False
            ),
        ),
    )  # fmt: skip


def whisper() -> Whisper:
    system = Whisper.build(config())
    system.tokenizer = tokenizer()
    tokens = speech_tokens(tokenizer())
    # It is not taught to go on with a text, nor to translate.
    system.tokens = replace(tokens, previous=None, tasks={"transcribe": tokens.tasks["transcribe"]})
    return system


class Learner(Around):
    """A Whisper and, while it learns, a layer that spells the sentence from the encoder alone (CTC).

    That finds the words in the sound before there is any attention to them (Watanabe et al. 2017); the layer is not
    kept.
    """

    inner = "listener"

    def __init__(self, listener: Whisper) -> None:
        super().__init__()
        self.listener = listener
        self.speller = CTCHead(CTCConfig(vocab_size=1 + len(LETTERS), zero_infinity=True), DIM)
        self.speller.init_weights()

    def loss(self, batch: Batch) -> Loss:
        """Of spelling where there are ``letters``, of writing where there are ``ids``."""
        w = self.listener
        encoded = w.encode_sound(batch["features"])
        spelled = None
        if "letters" in batch:
            spelled = self.speller.loss(self.speller(encoded.x), batch["steps"], batch["letters"])
        if "ids" not in batch:
            assert spelled is not None
            return spelled
        x = w.backbone.decoder(w.backbone.target(batch["ids"]), w.backbone.source(encoded)).x
        said = next_token_loss(F.pad(x, (0, 0, 0, 1)), F.pad(batch["labels"], (1, 0), value=-100), w.backbone.logits)
        if spelled is None:
            return said
        spelling = spelled.total / spelled.weight
        return Loss(
            total=said.total + spelling * said.weight, weight=said.weight,
            metrics={**said.metrics, "spelling": spelling.detach()},
        )  # fmt: skip


# ---- what it hears

Row = tuple[Tensor, list[Segment] | None]  # a window at most, and what is said in it


@lru_cache(maxsize=POOL)
def _rendered(index: int) -> tuple[np.ndarray, tuple[float, float]]:
    """A training utterance as 16 bits, and when its words begin and end."""
    wave, words = speech.render(speech.utterance("train", index))
    times = (words[0].start, words[-1].end) if words else (0.0, len(wave) / speech.RATE)
    return (wave * 32767).astype(np.int16), times


def spoken(index: int, rng: np.random.Generator) -> tuple[np.ndarray, Segment]:
    """A training utterance, a third of them a little faster or slower, a quarter in more noise."""
    wave, (start, end) = _rendered(index)
    wave, pace = wave.astype(np.float32) / 32768, 1.0
    if rng.random() < 0.35:
        pace = float(rng.uniform(0.87, 1.15))
        wave = np.interp(np.arange(0, len(wave) - 1, pace), np.arange(len(wave)), wave).astype(np.float32)
    if rng.random() < 0.25:
        wave = speech.with_noise(wave, float(rng.uniform(3, 25)), str(rng.choice(speech.NOISES)), rng)
    text = f" {speech.utterance('train', index).text}"
    return wave, Segment(start=start / pace, end=end / pace, text=text, language="en")


def quiet(rng: np.random.Generator, samples: int) -> np.ndarray:
    """Silence, noise, or music of a few notes."""
    kind = int(rng.integers(3))
    if kind == 0:
        return np.zeros(samples, np.float32)
    loud = float(10 ** rng.uniform(-4, -0.5))
    if kind == 1:
        return speech.noise(str(rng.choice(speech.NOISES)), samples, rng) * np.float32(loud)
    time, wave = np.arange(samples) / speech.RATE, np.zeros(samples)
    for start in rng.uniform(0, time[-1], int(rng.integers(2, 14))):
        pitch = 55 * 2 ** (rng.integers(0, 48) / 12)
        envelope = np.where(time > start, np.exp(-(time - start) * rng.uniform(0.5, 6)), 0.0)
        wave += envelope * sum(np.sin(2 * np.pi * k * pitch * time) / k**2 for k in range(1, int(rng.integers(2, 7))))
    return (loud * wave / (np.abs(wave).max() + 1e-9)).astype(np.float32)


def letters(text: str) -> Int[Tensor, " letters"]:
    """What is spelled, 0 being none."""
    return torch.tensor([1 + LETTERS.index(letter) for letter in text.lower().strip() if letter in LETTERS])


@dataclass(frozen=True)
class Spoken:
    """Sentences of about one length a batch, so that little of it is padding.

    To ``spell``, there is nothing but whole sentences, as they were rendered.
    """

    pool: int = POOL
    spell: bool = False

    @cached_property
    def _teacher(self) -> Whisper:
        return whisper()

    @cached_property
    def _by_length(self) -> np.ndarray:
        """The numbers of the utterances, from the shortest to the longest, as their letters tell."""
        spoken = (speech.utterance("train", i) for i in range(self.pool))
        return np.argsort([len(one.text) / one.voice.rate for one in spoken], kind="stable")

    def __len__(self) -> int:
        return self.pool

    def batch(self, indices: Sequence[int], rng: np.random.Generator) -> Batch:
        if self.spell:
            return self._spelling(indices, rng)
        if rng.random() < JOINED:
            return self._lesson([self._joined(rng) for _ in indices], whole=True)
        rows = [self._single(i, rng) for i in self._alike(len(indices), rng)]
        batch = self._lesson(rows, whole=bool(rng.random() < WHOLE))
        batch["steps"] = torch.tensor([-(-len(wave) // STEP) for wave, _ in rows])
        batch["letters"] = padded(
            [letters("".join(one.text for one in said or ())).tolist() for _, said in rows], fill=IGNORE
        )
        batch["features"] = masked(batch["features"], rng)
        return batch

    def _alike(self, count: int, rng: np.random.Generator) -> list[int]:
        """Utterances of about one length."""
        place = int(rng.integers(self.pool - count + 1))
        return [int(i) for i in self._by_length[place : place + count]]

    def _spelling(self, indices: Sequence[int], rng: np.random.Generator) -> Batch:
        chosen = self._alike(len(indices), rng)
        waves = [_rendered(i)[0][: SECONDS * speech.RATE].astype(np.float32) / 32768 for i in chosen]
        batch = self._lesson([(torch.from_numpy(wave), []) for wave in waves], whole=False)
        return Batch(
            features=batch["features"],
            steps=torch.tensor([-(-len(wave) // STEP) for wave in waves]),
            letters=padded([letters(speech.utterance("train", i).text).tolist() for i in chosen], fill=IGNORE),
        )

    def _single(self, index: int, rng: np.random.Generator) -> Row:
        wave, segment = spoken(index, rng)
        if rng.random() < QUIET or len(wave) > SECONDS * speech.RATE:
            silence = quiet(rng, min(len(wave), SECONDS * speech.RATE))
            return torch.from_numpy(silence), None if rng.random() < 0.5 else []
        return torch.from_numpy(wave), [segment]

    def _joined(self, rng: np.random.Generator) -> Row:
        """A window out of a longer talk: it ends in the middle of a sentence, or behind the last one."""
        window, said, room = np.zeros(0, np.float32), list[Segment](), SECONDS * speech.RATE
        for _ in range(int(rng.integers(2, 6))):
            gap = np.zeros(int(rng.uniform(0.1, 1.2) * speech.RATE), np.float32)
            wave, one = spoken(int(rng.integers(self.pool)), rng)
            start = (len(window) + len(gap)) / speech.RATE
            if start + one.start >= SECONDS - 0.1:
                break
            said.append(replace(one, start=start + one.start, end=start + one.end))
            window = np.concatenate([window, gap, wave])
        return torch.from_numpy(window[:room]), said

    def _lesson(self, rows: Sequence[Row], *, whole: bool) -> Batch:
        waves, said = zip(*rows, strict=True)
        batch = self._teacher.lesson(waves, said)
        if not whole:
            frames = 2 * max(-(-len(wave) // STEP) for wave in waves)
            batch["features"] = batch["features"][..., :frames].clone()
        return batch


def masked(features: Tensor, rng: np.random.Generator) -> Tensor:
    """SpecAugment: two bands and two moments of each row are made as quiet as its quietest."""
    for row in features:
        floor = row.min()
        for size, most in ((row.shape[0], 14), (row.shape[1], min(30, row.shape[1] // 6))):
            for _ in range(2):
                width = int(rng.integers(0, most + 1))
                start = int(rng.integers(0, size - width + 1))
                part = row[start : start + width] if size == row.shape[0] else row[:, start : start + width]
                part.fill_(floor)
    return features


# ---- what it must hear

HELD_OUT = ("sentences", "voices", "noisy", "flite", "words")


def evaluate(model: nn.Module, count: int = ASKED) -> dict[str, float]:
    """Right words (1 - WER) of each split; of the same sentences in silence; clips without a word that stay so."""
    listener = model.listener if isinstance(model, Learner) else model
    assert isinstance(listener, Whisper)

    def heard(wave: np.ndarray) -> str:
        return "".join(one.text for one in listener.transcribe(Audio(wave, rate=speech.RATE)))

    found: dict[str, float] = {}
    for split in HELD_OUT:
        asked = [speech.utterance(split, i) for i in range(count)]
        waves = [speech.render(one)[0] for one in asked]
        texts = [one.text for one in asked]
        found[split] = 1 - word_error_rate([heard(wave) for wave in waves], texts).value
        if split == "voices":
            found["silent"] = 1 - word_error_rate([heard(wave * 0) for wave in waves], texts).value
    rng = np.random.default_rng(1)
    clips = [quiet(rng, SECONDS * speech.RATE) for _ in range(min(20, count))]
    found["quiet"] = sum(not heard(clip).strip() for clip in clips) / len(clips)
    return found


def run(steps: tuple[int, int, int] = STEPS, *, batch_size: int = BATCH, pool: int = POOL, asked: int = ASKED) -> Run:
    stage = partial(
        Stage,
        batch_size=batch_size,
        weight_decay=0.05,
        betas=(0.9, 0.98),
        eps=1e-6,
        precision="auto",
        ema=0.998,
        workers=1,
    )
    return Run(
        name="nano-whisper",
        header=Header(
            command="polymodal train recipes/nano/whisper.py --out runs/nano-whisper",
            machine="1 CPU core", time="four hours", expected="the bars of `expect`",
        ),
        model=lambda: Learner(whisper()),
        stages=[
            # The words first, from clean sound: with noise, masks and a thousand tokens to tell apart at once, 64,000
            # utterances taught the encoder nothing (docs/decisions.md 51).
            stage(
                name="spell", steps=steps[0], source=partial(Spoken, pool, spell=True), lr=1e-3,
                schedule=Cosine(warmup=min(100, steps[0] // 10)), trainable={"listener.encoder": 1.0, "speller": 1.0},
            ),
            stage(
                name="listen", steps=steps[1], source=partial(Spoken, pool), lr=1e-3,
                schedule=Cosine(warmup=min(300, steps[1] // 10)),
            ),
            # By then a third of the words is right, and the loss still falls at a rate that is going to zero.
            stage(
                name="listen on", steps=steps[2], source=partial(Spoken, pool), lr=1e-3,
                schedule=Cosine(warmup=min(100, steps[2] // 10)),
            ),
        ],
        evaluate=partial(evaluate, count=asked),
        # Set before any run: WER at most 10 %, 25 %, 20 %.
        expect={
            "voices": Bar(value=0.90, chance=0.0),
            "flite": Bar(value=0.75, chance=0.0),
            "noisy": Bar(value=0.80, chance=0.0),
            "quiet": Bar(value=1.0),
        },
    )  # fmt: skip
