"""How diffusers writes the sampling of a rectified flow, and transformers the T5 encoder that tells it what to see."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, Literal

from polymodal.backbones.encdec import EncDecConfig
from polymodal.backbones.encdec_families import read_t5, t5_rules, write_t5
from polymodal.samplers.flow import MOST, Dynamic, Flow
from polymodal.tokenizers.pyramid import PyramidConfig
from polymodal.tokenizers.vae import VAEConfig
from polymodal.weights.fields import Fields
from polymodal.weights.pipeline import diffusers_part, part, transformers_part
from polymodal.weights.rules import Rule

FLOW: Final = "FlowMatchEulerDiscreteScheduler"
T5: Final = "T5EncoderModel"
_OFF: Final = (
    "invert_sigmas", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "stochastic_sampling",
)  # fmt: skip


def read_flow(f: Fields, spacing: Literal["even", "trained"]) -> Flow:
    """What the scheduler says; ``spacing`` is what the pipeline does with it."""
    for name in _OFF:
        f.require(name, False, None)
    f.require("shift_terminal", None)
    f.require("time_shift_type", "exponential")
    steps = f.take("num_train_timesteps", int, 1000, least=2, most=100_000)
    shift, dynamic = f.take("shift", float, 1.0), f.take("use_dynamic_shifting", bool, False)
    least, most = (
        f.take(name, float, usual, most=int(MOST)) for name, usual in (("base_shift", 0.5), ("max_shift", 1.15))
    )
    fewest, largest = f.take("base_image_seq_len", int, 256), f.take("max_image_seq_len", int, 4096)
    if not math.exp(-MOST) <= shift <= math.exp(MOST) or fewest >= largest:
        f.problems.append(f"scheduler: a shift of {shift}, or between {fewest} and {largest} tokens")
        shift, fewest, largest = 1.0, 256, 4096
    grown = Dynamic(least=least, fewest=fewest, most=most, largest=largest)
    return Flow(shift=grown if dynamic else shift, spacing=spacing, steps=steps)


def write_flow(c: Flow) -> dict[str, Any]:
    """The part that `read_flow` reads."""
    dynamic = isinstance(c.shift, Dynamic)
    d = c.shift if isinstance(c.shift, Dynamic) else Dynamic()
    return diffusers_part(FLOW, {
        "num_train_timesteps": c.steps, "shift": 1.0 if dynamic else c.shift, "use_dynamic_shifting": dynamic,
        "base_shift": d.least, "max_shift": d.most, "base_image_seq_len": d.fewest, "max_image_seq_len": d.largest,
    })  # fmt: skip


def read_sizes(f: Fields, tokens: int, side: int) -> dict[str, int]:
    """How long texts and how large pictures are, which no pipeline says; files of ours do, where it is not as usual."""
    return {"t5_tokens": f.take("max_sequence_length", int, tokens), "side": f.take("default_side", int, side)}


def write_sizes(t5_tokens: int, side: int, usual: tuple[int, int]) -> dict[str, int]:
    """The fields that `read_sizes` reads."""
    fields = {"max_sequence_length": (t5_tokens, usual[0]), "default_side": (side, usual[1])}
    return {name: value for name, (value, default) in fields.items() if value != default}


def read_t5_part(f: Fields, raw: Mapping[str, Any], name: str) -> EncDecConfig | None:
    """The config of a T5 encoder, or None where the pipeline goes without."""
    if raw.get(name) is None:
        f.ignore("a pipeline may go without it", name)
        return None
    child = part(f, name, T5)
    child.require("model_type", "t5")
    return read_t5(child)


def write_t5_part(c: EncDecConfig | None) -> dict[str, Any] | None:
    """What `read_t5_part` reads."""
    if c is None:
        return None
    return transformers_part(T5, {"architectures": [T5], "model_type": "t5", **write_t5(c)})


def t5_encoder_rules(c: EncDecConfig | None, theirs: str, ours: str) -> list[Rule]:
    """The tensors of a T5 encoder; both prefixes end in a dot."""
    return [] if c is None else [r for r in t5_rules(c, theirs, ours) if f"{ours}decoder" not in "".join(r.ours)]


# -- what the published pipelines are made of

T5_XXL: Final = {
    "d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}  # fmt: skip


def t5_xxl() -> EncDecConfig:
    """google/t5-v1_1-xxl."""
    return read_t5(Fields(T5_XXL))


def vae(scale: float, shift: float) -> VAEConfig:
    """Of 16 channels."""
    pyramid = PyramidConfig(widths=(128, 256, 512, 512), latent_dim=16)
    return VAEConfig(pyramid=pyramid, scale=scale, shift=shift, mixed=False)
