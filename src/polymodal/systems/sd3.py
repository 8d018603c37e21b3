"""Stable Diffusion 3 and 3.5: pictures of a text, by a flow from noise to latents that text and picture steer jointly.

Paper: Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", 2024,
https://arxiv.org/abs/2403.03206. Official code: Stability-AI/sd3.5.
Hub: stabilityai/stable-diffusion-3-medium-diffusers, stabilityai/stable-diffusion-3.5-medium,
stabilityai/stable-diffusion-3.5-large, ...

    text -> CLIP-L and CLIP-G before their last layers, side by side, zeros behind --+
         -> T5 ----------------------------------------------------------------------+-> 77 + 256 tokens --+
         -> CLIP-L's and CLIP-G's vectors, side by side --+                                                |
    time -> waves ----------------------------------------+-> scales, shifts, gates of all layers        joint
    noisy latents -> patches of 2 x 2, places from the middle of a table ------------------------------ attention
    -> the velocity towards noise; latents -> decoder -> pixels

Training details kept here: a straight line from data (0) to noise (1), the target is noise minus data; times are the
sigmoid of a standard normal, moved towards noise by 3 (1 / (1 + (1 / t - 1) / 3)) as those of sampling are; each of the
three text encoders is left out (zeros) independently with a probability of 0.463, so that one picture in ten has no
text; latents of 16 channels, shifted and scaled. 3.5 norms queries and keys, and 3.5 medium's first 13 blocks have
further attention of the picture alone.

Deviations: the initialisation is DiT's, which the paper builds on: what it trained with is not public. CLIP's towers
read the first 77 tokens of a longer text, with a warning, as in the official code; T5 reads all, or it is refused.
Guidance that skips layers (3.5 medium) is not there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from polymodal.backbones.mmdit import CentreCrop, MMDiTConfig
from polymodal.backbones.mmdit_files import read_sd3, sd3_rules, write_sd3
from polymodal.core.batch import Batch, Loss
from polymodal.core.errors import ConfigError
from polymodal.core.verbs import TensorSpec
from polymodal.encoders.clip_text import (
    CLIP_G,
    CLIP_L,
    PROJECTED,
    CLIPText,
    CLIPTextConfig,
    clip_text_rules,
    read_clip_text,
    write_clip_text,
)
from polymodal.heads.reconstruction import unpatchify
from polymodal.nn.norm import RMS
from polymodal.samplers.flow import Flow
from polymodal.systems.flow_files import (
    FLOW,
    read_flow,
    read_sizes,
    read_t5_part,
    t5_encoder_rules,
    t5_xxl,
    vae,
    write_flow,
    write_sizes,
    write_t5_part,
)
from polymodal.systems.flow_painter import PATCH, FlowPainter, FlowPainterConfig
from polymodal.systems.latent_painting import ids_spec, read_tokenizer
from polymodal.systems.painting import Condition
from polymodal.systems.vae_files import CLASS as VAE_CLASS
from polymodal.systems.vae_files import read_vae, vae_rules, write_vae
from polymodal.tokenizers.text import TextTokenizer
from polymodal.weights.files import SINGLE
from polymodal.weights.format import Format, write_whole
from polymodal.weights.pipeline import DIFFUSION, diffusers_part, part, pipeline, transformers_part
from polymodal.weights.rules import Rule

PIPELINE: Final = "StableDiffusion3Pipeline"
TRANSFORMER: Final = "SD3Transformer2DModel"
TOKENS: Final = 256  # that T5 is given
LEFT_OUT: Final = 463  # per mille of the texts, for each encoder


@dataclass(frozen=True, kw_only=True)
class SD3Config(FlowPainterConfig):
    """``clip_large`` is the second tower of CLIP."""

    clip_large: CLIPTextConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        both, c = (self.clip, self.clip_large), self.backbone
        if sum(t.pooled_dim for t in both) != c.pooled_dim or sum(t.tower.dim for t in both) > c.context_dim:
            raise ConfigError(f"two towers of CLIP for vectors of {c.pooled_dim} and tokens of {c.context_dim}")
        if not isinstance(c.position, CentreCrop):
            raise ConfigError("Stable Diffusion 3 takes the places of patches from a table")


@final
class SD3(FlowPainter):
    """A flow told by three text encoders."""

    config: SD3Config
    steps = 28
    guidance = 7.0
    dropped = 0  # of all at once: each encoder is left out on its own
    t5_folder = "tokenizer_3"
    tokenizer_large: TextTokenizer | None = None

    def __init__(self, config: SD3Config) -> None:
        super().__init__(config)
        self.clip_large = CLIPText(config.clip_large).requires_grad_(False)

    def init_weights(self) -> None:
        super().init_weights()
        self.clip_large.init_weights()

    def inputs_spec(self) -> dict[str, TensorSpec]:
        return super().inputs_spec() | {
            "large_ids": ids_spec(self.config.clip_large),
            "heard": TensorSpec(shape=(3,), dtype=torch.bool),  # may be left out: it is drawn
        }

    def prompt(self, texts: Sequence[str]) -> Batch:
        return Batch(super().prompt(texts), large_ids=self.clip_ids(self.tokenizer_large, texts))

    def empty(self) -> dict[str, Int[Tensor, " tokens"]]:
        if self.tokenizer_large is not None:
            return super().empty() | {"large_ids": self.tokenizer_large([""])[0][0]}
        ids = self.clip_large.empty()
        ids[2:] = 0  # OpenCLIP fills texts up with zeros
        return super().empty() | {"large_ids": ids}

    @property
    def text_tokens(self) -> int:
        """CLIP's, whose towers are side by side, and T5's, for which zeros may stand."""
        return self.config.clip.tower.context + self.config.t5_tokens

    def condition(self, batch: Batch) -> Condition:
        """The three encoders' tokens and vectors; zeros for those not ``heard`` (batch 3: L, G, T5)."""
        first, second, words = self.clip(batch["ids"]), self.clip_large(batch["large_ids"]), self.words(batch)
        everything = torch.ones(len(words), 3, dtype=torch.bool, device=words.device)
        heard = batch.get("heard", everything).unbind(1)

        def kept(x: Float[Tensor, "batch ..."], here: Bool[Tensor, " batch"]) -> Float[Tensor, "batch ..."]:
            return x.masked_fill(~here.view(-1, *[1] * (x.ndim - 1)), 0.0)

        towers = torch.cat([kept(first.before, heard[0]), kept(second.before, heard[1])], -1)
        towers = F.pad(towers, (0, self.config.backbone.context_dim - towers.shape[-1]))
        pooled = torch.cat([kept(first.pooled, heard[0]), kept(second.pooled, heard[1])], -1)
        return Batch(context=torch.cat([towers, kept(words, heard[2])], 1), pooled=pooled)

    def unpacked(
        self, patches: Float[Tensor, "batch patches values"], height: int, width: int
    ) -> Float[Tensor, "batch channels height width"]:
        return unpatchify(patches, PATCH, height, width)

    def hearing(self, rows: int) -> Bool[Tensor, "rows 3"]:
        """Which encoders are heard in training, each drawn on its own."""
        return torch.randint(1000, (rows, 3), device=self.device) >= LEFT_OUT

    def loss(self, batch: Batch) -> Loss:
        """While training, each encoder is left out of some rows."""
        if self.training and "heard" not in batch:
            batch = Batch(batch, heard=self.hearing(len(batch["ids"])))
        return super().loss(batch)

    def load_processors(self, folder: Path) -> None:
        super().load_processors(folder)
        self.tokenizer_large = read_tokenizer(folder / "tokenizer_2", self.config.clip_large)

    def save_processors(self, folder: Path) -> None:
        super().save_processors(folder)
        if self.tokenizer_large is not None:
            self.tokenizer_large.save(folder / "tokenizer_2")


