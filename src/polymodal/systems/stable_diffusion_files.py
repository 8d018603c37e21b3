"""Stable Diffusion 1 and 2 as diffusers writes them, and the sizes that were published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from polymodal.backbones.unet import Level, Transformers, UNetConfig
from polymodal.backbones.unet_files import CLASS as UNET
from polymodal.backbones.unet_files import read_unet, unet_rules, write_unet
from polymodal.core.errors import ConfigError
from polymodal.encoders.clip_text import (
    CLIP_L,
    PLAIN,
    CLIPTextConfig,
    clip_text_rules,
    read_clip_text,
    write_clip_text,
)
from polymodal.encoders.text import TextConfig
from polymodal.nn.noise import Prediction
from polymodal.samplers.diffusion import PLMS, Diffusion
from polymodal.systems.scheduler_files import read_scheduler, write_scheduler
from polymodal.systems.vae_files import CLASS as VAE
from polymodal.systems.vae_files import read_vae, vae_rules, write_vae
from polymodal.tokenizers.pyramid import PyramidConfig
from polymodal.tokenizers.vae import VAEConfig
from polymodal.weights.fields import Fields
from polymodal.weights.files import SINGLE
from polymodal.weights.pipeline import DIFFUSION, diffusers_part, part, transformers_part
from polymodal.weights.rules import Rule

PARTS: Final = {"text_encoder": SINGLE, "unet": DIFFUSION, "vae": DIFFUSION}


@dataclass(frozen=True, kw_only=True)
class StableDiffusionConfig:
    """A text tower, a U-Net that reads its tokens, the autoencoder of its latents, and how it was trained."""

    text: CLIPTextConfig
    backbone: UNetConfig
    vae: VAEConfig
    sampling: Diffusion = field(default_factory=Diffusion)

    def __post_init__(self) -> None:
        c = self.backbone
        if c.context_dim != self.text.tower.dim or c.added is not None:
            raise ConfigError(f"a U-Net that reads tokens of {c.context_dim}, and a text of {self.text.tower.dim}")
        if not c.in_channels == c.out_channels == self.vae.pyramid.latent_dim:
            raise ConfigError(
                f"a U-Net from {c.in_channels} to {c.out_channels} channels, and latents of "
                f"{self.vae.pyramid.latent_dim}: those that read more (a mask, a picture) are not understood"
            )


def read_base(f: Fields, raw: Mapping[str, Any]) -> StableDiffusionConfig:
    """The config in a pipeline's; what is wrong is added to the problems of ``f``, which this raises.

    Raises:
        FieldsError: the parts cannot be read.
    """
    reason = "of a filter of pictures, no part of the model"
    f.ignore(reason, "safety_checker", "feature_extractor", "requires_safety_checker")
    f.ignore("read with its files", "tokenizer")
    f.require("image_encoder", None)
    text = read_clip_text(part(f, "text_encoder", PLAIN))
    backbone = read_unet(part(f, "unet", UNET))
    vae, sampling = read_vae(part(f, "vae", VAE)), read_scheduler(f, raw)
    f.done()
    return StableDiffusionConfig(text=text, backbone=backbone, vae=vae, sampling=sampling)


def write_base(c: StableDiffusionConfig) -> dict[str, Any]:
    """What `read_base` reads."""
    return {
        "feature_extractor": None, "image_encoder": None, "safety_checker": None, "requires_safety_checker": False,
        "scheduler": write_scheduler(c.sampling), "text_encoder": transformers_part(PLAIN, write_clip_text(c.text)),
        "tokenizer": transformers_part("CLIPTokenizer"), "unet": diffusers_part(UNET, write_unet(c.backbone)),
        "vae": diffusers_part(VAE, write_vae(c.vae)),
    }  # fmt: skip


def base_rules(c: StableDiffusionConfig) -> list[Rule]:
    """The tensors of these parts."""
    return [
        *clip_text_rules("text_encoder.", "text.", c.text),
        *unet_rules("unet.", "backbone.", c.backbone),
        *vae_rules("vae.", "vae.", c.vae),
    ]


def preset(
    text: TextConfig, heads: tuple[int, ...], side: int, prediction: Prediction, *, convolved: bool = False
) -> StableDiffusionConfig:
    """The published sizes."""
    shapes = [Transformers(num_heads=count) for count in heads]
    dims = (320, 640, 1280, 1280)
    return StableDiffusionConfig(
        text=CLIPTextConfig(tower=text, eot_id=text.vocab_size - 1),
        backbone=UNetConfig(
            levels=tuple(Level(dim=d, transformers=s) for d, s in zip(dims, [*shapes[:3], None], strict=True)),
            middle=shapes[3], context_dim=text.dim, side=side, convolved=convolved,
        ),
        vae=VAEConfig(pyramid=PyramidConfig(widths=(128, 256, 512, 512), latent_dim=4)),
        sampling=Diffusion(prediction=prediction, solver=PLMS(), offset=1, clean=False),
    )  # fmt: skip


_OPEN_CLIP = TextConfig(
    vocab_size=49408, context=77, dim=1024, num_layers=23, num_heads=16, hidden_dim=4096, activation="gelu"
)
_HEADS = (5, 10, 20, 20)
SIZES: Final = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": partial(preset, CLIP_L.tower, (8,) * 4, 64, "noise", convolved=True),
    "stabilityai/stable-diffusion-2-1-base": partial(preset, _OPEN_CLIP, _HEADS, 64, "noise"),
    "stabilityai/stable-diffusion-2-1": partial(preset, _OPEN_CLIP, _HEADS, 96, "velocity"),
}
