"""Idefics against transformers, and OpenFlamingo's wiring against a re-computation of its published facts."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange, repeat
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file
from torch import Tensor

from polymodal.backbones.decoder import AttentionConfig, Decoder, DecoderConfig, Gated, Learned, Plain
from polymodal.backbones.families import ControlIds
from polymodal.connectors.gated import GatedConfig
from polymodal.connectors.resampler import ResamplerConfig
from polymodal.core.batch import Batch
from polymodal.core.chat import Chat, Turn
from polymodal.core.errors import ConfigError, MediaError, UnsupportedError, WeightsError
from polymodal.core.sample import Image, Text, Video
from polymodal.encoders.vit import ViT, ViTConfig
from polymodal.modalities.image import ImageProcessor
from polymodal.nn.norm import RMS, Layer
from polymodal.nn.rope import Rope
from polymodal.samplers.autoregressive import Settings, complete
from polymodal.serve.engine import Engine, EngineConfig
from polymodal.systems.crossed import CrossedGenerator
from polymodal.systems.flamingo import PRESETS, Flamingo, FlamingoConfig, read_hf
from polymodal.systems.idefics import Idefics
from polymodal.systems.language import LanguageModel, LanguageModelConfig
from polymodal.tokenizers.language import LanguageTokenizer
from tests.parity.harness import (
    assert_greedy_text,
    assert_learns_alike,
    assert_same_files,
    cases,
    randomise,
    save_reference,
    transformers_class,
)

BASE: dict[str, Any] = {
    "vocab_size": 90, "additional_vocab_size": 2, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "vision_config": {
        "embed_dim": 24, "image_size": 28, "patch_size": 7, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "perceiver_config": {
        "resampler_n_latents": 5, "resampler_depth": 2, "resampler_n_heads": 3, "resampler_head_dim": 6,
        "qk_layer_norms_perceiver": True,
    },
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "as released": BASE | {"cross_layer_interval": 2, "qk_layer_norms": True, "use_resampler": True},
    "no resampler, vector gates, all trains": BASE
    | {"alpha_type": "vector", "freeze_text_layers": False, "freeze_vision_layers": False},
    "tied, plain norms": BASE
    | {
        "cross_layer_interval": 4, "use_resampler": True, "tie_word_embeddings": True,
        "perceiver_config": BASE["perceiver_config"] | {"qk_layer_norms_perceiver": False},
    },
}  # fmt: skip
IMAGE, END = 91, 2


@pytest.fixture(params=cases(dict.fromkeys(CASES, "idefics")), scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Idefics, Any, Path]:
    folder = tmp_path_factory.mktemp("reference")
    torch.manual_seed(0)
    config = transformers_class("IdeficsConfig")(**CASES[request.param], attn_implementation="eager")
    reference = transformers_class("IdeficsForVisionText2Text")(config)
    trains = [p.requires_grad for p in reference.parameters()]
    reference.requires_grad_(True)  # frozen parts must differ from their first values, too
    save_reference(reference, folder, 0.2)
    for parameter, flag in zip(reference.parameters(), trains, strict=True):
        parameter.requires_grad_(flag)
    model = Idefics.from_folder(folder, "hf")
    assert isinstance(model, Idefics)
    return model, reference, folder


ROWS: dict[str, list[list[Any]]] = {  # "i" is a picture, "e" the end of a text, a number so many words
    "several, none, late, first": [["i", 3, "i", 2], [7], [4, "i", 2], ["i", 5]],
    "ends of texts": [[2, "i", 2, "e", 3, "i", 1], ["i", "i", 2, "e", "i", 2], ["e", "i", "e", 3]],
    "no picture at all": [[5], [3]],
}


def batch_of(rows: list[list[Any]], image: int = IMAGE, seed: int = 0, words: int = 80) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids: list[list[int]] = []
    for row in rows:
        ids.append([])
        for part in row:
            draw = torch.randint(3, words, (part if isinstance(part, int) else 0,), generator=generator).tolist()
            ids[-1] += [image] if part == "i" else [END] if part == "e" else draw
    longest = max(map(len, ids))
    out = torch.zeros(len(ids), longest, dtype=torch.int64)
    valid = torch.zeros(len(ids), longest, dtype=torch.bool)
    for number, row in enumerate(ids):
        out[number, : len(row)], valid[number, : len(row)] = torch.tensor(row), True
    owner = torch.tensor([n for n, row in enumerate(rows) for part in row if part == "i"], dtype=torch.int64)
    batch = Batch(ids=out, valid=valid, labels=out.masked_fill(~valid | (out == image), -100))
    if len(owner):
        batch |= {"pixels": torch.randn(len(owner), 3, 28, 28, generator=generator), "pixels_row": owner}
    return Batch(batch)


def theirs(batch: Batch) -> dict[str, Tensor]:
    """Padded pictures, and the mask that transformers' own processing makes of the ids."""
    from transformers.models.idefics import processing_idefics as processing

    class Tokenizer:
        eos_token_id = END

        def convert_tokens_to_ids(self, token: str) -> int:
            return IMAGE

    rows, ids = batch["pixels_row"] if "pixels_row" in batch else torch.zeros(0, dtype=torch.int64), batch["ids"]
    counts = torch.bincount(rows, minlength=len(ids))
    most = max(1, int(counts.max()))
    pixels = torch.zeros(len(ids), most, 3, 28, 28)
    for row in range(len(ids)):
        pixels[row, : counts[row]] = batch["pixels"][rows == row] if counts[row] else 0
    mask, _ = processing.image_attention_mask_for_packed_input_ids(ids, Tokenizer(), "pt")
    seen = processing.incremental_to_binary_attention_mask(mask, "pt", num_classes=most)
    valid = batch["valid"].long()
    return {"input_ids": ids, "attention_mask": valid, "pixel_values": pixels, "image_attention_mask": seen}


