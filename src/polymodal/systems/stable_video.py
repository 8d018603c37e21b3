"""Stable Video Diffusion: a film that begins with a picture, out of noise that a U-Net takes off all frames at once.

Paper: Blattmann et al., "Stable Video Diffusion: Scaling Latent Video Diffusion Models to Large Datasets", 2023,
https://arxiv.org/abs/2311.15127. Official code: Stability-AI/generative-models.
Hub: stabilityai/stable-video-diffusion-img2vid (14 frames), stabilityai/stable-video-diffusion-img2vid-xt (25).

    picture -> CLIP ViT-H (frozen) -> one vector -------------------------------------- cross-attention --+
    picture with some noise -> the autoencoder (frozen) -> latents, beside those of each frame --+        |
    pace, motion, that noise -> waves --+                                                        |        |
    strength of the noise --------------+-> residual blocks        noisy latents of the frames -> U-Net -> velocity
    latents of all frames -> the autoencoder's decoder, which looks at neighbouring frames -> pixels

Training details kept here: EDM's scaling with data of deviation one, which makes the network's target the velocity, and
errors count alike; the noise is log-normal (0.7, 1.6), that of the picture (-3, 0.5); latents of the picture are the
likeliest ones, not scaled; the pace is told as frames a second minus one. Layers over time, and what joins a shortcut,
start at zero. Guidance grows along the film, from none at the first frame. The paper trains with AdamW, EMA of weights.

Deviations: how often conditions are dropped is not said; here the vector, the latents or both are, in 10 % each. Norms
are as diffusers computes them (`backbones.unet_film`). All frames are decoded at once. The autoencoder is frozen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polymodal.backbones.unet import Added, Level, TransformerLayer, Transformers, UNet
from polymodal.backbones.unet_film import FilmUNetConfig
from polymodal.backbones.unet_film_files import CLASS as UNET
from polymodal.backbones.unet_film_files import film_unet_rules, read_film_unet, write_film_unet
from polymodal.core.batch import Batch, Loss
from polymodal.core.errors import ConfigError, UnsupportedError
from polymodal.core.files import write_json
from polymodal.core.filming import SettledFilm
from polymodal.core.verbs import TensorSpec
from polymodal.encoders.vision_families import VISION_FAMILIES
from polymodal.encoders.vit import ViT, ViTConfig
from polymodal.heads.diffusion import edm_loss
from polymodal.modalities.image import (
    CLIP_MEAN,
    CLIP_STD,
    CenterCrop,
    ImageProcessor,
    ShortestEdge,
    affine,
    load_processor,
)
from polymodal.nn.edm import Preconditioning, broad
from polymodal.nn.resize import shrunk
from polymodal.samplers.diffusion import Euler
from polymodal.samplers.edm import Karras
from polymodal.samplers.guidance import Dice
from polymodal.systems.base import PREPROCESSOR
from polymodal.systems.filming import FilmMaker
from polymodal.systems.scheduler_files import read_karras, write_karras
from polymodal.systems.vae_files import FILM_CLASS, read_film_vae, vae_rules, write_film_vae
from polymodal.tokenizers.film_vae import FilmPyramidConfig, FilmVAE
from polymodal.tokenizers.vae import VAEConfig
from polymodal.weights.files import SINGLE
from polymodal.weights.format import Format, write_whole
from polymodal.weights.pipeline import CLASS, DIFFUSION, diffusers_part, part, pipeline, transformers_part
from polymodal.weights.rules import Rule, rule

PIPELINE: Final = "StableVideoDiffusionPipeline"
SCALING: Final = Preconditioning(data=1.0, median=math.exp(0.7), spread=1.6, least=0.002, most=700.0)
NUMBERS: Final = 3  # that are told: pace, motion, noise
NOISE: Final = 0.02  # on the picture, when a film is made
_EYE: Final = VISION_FAMILIES["clip_vision_model"]


@dataclass(frozen=True, kw_only=True)
class StableVideoConfig:
    """A tower of CLIP and the width of its vector, a U-Net of films, their autoencoder, and how they are sampled."""

    vision: ViTConfig
    embed_dim: int
    backbone: FilmUNetConfig
    vae: VAEConfig
    sampling: Karras = field(default_factory=lambda: Karras(scaling=SCALING, solver=Euler(), most=700.0))

    def __post_init__(self) -> None:
        c, latent = self.backbone, self.vae.pyramid.latent_dim
        if c.context_dim != self.embed_dim or c.added is None or c.added.dim != NUMBERS * c.added.waves:
            raise ConfigError(f"a U-Net that reads {c.context_dim} and {c.added}, and a vector of {self.embed_dim}")
        if (c.in_channels, c.out_channels) != (2 * latent, latent):
            raise ConfigError(f"a U-Net from {c.in_channels} to {c.out_channels} channels, and latents of {latent}")


@final
class StableVideo(FilmMaker):
    """Latent diffusion of films, told by their first picture."""

    config: StableVideoConfig
    fps, motion = 7, 127

    def __init__(self, config: StableVideoConfig) -> None:
        super().__init__(config)
        c = config
        self.vision = ViT(c.vision).requires_grad_(False)
        self.projection = nn.Linear(c.vision.dim, c.embed_dim, bias=False).requires_grad_(False)
        self.backbone = UNet(c.backbone)
        for layer in self.backbone.modules():
            if isinstance(layer, TransformerLayer):  # what attends to one vector alone has nothing to choose
                for unused in (layer.cross_norm, layer.cross_attn.q_proj, layer.cross_attn.k_proj):
                    unused.requires_grad_(False)
        self.vae = FilmVAE(c.vae).requires_grad_(False)
        self.sampling, self.frames = c.sampling, c.backbone.frames
        self.multiple, side = c.vae.pyramid.factor, c.backbone.side
        # As many pixels as in its square, 16 to 9: 1024 x 576 are 768 x 768.
        self.size = (round(side * 4 / 3) * self.multiple, round(side * 3 / 4) * self.multiple)
        self.eye = ImageProcessor(
            resize=ShortestEdge(size=c.vision.image_size), mean=CLIP_MEAN, std=CLIP_STD,
            crop=CenterCrop(height=c.vision.image_size, width=c.vision.image_size),
        )  # fmt: skip

    def init_weights(self) -> None:
        """The official code's; what is frozen is drawn as for its own training."""
        _EYE.init(self.vision)
        nn.init.normal_(self.projection.weight, std=self.config.vision.dim**-0.5)
        self.backbone.init_weights()
        self.vae.init_weights()

    def inputs_spec(self) -> dict[str, TensorSpec]:
        width, height = self.size
        return {
            "pixels": TensorSpec(shape=(self.frames, self.config.vae.pyramid.channels, height, width)),
            "fps": TensorSpec(shape=()), "motion": TensorSpec(shape=()),
        }  # fmt: skip

    # -- what the U-Net is told

    def condition(
        self, first: Float[Tensor, "batch 3 height width"], noise: Float[Tensor, "batch 3 height width"],
        strength: Float[Tensor, " batch"], fps: Float[Tensor, " batch"], motion: Float[Tensor, " batch"],
    ) -> Batch:  # fmt: skip
        """Of first pictures in [-1, 1], of which the latents get standard normal ``noise`` of a ``strength``."""
        side, eye = self.config.vision.image_size, self.eye
        scale, shift = affine(1.0, eye.mean, eye.std, first.device)
        looked = (shrunk(first, side) / 2 + 0.5) * scale[:, None, None] + shift[:, None, None]
        vector = self.projection(self.vision.class_vector(looked.to(self.dtype)))
        latents = self.vae.posterior(first + broad(strength, first) * noise).mean
        numbers = torch.stack([fps - 1, motion, strength], 1)
        return Batch(context=vector[:, None], latents=latents, numbers=numbers.float())

    def denoise(
        self, x: Float[Tensor, "batch frames channels rows columns"], told: Float[Tensor, " batch"], condition: Batch
    ) -> Float[Tensor, "batch frames channels rows columns"]:
        """What EDM's scaling reads: against the velocity, which the network predicts."""
        seen = condition["latents"][:, None].expand(-1, x.shape[1], -1, -1, -1)
        both = torch.cat([x, seen], 2).flatten(0, 1).to(self.dtype)
        out = self.backbone(both, told, condition["context"].to(self.dtype), numbers=condition["numbers"])
        return -out.unflatten(0, x.shape[:2])

    # -- training

    def loss(self, batch: Batch) -> Loss:
        """EDM's, of films ``pixels`` in [-1, 1] with their ``fps`` and ``motion``.

        It may hold what else would be drawn: ``noise`` and ``deviation`` of the latents, ``posterior`` (noise of the
        autoencoder's), ``augment`` and ``strength`` of the noise on the first picture, ``chance`` (0 to 99).
        """
        films = batch["pixels"]
        rows, first = len(films), films[:, 0]
        drawn = (torch.randn(rows, device=films.device) * 0.5 - 3.0).exp()
        strength, augment = batch.get("strength", drawn), batch.get("augment", torch.randn_like(first))
        with torch.no_grad():
            x = self._latents(films, batch.get("posterior"))
            condition = self.condition(first, augment, strength, batch["fps"], batch["motion"])
        if self.training:
            chance = batch.get("chance", torch.randint(100, (rows,), device=films.device))
            for name, kept in (("context", chance >= 20), ("latents", (chance < 10) | (chance >= 30))):
                condition[name] = condition[name] * broad(kept.float(), condition[name])
        model, scaling = partial(self.denoise, condition=condition), self.sampling.scaling
        return edm_loss(model, x, scaling, noise=batch.get("noise"), deviation=batch.get("deviation"))[0]

    def _latents(self, films: Tensor, posterior: Tensor | None) -> Tensor:
        """Latents of all frames, drawn."""
        pictures = films.flatten(0, 1)
        channels, rows, columns = self.vae.shape((films.shape[4], films.shape[3]))
        if posterior is None:
            posterior = torch.randn(*films.shape[:2], channels, rows, columns, device=films.device)
        return self.vae.encode(pictures, posterior.flatten(0, 1)).unflatten(0, films.shape[:2])

    # -- the verb film

    def made(
        self,
        prompt: str,
        settled: SettledFilm,
        image: Float[Tensor, "1 3 height width"] | None,
        watch: Callable[[int, Callable[[], Tensor]], None],
    ) -> Float[Tensor, "frames 3 height width"]:
        s, scaling = settled, self.sampling.scaling
        if prompt or image is None:
            raise UnsupportedError(f"{type(self).__name__} ({self.source}) reads no text: give it a picture alone")
        assert s.motion is not None, "it is told of motion"
        dice = Dice([s.seed])
        fps, motion, strength = (torch.tensor([float(n)], device=image.device) for n in (s.fps, s.motion, NOISE))
        told = self.condition(image, dice(tuple(image.shape[1:]), image.device), strength, fps, motion)
        nothing = Batch(told, context=torch.zeros_like(told["context"]), latents=torch.zeros_like(told["latents"]))
        both = Batch.join([nothing, told])
        scale = torch.linspace(1, float(s.guidance), s.frames, device=image.device).view(1, -1, 1, 1, 1)

        def model(x: Tensor, deviation: Tensor) -> Tensor:
            x, when = broad(scaling.reads(deviation), x) * x, scaling.told(deviation)
            if s.guidance <= 1:
                return self.denoise(x, when, told).float()
            against, wanted = self.denoise(torch.cat([x, x]), torch.cat([when, when]), both).float().chunk(2)
            return against + scale * (wanted - against)

        points = self.sampling.points(s.steps)
        noise = dice((s.frames, *self.vae.shape(s.size)), image.device) * points[0].rest
        films = self.vae.films
        x = self.sampling.sample(model, noise, points, watch=lambda n, x: watch(n, lambda: films(x)[0]))
        return films(x)[0]

    # -- files

    def load_processors(self, folder: Path) -> None:
        if (folder / "feature_extractor").is_dir():
            eye = load_processor(folder / "feature_extractor")
            assert isinstance(eye, ImageProcessor), "CLIP's processor makes one square"
            self.eye = eye

    def save_processors(self, folder: Path) -> None:
        write_json(folder / "feature_extractor" / PREPROCESSOR, self.eye.to_hf())


