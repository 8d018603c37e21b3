"""A composition: any ViT, any connector that puts tokens into the prompt, and any decoder or encoder-decoder.

No paper has it; it is LLaVA (Liu et al., "Visual Instruction Tuning", 2023, https://arxiv.org/abs/2304.08485) with the
parts left open. `polymodal.compose` makes one of the parts of other systems.

    picture or clip -> ViT -> connector --+
                                          scatter -> decoder -> next-token loss
    text -> embedding --------------------+       or encoder, whose decoder answers

Training details kept here: the loss is on answers only; every connector starts as the paper has it that brought it.
What trains at which rate belongs to the stage (`polymodal.composition.stages`).

Deviations: those of the parts. There is no file format of others for it: names are ours. A backbone without a chat
template gets a plain one, ``USER:`` and ``ASSISTANT:`` on lines of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias, final

import torch
from jaxtyping import Float
from PIL import Image as PILImage
from torch import Tensor

from polymodal.backbones.decoder import DecoderConfig, Learned
from polymodal.backbones.encdec import EncDecConfig
from polymodal.backbones.families import FAMILIES, ControlIds
from polymodal.connectors.grid import PixelShuffle, Pooling
from polymodal.connectors.mlp import MLP, Linear
from polymodal.connectors.qformer import QFormerConfig
from polymodal.connectors.resampler import ResamplerConfig
from polymodal.core.batch import Batch
from polymodal.core.chat import Chat
from polymodal.core.errors import ConfigError, MediaError, UnsupportedError
from polymodal.core.sample import Text, Video
from polymodal.core.verbs import TensorSpec
from polymodal.encoders.fresh import init_tower
from polymodal.encoders.vision_families import VISION_FAMILIES
from polymodal.encoders.vit import ViT, ViTConfig
from polymodal.heads.lm import IGNORE
from polymodal.modalities.image import ImageProcessor
from polymodal.modalities.video import decode, open_video, spread
from polymodal.systems.seq2seq import EitherGenerator
from polymodal.systems.tower import refuse_axes, squares
from polymodal.tokenizers.chat import ChatTemplate, Placeholder
from polymodal.tokenizers.language import LanguageTokenizer
from polymodal.weights.fields import Fields
from polymodal.weights.native import native_format

InPrompt: TypeAlias = Linear | MLP | PixelShuffle | Pooling | QFormerConfig | ResamplerConfig
"""Connectors whose vectors stand in the prompt as tokens."""

PLAIN_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{- 'ASSISTANT:\\n' + message.content + (eos_token or '') + '\\n' -}}
{%- else -%}
{{- ('USER:\\n' if message.role == 'user' else '') + message.content + '\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:\\n' -}}{%- endif -%}
"""


