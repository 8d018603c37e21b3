"""CLIP in OpenCLIP's own files against OpenCLIP: outputs, loss, first gradients, round trip; and SigLIP's loss."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
import types
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file
from torch import Tensor

import polymodal
from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError, WeightsError
from polymodal.heads.contrastive import ContrastiveHead, SigmoidHead
from polymodal.modalities.image import Exact, ImageProcessor, ShortestEdge
from polymodal.nn.skeleton import skeleton
from polymodal.systems.base import System
from polymodal.systems.clip import CLIP
from polymodal.tokenizers.text import TextTokenizer
from tests.nano import nano
from tests.parity.harness import random_batch, randomise

if importlib.util.find_spec("open_clip") is None:
    install = "pip install --no-deps -c constraints.txt open_clip_torch, or make test"
    pytest.skip(f"open_clip is not installed: {install}", allow_module_level=True)


def import_open_clip() -> Any:
    """OpenCLIP without torchvision, of which it needs names for its image transforms; ours are compared elsewhere.

    The stand-in is gone when this returns: others, transformers among them, look whether torchvision is there.
    """
    import transformers.utils

    if transformers.utils.is_torchvision_available():
        return importlib.import_module("open_clip")
    transforms = ["Normalize", "Compose", "RandomResizedCrop", "ToTensor", "Resize", "CenterCrop"]
    transforms += ["ColorJitter", "Grayscale", "InterpolationMode"]
    names: dict[str, list[str]] = {
        "torchvision": [],
        "torchvision.transforms": transforms,
        "torchvision.transforms.functional": [],
        "torchvision.ops": [],
        "torchvision.ops.misc": ["FrozenBatchNorm2d"],
    }
    before = {name: sys.modules.get(name) for name in (*names, "timm")}
    for name, attributes in names.items():
        module = sys.modules[name] = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        for attribute in attributes:
            setattr(module, attribute, type(attribute, (), {"BICUBIC": 3}))
    sys.modules["timm"] = None  # type: ignore[assignment]  # towers that we do not read
    try:
        return importlib.import_module("open_clip")
    finally:
        for name, module in before.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


open_clip = import_open_clip()

WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
MODEL: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 20, "patch_size": 4, "width": 32, "layers": 3, "head_width": 8, "mlp_ratio": 1.75},
    "text_cfg": {"context_length": 12, "vocab_size": 50, "width": 48, "heads": 4, "layers": 2},
}
PREPROCESS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear", "resize_mode": "squash"}


def save(model: Any, folder: Path, config: dict[str, Any], **preprocess: Any) -> Path:
    """A folder as OpenCLIP's own push to the Hub lays it out."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    return folder


def pair(folder: Path, **fields: Any) -> tuple[System, Any]:
    torch.manual_seed(0)
    config = MODEL | fields
    reference = open_clip.CLIP(**config, output_dict=True).eval()
    randomise(reference)
    return polymodal.load(save(reference, folder, config)), reference


def with_ends(batch: Batch) -> Batch:
    """Texts of several lengths: one end token, the largest id, then OpenCLIP's padding of zeros."""
    ids = batch["ids"].clamp(1, 48)
    for row, end in zip(ids, (3, 11, 6, 8, 5), strict=True):
        row[end], row[end + 1 :] = 49, 0
    return Batch(batch | {"ids": ids})


def relative(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).detach().abs().max()) / max(1.0, float(theirs.detach().abs().max()))


@pytest.mark.proves("clip", "parity: outputs, loss, first gradients (open_clip)")
@pytest.mark.parametrize("fields", [{"quick_gelu": True}, {"quick_gelu": False}, {}], ids=["quick", "gelu", "default"])
def test_clip_matches_open_clip(tmp_path: Path, fields: dict[str, Any]) -> None:
    system, reference = pair(tmp_path, **fields)
    assert system.config.vision.activation == ("quick_gelu" if fields.get("quick_gelu") else "gelu")
    batch = with_ends(random_batch(system, 5))
    theirs = reference(batch["pixels"], batch["ids"])
    assert relative(system.encode(Batch(pixels=batch["pixels"])), theirs["image_features"]) <= 1e-5
    assert relative(system.encode(Batch(ids=batch["ids"])), theirs["text_features"]) <= 1e-5
    assert relative(system(batch), reference.get_logits(batch["pixels"], batch["ids"])[0]) <= 1e-5
    expected = open_clip.loss.ClipLoss()(theirs["image_features"], theirs["text_features"], theirs["logit_scale"])
    loss = system.loss(batch).mean
    assert relative(loss, expected) <= 1e-5
    loss.backward()
    expected.backward()
    ours = system.to_hub({n: p.grad for n, p in system.named_parameters()}, "open_clip")
    gradients = {n: p.grad for n, p in reference.named_parameters()}
    assert ours.keys() == gradients.keys()
    assert max(g.abs().max() for g in gradients.values()) > 1e-3
    errors = {name: relative(ours[name], gradient) for name, gradient in gradients.items()}
    assert max(errors.values()) <= 1e-5, errors


