"""What Qwen2-VL and Qwen2.5-VL share: a tower, a merger, a decoder with positions in three axes. No system itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from jaxtyping import Float
from PIL import Image as PILImage
from torch import Tensor

from polymodal.backbones.decoder import AttentionConfig, Decoder, DecoderConfig, Gated
from polymodal.backbones.families import FAMILIES, ControlIds
from polymodal.backbones.mrope import check_sections, mrope_positions
from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError, UnsupportedError
from polymodal.core.sample import Video
from polymodal.core.tokens import Modality, Tokens
from polymodal.core.verbs import TensorSpec
from polymodal.encoders.qwen_vision import Merger, QwenVision, QwenVisionConfig, qwen_vision_rules
from polymodal.modalities.smart_resize import SmartResize, load_smart_resize
from polymodal.nn.norm import RMS
from polymodal.nn.rope import Rope
from polymodal.systems.generator import Generator
from polymodal.tokenizers.chat import Placeholder
from polymodal.weights.format import Format, Reference
from polymodal.weights.rules import Rule, read_only

_CONTROL: Final = ControlIds(start=151643, stop=(151645,))


@dataclass(frozen=True, kw_only=True)
class QwenVLConfig:
    """A tower and a decoder.

    Attributes:
        image_id: the token in whose place a vector of a picture is put; ``video_id`` of a clip.
        start_id: the token before a medium; ``end_id`` after it.
    """

    vision: QwenVisionConfig
    backbone: DecoderConfig
    image_id: int = 151655
    video_id: int = 151656
    start_id: int = 151652
    end_id: int = 151653
    control: ControlIds = _CONTROL

    def __post_init__(self) -> None:
        check_sections(self.backbone)


def qwen2_decoder(
    dim: int, hidden: int, layers: int, heads: int, kv_heads: int, vocab: int, *, tied: bool, context: int
) -> DecoderConfig:
    """The decoder of the released models of this size."""
    attention = AttentionConfig(num_heads=heads, num_kv_heads=kv_heads, head_dim=128, qkv_bias=True)
    return DecoderConfig(
        vocab_size=vocab, context=context, dim=dim, num_layers=layers, attention=attention, tied=tied,
        mlp=Gated(hidden_dim=hidden), norm=RMS(), position=Rope(theta=1e6, sections=(16, 24, 24)),
    )  # fmt: skip


class QwenVL(Generator):
    """Base of the two: their parts, built and initialised, and how they read."""

    config: QwenVLConfig

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__(config)
        self.vision = QwenVision(config.vision)
        self.connector = Merger(config.vision, config.backbone.dim)
        self.backbone = Decoder(config.backbone)
        self.media_id, self.clip_id, self.stop_ids = config.image_id, config.video_id, config.control.stop

    def init_weights(self) -> None:
        self.vision.init_weights()
        self.connector.init_weights()
        self.backbone.init_weights()

    def inputs_spec(self) -> dict[str, TensorSpec]:
        """A picture of one token, and text."""
        c, m = self.config, self.config.vision.merge_size
        high = min(self.vocab_size, c.image_id, c.video_id)
        row = TensorSpec(shape=(), dtype=torch.int64, rows=True)
        return {
            "ids": TensorSpec(shape=(8,), dtype=torch.int64, high=high, head=(c.image_id,)),
            "labels": TensorSpec(shape=(8,), dtype=torch.int64, high=high),
            "patches": TensorSpec(shape=(m**2, c.vision.patch_dim)), "patches_row": row,
            "grid": TensorSpec(shape=(3,), dtype=torch.int64, head=(1, m, m)), "grid_row": row,
            # For the reference: 0 text, 1 picture, 2 clip. Here the ids say it.
            "kinds": TensorSpec(shape=(8,), dtype=torch.int64, head=(1,)),
        }  # fmt: skip

    def features(self, batch: Batch) -> Float[Tensor, "features dim"]:
        return self.connector(self.vision(batch["patches"], batch["grid"]))

    def layout(self, batch: Batch, x: Float[Tensor, "batch tokens dim"]) -> Tokens:
        """Causal throughout, in three axes where there are media."""
        tokens, ids, m = super().layout(batch, x), batch["ids"], self.config.vision.merge_size
        if "grid" not in batch:
            return tokens
        grid = batch["grid"] // batch["grid"].new_tensor([1, m, m])
        position = mrope_positions(self.places(ids), grid, batch["grid_row"], self.intervals(batch))
        modality = tokens.modality.masked_fill(ids == self.config.image_id, int(Modality.IMAGE))
        modality = modality.masked_fill(ids == self.config.video_id, int(Modality.VIDEO))
        return replace(tokens, position=position, modality=modality)

    def intervals(self, batch: Batch) -> Float[Tensor, " media"] | None:
        """Ids from one step of each medium in time to the next; None if that is one."""
        return None

    def see(self, pictures: Sequence[PILImage.Image | Video]) -> tuple[list[list[int]], Batch]:
        if not isinstance(self.images, SmartResize):
            raise UnsupportedError(f"{self.source} has no image processor")
        counts, batch = self.images(pictures)
        ids = [self.config.video_id if isinstance(medium, Video) else self.config.image_id for medium in pictures]
        return [[i] * count for i, count in zip(ids, counts, strict=True)], batch

    def default_images(self) -> SmartResize:
        return default_images(self.config)

    def _media(self) -> dict[str, Placeholder]:
        c, tokenizer = self.config, self.tokenizer
        assert tokenizer is not None
        names = [tokenizer.backend.id_to_token(i) for i in (c.start_id, c.end_id, c.image_id, c.video_id)]
        before, after, picture, clip = (name or "" for name in names)
        if None in names:
            raise ConfigError(
                f"{self.source}: the tokenizer lacks a token that frames a picture or clip, or stands for it"
            )
        return {
            "image": Placeholder(picture, before=before, after=after),
            "video": Placeholder(clip, before=before, after=after),
        }


def default_images(c: QwenVLConfig) -> SmartResize:
    """The image processor that follows from a config."""
    v = c.vision
    return SmartResize(patch_size=v.patch_size, merge_size=v.merge_size, temporal_size=v.temporal_size)


def reference_of(name: str) -> Reference:
    """transformers' class of this name."""
    return Reference(
        package="transformers", cls=name,
        inputs={
            "ids": "input_ids", "labels": "labels", "patches": "pixel_values", "grid": "image_grid_thw",
            "kinds": "mm_token_type_ids",
        },
        output="logits",
    )  # fmt: skip


def rules_hf(c: QwenVLConfig) -> list[Rule]:
    """The names of the Hub's files."""

    def decoder(base: str) -> list[Rule]:
        return FAMILIES["qwen2"].rules(c.backbone, base, "lm_head", "backbone")

    # As the modules are called in memory since transformers 4.52, which some files have.
    inner = [r for r in decoder("model.language_model") if r.theirs != ("lm_head.weight",)]
    later = read_only([*qwen_vision_rules(c.vision, "model.visual"), *inner])
    return [*qwen_vision_rules(c.vision, "visual"), *decoder("model"), *later]


def format_of(read: Callable[[Mapping[str, Any]], tuple[Any, dict[str, str]]], write: Callable[..., Any]) -> Format:
    """The Hub's format, with a system's own reader and writer of configs."""
    return Format(
        read=read, write=write, rules=rules_hf,
        read_images=lambda folder, config: load_smart_resize(folder) or default_images(config),
    )  # fmt: skip
