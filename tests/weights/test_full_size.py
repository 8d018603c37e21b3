"""Names and shapes of full-size checkpoints: every tensor is taken, every parameter filled, nothing is allocated."""

from __future__ import annotations

import importlib
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from polymodal.nn.skeleton import skeleton
from polymodal.systems import TABLE

transformers = pytest.importorskip("transformers")

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
SO400M = {"hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16, "intermediate_size": 4304}


def clip(vision: dict[str, Any], width: int = 512, activation: str = "quick_gelu", eos: int = 2) -> dict[str, Any]:
    text = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": width // 64,
        "hidden_act": activation,
        "eos_token_id": eos,
    }
    return {"text_config": text, "vision_config": vision | {"hidden_act": activation}, "projection_dim": width}


def siglip(shape: dict[str, Any], vision: dict[str, Any], vocab: int = 32000) -> dict[str, Any]:
    text = shape | {"vocab_size": vocab, "projection_size": shape.get("hidden_size", 768)}
    return {"text_config": text, "vision_config": shape | vision}


def dinov2(dim: int, layers: int, heads: int, *, swiglu: bool = False) -> dict[str, Any]:
    sizes = {"hidden_size": dim, "num_hidden_layers": layers, "num_attention_heads": heads}
    return sizes | {"image_size": 518, "patch_size": 14, "use_swiglu_ffn": swiglu}


# Hub name -> system, the fields in which its published config differs from the defaults of transformers, and how many
# parameters it has.
PUBLISHED: dict[str, tuple[str, dict[str, Any], int]] = {
    "openai/clip-vit-base-patch32": ("clip", clip({}), 151_277_313),
    "openai/clip-vit-base-patch16": ("clip", clip({"patch_size": 16}), 149_620_737),
    "openai/clip-vit-large-patch14": ("clip", clip(LARGE | {"patch_size": 14}, 768), 427_616_513),
    "openai/clip-vit-large-patch14-336": (
        "clip",
        clip(LARGE | {"patch_size": 14, "image_size": 336}, 768),
        427_944_193,
    ),
    "laion/CLIP-ViT-B-32-laion2B-s34B-b79K": ("clip", clip({}, activation="gelu", eos=49407), 151_277_313),
    "google/siglip-base-patch16-224": ("siglip", siglip({}, {}), 203_155_970),
    "google/siglip-so400m-patch14-384": (
        "siglip",
        siglip(SO400M, {"patch_size": 14, "image_size": 384}),
        877_960_498,
    ),
    "google/siglip2-base-patch16-224": ("siglip", siglip({}, {}, vocab=256000), 375_187_970),
    "google/siglip2-base-patch16-naflex": ("siglip2", siglip({}, {"num_patches": 256}, vocab=256000), 375_234_050),
    "facebook/dinov2-small": ("dinov2", dinov2(384, 12, 6), 22_056_576),
    "facebook/dinov2-base": ("dinov2", dinov2(768, 12, 12), 86_580_480),
    "facebook/dinov2-large": ("dinov2", dinov2(1024, 24, 16), 304_368_640),
    "facebook/dinov2-giant": ("dinov2", dinov2(1536, 40, 24, swiglu=True), 1_136_480_768),
    "facebook/vit-mae-base": ("mae", {}, 111_907_840),
    "google/vit-base-patch16-224": ("vit", {"num_labels": 1000}, 86_567_656),
}
every_checkpoint = pytest.mark.parametrize(
    "checkpoint",
    [
        pytest.param(
            name, marks=pytest.mark.proves(system, "weights: total on names and shapes of full-size checkpoints")
        )
        for name, (system, _, _) in PUBLISHED.items()
    ],
)


def reference(checkpoint: str) -> Any:
    """The public implementation at full size, without memory."""
    system, fields, _ = PUBLISHED[checkpoint]
    cls = getattr(transformers, TABLE[system].resolve().reference.cls)
    with skeleton():
        return cls(cls.config_class(**fields))


