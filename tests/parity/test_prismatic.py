"""Prismatic's published facts; its towers and its language model are transformers', put together anew in the test.

Its own code asks for a timm of 2023 and cannot be installed beside today's torch.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import polymodal
from polymodal.asking import ask, seen
from polymodal.cli import main
from polymodal.core.batch import Batch
from polymodal.core.chat import Chat, Turn
from polymodal.core.errors import ConfigError, MediaError, WeightsError
from polymodal.core.sample import Image, Text
from polymodal.heads.lm import IGNORE
from polymodal.modalities.stacked import MAX_SIDE, StackedProcessor
from polymodal.nn.skeleton import skeleton
from polymodal.samplers.autoregressive import Settings
from polymodal.systems.prismatic import PRESETS, Prismatic
from tests.nano import NANO
from tests.parity.harness import compare_gradients, randomise, transformers_class
from tests.talking import talking

SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
WIDE = SIZES | {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 50}
PATCH = {"patch_size": 7, "image_size": 28}
TEXT = {
    "model_type": "llama", "vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "siglip": {"vision_backbone_id": "siglip-vit-so400m", "vision_config": {"featurizer_config": WIDE}},
    "dinov2 and siglip": {
        "vision_backbone_id": "dinosiglip-vit-so-224px",
        "vision_config": {"featurizer_config": SIZES, "fused_featurizer_config": WIDE},
    },
}


class Together(nn.Module):
    """The published description, of transformers' parts."""

    def __init__(self, fused: bool, text: dict[str, Any] = TEXT) -> None:
        super().__init__()
        siglip = transformers_class("SiglipVisionConfig")(
            **WIDE, **PATCH, hidden_act="gelu", attn_implementation="eager"
        )
        self.siglip = transformers_class("SiglipVisionModel")(siglip)
        width = 32
        if fused:
            dino = transformers_class("Dinov2WithRegistersConfig")(
                **{k: v for k, v in SIZES.items() if k != "intermediate_size"}, **PATCH, mlp_ratio=2,
                attn_implementation="eager",
            )  # fmt: skip
            self.dino = transformers_class("Dinov2WithRegistersModel")(dino)
            width += 24
            self.projector = nn.Sequential(
                nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, 32), nn.GELU(), nn.Linear(32, 32)
            )
        else:
            self.projector = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, 32))
        self.llm = transformers_class("LlamaForCausalLM")(
            transformers_class("LlamaConfig")(**text, attn_implementation="eager")
        )
        self.fused = fused

    def forward(self, pixels: Tensor, ids: Tensor, labels: Tensor, valid: Tensor) -> Any:
        """``ids`` have no places for patches, which go behind the first token."""
        patches = self.siglip(pixels[:, -3:], output_hidden_states=True).hidden_states[-2]
        if self.fused:
            first = self.dino(pixels[:, :3], output_hidden_states=True).hidden_states[-2][:, 5:]
            patches = torch.cat([first, patches], 2)
        seen = self.projector(patches)
        text = self.llm.get_input_embeddings()(ids)
        none = torch.full(seen.shape[:2], IGNORE)
        return self.llm(
            inputs_embeds=torch.cat([text[:, :1], seen, text[:, 1:]], 1),
            labels=torch.cat([labels[:, :1], none, labels[:, 1:]], 1),
            attention_mask=torch.cat([valid[:, :1], none == IGNORE, valid[:, 1:]], 1).long(),
        )


# transformers' names within a tower, as patterns, and timm's, which joins q, k and v (of its pooled head k and v).
LAYER = {r"layer_norm(\d)": r"norm\1", r"self_attn\.out_proj": "attn.proj", r"attention\.o_proj": "attn.proj"}
LAYER |= {r"layer_scale(\d)\.lambda1": r"ls\1.scale_factor", r"^encoder\.layers?\.": "blocks."}
ENDS = {
    r"^embeddings\.(patch_embedding|patch_embeddings\.projection)\.": "patch_embed.proj.",
    r"^embeddings\.cls_token": "cls_token", r"^embeddings\.register_tokens": "reg_token",
    r"^embeddings\.position_embedding(s|\.weight)": "pos_embed", r"^(post_layernorm|layernorm)\.": "norm.",
    r"^head\.probe": "attn_pool.latent", r"^head\.layernorm": "attn_pool.norm", r"^head\.mlp": "attn_pool.mlp",
    r"^head\.attention\.out_proj": "attn_pool.proj",
}  # fmt: skip


