"""MusicGen of a million parameters: two seconds of the instrument, kind, pace, height, loudness and key of a caption.

It learns notes, chords, scales and melodies of one sound font as the codes of nano-encodec, and is asked for pairs of
instrument and key that it never heard. A judge that learned from other pieces says which of 40 instruments plays.

command   polymodal train recipes/nano/musicgen.py --out runs/nano-musicgen
machine   1 CPU core with AVX512-BF16; the package timgm6mb-soundfont; polymodal/nano-encodec
time      not yet run; 34 minutes by measured rates of its parts: 30 train, 3 code the pieces, one judges
expected  the judge names the instrument of at least 70 % of the pieces; chance is 2.5 %

Deviations from the paper: the text encoder is not trained elsewhere but drawn at random, one layer whose vectors tell a
hundred words apart; pieces begin where they begin and are filled with silence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from jaxtyping import Float, Int, Int16
from torch import Tensor, nn

from polymodal.backbones.conditioned import ConditionedConfig
from polymodal.backbones.encdec import EncDecConfig, RelativeBias, StackConfig, Unbiased
from polymodal.core.batch import Batch, text_batch
from polymodal.core.interval import wilson
from polymodal.data.worlds import instruments
from polymodal.nn.norm import RMS
from polymodal.samplers.delayed import Drawing, whole
from polymodal.systems.encodec import EnCodec
from polymodal.systems.musicgen import GUIDANCE, MusicGen, MusicGenConfig
from polymodal.tokenizers.language import LanguageTokenizer
from polymodal.train.run import Bar, Cosine, Header, Run, Stage
from recipes.nano.coded import CODEC, codec, coded, install, lowered
from recipes.nano.judges import Namer, statistics

STEPS, BATCH = 7000, 32
PIECES = 9000  # different ones to learn from, each under many captions
SECONDS = 2.0
BANDWIDTH = 1.4  # kbit/s: four books, as in the paper
ASKED, KNOWN = 200, 30  # pieces; those of each instrument that the judge learns from
INSTRUMENTS = tuple(instruments.INSTRUMENTS)


@lru_cache(maxsize=1)
def tokenizer() -> LanguageTokenizer:
    """The words of all captions, one token each."""
    named = (*INSTRUMENTS, *instruments.KINDS, *instruments.KEYS, *instruments.MODES)
    said = " ".join((*named, "a an in on slow fast low high quiet loud"))
    return LanguageTokenizer.of_words(said.lower().split())


def config(base: EnCodec) -> MusicGenConfig:
    text = StackConfig(num_layers=1, num_heads=2, head_dim=32, mlp=Unbiased(hidden_dim=128), scale=1.0)
    return MusicGenConfig(
        text=EncDecConfig(
            vocab_size=tokenizer().vocab_size, dim=64, encoder=text, decoder=text, norm=RMS(), position=RelativeBias(),
            post_norm=False, start_id=0, pad_id=0, logit_scale=64**-0.5,
        ),
        backbone=ConditionedConfig(
            dim=128, context=512,
            stack=StackConfig(
                num_layers=4, num_heads=4, head_dim=32, mlp=Unbiased(hidden_dim=512, activation="gelu")
            ),
        ),
        codec=lowered(base, BANDWIDTH), num_codebooks=4,
    )  # fmt: skip


def model(name: str = CODEC) -> MusicGen:
    """A fresh one around a trained codec."""
    base = codec(name)
    made = MusicGen.build(config(base))
    install(base, made.codec)
    made.tokenizer = tokenizer()
    return made


# ---- what it learns from


def clip(piece: instruments.Piece, rate: int) -> Float[np.ndarray, " samples"]:
    """The beginning of a piece, silence behind its end."""
    wave, samples = instruments.render(piece, rate)[: round(SECONDS * rate)], round(SECONDS * rate)
    return np.pad(wave, (0, samples - len(wave)))


@dataclass(frozen=True)
class Described:
    """Pieces as codes, and a new caption whenever one comes round."""

    pieces: Sequence[instruments.Piece]
    codes: Int16[Tensor, "pieces books frames"]

    def __len__(self) -> int:
        return len(self.pieces)

    def batch(self, indices: Sequence[int], rng: np.random.Generator) -> Batch:
        texts = [instruments.caption(self.pieces[i], rng) for i in indices]
        ids = [tokenizer().encode(text, special=True) for text in texts]
        return Batch(text_batch(ids), codes=self.codes[list(indices)].long())


@lru_cache(maxsize=1)
def described(name: str, count: int) -> Described:
    """Training pieces, rendered and coded once."""
    base, pieces = codec(name), [instruments.piece("train", i) for i in range(count)]
    waves = (clip(piece, base.sample_rate) for piece in pieces)
    return Described(pieces, torch.stack(coded(base, waves, base.config.codebooks_at(BANDWIDTH))))


# ---- what it is asked for


@lru_cache(maxsize=1)
def judge(name: str, known: int) -> Namer:
    """Who plays: learned from pieces that MusicGen never heard, as recorded and through the codec, which plays nothing.

    ``known`` pieces of each instrument.
    """
    base, heard = codec(name), {instrument: list[instruments.Piece]() for instrument in INSTRUMENTS}
    for piece in instruments.pieces("train", seed=1):
        if len(heard[piece.instrument]) < known:
            heard[piece.instrument].append(piece)
        if all(len(pieces) == known for pieces in heard.values()):
            break
    waves = [clip(piece, base.sample_rate) for pieces in heard.values() for piece in pieces]
    codes = torch.stack(coded(base, waves, base.config.codebooks_at(BANDWIDTH))).long()
    again = [wave for few in codes.split(50) for wave in base.reconstruct(few)[:, 0]]
    both = torch.stack([statistics(wave) for wave in [*map(torch.from_numpy, waves), *again]])
    return Namer.fit(both, torch.arange(len(INSTRUMENTS)).repeat_interleave(known).repeat(2))


def evaluate(trained: nn.Module, *, name: str = CODEC, asked: int = ASKED, known: int = KNOWN) -> dict[str, float]:
    """How often the judge names the instrument of a caption; of another one; and in sounds that nobody generated."""
    assert isinstance(trained, MusicGen)
    rate, rng = trained.sample_rate, np.random.default_rng(0)
    pieces = [instruments.piece("keys", i) for i in range(asked)]
    texts = [instruments.caption(piece, rng) for piece in pieces]
    played = torch.tensor([INSTRUMENTS.index(piece.instrument) for piece in pieces])
    ways = [Drawing(frames=round(SECONDS * rate / trained.hop), guidance=GUIDANCE, seed=i) for i in range(asked)]
    written = torch.stack(whole(trained, trained.prompt(texts), ways))
    recorded = torch.from_numpy(np.stack([clip(piece, rate) for piece in pieces]))
    sounds = {
        "recorded": recorded,
        "coded": _sounding(trained, trained.quantize(recorded[:, None])),
        "instrument": _sounding(trained, written),
    }
    verdict = judge(name, known)
    named = {kind: verdict.names(torch.stack([*map(statistics, waves)])) for kind, waves in sounds.items()}
    found = {kind: float((names == played).float().mean()) for kind, names in named.items()}
    least = wilson(int((named["instrument"] == played).sum()), asked).low
    other = float((named["instrument"] == played.roll(1)).float().mean())
    return {**found, "instrument/least": least, "instrument/other": other}


def _sounding(trained: MusicGen, codes: Int[Tensor, "clips books frames"]) -> Float[Tensor, "clips samples"]:
    return torch.cat([trained.reconstruct(few)[:, 0] for few in codes.split(50)])


def run(
    steps: int = STEPS,
    *,
    name: str = CODEC,
    pieces: int = PIECES,
    batch_size: int = BATCH,
    asked: int = ASKED,
    known: int = KNOWN,
) -> Run:
    """``name`` is of the codec: one that we ship, or the folder of a trained one."""
    return Run(
        name="nano-musicgen",
        header=Header(
            command="polymodal train recipes/nano/musicgen.py --out runs/nano-musicgen",
            machine="1 CPU core with AVX512-BF16", time="not yet run", expected="the instrument of 70 % of the pieces",
        ),
        model=partial(model, name),
        stages=[
            Stage(
                name="compose", steps=steps, batch_size=batch_size, source=partial(described, name, pieces), lr=2e-3,
                schedule=Cosine(warmup=min(100, steps // 10)), weight_decay=0.1, betas=(0.9, 0.95), precision="auto",
                ema=0.998, workers=1,
            )
        ],
        evaluate=partial(evaluate, name=name, asked=asked, known=known),
        # Set before any run.
        expect={"instrument": Bar(value=0.70, chance=1 / len(INSTRUMENTS))},
    )  # fmt: skip
