"""Qwen2-Audio against transformers: outputs, loss, first gradients, greedy text, token counts, files both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polymodal.core.batch import IGNORE, Batch, padded
from polymodal.core.errors import MediaError
from polymodal.core.sample import Audio, Sample
from polymodal.nn.skeleton import skeleton
from polymodal.systems.qwen2_audio import PRESETS, Qwen2Audio, heard_tokens
from tests.parity.harness import (
    _close,
    assert_greedy_text,
    assert_learns_alike,
    assert_same_files,
    cases,
    save_reference,
)
from tests.weights.test_full_size import tensors, without_memory, written

transformers = pytest.importorskip("transformers")

VOCAB, SOUND, POSITIONS = 60, 50, 50
RATE = 16_000
FIELDS: dict[str, Any] = {
    "audio_config": {
        "model_type": "qwen2_audio_encoder", "d_model": 24, "encoder_layers": 2, "encoder_attention_heads": 3,
        "encoder_ffn_dim": 32, "num_mel_bins": 16, "max_source_positions": POSITIONS,
    },
    "text_config": {
        "model_type": "qwen2", "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    },
    "audio_token_index": SOUND,
}  # fmt: skip


@pytest.fixture(params=cases({"eager": "qwen2_audio", "sdpa": "qwen2_audio"}))
def both(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Qwen2Audio, Any]:
    config = transformers.Qwen2AudioConfig(**FIELDS)
    torch.manual_seed(0)
    model = transformers.Qwen2AudioForConditionalGeneration._from_config(config, attn_implementation=request.param)
    return Qwen2Audio.from_folder(save_reference(model, tmp_path, 0.1) and tmp_path, "hf"), model


def sound(samples: int, seed: int = 0) -> Audio:
    noise = np.random.default_rng(seed).standard_normal(samples).astype(np.float32)
    return Audio(0.1 * noise, rate=RATE, name=f"{samples} samples")


def lesson(model: Qwen2Audio, *lengths: tuple[int, ...]) -> Batch:
    """A row for each tuple of lengths in samples, with text before, between and after its sounds."""
    generator = torch.Generator().manual_seed(0)
    sounds = [sound(n, seed) for row in lengths for seed, n in enumerate(row)]
    spelled, media = model.see(sounds)
    queue, rows, labels, owners = iter(spelled), [], [], []
    for number, row in enumerate(lengths):
        words = torch.randint(3, SOUND, (3 + len(row),), generator=generator).tolist()
        ids = [words.pop()]
        for _ in row:
            ids += [*next(queue), words.pop()]
            owners.append(number)
        asked = len(ids)
        ids += words
        rows.append(ids)
        labels.append([IGNORE] * asked + words)
    valid = padded([[True] * len(r) for r in rows], fill=False)
    out = Batch(ids=padded(rows), valid=valid, labels=padded(labels, fill=IGNORE), **media)
    out["mels_row"] = out["heard_row"] = torch.tensor(owners)
    return out


def inputs(batch: Batch) -> dict[str, Any]:
    """transformers' keywords."""
    named = {"input_ids": batch["ids"], "attention_mask": batch["valid"].long()}
    if "mels" in batch:
        named |= {"input_features": batch["mels"], "feature_attention_mask": batch["heard"].long()}
    return named


ROWS = [(RATE, 9_999), (5_001,), (8_000, 777, 12_345)]


def test_it_learns_alike(both: tuple[Qwen2Audio, Any], tmp_path: Path) -> None:
    model, reference = both
    batch = lesson(model, *ROWS)
    result = reference(**inputs(batch), labels=batch["labels"])
    assert_learns_alike(model, batch, reference, result.logits, result.loss, tmp_path / "grad")


def test_greedy_text(both: tuple[Qwen2Audio, Any]) -> None:
    model, reference = both
    assert_greedy_text(model, reference, lesson(model, *ROWS), inputs)


def test_files_both_ways(both: tuple[Qwen2Audio, Any], tmp_path: Path) -> None:
    model, reference = both
    twin = assert_same_files(model, reference, tmp_path, tmp_path / "again")
    batch = lesson(model, *ROWS)
    expected = twin(**inputs(batch)).logits
    _close("output", model(batch)[batch["valid"]], expected[batch["valid"]], 1e-5)


@pytest.mark.proves("qwen2_audio", "token accounting: places for sounds of any length are transformers' own")
def test_counts_at_odd_lengths(tmp_path: Path) -> None:
    """Against the processor's formula on the frames of its extractor, at the edges of frames and of pairs of them."""
    extractor = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1)
    edges = [n + d for n in range(320, 16_000, 640 * 4) for d in (-161, -160, -1, 0, 1, 159, 160)]
    for samples in [*(n for n in edges if n > 320), 15_999, 16_000]:
        given = extractor(
            np.zeros(samples, np.float32), sampling_rate=RATE, return_attention_mask=True, padding="max_length"
        )
        frames = int(given["attention_mask"].sum())
        expected = (((frames - 1) // 2 + 1) - 2) // 2 + 1
        assert heard_tokens(-(-samples // 160)) == expected, samples


@pytest.mark.proves("qwen2_audio", "log-mel: equals the feature extractor's")
def test_mels(both: tuple[Qwen2Audio, Any]) -> None:
    model, _ = both
    extractor = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1)
    for samples in (777, 9_999, 16_000):
        spelled, media = model.see([sound(samples)])
        given = extractor(
            sound(samples).source, sampling_rate=RATE, return_attention_mask=True, padding="max_length",
            return_tensors="pt",
        )  # fmt: skip
        _close("mels", media["mels"], given["input_features"], 1e-5)
        assert int(media["heard"].sum()) == int(given["attention_mask"].sum())
        assert model.count(Sample.of([sound(samples)])) == len(spelled[0]) == len(model.features(media))


def test_sounds_that_cannot_be_heard(both: tuple[Qwen2Audio, Any]) -> None:
    model, _ = both
    with pytest.raises(MediaError, match="16001 samples: this model hears 1 s"):
        model.see([sound(16_001)])
    with pytest.raises(MediaError, match="too short"):
        model.see([sound(320)])


@pytest.mark.proves("qwen2_audio", "weights: every tensor of the full-size checkpoint")
def test_full_size() -> None:
    tower = {
        "model_type": "qwen2_audio_encoder", "num_mel_bins": 128, "encoder_layers": 32, "encoder_ffn_dim": 5120,
        "encoder_attention_heads": 20, "d_model": 1280, "scale_embedding": False, "max_source_positions": 1500,
    }  # fmt: skip
    text = {
        "model_type": "qwen2", "vocab_size": 156032, "intermediate_size": 11008, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5, "bos_token_id": 151643, "eos_token_id": 151645, "use_mrope": False,
    }  # fmt: skip
    fields = {"audio_config": tower, "text_config": text, "audio_token_index": 151646, "ignore_index": -100}
    model = without_memory(transformers.Qwen2AudioForConditionalGeneration, fields)
    fmt = Qwen2Audio.formats["hf"]
    config, _ = fmt.read(written({"model_type": "qwen2_audio", "vocab_size": 156032, **fields}))
    assert config == fmt.read(written(model.config.to_dict()))[0] == PRESETS["Qwen/Qwen2-Audio-7B-Instruct"]()
    with skeleton():
        ours = Qwen2Audio(config)
    todo = ours.plan(fmt, tensors(model))
    assert todo.problems == []
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in model.parameters()) == 8_397_094_912
    assert {n: t.shape for n, t in ours.to_hub(ours.state_dict()).items()} == {
        n: t.shape for n, t in tensors(model).items()
    }
