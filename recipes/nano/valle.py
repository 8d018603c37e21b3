"""VALL-E of two million parameters: short sentences in the voice of another one, American voices of espeak-ng only.

It learns pairs of sentences that one voice says one after the other, as the codes of nano-encodec, so that the first of
them can be the prompt of the second. What it says is written down by nano-whisper, and its voice is compared with that
of its prompt and with those of the others by a judge that learned from other voices and other sentences.

command   polymodal train recipes/nano/valle.py --out runs/nano-valle
machine   1 CPU core with AVX512-BF16; the package espeak-ng; polymodal/nano-encodec and polymodal/nano-whisper
time      not yet run; 37 minutes by measured rates of its parts: 30 train, 4 code the pairs, the rest judges
expected  at most 30 % wrong words on held-out sentences; more like its prompt than like others, the whole interval

Deviations from the paper: sentences of at most 36 letters, whose silence is cut off; the voices have no noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from typing import Final, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int16
from torch import Tensor, nn

from polymodal.backbones.conditioned import ConditionedConfig
from polymodal.backbones.encdec import StackConfig, Unbiased
from polymodal.backbones.levels import LevelConfig
from polymodal.core.batch import IGNORE, Batch, padded
from polymodal.core.errors import ConfigError
from polymodal.core.sample import Audio
from polymodal.data.worlds import speech
from polymodal.evaluate.audio_metrics import word_error_rate
from polymodal.evaluate.text_metrics import estimate
from polymodal.samplers.delayed import Drawing
from polymodal.systems.encodec import EnCodec
from polymodal.systems.listening import Transcriber
from polymodal.systems.valle import VALLE, VALLEConfig
from polymodal.tokenizers.phonemes import ENGLISH, PAUSE, Alphabet, phonemes
from polymodal.train.run import Bar, Cosine, Header, Run, Stage
from recipes.nano.coded import CODEC, codec, coded, earlier, install, lowered
from recipes.nano.judges import Comparer, statistics

LISTENER: Final = "polymodal/nano-whisper"
STEPS, BATCH = 1900, 16
PAIRS = 2400
BANDWIDTH = 2.8  # kbit/s: eight books, as in the paper
LETTERS = 36  # of a sentence at most
SECONDS, TOP_K = 4.0, 16  # that it may say at most; codes to draw from: what a short training gives the others is noise
ASKED, KNOWN = 60, 400  # pairs; those that the judge of voices learns from
ACCENT = "gmw/en-US+"  # whose phonemes these are


def config(base: EnCodec) -> VALLEConfig:
    mlp = Unbiased(hidden_dim=640, activation="gelu")
    return VALLEConfig(
        symbols=ENGLISH,
        first=ConditionedConfig(
            dim=160, context=1024, stack=StackConfig(num_layers=4, num_heads=4, head_dim=40, mlp=mlp)
        ),
        rest=LevelConfig(dim=128, num_layers=3, num_heads=4, hidden_dim=512, activation="gelu"),
        codec=lowered(base, BANDWIDTH), prompt_seconds=1.5,
    )  # fmt: skip


def model(name: str = CODEC, listener: str = LISTENER) -> VALLE:
    """A fresh one around a trained codec."""
    ears(listener)  # is missed now, not when everything is trained
    base = codec(name)
    made = VALLE.build(config(base))
    install(base, made.codec)
    return made


def ears(listener: str) -> Transcriber:
    """Who writes down what is said; errors as `coded.earlier`."""
    made = earlier(listener, "whisper.py")
    if not isinstance(made, Transcriber):
        raise ConfigError(f"{listener} is a {type(made).__name__}, which writes down no speech")
    return made


# ---- what is said


@dataclass(frozen=True)
class Said:
    """A sentence in a voice, without the silence around it."""

    text: str
    voice: speech.Voice

    def wave(self) -> Float32[np.ndarray, " samples"]:
        wave, words = speech.render(speech.Utterance(text=self.text, voice=self.voice))
        start, end = max(0.0, words[0].start - 0.03), words[-1].end + 0.08
        return wave[round(start * speech.RATE) : round(end * speech.RATE)]


Pair: TypeAlias = tuple[Said, Said]


def pairs(split: str, *, seed: int = 0) -> Iterator[Pair]:
    """What a voice says, and what it says then: short sentences of a split by its American voices, without end."""
    every = speech.utterances(split, seed=seed)
    short = (one for one in every if len(one.text) <= LETTERS and one.voice.name.startswith(ACCENT))
    for first, second in zip(short, short, strict=False):
        yield Said(first.text, first.voice), Said(second.text, first.voice)


# ---- what it learns from


@dataclass(frozen=True)
class Spoken:
    """Pairs as phonemes and codes, from the shortest to the longest; those of a batch are about as long."""

    texts: Sequence[Sequence[int]]
    codes: Sequence[Int16[Tensor, "books _frames"]]

    def __len__(self) -> int:
        return len(self.texts)

    def batch(self, indices: Sequence[int], rng: np.random.Generator) -> Batch:
        place = int(rng.integers(len(self) - len(indices) + 1))
        here = slice(place, place + len(indices))
        texts, codes = self.texts[here], behind(self.codes[here])
        return Batch(ids=padded(texts), valid=padded([[True] * len(text) for text in texts], fill=False), codes=codes)


def behind(codes: Sequence[Tensor]) -> Tensor:
    """Rows of codes as one tensor, `IGNORE` behind the end of each."""
    out = torch.full((len(codes), len(codes[0]), max(row.shape[1] for row in codes)), IGNORE)
    for row, mine in zip(out, codes, strict=True):
        row[:, : mine.shape[1]] = mine
    return out


def spelled(first: Said, second: Said) -> list[str]:
    """The phonemes of a pair, as `VALLE.sound` joins those of a voice and of a text."""
    return [*phonemes(first.text), PAUSE, *phonemes(second.text)]


@lru_cache(maxsize=1)
def spoken(name: str, number: int) -> Spoken:
    """Training pairs, rendered, spelled and coded once."""
    base, alphabet, said = codec(name), Alphabet(ENGLISH), [*islice(pairs("train"), number)]
    books = base.config.codebooks_at(BANDWIDTH)
    codes = coded(base, (one.wave() for pair in said for one in pair), books)
    both = [torch.cat([a, b], 1) for a, b in zip(codes[::2], codes[1::2], strict=True)]
    order = sorted(range(number), key=lambda i: both[i].shape[1])
    return Spoken([alphabet(spelled(*said[i])) for i in order], [both[i] for i in order])


# ---- what is asked of it


@lru_cache(maxsize=1)
def judge(number: int) -> Comparer:
    """Whose voice it is: learned from training voices in sentences of another series, two of each."""
    waves = [torch.from_numpy(one.wave()) for pair in islice(pairs("train", seed=1), number) for one in pair]
    return Comparer.fit(torch.stack([*map(statistics, waves)]), torch.arange(number).repeat_interleave(2))


def evaluate(
    trained: nn.Module, *, listener: str = LISTENER, asked: int = ASKED, known: int = KNOWN
) -> dict[str, float]:
    """Right words (1 - WER) and likeness to the prompt; of unseen sentences, and of unseen voices as ``voices/...``.

    Beside them stand the words of the real sounds, before and behind the codec, those that the sentences of others
    would have right, and how alike real sounds are.
    """
    assert isinstance(trained, VALLE)
    written, voices = ears(listener), judge(known)
    said = [*islice(pairs("sentences"), asked)]
    real = [second.wave() for _, second in said]
    again = [_sound(trained, trained.quantize(_batch(wave))) for wave in real]
    made = speak(trained, said)
    found = {
        "words": right(written, made, said),
        "words/real": right(written, real, said),
        "words/coded": right(written, again, said),
        "words/other": right(written, made, [*said[1:], said[0]]),
        **likeness(voices, made, said),
        "like/real": likeness(voices, real, said)["like"],
    }
    said = [*islice(pairs("voices"), asked)]
    made = speak(trained, said)
    unseen = {"words": right(written, made, said), **likeness(voices, made, said)}
    return {**found, **{f"voices/{name}": value for name, value in unseen.items()}}


Waves: TypeAlias = Sequence[Float32[np.ndarray, " _samples"]]


def speak(trained: VALLE, said: Sequence[Pair]) -> Waves:
    """The second sentence of each pair, in the voice that says the first."""
    batch = trained.spell([spelled(*pair) for pair in said])
    batch["prompt"] = behind([trained.quantize(_batch(first.wave()))[0] for first, _ in said])
    frames = round(SECONDS * trained.sample_rate / trained.hop)
    codes = trained.write(batch, [Drawing(frames=frames, top_k=TOP_K, seed=i) for i in range(len(said))])
    return [_sound(trained, row[None]) for row in codes]


def _batch(wave: np.ndarray) -> Float[Tensor, "1 1 samples"]:
    return torch.from_numpy(wave)[None, None]


def _sound(trained: VALLE, codes: Int[Tensor, "1 books frames"]) -> Float32[np.ndarray, " samples"]:
    return trained.reconstruct(codes)[0, 0].numpy()


def right(listener: Transcriber, waves: Waves, said: Sequence[Pair]) -> float:
    """Right words of the second sentences."""
    written = ["".join(one.text for one in listener.transcribe(Audio(wave, rate=speech.RATE))) for wave in waves]
    return 1 - word_error_rate(written, [second.text for _, second in said]).value


def likeness(voices: Comparer, waves: Waves, said: Sequence[Pair]) -> dict[str, float]:
    """How much more each sound is like its own prompt than like the mean of the others', in cosines."""
    mine, theirs = (
        torch.stack([statistics(torch.from_numpy(wave)) for wave in each])
        for each in (waves, [first.wave() for first, _ in said])
    )
    alike, number = voices.alike(mine, theirs), len(said)
    own = alike.diagonal()
    more = estimate((own - (alike.sum(1) - own) / (number - 1)).tolist(), bounds=(-2.0, 2.0))
    nearest = (alike.argmax(1) == torch.arange(number)).float().mean()
    return {"like": more.value, "like/least": more.low, "like/most": more.high, "nearest": float(nearest)}


def run(
    steps: int = STEPS,
    *,
    name: str = CODEC,
    listener: str = LISTENER,
    number: int = PAIRS,
    batch_size: int = BATCH,
    asked: int = ASKED,
    known: int = KNOWN,
) -> Run:
    """``name`` and ``listener`` are models that we ship, or folders of trained ones."""
    return Run(
        name="nano-valle",
        header=Header(
            command="polymodal train recipes/nano/valle.py --out runs/nano-valle",
            machine="1 CPU core with AVX512-BF16", time="not yet run", expected="the bars of `expect`",
        ),
        model=partial(model, name, listener),
        stages=[
            Stage(
                name="speak", steps=steps, batch_size=batch_size, source=partial(spoken, name, number), lr=2e-3,
                schedule=Cosine(warmup=min(200, steps // 10)), weight_decay=0.05, betas=(0.9, 0.98), precision="auto",
                ema=0.998, workers=1,
            )
        ],
        evaluate=partial(evaluate, listener=listener, asked=asked, known=known),
        # Set before any run.
        expect={"words": Bar(value=0.70, chance=0.0), "like/least": Bar(value=0.0)},
    )  # fmt: skip
