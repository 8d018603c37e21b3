"""How pi0 and pi0.5 look in files: transformers' and LeRobot's names and configs. Not a system itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final, Literal

from polymodal.backbones.decoder import DecoderConfig, Gated
from polymodal.backbones.experts import ExpertConfig
from polymodal.backbones.families import FAMILIES, ControlIds
from polymodal.core.errors import UnsupportedError
from polymodal.encoders.vision_families import VISION_FAMILIES
from polymodal.heads.flow import Beta
from polymodal.nn.norm import AdaptiveRMS, OffsetRMS
from polymodal.systems.expert_policy import CAMERAS, LONGEST, SHORTEST, ExpertPolicyConfig
from polymodal.systems.prefix import GEMMA, SO400M, TOWER, read_parts, rules_of_parts, write_parts
from polymodal.weights.fields import Fields
from polymodal.weights.rules import Rule, drop, read_only, rule

Layout = Literal["transformers", "lerobot", "openpi"]


def trunk_rules(family: str, backbone: DecoderConfig, layout: Layout, ours: str) -> list[Rule]:
    """The names of the tower, the linear layer and the Gemma (``ours``).

    transformers writes one level more than the published files have. These keep the Gemma's embeddings under the name
    of its output layer, which is the same tensor.
    """
    whole = f"{'model.' if layout == 'lerobot' else ''}paligemma_with_expert.paligemma"
    text = f"{whole}.model.language_model{'.model' if layout == 'transformers' else ''}"
    theirs, mine = f"{whole}.lm_head.weight", f"{ours}.embed_tokens.weight"
    if layout == "transformers":
        theirs = f"{text}.embed_tokens.weight"
    rest = FAMILIES[family].rules(backbone, text, f"{whole}.output", ours)
    return [*rules_of_parts(f"{whole}.model."), rule(theirs, mine), *(r for r in rest if r.ours != (mine,))]


def rules_of(c: ExpertPolicyConfig, layout: Layout) -> list[Rule]:
    """The names of all but what stands between actions, states and times and the expert."""
    whole = f"{'model.' if layout == 'lerobot' else ''}paligemma_with_expert"
    t, o = f"{whole}.gemma_expert.model", "backbone.expert"
    norms = {"layers.{i}.input_layernorm": "blocks.{i}.attn_norm", "norm": "norm"}
    norms |= {"layers.{i}.post_attention_layernorm": "blocks.{i}.mlp_norm"}
    theirs, ours = (".dense", ".modulation") if isinstance(c.expert.norm, AdaptiveRMS) else ("", "")
    return [
        *trunk_rules(c.family, c.backbone, layout, "backbone.trunk"),
        *(rule(f"{t}.{a}{theirs}.{{p}}", f"{o}.{b}{ours}.{{p}}") for a, b in norms.items()),
        *(rule(f"{t}.layers.{{i}}.self_attn.{n}_proj.{{p}}", f"{o}.blocks.{{i}}.attn.{n}_proj.{{p}}") for n in "qkvo"),
        *(
            rule(f"{t}.layers.{{i}}.mlp.{n}_proj.{{p}}", f"{o}.blocks.{{i}}.mlp.{n}_proj.{{p}}")
            for n in ("gate", "up", "down")
        ),
        drop(f"{whole}.gemma_expert.lm_head.weight", "the expert writes no text"),
    ]


def rules_with(c: ExpertPolicyConfig, layers: Mapping[str, str], layout: Layout) -> list[Rule]:
    """All names of a layout, and for reading those of older files; ``layers`` are theirs and ours of single layers."""
    older: Layout = "openpi" if layout == "lerobot" else "lerobot"

    def named(which: Layout) -> list[Rule]:
        base = "model." if which == "lerobot" else ""
        return [*rules_of(c, which), *(rule(f"{base}{a}.{{p}}", f"{b}.{{p}}") for a, b in layers.items())]

    return [*named(layout), *read_only(named(older))]


# ---- transformers' config


def read_transformers(
    raw: Mapping[str, Any], kind: str, norm: type[OffsetRMS | AdaptiveRMS], prompt: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """Keywords for the config of a system from transformers' of pi0, with ``cameras`` and ``tokenizer_max_length``."""
    f = Fields(raw)
    f.require("model_type", kind)
    f.require("loss_reduction", "mean")
    parts = read_parts(f.child("vlm_config"))
    parts["expert"] = _read_expert(f.child("dit_config"), parts["backbone"], norm)
    parts["prompt"] = f.take("tokenizer_max_length", int, prompt)
    parts["cameras"] = f.numbers("cameras", str) if "cameras" in f else CAMERAS
    parts |= read_flow(f)
    return parts, f.done()