@pytest.mark.proves("clip", "weights: OpenCLIP's files, ours, OpenCLIP's files again: equal")
@pytest.mark.parametrize("sharded", [False, True])
def test_round_trip(tmp_path: Path, sharded: bool) -> None:
    system, reference = pair(tmp_path / "theirs", quick_gelu=True)
    ours = system.save(tmp_path / "ours", format_name="open_clip", shard_bytes=20_000 if sharded else 5 << 30)
    files = sorted(p.name for p in ours.iterdir())
    assert files[0] == CONFIG
    assert (files[1:] == [WEIGHTS]) != sharded
    assert not [f for f in files if f.startswith("model")]
    again = polymodal.load(ours)
    assert again.config == system.config
    assert again.images == system.images
    assert again.fingerprint == system.fingerprint
    if sharded:
        return
    tensors = load_file(ours / WEIGHTS)
    assert tensors.keys() == reference.state_dict().keys()
    assert all(torch.equal(t, tensors[n]) for n, t in reference.state_dict().items())
    fresh = open_clip.CLIP(**json.loads((ours / CONFIG).read_text())["model_cfg"])
    fresh.load_state_dict(tensors, strict=True)


@pytest.mark.proves("clip", "weights: OpenCLIP's files to the Hub's and back: equal")
def test_from_one_format_to_the_other_and_back(tmp_path: Path) -> None:
    system, reference = pair(tmp_path / "theirs")
    hub = polymodal.load(system.save(tmp_path / "hub"))
    back = hub.save(tmp_path / "back", format_name="open_clip")
    assert all(torch.equal(t, load_file(back / WEIGHTS)[n]) for n, t in reference.state_dict().items())
    assert polymodal.load(back).config == system.config


PUBLISHED = {
    "ViT-B-32": 151_277_313,
    "ViT-B-32-quickgelu": 151_277_313,
    "ViT-L-14": 427_616_513,
    "ViT-H-14": 986_109_441,
    "ViT-g-14": 1_366_678_273,
    "ViT-bigG-14": 2_539_567_105,
}


@pytest.mark.proves("clip", "weights: total on names and shapes of OpenCLIP's full-size models")
@pytest.mark.parametrize("name", PUBLISHED)
def test_full_size(name: str) -> None:
    fmt, raw = CLIP.formats["open_clip"], open_clip.get_model_config(name)
    config, _ = fmt.read({"model_cfg": raw})
    with skeleton():
        ours, theirs = CLIP(config), open_clip.CLIP(**raw)
        again = open_clip.CLIP(**fmt.write(config)["model_cfg"])
    todo = ours.plan(fmt, theirs.state_dict())
    assert (todo.problems, todo.dropped) == ([], {})
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for p in theirs.parameters()) == PUBLISHED[name]
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in theirs.state_dict().items()}


@pytest.mark.parametrize(
    ("part", "fields"),
    [
        ("vision_cfg", {"timm_model_name": "vit_base_patch16_siglip_224"}),
        ("vision_cfg", {"no_ln_pre": True}),
        ("vision_cfg", {"attentional_pool": True}),
        ("vision_cfg", {"layers": [3, 4, 6, 3]}),
        ("text_cfg", {"pool_type": "last"}),
        ("text_cfg", {"hf_model_name": "xlm-roberta-base"}),
        ("text_cfg", {"no_causal_mask": True}),
        ("text_cfg", {"novel": 1}),
        ("", {"custom_text": True}),
        ("", {"init_logit_bias": -10}),
        ("", {"multimodal_cfg": {}}),
    ],
)
def test_other_architectures_are_refused_by_name(tmp_path: Path, part: str, fields: dict[str, Any]) -> None:
    config = MODEL | ({part: MODEL[part] | fields} if part else fields)
    folder = save(open_clip.CLIP(**MODEL), tmp_path, config)
    with pytest.raises(ConfigError, match=next(iter(fields))):
        polymodal.load(folder)


def test_options_at_their_defaults_change_nothing(tmp_path: Path) -> None:
    """A config in which every option of OpenCLIP is spelled out is read as the short one."""
    vision = asdict(open_clip.CLIPVisionCfg(**MODEL["vision_cfg"]))
    text = asdict(open_clip.CLIPTextCfg(**MODEL["text_cfg"]))
    vision = {n: v for n, v in vision.items() if not n.startswith(("timm_", "attn_")) or n == "timm_model_name"}
    text = {n: v for n, v in text.items() if not n.startswith("hf_") or n == "hf_model_name"}
    del text["tokenizer_mode"]
    short, _ = CLIP.formats["open_clip"].read({"model_cfg": MODEL})
    assert CLIP.formats["open_clip"].read({"model_cfg": MODEL | {"vision_cfg": vision, "text_cfg": text}})[0] == short


def test_what_the_format_cannot_say_is_not_saved(tmp_path: Path) -> None:
    model = nano("clip")  # another epsilon, and its vision tower has QuickGELU while its text tower has not
    with pytest.raises(ConfigError, match=r"cannot hold vision\.norm_eps, text\.activation"):
        model.save(tmp_path, format_name="open_clip")
    assert not list(tmp_path.glob("*.safetensors"))