def written(fields: dict[str, Any]) -> dict[str, Any]:
    """A config as it is after a file: with names for keys, whatever they were."""
    return json.loads(json.dumps(fields))


def tensors(model: Any) -> dict[str, Tensor]:
    """Names and shapes in the file, which are not always those in memory."""
    return dict(transformers.core_model_loading.revert_weight_conversion(model, model.state_dict()))


@every_checkpoint
def test_every_tensor_is_taken_and_every_parameter_filled(checkpoint: str) -> None:
    system, _, count = PUBLISHED[checkpoint]
    cls, model = TABLE[system].resolve(), reference(checkpoint)
    fmt = cls.formats["hf"]
    for raw in (model.config.to_dict(), model.config.to_diff_dict()):
        config, _ = fmt.read(written(raw))
        with skeleton():
            ours = cls(config)
        todo = ours.plan(fmt, tensors(model))
        assert todo.problems == []
        assert todo.dropped == todo.initialised == {}
        assert {n for step in todo.steps for n in step.ours} == set(ours.state_dict())
        assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in model.parameters()) == count
        assert all(t.is_meta for t in ours.state_dict().values())
    preset = importlib.import_module(TABLE[system].module).PRESETS[checkpoint]()
    if system == "vit":  # the names of the classes are a checkpoint's affair
        assert (preset.vision, len(preset.labels)) == (config.vision, len(config.labels))
    else:
        assert preset == config


@every_checkpoint
def test_what_we_write_is_what_was_published(checkpoint: str) -> None:
    """Names and shapes of a save are those of the file, and its config gives the same model in transformers."""
    system = PUBLISHED[checkpoint][0]
    cls, model = TABLE[system].resolve(), reference(checkpoint)
    config, _ = cls.formats["hf"].read(written(model.config.to_dict()))
    with skeleton():
        ours = cls(config)
        twin = type(model)(type(model.config)(**cls.formats["hf"].write(config)))
    shapes = {n: t.shape for n, t in ours.to_hub(ours.state_dict()).items()}
    published = {n.replace("decoder_encoder.layer", "decoder_layers"): t.shape for n, t in tensors(model).items()}
    assert shapes == published
    assert {n: t.shape for n, t in tensors(twin).items()} == {n: t.shape for n, t in tensors(model).items()}


def test_every_system_has_a_published_checkpoint_here() -> None:
    assert {system for system, _, _ in PUBLISHED.values()} == set(TABLE)


@pytest.mark.proves("clip", "weights: the oldest published files")
def test_clip_files_of_2021() -> None:
    """OpenAI's own files on the Hub: a buffer of positions a tower, and configs with every default spelled out."""
    cls = TABLE["clip"].resolve()
    fmt, model = cls.formats["hf"], reference("openai/clip-vit-base-patch32")
    generation = {"bad_words_ids": None, "num_beams": 1, "top_k": 50, "torch_dtype": None, "pruned_heads": {}}
    text = {"eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1, "dropout": 0.0, "projection_dim": 512}
    vision = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None, "dropout": 0.0, "projection_dim": 512}
    raw = {
        "model_type": "clip",
        "projection_dim": 512,
        "logit_scale_init_value": 2.6592,
        "text_config": generation | text,
        "text_config_dict": None,
        "vision_config": generation | vision,
        "vision_config_dict": None,
    }
    config, _ = fmt.read(raw)
    assert config.eot_id == 49407
    with skeleton():
        ours = cls(config)
    old = tensors(model)
    old["text_model.embeddings.position_ids"] = torch.empty(1, 77, dtype=torch.int64, device="meta")
    old["vision_model.embeddings.position_ids"] = torch.empty(1, 50, dtype=torch.int64, device="meta")
    todo = ours.plan(fmt, old)
    assert todo.problems == []
    assert len(todo.dropped) == 2
