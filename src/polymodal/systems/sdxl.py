"""SDXL: Stable Diffusion with a larger U-Net, two text towers, and the sizes of the training pictures told to it.

Paper: Podell et al., "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis", 2023,
https://arxiv.org/abs/2307.01952. Official code: Stability-AI/generative-models. Hub:
stabilityai/stable-diffusion-xl-base-1.0, ...

    text -> CLIP ViT-L and OpenCLIP ViT-bigG (frozen), each before its last layer, side by side -> cross-attention
    vector of bigG's text, size and crop of the picture, size to be made -> added to the step --+
    noisy latents, step -------------------------------------------------------------------- U-Net -> the noise in them
    latents -> the autoencoder's decoder (frozen) -> pixels

Training details kept here: latents are drawn and multiplied by 0.13025; the schedule of Stable Diffusion; what is said
of a picture is its height and width before it was resized, the rows and columns cut off above and left, and the height
and width of the result; of dropped texts the tokens and the vector are zeros. It starts with Stable Diffusion's zeros.

Deviations: where a batch does not say so (``numbers``), pictures are neither resized nor cut. The empty text is zeros
wherever it is read, if the files say so (``force_zeros_for_empty_prompt``); diffusers encodes it where it is a prompt.
A text of more than 77 tokens is refused. The refiner, which has one tower and other numbers, is not read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from polymodal.backbones.unet import Added, Level, Transformers, UNet, UNetConfig
from polymodal.backbones.unet_files import CLASS as UNET
from polymodal.backbones.unet_files import read_unet, unet_rules, write_unet
from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError, UnsupportedError
from polymodal.core.verbs import TensorSpec
from polymodal.encoders.clip_text import (
    CLIP_G,
    CLIP_L,
    PLAIN,
    PROJECTED,
    CLIPText,
    CLIPTextConfig,
    clip_text_rules,
    read_clip_text,
    write_clip_text,
)
from polymodal.samplers.diffusion import Diffusion, Euler
from polymodal.systems.latent_painting import UNetPainter, checked_length, empty_ids, ids_spec, read_tokenizer
from polymodal.systems.painting import Condition
from polymodal.systems.scheduler_files import read_scheduler, write_scheduler
from polymodal.systems.vae_files import CLASS as VAE_CLASS
from polymodal.systems.vae_files import read_vae, vae_rules, write_vae
from polymodal.tokenizers.pyramid import PyramidConfig
from polymodal.tokenizers.text import TextTokenizer
from polymodal.tokenizers.vae import VAE, VAEConfig
from polymodal.weights.files import SINGLE
from polymodal.weights.format import Format, write_whole
from polymodal.weights.pipeline import DIFFUSION, diffusers_part, part, pipeline, transformers_part
from polymodal.weights.rules import Rule

PIPELINES: Final = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline")
NUMBERS: Final = 6  # height, width; rows and columns cut off; height and width of the result
FOLDERS: Final = ("tokenizer", "tokenizer_2")


@dataclass(frozen=True, kw_only=True)
class SDXLConfig:
    """Two text towers, of which the second is projected, a U-Net, and an autoencoder.

    ``zero_empty`` says whether the empty text is zeros.
    """

    text: CLIPTextConfig
    text_2: CLIPTextConfig
    backbone: UNetConfig
    vae: VAEConfig
    sampling: Diffusion = field(default_factory=Diffusion)
    zero_empty: bool = True

    def __post_init__(self) -> None:
        c, told = self.backbone, self.text.tower.dim + self.text_2.tower.dim
        if c.context_dim != told or self.text.tower.context != self.text_2.tower.context:
            raise ConfigError(f"a U-Net that reads tokens of {c.context_dim}, and texts of {told}")
        if c.added is None or c.added.dim != self.text_2.pooled_dim + NUMBERS * c.added.waves:
            raise ConfigError(f"SDXL adds a vector of {self.text_2.pooled_dim} and {NUMBERS} numbers, not {c.added}")
        if not c.in_channels == c.out_channels == self.vae.pyramid.latent_dim:
            raise ConfigError(
                f"a U-Net from {c.in_channels} to {c.out_channels} channels, latents of {self.vae.pyramid.latent_dim}"
            )


@final
class SDXL(UNetPainter):
    """Latent diffusion, told by two text towers, and of sizes."""

    config: SDXLConfig
    guidance: float = 5.0
    tokenizers: tuple[TextTokenizer, TextTokenizer] | None = None

    def __init__(self, config: SDXLConfig) -> None:
        super().__init__(config)
        self.text = CLIPText(config.text).requires_grad_(False)
        self.text_2 = CLIPText(config.text_2).requires_grad_(False)
        self.backbone = UNet(config.backbone)
        self.vae = VAE(config.vae).requires_grad_(False)
        self.sampling = config.sampling

    def init_weights(self) -> None:
        """Stable Diffusion's."""
        for part_of in (self.text, self.text_2, self.backbone, self.vae):
            part_of.init_weights()

    def inputs_spec(self) -> dict[str, TensorSpec]:
        c, (width, height) = self.config, self.size
        pixels = TensorSpec(shape=(c.vae.pyramid.channels, height, width))
        return {"pixels": pixels, "ids": ids_spec(c.text), "ids_2": ids_spec(c.text_2)}

    # -- texts

    def prompt(self, texts: Sequence[str]) -> Batch:
        if self.tokenizers is None:
            raise UnsupportedError(f"SDXL ({self.source}) reads no text: there are no tokenizers beside it")
        first, second = self.tokenizers
        checked_length(first, texts)
        empty = torch.tensor([not text.strip() for text in texts])
        return Batch(ids=first(texts)[0], ids_2=second(texts)[0], empty=empty)

    def drop(self, batch: Batch, rows: Bool[Tensor, " batch"]) -> Batch:
        out = Batch(batch, empty=rows | batch["empty"] if "empty" in batch else rows)
        towers = {"ids": self.text, "ids_2": self.text_2}
        for i, (name, tower) in enumerate(towers.items()):
            ids = batch[name]
            empty = empty_ids(None if self.tokenizers is None else self.tokenizers[i], tower)
            out[name] = torch.where(rows[:, None], empty[: ids.shape[1]].to(ids.device), ids)
        return out

    @torch.no_grad()
    def condition(self, batch: Batch) -> Condition:
        first, second = self.text(batch["ids"]), self.text_2(batch["ids_2"])
        context, pooled = torch.cat([first.before, second.before], 2), second.pooled
        if self.config.zero_empty and "empty" in batch:
            kept = ~batch["empty"]
            context, pooled = context * kept[:, None, None], pooled * kept[:, None]
        told = {"numbers": batch["numbers"]} if "numbers" in batch else {}
        return Batch(context=context, pooled=pooled, **told)

    # -- pictures

    def numbers(self, x: Float[Tensor, "batch channels rows columns"]) -> Float[Tensor, "batch numbers"]:
        """What is said of pictures with these latents that were neither resized nor cut."""
        height, width = (side * self.multiple for side in x.shape[2:])
        told = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32, device=x.device)
        return told.expand(len(x), -1)

    def denoise(
        self, x: Float[Tensor, "batch *latents"], when: Float[Tensor, " batch"], condition: Condition
    ) -> Float[Tensor, "batch *latents"]:
        numbers = condition["numbers"] if "numbers" in condition else self.numbers(x)
        return self.backbone(x, when, condition["context"], pooled=condition["pooled"], numbers=numbers)

    # -- files

    def load_processors(self, folder: Path) -> None:
        first, second = (read_tokenizer(folder / name, self.config.text) for name in FOLDERS)
        self.tokenizers = None if first is None or second is None else (first, second)

    def save_processors(self, folder: Path) -> None:
        for name, tokenizer in zip(FOLDERS, self.tokenizers or (), strict=False):
            tokenizer.save(folder / name)


