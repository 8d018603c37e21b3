"""wav2vec 2.0: speech representations learned from sound alone, and letters read off them.

Paper: Baevski et al., "wav2vec 2.0: A Framework for Self-Supervised Learning of Speech Representations", 2020,
https://arxiv.org/abs/2006.11477. Official code: facebookresearch/fairseq (examples/wav2vec).
Hub: facebook/wav2vec2-base, facebook/wav2vec2-large-lv60 (pre-trained); facebook/wav2vec2-base-960h,
facebook/wav2vec2-large-960h-lv60-self (which write).

    16 kHz -> 7 convolutions (50 a second) -+-> spans hidden -> positions, Transformer -> cosines with the right code
                                            +-> product quantiser ---------------------->   and with 100 others
    the same tower -> a letter or none at each step -> CTC

Training details kept here: codes drawn with Gumbel noise and passed straight through, its temperature falling by
0.999995 a step from 2 to 0.5 (0.1 for LARGE); distractors from the hidden places of the same sound, equal codes left
out; the diversity loss; the learned vector in hidden places; the official initialisation. Fine-tuning hides spans of
time (and of channels) and keeps the convolutions: ``model.audio.convs.requires_grad_(False)``.

Deviations: no dropout and no layer drop. As in transformers, the gradient of the convolutions is not scaled by 0.1 and
their outputs have no penalty, which the official pre-training adds. Adapters (MMS) are not read. Long sound is heard in
windows of 20 s that end between two words.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from polymodal.core.batch import IGNORE, Batch, Loss, padded
from polymodal.core.errors import UnsupportedError
from polymodal.core.files import write_json
from polymodal.core.sample import Sample
from polymodal.core.transcript import Heard, Listening, Segment, Word
from polymodal.core.verbs import TensorSpec
from polymodal.encoders.wav2vec2 import Wav2Vec2Tower, Wav2Vec2TowerConfig
from polymodal.heads.ctc import CTCConfig, CTCHead, Said
from polymodal.heads.speech_codes import SpeechCodes, SpeechCodesConfig, draw_negatives
from polymodal.modalities.audio import seconds
from polymodal.modalities.mel import PREPROCESSOR, RawWave, declared_sounds
from polymodal.samplers.speech import Tape
from polymodal.systems.listening import Transcriber
from polymodal.systems.wav2vec2_files import Wav2Vec2Config, read_hf, rules_hf, write_hf
from polymodal.tokenizers.characters import VOCAB, Characters
from polymodal.weights.format import Format, Reference

WINDOW: Final = 20.0  # seconds that are heard at once


def large(config: Wav2Vec2Config) -> Wav2Vec2Config:
    """The same objective over the LARGE tower."""
    tower = Wav2Vec2TowerConfig(
        dim=1024, num_layers=24, num_heads=16, hidden_dim=4096, conv_bias=True, conv_norm="layer", pre_norm=True
    )
    head = config.head
    if isinstance(head, SpeechCodesConfig):
        head = replace(head, code_dim=768, proj_dim=768, gumbel_floor=0.1)
    return replace(config, audio=tower, head=head)


_PRETRAINED = Wav2Vec2Config(audio=Wav2Vec2TowerConfig(), head=SpeechCodesConfig())
_WRITES = replace(_PRETRAINED, head=CTCConfig())
PRESETS = {
    "facebook/wav2vec2-base": lambda: _PRETRAINED,
    "facebook/wav2vec2-base-960h": lambda: _WRITES,
    "facebook/wav2vec2-large-lv60": lambda: large(_PRETRAINED),
    "facebook/wav2vec2-large-960h-lv60-self": lambda: large(_WRITES),
}


@final
class Wav2Vec2(Transcriber):
    """wav2vec 2.0, pre-training or writing."""

    config: Wav2Vec2Config
    tokenizer: Characters | None = None  # type: ignore[assignment]

    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__(config)
        c = config
        self.audio = Wav2Vec2Tower(c.audio)
        some = c.times.share > 0 or c.channels.share > 0
        self.hidden = nn.Parameter(torch.empty(c.audio.dim)) if some else None
        self.head = (
            CTCHead(c.head, c.audio.dim)
            if isinstance(c.head, CTCConfig)
            else SpeechCodes(c.head, c.audio.dim, c.audio.conv_dims[-1])
        )
        self.sounds = RawWave(masked=c.audio.conv_norm == "layer")

    @torch.no_grad()
    def init_weights(self) -> None:
        self.audio.init_weights()
        self.head.init_weights()
        if self.hidden is not None:
            nn.init.uniform_(self.hidden)

    def inputs_spec(self) -> dict[str, TensorSpec]:
        c = self.config
        spec = {"wave": TensorSpec(shape=(c.audio.samples(max(12, 3 * c.times.length)),))}
        if isinstance(c.head, CTCConfig):
            spec["labels"] = TensorSpec(shape=(3,), dtype=torch.int64, low=1, high=c.head.vocab_size)
        return spec

    def _steps(self, batch: Batch) -> Int[Tensor, " batch"]:
        wave = batch["wave"]
        whole = torch.full((len(wave),), wave.shape[1], device=wave.device)
        return self.config.audio.frames(batch.get("lengths", whole))

    def vectors(self, batch: Batch, features: Float[Tensor, "batch frames channels"]) -> tuple[Tensor, Tensor]:
        """What the tower makes of features; and which were hidden: those that ``hidden`` says, random ones in training.

        Args:
            batch: ``wave``; ``lengths`` in samples where the tower is told of the padding; ``hidden`` steps, if chosen.
            features: of the waves.
        """
        c, steps = self.config, self._steps(batch)
        x = self.audio.projection(features)
        hidden = batch.get("hidden")
        if hidden is None and c.times.share > 0 and (self.training or isinstance(self.head, SpeechCodes)):
            hidden = c.times.draw(steps, x.shape[1])
        if hidden is None:
            hidden = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        if self.hidden is not None and c.hides:
            x = torch.where(hidden[..., None], self.hidden.to(x.dtype), x)
        if self.training and c.hides and c.channels.share > 0:
            widths = torch.full((len(x),), x.shape[2], device=x.device)
            x = x.masked_fill(c.channels.draw(widths, x.shape[2])[:, None], 0.0)
        valid = torch.arange(x.shape[1], device=x.device) < steps[:, None] if "lengths" in batch else None
        return self.audio(x, valid), hidden

    def forward(self, batch: Batch) -> Float[Tensor, "batch frames *width"]:
        """Scores of the letters at each step; without letters, the vectors that are compared with codes."""
        features = self.audio.features(batch["wave"])
        seen = Batch({"hidden": torch.zeros(features.shape[:2], dtype=torch.bool, device=features.device), **batch})
        x, _ = self.vectors(seen, features)
        return self.head(x) if isinstance(self.head, CTCHead) else self.head.query(x)

    def loss(self, batch: Batch) -> Loss:
        """Contrast and diversity at the hidden places; or CTC of the ``labels``, -100 behind their ends.

        The batch may choose the ``hidden`` steps and their ``negatives`` (rows of the flattened batch) itself.
        """
        features = self.audio.features(batch["wave"])
        x, hidden = self.vectors(batch, features)
        if isinstance(self.head, CTCHead):
            return self.head.loss(self.head(x), self._steps(batch), batch["labels"])
        negatives = batch.get("negatives")
        if negatives is None:
            negatives = draw_negatives(hidden, self.head.config.num_negatives)
        return self.head(x, features, hidden, negatives)

    def after_step(self, step: int, total_steps: int) -> None:
        if isinstance(self.head, SpeechCodes):
            self.head.after_step(step)

    def lesson(self, waves: Sequence[Float[Tensor, " _"]], texts: Sequence[str] = ()) -> Batch:
        """What `loss` reads of mono waveforms and, for a model that writes, of what is said in each."""
        wave, lengths = self.sounds(waves)
        batch = Batch(wave=wave)
        if self.sounds.masked:
            batch["lengths"] = lengths
        if texts:
            batch["labels"] = padded([self._letters().encode(text) for text in texts], fill=IGNORE)
        return batch

    def count(self, sample: Sample) -> int:
        """Vectors that the tower makes of the sounds of a sample."""
        rate = self.sample_rate
        return sum(int(self.config.audio.frames(torch.tensor(round(seconds(a) * rate)))) for a in sample.audios)

    # -- the Transcribes protocol

    @property
    def sample_rate(self) -> int:
        return self.sounds.sample_rate

    @torch.no_grad()
    def words_of(self, wave: Float[Tensor, " samples"]) -> list[list[Said]]:
        """The letters of each word in a piece of sound, and where they are.

        Raises:
            UnsupportedError: the model writes no letters, or has no vocabulary.
        """
        if not isinstance(self.head, CTCHead):
            raise UnsupportedError(f"{self.source} was pre-trained on sound alone and writes no letters")
        letters = self._letters()
        path = self.head.path(self(self.lesson([wave]).to(self.device))[0])
        return [[path[place] for place in word] for word in letters.words(one.token for one in path)]

    def transcribe_stream(
        self, blocks: Iterable[Float[Tensor, " samples"]], listening: Listening, *, after: Heard | None = None
    ) -> Iterator[Heard]:
        if listening.language is not None or listening.task != "transcribe":
            raise UnsupportedError(
                f"{self.source} writes the one language that it learned: no language, no translation"
            )
        tape, stride = Tape(blocks), self.config.audio.stride
        at, size, least = after.until if after else 0, round(WINDOW * self.sample_rate), self.config.audio.samples(1)
        while len(wave := tape.read(at, size)) >= least:
            said, end = self.words_of(wave), len(wave)
            if end == size and len(said) > 1:  # the last word may be cut: it is left to the next window
                end = (said[-2][-1].stop + said[-1][0].start) * stride // 2
                said = said[:-1]
            yield Heard(segments=(self._segment(said, at, listening.words),) if said else (), until=at + end)
            at += end

    def _segment(self, said: Sequence[Sequence[Said]], at: int, words: bool) -> Segment:
        letters, step, rate = self._letters(), self.config.audio.stride, self.sample_rate
        heard = tuple(
            Word(
                text=" " + letters.decode(one.token for one in word), start=(at + word[0].start * step) / rate,
                end=(at + word[-1].stop * step) / rate,
                probability=math.exp(statistics.fmean(one.logprob for one in word)),
            )
            for word in said
        )  # fmt: skip
        logprob = statistics.fmean(one.logprob for word in said for one in word)
        text = "".join(word.text for word in heard)
        return Segment(
            start=heard[0].start, end=heard[-1].end, text=text, words=heard if words else (), logprob=logprob
        )

    def _letters(self) -> Characters:
        if self.tokenizer is None:
            raise UnsupportedError(f"{self.source} writes no text: no {VOCAB} was beside its weights (set .tokenizer)")
        return self.tokenizer

    # -- files

    @property
    def fingerprint(self) -> str:
        """Hash of the weights, the config and the pre-processing."""
        return hashlib.sha256(repr((super().fingerprint, self.sounds)).encode()).hexdigest()[:16]

    def load_processors(self, folder: Path) -> None:
        if (folder / VOCAB).is_file():
            self.tokenizer = Characters.from_folder(folder)
        declared = declared_sounds(folder)
        if isinstance(declared, RawWave):
            self.sounds = declared

    def save_processors(self, folder: Path) -> None:
        super().save_processors(folder)
        write_json(folder / PREPROCESSOR, self.sounds.to_hf())

    reference = Reference(
        package="transformers", cls="Wav2Vec2ForPreTraining", inputs={"wave": "input_values"},
        output="projected_states", loss=False,
    )  # fmt: skip


Wav2Vec2.formats = {"hf": Format(read=read_hf, write=write_hf, rules=rules_hf)}
