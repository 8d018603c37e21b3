"""FLUX.1: pictures of a text, by a flow from noise to latents, with two kinds of joint blocks and places that turn.

Paper: Black Forest Labs, "Announcing Black Forest Labs", 2024, https://blackforestlabs.ai/announcing-black-forest-labs/
(there is no paper; Labs et al. 2025, https://arxiv.org/abs/2506.15742, describes its successor). Official code:
black-forest-labs/flux. Hub: black-forest-labs/FLUX.1-dev, black-forest-labs/FLUX.1-schnell.

    text -> T5 -> 512 tokens (schnell: 256) -----------------------------------------+
         -> CLIP's vector, not projected --+                                          |
    time, strength of guidance -> waves ---+-> scales, shifts, gates of all layers    |
    noisy latents -> packed 2 x 2, turned by (0, row, column) -> 19 double blocks -> 38 single ones
    -> the velocity towards noise; latents -> decoder -> pixels

Training details kept here: what the official code shows: rectified flow, queries and keys normed, times moved towards
noise by exp(mu), mu linear from 0.5 (256 patches) to 1.15 (4,096); guidance is a condition (dev), and pictures are
drawn without a second prediction. Learning goes on at a strength of 1, where the data's velocity is the right one.

Deviations: how it was trained is not public. The initialisation is DiT's; times are drawn as in Stable Diffusion 3; one
text in ten is replaced by the empty one. CLIP reads the first 77 tokens of a longer text, with a warning, as in the
official code; T5 reads all of it, or it is refused. Prompts against something need a model whose guidance is not
distilled. Tools (Fill, Depth, Canny, Redux, Kontext) are not there. LoRA files that adapt queries or keys are refused:
their rows are in another order here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, final

import torch
from jaxtyping import Float
from torch import Tensor

from polymodal.backbones.mmdit import MMDiTConfig
from polymodal.backbones.mmdit_files import flux_rules, read_flux, write_flux
from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError
from polymodal.encoders.clip_text import CLIP_L, PLAIN, clip_text_rules, read_clip_text, write_clip_text
from polymodal.nn.norm import RMS
from polymodal.nn.patches import unpack
from polymodal.nn.rope import AxialRope
from polymodal.samplers.flow import Dynamic, Flow
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
from polymodal.systems.painting import Condition
from polymodal.systems.vae_files import CLASS as VAE_CLASS
from polymodal.systems.vae_files import read_vae, vae_rules, write_vae
from polymodal.weights.files import SINGLE
from polymodal.weights.format import Format, write_whole
from polymodal.weights.pipeline import DIFFUSION, diffusers_part, part, pipeline, transformers_part
from polymodal.weights.rules import Rule

PIPELINE: Final = "FluxPipeline"
TRANSFORMER: Final = "FluxTransformer2DModel"
SIDE: Final = 64  # patches of a picture's sides: the pipeline's, whatever the model
TOKENS: Final = {True: 512, False: 256}  # that T5 is given by models with distilled guidance, and by others


@dataclass(frozen=True, kw_only=True)
class FluxConfig(FlowPainterConfig):
    """A T5 has to be there."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.t5 is None or self.clip.pooled_dim != self.backbone.pooled_dim:
            raise ConfigError(f"FLUX reads a T5's words, and a vector of CLIP of {self.backbone.pooled_dim} dimensions")
        if not isinstance(self.backbone.position, AxialRope):
            raise ConfigError("FLUX turns queries and keys by the places of their patches")