def tower_file(tower: dict[str, Tensor]) -> dict[str, Tensor]:
    """A tower of transformers under timm's names; DINOv2's class token has its position in it, and no row for it."""
    file = {}
    for name, tensor in tower.items():
        kind = name.rsplit(".", 1)[-1]
        if name.startswith("head.attention.in_proj"):
            kind = kind.removeprefix("in_proj_")
            file[f"attn_pool.q.{kind}"], file[f"attn_pool.kv.{kind}"] = tensor.tensor_split([len(tensor) // 3])
        elif "k_proj" in name or "v_proj" in name or "mask_token" in name:
            continue
        elif "q_proj" in name:
            layer = re.sub(r"^encoder\.layers?\.(\d+)\..*", r"blocks.\1.attn.qkv", name)
            file[f"{layer}.{kind}"] = torch.cat([tower[name.replace("q_proj", f"{n}_proj")] for n in "qkv"])
        else:
            new = name
            for pattern, theirs in (LAYER | ENDS).items():
                new = re.sub(pattern, theirs, new)
            file[new] = tensor
    if "cls_token" in file:
        file["pos_embed"] = file["pos_embed"][:, 1:]
    elif file["pos_embed"].ndim == 2:
        file["pos_embed"] = file["pos_embed"][None]
    return {name: tensor.clone() for name, tensor in file.items()}


def file_of(model: Together, *, gradients: bool = False) -> dict[str, Tensor]:
    """Weights, or gradients (zero where there are none), under the names of the published files."""
    own = {
        name: (torch.zeros_like(p) if p.grad is None else p.grad) if gradients else p.detach()
        for name, p in model.named_parameters()
    }

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): t for name, t in own.items() if name.startswith(prefix)}

    towers = {"featurizer": "dino.", "fused_featurizer": "siglip."} if model.fused else {"featurizer": "siglip."}
    file = {f"language_model.{name}": tensor for name, tensor in part("llm.").items()}
    for name, tensor in part("projector.").items():
        number, kind = name.split(".")
        file[f"projector.fc{int(number) // 2 + 1}.{kind}"] = tensor
    for theirs, ours in towers.items():
        file |= {f"vision_backbone.{theirs}.{n}": t for n, t in tower_file(part(ours)).items()}
    return file


