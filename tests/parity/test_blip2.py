"""BLIP-2 against transformers: both stages, both kinds of language model; what the reference lacks is computed anew."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image as PILImage
from safetensors.torch import load_file
from torch import Tensor, nn

from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError, WeightsError
from polymodal.modalities.image import ImageProcessor
from polymodal.systems import blip2, blip2_qformer
from polymodal.systems.blip2 import BLIP2
from polymodal.systems.blip2_qformer import BLIP2QFormer
from tests.parity.harness import (
    assert_greedy_text,
    assert_learns_alike,
    assert_same_files,
    cases,
    compare_gradients,
    file_gradients,
    random_batch,
    save_reference,
    transformers_class,
)

VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 7,
}  # fmt: skip
QFORMER = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 50,
    "max_position_embeddings": 20,
}  # fmt: skip
OPT = {
    "model_type": "opt", "vocab_size": 90, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "word_embed_proj_dim": 32, "max_position_embeddings": 64,
}  # fmt: skip
T5 = {
    "model_type": "t5", "vocab_size": 90, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip
FLAN = T5 | {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu", "tie_word_embeddings": False}
CASES = {"opt": OPT, "flan-t5": FLAN, "t5": T5}
QUERIES, IMAGE = 5, 85


def config(text: dict[str, Any], **qformer: Any) -> Any:
    return transformers_class("Blip2Config")(
        vision_config=VISION, qformer_config=QFORMER | qformer, text_config=text, num_query_tokens=QUERIES,
        image_token_index=IMAGE if text else None, image_text_hidden_size=16, attn_implementation="eager",
    )  # fmt: skip


@pytest.fixture(params=cases(dict.fromkeys(CASES, "blip2")), scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[BLIP2, Any, Path]:
    folder = tmp_path_factory.mktemp("reference")
    torch.manual_seed(0)
    reference = transformers_class("Blip2ForConditionalGeneration")(config(CASES[request.param]))
    if request.param == "flan-t5":  # transformers 5 builds it tied, whatever the config says, and loads it untied
        reference.language_model.lm_head.weight = nn.Parameter(torch.randn(90, 32) * 0.2)
    reference = save_reference(reference, folder, 0.1)
    return system(BLIP2, folder), reference, folder


def system(cls: Any, folder: Path) -> Any:
    return cls.from_folder(folder, "hf")


def batch_of(model: BLIP2, rows: int = 3, seed: int = 1) -> Batch:
    """Prompts of different lengths behind a picture each."""
    batch = random_batch(model, rows, seed)
    lengths = QUERIES + torch.tensor([6, 2, 4])[:rows]
    batch["valid"] = torch.arange(QUERIES + 6) < lengths[:, None]
    batch["ids"] = torch.where(batch["valid"] & (batch["ids"] < 3), 7, batch["ids"])  # no token with a meaning
    if model.seq2seq is None:
        batch["labels"] = batch["labels"].masked_fill(~batch["valid"], -100)
    else:
        batch["labels"][1, 3:] = -100
    return batch


def close(ours: Tensor, theirs: Tensor) -> None:
    """Equal to 1e-5 of the largest value, or of one."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, float(theirs.detach().abs().max())))


def theirs(batch: Batch) -> dict[str, Any]:
    names = {"ids": "input_ids", "valid": "attention_mask", "labels": "labels", "pixels": "pixel_values"}
    return {names[name]: tensor for name, tensor in batch.items() if name in names}


def test_outputs_loss_and_gradients(pair: tuple[BLIP2, Any, Path], tmp_path: Path) -> None:
    model, reference, folder = pair
    model = system(BLIP2, folder)
    model.requires_grad_(True)  # the gradients of what is frozen are compared, too
    reference.zero_grad()
    batch = batch_of(model)
    result = reference(**theirs(batch))
    padded = model.seq2seq is None
    assert_learns_alike(model, batch, reference, result.logits, result.loss, tmp_path, padded=padded)


@pytest.mark.parametrize("seed", range(7))
def test_greedy_text(pair: tuple[BLIP2, Any, Path], seed: int) -> None:
    model, reference, _ = pair
    assert_greedy_text(model, reference, batch_of(model, seed=seed), theirs)


def test_round_trip(pair: tuple[BLIP2, Any, Path], tmp_path: Path) -> None:
    model, reference, folder = pair
    again = assert_same_files(model, reference, folder, tmp_path)
    inputs = theirs(batch_of(model))
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, reference(**inputs).logits)