def read_hf(raw: Mapping[str, Any]) -> tuple[StableVideoConfig, dict[str, str]]:
    f = pipeline(raw, PIPELINE)
    f.ignore("read with its files", "feature_extractor")
    eye = part(f, "image_encoder", "CLIPVisionModelWithProjection")
    eye.require("model_type", _EYE.model_type)
    vision, embed_dim = _EYE.read(eye), eye.take("projection_dim", int, 512)
    backbone, vae = read_film_unet(part(f, "unet", UNET)), read_film_vae(part(f, "vae", FILM_CLASS))
    most, least = read_karras(part(f, "scheduler", "EulerDiscreteScheduler"))
    report = f.done()
    sampling = Karras(scaling=SCALING, solver=Euler(), most=most, least=least)
    return StableVideoConfig(vision=vision, embed_dim=embed_dim, backbone=backbone, vae=vae, sampling=sampling), report


def write_hf(c: StableVideoConfig) -> dict[str, Any]:
    eye = {**_EYE.write(c.vision), "projection_dim": c.embed_dim, "architectures": ["CLIPVisionModelWithProjection"]}
    raw = {
        CLASS: PIPELINE, "feature_extractor": transformers_part("CLIPImageProcessor"),
        "image_encoder": transformers_part("CLIPVisionModelWithProjection", eye),
        "scheduler": write_karras(c.sampling.most, c.sampling.least),
        "unet": diffusers_part(UNET, write_film_unet(c.backbone)),
        "vae": diffusers_part(FILM_CLASS, write_film_vae(c.vae)),
    }  # fmt: skip
    return write_whole(c, raw, read_hf)