def read_hf(raw: Mapping[str, Any]) -> tuple[SD3Config, dict[str, str]]:
    f = pipeline(raw, PIPELINE)
    f.ignore("read with its files", "tokenizer", "tokenizer_2", "tokenizer_3")
    f.require("image_encoder", None)
    f.require("feature_extractor", None)
    clip = read_clip_text(part(f, "text_encoder", PROJECTED), projected=True)
    large = read_clip_text(part(f, "text_encoder_2", PROJECTED), projected=True)
    t5 = read_t5_part(f, raw, "text_encoder_3")
    backbone = read_sd3(part(f, "transformer", TRANSFORMER))
    latent = read_vae(part(f, "vae", VAE_CLASS))
    sampling = read_flow(part(f, "scheduler", FLOW), "trained")
    position = None if backbone is None else backbone.position
    sizes = read_sizes(f, TOKENS, position.base if isinstance(position, CentreCrop) else 64)
    report = f.done()
    assert backbone is not None
    config = SD3Config(clip=clip, clip_large=large, t5=t5, backbone=backbone, vae=latent, sampling=sampling, **sizes)
    return config, report


def write_hf(c: SD3Config) -> dict[str, Any]:
    position = c.backbone.position
    assert isinstance(position, CentreCrop)
    raw = {
        "_class_name": PIPELINE, "feature_extractor": None, "image_encoder": None, "scheduler": write_flow(c.sampling),
        "text_encoder": transformers_part(PROJECTED, write_clip_text(c.clip)),
        "text_encoder_2": transformers_part(PROJECTED, write_clip_text(c.clip_large)),
        "text_encoder_3": write_t5_part(c.t5), "tokenizer": transformers_part("CLIPTokenizer"),
        "tokenizer_2": transformers_part("CLIPTokenizer"),
        "tokenizer_3": None if c.t5 is None else transformers_part("T5TokenizerFast"),
        "transformer": diffusers_part(TRANSFORMER, write_sd3(c.backbone)),
        "vae": diffusers_part(VAE_CLASS, write_vae(c.vae)), **write_sizes(c.t5_tokens, c.side, (TOKENS, position.base)),
    }  # fmt: skip
    return write_whole(c, raw, read_hf)


