"""wav2vec 2.0 against transformers, both norms, pre-training and writing; its letters, spans and distractors."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import polymodal
from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError, MediaError, UnsupportedError
from polymodal.core.transcript import Listening
from polymodal.core.verbs import Transcribes
from polymodal.heads.ctc import CTCConfig, CTCHead
from polymodal.heads.speech_codes import draw_negatives
from polymodal.modalities.mel import RawWave
from polymodal.nn.spans import Spans
from polymodal.systems.wav2vec2 import WINDOW, Wav2Vec2
from polymodal.systems.wav2vec2_files import read_hf, write_hf
from polymodal.tokenizers.characters import Characters
from tests.nano import nano
from tests.parity.harness import assert_same_files, compare_gradients, file_gradients, save_reference

transformers = pytest.importorskip("transformers")

CLAIM = "parity: outputs, loss, first gradients, both norms, pre-training and CTC (transformers)"
SHAPE: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "conv_dim": [16, 16, 24], "conv_kernel": [5, 3, 2], "conv_stride": [3, 2, 2], "num_conv_pos_embeddings": 6,
    "num_conv_pos_embedding_groups": 4, "hidden_dropout": 0.0, "activation_dropout": 0.0, "attention_dropout": 0.0,
    "final_dropout": 0.0, "layerdrop": 0.0, "num_codevectors_per_group": 7, "codevector_dim": 12,
    "proj_codevector_dim": 20, "num_negatives": 6, "vocab_size": 9, "mask_time_prob": 0.4, "mask_time_length": 3,
}  # fmt: skip
BASE = {"feat_extract_norm": "group"}
LARGE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
both = pytest.mark.parametrize("norms", [BASE, LARGE], ids=["base", "large"])


def pair(folder: Path, cls: str, **fields: Any) -> tuple[Wav2Vec2, Any]:
    config = transformers.Wav2Vec2Config(**SHAPE | fields)
    model = save_reference(getattr(transformers, cls)._from_config(config, attn_implementation="eager"), folder)
    system = polymodal.load(folder)
    assert isinstance(system, Wav2Vec2)
    return system, model


def waves(system: Wav2Vec2, frames: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise of several lengths, zeros behind."""
    lengths = torch.tensor([system.config.audio.samples(n) for n in frames])
    wave = torch.randn(len(frames), int(lengths.max()), generator=torch.Generator().manual_seed(5))
    return wave * (torch.arange(wave.shape[1]) < lengths[:, None]), lengths


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    scale = max(1.0, float(theirs.detach().abs().max()))
    assert ours.shape == theirs.shape
    assert float((ours - theirs).detach().abs().max()) <= 1e-5 * scale