@pytest.mark.proves("blip2", "parity: pixels, at odd sizes (transformers)")
@pytest.mark.parametrize("size", [(28, 28), (29, 28), (1, 1), (3, 300), (640, 477)], ids=str)
def test_pixels(size: tuple[int, int]) -> None:
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    reference = BlipImageProcessorPil(size={"height": 28, "width": 28})
    ours = ImageProcessor.from_hf(json.loads(reference.to_json_string()))
    picture = PILImage.fromarray(np.random.default_rng(1).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    expected = reference(picture, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours.from_pil([picture]), expected, rtol=0, atol=1e-6)
    assert ImageProcessor.from_hf(ours.to_hf()) == ours


# What the Hub has beside Salesforce/blip2-opt-2.7b, written by transformers 4.47.
PUBLISHED: dict[str, Any] = {
    "architectures": ["Blip2ForConditionalGeneration"], "image_text_hidden_size": 256, "image_token_index": 50265,
    "initializer_factor": 1.0, "initializer_range": 0.02, "model_type": "blip-2", "num_query_tokens": 32,
    "qformer_config": {"classifier_dropout": None, "model_type": "blip_2_qformer"},
    "text_config": {
        "_name_or_path": "facebook/opt-2.7b", "activation_dropout": 0.0, "architectures": ["OPTForCausalLM"],
        "eos_token_id": 50118, "ffn_dim": 10240, "hidden_size": 2560, "model_type": "opt", "num_attention_heads": 32,
        "num_hidden_layers": 32, "prefix": "</s>", "torch_dtype": "float16", "vocab_size": 50304,
        "word_embed_proj_dim": 2560,
    },
    "torch_dtype": "float32", "transformers_version": "4.47.0.dev0", "use_decoder_only_language_model": True,
    "vision_config": {
        "dropout": 0.0, "initializer_factor": 1.0, "model_type": "blip_2_vision_model", "num_channels": 3,
        "projection_dim": 512,
    },
}  # fmt: skip


def test_published_config() -> None:
    name = "Salesforce/blip2-opt-2.7b"
    read, preset = BLIP2.formats["hf"].read(PUBLISHED)[0], blip2.PRESETS[name]()
    assert replace(read, control=preset.control) == preset
    assert read.control.stop == (50118,), "an answer ends in a new line"


@pytest.mark.proves("blip2", "published facts: the sizes of the paper")
@pytest.mark.proves("blip2_qformer", "published facts: the sizes of the paper")
def test_sizes_are_those_of_the_paper() -> None:
    """Table 2: 107 M parameters learn in the second stage; section 3.1: 188 M in the first."""
    with torch.device("meta"):
        models = [BLIP2(make()) for make in blip2.PRESETS.values()]
        first = BLIP2QFormer(blip2_qformer.PRESETS["LAVIS blip2 pretrain"]())
    for model in models:
        learn = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert learn == pytest.approx(107e6, rel=0.005)
    assert sum(p.numel() for p in first.parameters() if p.requires_grad) == pytest.approx(188e6, rel=0.01)


# ---- the first stage


@pytest.fixture(scope="module")
def retrieval(tmp_path_factory: pytest.TempPathFactory) -> tuple[BLIP2QFormer, Any, Path]:
    folder = tmp_path_factory.mktemp("retrieval")
    torch.manual_seed(0)
    reference = transformers_class("Blip2ForImageTextRetrieval")(config({}, use_qformer_text_input=True))
    reference = save_reference(reference, folder, 0.2)
    return system(BLIP2QFormer, folder), reference, folder


def pairs_of(model: BLIP2QFormer, rows: int = 3) -> Batch:
    batch = random_batch(model, rows)
    lengths = torch.tensor([9, 4, 6])[:rows]
    return Batch(batch | {"valid": torch.arange(9) < lengths[:, None]})


@pytest.mark.proves("blip2_qformer", "parity: contrast and matching, first gradients (transformers)")
def test_contrast_and_matching(retrieval: tuple[BLIP2QFormer, Any, Path], tmp_path: Path) -> None:
    """The cosines of all pairs, the scores of each, and the gradients of both together."""
    model, reference, _ = retrieval
    model.requires_grad_(True)
    batch = pairs_of(model)
    inputs = theirs(batch) | {"attention_mask": batch["valid"].long()}
    cosines = reference(**inputs).logits_per_image
    close(model(batch), cosines)
    expected = reference(**inputs, use_image_text_matching_head=True).logits_per_image
    scores = model.match(model.vision(batch["pixels"]).x, batch["ids"], batch["valid"])
    close(scores, expected)
    weights = torch.randn(3, 3), torch.randn(3, 2)
    ((cosines * weights[0]).sum() + (expected * weights[1]).sum()).backward()
    ((model(batch) * weights[0]).sum() + (scores * weights[1]).sum()).backward()
    compare_gradients(model, file_gradients(reference, tmp_path))


@pytest.mark.proves("blip2_qformer", "parity: files both ways (transformers)")
def test_retrieval_round_trip(retrieval: tuple[BLIP2QFormer, Any, Path], tmp_path: Path) -> None:
    model, reference, folder = retrieval
    again = assert_same_files(model, reference, folder, tmp_path)
    batch = pairs_of(model)
    inputs = theirs(batch) | {"attention_mask": batch["valid"].long()}
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits_per_image, reference(**inputs).logits_per_image)


