"""Qwen2-Audio: sound as tokens of a language model, which talks about speech, music and noises.

Paper: Chu et al., "Qwen2-Audio Technical Report", 2024, https://arxiv.org/abs/2407.10759. Official code: transformers,
QwenLM/Qwen2-Audio. Hub: Qwen/Qwen2-Audio-7B, Qwen/Qwen2-Audio-7B-Instruct.

    sound, up to 30 s -> log-mel -> Whisper's encoder -> mean of two vectors -> norm -> linear --+ 25 a second
                                                                             scatter -> decoder -> next-token loss
    text -> embedding ---------------------------------------------------------------------------+

Training details kept here: the encoder is that of Whisper large-v3 and does not see the silence behind a sound; the
loss is on answers only. The paper trains on tasks, then on answers of two modes: talking about a sound, and answering a
voice.

Deviations: a fresh model is drawn as Whisper's and Qwen's own papers draw them, the linear layer as torch does; the
paper starts from both. A sound of more than a window is refused, where transformers cuts it. Layer drop and SpecAugment
are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image as PILImage
from torch import Tensor, nn

from polymodal.backbones.decoder import Decoder, DecoderConfig
from polymodal.backbones.families import FAMILIES, ControlIds
from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError, MediaError, UnsupportedError
from polymodal.core.files import write_json
from polymodal.core.sample import Audio, Video
from polymodal.core.verbs import TensorSpec
from polymodal.encoders.whisper import (
    WhisperEncoder,
    WhisperEncoderConfig,
    read_whisper_encoder,
    whisper_encoder_rules,
    write_whisper_encoder,
)
from polymodal.modalities.audio import blocks
from polymodal.modalities.mel import PREPROCESSOR, WhisperMel, declared_whisper
from polymodal.systems.generator import Generator
from polymodal.tokenizers.chat import Placeholder
from polymodal.weights.fields import Fields
from polymodal.weights.format import Format, Reference, write_whole
from polymodal.weights.rules import Rule, read_only, rule

N = TypeVar("N", int, Tensor)
_CONTROL: Final = ControlIds(start=151643, stop=(151645,))
_FRAMES: Final = ("<|audio_bos|>", "<|audio_eos|>")  # tokens around a sound where a template wants turns as strings
# The defaults of the Hub's config class for its tower.
_TOWER: Final = {
    "d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120, "num_mel_bins": 128
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Qwen2AudioConfig:
    """A tower and a decoder.

    Attributes:
        audio_id: the token in whose place a vector of a sound is put.
    """

    audio: WhisperEncoderConfig
    backbone: DecoderConfig
    audio_id: int = 151646
    control: ControlIds = _CONTROL

    def __post_init__(self) -> None:
        if self.audio.positions % 50:
            raise ConfigError(f"a window of {self.audio.positions} vectors is no whole seconds of 50")
        if not 0 <= self.audio_id < self.backbone.vocab_size:
            raise ConfigError(f"the placeholder {self.audio_id} is not in a vocabulary of {self.backbone.vocab_size}")


def heard_tokens(frames: N) -> N:
    """Tokens of a sound of so many log-mel frames: the one count that everybody uses.

    The second convolution halves, rounding up; the mean of two drops what is left over.
    """
    return (frames + 1) // 2 // 2


@final
class Qwen2Audio(Generator):
    """A language model that hears."""

    config: Qwen2AudioConfig

    def __init__(self, config: Qwen2AudioConfig) -> None:
        super().__init__(config)
        self.audio = WhisperEncoder(config.audio)
        self.connector = nn.Linear(config.audio.dim, config.backbone.dim)
        self.backbone = Decoder(config.backbone)
        self.sound_id, self.stop_ids = config.audio_id, config.control.stop
        self.mel = WhisperMel(num_mels=config.audio.num_mels, seconds=config.audio.positions // 50)

    @torch.no_grad()
    def init_weights(self) -> None:
        self.audio.init_weights()
        self.connector.reset_parameters()
        self.backbone.init_weights()

    def inputs_spec(self) -> dict[str, TensorSpec]:
        """A whole window of sound, and text."""
        c, row = self.config, TensorSpec(shape=(), dtype=torch.int64, rows=True)
        frames, high = self.mel.num_frames, min(self.vocab_size, c.audio_id)
        text = TensorSpec(shape=(heard_tokens(frames) + 6,), dtype=torch.int64, high=high)
        return {
            "ids": replace(text, head=(c.audio_id,) * heard_tokens(frames)),
            "labels": text,
            "mels": TensorSpec(shape=(c.audio.num_mels, frames)), "mels_row": row,
            "heard": TensorSpec(shape=(frames,), dtype=torch.bool), "heard_row": row,
        }  # fmt: skip

    def blank(self) -> Batch:
        silence = Audio(torch.zeros(self.mel.sample_rate // 4).numpy(), rate=self.mel.sample_rate)
        return self.see([silence])[1].to(self.device)

    def see(self, pictures: Sequence[PILImage.Image | Video | Audio]) -> tuple[list[list[int]], Batch]:
        """For each sound the ids that stand for it; and the log-mels of all.

        Raises:
            UnsupportedError: something else is among them.
            MediaError: a sound is longer than a window, or too short for one token.
        """
        spelled, mels, frames = [], [], []
        for sound in pictures:
            if not isinstance(sound, Audio):
                raise UnsupportedError(f"{type(self).__name__} reads no pictures and clips, it hears sound")
            mel = self.mel
            wave = next(blocks(sound, mel.sample_rate, mel.seconds + 1))  # what is too long is not read to its end
            if wave.shape[1] > mel.num_samples:
                raise MediaError(
                    f"{sound.where}: this model hears {mel.seconds} s at a time, and it is longer: cut it, or choose a "
                    "piece, Audio(path, start=..., end=...)"
                )
            frames.append(-(-wave.shape[1] // mel.hop))
            spelled.append([self.config.audio_id] * heard_tokens(frames[-1]))
            if not spelled[-1]:
                raise MediaError(f"{sound.where}: {wave.shape[1]} samples are too short to be heard")
            mels.append(mel(wave)[0])
        rows = torch.arange(len(frames))
        heard = torch.arange(self.mel.num_frames) < torch.tensor(frames)[:, None]
        return spelled, Batch(mels=torch.stack(mels), mels_row=rows, heard=heard, heard_row=rows)

    def features(self, batch: Batch) -> Float[Tensor, "features dim"]:
        frames = batch["heard"].sum(1, keepdim=True)
        place = torch.arange(self.config.audio.positions, device=frames.device)
        mels = batch["mels"].to(self.audio.conv1.weight.dtype)
        x = self.audio.trunk(mels, mask=(place < (frames + 1) // 2)[:, None, None])
        x = self.audio.norm(F.avg_pool1d(x.transpose(1, 2), 2).transpose(1, 2))
        return self.connector(x[place[: x.shape[1]] < heard_tokens(frames)])

    # -- files

    def load_processors(self, folder: Path) -> None:
        super().load_processors(folder)
        self.mel = declared_whisper(folder, self.mel)

    def save_processors(self, folder: Path) -> None:
        super().save_processors(folder)
        write_json(folder / PREPROCESSOR, {**self.mel.to_hf(), "processor_class": "Qwen2AudioProcessor"})

    def _media(self) -> dict[str, Placeholder]:
        assert self.tokenizer is not None
        token = self.tokenizer.backend.id_to_token(self.config.audio_id)
        if token is None:
            raise ConfigError(f"{self.source}: the tokenizer has no token {self.config.audio_id}, which is a sound")
        before, after = (t if self.tokenizer.backend.token_to_id(t) is not None else "" for t in _FRAMES)
        return {"audio": Placeholder(token, before=before, after=after)}

    reference = Reference(
        package="transformers", cls="Qwen2AudioForConditionalGeneration",
        inputs={
            "ids": "input_ids", "labels": "labels", "mels": "input_features", "heard": "feature_attention_mask"
        },
        output="logits",
    )  # fmt: skip


def read_hf(raw: Mapping[str, Any]) -> tuple[Qwen2AudioConfig, dict[str, str]]:
    tower = raw.get("audio_config")
    f = Fields({**raw, "audio_config": _TOWER | dict(tower)} if isinstance(tower, Mapping) else raw)
    f.require("model_type", "qwen2_audio")
    f.ignore("the text's says it, or it is a constant of the loss", "vocab_size", "ignore_index")
    a, t = f.child("audio_config"), f.child("text_config")
    a.require("model_type", "qwen2_audio_encoder")
    t.require("model_type", "qwen2")
    t.require("use_mrope", False)
    family = FAMILIES["qwen2"]
    parts: dict[str, Any] = {
        "audio": read_whisper_encoder(a),
        "backbone": family.read(t),
        "control": ControlIds.read(t, _CONTROL),
    }
    audio_id = f.take("audio_token_id" if "audio_token_id" in f else "audio_token_index", int, 151646)
    report = f.done()
    return Qwen2AudioConfig(**parts, audio_id=audio_id), report


def write_hf(c: Qwen2AudioConfig) -> dict[str, Any]:
    text = {"model_type": "qwen2", **FAMILIES["qwen2"].write(c.backbone), **c.control.write()}
    raw = {
        "architectures": ["Qwen2AudioForConditionalGeneration"], "model_type": "qwen2_audio",
        "audio_config": {"model_type": "qwen2_audio_encoder", **write_whisper_encoder(c.audio)}, "text_config": text,
        "audio_token_index": c.audio_id,
    }  # fmt: skip
    return write_whole(c, raw, read_hf)


def rules_hf(c: Qwen2AudioConfig) -> list[Rule]:
    def decoder(base: str, head: str) -> list[Rule]:
        return FAMILIES["qwen2"].rules(c.backbone, base, head, "backbone")

    rules = [
        *whisper_encoder_rules("audio_tower.", "audio."),
        rule("multi_modal_projector.linear.{p}", "connector.{p}"),
    ]
    # As the modules are called in memory by the latest transformers, which some files have.
    inner = [r for r in rules if r.theirs]
    later = [rule(f"model.{r.theirs[0]}", r.ours[0], r.op) for r in inner] + decoder("model.language_model", "lm_head")
    return [*rules, *decoder("language_model.model", "language_model.lm_head"), *read_only(later)]


# The preprocessor of these folders is one of sound.
Qwen2Audio.formats = {"hf": Format(read=read_hf, write=write_hf, rules=rules_hf, read_images=lambda *_: None)}
_TEXT = {
    "model_type": "qwen2", "vocab_size": 156032, "intermediate_size": 11008, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
}  # fmt: skip
PRESETS = dict.fromkeys(
    ("Qwen/Qwen2-Audio-7B", "Qwen/Qwen2-Audio-7B-Instruct"),
    lambda: read_hf({"audio_config": _TOWER, "text_config": _TEXT})[0],
)
