"""Qwen2-VL and Qwen2.5-VL against transformers: logits, loss, gradients, positions, pixels, greedy text, files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage
from safetensors.torch import save_file
from torch import Tensor

from polymodal.backbones.mrope import mrope_positions
from polymodal.core.batch import Batch
from polymodal.core.chat import Chat
from polymodal.core.errors import ConfigError, MediaError
from polymodal.core.sample import Image, Sample, Video
from polymodal.modalities.smart_resize import ClipSize, SmartResize, smart_resize
from polymodal.modalities.video import Fps, Uniform
from polymodal.systems import qwen2_5_vl, qwen2_vl
from polymodal.systems.qwen2_5_vl import Qwen2_5VL
from polymodal.systems.qwen2_vl import Qwen2VL
from polymodal.tokenizers.chat import ChatTemplate
from polymodal.tokenizers.language import LanguageTokenizer
from tests.parity.harness import (
    assert_greedy_text,
    assert_learns_alike,
    assert_parity,
    assert_same_files,
    cases,
    save_reference,
    transformers_class,
)

System = Qwen2VL | Qwen2_5VL
IMAGE, VIDEO = 96, 97
FULL_SIZE = "weights: total on names and shapes of full-size checkpoints"
TEXT: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
}  # fmt: skip
IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 98, "vision_end_token_id": 99}
TOWER = {"num_heads": 2, "patch_size": 4}
TOWER_2 = TOWER | {"depth": 2, "embed_dim": 24, "hidden_size": 32, "mlp_ratio": 2}
TOWER_25 = TOWER | {
    "depth": 4, "hidden_size": 24, "out_hidden_size": 32, "intermediate_size": 40, "window_size": 16,
    "fullatt_block_indexes": [1, 3], "tokens_per_second": 3,
}  # fmt: skip
CASES: dict[str, tuple[type[System], str, dict[str, Any]]] = {
    "qwen2-vl": (
        Qwen2VL, "Qwen2VL", {"text_config": TEXT, "vision_config": TOWER_2},
    ),
    "qwen2.5-vl, tied": (
        Qwen2_5VL, "Qwen2_5_VL", {"text_config": TEXT, "vision_config": TOWER_25, "tie_word_embeddings": True},
    ),
}  # fmt: skip
Pair = tuple[System, Any, Path]
# Tokens of 8 x 8 pixels; windows of 2 x 2 tokens.
IMAGES = SmartResize(
    patch_size=4, min_pixels=64, max_pixels=40 * 40,
    clips=ClipSize(sampling=Fps(fps=2.0), min_pixels=64, max_pixels=24 * 40, total_pixels=10**6),
)  # fmt: skip


@pytest.fixture(params=cases({"qwen2-vl": "qwen2_vl", "qwen2.5-vl, tied": "qwen2_5_vl"}), scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    cls, name, values = CASES[request.param]
    folder = tmp_path_factory.mktemp("reference")
    torch.manual_seed(0)
    config = transformers_class(f"{name}Config")(**values, **IDS, attn_implementation="eager")
    reference = save_reference(transformers_class(f"{name}ForConditionalGeneration")(config), folder, 0.2)
    model = cls.from_folder(folder, "hf")
    assert isinstance(model, Qwen2VL | Qwen2_5VL)
    model.images = IMAGES  # type: ignore[assignment]
    return model, reference, folder


def picture(width: int, height: int, seed: int = 0) -> PILImage.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PILImage.fromarray(noise)


def clip(frames: int, width: int, height: int, fps: float = 4.0) -> Video:
    noise = np.random.default_rng(1).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    return Video(noise, fps=fps)


Medium = PILImage.Image | Video
# Rows with no medium, one, several of odd sizes, and clips (two seconds at 4 frames a second: 4 frames taken).
ROWS: list[list[Medium]] = [
    [picture(31, 22)],
    [],
    [picture(8, 8), picture(57, 19, 1), picture(13, 60, 2)],
    [clip(8, 33, 21), picture(24, 41, 3), clip(9, 20, 40)],
]


def batch_of(model: System, rows: list[list[Medium]], seed: int = 0) -> Batch:
    """Random text around the media of each row, padded at the end."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> list[int]:
        return torch.randint(3, 90, (count,), generator=generator).tolist()

    media = [medium for row in rows for medium in row]
    spelled, tensors = model.see(media) if media else ([], Batch())
    queue = iter(spelled)
    texts = []
    for number, row in enumerate(rows):
        text = words(3)
        for _ in row:
            text += [*next(queue), *words(2 + number)]
        texts.append(text)
    ids = torch.zeros(len(rows), max(map(len, texts)), dtype=torch.int64)
    valid = torch.zeros_like(ids, dtype=torch.bool)
    for number, text in enumerate(texts):
        ids[number, : len(text)], valid[number, : len(text)] = torch.tensor(text), True
    owner = torch.tensor([number for number, row in enumerate(rows) for _ in row], dtype=torch.int64)
    named = {name: owner[t] if name.endswith("_row") else t for name, t in tensors.items()}
    labels = ids.masked_fill(~valid | (ids >= IMAGE), -100)
    return Batch({"ids": ids, "valid": valid, "labels": labels, **named})


