"""DiT, Stable Diffusion 3 and FLUX at full size: names and shapes of every tensor, on the meta device."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from polymodal.nn.skeleton import skeleton
from polymodal.systems import TABLE
from polymodal.systems import dit as dit_system
from polymodal.systems import flux as flux_system
from polymodal.systems import sd3 as sd3_system
from polymodal.weights.pipeline import diffusers_part, transformers_part
from polymodal.weights.rules import plan, unplan

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

CLAIM = "weights: every tensor of the full-size checkpoints"
FLOW, PROJECTED = "FlowMatchEulerDiscreteScheduler", "CLIPTextModelWithProjection"
FOUR = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2}
FOUR |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
SIXTEEN = FOUR | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
CLIP_L = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "projection_dim": 768, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "vocab_size": 49408,
}  # fmt: skip
CLIP_G = CLIP_L | {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "projection_dim": 1280, "hidden_act": "gelu",
}  # fmt: skip
T5 = {
    "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64, "tie_word_embeddings": False,
    "feed_forward_proj": "gated-gelu", "vocab_size": 32128,
}  # fmt: skip


def sd3(heads: int, side: int, **fields: Any) -> dict[str, Any]:
    """The published fields."""
    shape = {
        "num_layers": heads, "num_attention_heads": heads, "caption_projection_dim": 64 * heads,
        "pos_embed_max_size": side, "joint_attention_dim": 4096, "pooled_projection_dim": 2048,
    }  # fmt: skip
    latent = SIXTEEN | {"scaling_factor": 1.5305, "shift_factor": 0.0609}
    return {
        "text_encoder": (PROJECTED, CLIP_L), "text_encoder_2": (PROJECTED, CLIP_G),
        "text_encoder_3": ("T5EncoderModel", T5), "transformer": ("SD3Transformer2DModel", shape | fields),
        "vae": ("AutoencoderKL", latent), "scheduler": (FLOW, {"shift": 3.0}),
    }  # fmt: skip


def flux(guidance: bool) -> dict[str, Any]:
    latent = SIXTEEN | {"scaling_factor": 0.3611, "shift_factor": 0.1159}
    shift = {"shift": 3.0, "use_dynamic_shifting": True} if guidance else {"shift": 1.0}
    return {
        "text_encoder": ("CLIPTextModel", CLIP_L), "text_encoder_2": ("T5EncoderModel", T5),
        "transformer": ("FluxTransformer2DModel", {"guidance_embeds": guidance}), "vae": ("AutoencoderKL", latent),
        "scheduler": (FLOW, shift),
    }  # fmt: skip


def dit(side: int) -> dict[str, Any]:
    shape = {"out_channels": 8, "sample_size": side, "norm_eps": 1e-5}
    scheduler = {"beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False}
    return {
        "transformer": ("DiTTransformer2DModel", shape), "vae": ("AutoencoderKL", FOUR),
        "scheduler": ("DDIMScheduler", scheduler),
    }  # fmt: skip


# Hub name -> system, pipeline, its parts, and how many parameters the Transformer has (DiT's official count has its
# table of 256 places, too: 675,129,632).
PUBLISHED: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "facebook/DiT-XL-2-256": ("dit", "DiTPipeline", dit(32), 674_834_720),
    "facebook/DiT-XL-2-512": ("dit", "DiTPipeline", dit(64), 674_834_720),
    "stabilityai/stable-diffusion-3-medium-diffusers": (
        "sd3", "StableDiffusion3Pipeline", sd3(24, 192), 2_028_328_000,
    ),
    "stabilityai/stable-diffusion-3.5-medium": (
        "sd3", "StableDiffusion3Pipeline",
        sd3(24, 384, qk_norm="rms_norm", dual_attention_layers=list(range(13))), 2_243_171_520,
    ),
    "stabilityai/stable-diffusion-3.5-large": (
        "sd3", "StableDiffusion3Pipeline", sd3(38, 192, qk_norm="rms_norm"), 8_056_627_520,
    ),
    "black-forest-labs/FLUX.1-dev": ("flux", "FluxPipeline", flux(True), 11_901_408_320),
    "black-forest-labs/FLUX.1-schnell": ("flux", "FluxPipeline", flux(False), 11_891_178_560),
}  # fmt: skip
PRESETS = dit_system.PRESETS | sd3_system.PRESETS | flux_system.PRESETS


def made(cls: str, fields: dict[str, Any]) -> Any:
    """A part on the meta device."""
    with skeleton():
        if not cls.startswith(("CLIP", "T5")):
            return getattr(diffusers, cls)(**fields)
        config = "T5Config" if cls.startswith("T5") else "CLIPTextConfig"
        return getattr(transformers, cls)(getattr(transformers, config)(**fields))


def config_of(model: Any) -> dict[str, Any]:
    config = dict(model.config) if isinstance(model, diffusers.ModelMixin) else model.config.to_dict()
    return json.loads(json.dumps(config))


def published(name: str, parts: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """The config of a pipeline and its tensors, as diffusers and transformers write them, and what they made of it."""
    raw: dict[str, Any] = {"_class_name": name}
    models = {part: made(kind, fields) for part, (kind, fields) in parts.items() if part != "scheduler"}
    for part, (kind, fields) in parts.items():
        entry = transformers_part if kind.startswith(("CLIP", "T5")) else diffusers_part
        raw[part] = entry(kind, config_of(models[part]) if part in models else fields)
    theirs = {
        f"{part}.{key}": torch.empty(tensor.shape, device="meta")
        for part, model in models.items()
        for key, tensor in model.state_dict().items()
    }
    return raw, theirs, models


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.proves(entry[0], CLAIM)) for n, entry in PUBLISHED.items()]
)
def test_every_tensor(name: str) -> None:
    system, pipeline, parts, count = PUBLISHED[name]
    cls = TABLE[system].resolve()
    raw, theirs, models = published(pipeline, parts)
    own = [p for k, p in models["transformer"].named_parameters() if ".norm1.emb." not in k or ".0.norm1" in k]
    assert sum(p.numel() for p in own) == count  # DiT's blocks have copies of what the first one has
    config, _ = cls.formats["hf"].read(raw)
    if system == "dit":  # what their files compute, and the official code
        official = replace(config.backbone, mlp_norm_eps=1e-6, wave_gap=0)
        assert PRESETS[name]() == replace(config, backbone=official)
    else:
        assert config == PRESETS[name]()
    with skeleton():
        ours = cls(config)
    rules = cls.formats["hf"].rules(config)
    todo = plan(rules, theirs, ours.state_dict())
    assert not todo.problems, todo.problems[:5]
    dropped = set(todo.dropped)
    assert dropped <= {"text_encoder_2.encoder.embed_tokens.weight", "text_encoder_3.encoder.embed_tokens.weight"}
    written = {their for step in unplan(rules, ours.state_dict()) for their in step.theirs}
    renamed = {n.replace("text_encoder.", "text_encoder.text_model.") if system == "flux" else n for n in theirs}
    assert written - renamed == set()
