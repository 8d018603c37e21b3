"""Whisper against transformers: outputs, loss, first gradients, files, and the answers to short and long sounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor

from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError
from polymodal.core.transcript import Heard, Listening
from polymodal.samplers.alignment import median, warp
from polymodal.samplers.speech import Decoding, hear_all, language_of
from polymodal.systems.whisper import Whisper
from polymodal.systems.whisper_files import read_generation, write_generation
from polymodal.tokenizers.language import LanguageTokenizer
from tests.parity.harness import CLAIM, assert_parity, assert_same_files, save_reference

transformers = pytest.importorskip("transformers")

# Ids: text below 40, then the control tokens, then a time for each of the 30 steps of a window and its end.
TEXT, END, START, EN, DE, TRANSLATE, TRANSCRIBE, PREVIOUS, NO_SPEECH, NO_TIMES = 40, 40, 41, 42, 43, 44, 45, 46, 47, 48
FIRST = NO_TIMES + 1
POSITIONS, CONTEXT = 30, 64
SIZES: dict[str, Any] = {
    "vocab_size": FIRST + POSITIONS + 1, "num_mel_bins": 8, "d_model": 24, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 3, "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 56,
    "max_source_positions": POSITIONS, "max_target_positions": CONTEXT, "decoder_start_token_id": START,
    "pad_token_id": END, "bos_token_id": END, "eos_token_id": END,
}  # fmt: skip
GENERATION: dict[str, Any] = {
    "decoder_start_token_id": START, "eos_token_id": END, "pad_token_id": END, "bos_token_id": END,
    "no_timestamps_token_id": NO_TIMES, "prev_sot_token_id": PREVIOUS, "is_multilingual": True,
    "lang_to_id": {"<|en|>": EN, "<|de|>": DE}, "task_to_id": {"transcribe": TRANSCRIBE, "translate": TRANSLATE},
    "suppress_tokens": [3, 7, START, EN, DE, TRANSLATE, TRANSCRIBE, PREVIOUS, NO_SPEECH],
    "begin_suppress_tokens": [5, END], "max_initial_timestamp_index": 10, "return_timestamps": False,
    "alignment_heads": [[0, 1], [1, 3]], "max_length": CONTEXT,
}  # fmt: skip


def letters() -> LanguageTokenizer:
    """Every id of text is a letter of its own."""
    backend = Tokenizer(models.WordLevel({chr(0x4E00 + i): i for i in range(TEXT)}))
    backend.decoder = decoders.Fuse()
    nothing: dict[str, Any] = {"config": {}, "prefix": (), "suffix": (), "bos_id": None, "eos_ids": (), "pad_id": None}
    return LanguageTokenizer(backend=backend, **nothing)


def pair(folder: Path, *, attention: str = "eager", scale: float = 0.05, seed: int = 0) -> tuple[Whisper, Any]:
    torch.manual_seed(seed)
    reference = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**SIZES))
    reference.set_attn_implementation(attention)
    reference.generation_config = transformers.GenerationConfig(**GENERATION)
    save_reference(reference, folder, scale)
    return Whisper.from_folder(folder, "hf"), reference


def sound(rows: int, frames: int = 2 * POSITIONS, seed: int = 0) -> Tensor:
    return torch.randn(rows, 8, frames, generator=torch.Generator().manual_seed(seed))


@pytest.mark.proves("whisper", CLAIM)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("hole", [False, True])
def test_outputs_loss_and_gradients(tmp_path: Path, attention: str, hole: bool) -> None:
    system, reference = pair(tmp_path, attention=attention)
    labels = torch.randint(0, FIRST, (3, 7))
    if hole:
        labels[0, 2] = labels[1, 4:] = -100
    assert_parity(system, reference, Batch(features=sound(3), labels=labels), tmp_path / "grad")


@pytest.mark.proves("whisper", CLAIM)
def test_files_both_ways(tmp_path: Path) -> None:
    model, reference = pair(tmp_path / "theirs")
    again = assert_same_files(model, reference, tmp_path / "theirs", tmp_path / "ours")
    assert model.tokens is not None
    kept = again.generation_config.to_dict()
    assert {name: kept[name] for name in GENERATION} == GENERATION
    written, backbone = write_generation(model.tokens, model.heads, CONTEXT), model.config.backbone
    assert read_generation(written, backbone) == (model.tokens, model.heads)
    for field, value in (("suppress_tokens", [10**6]), ("alignment_heads", [[99, 0]]), ("alignment_heads", [[0, 99]])):
        with pytest.raises(ConfigError, match=r"not in a vocabulary|beyond"):
            read_generation(written | {field: value}, backbone)
    assert again.config.to_dict()["max_source_positions"] == POSITIONS


@pytest.mark.proves("whisper", CLAIM)
def test_fresh_sinusoids_are_theirs() -> None:
    reference = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**SIZES))
    fresh = Whisper.build(Whisper.formats["hf"].read(reference.config.to_dict())[0])
    assert torch.equal(fresh.encoder.position, reference.model.encoder.embed_positions.weight)


# ---- answers


def ours(model: Whisper, features: Tensor, language: str | None, decoding: Decoding) -> list[Heard]:
    """All windows of ready-made features: a frame is a hundredth of a second, and 160 samples."""
    whole = 2 * POSITIONS

    def window(at: int) -> tuple[Tensor, int] | None:
        cut = features[:, at // 160 : at // 160 + whole]
        return (torch.nn.functional.pad(cut, (0, whole - cut.shape[1])), 160 * cut.shape[1]) if cut.shape[1] else None

    model.tokenizer = letters()
    return list(hear_all(model, window, 16000, Listening(language=language), decoding))


def theirs(reference: Any, features: Tensor, language: str | None, **more: Any) -> list[dict[str, Any]]:
    made = reference.generate(
        features[None], return_timestamps=True, return_segments=True, task="transcribe", language=language,
        temperature=0.0, **more,
    )  # fmt: skip
    return made["segments"][0]


GREEDY = Decoding(temperatures=(0.0,), no_speech=2.0, previous=False)


@pytest.mark.proves("whisper", "generation: long and short sounds, token for token (transformers)")
@pytest.mark.parametrize("frames", [2 * POSITIONS, 37, 3 * 2 * POSITIONS + 17])
@pytest.mark.parametrize(("seed", "scale"), [(0, 0.3), (1, 0.5), (2, 0.2), (3, 0.4)])
def test_text_and_times(tmp_path: Path, frames: int, seed: int, scale: float) -> None:
    model, reference = pair(tmp_path, scale=scale, seed=seed)
    features = sound(1, frames, seed)[0]
    expected = theirs(reference, features, "en", max_new_tokens=CONTEXT // 2)
    got = [segment for heard in ours(model, features, "en", GREEDY) for segment in heard.segments]
    said = letters()
    wanted = [
        (float(s["start"]), float(s["end"]), said.decode([i for i in s["tokens"].tolist() if i < TEXT]))
        for s in expected
    ]
    wanted = [one for one in wanted if one[2]]
    assert [s.text for s in got] == [text for _, _, text in wanted]
    np.testing.assert_allclose([(s.start, s.end) for s in got], [(a, b) for a, b, _ in wanted], atol=1e-6)
    assert len(wanted) > 0


@pytest.mark.proves("whisper", "generation: long and short sounds, token for token (transformers)")
@pytest.mark.parametrize("seed", range(4))
def test_a_language_is_found(tmp_path: Path, seed: int) -> None:
    model, reference = pair(tmp_path, scale=0.3, seed=seed)
    features = sound(1, seed=seed)
    found = int(reference.detect_language(features, generation_config=reference.generation_config))
    assert language_of(model, model.hear(features[0])) == {EN: "en", DE: "de"}[found]


@pytest.mark.proves("whisper", "generation: times of words (transformers)")
def test_alignment() -> None:
    module = transformers.models.whisper.generation_whisper
    rng = np.random.default_rng(0)
    for rows, columns in ((1, 1), (3, 9), (9, 3), (7, 40), (12, 12)):
        cost = rng.normal(size=(rows, columns))
        for got, wanted in zip(warp(cost), module._dynamic_time_warping(cost), strict=True):
            assert np.array_equal(got, wanted)
    for steps in (3, 4, 9, 30):
        x = torch.randn(2, 5, steps)
        assert torch.equal(median(x, 7), module._median_filter(x[None], 7)[0])
