"""LLaVA 1.0 and 1.5: the patches of a CLIP tower through a small connector, read by a language model as tokens.

Papers: Liu et al., "Visual Instruction Tuning", 2023, https://arxiv.org/abs/2304.08485 (1.0: one linear layer), and
"Improved Baselines with Visual Instruction Tuning", 2023, https://arxiv.org/abs/2310.03744 (1.5: 336 px and an MLP).
Official code: haotian-liu/LLaVA. Hub: llava-hf/llava-1.5-7b-hf, llava-hf/bakLlava-v1-hf, ...

    picture -> ViT, without its last layer and class token -> connector --+
                                                                          scatter -> decoder -> next-token loss
    text -> embedding ----------------------------------------------------+

Training details kept here: features of the layer before the last, not normed; the loss is on answers only; the
connector starts from normal weights. Stage 1 trains the connector alone at 1e-3, stage 2 connector
and language model at 2e-5; the tower is frozen in both.

Deviations: the tower's last layer and last norm, which nothing reads, are kept for the file's sake and never train.
Pictures are cropped as the Hub's processor says; the paper of 1.5 pads them to a square (``pad`` of the processor).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from jaxtyping import Float
from PIL import Image as PILImage
from torch import Tensor

from polymodal.connectors.mlp import Linear
from polymodal.core.batch import Batch
from polymodal.core.errors import UnsupportedError
from polymodal.core.verbs import TensorSpec
from polymodal.modalities.image import CLIP_MEAN, CLIP_STD, CenterCrop, ImageProcessor, ShortestEdge
from polymodal.systems.generator import TowerConfig, TowerGenerator, read_parts, rules_of_parts, write_parts
from polymodal.weights.fields import Fields
from polymodal.weights.format import Format, Reference


@dataclass(frozen=True, kw_only=True)
class LlavaConfig(TowerConfig):
    """A tower, a connector and a decoder."""


@final
class Llava(TowerGenerator):
    """A vision-language model of one tower, one connector and one decoder."""

    config: LlavaConfig

    def inputs_spec(self) -> dict[str, TensorSpec]:
        v, n = self.config.vision, self.config.num_features
        text = TensorSpec(shape=(n + 6,), dtype=torch.int64, low=3, high=min(self.vocab_size, self.config.image_id))
        return {
            "ids": replace(text, head=(self.config.image_id,) * n),
            "labels": text,
            "pixels": TensorSpec(shape=(v.num_channels, v.image_size, v.image_size)),
            "pixels_row": TensorSpec(shape=(), dtype=torch.int64, rows=True),
        }

    def features(self, batch: Batch) -> Float[Tensor, "features dim"]:
        return self.project(batch["pixels"]).flatten(0, 1)

    def see(self, pictures: Sequence[PILImage.Image]) -> tuple[list[list[int]], Batch]:
        if not isinstance(self.images, ImageProcessor):
            raise UnsupportedError(f"{self.source} has no image processor")
        spelled = [[self.config.image_id] * self.config.num_features for _ in pictures]
        return spelled, Batch(pixels=self.images.from_pil(pictures), pixels_row=torch.arange(len(pictures)))

    def default_images(self) -> ImageProcessor:
        side = self.config.vision.image_size
        return ImageProcessor(
            resize=ShortestEdge(size=side), resample="bicubic", crop=CenterCrop(height=side, width=side),
            mean=CLIP_MEAN, std=CLIP_STD,
        )  # fmt: skip

    reference = Reference(
        package="transformers", cls="LlavaForConditionalGeneration",
        inputs={"ids": "input_ids", "labels": "labels", "pixels": "pixel_values"}, output="logits",
    )  # fmt: skip


def read_hf(raw: Mapping[str, Any]) -> tuple[LlavaConfig, dict[str, str]]:
    f = Fields(raw)
    f.require("model_type", "llava")
    parts = read_parts(f)
    report = f.done()
    return LlavaConfig(**parts), report


def write_hf(c: LlavaConfig) -> dict[str, Any]:
    return {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", **write_parts(c)}


Llava.formats = {"hf": Format(read=read_hf, write=write_hf, rules=rules_of_parts)}

TOWER = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14, "projection_dim": 768, "model_type": "clip_vision_model",
}  # fmt: skip
VICUNA = {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}


def preset(text: Mapping[str, Any]) -> Callable[[], LlavaConfig]:
    raw = {"model_type": "llava", "vision_config": TOWER, "text_config": {**VICUNA, **text}}
    return lambda: read_hf(raw)[0]


PRESETS = {
    "liuhaotian/LLaVA-7b-v1": lambda: replace(
        read_hf({"model_type": "llava", "vision_config": TOWER | {"image_size": 224}, "text_config": VICUNA})[0],
        connector=Linear(),
    ),
    "llava-hf/llava-1.5-7b-hf": preset({}),
    "llava-hf/llava-1.5-13b-hf": preset(
        {
            "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
            "num_key_value_heads": 40,
        }
    ),
}  # fmt: skip