@pytest.mark.proves("wav2vec2", CLAIM)
@both
@pytest.mark.parametrize("training", [False, True], ids=["likeliest codes", "drawn codes"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_pre_training_is_the_reference(tmp_path: Path, norms: dict[str, Any], training: bool, padded: bool) -> None:
    system, model = pair(tmp_path, "Wav2Vec2ForPreTraining", **norms)
    wave, lengths = waves(system, (20, 13) if padded else (20, 20))
    batch = Batch(wave=wave) | ({"lengths": lengths} if padded else {})
    generator = torch.Generator().manual_seed(0)
    steps = system.config.audio.frames(lengths)
    hidden = system.config.times.draw(steps, 20, generator)
    negatives = draw_negatives(hidden, 6, generator)
    inputs = {"input_values": wave, "mask_time_indices": hidden, "sampled_negative_indices": negatives}
    inputs |= {"attention_mask": (torch.arange(wave.shape[1]) < lengths[:, None]).long()} if padded else {}
    system.train(training)
    model.train(training)
    torch.manual_seed(3)
    expected = model(**inputs)
    torch.manual_seed(3)
    loss = system.loss(Batch(batch, hidden=hidden, negatives=negatives))
    assert loss.weight == int(hidden.sum())
    close(loss.total / loss.weight, expected.loss / loss.weight)
    close(loss.metrics["perplexity"], expected.codevector_perplexity)
    close(system(Batch(batch, hidden=hidden)), expected.projected_states)
    loss.total.backward()
    expected.loss.backward()
    compare_gradients(system, file_gradients(model, tmp_path / "grad"))


@pytest.mark.proves("wav2vec2", CLAIM)
@both
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_writing_is_the_reference(tmp_path: Path, norms: dict[str, Any], reduction: str) -> None:
    system, model = pair(tmp_path, "Wav2Vec2ForCTC", **norms, ctc_loss_reduction=reduction, pad_token_id=2)
    system.eval()
    wave, lengths = waves(system, (20, 13, 17))
    labels = torch.tensor([[3, 3, 4, 8], [1, 0, -100, -100], [5, -100, -100, -100]])
    mask = (torch.arange(wave.shape[1]) < lengths[:, None]).long()
    expected = model(wave, attention_mask=mask, labels=labels)
    batch = Batch(wave=wave, lengths=lengths, labels=labels)
    close(system(batch), expected.logits)
    loss = system.loss(batch)
    ours = loss.mean if reduction == "mean" else loss.total
    close(ours, expected.loss)
    assert loss.weight == (3 if reduction == "mean" else 7)
    ours.backward()
    expected.loss.backward()
    theirs = file_gradients(model, tmp_path / "grad")
    compare_gradients(system, theirs)
    again = assert_same_files(system, model, tmp_path, tmp_path / "again")
    close(again(wave, attention_mask=mask).logits, expected.logits)


@pytest.mark.proves("wav2vec2", "weights: files of older transformers, whose weight norm has other names")
def test_old_names_of_the_weight_norm_load(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    system, _ = pair(tmp_path, "Wav2Vec2ForPreTraining")
    file = tmp_path / "model.safetensors"
    names = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    tensors = {}
    for name, tensor in load_file(file).items():
        for new, old in names.items():
            name = name.replace(new, old)
        tensors[name] = tensor
    assert any(name.endswith("conv.weight_g") for name in tensors)
    save_file(tensors, file)
    assert polymodal.load(tmp_path).fingerprint == system.fingerprint


@pytest.mark.parametrize(
    "change",
    [{"add_adapter": True}, {"adapter_attn_dim": 16}, {"feat_extract_activation": "relu"}, {"surprise": 1},
     {"architectures": ["Wav2Vec2ForXVector"]}, {"conv_dim": [16, 16]}, {"mask_time_prob": 2}],
)  # fmt: skip
def test_configs_that_ask_for_more_are_refused(change: dict[str, Any]) -> None:
    raw = {"model_type": "wav2vec2", "architectures": ["Wav2Vec2ForCTC"]} | SHAPE
    read_hf(raw)
    with pytest.raises(ConfigError):
        read_hf(raw | change)


def test_files_that_never_hide_anything_are_read() -> None:
    raw = {"model_type": "wav2vec2", "architectures": ["Wav2Vec2ForCTC"], "apply_spec_augment": False} | SHAPE
    config = read_hf(raw)[0]
    assert read_hf(write_hf(config))[0] == config
    model = Wav2Vec2.build(config).train()
    wave, _ = waves(model, (20,))
    assert torch.equal(
        model.vectors(Batch(wave=wave), model.audio.features(wave))[0],
        model.eval().vectors(Batch(wave=wave), model.audio.features(wave))[0],
    )


def test_codes_are_drawn_colder_step_by_step() -> None:
    model = nano("wav2vec2")
    start = model.head.gumbel
    model.after_step(1000, 10_000)
    assert model.head.gumbel == pytest.approx(start * 0.999995**1000)
    model.after_step(10**7, 10**7)
    assert model.head.gumbel == 0.5


def test_spans_are_whole_and_inside_and_as_many_as_asked() -> None:
    spans, lengths = Spans(share=0.5, length=4, least=2), torch.tensor([200, 31, 4, 3])
    hidden = torch.stack([spans.draw(lengths, 200, torch.Generator().manual_seed(s)) for s in range(50)])
    assert not hidden[:, torch.arange(200) >= lengths[:, None]].any()
    assert hidden[:, 2].sum(-1).tolist() == [4] * 50
    assert not hidden[:, 3].any()
    runs = [len(list(run)) for row in hidden[:, 0].tolist() for on, run in itertools.groupby(row) if on]
    assert min(runs) >= 4
    # 25 spans of 4 among 200 leave (1 - 4/200)^25 of the steps alone, but for the ends.
    assert hidden[:, 0].float().mean() == pytest.approx(1 - (1 - 4 / 200) ** 25, abs=0.03)


def test_distractors_are_other_hidden_places_of_the_same_sound() -> None:
    hidden = Spans(share=0.4, length=3).draw(torch.tensor([30, 30]), 30, torch.Generator().manual_seed(1))
    negatives = draw_negatives(hidden, 200, torch.Generator().manual_seed(2))
    for row, place in hidden.nonzero().tolist():
        drawn = set((negatives[row, place] - row * 30).tolist())
        assert drawn == set(hidden[row].nonzero()[:, 0].tolist()) - {place}


# ---- letters ----

LETTERS = ["<pad>", "<s>", "</s>", "<unk>", "|", "A", "B", "C", "'"]


def vocabulary(folder: Path, **fields: Any) -> Any:
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(LETTERS)}))
    theirs = transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), **fields)
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("lower", [False, True])
def test_letters_are_those_of_the_reference(tmp_path: Path, lower: bool) -> None:
    theirs = vocabulary(tmp_path, do_lower_case=lower)
    ours = Characters.from_folder(tmp_path)
    text = "ab c'a" if lower else "AB C'A"
    assert ours.encode(text) == theirs(text).input_ids
    rng, head = np.random.default_rng(0), CTCHead(CTCConfig(vocab_size=9), 4)
    for _ in range(20):
        ids = rng.choice(9, 40, p=[0.4, 0, 0, 0, 0.2, 0.1, 0.1, 0.1, 0.1])
        logits = torch.nn.functional.one_hot(torch.from_numpy(ids), 9).float() * 9
        said = head.path(logits)
        expected = theirs.decode(ids)
        tokens = [one.token for one in said]
        words = [ours.decode(tokens[place] for place in word) for word in ours.words(tokens)]
        assert ours.decode(tokens) == expected
        assert words == expected.split()
        assert all(ids[one.start : one.stop].tolist() == [one.token] * (one.stop - one.start) for one in said)
    ours.save(tmp_path / "again")
    assert transformers.Wav2Vec2CTCTokenizer.from_pretrained(tmp_path / "again")(text).input_ids == ours.encode(text)
    assert Characters.from_folder(tmp_path / "again").fingerprint == ours.fingerprint


