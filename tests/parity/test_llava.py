"""LLaVA and its kin against transformers: logits, loss, gradients, token counts, greedy text, files both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from safetensors.torch import load_file

import polymodal
from polymodal import load
from polymodal.core.batch import Batch
from polymodal.core.errors import MediaError
from polymodal.modalities.tiles import TileProcessor
from polymodal.systems.generator import Generator
from polymodal.systems.llava_next import LlavaNext
from polymodal.systems.paligemma import PaliGemma
from tests.parity.harness import (
    assert_greedy_text,
    assert_learns_alike,
    assert_same_files,
    cases,
    save_reference,
    transformers_class,
)

TEXT = {
    "vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TOWER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 7,
}  # fmt: skip
CLIP = TOWER | {"model_type": "clip_vision_model", "projection_dim": 16}
SIGLIP = TOWER | {"model_type": "siglip_vision_model", "vision_use_head": False}
IMAGE = 85
SYSTEMS = {"Llava": "llava", "LlavaNext": "llava_next", "PaliGemma": "paligemma"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llava": ("Llava", {"vision_config": CLIP, "text_config": TEXT | {"model_type": "llama"}}),
    "llava, class token, last layer, siglip, qwen": (
        "Llava",
        {
            "vision_config": SIGLIP, "text_config": TEXT | {"model_type": "qwen2"}, "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        },
    ),
    "llava-next": (
        "LlavaNext",
        {
            "vision_config": CLIP, "text_config": TEXT | {"model_type": "mistral"},
            "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]],
        },
    ),
    "paligemma": (
        "PaliGemma",
        {"vision_config": SIGLIP, "text_config": TEXT | {"model_type": "gemma", "head_dim": 8}, "projection_dim": 32},
    ),
    "paligemma 2": (
        "PaliGemma",
        {
            "vision_config": SIGLIP, "projection_dim": 32,
            "text_config": TEXT
            | {"model_type": "gemma2", "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 200},
        },
    ),
}  # fmt: skip


@pytest.fixture(params=cases({case: SYSTEMS[name] for case, (name, _) in CASES.items()}), scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Generator, Any, Path]:
    name, values = CASES[request.param]
    folder = tmp_path_factory.mktemp("reference")
    torch.manual_seed(0)
    config = transformers_class(f"{name}Config")(**values, image_token_index=IMAGE, attn_implementation="eager")
    reference = save_reference(transformers_class(f"{name}ForConditionalGeneration")(config), folder, 0.2)
    model = load(folder)
    assert isinstance(model, Generator)
    return model, reference, folder


def pictures(count: int) -> list[PILImage.Image]:
    rng = np.random.default_rng(0)
    sizes = [(28, 28), (41, 30), (23, 77), (120, 33)]
    return [PILImage.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes[:count]]


def batch_of(model: Generator, counts: list[int], seed: int = 0) -> Batch:
    """Random text around the given number of pictures a row, padded at the end."""
    generator = torch.Generator().manual_seed(seed)
    spelled, media = model.see(pictures(sum(counts)))
    rows, queue, owners = [], iter(spelled), []
    for number, count in enumerate(counts):
        row = torch.randint(3, 80, (4,), generator=generator).tolist()
        for _ in range(count):
            row += [*next(queue), *torch.randint(3, 80, (3 + number,), generator=generator).tolist()]
            owners.append(number)
        rows.append(row)
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    valid = torch.zeros(len(rows), longest, dtype=torch.bool)
    for number, row in enumerate(rows):
        ids[number, : len(row)], valid[number, : len(row)] = torch.tensor(row), True
    owner = torch.tensor(owners)
    media = {name: owner[t] if name.endswith("_row") else t for name, t in media.items()}
    learned = valid & (ids != IMAGE)
    if isinstance(model, PaliGemma):  # it learns answers, which come last
        learned &= torch.arange(longest) >= valid.sum(1, keepdim=True) - 3
    labels = ids.masked_fill(~learned, -100)
    return Batch({"ids": ids, "valid": valid, "labels": labels, **media})


def theirs(batch: Batch) -> dict[str, Any]:
    """The reference's names; the batch of a prompt has no labels."""
    inputs = {"input_ids": batch["ids"], "attention_mask": batch["valid"].long()}
    if "tiles" in batch:
        return inputs | {"pixel_values": batch["tiles"], "image_sizes": batch["sizes"]}
    return inputs | {"pixel_values": batch["pixels"]}