def test_wrong_files_are_refused(pair: tuple[BLIP2, Any, Path], retrieval: tuple[BLIP2QFormer, Any, Path]) -> None:
    """Each stage says of the other's files what it lacks, before any weight is read."""
    with pytest.raises(ConfigError, match="architectures"):
        system(BLIP2, retrieval[2])
    with pytest.raises(ConfigError, match="architectures"):
        system(BLIP2QFormer, pair[2])


def test_a_file_without_a_layer_is_refused(retrieval: tuple[BLIP2QFormer, Any, Path], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = load_file(retrieval[2] / "model.safetensors")
    del tensors["qformer.encoder.layer.1.output_query.dense.weight"], tensors["query_tokens"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((retrieval[2] / "config.json").read_text())
    with pytest.raises(WeightsError, match="2 problems") as error:
        system(BLIP2QFormer, tmp_path)
    assert "query_tokens" in str(error.value)


def dense(layer: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ layer[f"{name}.weight"].T + layer[f"{name}.bias"]


def normed(layer: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.pow(2).mean(-1, keepdim=True) + 1e-12).rsqrt()
    return centred * scale * layer[f"{name}.weight"] + layer[f"{name}.bias"]


def attended(layer: dict[str, Tensor], name: str, x: Tensor, context: Tensor, see: Tensor) -> Tensor:
    """Four heads, one at a time; ``see`` is 0 or 1."""
    q, k, v = (
        dense(layer, f"{name}.attention.{n}", t)
        for n, t in (("query", x), ("key", context), ("value", context))
    )  # fmt: skip
    out = []
    for head in range(4):
        part = slice(head * 6, head * 6 + 6)
        scores = torch.exp(q[:, part] @ k[:, part].T / 6**0.5) * see
        out.append(scores / scores.sum(1, keepdim=True) @ v[:, part])
    return normed(layer, f"{name}.output.LayerNorm", x + dense(layer, f"{name}.output.dense", torch.cat(out, 1)))


def recomputed_caption_loss(file: dict[str, Tensor], image: Tensor, ids: Tensor, length: int) -> tuple[Tensor, int]:
    """The published description in one joint pass: queries see queries, text sees queries and its own beginning."""
    x = torch.cat(
        [
            file["query_tokens"][0],
            file["embeddings.word_embeddings.weight"][ids] + file["embeddings.position_embeddings.weight"][: len(ids)],
        ]
    )
    x = normed(file, "qformer.layernorm", x)
    see = torch.ones(len(x), len(x)).tril()
    see[:QUERIES] = 0
    see[:QUERIES, :QUERIES] = 1
    for number in range(3):
        start = f"qformer.encoder.layer.{number}."
        layer = {name.removeprefix(start): t for name, t in file.items() if name.startswith(start)}
        x = attended(layer, "attention", x, x, see)
        q, text = x[:QUERIES], x[QUERIES:]
        if number % 2 == 0:
            q = attended(layer, "crossattention", q, image, torch.ones(QUERIES, len(image)))
        parts = []
        for kind, t in (("_query", q), ("", text)):
            hidden = F.gelu(dense(layer, f"intermediate{kind}.dense", t))
            parts.append(normed(layer, f"output{kind}.LayerNorm", t + dense(layer, f"output{kind}.dense", hidden)))
        x = torch.cat(parts)
    hidden = F.gelu(dense(file, "cls.predictions.transform.dense", x[QUERIES:]))
    hidden = normed(file, "cls.predictions.transform.LayerNorm", hidden)
    scores = hidden @ file["embeddings.word_embeddings.weight"].T + file["cls.predictions.bias"]
    chances = scores.log_softmax(1)[: length - 1]
    wanted = torch.full_like(chances, 0.1 / chances.shape[1])
    wanted[torch.arange(length - 1), ids[1:length]] += 0.9
    return -(wanted * chances).sum(), length - 1


@pytest.mark.proves("blip2_qformer", "published facts: the loss of captions, computed again")
def test_captions_are_what_is_published(retrieval: tuple[BLIP2QFormer, Any, Path], tmp_path: Path) -> None:
    """transformers has no captions in the first stage; the weights are read from our own file."""
    torch.manual_seed(0)
    model = BLIP2QFormer.build(replace(retrieval[0].config, trains=True)).eval()
    assert isinstance(model, BLIP2QFormer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    file = load_file(model.save(tmp_path) / "model.safetensors")
    batch = pairs_of(model)
    with torch.no_grad():
        image = model.vision(batch["pixels"]).x
        ours = model.caption_loss(model.qformer(image), batch["ids"], batch["valid"])
        total, count = torch.tensor(0.0), 0
        for row, length in enumerate((9, 4, 6)):
            ids = batch["ids"][row].clone()
            ids[0] = 49  # [DEC], the last of the vocabulary
            loss, learned = recomputed_caption_loss(file, image[row], ids, length)
            total, count = total + loss, count + learned
    close(ours, total / count)
    again = system(BLIP2QFormer, tmp_path)
    assert again.config == model.config
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items())