def write_transformers(c: ExpertPolicyConfig, kind: str) -> dict[str, Any]:
    """The fields of `read_transformers`."""
    own = replace(c.backbone, dim=c.expert.dim, mlp=c.expert.mlp, norm=OffsetRMS(eps=c.expert.norm.eps))
    expert = {"model_type": "gemma", **FAMILIES["gemma"].write(own), **c.control.write()}
    return {
        "model_type": kind, "vlm_config": write_parts(c.vision, c.family, c.backbone, c.image_id, c.control),
        "dit_config": expert | {"use_bidirectional_attention": True, "is_causal": True},
        **write_flow(c), "cameras": list(c.cameras),
    }  # fmt: skip


def _read_expert(f: Fields, trunk: DecoderConfig, norm: type[OffsetRMS | AdaptiveRMS]) -> ExpertConfig:
    """From a whole Gemma's config: an expert has the trunk's attention."""
    f.require("model_type", "gemma")
    own = FAMILIES["gemma"].read(f)
    f.require("use_bidirectional_attention", True)
    f.require("is_causal", True)
    assert isinstance(own.norm, OffsetRMS)
    assert isinstance(own.mlp, Gated)
    for name in ("num_layers", "attention", "position", "vocab_size"):
        if getattr(own, name) != getattr(trunk, name):
            f.problems.append(f"config.json: dit_config has another {name} than the language model it attends to")
    return ExpertConfig(dim=own.dim, mlp=own.mlp, norm=norm(eps=own.norm.eps))


def read_flow(f: Fields) -> dict[str, Any]:
    """Sizes of actions and states, times and steps, which both libraries call the same."""
    least = f.take("time_sampling_offset", float, 0.001)
    f.require("time_sampling_beta_beta", 1.0)
    f.require("time_sampling_scale", 1 - least)
    f.require("min_period", SHORTEST)
    f.require("max_period", LONGEST)
    return {
        "horizon": f.take("chunk_size", int, 50), "state_width": f.take("max_state_dim", int, 32),
        "action_width": f.take("max_action_dim", int, 32), "steps": f.take("num_inference_steps", int, 10),
        "times": Beta(alpha=f.take("time_sampling_beta_alpha", float, 1.5), least=least),
    }  # fmt: skip


def write_flow(c: ExpertPolicyConfig) -> dict[str, Any]:
    """The fields of `read_flow`."""
    return {
        "chunk_size": c.horizon, "max_state_dim": c.state_width, "max_action_dim": c.action_width,
        "num_inference_steps": c.steps, "time_sampling_beta_alpha": c.times.alpha, "time_sampling_beta_beta": 1.0,
        "time_sampling_scale": 1 - c.times.least, "time_sampling_offset": c.times.least, "min_period": SHORTEST,
        "max_period": LONGEST, "tokenizer_max_length": c.prompt,
    }  # fmt: skip


# ---- LeRobot's config

_GEMMAS: Final = {"gemma_2b": (2048, 16384), "gemma_300m": (1024, 4096)}
_TRAINING: Final = (
    "n_action_steps", "device", "dtype", "use_amp", "use_peft", "push_to_hub", "repo_id", "private", "tags", "license",
    "pretrained_path", "rtc_config", "relative_exclude_joints", "action_feature_names", "gradient_checkpointing",
    "compile_model", "compile_mode", "freeze_vision_encoder", "train_expert_only", "optimizer_lr", "optimizer_betas",
    "optimizer_eps", "optimizer_weight_decay", "optimizer_grad_clip_norm", "scheduler_warmup_steps",
    "scheduler_decay_steps", "scheduler_decay_lr", "empty_cameras", "output_features", "memory_frames",
    "memory_stride", "memory_temporal_attention_every",
)  # fmt: skip
_PICTURES: Final = "observation.images."