@pytest.fixture(params=CASES, scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Prismatic, Together, Path]:
    folder, fields = tmp_path_factory.mktemp("reference"), CASES[request.param]
    towers = fields["vision_config"]
    torch.manual_seed(0)
    reference = Together(fused=len(towers) > 1).eval()
    randomise(reference, 0.2)
    if reference.fused:  # theirs has a position for the class token, timm's has not
        with torch.no_grad():
            reference.dino.embeddings.position_embeddings[:, 0] = 0
    config = fields | {
        "model_type": "prismatic", "llm_backbone_id": "llama2-7b-pure", "image_sizes": [28] * len(towers),
        "text_config": TEXT,
        "vision_config": {name: tower | {"patch_size": 7} for name, tower in towers.items()},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    save_file(file_of(reference), folder / "model.safetensors")
    model = polymodal.load(folder)
    assert isinstance(model, Prismatic)
    return model, reference, folder


def batch_of(model: Prismatic) -> tuple[Batch, dict[str, Tensor]]:
    """Three rows, the second padded: ours, with places for patches, and theirs without."""
    generator = torch.Generator().manual_seed(0)
    n = model.config.num_features
    ids = torch.randint(3, 90, (3, 9), generator=generator)
    valid = torch.arange(9) < torch.tensor([9, 6, 9])[:, None]
    labels = ids.masked_fill(~valid | (torch.arange(9) < 4), IGNORE)
    pixels = torch.randn(3, 3 * len(model.vision), 28, 28, generator=generator)

    def spread(x: Tensor, fill: int) -> Tensor:
        return torch.cat([x[:, :1], torch.full((3, n), fill).to(x.dtype), x[:, 1:]], 1)

    ours = {"ids": spread(ids, 90), "labels": spread(labels, IGNORE), "valid": spread(valid, True)}
    theirs = {"ids": ids, "labels": labels, "valid": valid, "pixels": pixels}
    return Batch(ours | {"pixels": pixels, "pixels_row": torch.arange(3)}), theirs


@pytest.mark.proves("prismatic", "published facts: outputs, loss and first gradients, of transformers' parts")
def test_outputs_loss_and_gradients(pair: tuple[Prismatic, Together, Path]) -> None:
    model, reference, _ = pair
    batch, inputs = batch_of(model)
    model.train(False)
    result = reference(**inputs)
    valid = batch["valid"]
    torch.testing.assert_close(model(batch)[valid], result.logits[valid], rtol=1e-5, atol=1e-5)
    loss = model.loss(batch).mean
    torch.testing.assert_close(loss, result.loss, rtol=1e-5, atol=1e-5)
    loss.backward()
    result.loss.backward()
    compare_gradients(model, file_of(reference, gradients=True))


@pytest.mark.proves("prismatic", "weights: the names of the published files, both ways")
def test_files(pair: tuple[Prismatic, Together, Path], tmp_path: Path) -> None:
    model, _, folder = pair
    before, after = load_file(folder / "model.safetensors"), load_file(model.save(tmp_path) / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = polymodal.load(tmp_path)
    assert (again.config, again.images) == (model.config, model.images)
    del before["projector.fc1.bias"]
    before["vision_backbone.featurizer.cls_token_2"] = torch.zeros(1)
    save_file(before, folder / "model.safetensors")
    with pytest.raises(WeightsError, match="2 problems"):
        polymodal.load(folder)


def timm_shapes(dim: int, layers: int, hidden: int, patches: int, kind: str) -> dict[str, tuple[int, ...]]:
    """The tensors of one tower as timm 0.9 makes them at 14 pixels a patch."""
    shapes: dict[str, tuple[int, ...]] = {"pos_embed": (1, patches, dim), "patch_embed.proj.weight": (dim, 3, 14, 14)}
    shapes |= {"patch_embed.proj.bias": (dim,), "norm.weight": (dim,), "norm.bias": (dim,)}
    block = {"norm1": (dim,), "norm2": (dim,), "attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim)}
    block |= {"mlp.fc1": (hidden, dim), "mlp.fc2": (dim, hidden)}
    for i in range(layers):
        for name, shape in block.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        if kind == "dino":
            shapes |= {f"blocks.{i}.ls{n}.scale_factor": (dim,) for n in (1, 2)}
    if kind == "dino":
        return shapes | {"cls_token": (1, 1, dim), "reg_token": (1, 4, dim)}
    pool = {"q": (dim, dim), "kv": (2 * dim, dim), "proj": (dim, dim), "norm": (dim,)}
    pool |= {"mlp.fc1": (hidden, dim), "mlp.fc2": (dim, hidden)}
    for name, shape in pool.items():
        shapes |= {f"attn_pool.{name}.weight": shape, f"attn_pool.{name}.bias": shape[:1]}
    return shapes | {"attn_pool.latent": (1, 1, dim)}


def openvla_7b() -> dict[str, tuple[int, ...]]:
    """Names and shapes of openvla/openvla-7b, whose index counts 15,082,474,368 bytes of bf16."""
    dino, siglip = (timm_shapes(1024, 24, 4096, 256, "dino"), timm_shapes(1152, 27, 4304, 256, "siglip"))
    shapes = {f"vision_backbone.featurizer.{n}": s for n, s in dino.items()}
    shapes |= {f"vision_backbone.fused_featurizer.{n}": s for n, s in siglip.items()}
    for number, (into, out) in enumerate(((2176, 8704), (8704, 4096), (4096, 4096)), 1):
        shapes |= {f"projector.fc{number}.weight": (out, into), f"projector.fc{number}.bias": (out,)}
    layer: dict[str, tuple[int, ...]] = {f"self_attn.{n}_proj": (4096, 4096) for n in "qkvo"}
    layer |= {"mlp.gate_proj": (11008, 4096), "mlp.up_proj": (11008, 4096), "mlp.down_proj": (4096, 11008)}
    layer |= {"input_layernorm": (4096,), "post_attention_layernorm": (4096,)}
    for i in range(32):
        shapes |= {f"language_model.model.layers.{i}.{n}.weight": s for n, s in layer.items()}
    shapes |= {f"language_model.{n}.weight": (32064, 4096) for n in ("model.embed_tokens", "lm_head")}
    return shapes | {"language_model.model.norm.weight": (4096,)}


@pytest.mark.proves("prismatic", "weights: total on names and shapes of full-size checkpoints")
def test_names_of_full_size() -> None:
    config = PRESETS["prism-dinosiglip-224px+7b"]()
    shapes = openvla_7b()
    with skeleton():
        model = Prismatic(config)
    todo = model.plan(Prismatic.formats["hf"], {n: torch.empty(s, device="meta") for n, s in shapes.items()})
    assert todo.problems == []
    assert todo.dropped == {}
    assert 2 * sum(p.numel() for p in model.parameters()) == 15_082_474_368
    assert {n: tuple(t.shape) for n, t in model.to_hub(model.state_dict()).items()} == shapes


# What the Hub has beside TRI-ML/prismatic-siglip-224px-7b and, without its actions, beside openvla/openvla-7b.
HUB: dict[str, dict[str, Any]] = {
    "TRI-ML/prismatic-siglip-224px-7b": {
        "arch_specifier": "no-align+gelu-mlp", "hf_llm_id": "lmsys/vicuna-7b-v1.5",
        "image_resize_strategy": "letterbox", "image_sizes": [224], "llm_backbone_id": "vicuna-v15-7b",
        "timm_model_ids": ["vit_so400m_patch14_siglip_224"], "timm_override_act_layers": [None],
        "use_fused_vision_backbone": False, "vision_backbone_id": "siglip-vit-so400m",
    },
    "prism-dinosiglip-224px+7b": {
        "arch_specifier": "no-align+fused-gelu-mlp", "hf_llm_id": "meta-llama/Llama-2-7b-hf",
        "image_resize_strategy": "resize-naive", "image_sizes": [224, 224], "llm_backbone_id": "llama2-7b-pure",
        "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
        "timm_override_act_layers": [None, None], "use_fused_vision_backbone": True,
        "vision_backbone_id": "dinosiglip-vit-so-224px",
    },
}  # fmt: skip
SHARED: dict[str, Any] = {
    "architectures": ["PrismaticForConditionalGeneration"], "auto_map": {"AutoConfig": "configuration_prismatic.X"},
    "llm_max_length": 2048, "model_type": "prismatic", "output_projector_states": False, "pad_to_multiple_of": 64,
    "pad_token_id": 32000, "torch_dtype": "bfloat16", "transformers_version": "4.40.1",
    "text_config": {"model_type": "llama", "pad_token_id": 32000, "torch_dtype": "bfloat16", "vocab_size": 32064},
}  # fmt: skip


@pytest.mark.parametrize("name", HUB)
def test_published_configs(name: str) -> None:
    read, preset = Prismatic.formats["hf"].read(SHARED | HUB[name])[0], PRESETS[name]()
    assert read == preset
    assert preset.num_features == 256
    assert all(PRESETS["prism-dinosiglip+7b"]().towers[i].grid == 27 for i in (0, 1))
    written = Prismatic.formats["hf"].write(preset)
    assert {field: written[field] for field in HUB[name]} == HUB[name]
    assert "vision_config" not in written


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"vision_backbone_id": "resnet"}, "understood: clip-vit-l"),
        ({"timm_override_act_layers": ["quick_gelu"]}, "timm_override_act_layers"),
        ({"llm_backbone_id": "phi-2-3b"}, "llm_backbone_id"),
        ({"arch_specifier": "no-align+fused-gelu-mlp"}, "arch_specifier"),
        ({"image_sizes": [224, 224]}, "not one for each"),
        ({"image_resize_strategy": "pad"}, "image_resize_strategy"),
        ({"action": 1}, "action"),
    ],
)
def test_configs_that_are_refused(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        Prismatic.formats["hf"].read(SHARED | HUB["TRI-ML/prismatic-siglip-224px-7b"] | change)


# ---- what it starts from, and what learns


@pytest.mark.proves("prismatic", "published facts: first weights, and what learns")
def test_first_weights_and_what_learns() -> None:
    torch.manual_seed(0)
    model = Prismatic.build(NANO["prismatic"])
    first, second, third = model.connector.layers
    assert [layer.out_features for layer in (first, second, third)] == [4 * 64, 32, 32]
    for layer in (first, second, third):  # torch's own: uniform up to one over the root of what it reads
        for tensor in (layer.weight, layer.bias):
            bound = layer.in_features**-0.5
            assert 0.8 * bound < float(tensor.detach().abs().max()) <= bound
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    unread = ("vision.1.pool.", *(f"vision.{n}.vit.{part}." for n in (0, 1) for part in ("blocks.1", "norm")))
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith(unread)}