def rules_hf(c: StableVideoConfig) -> list[Rule]:
    return [
        *_EYE.rules("image_encoder.vision_model", "vision"),
        rule("image_encoder.visual_projection.weight", "projection.weight"),
        *film_unet_rules("unet.", "backbone."),
        *vae_rules("vae.", "vae.", c.vae),
    ]


StableVideo.formats = {
    "hf": Format(
        read=read_hf, write=write_hf, rules=rules_hf,
        parts={"image_encoder": SINGLE, "unet": DIFFUSION, "vae": DIFFUSION},
    )
}  # fmt: skip


def preset(frames: int) -> StableVideoConfig:
    """The published sizes."""
    heads = [Transformers(num_heads=count) for count in (5, 10, 20)]
    dims = (320, 640, 1280, 1280)
    return StableVideoConfig(
        vision=ViTConfig(
            image_size=224, patch_size=14, dim=1280, num_layers=32, num_heads=16, hidden_dim=5120, activation="gelu",
            norm_eps=1e-5, patch_bias=False, pre_norm=True,
        ),
        embed_dim=1024,
        backbone=FilmUNetConfig(
            levels=tuple(Level(dim=d, transformers=h) for d, h in zip(dims, [*heads, None], strict=True)),
            middle=heads[2], context_dim=1024, in_channels=8, side=96, added=Added(dim=768, waves=256), frames=frames,
        ),
        vae=VAEConfig(pyramid=FilmPyramidConfig(widths=(128, 256, 512, 512), latent_dim=4)),
    )  # fmt: skip


PRESETS = {
    "stabilityai/stable-video-diffusion-img2vid": partial(preset, 14),
    "stabilityai/stable-video-diffusion-img2vid-xt": partial(preset, 25),
}