def read_lerobot(
    raw: Mapping[str, Any], kind: str, norm: OffsetRMS | AdaptiveRMS, modes: str, prompt: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """Keywords for the config of a system from LeRobot's config of its policy, ``kind``.

    Its statistics lie in files of its processors, which are not read: take those of the data (`use_statistics`).
    """
    f = Fields(raw)
    f.require("type", kind)
    f.require("n_obs_steps", 1)
    for field in ("use_relative_actions", "use_visual_memory", "use_proprioceptive_memory", "rtc_training_max_delay"):
        f.require(field, False)
    f.require("normalization_mapping", {"VISUAL": "IDENTITY", "STATE": modes, "ACTION": modes})
    f.ignore("of training, and of how chunks are carried out", *_TRAINING)
    trunk = f.choose("paligemma_variant", {"gemma_2b": _GEMMAS["gemma_2b"]}, "gemma_2b")
    dim, hidden_dim = f.choose("action_expert_variant", _GEMMAS, "gemma_300m")
    side = f.numbers("image_resolution", int) if "image_resolution" in f else (224, 224)
    if len(set(side)) != 1:
        f.problems.append(f"config.json: image_resolution is {side}, not a square")
    features = f.take("input_features", dict, {})
    cameras = [name.removeprefix(_PICTURES) for name in features if name.startswith(_PICTURES)]
    parts = {
        **read_flow(f), "prompt": f.take("tokenizer_max_length", int, prompt), **gemma_2b(side[0], trunk),
        "cameras": tuple(name for name in cameras if not name.startswith("empty_camera")) or CAMERAS,
    }  # fmt: skip
    expert = ExpertConfig(dim=dim, mlp=Gated(hidden_dim=hidden_dim, activation="gelu_tanh"), norm=norm)
    return {**parts, "expert": expert}, f.done()


def write_lerobot(c: ExpertPolicyConfig, kind: str, modes: str) -> dict[str, Any]:
    """The fields of `read_lerobot`.

    Raises:
        UnsupportedError: the parts have other sizes than those that LeRobot has names for.
    """
    names = {sizes: name for name, sizes in _GEMMAS.items()}
    sizes = (c.expert.dim, c.expert.mlp.hidden_dim)
    plain = gemma_2b(c.vision.image_size, _GEMMAS["gemma_2b"])
    if sizes not in names or {name: getattr(c, name) for name in plain} != plain:
        raise UnsupportedError("LeRobot's format knows a Gemma of 2B with an expert of 300M or 2B, and no other sizes")
    picture = {"type": "VISUAL", "shape": [3, c.vision.image_size, c.vision.image_size]}
    features = {f"{_PICTURES}{name}": picture for name in c.cameras}
    return {
        "type": kind, "n_obs_steps": 1, "paligemma_variant": "gemma_2b", "action_expert_variant": names[sizes],
        "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": modes, "ACTION": modes},
        "input_features": features | {"observation.state": {"type": "STATE", "shape": [c.state_width]}},
        "output_features": {"action": {"type": "ACTION", "shape": [c.action_width]}},
        "image_resolution": [c.vision.image_size] * 2, **write_flow(c),
    }  # fmt: skip


def gemma_2b(side: int, sizes: tuple[int, int]) -> dict[str, Any]:
    """The published trunk: SigLIP So400m/14 and Gemma 2B, with the placeholder behind the vocabulary."""
    vision = {name: value for name, value in SO400M.items() if name != "model_type"} | {"image_size": side}
    text = {name: value for name, value in GEMMA.items() if name != "model_type"}
    text |= {"hidden_size": sizes[0], "intermediate_size": sizes[1], "vocab_size": 257152}
    return {
        "vision": VISION_FAMILIES[TOWER].read(Fields(vision)), "family": "gemma", "image_id": 257152,
        "backbone": FAMILIES["gemma"].read(Fields(text)), "control": ControlIds(start=2, stop=(1,), pad=0),
    }  # fmt: skip