@final
class Flux(FlowPainter):
    """A flow told by T5's words and CLIP's vector."""

    config: FluxConfig

    def __init__(self, config: FluxConfig) -> None:
        super().__init__(config)
        self.embeds_guidance = config.backbone.guidance
        # What has no such condition is schnell, whose few steps are distilled: it is drawn without guidance.
        self.steps, self.guidance = (28, 3.5) if self.embeds_guidance else (4, 1.0)

    @property
    def text_tokens(self) -> int:
        return self.config.t5_tokens

    @torch.no_grad()
    def condition(self, batch: Batch) -> Condition:
        """T5's words and CLIP's vector; what is distilled also reads ``guidance`` (1 where there is none)."""
        out = Batch(context=self.words(batch), pooled=self.clip(batch["ids"]).pooled)
        if self.embeds_guidance:
            out["guidance"] = batch.get("guidance", torch.ones(len(out["pooled"]), device=out["pooled"].device))
        return out

    def unpacked(
        self, patches: Float[Tensor, "batch patches values"], height: int, width: int
    ) -> Float[Tensor, "batch channels height width"]:
        return unpack(patches, PATCH, height, width)


def read_hf(raw: Mapping[str, Any]) -> tuple[FluxConfig, dict[str, str]]:
    f = pipeline(raw, PIPELINE)
    f.ignore("read with its files", "tokenizer", "tokenizer_2")
    f.require("image_encoder", None)
    f.require("feature_extractor", None)
    clip = read_clip_text(part(f, "text_encoder", PLAIN))
    t5 = read_t5_part(f, raw, "text_encoder_2")
    backbone = read_flux(part(f, "transformer", TRANSFORMER))
    latent = read_vae(part(f, "vae", VAE_CLASS))
    sampling = read_flow(part(f, "scheduler", FLOW), "even")
    sizes = read_sizes(f, TOKENS[backbone is not None and backbone.guidance], SIDE)
    report = f.done()
    assert backbone is not None
    return FluxConfig(clip=clip, t5=t5, backbone=backbone, vae=latent, sampling=sampling, **sizes), report


def write_hf(c: FluxConfig) -> dict[str, Any]:
    raw = {
        "_class_name": PIPELINE, "feature_extractor": None, "image_encoder": None, "scheduler": write_flow(c.sampling),
        "text_encoder": transformers_part(PLAIN, write_clip_text(c.clip)), "text_encoder_2": write_t5_part(c.t5),
        "tokenizer": transformers_part("CLIPTokenizer"), "tokenizer_2": transformers_part("T5TokenizerFast"),
        "transformer": diffusers_part(TRANSFORMER, write_flux(c.backbone)),
        "vae": diffusers_part(VAE_CLASS, write_vae(c.vae)),
        **write_sizes(c.t5_tokens, c.side, (TOKENS[c.backbone.guidance], SIDE)),
    }  # fmt: skip
    return write_whole(c, raw, read_hf)


def rules_hf(c: FluxConfig) -> list[Rule]:
    return [
        *clip_text_rules("text_encoder.", "clip.", c.clip),
        *t5_encoder_rules(c.t5, "text_encoder_2.", "t5."),
        *flux_rules(c.backbone, "transformer.", "backbone."),
        *vae_rules("vae.", "vae.", c.vae),
    ]


_WEIGHTS = {"text_encoder": SINGLE, "text_encoder_2": SINGLE, "transformer": DIFFUSION, "vae": DIFFUSION}
Flux.formats = {"hf": Format(read=read_hf, write=write_hf, rules=rules_hf, parts=_WEIGHTS)}


def preset(guidance: bool) -> FluxConfig:
    """12 billion parameters, and T5's."""
    backbone = MMDiTConfig(
        values=64, out_values=64, dim=3072, num_layers=19, num_single_layers=38, num_heads=24, hidden_dim=12288,
        context_dim=4096, pooled_dim=768, position=AxialRope(dims=(16, 56, 56)), qk_norm=RMS(), guidance=guidance,
    )  # fmt: skip
    return FluxConfig(
        clip=CLIP_L, t5=t5_xxl(), backbone=backbone, vae=vae(0.3611, 0.1159), t5_tokens=TOKENS[guidance],
        sampling=Flow(shift=Dynamic() if guidance else 1.0, spacing="even"), side=SIDE,
    )  # fmt: skip


PRESETS = {
    "black-forest-labs/FLUX.1-dev": partial(preset, True),
    "black-forest-labs/FLUX.1-schnell": partial(preset, False),
}