@pytest.mark.parametrize("rows", ROWS)
def test_outputs_loss_and_gradients(pair: tuple[Idefics, Any, Path], rows: str, tmp_path: Path) -> None:
    model, reference, _ = pair
    batch = batch_of(ROWS[rows])
    model.zero_grad()
    reference.zero_grad()
    logits = reference(**theirs(batch)).logits
    # Its own loss is cut at the old vocabulary and fails with added tokens.
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert_learns_alike(model, batch, reference, logits, expected, tmp_path)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    named = dict(model.named_parameters())
    assert named["new_tokens.weight"].requires_grad
    assert named["gated_blocks.0.attn.q_proj.weight"].requires_grad


@pytest.mark.parametrize("seed", range(5))
def test_greedy_text(pair: tuple[Idefics, Any, Path], seed: int) -> None:
    """One prompt has no picture."""
    model, reference, _ = pair
    batch = batch_of([["i", 3, "i", 2], [6], [4, "i", 2], [1, "i", "i", 5, "e", 2]], seed=seed)
    assert_greedy_text(model, reference, batch, theirs)


def test_round_trip(pair: tuple[Idefics, Any, Path], tmp_path: Path) -> None:
    model, reference, folder = pair
    again = assert_same_files(model, reference, folder, tmp_path)
    batch = batch_of(ROWS["several, none, late, first"])
    with torch.no_grad():
        assert torch.equal(again(**theirs(batch)).logits, reference(**theirs(batch)).logits)


def test_a_missing_or_strange_tensor_is_refused(pair: tuple[Idefics, Any, Path], tmp_path: Path) -> None:
    _, _, folder = pair
    tensors = load_file(folder / "model.safetensors")
    tensors["model.gated_cross_attn_layers.9.alpha_dense"] = tensors.pop("model.gated_cross_attn_layers.0.alpha_dense")
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(WeightsError, match="alpha_dense") as error:
        Idefics.from_folder(tmp_path, "hf")
    assert "missing" in str(error.value)


