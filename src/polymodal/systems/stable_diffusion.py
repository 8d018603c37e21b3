"""Stable Diffusion 1 and 2: pictures of a text, out of noise that a U-Net takes off the latents of an autoencoder.

Paper: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2021,
https://arxiv.org/abs/2112.10752. Official code: CompVis/stable-diffusion, Stability-AI/stablediffusion (version 2).
Hub: stable-diffusion-v1-5/stable-diffusion-v1-5, CompVis/stable-diffusion-v1-4, stabilityai/stable-diffusion-2-1-base,
stabilityai/stable-diffusion-2-1, ...

    text -> CLIP's text tower (frozen), 77 tokens after its last norm -----------------+
                                                                               cross-attention
    noisy latents, step -> U-Net -> the noise (2.1 at 768 pixels: the velocity) that is in them
    latents -> the autoencoder's decoder (frozen) -> pixels

Training details kept here: latents are drawn from the autoencoder's posterior and multiplied by 0.18215; a step of
1,000 is drawn for each picture, with betas whose roots grow evenly from 0.00085 to 0.012; one text in ten is replaced
by the empty one; squared error. Convolutions and maps that join a shortcut, and the last one, start at zero. The
official code trains with AdamW at 1e-4 and keeps a moving average of the weights, which is what its files hold.

Deviations: version 2 is read as it lies on the Hub, its text tower without OpenCLIP's last layer. A text of more than
77 tokens is refused, not cut. The Hub's filter of pictures (``safety_checker``) is not read: no part of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, final

from polymodal.systems.latent_painting import TextPainter
from polymodal.systems.stable_diffusion_files import (
    PARTS,
    SIZES,
    StableDiffusionConfig,
    base_rules,
    read_base,
    write_base,
)
from polymodal.weights.format import Format, write_whole
from polymodal.weights.pipeline import CLASS, pipeline

PIPELINES: Final = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")


@final
class StableDiffusion(TextPainter):
    """Latent diffusion, told by the tokens of a text."""

    config: StableDiffusionConfig

    def __init__(self, config: StableDiffusionConfig) -> None:
        super().__init__(config, config)


def read_hf(raw: Mapping[str, Any]) -> tuple[StableDiffusionConfig, dict[str, str]]:
    f = pipeline(raw, *PIPELINES)
    config = read_base(f, raw)
    return config, f.done()


def write_hf(c: StableDiffusionConfig) -> dict[str, Any]:
    return write_whole(c, {CLASS: PIPELINES[0], **write_base(c)}, read_hf)


StableDiffusion.formats = {"hf": Format(read=read_hf, write=write_hf, rules=base_rules, parts=PARTS)}
PRESETS = SIZES