def test_a_letter_that_is_not_there_is_unknown_or_refused(tmp_path: Path) -> None:
    vocabulary(tmp_path)
    ours = Characters.from_folder(tmp_path)
    assert ours.encode("Aé") == [5, 3]
    with pytest.raises(MediaError, match="does not have"):
        Characters(ids={"|": 0, "A": 1}).encode("B")
    with pytest.raises(ConfigError, match="between words"):
        Characters(ids={"A": 1})


def writer(folder: Path) -> Wav2Vec2:
    """A model that writes a letter by how loud the sound is: nothing learned, and every window decided."""
    pair(folder, "Wav2Vec2ForCTC", **BASE)
    vocabulary(folder)
    model = polymodal.load(folder)
    assert isinstance(model, Wav2Vec2)
    assert isinstance(model, Transcribes)
    return model


def test_a_long_sound_is_written_in_windows_that_end_between_words(tmp_path: Path) -> None:
    model = writer(tmp_path)
    model.sounds = RawWave(sample_rate=160)  # windows of few samples
    rate, stride = model.sample_rate, model.config.audio.stride
    wave = torch.randn(round(2.3 * WINDOW * rate), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # the scores decide: often a blank, sometimes a space
        model.head.proj.bias[:] = torch.tensor([2.0, -9, -9, -9, 1.0, 0, 0, 0, 0])
    heard = list(model.transcribe_stream(wave.split(701), Listening(words=True)))
    assert heard[-1].until == len(wave)
    assert 3 <= len(heard) <= 5
    words = [word for each in heard for segment in each.segments for word in segment.words]
    assert all(0 <= w.start < w.end <= len(wave) / rate for w in words)
    assert all(a.end <= b.start + stride / rate for a, b in itertools.pairwise(words))
    assert all(0 < w.probability <= 1 for w in words)
    assert "".join(s.text for each in heard for s in each.segments) == "".join(w.text for w in words)
    again = list(model.transcribe_stream(wave.split(1_600), Listening(words=True), after=heard[0]))
    assert again == heard[1:]
    assert math.isclose(heard[0].until / rate, WINDOW, rel_tol=0.5)


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    model = writer(tmp_path)
    for listening in (Listening(language="en"), Listening(task="translate")):
        with pytest.raises(UnsupportedError, match="no translation"):
            next(model.transcribe_stream([torch.zeros(16_000)], listening))
    with pytest.raises(UnsupportedError, match="writes no letters"):
        next(nano("wav2vec2").transcribe_stream([torch.zeros(16_000)], Listening()))
    assert list(model.transcribe_stream([torch.zeros(3)], Listening())) == []
    with pytest.raises(MediaError, match="too short"):
        model.audio.features(torch.zeros(1, 3))