def rules_hf(c: SD3Config) -> list[Rule]:
    return [
        *clip_text_rules("text_encoder.", "clip.", c.clip),
        *clip_text_rules("text_encoder_2.", "clip_large.", c.clip_large),
        *t5_encoder_rules(c.t5, "text_encoder_3.", "t5."),
        *sd3_rules(c.backbone, "transformer.", "backbone."),
        *vae_rules("vae.", "vae.", c.vae),
    ]


_WEIGHTS = {f"text_encoder{n}": SINGLE for n in ("", "_2", "_3")} | {"transformer": DIFFUSION, "vae": DIFFUSION}
SD3.formats = {"hf": Format(read=read_hf, write=write_hf, rules=rules_hf, parts=_WEIGHTS)}


def preset(layers: int, side: int, *, qk_norm: RMS | None, extra: int = 0) -> SD3Config:
    """The published sizes: 64 dimensions of width for each layer."""
    backbone = MMDiTConfig(
        values=64, out_values=64, dim=64 * layers, num_layers=layers, num_heads=layers, hidden_dim=256 * layers,
        context_dim=4096, pooled_dim=2048, position=CentreCrop(side=side, base=64), qk_norm=qk_norm,
        extra_attention=extra,
    )  # fmt: skip
    return SD3Config(
        clip=replace(CLIP_L, embed_dim=768), clip_large=CLIP_G, t5=t5_xxl(), backbone=backbone,
        vae=vae(1.5305, 0.0609), sampling=Flow(shift=3.0),
    )  # fmt: skip


PRESETS = {
    "stabilityai/stable-diffusion-3-medium-diffusers": partial(preset, 24, 192, qk_norm=None),
    "stabilityai/stable-diffusion-3.5-medium": partial(preset, 24, 384, qk_norm=RMS(), extra=13),
    "stabilityai/stable-diffusion-3.5-large": partial(preset, 38, 192, qk_norm=RMS()),
}
