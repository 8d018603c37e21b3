"""Chameleon: text and pictures as tokens of one vocabulary, read and written by one decoder.

Paper: Chameleon Team, "Chameleon: Mixed-Modal Early-Fusion Foundation Models", 2024, https://arxiv.org/abs/2405.09818.
Official code: facebookresearch/chameleon. Hub: facebook/chameleon-7b, facebook/chameleon-30b.

    picture -> VQGAN (frozen) -> codes -> their tokens --+
                                                         [begin, 1,024 of them, end] in the text -> decoder
    text -> tokens --------------------------------------+
    tokens of codes -> VQGAN's decoder -> picture

Training details kept here: the tokens of pictures are learned as those of text are, in one loss, with a z-loss of
1e-5 against logits that drift; queries and keys are normed head by head, with a scale and a shift of each head's own;
the large model has its norms behind attention and feed-forward. A picture is written whole: behind its begin token
there are exactly its codes, then the end (`samplers.modes.Interleaved`). The paper trains with AdamW at 1e-4, betas
0.9 and 0.95, epsilon 1e-5, weight decay 0.1, clipping at 1, 4,000 steps of warm-up and an exponential decay.

Deviations: no dropout (the paper's small model has 0.1). transformers hides the scores of all codes, so that it writes
text alone: here they are live. Files of the Hub have no decoder of pictures, and are loaded without; where one is
among the weights, ``vq_config`` says ``"has_decoder": true``. Pictures are guided away from the empty prompt, not from
a picture without text, too. Each turn of a chat ends in ``<reserved08706>``, as the official code's.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import ClassVar, final

import torch

from polymodal.backbones.decoder import Decoder
from polymodal.core.verbs import TensorSpec
from polymodal.modalities.image import CenterCrop, ImageProcessor, ShortestEdge
from polymodal.samplers.autoregressive import Settings
from polymodal.samplers.modes import Mode
from polymodal.systems.chameleon_files import LARGE, ChameleonConfig, published, read_hf, rules_hf, write_hf
from polymodal.systems.unified import Unified
from polymodal.tokenizers.vq import VQModel
from polymodal.weights.format import Format


@final
class Chameleon(Unified):
    """One decoder for text and pictures."""

    config: ChameleonConfig
    writing: ClassVar[Settings] = Settings(temperature=0.7, top_p=0.9, guidance=3.0)  # the official code's

    def __init__(self, config: ChameleonConfig) -> None:
        super().__init__(config)
        c = config
        self.vision = VQModel(c.vision).requires_grad_(False)
        self.backbone = Decoder(c.backbone)
        self.media_id = c.image_id
        self.stop_ids = (() if c.turn_id is None else (c.turn_id,)) + c.control.stop
        self.modes = (
            Mode(kind="image", begin=c.start_id, end=c.end_id, books=(c.code_ids,), rounds=c.vision.num_codes),
        )

    def init_weights(self) -> None:
        self.backbone.init_weights()
        self.vision.init_weights()

    def default_images(self) -> ImageProcessor:
        side, one = self.config.vision.resolution, (1.0, 1.0, 1.0)
        crop = CenterCrop(height=side, width=side)
        return ImageProcessor(
            resize=ShortestEdge(size=side), crop=crop, resample="lanczos", rescale=0.0078, mean=one, std=one
        )

    def inputs_spec(self) -> dict[str, TensorSpec]:
        c, n = self.config, self.config.vision.num_codes
        marks = sorted({2, *c.code_ids, c.start_id, c.end_id, c.image_id, c.backbone.vocab_size})
        low, high = max(itertools.pairwise(marks), key=lambda pair: pair[1] - pair[0])  # plain text
        picture = (c.start_id, *[c.image_id] * n, c.end_id)
        text = TensorSpec(shape=(n + 8,), dtype=torch.int64, low=low + 1, high=high, head=picture)
        side = c.vision.resolution
        return {
            "ids": text, "labels": text, "pixels": TensorSpec(shape=(c.vision.net.channels, side, side)),
            "pixels_row": TensorSpec(shape=(), dtype=torch.int64, rows=True),
        }  # fmt: skip


Chameleon.formats = {"hf": Format(read=read_hf, write=write_hf, rules=rules_hf)}
PRESETS = {"facebook/chameleon-7b": partial(published, {}), "facebook/chameleon-30b": partial(published, LARGE)}
