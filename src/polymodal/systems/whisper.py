"""Whisper: speech in many languages to text with times, from weak labels at scale.

Paper: Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision", 2022,
https://arxiv.org/abs/2212.04356. Official code: openai/whisper. Hub: openai/whisper-tiny, openai/whisper-tiny.en, ...,
openai/whisper-large-v2, openai/whisper-large-v3, openai/whisper-large-v3-turbo.

    30 s of sound -> log-mel -> two convolutions, sinusoids -> encoder --+
                                                                         cross-attention
    text before, start, language, task, times and text so far -> decoder --+-> embedding table -> next token

Training details kept here: fixed sinusoids in the encoder, learned positions in the decoder; no bias on keys; matrices
drawn by fan-in, as the paper's table says (17); a prompt and its answer are one text whose loss leaves out the text
before; silence is answered by <|nospeech|>. The paper trains with AdamW (0.9, 0.98, 1e-6; weight decay 0.1), gradients
clipped at 1, the rate falling linearly from 1.5e-3 (tiny) to 1.75e-4 (large) after 2048 steps of warm-up; half of the
rows are told the text before.

Deviations: no dropout, layer drop, SpecAugment or BPE dropout (large-v2). Each window's log-mel is cut by the loudest
of that window, not of the whole sound, so that a stream needs no more than a window. Answers of a beam search are
compared as in transformers. Languages are found out in each window, not in the first one alone. The rules of writing
are in `samplers.timestamps` and `samplers.speech`, which know no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from polymodal.backbones.decoder import Learned, Plain
from polymodal.backbones.encdec import CrossDecoder, CrossDecoderConfig, StackConfig
from polymodal.core.batch import Batch, Loss, padded
from polymodal.core.errors import MediaError
from polymodal.core.transcript import Segment, Task
from polymodal.core.verbs import TensorSpec
from polymodal.encoders.whisper import (
    WhisperEncoder,
    WhisperEncoderConfig,
    fan_in_,
    read_whisper_encoder,
    write_whisper_encoder,
)
from polymodal.heads.lm import IGNORE, ahead, next_token_loss
from polymodal.modalities.mel import WhisperMel
from polymodal.nn.norm import Layer
from polymodal.systems.whisper_files import read_decoder, whisper_rules, write_decoder
from polymodal.systems.windows import WindowListener
from polymodal.weights.fields import Fields
from polymodal.weights.format import Format, Reference, write_whole
from polymodal.weights.rules import Rule


@dataclass(frozen=True, kw_only=True)
class WhisperConfig:
    """An encoder of sound and a decoder of text, equally wide."""

    encoder: WhisperEncoderConfig
    backbone: CrossDecoderConfig


def preset(
    dim: int, layers: int, heads: int, *, mels: int = 80, vocab: int = 51865, decoder_layers: int | None = None
) -> WhisperConfig:
    """A config of a published model; the English ones have one token less."""
    end = 50257 if vocab > 51864 else 50256
    return WhisperConfig(
        encoder=WhisperEncoderConfig(
            dim=dim, num_layers=layers, num_heads=heads, hidden_dim=4 * dim, num_mels=mels
        ),
        backbone=CrossDecoderConfig(
            vocab_size=vocab, dim=dim, norm=Layer(eps=1e-5), position=Learned(count=448), post_norm=False,
            start_id=end + 1, pad_id=end, fixed_id=end,
            decoder=StackConfig(
                num_layers=decoder_layers or layers, num_heads=heads, head_dim=64, mlp=Plain(hidden_dim=4 * dim),
                bias=True, key_bias=False,
            ),
        ),
    )  # fmt: skip


PRESETS = {
    "openai/whisper-tiny": lambda: preset(384, 4, 6),
    "openai/whisper-tiny.en": lambda: preset(384, 4, 6, vocab=51864),
    "openai/whisper-base": lambda: preset(512, 6, 8),
    "openai/whisper-small": lambda: preset(768, 12, 12),
    "openai/whisper-medium": lambda: preset(1024, 24, 16),
    "openai/whisper-large-v2": lambda: preset(1280, 32, 20),
    "openai/whisper-large-v3": lambda: preset(1280, 32, 20, mels=128, vocab=51866),
    "openai/whisper-large-v3-turbo": lambda: preset(1280, 32, 20, mels=128, vocab=51866, decoder_layers=4),
}


@final
class Whisper(WindowListener):
    """Speech to text with times."""

    config: WhisperConfig

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__(config)
        self.encoder = WhisperEncoder(config.encoder)
        self.backbone = CrossDecoder(config.backbone)
        self.mel = WhisperMel(num_mels=config.encoder.num_mels, seconds=config.encoder.positions // 50)

    @torch.no_grad()
    def init_weights(self) -> None:
        """The paper's "Gaussian fan-in"; the tables by their width, as the output layer that one of them is."""
        self.encoder.init_weights()
        fan_in_(self.backbone)
        for table in (self.backbone.embed_tokens, self.backbone.decoder.position):
            nn.init.normal_(table.weight, std=self.config.backbone.dim**-0.5)

    def inputs_spec(self) -> dict[str, TensorSpec]:
        c = self.config
        return {
            "features": TensorSpec(shape=(c.encoder.num_mels, 2 * c.encoder.positions)),
            "labels": TensorSpec(shape=(min(9, self.context),), dtype=torch.int64, high=c.backbone.vocab_size),
        }

    # -- training

    def _vectors(self, batch: Batch) -> Float[Tensor, "batch tokens dim"]:
        b, encoded = self.backbone, self.encode_sound(batch["features"])
        ids = batch["ids"] if "ids" in batch else b.shift(batch["labels"])
        return b.decoder(b.target(ids), b.source(encoded)).x

    def forward(self, batch: Batch) -> Float[Tensor, "batch tokens vocab"]:
        """Scores of each label, given the sound and the labels before it (or ``ids``, which end before the label)."""
        return self.backbone.logits(self._vectors(batch))

    def loss(self, batch: Batch) -> Loss:
        """Cross-entropy of the labels that are not -100."""
        return next_token_loss(*ahead(self._vectors(batch), batch["labels"]), self.backbone.logits)

    def lesson(
        self,
        waves: Sequence[Float[Tensor, " _"]],
        said: Sequence[Sequence[Segment] | None],
        *,
        task: Task = "transcribe",
        timestamps: bool = True,
        before: Sequence[Sequence[int]] | None = None,
    ) -> Batch:
        """What `loss` reads of windows and what is said in them.

        Args:
            waves: at most a window each.
            said: times are from the start of the window; of one that ends behind it, only where it begins is written.
                None: nobody speaks, and the model is to say so; an empty list: nobody speaks, and it writes nothing.
            task: what is written of the words.
            timestamps: whether with times.
            before: the tokens of the text before each window, which is not learned.

        Raises:
            MediaError: a sound is longer than the window, or a text than the context.
        """
        speech, rows, labels = self.speech, [], []
        for number, one in enumerate(said):
            earlier = [] if before is None else before[number]
            if one is None:
                row = [speech.start, speech.no_speech]
            else:
                language = one[0].language if one and one[0].language else next(iter(speech.languages), None)
                row = speech.prompt(language, task, timestamps=timestamps, before=earlier)
                row += self._write(one, timestamps)
            row.append(speech.end)
            skip = len(earlier) + 1 if row[0] == speech.previous else 0
            if len(row) - 1 > self.context:
                raise MediaError(f"text {number} has {len(row) - 1} tokens; this model writes at most {self.context}")
            rows.append(row[:-1])
            labels.append([IGNORE] * skip + row[1 + skip :])
        window = torch.stack([F.pad(wave, (0, self.mel.num_samples - len(wave))) for wave in waves])
        return Batch(
            features=self.mel(window), ids=padded(rows, fill=speech.end), labels=padded(labels, fill=IGNORE)
        )  # fmt: skip

    def _write(self, segments: Sequence[Segment], timestamps: bool) -> list[int]:
        words, speech = self.words(), self.speech
        out = [] if segments or not timestamps else [speech.first_time]
        for one in segments:
            text = words.guard(words.added).encode(one.text)
            start, end = (speech.first_time + round(t / speech.precision) for t in (one.start, one.end))
            if one.end > self.mel.seconds:
                return [*out, start] if timestamps else out
            out += [start, *text, end] if timestamps else text
        return out

    reference = Reference(
        package="transformers", cls="WhisperForConditionalGeneration",
        inputs={"features": "input_features", "labels": "labels"}, output="logits",
    )  # fmt: skip


def read_hf(raw: Mapping[str, Any]) -> tuple[WhisperConfig, dict[str, str]]:
    f = Fields(raw)
    f.require("model_type", "whisper")
    encoder = read_whisper_encoder(f)
    backbone = read_decoder(f, encoder.dim, encoder.activation)
    report = f.done()
    return WhisperConfig(encoder=encoder, backbone=backbone), report


def write_hf(c: WhisperConfig) -> dict[str, Any]:
    named = {"architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper"}
    raw = named | write_whisper_encoder(c.encoder) | write_decoder(c.backbone)
    return write_whole(c, raw, read_hf)


def rules_hf(config: WhisperConfig) -> list[Rule]:
    return whisper_rules()


Whisper.formats = {"hf": Format(read=read_hf, write=write_hf, rules=rules_hf)}