# ---- pictures


def squared(picture: PILImage.Image, fit: str, mean: tuple[float, ...], side: int) -> np.ndarray:
    """The processor's steps, written out: borders, Pillow's bicubic filter, the middle."""
    width, height = picture.size
    if fit == "letterbox":
        x, y = (int((max(picture.size) - length) / 2) for length in picture.size)
        frame = np.empty((height + 2 * y, width + 2 * x, 3), np.uint8)
        frame[:] = [int(m * 255) for m in mean]
        frame[y : y + height, x : x + width] = np.asarray(picture)
        picture = PILImage.fromarray(frame)
        width, height = picture.size
    if fit == "resize-naive":
        return np.asarray(picture.resize((side, side), PILImage.Resampling.BICUBIC))
    if width <= height:
        size = (side, int(side * height / width))
    else:
        size = (int(side * width / height), side)
    whole = np.asarray(picture.resize(size, PILImage.Resampling.BICUBIC))
    top, left = (whole.shape[0] - side) // 2, (whole.shape[1] - side) // 2
    return whole[top : top + side, left : left + side]


@pytest.mark.parametrize("size", [(28, 28), (29, 28), (1, 1), (3, 60), (61, 40), (40, 61), (333, 77)], ids=str)
@pytest.mark.parametrize("fit", ["letterbox", "resize-naive", "resize-crop"])
@pytest.mark.proves("prismatic", "published facts: pixels for both towers, at odd sizes")
def test_pixels(fit: Any, size: tuple[int, int]) -> None:
    means = ((0.485, 0.456, 0.406), (0.5, 0.5, 0.5))
    stds = ((0.229, 0.224, 0.225), (0.5, 0.5, 0.5))
    processor = StackedProcessor(size=28, fit=fit, means=means, stds=stds)
    picture = PILImage.fromarray(np.random.default_rng(1).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    got = processor.from_pil([picture])
    assert got.shape == (1, 6, 28, 28)
    for number, (mean, std) in enumerate(zip(means, stds, strict=True)):
        expected = (squared(picture, fit, mean, 28) / 255 - np.array(mean)) / np.array(std)
        mine = got[0, 3 * number : 3 * number + 3].permute(1, 2, 0).numpy()
        np.testing.assert_allclose(mine, expected, rtol=0, atol=1e-5)
    shown = np.asarray(processor.pictures(Batch(pixels=got))[0])
    assert np.array_equal(shown, squared(picture, fit, means[0], 28))
    assert StackedProcessor.from_hf(json.loads(json.dumps(processor.to_hf()))) == processor
    view = processor.view(*size)
    if fit != "resize-crop" and max(size) > 1:  # the middle of the picture is the middle of what is seen
        middle = view.to_seen(torch.tensor([[size[0] / 2, size[1] / 2]]))
        torch.testing.assert_close(middle, torch.tensor([[14.0, 14.0]]), rtol=0, atol=1.0)


@pytest.mark.parametrize(
    "change",
    [
        {"image_processor_type": "CLIPImageProcessor"}, {"image_resize_strategy": "pad"}, {"means": [[0.5] * 3] * 2},
        {"input_sizes": [[3, 224, 196]]}, {"input_sizes": "x"}, {"interpolations": ["bilinear"]}, {"sharpen": 1},
        {"interpolations": 5}, {"stds": [[0.5, 0.5, 0.0]]}, {"means": [[0.5, 0.5, float("nan")]]},
    ],
)  # fmt: skip
def test_processors_that_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="positive"):
        StackedProcessor(size=224, fit="letterbox", means=((0.5,) * 3,), stds=((0.5, 0.0, 0.5),))
    good = StackedProcessor(size=224, fit="letterbox", means=((0.5,) * 3,), stds=((0.5,) * 3,)).to_hf()
    with pytest.raises(ConfigError, match=next(iter(change))):
        StackedProcessor.from_hf(good | change)