@dataclass(frozen=True, kw_only=True)
class ComposedConfig:
    """A tower, a connector and a language model.

    Attributes:
        image_id: the token in whose place a feature of a picture is put; it may lie behind the vocabulary.
        video_id: the same for clips, of a connector that reads them.
        layers: how many of the tower's layers are read; None reads all and the last norm.
        keep_class: whether the class token and registers are features, too.
    """

    vision: ViTConfig
    connector: InPrompt
    backbone: DecoderConfig | EncDecConfig
    image_id: int
    video_id: int | None = None
    layers: int | None = None
    keep_class: bool = False
    control: ControlIds = field(default_factory=ControlIds)

    def __post_init__(self) -> None:
        c, position = self.connector, self.backbone.position
        if self.layers is not None and not 1 <= self.layers <= self.vision.num_layers:
            raise ConfigError(f"features of layer {self.layers} of a tower of {self.vision.num_layers}")
        if self.keep_class and not self.vision.num_prefix:
            raise ConfigError("keep_class: this tower has no class token to keep")
        if self.keep_class and isinstance(c, PixelShuffle | Pooling):
            raise ConfigError(f"{type(c).__name__} reads a grid, in which a class token has no place: keep_class=False")
        if isinstance(c, QFormerConfig) and c.text is not None:
            raise ConfigError("a Q-Former that reads text is BLIP-2's first stage: take text=None")
        refuse_axes(self.backbone)
        if self.video_id is not None and not self.frames:
            raise ConfigError(
                f"{type(c).__name__} reads no clips: Pooling(frames=...), ResamplerConfig(num_frames=...)"
            )
        reach = self.backbone.context if isinstance(self.backbone, DecoderConfig) else None
        reach = position.count if isinstance(position, Learned) else reach
        most = max(self.num_features, self.clip_features)
        if reach is not None and most >= reach:
            raise ConfigError(
                f"one medium becomes {most} tokens, and the backbone reads {reach}: no room for a question. Take a "
                "connector that makes fewer (pixel shuffle, pooling, Q-Former, resampler), or a smaller tower"
            )

    @property
    def _cells(self) -> int:
        side = self.vision.image_size
        return self.vision.count(side, side) - (0 if self.keep_class else self.vision.num_prefix)

    @property
    def num_features(self) -> int:
        """Vectors that a picture becomes."""
        return self.connector.count(self._cells)

    @property
    def frames(self) -> int:
        """Of a clip that are read; 0 where none are."""
        c = self.connector
        return c.frames if isinstance(c, Pooling) else (c.num_frames or 0) if isinstance(c, ResamplerConfig) else 0

    @property
    def clip_features(self) -> int:
        """Vectors that a clip becomes."""
        c = self.connector
        return 0 if not self.frames else c.count_clip(self._cells) if isinstance(c, Pooling) else self.num_features