def test_problems_are_listed(tmp_path: Path) -> None:
    _, reference = pair(tmp_path)
    state = {n: t for n, t in reference.state_dict().items() if n != "ln_final.bias"} | {"extra": torch.zeros(1)}
    save_file({n: t.contiguous() for n, t in state.items()}, tmp_path / WEIGHTS)
    with pytest.raises(WeightsError) as error:
        polymodal.load(tmp_path)
    assert len(error.value.problems) == 2


# ---- processors ----


@pytest.mark.parametrize(
    ("preprocess", "expected"),
    [
        ({}, {"resample": "bicubic", "resize": ShortestEdge(size=20)}),
        (PREPROCESS, {"resample": "bilinear", "resize": Exact(height=20, width=20), "std": (0.2, 0.3, 0.4)}),
        ({"interpolation": "random", "resize_mode": None}, {"resample": "bicubic", "resize": ShortestEdge(size=20)}),
        ({"size": [16, 16], "mode": "RGB", "fill_color": 0}, {"resize": ShortestEdge(size=16)}),
    ],
)
def test_preprocessing_is_the_folders(tmp_path: Path, preprocess: dict[str, Any], expected: dict[str, Any]) -> None:
    system = polymodal.load(save(open_clip.CLIP(**MODEL), tmp_path, MODEL, **preprocess))
    assert isinstance(system.images, ImageProcessor)
    assert system.images.alpha == "drop"
    assert {name: getattr(system.images, name) for name in expected} == expected
    assert (system.images.crop is not None) == isinstance(system.images.resize, ShortestEdge)
    assert ImageProcessor.from_open_clip(system.images.to_open_clip(), 1) == system.images
    picture = PILImage.new("RGBA", (31, 47), (255, 0, 0, 0))
    assert system.embed([picture]).shape == (1, 24)


@pytest.mark.parametrize(
    "preprocess",
    [
        {"resize_mode": "longest"},
        {"interpolation": "lanczos"},
        {"size": [16, 20]},
        {"mode": "L"},
        {"mean": [0.5]},
        {"std": "x"},
        {"gamma": 2},
    ],
)
def test_preprocessing_that_is_not_ours_is_refused(tmp_path: Path, preprocess: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        polymodal.load(save(open_clip.CLIP(**MODEL), tmp_path, MODEL, **preprocess))


def test_a_processor_without_words_in_the_format_is_not_saved(tmp_path: Path) -> None:
    system, _ = pair(tmp_path / "theirs")
    system.images = ImageProcessor(resize=None)
    with pytest.raises(ConfigError, match="no words for this image processor"):
        system.save(tmp_path / "ours", format_name="open_clip")


def test_the_tokenizer_beside_the_weights_is_read_and_written(tmp_path: Path) -> None:
    tokenizer = TextTokenizer.train_bpe(["a red cup on a blue table"] * 3, 530, length=12)
    config = MODEL | {"text_cfg": MODEL["text_cfg"] | {"vocab_size": tokenizer.vocab_size}}
    folder = save(open_clip.CLIP(**config), tmp_path / "theirs", config)
    tokenizer.save(folder)
    system = polymodal.load(folder)
    again = polymodal.load(system.save(tmp_path / "ours", format_name="open_clip"))
    texts = ["a red cup", "a table"]
    assert torch.equal(system.embed(texts), again.embed(texts))
    assert system.embed(texts).shape == (2, 24)


# ---- losses ----


def unit(rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, 16, generator=generator), dim=-1).requires_grad_()


@pytest.mark.proves("siglip", "parity: the loss and its gradients (open_clip)")
@pytest.mark.parametrize("scale", [10.0, 117.0])
def test_siglip_loss_matches_open_clip(scale: float) -> None:
    head, (images, texts) = SigmoidHead(), (unit(7, 0), unit(7, 1))
    head.logit_scale.data.fill_(scale).log_()
    ours = head.loss(images, texts).mean
    expected = open_clip.loss.SigLipLoss()(images, texts, head.logit_scale.exp(), head.logit_bias)
    assert relative(ours, expected) <= 1e-5
    inputs = (images, texts, head.logit_scale, head.logit_bias)
    pairs = zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(expected, inputs), strict=True)
    assert max(relative(a, b) for a, b in pairs) <= 1e-5


@pytest.mark.proves("clip", "parity: the loss and its gradients (open_clip)")
@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_clip_loss_matches_open_clip(scale: float) -> None:
    head, (images, texts) = ContrastiveHead(), (unit(7, 0), unit(7, 1))
    head.logit_scale.data.fill_(scale).log_()
    ours = head.loss(images, texts).mean
    expected = open_clip.loss.ClipLoss()(images, texts, head.logit_scale.exp())
    assert relative(ours, expected) <= 1e-5
    inputs = (images, texts, head.logit_scale)
    pairs = zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(expected, inputs), strict=True)
    assert max(relative(a, b) for a, b in pairs) <= 1e-5