@pytest.mark.proves("idefics", "parity: pixels, at odd sizes (transformers)")
@pytest.mark.parametrize("size", [(28, 28), (29, 28), (1, 1), (3, 300), (640, 480), (333, 77)], ids=str)
def test_pictures_equal_the_reference(size: tuple[int, int], tmp_path: Path) -> None:
    from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

    from polymodal.systems.idefics import read_images

    reference = IdeficsImageProcessorPil(image_size=28)
    reference.save_pretrained(tmp_path)
    config, _ = Idefics.formats["hf"].read({"model_type": "idefics", **BASE})
    ours = read_images(tmp_path, config)
    assert isinstance(ours, ImageProcessor)
    picture = PILImage.fromarray(np.random.default_rng(1).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    expected = torch.as_tensor(np.asarray(reference.preprocess([picture])))
    torch.testing.assert_close(ours.from_pil([picture]), expected.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("field", "match"),
    [
        ({"additional_vocab_size": 0}, "stand for pictures"),
        ({"cross_layer_interval": 3}, "not a multiple"),
        ({"freeze_text_module_exceptions": ["LayerNorm"]}, "freeze_text_module_exceptions"),
        ({"alpha_type": "matrix"}, "alpha_type"),
        ({"gates": 1}, "gates"),
    ],
    ids=str,
)
def test_configs_that_are_refused(field: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        Idefics.formats["hf"].read({"model_type": "idefics"} | BASE | field)


# ---- OpenFlamingo: no reference installs, so its facts are computed again, under its own names, token by token

TOWER = ViTConfig(
    image_size=28, patch_size=7, dim=24, num_layers=2, num_heads=3, hidden_dim=48, activation="quick_gelu",
    norm_eps=1e-5, patch_bias=False, pre_norm=True,
)  # fmt: skip
LLAMA = DecoderConfig(
    vocab_size=90, context=128, dim=32, num_layers=4, mlp=Gated(hidden_dim=48), norm=RMS(), position=Rope(),
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
)  # fmt: skip
OPT = replace(
    LLAMA, mlp=Plain(hidden_dim=48, activation="relu"), norm=Layer(), position=Learned(count=128, offset=2), tied=True,
    attention=AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=8, qkv_bias=True, out_bias=True),
)  # fmt: skip
FLAMINGO = FlamingoConfig(
    vision=TOWER, resampler=ResamplerConfig(num_latents=5, num_layers=2, num_heads=3, head_dim=4), family="llama",
    gated=GatedConfig(num_heads=2, head_dim=6, hidden_dim=128), backbone=LLAMA, new_tokens=3, chunk_id=90, image_id=91,
    every=2, control=ControlIds(start=1, stop=(2,), pad=0),
)  # fmt: skip
CONFIGS = {
    "llama": FLAMINGO,
    "opt": replace(FLAMINGO, family="opt", backbone=OPT, new_tokens=2, every=1),
    "frames": replace(FLAMINGO, resampler=replace(FLAMINGO.resampler, num_frames=4)),
}
PARTS = ("perceiver.", "lang_encoder.gated_cross_attn_layers.")


def flamingo(name: str = "llama", noise: float = 0.2) -> Flamingo:
    torch.manual_seed(0)
    model = Flamingo.build(CONFIGS[name])
    assert isinstance(model, Flamingo)
    flags = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(True)
    randomise(model, noise)
    for parameter, flag in zip(model.parameters(), flags, strict=True):
        parameter.requires_grad_(flag)
    return model.eval()


def norm(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def attention(w: dict[str, Tensor], name: str, heads: int, x: Tensor, source: Tensor) -> Tensor:
    """One query sequence, one key sequence: (queries, dim) and (keys, dim)."""
    q = rearrange(x @ w[f"{name}.to_q.weight"].T, "n (h d) -> h n d", h=heads)
    k, v = rearrange(source @ w[f"{name}.to_kv.weight"].T, "n (two h d) -> two h n d", two=2, h=heads)
    scores = torch.einsum("hid,hjd->hij", q, k) / q.shape[-1] ** 0.5
    out = torch.einsum("hij,hjd->hid", scores.exp() / scores.exp().sum(-1, keepdim=True), v)
    return rearrange(out, "h n d -> n (h d)") @ w[f"{name}.to_out.weight"].T


def feed_forward(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    hidden = norm(w, f"{name}.0", x) @ w[f"{name}.1.weight"].T
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    return hidden @ w[f"{name}.3.weight"].T


def resample(w: dict[str, Tensor], x: Tensor, c: ResamplerConfig) -> Tensor:
    """(frames, tokens, dim) -> (latents, dim)."""
    if c.num_frames is not None:
        x = x + repeat(w["perceiver.frame_embs"][: len(x)], "f d -> f n d", n=x.shape[1])
    x, latents = rearrange(x, "f n d -> (f n) d"), w["perceiver.latents"]
    for i in range(c.num_layers):
        name = f"perceiver.layers.{i}"
        queries = norm(w, f"{name}.0.norm_latents", latents)
        source = torch.cat([norm(w, f"{name}.0.norm_media", x), queries])
        latents = latents + attention(w, f"{name}.0", c.num_heads, queries, source)
        latents = latents + feed_forward(w, f"{name}.1", latents)
    return norm(w, "perceiver.norm", latents)


def gated(w: dict[str, Tensor], name: str, heads: int, x: Tensor, pictures: list[Tensor], ids: Tensor) -> Tensor:
    """One row: each token by itself, with the picture that its running count names."""
    seen = []
    for place in range(len(x)):
        count = int((ids[: place + 1] == IMAGE).sum())
        query = norm(w, f"{name}.attn.norm", x[place : place + 1])
        zero = torch.zeros_like(query)
        seen.append(attention(w, f"{name}.attn", heads, query, pictures[count - 1]) if count else zero)
    x = x + torch.cat(seen) * w[f"{name}.attn_gate"].tanh()
    return x + feed_forward(w, f"{name}.ff", x) * w[f"{name}.ff_gate"].tanh()


def tower(w: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """What transformers' CLIP gives for patches before its last norm; the file names its weights as open_clip does."""
    config = transformers_class("CLIPVisionConfig")(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48, image_size=28, patch_size=7,
        hidden_act="quick_gelu", attn_implementation="eager",
    )  # fmt: skip
    clip, state = transformers_class("CLIPVisionModel")(config).eval(), {}
    names = {
        "transformer.resblocks": "encoder.layers", "attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1",
        "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2", "ln_pre": "pre_layrnorm",
        "ln_post": "post_layernorm", "class_embedding": "embeddings.class_embedding",
        "positional_embedding": "embeddings.position_embedding.weight", "conv1": "embeddings.patch_embedding",
    }  # fmt: skip
    for name in [n for n in w if n.startswith("vision_encoder.")]:
        new = name.removeprefix("vision_encoder.")
        for theirs, ours in names.items():
            new = new.replace(theirs, ours)
        if "in_proj" in new:
            for kind, part in zip("qkv", w[name].chunk(3), strict=True):
                state[new.replace("attn.in_proj_", f"self_attn.{kind}_proj.")] = part
        else:
            state[new] = w[name]
    deep = "vision_model." if any(n.startswith("vision_model.") for n in clip.state_dict()) else ""
    clip.load_state_dict({f"{deep}{n}": t for n, t in state.items()})
    with torch.no_grad():
        tokens: Tensor = clip(pixels, output_hidden_states=True).hidden_states[-1]
    return tokens[:, 1:]


def language(model: Flamingo, w: dict[str, Tensor]) -> Any:
    """transformers' language model with the weights of the file."""
    c, classes = model.config, {"llama": "LlamaForCausalLM", "opt": "OPTForCausalLM"}
    written = LanguageModel.formats["hf"].write(LanguageModelConfig(family=c.family, backbone=c.backbone))
    config = transformers_class(classes[c.family].replace("ForCausalLM", "Config"))(
        **written | {"vocab_size": model.vocab_size, "pad_token_id": 0}, attn_implementation="eager"
    )
    reference = transformers_class(classes[c.family])(config).eval()
    base = "model.decoder" if c.family == "opt" else "model"
    state = {
        n.removeprefix("lang_encoder.").replace("old_decoder_blocks", f"{base}.layers"): t
        for n, t in w.items()
        if n.startswith("lang_encoder.") and not n.startswith(PARTS)
    }
    if c.backbone.tied:
        state["lm_head.weight"] = state[f"{base}.embed_tokens.weight"]
    reference.load_state_dict(state)
    return reference


@pytest.mark.proves("flamingo", "published facts: outputs, loss and first gradients, computed again (OpenFlamingo)")
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("rows", ["several, none, late, first", "no picture at all"])
def test_openflamingo_computed_again(name: str, rows: str) -> None:
    """Logits, loss and the gradients of all that learns."""
    model = flamingo(name)
    c, batch = model.config, batch_of(ROWS[rows])
    w = {n: t.detach().clone() for n, t in model.to_hub(model.state_dict()).items()}
    for part, tensor in w.items():
        tensor.requires_grad_(part.startswith(PARTS))
    reference = language(model, w).requires_grad_(False)
    table = reference.get_input_embeddings().weight.requires_grad_(True)
    owner = batch["pixels_row"] if "pixels_row" in batch else torch.zeros(0, dtype=torch.int64)
    features = tower(w, batch["pixels"]) if len(owner) else torch.zeros(0, 16, 24)
    pictures = [
        [resample(w, features[i][None], c.resampler) for i in (owner == row).nonzero()[:, 0]]
        for row in range(len(batch["ids"]))
    ]
    layers = reference.model.decoder.layers if c.family == "opt" else reference.model.layers
    for index in range(c.every - 1, c.backbone.num_layers, c.every):

        def insert(_: Any, inputs: tuple[Tensor, ...], more: dict[str, Any], index: int = index) -> Any:
            x, part = inputs[0], f"lang_encoder.gated_cross_attn_layers.{index}"
            x = torch.stack([gated(w, part, 2, x[r], pictures[r], batch["ids"][r]) for r in range(len(x))])
            return (x, *inputs[1:]), more

        layers[index].register_forward_pre_hook(insert, with_kwargs=True)
    valid = batch["valid"]
    logits = reference(input_ids=batch["ids"], attention_mask=valid.long()).logits
    torch.testing.assert_close(model(batch)[valid], logits[valid], rtol=1e-5, atol=1e-5)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    loss = model.loss(batch).mean
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    zeros = {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in model.state_dict(keep_vars=True).items()}
    ours = model.to_hub(zeros)
    for part, tensor in w.items():
        if part.startswith(PARTS):
            gradient = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            torch.testing.assert_close(ours[part], gradient, rtol=1e-5, atol=1e-5, msg=part)
    new = zeros["new_tokens.weight"]
    torch.testing.assert_close(new, table.grad[90:], rtol=1e-5, atol=1e-5)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.proves("flamingo", "published facts: a fresh model is its language model")
@pytest.mark.parametrize("name", CONFIGS)
def test_a_fresh_model_is_its_language_model(name: str) -> None:
    """To the bit, whatever the pictures are: the gates are closed."""
    torch.manual_seed(0)
    model = Flamingo.build(CONFIGS[name]).eval()
    assert isinstance(model, Flamingo)
    batch = batch_of(ROWS["several, none, late, first"], words=90)
    x = model.backbone(model.layout(batch, model.embed(batch["ids"]))).x
    assert torch.equal(model(batch), model.scores(x))
    text = batch_of([[9], [5]], words=90)
    alone = model.backbone.logits(model.backbone(model.backbone.text(text["ids"], text["valid"])).x)
    assert torch.equal(model(text)[..., :90], alone)


@pytest.mark.proves("flamingo", "published facts: first weights, and what learns")
def test_first_weights_and_what_learns() -> None:
    torch.manual_seed(0)
    model = Flamingo.build(replace(FLAMINGO, vision=replace(TOWER, dim=96), new_tokens=2))
    learns = {n for n, p in model.named_parameters() if p.requires_grad}
    assert learns == {
        n for n, _ in model.named_parameters() if n.startswith(("resampler.", "gated_blocks.", "new_tokens."))
    }
    assert {n for n, _ in model.named_parameters()} - set(model.no_decay()) == {
        n for n in learns if n.startswith("gated_blocks.")
    }
    state = model.state_dict()
    assert state["resampler.latents"].std() == pytest.approx(1, abs=0.1)
    for name, tensor in state.items():
        if name.endswith("_gate"):
            assert not tensor.any()
        elif name.startswith(("resampler.blocks", "gated_blocks")) and tensor.ndim == 2:
            bound = tensor.shape[1] ** -0.5  # uniform, as torch starts linear layers
            assert tensor.abs().max() <= bound
            assert tensor.std() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert {n: p().gated_layers for n, p in PRESETS.items()} == PRESET_LAYERS


PRESET_LAYERS = {
    "openflamingo/OpenFlamingo-9B-deprecated": tuple(range(3, 32, 4)),
    "flamingo-opt-1.3b": tuple(range(24)),
}


# ---- memory, prompts and files of OpenFlamingo


def read_from(memory_rows: list[list[Any]], model: CrossedGenerator, capacity: int = 60) -> tuple[Batch, Any, Tensor]:
    batch = batch_of(memory_rows)
    del batch["labels"]
    memory = model.new_memory(len(memory_rows), capacity)
    return batch, memory, model.prefill(batch, memory)


FEW: list[list[Any]] = [["i", 2, "i", 3, "i", 1], [6], [1, "i", 2]]


def test_text_after_the_prompt_sees_the_last_picture() -> None:
    """Token by token, in pieces, and all at once; a row without pictures goes on without."""
    model = flamingo()
    batch, memory, scores = read_from(FEW, model)
    text = torch.randint(3, 80, (3, 5), generator=torch.Generator().manual_seed(3))
    stepped = [scores] + [model.step(text[:, i], memory) for i in range(5)]
    _, other, _ = read_from(FEW, model)
    torch.testing.assert_close(model.resume(text, other), stepped[-1], rtol=1e-5, atol=1e-5)
    for row in range(3):
        part, length = batch.rows(row, row + 1), int(batch["valid"][row].sum())
        whole = Batch(part | {"ids": torch.cat([part["ids"][:, :length], text[row : row + 1]], 1)})
        del whole["valid"]
        with torch.no_grad():
            expected = model(whole)[0, length - 1 :]
        torch.testing.assert_close(torch.stack(stepped, 1)[row], expected, rtol=1e-5, atol=1e-5)
        # The pictures before the last one count only through the text that saw them.
        assert model.plain_from(Batch(ids=part["ids"][:, :length])) == max(
            [0, *((part["ids"][0] == IMAGE).nonzero()[:, 0] + 1).tolist()]
        )


def test_rows_of_the_memory_move_with_their_pictures() -> None:
    model = flamingo()
    _, memory, _ = read_from(FEW, model)
    text = torch.tensor([5, 6, 7])
    expected = model.step(text, memory)
    _, memory, _ = read_from(FEW, model)
    order = torch.tensor([2, 0, 0, 1])
    memory.select(order)
    assert memory.sees == [True, True, True, False]
    torch.testing.assert_close(model.step(text[order], memory), expected[order], rtol=1e-5, atol=1e-5)
    _, memory, _ = read_from(FEW, model)
    other = model.new_memory(2, 80)
    other.put(0, memory, 1)
    other.put(1, memory, 0)
    torch.testing.assert_close(model.step(text[[1, 0]], other), expected[[1, 0]], rtol=1e-5, atol=1e-5)
    other.cut(1, other.lengths[1] - 1)
    torch.testing.assert_close(model.step(text[[1, 0]], other)[1], expected[0], rtol=1e-5, atol=1e-5)
    assert memory.nbytes > memory.keys.nbytes + memory.values.nbytes
    memory.select(torch.tensor([1]))
    assert memory.sees == [False]
    assert memory.media.shape[2] == 1


def test_the_engine_gives_each_request_what_it_gets_alone() -> None:
    """Continuous batching, chunks and the prefix cache: the last picture goes with its row."""
    model, words = flamingo(), tokenizer([])
    prompts = [Batch({k: v for k, v in batch_of([row], seed=n).items() if k != "labels"}) for n, row in enumerate(FEW)]
    for settings in (Settings(max_new_tokens=6), Settings(max_new_tokens=5, beams=3)):
        alone = [[a.ids for a in complete(model, prompt, settings, words)] for prompt in prompts]
        with Engine(model, words, EngineConfig(tokens=2048, shortest_prefix=2, chunk=4)) as engine:
            handles = [engine.submit(prompt, settings) for prompt in [*prompts, prompts[0]]]
            got = [[a.ids for a in handle.result()] for handle in handles]
            assert engine.prefixes is not None
            assert engine.prefixes.hits == 1
        assert got == [*alone, alone[0]]


def test_places_and_pictures_must_agree() -> None:
    model, batch = flamingo(), batch_of(FEW)
    for wrong in (
        Batch(batch | {"pixels_row": torch.tensor([0, 0, 1, 2])}),
        Batch({k: v for k, v in batch.items() if not k.startswith("pixels")}),
        Batch(batch | {"pixels": batch["pixels"][1:], "pixels_row": batch["pixels_row"][1:]}),
    ):
        with pytest.raises(MediaError, match="places for pictures"):
            model(wrong)


TOKENS = ["<fake_token_around_image>", "<image>", "<|endofchunk|>", "<end_of_utterance>"]


def tokenizer(added: list[str]) -> LanguageTokenizer:
    out = LanguageTokenizer.train_bpe(["an image of two cats, a red cup. Question: what is it? Answer:"] * 3, 300)
    out.backend.add_special_tokens(added)
    return out


@pytest.fixture
def speaker() -> Flamingo:
    words = tokenizer(["<|endofchunk|>", "<image>"])
    old = words.vocab_size - 2
    config = replace(FLAMINGO, backbone=replace(LLAMA, vocab_size=old), new_tokens=2, chunk_id=old, image_id=old + 1)
    model = Flamingo.build(config).eval()
    assert isinstance(model, Flamingo)
    model.use_tokenizer(words)
    return model


PICTURE = PILImage.new("RGB", (40, 30), "red")


def test_few_shot_prompts(speaker: Flamingo) -> None:
    c, words = speaker.config, speaker.tokenizer
    assert words is not None

    def text(string: str) -> list[int]:
        return words.encode(string, special=False)

    shots = Chat.of([PICTURE, "two cats", PICTURE, "a red ", "cup", PICTURE, PICTURE, "an image of"])
    expected = [
        *words.prefix, c.image_id, *text("two cats"), c.chunk_id, c.image_id, *text("a red cup"), c.chunk_id,
        c.image_id, c.image_id, *text("an image of"),
    ]  # fmt: skip
    batch = speaker.prompt([shots, Chat.of("a cup")])
    assert batch["ids"][0].tolist() == expected
    assert batch["pixels"].shape == (4, 3, 28, 28)
    assert batch["pixels_row"].tolist() == [0] * 4
    assert speaker.prefill(batch, speaker.new_memory(2, 99)).shape == (2, speaker.vocab_size)
    talk = Chat((Turn("user", (Image(PICTURE), Text("what?"))), Turn("assistant", (Text("a cup"),))))
    more = Chat((*talk.turns, Turn("user", (Text("and"), Image(PICTURE))), Turn("assistant", (Text("cats"),))))
    said = [*words.prefix, c.image_id, *text("what?"), *text("a cup"), c.chunk_id]
    assert speaker.write_prompt(talk) == said
    assert speaker.write_prompt(more) == [*said, *text("and"), c.chunk_id, c.image_id, *text("cats"), c.chunk_id]
    assert speaker.stop_ids[0] == c.chunk_id
    lesson = speaker.lesson([more])
    learned = lesson["ids"][lesson["labels"] != -100].tolist()
    assert learned == [*text("a cup"), c.chunk_id, *text("cats"), c.chunk_id]
    assert torch.isfinite(speaker.loss(lesson).mean)
    typed = speaker.write_prompt(Chat.of("<image><|endofchunk|>"))
    assert not {c.image_id, c.chunk_id} & set(typed)
    with pytest.raises(MediaError, match="no clips"):
        speaker.prompt([Chat.of([Video("cat.mp4"), "what?"])])
    with pytest.raises(MediaError, match="at most 128"):
        speaker.prompt([Chat.of(["cats " * 300])])
    with pytest.raises(UnsupportedError, match="tokenizer"):
        flamingo().prompt([shots])


def test_prompts_of_idefics() -> None:
    raw = {"model_type": "idefics"} | BASE
    for added, wanted in ((TOKENS[:2], False), ([*TOKENS[:2], TOKENS[3]], True)):
        words = tokenizer(added)
        sizes = {"vocab_size": words.vocab_size - len(added), "additional_vocab_size": len(added)}
        model = Idefics.build(Idefics.formats["hf"].read(raw | sizes)[0])
        assert isinstance(model, Idefics)
        model.use_tokenizer(words)
        c, image = model.config, model.config.image_id
        assert words.backend.id_to_token(image) == "<image>"
        assert words.backend.id_to_token(c.fake_id) == "<fake_token_around_image>"
        pictures = [c.fake_id, image, c.fake_id, image, c.fake_id]
        chat = Chat.of([PICTURE, PICTURE, " two cats "])
        text = words.encode("two cats", special=False)
        if not wanted:
            assert model.write_prompt(chat) == [*words.prefix, *pictures, *text]
            with pytest.raises(UnsupportedError, match="no conversations"):
                model.write_prompt(chat.reply("yes"))
            continue
        end = words.backend.token_to_id("<end_of_utterance>")
        assert model.stop_ids[0] == end
        begin, answer = (words.encode(s, special=False) for s in ("User:", "\nAssistant:"))
        assert model.write_prompt(chat) == [*words.prefix, *begin, *pictures, *text, end, *answer]
        lesson = model.lesson([chat.reply("a cup").ask("what?").reply("cats")])
        learned = lesson["ids"][lesson["labels"] != -100].tolist()
        assert learned == [
            *words.encode("a cup", special=False), end, *words.encode("cats", special=False), end,
        ]  # fmt: skip


@pytest.mark.proves("flamingo", "weights: files of OpenFlamingo, both ways")
@pytest.mark.parametrize("name", CONFIGS)
def test_files_of_openflamingo(name: str, tmp_path: Path) -> None:
    model = flamingo(name)
    model.save(tmp_path / "model")
    names = set(load_file(tmp_path / "model" / "model.safetensors"))
    assert {"perceiver.layers.1.0.to_kv.weight", "perceiver.layers.0.1.3.weight", "perceiver.latents"} <= names
    assert "lang_encoder.old_decoder_blocks.3.self_attn.q_proj.weight" in names
    assert "vision_encoder.transformer.resblocks.1.attn.in_proj_weight" in names
    layers = {n.split(".")[2] for n in names if "gated_cross_attn_layers" in n}
    assert layers == {str(i) for i in model.config.gated_layers}
    again = Flamingo.from_folder(tmp_path / "model", "hf")
    assert again.config == model.config
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())
    assert [n for n, p in again.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("late", [False, True])
def test_a_published_part_joins_its_tower_and_language_model(name: str, late: bool, tmp_path: Path) -> None:
    """The gated layers have two names; tables of the language model may have rows of padding."""
    model = flamingo(name)
    c = model.config
    file = model.to_hub(model.state_dict())
    base = "lang_encoder.model.decoder" if c.family == "opt" else "lang_encoder.model"
    part = {n: t.contiguous() for n, t in file.items() if n.startswith(PARTS) or ("embed_" in n and "lang" in n)}
    if late:
        first, layers = "lang_encoder.gated_cross_attn_layers", f"{base}.layers"
        part = {re.sub(rf"{first}\.(\d+)", rf"{layers}.\1.gated_cross_attn_layer", n): t for n, t in part.items()}
    (tmp_path / "part").mkdir()
    save_file(part, tmp_path / "part" / "model.safetensors")
    padded = Decoder(replace(c.backbone, vocab_size=96))
    state = dict(model.backbone.state_dict())
    for table in ("embed_tokens.weight", "lm_head.weight"):
        if table in state:
            state[table] = torch.cat([state[table], torch.zeros(6, 32)])
    padded.load_state_dict(state)
    joined = Flamingo.join(c, model.vision, padded, tmp_path / "part")
    if model.new_logits is not None:  # in no published file
        assert joined.new_logits is not None
        joined.new_logits.load_state_dict(model.new_logits.state_dict())
    batch = batch_of(FEW)
    assert torch.equal(joined(batch), model(batch))
    del part["perceiver.latents"]
    save_file(part, tmp_path / "part" / "model.safetensors")
    with pytest.raises(WeightsError, match=r"perceiver\.latents"):
        Flamingo.join(c, model.vision, padded, tmp_path / "part")
    with pytest.raises(ConfigError, match="the tower is"):
        Flamingo.join(c, ViT(replace(TOWER, num_layers=1)), padded)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"image_id": 5}, "new tokens"), ({"every": 5}, "a gated block for each 5"), ({"family": "gpt2"}, "gpt2"),
        ({"vision": replace(TOWER, class_token=False)}, "CLIP"),
        ({"backbone": replace(LLAMA, embed_scale=2.0)}, "scales embeddings"),
    ],
    ids=str,
)  # fmt: skip
def test_configs_of_flamingo_that_are_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        replace(FLAMINGO, **change)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"perceiver_config": {"max_num_media": 8}}, "max_num_media"),
        ({"media_token_id": "x"}, "media"),
        ({"n": 2}, "n ="),
    ],
    ids=str,
)
def test_config_files_of_flamingo_that_are_refused(change: dict[str, Any], match: str) -> None:
    written = Flamingo.formats["hf"].write(FLAMINGO)
    assert read_hf(written)[0] == FLAMINGO
    with pytest.raises(ConfigError, match=match):
        read_hf(written | change)