def read_hf(raw: Mapping[str, Any]) -> tuple[SDXLConfig, dict[str, str]]:
    f = pipeline(raw, *PIPELINES)
    f.ignore("read with their files", *FOLDERS)
    f.ignore("about what is done to finished pictures", "add_watermarker", "feature_extractor")
    f.require("image_encoder", None)
    f.require("requires_aesthetics_score", False)
    zero_empty = f.take("force_zeros_for_empty_prompt", bool, True)
    text = read_clip_text(part(f, "text_encoder", PLAIN))
    text_2 = read_clip_text(part(f, "text_encoder_2", PROJECTED), projected=True)
    backbone = read_unet(part(f, "unet", UNET))
    vae = read_vae(part(f, "vae", VAE_CLASS))
    sampling = read_scheduler(f, raw)
    report = f.done()
    return SDXLConfig(
        text=text, text_2=text_2, backbone=backbone, vae=vae, sampling=sampling, zero_empty=zero_empty
    ), report  # fmt: skip


def write_hf(c: SDXLConfig) -> dict[str, Any]:
    raw = {
        "_class_name": PIPELINES[0], "feature_extractor": None, "image_encoder": None,
        "force_zeros_for_empty_prompt": c.zero_empty, "scheduler": write_scheduler(c.sampling),
        "text_encoder": transformers_part(PLAIN, write_clip_text(c.text)),
        "text_encoder_2": transformers_part(PROJECTED, write_clip_text(c.text_2)),
        **{name: transformers_part("CLIPTokenizer") for name in FOLDERS},
        "unet": diffusers_part(UNET, write_unet(c.backbone)), "vae": diffusers_part(VAE_CLASS, write_vae(c.vae)),
    }  # fmt: skip
    return write_whole(c, raw, read_hf)


def rules_hf(c: SDXLConfig) -> list[Rule]:
    return [
        *clip_text_rules("text_encoder.", "text.", c.text),
        *clip_text_rules("text_encoder_2.", "text_2.", c.text_2),
        *unet_rules("unet.", "backbone.", c.backbone),
        *vae_rules("vae.", "vae.", c.vae),
    ]


SDXL.formats = {
    "hf": Format(
        read=read_hf, write=write_hf, rules=rules_hf,
        parts={"text_encoder": SINGLE, "text_encoder_2": SINGLE, "unet": DIFFUSION, "vae": DIFFUSION},
    )
}  # fmt: skip


def base() -> SDXLConfig:
    """https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0"""
    levels = (
        Level(dim=320),
        Level(dim=640, transformers=Transformers(num_heads=10, depth=2)),
        Level(dim=1280, transformers=Transformers(num_heads=20, depth=10)),
    )
    return SDXLConfig(
        text=CLIP_L,
        text_2=CLIP_G,
        backbone=UNetConfig(
            levels=levels, middle=Transformers(num_heads=20, depth=10), context_dim=2048, side=128, added=Added()
        ),
        vae=VAEConfig(pyramid=PyramidConfig(widths=(128, 256, 512, 512), latent_dim=4), scale=0.13025),
        sampling=Diffusion(solver=Euler(), offset=1),
    )


PRESETS = {"stabilityai/stable-diffusion-xl-base-1.0": base}
