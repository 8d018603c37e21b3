"""CLAP against transformers: scores, vectors, loss of the paper and first gradients, with and without fusion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import polymodal
from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError, MediaError
from polymodal.core.sample import Audio, Sample
from polymodal.nn.skeleton import skeleton
from polymodal.systems.clap import CLAP, PRESETS
from polymodal.systems.clap_files import read_hf
from tests.nano import nano
from tests.parity.harness import compare_gradients, file_gradients, save_reference

transformers = pytest.importorskip("transformers")

AUDIO: dict[str, Any] = {
    "num_mel_bins": 8, "spec_size": 32, "patch_size": 2, "patch_stride": [2, 2], "patch_embeds_hidden_size": 8,
    "depths": [2, 2, 2], "num_attention_heads": [2, 2, 4], "window_size": 4, "mlp_ratio": 2.0, "hidden_size": 32,
    "hidden_dropout_prob": 0.0, "aff_block_r": 2,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40,
    "max_position_embeddings": 14, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
FUSED = {"enable_fusion": True, "fusion_type": "aff_2d"}
kinds = pytest.mark.parametrize("fusion", [{}, FUSED], ids=["unfused", "fused"])


def pair(folder: Path, fusion: dict[str, Any]) -> tuple[CLAP, Any]:
    config = transformers.ClapConfig(audio_config=AUDIO | fusion, text_config=TEXT, projection_dim=20)
    model = transformers.ClapModel(config)
    for norm in model.modules():  # as if it had seen some spectrograms
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(generator=torch.Generator().manual_seed(0)).mul_(0.3)
            norm.running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(1))
    model = save_reference(model, folder)
    system = polymodal.load(folder)
    assert isinstance(system, CLAP)
    return system, model


def batch_of(system: CLAP, frames: int = 120) -> Batch:
    generator = torch.Generator().manual_seed(4)
    views = 1 if system.config.audio.fusion is None else 4
    mel = torch.randn(4, views, frames, 8, generator=generator) * 3 - 2
    ids = torch.randint(2, 40, (4, 9), generator=generator)
    valid = torch.arange(9) < torch.tensor([[9], [4], [2], [7]])
    longer = torch.tensor([[True], [False], [True], [True]])
    return Batch(mel=mel, longer=longer, ids=ids.where(valid, 1), valid=valid)


@pytest.mark.proves("clap", "parity: outputs, first gradients of the paper's loss, fused or not (transformers)")
@kinds
@pytest.mark.parametrize("training", [False, True], ids=["running statistics", "of the batch"])
def test_clap_is_the_reference(tmp_path: Path, fusion: dict[str, Any], training: bool) -> None:
    system, model = pair(tmp_path, fusion)
    batch = batch_of(system, 128 if training else 120)
    system.train(training)
    model.train(training)
    theirs = model(
        input_ids=batch["ids"], attention_mask=batch["valid"].long(), input_features=batch["mel"],
        is_longer=batch["longer"],
    )  # fmt: skip
    sounds = system.encode_sounds(batch["mel"], batch["longer"])
    texts = system.encode_texts(batch["ids"], batch["valid"])
    assert (sounds - theirs.audio_embeds).abs().max() <= 1e-5
    assert (texts - theirs.text_embeds).abs().max() <= 1e-5
    assert (system.logits(sounds, texts) - theirs.logits_per_audio).abs().max() <= 1e-4
    labels = torch.arange(4)
    expected = sum(F.cross_entropy(scores, labels) for scores in (theirs.logits_per_audio, theirs.logits_per_text)) / 2
    loss = system.head.loss(sounds, texts).mean
    assert abs(float((loss - expected).detach())) <= 1e-5 * float(expected.detach())
    loss.backward()
    expected.backward()
    gradients = file_gradients(model, tmp_path / "grad")
    # Buffers are no weights: the file of gradients holds them as they are.
    buffers = ("running_", "batches", "_index", "_ids")
    kept = {n: torch.zeros_like(t) if any(b in n for b in buffers) else t for n, t in gradients.items()}
    # The fusion's batch norm over all places sees three values a channel: their differences carry few digits.
    compare_gradients(system, kept, 5e-5 if training and fusion else 1e-5)


@pytest.mark.proves("clap", "weights: files both ways (transformers)")
@kinds
def test_what_we_write_is_read_by_the_reference(tmp_path: Path, fusion: dict[str, Any]) -> None:
    system, model = pair(tmp_path, fusion)
    batch = batch_of(system)
    again = transformers.ClapModel.from_pretrained(system.save(tmp_path / "again")).eval()
    with torch.no_grad():
        ours, theirs = (
            m.get_audio_features(input_features=batch["mel"], is_longer=batch["longer"]).pooler_output
            for m in (again, model)
        )
    assert torch.equal(ours, theirs)
    read = polymodal.load(tmp_path / "again")
    assert isinstance(read, CLAP)
    assert read.fingerprint == system.fingerprint
    assert read.sounds == system.sounds


@pytest.mark.parametrize(
    "change",
    [{"fusion_type": "channel_map"}, {"patch_stride": [2, 4]}, {"depths": [2, 2]}, {"window_size": 3}, {"surprise": 1},
     {"spec_size": 33}],
)  # fmt: skip
def test_configs_that_ask_for_more_are_refused(change: dict[str, Any]) -> None:
    read_hf({"model_type": "clap", "audio_config": AUDIO, "text_config": TEXT})
    with pytest.raises(ConfigError):
        read_hf({"model_type": "clap", "audio_config": AUDIO | change, "text_config": TEXT})


def test_spectrograms_of_another_kind_are_refused(tmp_path: Path) -> None:
    system = nano("clap")
    folder = system.save(tmp_path / "clap")
    file = folder / "preprocessor_config.json"
    file.write_text(file.read_text().replace('"fusion"', '"rand_trunc"'))
    with pytest.raises(ConfigError, match="rand_trunc"):
        polymodal.load(folder)


def test_a_sound_has_one_vector_whatever_is_beside_it() -> None:
    system = nano("clap").eval()
    rng = np.random.default_rng(0)
    items = [Audio(rng.standard_normal(n).astype(np.float32) * 0.1, rate=48_000) for n in (3000, 700_000, 90_000)]
    vectors = system.embed(items)
    alone = torch.cat([system.embed([item]) for item in items])
    assert (vectors - alone).abs().max() <= 1e-5
    assert (vectors.norm(dim=1) - 1).abs().max() <= 1e-5
    with pytest.raises(MediaError, match="too short"):
        system.embed([Audio(np.zeros(9, np.float32), rate=48_000)])


def test_words_are_those_of_the_reference(tmp_path: Path) -> None:
    """RoBERTa's tokenizer, and a vector of words through files on disk."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate(["<s>", "<pad>", "</s>", "<unk>", *letters, "do", "dog", "<mask>"])}
    config = transformers.ClapConfig(
        audio_config=AUDIO, text_config=TEXT | {"vocab_size": len(vocab), "max_position_embeddings": 66}
    )
    save_reference(transformers.ClapModel(config), tmp_path)
    special = {f"{n}_token": f"<{t}>" for n, t in (("bos", "s"), ("eos", "/s"), ("pad", "pad"), ("unk", "unk"))}
    special |= {"cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
    theirs = transformers.RobertaTokenizer(vocab=vocab, merges=[("d", "o"), ("do", "g")], **special)
    theirs.save_pretrained(tmp_path)
    system = polymodal.load(tmp_path)
    assert isinstance(system, CLAP)
    texts = ["dog", "a dog barks far away", "do."]
    batch = system.prepare_texts([Sample.of(t) for t in texts])
    expected = theirs(texts, padding=True, return_tensors="pt")
    assert torch.equal(batch["ids"], expected.input_ids)
    assert torch.equal(batch["valid"], expected.attention_mask.bool())
    model = transformers.ClapModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert (system.embed(texts) - model.get_text_features(**expected).pooler_output).abs().max() <= 1e-5
    assert system.count(Sample.of(texts[1])) == int(expected.attention_mask[1].sum())


@pytest.mark.proves("clap", "weights: total on names and shapes of full-size checkpoints")
@pytest.mark.parametrize(
    ("name", "fusion", "count"),
    [("laion/clap-htsat-unfused", {}, 153_492_890), ("laion/clap-htsat-fused", FUSED, 153_507_530)],
)
def test_every_tensor_of_full_size_is_taken(name: str, fusion: dict[str, Any], count: int) -> None:
    with skeleton():
        model = transformers.ClapModel(transformers.ClapConfig(audio_config=fusion))
        ours = CLAP(PRESETS[name]())
    fmt = CLAP.formats["hf"]
    assert fmt.read(model.config.to_dict())[0] == ours.config
    todo = ours.plan(fmt, model.state_dict())
    assert todo.problems == []
    assert {n for step in todo.steps for n in step.ours} == set(ours.state_dict())
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in model.parameters()) == count