def types(model: Generator, batch: Batch) -> dict[str, Any]:
    """PaliGemma wants to be told where the answer begins; a prompt has none."""
    labels = batch.get("labels", torch.full_like(batch["ids"], -100))
    answer = (labels != -100).cumsum(1).clamp(max=1)
    return {"token_type_ids": answer} if isinstance(model, PaliGemma) else {}


def test_outputs_loss_and_gradients(pair: tuple[Generator, Any, Path], tmp_path: Path) -> None:
    model, reference, _ = pair
    batch = batch_of(model, [1, 2, 1])
    model.zero_grad()
    reference.zero_grad()
    model.train(False)
    result = reference(**theirs(batch), **types(model, batch), labels=batch["labels"])
    assert_learns_alike(model, batch, reference, result.logits, result.loss, tmp_path)


def test_rows_of_a_batch_keep_their_pictures(pair: tuple[Generator, Any, Path]) -> None:
    model = pair[0]
    batch = batch_of(model, [1, 2, 1])
    with torch.no_grad():
        whole = model(batch)
        for row in range(3):
            part = model(batch.rows(row, row + 1))
            valid = batch["valid"][row]
            torch.testing.assert_close(part[0][valid], whole[row][valid], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_greedy_text(pair: tuple[Generator, Any, Path], seed: int) -> None:
    model, reference, _ = pair
    batch = batch_of(model, [1, 1, 2], seed)
    assert_greedy_text(model, reference, batch, lambda part: theirs(part) | types(model, part))


def test_round_trip(pair: tuple[Generator, Any, Path], tmp_path: Path) -> None:
    model, reference, folder = pair
    again = assert_same_files(model, reference, folder, tmp_path)
    batch = batch_of(model, [1, 1])
    with torch.no_grad():
        more = types(model, batch)
        assert torch.equal(again(**theirs(batch), **more).logits, reference(**theirs(batch), **more).logits)


def test_files_of_transformers_4(pair: tuple[Generator, Any, Path], tmp_path: Path) -> None:
    """Their tower's names have one level more; every tensor must still be found."""
    from safetensors.torch import save_file

    model, _, folder = pair
    tensors = load_file(folder / "model.safetensors")
    renamed = {n.replace("vision_tower.", "vision_tower.vision_model."): t for n, t in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    old = load(tmp_path)
    assert all(torch.equal(t, old.state_dict()[n]) for n, t in model.state_dict().items())


SIZES = [(28, 28), (29, 28), (1, 1), (3, 300), (300, 3), (57, 56), (56, 57), (640, 480), (333, 77), (84, 28), (85, 29)]


@pytest.mark.proves("llava_next", "parity: tiles and their tokens, at odd sizes (transformers)")
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tiles_equal_the_reference(size: tuple[int, int]) -> None:
    """Pixels bit for bit, and the number of tokens that they become."""
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
    from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

    grids = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
    reference = LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=grids
    )
    ours = TileProcessor.from_hf(json.loads(reference.to_json_string()))
    assert TileProcessor.from_hf(ours.to_hf()).to_hf() == ours.to_hf()
    picture = PILImage.fromarray(np.random.default_rng(1).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    try:
        expected = reference(picture, return_tensors="pt")["pixel_values"][0]
    except ValueError:  # a side that shrinks to nothing
        with pytest.raises(MediaError, match="too narrow"):
            ours.tiles(picture)
        return
    torch.testing.assert_close(ours.from_pil(picture), expected, rtol=0, atol=1e-6)

    class Processor(LlavaNextProcessor):  # the counting methods alone, without a tokenizer
        def __init__(self) -> None:
            self.image_processor, self.patch_size, self.num_additional_image_tokens = reference, 7, 1

    text = {"model_type": "llama", **TEXT}
    config = {"model_type": "llava_next", "vision_config": CLIP, "text_config": text, "image_token_index": IMAGE}
    config["image_grid_pinpoints"] = grids
    model = polymodal.build(LlavaNext.formats["hf"].read(config)[0])
    assert isinstance(model, LlavaNext)
    assert model.length(*size) == Processor()._get_number_of_features(size[1], size[0], 28, 28) - 1