def theirs(model: System, batch: Batch) -> dict[str, Tensor]:
    """The batch under the reference's names, pictures and clips apart."""
    ids = batch["ids"]
    kinds = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    out = {"input_ids": ids, "attention_mask": batch["valid"].long(), "mm_token_type_ids": kinds}
    if "grid" not in batch:
        return out
    kind = kinds[kinds > 0]  # of each token of media, in order
    first = (batch["grid"].prod(1) // 4).cumsum(0) - batch["grid"].prod(1) // 4
    for number, pixels, grids in ((1, "pixel_values", "image_grid_thw"), (2, "pixel_values_videos", "video_grid_thw")):
        mine = kind[first] == number
        if mine.any():
            out |= {pixels: batch["patches"][kind == number].flatten(0, 1), grids: batch["grid"][mine]}
    if isinstance(model, Qwen2_5VL) and "video_grid_thw" in out:
        out["second_per_grid_ts"] = batch["seconds"][kind[first] == 2]
    return out


def test_outputs_loss_and_gradients(pair: Pair, tmp_path: Path) -> None:
    model, reference, _ = pair
    batch = batch_of(model, ROWS)
    model.zero_grad()
    reference.zero_grad()
    model.train(False)
    result = reference(**theirs(model, batch), labels=batch["labels"])
    assert_learns_alike(model, batch, reference, result.logits, result.loss, tmp_path)


def test_the_declared_reference_agrees_on_the_declared_inputs(pair: Pair, tmp_path: Path) -> None:
    model, reference, _ = pair
    generator = torch.Generator().manual_seed(0)
    batch = Batch({name: spec.random(2, generator) for name, spec in model.inputs_spec().items()})
    model.zero_grad()
    reference.zero_grad()
    assert_parity(model, reference, batch, tmp_path)


def test_text_alone(pair: Pair) -> None:
    model, reference, _ = pair
    batch = batch_of(model, [[], []])
    with torch.no_grad():
        expected = reference(batch["ids"], attention_mask=batch["valid"].long()).logits
        torch.testing.assert_close(model(batch), expected, rtol=1e-5, atol=1e-5)


def test_a_clip_that_is_longer_in_time_than_it_is_wide(pair: Pair) -> None:
    """There the reference's own ids repeat, so it is given ours; what they are is tested against the paper's rule."""
    model, reference, _ = pair
    batch = batch_of(model, [[clip(40, 16, 8)], [clip(30, 8, 16), picture(8, 24)]])
    position = model.read(batch).position
    assert int(batch["grid"][0, 0]) == 10
    with torch.no_grad():
        inputs = theirs(model, batch) | {"position_ids": position.permute(2, 0, 1)}
        expected = reference(**inputs).logits
        torch.testing.assert_close(model(batch)[batch["valid"]], expected[batch["valid"]], rtol=1e-5, atol=1e-5)


def test_rows_of_a_batch_keep_their_media(pair: Pair) -> None:
    model = pair[0]
    batch = batch_of(model, ROWS)
    with torch.no_grad():
        whole = model(batch)
        for row in range(len(ROWS)):
            valid = batch["valid"][row]
            alone = batch.rows(row, row + 1)
            if not ROWS[row]:
                alone = Batch({name: alone[name] for name in ("ids", "valid")})
            torch.testing.assert_close(model(alone)[0][valid], whole[row][valid], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_greedy_text(pair: Pair, seed: int) -> None:
    model, reference, _ = pair
    assert_greedy_text(model, reference, batch_of(model, ROWS, seed), lambda part: theirs(model, part))


# ---- positions ----


@st.composite
def mixes(draw: st.DrawFn) -> list[list[tuple[str, int, int, int, float]]]:
    """Rows of (kind, tokens in time, rows and columns, seconds of a step); no clip is longer than it is wide."""

    def medium() -> tuple[str, int, int, int, float]:
        h, w = draw(st.integers(1, 5)), draw(st.integers(1, 5))
        if draw(st.booleans()):
            return ("image", 1, h, w, 0.0)
        t = draw(st.integers(1, 4))
        longest = (max(h, w) - 1) / max(t - 1, 1) / 3  # three ids a second
        return ("video", min(t, max(h, w)), h, w, longest * draw(st.integers(0, 8)) / 8)

    return [[medium() for _ in range(draw(st.integers(0, 3)))] for _ in range(draw(st.integers(1, 3)))]


@pytest.mark.proves("qwen2_vl", "parity: positions in time, rows and columns (transformers)")
@pytest.mark.proves("qwen2_5_vl", "parity: positions in time, rows and columns (transformers)")
@given(rows=mixes(), data=st.data())
def test_positions_equal_get_rope_index(
    rows: list[list[tuple[str, int, int, int, float]]], data: st.DataObject
) -> None:
    lines: list[list[int]] = []
    for row in rows:
        line = [5] * data.draw(st.integers(1, 4))
        for kind, t, h, w, _ in row:
            line += [IMAGE if kind == "image" else VIDEO] * (t * h * w) + [5] * data.draw(st.integers(1, 4))
        lines.append(line)
    media = [(i, m) for i, row in enumerate(rows) for m in row]
    if not media:
        return
    ids = torch.zeros(len(lines), max(map(len, lines)), dtype=torch.int64)
    for i, line in enumerate(lines):
        ids[i, : len(line)] = torch.tensor(line)
    places, valid = ids >= IMAGE, ids > 0
    grid, row = torch.tensor([m[1:4] for _, m in media]), torch.tensor([i for i, _ in media])
    seconds = torch.tensor([m[4] for _, m in media])
    kinds = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    patches = grid * torch.tensor([1, 2, 2])
    is_image = torch.tensor([m[0] == "image" for _, m in media])
    shared: dict[str, Any] = {
        "input_ids": ids, "mm_token_type_ids": kinds, "attention_mask": valid.long(),
        "image_grid_thw": patches[is_image], "video_grid_thw": patches[~is_image],
    }  # fmt: skip
    new = reference_positions("Qwen2_5_VL").get_rope_index(**shared, second_per_grid_ts=seconds[~is_image])
    ours = mrope_positions(places, grid, row, seconds * 3)
    assert torch.equal(ours[valid], new[0].permute(1, 2, 0)[valid])
    lengths = valid.sum(1)
    after = torch.stack([ours[i, :n].max() + 1 for i, n in enumerate(lengths.tolist())])
    assert torch.equal(after - lengths, new[1][:, 0])  # where generation goes on
    old = reference_positions("Qwen2VL").get_rope_index(**shared)
    assert torch.equal(mrope_positions(places, grid, row)[valid], old[0].permute(1, 2, 0)[valid])


_MODELS: dict[str, Any] = {}


def reference_positions(name: str) -> Any:
    """The smallest reference model, for its methods."""
    if name not in _MODELS:
        values = next(values for _, n, values in CASES.values() if n == name)
        _MODELS[name] = transformers_class(f"{name}Model")(transformers_class(f"{name}Config")(**values, **IDS))
    return _MODELS[name]


# ---- pixels ----

PIXELS = "parity: sizes and pixels, at odd sizes (transformers)"


def reference_images(**values: Any) -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(**values)


@pytest.mark.proves("qwen2_vl", PIXELS)
@pytest.mark.proves("qwen2_5_vl", PIXELS)
@given(width=st.integers(1, 4000), height=st.integers(1, 4000), least=st.integers(1, 200), more=st.integers(0, 3000))
def test_sizes_equal_the_reference(width: int, height: int, least: int, more: int) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as reference

    limits = {"factor": 28, "min_pixels": least * 784, "max_pixels": (least + more) * 784}
    try:
        expected = reference(height, width, **limits)
    except ValueError:
        with pytest.raises(MediaError, match="too unequal"):
            smart_resize(width, height, **limits)
        return
    assert smart_resize(width, height, **limits) == expected[::-1]


@pytest.mark.proves("qwen2_vl", PIXELS)
@pytest.mark.proves("qwen2_5_vl", PIXELS)
@pytest.mark.parametrize("size", [(28, 28), (1, 1), (10, 1000), (71, 43), (300, 511), (2000, 1)], ids=str)
def test_patches_equal_the_reference(size: tuple[int, int]) -> None:
    reference = reference_images(size={"shortest_edge": 56 * 56, "longest_edge": 8 * 8 * 784})
    ours = SmartResize.from_hf(json.loads(reference.to_json_string()))
    assert SmartResize.from_hf(ours.to_hf()) == ours
    if size == (2000, 1):
        with pytest.raises(MediaError, match="2000 x 1"):
            ours([picture(*size)])
        return
    expected = reference(picture(*size), return_tensors="pt")
    counts, batch = ours([picture(*size)])
    assert counts == [ours.count(picture(*size))] == [expected["image_grid_thw"].prod().item() // 4]
    torch.testing.assert_close(batch["patches"].flatten(0, 1), expected["pixel_values"], rtol=0, atol=1e-6)
    assert torch.equal(batch["grid"], expected["image_grid_thw"])


@pytest.mark.parametrize(
    ("frames", "fps", "taken", "seconds"), [(8, 4.0, 4, 1.0), (9, 4.0, 4, 1.125), (1, 5.0, 2, 0.2), (60, 30.0, 4, 1.0)]
)
def test_patches_of_clips(frames: int, fps: float, taken: int, seconds: float) -> None:
    """The processor for clips wants torchvision, so its steps are written out here by loops."""
    video = clip(frames, 33, 21, fps)
    (count,), batch = IMAGES([video])
    assert count == IMAGES.count(video)
    t, h, w = batch["grid"][0].tolist()
    assert (t, h, w) == (taken // 2, 6, 8)
    assert count == t * h * w // 4
    assert batch["seconds"].tolist() == pytest.approx([seconds])
    chosen = np.linspace(0, frames - 1, min(taken, frames)).round().astype(int).tolist()
    shown = [
        np.asarray(PILImage.fromarray(video.source[i]).resize((32, 24), PILImage.Resampling.BICUBIC)) for i in chosen
    ]
    shown += [shown[-1]] * (taken - len(shown))
    mean, std = np.array(IMAGES.mean), np.array(IMAGES.std)
    pixels = (np.stack(shown) / 255 - mean) / std
    expected = [
        pixels[2 * step : 2 * step + 2, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].transpose(3, 0, 1, 2).ravel()
        for step in range(t)
        for a in range(h // 2)
        for b in range(w // 2)
        for i in (2 * a, 2 * a + 1)
        for j in (2 * b, 2 * b + 1)
    ]
    got = batch["patches"].flatten(0, 1).numpy()
    np.testing.assert_allclose(got, np.stack(expected), rtol=0, atol=1e-5)


def test_long_clips_have_smaller_frames() -> None:
    """All frames together stay within the budget, as qwen-vl-utils has it, whatever the length."""
    sizes = ClipSize()
    assert sizes.most(4, 2) == 768 * 784
    assert sizes.most(768, 2) == 115_200 * 784 * 2 // 768
    assert sizes.most(100_000, 2) == int(128 * 784 * 1.05)
    with pytest.raises(ConfigError, match="positive"):
        SmartResize(min_pixels=10, max_pixels=5)


SIZES = [(8, 8), (1, 1), (9, 8), (17, 90), (90, 17), (300, 5), (41, 40)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_count_is_what_the_tower_makes(pair: Pair, size: tuple[int, int]) -> None:
    model = pair[0]
    for sample in (Sample.of(picture(*size)), Sample.of([clip(7, *size), picture(20, 20), clip(12, *size[::-1])])):
        media: list[Medium] = [part.source if isinstance(part, Image) else part for part in sample.parts]
        spelled, batch = model.see(media)
        with torch.no_grad():
            features = model.features(batch)
        assert model.count(sample) == sum(map(len, spelled)) == len(features)


def test_media_and_places_must_agree(pair: Pair) -> None:
    model = pair[0]
    batch = batch_of(model, [[picture(20, 30)], [picture(16, 16)]])
    cut = Batch(batch) | {name: batch[name][:, :-9] for name in ("ids", "valid", "labels")}
    with pytest.raises(MediaError, match="placeholders"):
        model(Batch(cut))
    with pytest.raises(MediaError, match="placeholders"):
        model(Batch(Batch(batch) | {"grid": batch["grid"] + 2}))
    with pytest.raises(MediaError, match="do not fill"):
        model.features(Batch(Batch(batch) | {"patches": batch["patches"][1:]}))
    with pytest.raises(MediaError, match="placeholders"):
        model(Batch(Batch(batch) | {"grid_row": batch["grid_row"].flip(0)}))


# ---- prompts ----

TEMPLATE = (
    "{% set image = namespace(count=0) %}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{% set image.count = image.count + 1 %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif part['type'] == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_prompts() -> None:
    special = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = LanguageTokenizer.train_bpe(["what is in the pictures? " * 9], 400, special=special)
    ids = {name: tokenizer.backend.token_to_id(name) for name in special}
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    config = {
        "model_type": "qwen2_vl", "text_config": TEXT | {"vocab_size": 400, "max_position_embeddings": 64},
        "vision_config": TOWER_2, **dict(zip(names, ids.values(), strict=True)),
    }  # fmt: skip
    model = Qwen2VL.build(qwen2_vl.read_hf(config)[0])
    assert isinstance(model, Qwen2VL)
    model.images = IMAGES  # type: ignore[assignment]
    model.use_tokenizer(tokenizer)
    assert model.template is not None
    assert {kind: place.text for kind, place in model.template.media.items()} == {
        "image": "<|vision_start|><|image_pad|><|vision_end|>", "video": "<|vision_start|><|video_pad|><|vision_end|>",
    }  # fmt: skip
    model.template = ChatTemplate(TEMPLATE, media=model.template.media)
    sizes = [(20, 30), (31, 9)]
    asked = [Chat.of([picture(*size), "<|image_pad|>?", picture(8, 8)]) for size in sizes]
    batch = model.prompt([Chat.of("hi"), *asked])
    places = batch["ids"] == ids["<|image_pad|>"]
    assert places.sum(1).tolist() == [0, *(model.images.count(picture(*size)) + 1 for size in sizes)]
    assert batch["grid_row"].tolist() == [1, 1, 2, 2]
    text = tokenizer.decode(batch["ids"][1, batch["valid"][1]].tolist(), skip_special=False)
    assert text.startswith("<|im_start|>user\n<|vision_start|><|image_pad|>")
    memory = model.new_memory(3, 64)
    position = model.read(batch).position
    model.prefill(batch, memory)
    after = torch.stack([p[v].max() + 1 for p, v in zip(position, batch["valid"], strict=True)])
    assert torch.equal(memory.next_position[:, 0], after)
    last = int(places[1].nonzero()[-1])
    assert model.plain_from(batch.rows(1, 2)) == last + 1
    # The engine may read the text behind the media apart.
    other = model.new_memory(1, 64)
    row = batch.rows(1, 2)
    length = int(row["valid"].sum())
    model.prefill(Batch(Batch(row) | {name: row[name][:, : last + 1] for name in ("ids", "valid")}), other)
    scores = model.resume(row["ids"][:, last + 1 : length], other)
    torch.testing.assert_close(scores, model.prefill(row, model.new_memory(1, 64)), rtol=1e-4, atol=1e-5)
    both = model.prompt([Chat.of([clip(8, 16, 16), "and", picture(20, 30)]), Chat.of([clip(2, 16, 8)])])
    assert (both["ids"] == ids["<|video_pad|>"]).sum(1).tolist() == [8, 2]
    assert both["grid"][:, 0].tolist() == [2, 1, 1]
    assert both["grid_row"].tolist() == [0, 0, 1]
    assert torch.isfinite(model.prefill(both, model.new_memory(2, 64))).all()
    with pytest.raises(MediaError, match="at most 64"):
        model.prompt([Chat.of([picture(40, 40), picture(40, 40), picture(40, 40)])])


# ---- files ----


def test_round_trip(pair: Pair, tmp_path: Path) -> None:
    model, reference, folder = pair
    again = assert_same_files(model, reference, folder, tmp_path)  # the table of a tied model is in the file once
    batch = batch_of(model, ROWS)
    with torch.no_grad():
        inputs = theirs(model, batch)
        assert torch.equal(again(**inputs).logits, reference(**inputs).logits)
    loaded = type(model).from_folder(tmp_path, "hf")
    assert loaded.config == model.config
    assert loaded.images == SmartResize(patch_size=4, min_pixels=64, max_pixels=1600)
    assert reference_images().from_pretrained(tmp_path).size == {"shortest_edge": 64, "longest_edge": 1600}


def test_names_in_memory(pair: Pair, tmp_path: Path) -> None:
    """Some files have the names of the modules in memory."""
    model, reference, folder = pair
    names = {name: tensor for name, tensor in reference.state_dict().items() if "rotary" not in name}
    assert "model.language_model.norm.weight" in names
    save_file({name: tensor.clone() for name, tensor in names.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    loaded = type(model).from_folder(tmp_path, "hf")
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


# As the models' own repositories have them: the language model's fields at the top.
FLAT: dict[str, Any] = {
    "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "vision_start_token_id": 151652,
    "vision_end_token_id": 151653, "vision_token_id": 151654, "image_token_id": 151655, "video_token_id": 151656,
    "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 18944,
    "max_position_embeddings": 32768, "max_window_layers": 28, "num_attention_heads": 28, "num_hidden_layers": 28,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.41.2", "use_cache": True,
    "use_sliding_window": False, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "vocab_size": 152064,
}  # fmt: skip
HUB = {
    "qwen2_vl": (
        FLAT | {
            "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl",
            "vision_config": {
                "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3, "hidden_size": 3584,
                "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2,
            },
        },
        qwen2_vl, "Qwen/Qwen2-VL-7B-Instruct",
    ),
    "qwen2_5_vl": (
        FLAT | {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
            "max_position_embeddings": 128000,
            "vision_config": {
                "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
                "in_chans": 3, "out_hidden_size": 3584, "patch_size": 14, "spatial_merge_size": 2,
                "spatial_patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
                "tokens_per_second": 2, "temporal_patch_size": 2,
            },
        },
        qwen2_5_vl, "Qwen/Qwen2.5-VL-7B-Instruct",
    ),
}  # fmt: skip


@pytest.mark.parametrize("model_type", HUB)
def test_configs_of_the_hub(model_type: str) -> None:
    raw, module, name = HUB[model_type]
    expected = module.PRESETS[name]()
    config, report = module.read_hf(raw)
    assert config == expected
    assert "config.json: text_config: rope_scaling" in report
    inner = {k: v for k, v in raw.items() if k not in ("vision_config", "architectures")}
    both = raw | {"text_config": inner | {"model_type": f"{model_type}_text"}}  # transformers 4.52 to 4.56
    assert module.read_hf(both)[0] == expected
    nested = {k: v for k, v in raw.items() if k not in inner or k.endswith("token_id") or k == "model_type"}
    assert module.read_hf(nested | {"text_config": inner})[0] == expected
    written = module.write_hf(expected)
    assert module.read_hf(written)[0] == expected
    for version in (raw, written):  # what the reference understands of both
        theirs = transformers_class(raw["architectures"][0].replace("ForConditionalGeneration", "Config"))(**version)
        assert theirs.text_config.rope_parameters["mrope_section"] == [16, 24, 24]
        assert theirs.text_config.rope_parameters["rope_theta"] == 1e6
        assert (theirs.text_config.hidden_size, theirs.vision_config.depth) == (3584, 32)
    tied = {k: v for k, v in raw.items() if k != "tie_word_embeddings"}
    assert not module.read_hf(tied)[0].backbone.tied
    assert module.read_hf(tied | {"text_config": inner | {"tie_word_embeddings": True}})[0].backbone.tied


@pytest.mark.parametrize(
    ("model_type", "count"),
    [
        pytest.param(name, count, marks=pytest.mark.proves(name, FULL_SIZE))
        for name, count in (("qwen2_vl", 8_291_375_616), ("qwen2_5_vl", 8_292_166_656))
    ],
)
def test_names_of_full_size(model_type: str, count: int) -> None:
    """Every tensor of the published 7B models is taken and every parameter filled; nothing is allocated."""
    raw, module, _ = HUB[model_type]
    name = raw["architectures"][0]
    with torch.device("meta"):
        reference = transformers_class(name)(
            transformers_class(name.replace("ForConditionalGeneration", "Config"))(**raw)
        )
    names = {
        n.replace("model.visual.", "visual.").replace("model.language_model.", "model."): p
        for n, p in reference.named_parameters()
    }
    cls = Qwen2VL if model_type == "qwen2_vl" else Qwen2_5VL
    config = module.read_hf(raw)[0]
    with torch.device("meta"):
        ours = cls(config)
    todo = ours.plan(cls.formats["hf"], names)
    assert todo.problems == []
    assert todo.dropped == {}
    assert sum(p.numel() for p in ours.parameters()) == count


def test_towers_of_the_other_model_are_refused() -> None:
    one, other = qwen2_vl.PRESETS["Qwen/Qwen2-VL-7B-Instruct"](), qwen2_5_vl.PRESETS["Qwen/Qwen2.5-VL-7B-Instruct"]()
    with pytest.raises(ConfigError, match="no windows"):
        replace(one, vision=other.vision)
    with pytest.raises(ConfigError, match="and windows"):
        replace(other, vision=one.vision)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"model_type": "qwen3_vl"}, "model_type"),
        ({"unheard_of": 1}, "unheard_of"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 25]}}, "three sections"),
        ({"vision_config": {"out_hidden_size": 5}}, "out_hidden_size"),
        ({"vision_config": {"rope_parameters": {"rope_theta": 5.0}}}, "rope_theta"),
        ({"vision_config": {"depth": 10**6}}, "depth"),
    ],
)
def test_configs_that_are_refused(change: dict[str, Any], problem: str) -> None:
    raw, module, _ = HUB["qwen2_5_vl"]
    with pytest.raises(ConfigError, match=problem):
        module.read_hf(raw | change)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"image_processor_type": "CLIPImageProcessor"}, "not Qwen2VLImageProcessor"),
        ({"do_resize": False}, "do_resize"),
        ({"unheard_of": 1}, "unheard_of"),
        ({"patch_size": "14"}, "whole number"),
        ({"min_pixels": 10**9}, "at most max_pixels"),
    ],
)
def test_processors_that_are_refused(change: dict[str, Any], problem: str) -> None:
    hub = {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 3136, "max_pixels": 12845056}
    assert SmartResize.from_hf(hub) == SmartResize(max_pixels=12845056)
    with pytest.raises(ConfigError, match=problem):
        SmartResize.from_hf(hub | change)


def test_other_samplings_of_clips() -> None:
    even = replace(IMAGES, clips=replace(IMAGES.clips, sampling=Uniform(count=3)))
    (count,), batch = even([clip(9, 16, 16, 3.0)])
    assert batch["grid"].tolist() == [[2, 4, 4]]
    assert count == even.count(clip(9, 16, 16, 3.0)) == 8
    assert batch["seconds"].tolist() == [2.0]
