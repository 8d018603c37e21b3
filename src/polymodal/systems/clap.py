"""CLAP: sounds and texts in one space, by contrast.

Paper: Wu et al., "Large-scale Contrastive Language-Audio Pretraining with Feature Fusion and Keyword-to-Caption
Augmentation", 2022, https://arxiv.org/abs/2211.06687. Official code: LAION-AI/CLAP.
Hub: laion/clap-htsat-unfused, laion/clap-htsat-fused, ...

    48 kHz -> decibels of 64 mels (10 s) -> HTSAT -> two layers --+
                                                                  cosine * exp(scale) -> symmetric cross-entropy
    text -> RoBERTa -> tanh layer over <s> -> two layers ---------+

Training details kept here: a scale for each direction, stored as logarithms that start at ln(1/0.07) and are clamped to
[0, ln 100]; HTSAT's initialisation; batch norm of the spectrogram; random pieces of sounds that are longer than 10 s
(`ClapMel` with a generator), or the fusion of the whole and a piece of each third; no weight decay on HTSAT's biases.

Deviations: no dropout. The official code takes a random one of a batch of short sounds for long; here none is, so a
vector depends on its own sound alone, and pieces are the middle ones unless a generator draws them. The loss is the
paper's: that of transformers' ClapModel turns the scores of sounds around and learns one direction twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from polymodal.backbones.bert import Bert, BertPooler, bert_init_
from polymodal.core.batch import Batch, Loss
from polymodal.core.errors import ConfigError, MediaError, UnsupportedError
from polymodal.core.files import write_json
from polymodal.core.sample import AUDIO_SUFFIXES, Sample
from polymodal.core.verbs import TensorSpec
from polymodal.encoders.htsat import HTSAT, HTSATConfig, WindowAttention
from polymodal.heads.contrastive import TwoWayHead
from polymodal.modalities.audio import decode
from polymodal.modalities.mel import PREPROCESSOR, ClapMel, declared_sounds
from polymodal.systems.base import Embedder
from polymodal.systems.clap_files import CLAPConfig, preset, read_hf, rules_hf, write_hf
from polymodal.tokenizers.text import TextTokenizer
from polymodal.weights.format import Format, Reference

PRESETS = {
    "laion/clap-htsat-unfused": preset(HTSATConfig()),
    "laion/clap-htsat-fused": preset(HTSATConfig(fusion=4)),
}


@final
class CLAP(Embedder):
    """Contrastive language-audio pre-training."""

    config: CLAPConfig
    suffixes: ClassVar[frozenset[str]] = AUDIO_SUFFIXES

    def __init__(self, config: CLAPConfig) -> None:
        super().__init__(config)
        c = config
        self.audio = HTSAT(c.audio)
        self.text = Bert(c.text)
        self.pool = BertPooler(c.text.dim)
        self.audio_projection = c.connector.build(c.audio.out_dim, c.embed_dim)
        self.text_projection = c.connector.build(c.text.dim, c.embed_dim)
        self.head = TwoWayHead()
        self.sounds = ClapMel(num_mels=c.audio.num_mels, long="rand_trunc" if c.audio.fusion is None else "fusion")
        # As many whole seconds as the tower has room for: 10, of all that were published.
        room = (c.audio.frames - 1) * self.sounds.hop // self.sounds.sample_rate
        self.sounds = replace(self.sounds, seconds=max(room, 1))

    def init_weights(self) -> None:
        self.audio.init_weights()
        bert_init_(self.text)
        bert_init_(self.pool)

    def inputs_spec(self) -> dict[str, TensorSpec]:
        a, t = self.config.audio, self.config.text
        views = 1 if a.fusion is None else 4
        return {
            "mel": TensorSpec(shape=(views, a.frames - 3, a.num_mels)),
            "longer": TensorSpec(shape=(1,), dtype=torch.bool),
            "ids": TensorSpec(shape=(min(t.context, 7),), dtype=torch.int64, low=2, high=t.vocab_size),
        }

    @property
    def embedding_dim(self) -> int:
        return self.config.embed_dim

    def prepare_audio(self, items: Sequence[Sample], generator: torch.Generator | None = None) -> Batch:
        """Spectrograms of one sound a sample; ``generator`` draws the pieces of long ones, as in training."""
        waves = [decode(item.audios[0], self.sounds.sample_rate)[0] for item in items]
        if any(len(wave) <= self.sounds.fft // 2 for wave in waves):
            raise MediaError("a sound of a few samples is too short to be heard")
        mel, longer = self.sounds(waves, generator)
        return Batch(mel=mel, longer=longer)

    def prepare_texts(self, items: Sequence[Sample]) -> Batch:
        if self.tokenizer is None:
            raise UnsupportedError(f"CLAP ({self.source}) reads no text: no tokenizer.json was beside its weights")
        ids, valid = self.tokenizer([s.texts[0].text for s in items])
        return Batch(ids=ids, valid=valid)

    def encode_sounds(
        self, mel: Float[Tensor, "batch views frames mels"], longer: Bool[Tensor, "batch 1"]
    ) -> Float[Tensor, "batch dim"]:
        return F.normalize(self.audio_projection(self.audio(mel, longer)).float(), dim=-1)

    def encode_texts(
        self, ids: Int[Tensor, "batch tokens"], valid: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch dim"]:
        first = self.pool(self.text(self.text.text(ids, valid)).x)
        return F.normalize(self.text_projection(first).float(), dim=-1)

    def encode(self, batch: Batch) -> Float[Tensor, "samples dim"]:
        batch = batch.to(self.device)
        return self.encode_texts(**batch) if "ids" in batch else self.encode_sounds(**batch)

    def _both(self, batch: Batch) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch dim"]]:
        sounds = self.encode_sounds(batch["mel"], batch["longer"])
        return sounds, self.encode_texts(batch["ids"], batch.get("valid"))

    def logits(
        self, sounds: Float[Tensor, "sounds dim"], texts: Float[Tensor, "texts dim"]
    ) -> Float[Tensor, "sounds texts"]:
        """Scaled cosines; their softmax over texts is the zero-shot probability."""
        return self.head.logits(sounds.to(self.device), texts.to(self.device)).to(sounds.device)

    def forward(self, batch: Batch) -> Float[Tensor, "sounds texts"]:
        return self.head.logits(*self._both(batch))

    def loss(self, batch: Batch) -> Loss:
        """Symmetric cross-entropy over the pairs of a batch."""
        return self.head.loss(*self._both(batch))

    def after_step(self, step: int, total_steps: int) -> None:
        self.head.clamp()

    def no_decay(self) -> Iterable[str]:
        return (f"{name}.bias" for name, module in self.named_modules() if isinstance(module, WindowAttention))

    def count(self, sample: Sample) -> int:
        """Tokens that the towers compute for the parts of a sample."""
        texts = sum(self.prepare_texts([Sample((text,))])["ids"].shape[1] for text in sample.texts)
        return len(sample.audios) * self.config.audio.grid**2 + texts

    # -- files

    @property
    def fingerprint(self) -> str:
        """Hash of the weights, the config and the pre-processing."""
        return hashlib.sha256(repr((super().fingerprint, self.sounds)).encode()).hexdigest()[:16]

    def load_images(self, folder: Path, fmt: Format) -> None:
        return None

    def load_processors(self, folder: Path) -> None:
        """The tokenizer and the pre-processing of sound, where the folder has them.

        Raises:
            ConfigError: the pre-processing is not the one that this tower reads.
        """
        if (folder / "tokenizer.json").is_file():
            self.tokenizer = TextTokenizer.from_folder(folder, length=self.config.text.context)
        sounds = declared_sounds(folder)
        if isinstance(sounds, ClapMel):
            own, frames = self.sounds, self.config.audio.frames
            if (sounds.long, sounds.num_mels) != (own.long, own.num_mels) or sounds.num_frames > frames:
                raise ConfigError(
                    f"{folder}: its spectrograms ({sounds.num_mels} mels, {sounds.num_frames} frames, truncation "
                    f"{sounds.long}) are not what its tower reads ({own.num_mels} mels, {frames} frames, {own.long})"
                )
            self.sounds = sounds

    def save_processors(self, folder: Path) -> None:
        super().save_processors(folder)
        write_json(folder / PREPROCESSOR, self.sounds.to_hf())

    reference = Reference(
        package="transformers", cls="ClapModel", output="logits_per_audio", loss=False,
        inputs={"mel": "input_features", "longer": "is_longer", "ids": "input_ids", "valid": "attention_mask"},
    )  # fmt: skip


CLAP.formats = {"hf": Format(read=read_hf, write=write_hf, rules=rules_hf)}