def test_a_strip_needs_no_square_of_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    processor = StackedProcessor(size=28, fit="letterbox", means=((0.5,) * 3,), stds=((0.5,) * 3,))
    made, new = [], PILImage.new
    monkeypatch.setattr(PILImage, "new", lambda mode, size, *colour: made.append(size) or new(mode, size, *colour))
    got = processor.from_pil([new("RGB", (1500, 10_500), "white")])
    assert max(map(max, made)) <= MAX_SIDE
    assert (got[0, 0, :, 13:15] > 0.9).all()
    assert got[0, 0, :, [0, 9, 18, 27]].abs().max() < 0.1


# ---- prompts

PICTURE = PILImage.new("RGB", (40, 30), "red")


@pytest.mark.proves("prismatic", "published facts: prompts, each turn tokenized by itself, patches behind the start")
@pytest.mark.parametrize(
    ("language", "first", "second"),
    [
        ("llama2-7b-pure", "In: what?\nOut:", "In: how many?\nOut:"),
        (
            "vicuna-v15-7b",
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the user's questions. USER: what? ASSISTANT:",
            "USER: how many? ASSISTANT:",
        ),
    ],
)
def test_prompts(language: str, first: str, second: str) -> None:
    model = talking("prismatic")
    assert isinstance(model, Prismatic)
    model.config = replace(model.config, language_id=language)
    words, places = model.tokenizer, [model.config.image_id] * model.config.num_features
    assert words is not None

    def text(string: str) -> list[int]:
        return words.encode(string, special=False)

    asked = Chat.of([Image(PICTURE), "what? "])
    batch = model.prompt([asked])
    assert batch["ids"][0].tolist() == [1, *places, *text(first)]
    assert model.prefill(batch, model.new_memory(1, 300)).shape == (1, words.vocab_size)
    talk = asked.reply("a ring").ask("how many?").reply("two")
    lesson = model.lesson([talk])
    end = model.stop_ids[0]
    said = [[*text("a ring"), end], [*text("two"), end]]
    assert lesson["ids"][0].tolist() == [1, *places, *text(first), *said[0], *text(second), *said[1]]
    assert lesson["labels"][0][lesson["labels"][0] != IGNORE].tolist() == [*said[0], *said[1]]
    ordered = Chat((Turn("system", (Text("Be short."),)), *asked.turns))
    if language.startswith("vicuna"):
        assert model.write_prompt(ordered)[2:] == text("Be short. USER: what? ASSISTANT:")
    else:
        with pytest.raises(MediaError, match="without a system"):
            model.write_prompt(ordered)
    with pytest.raises(MediaError, match="one picture"):
        model.prompt([Chat.of([Image(PICTURE), Image(PICTURE), "what?"])])


def test_ask_and_caption(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a saved folder, in Python and on the command line; ``--show`` writes what the first tower saw."""
    model = talking("prismatic")
    folder = model.save(tmp_path / "model")
    PICTURE.save(tmp_path / "a.png")
    loaded = polymodal.load(folder)
    settings = Settings(max_new_tokens=8)
    answer = ask(loaded, [Image(tmp_path / "a.png"), "what?"], settings)
    assert answer == ask(model, [Image(tmp_path / "a.png"), "what?"], settings)
    arguments = ["--model", str(folder), "--max-tokens", "8", "--json"]
    assert main(["ask", str(tmp_path / "a.png"), "what?", *arguments]) == 0, capsys.readouterr().err
    assert json.loads(capsys.readouterr().out)["answer"].strip() == answer.strip()
    assert main(["caption", str(tmp_path / "a.png"), *arguments, "--show", str(tmp_path / "seen")]) == 0
    shown, tokens = seen(loaded, Image(tmp_path / "a.png"))
    assert (shown[0].size, tokens) == ((16, 16), 16)
    assert list((tmp_path / "seen").iterdir())
