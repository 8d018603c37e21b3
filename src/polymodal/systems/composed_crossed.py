"""A composition with gated cross-attention: any ViT, a resampler or none, and any decoder that takes new tokens.

No paper has it; it is Flamingo (Alayrac et al., "Flamingo: a Visual Language Model for Few-Shot Learning", 2022,
https://arxiv.org/abs/2204.14198) with the parts left open. `polymodal.compose` makes one of the parts of other systems.

    picture -> ViT, all patches -> Perceiver resampler -------------------- keys and values
    text, a placeholder where a picture is -> embedding -> [gated block] -> layer -> ... -> next-token loss

Training details kept here: tower and language model are frozen; the resampler, the gated blocks and the vector of the
placeholder learn, weight decay is on the gated blocks alone. Gates start closed: a fresh composition is its language
model, exactly.

Deviations: those of the parts. There is no file format of others for it: names are ours. What the user says ends in a
new line, what the assistant says in the end token; few-shot prompts are turns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import final

from polymodal.backbones.families import FAMILIES
from polymodal.connectors.gated import GatedConfig
from polymodal.connectors.resampler import ResamplerConfig
from polymodal.core.chat import Chat
from polymodal.core.errors import ConfigError
from polymodal.encoders.vision_families import VISION_FAMILIES
from polymodal.modalities.image import ImageProcessor
from polymodal.systems.crossed import CrossedConfig, CrossedGenerator, parts_of
from polymodal.systems.tower import refuse_axes, squares
from polymodal.weights.fields import Fields
from polymodal.weights.native import native_format


@dataclass(frozen=True, kw_only=True)
class ComposedCrossedConfig(CrossedConfig):
    """A tower, a resampler or none, gated blocks and a decoder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_axes(self.backbone)
        if self.resampler is not None and self.resampler.num_frames is not None:
            raise ConfigError("gated cross-attention reads pictures: a resampler with num_frames=None")


@final
class ComposedCrossed(CrossedGenerator):
    """A vision-language model of parts that were chosen, and gated layers between those of its language model."""

    config: ComposedCrossedConfig
    untrained: tuple[str, ...] = ()  # parts of fresh weights, for `polymodal.composition.stages`

    def no_decay(self) -> list[str]:
        return [name for name, _ in self.named_parameters() if not name.startswith("gated_blocks.")]

    def spell(self, chat: Chat) -> Iterator[str | int]:
        """What the user says, a line, what the assistant says, its end token; pictures stand in their places."""
        before = ""
        for role, part in parts_of(chat):
            if before and role != before:
                yield from self._close(before)
            yield part if isinstance(part, str) else self.config.image_id
            before = role
        yield from self._close(before)

    def _close(self, role: str) -> Iterator[str | int]:
        if role != "assistant":
            yield "\n"
        elif self.stop_ids:
            yield self.stop_ids[0]

    def default_images(self) -> ImageProcessor:
        return squares(self.config.vision)


ComposedCrossed.formats = {"hf": native_format("polymodal_crossed", ComposedCrossedConfig)}


def preset(every: int) -> ComposedCrossedConfig:
    vision = VISION_FAMILIES["siglip_vision_model"].read(
        Fields({"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224})
    )
    backbone = FAMILIES["opt"].read(Fields({}))
    return ComposedCrossedConfig(
        vision=vision, resampler=ResamplerConfig(), backbone=backbone, new_tokens=1, image_id=backbone.vocab_size,
        gated=GatedConfig(num_heads=8, head_dim=64, hidden_dim=4 * backbone.dim), every=every,
    )  # fmt: skip


PRESETS = {f"siglip-base+gated{every}+opt-125m": partial(preset, every) for every in (1, 4)}