@final
class Composed(EitherGenerator):
    """A vision-language model of parts that were chosen."""

    config: ComposedConfig
    untrained: tuple[str, ...] = ()  # parts of fresh weights, for `polymodal.composition.stages`

    def __init__(self, config: ComposedConfig) -> None:
        super().__init__(config)
        c = config
        self.vision = ViT(c.vision)
        self.connector = c.connector.build(c.vision.dim, c.backbone.dim)
        self.add_backbone(c.backbone)
        self.has_template = self.seq2seq is None
        self.media_id, self.clip_id, self.stop_ids = c.image_id, c.video_id, c.control.stop
        if c.layers is not None:  # what nothing reads does not learn
            self.vision.blocks[c.layers :].requires_grad_(False)
            self.vision.norm.requires_grad_(False)
        if self.vision.mask_token is not None:
            self.vision.mask_token.requires_grad_(False)

    @torch.no_grad()
    def init_weights(self) -> None:
        init_tower(self.vision)
        self.connector.init_weights()
        self.init_backbone()

    def inputs_spec(self) -> dict[str, TensorSpec]:
        c, v, n = self.config, self.config.vision, self.config.num_features
        whole = TensorSpec(shape=(n + 6,), dtype=torch.int64, low=3, high=min(self.vocab_size, c.image_id))
        number = TensorSpec(shape=(), dtype=torch.int64, rows=True)
        return {
            "ids": replace(whole, head=(c.image_id,) * n),
            "labels": replace(whole, head=(IGNORE,) * n) if self.seq2seq is None else replace(whole, shape=(5,)),
            "pixels": TensorSpec(shape=(v.num_channels, v.image_size, v.image_size)),
            "pixels_row": number,
            "frames": TensorSpec(shape=(), dtype=torch.int64, low=1, high=2),
            "frames_row": number,
        }

    # -- reading

    def see(self, pictures: Sequence[PILImage.Image | Video]) -> tuple[list[list[int]], Batch]:
        if not isinstance(self.images, ImageProcessor):
            raise UnsupportedError(f"{self.source} has no image processor")
        c = self.config
        # Frame by frame: those of a clip may be too large to be held together.
        each = [
            [self.images.from_pil([p]) for p in (self._frames(m) if isinstance(m, Video) else [m])] for m in pictures
        ]
        spelled = [
            [c.video_id or 0] * c.clip_features if isinstance(medium, Video) else [c.image_id] * c.num_features
            for medium in pictures
        ]
        number, counts = torch.arange(len(each)), torch.tensor([len(frames) for frames in each])
        pixels = torch.cat([frame for frames in each for frame in frames])
        return spelled, Batch(
            pixels=pixels, pixels_row=number.repeat_interleave(counts), frames=counts, frames_row=number
        )

    def _frames(self, clip: Video) -> Iterator[PILImage.Image]:
        times = spread(open_video(clip), self.config.frames, "closed")
        return (PILImage.fromarray(frame) for _, frame in decode(clip, times))

    def features(self, batch: Batch) -> Float[Tensor, "features dim"]:
        c = self.config
        x = self.vision(batch["pixels"], layers=c.layers).x
        x = x if c.keep_class else x[:, c.vision.num_prefix :]
        counts = batch["frames"].tolist()
        if all(count == 1 for count in counts):
            return self.connector(x).flatten(0, 1)
        media = [self.connector(frames if len(frames) == 1 else frames[None]) for frames in x.split(counts)]
        return torch.cat([medium.flatten(0, 1) for medium in media])

    # -- prompts

    def use_tokenizer(self, tokenizer: LanguageTokenizer) -> None:
        super().use_tokenizer(tokenizer)
        if self.template is None and self.seq2seq is None:
            self.template = ChatTemplate(PLAIN_TEMPLATE, media=self._media(), tokens=tokenizer.tokens)

    def _media(self) -> dict[str, Placeholder]:
        media = super()._media()
        if self.clip_id is not None and self.tokenizer is not None:
            token = self.tokenizer.backend.id_to_token(self.clip_id)
            if token is None:
                raise ConfigError(f"{self.source}: the tokenizer has no token {self.clip_id}, which stands for a clip")
            media["video"] = Placeholder(token, after="\n")
        return media

    def write_prompt(self, chat: Chat) -> list[int]:
        """By the chat template; media and text in their order, as its tokenizer frames a text, for an encoder."""
        if self.tokenizer is None or self.seq2seq is None:
            ids = super().write_prompt(chat)
            start = [] if self.tokenizer is None else list(self.tokenizer.prefix)
            return ids if ids[: len(start)] == start else start + ids
        if len(chat.turns) != 1 or chat.turns[0].role != "user":
            raise MediaError("an encoder-decoder answers one question of a user: it knows no turns")
        ids = list(self.tokenizer.prefix)
        for part in chat.turns[0].parts:
            if isinstance(part, Text):
                ids += self.tokenizer.encode(part.text, special=False)
            else:
                place = self.clip_id if isinstance(part, Video) else self.media_id
                ids += [] if place is None else [place]
        return [*ids, *self.tokenizer.suffix]

    def default_images(self) -> ImageProcessor:
        return squares(self.config.vision)


Composed.formats = {"hf": native_format("polymodal_composed", ComposedConfig)}

SO400M = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
    "image_size": 384, "patch_size": 14,
}  # fmt: skip
QWEN = {
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768, "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
}  # fmt: skip


def preset(connector: InPrompt, tower: Mapping[str, Any], text: Mapping[str, Any]) -> ComposedConfig:
    vision = VISION_FAMILIES["siglip_vision_model"].read(Fields(tower))
    backbone = FAMILIES["qwen2"].read(Fields(text))
    return ComposedConfig(
        vision=vision, connector=connector, backbone=backbone, image_id=151665, control=ControlIds(stop=(151645,))
    )


PRESETS = {
    f"siglip-so400m+{name}+qwen2.5-0.5b": partial(preset, connector, SO400M, QWEN)
    for name, connector in (
        ("shuffle3", PixelShuffle(factor=3)),
        ("pool2", Pooling(stride=2)),
        ("resampler", ResamplerConfig(num_heads=16, head_dim=72)),
    )
}
