"""T5, BART and BERT against transformers: outputs, loss, first gradients, total loading, greedy text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from polymodal.backbones.encdec import RelativeBias
from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError, WeightsError
from polymodal.systems.bart import BART
from polymodal.systems.base import System
from polymodal.systems.bert import BERT
from polymodal.systems.t5 import T5
from tests.parity.harness import (
    _close,
    assert_parity,
    compare_gradients,
    file_gradients,
    reference_call,
    save_reference,
)

transformers = pytest.importorskip("transformers")

VOCAB, IGNORE = 61, -100
PARITY = "parity: outputs, loss, first gradients (transformers)"

T5_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": 24, "d_kv": 5, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 3,
    "relative_attention_num_buckets": 12, "relative_attention_max_distance": 9, "decoder_start_token_id": 0,
}  # fmt: skip
BART_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": 24, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 3,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 56, "max_position_embeddings": 30,
}  # fmt: skip
BERT_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40,
    "max_position_embeddings": 30,
}  # fmt: skip


def t5(folder: Path, kind: str, attention: str = "eager", **more: Any) -> tuple[System, Any]:
    """A small T5 1.0, or a 1.1 whose output layer is its own, as in all published files."""
    gated = kind == "v1.1"
    sizes = T5_SIZES | more | ({"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False} if gated else {})
    reference = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    reference.set_attn_implementation(attention)
    if gated:  # transformers 5 builds it tied, whatever the config says, and loads it untied
        reference.lm_head.weight = nn.Parameter(torch.randn(VOCAB, 24) * 0.2)
    save_reference(reference, folder)
    return T5.from_folder(folder, "hf"), reference


def bart(folder: Path, attention: str = "eager", **more: Any) -> tuple[System, Any]:
    reference = transformers.BartForConditionalGeneration(transformers.BartConfig(**(BART_SIZES | more)))
    reference.set_attn_implementation(attention)
    reference.final_logits_bias.normal_(std=0.3)
    save_reference(reference, folder)
    return BART.from_folder(folder, "hf"), reference


def bert(folder: Path, cls: str, attention: str = "eager") -> tuple[System, Any]:
    reference = getattr(transformers, cls)(transformers.BertConfig(**BERT_SIZES))
    reference.set_attn_implementation(attention)
    save_reference(reference, folder)
    return BERT.from_folder(folder, "hf"), reference


def texts(lengths: tuple[int, ...], *, left: bool = False, low: int = 3) -> tuple[Tensor, Tensor]:
    """Random ids of these lengths, padded on one side, and which are valid."""
    place = torch.arange(max(lengths))
    valid = torch.stack([place >= max(lengths) - n if left else place < n for n in lengths])
    return torch.randint(low, VOCAB, valid.shape).masked_fill(~valid, 1), valid


def batch_of(source: tuple[int, ...], target: tuple[int, ...], *, left: bool = False, hole: bool = False) -> Batch:
    ids, valid = texts(source, left=left)
    labels, spoken = texts(target)
    labels = labels.masked_fill(~spoken, IGNORE)
    if hole:
        labels[:, 1] = IGNORE
    return Batch(ids=ids, valid=valid, labels=labels)


BATCHES = {
    "no padding": lambda: batch_of((7, 7), (5, 5)),
    "one token": lambda: batch_of((1, 1), (1, 1)),
    "padding on both sides of the model": lambda: batch_of((13, 4, 1), (9, 1, 6)),
    "left padding": lambda: batch_of((3, 11), (2, 5), left=True),
    "longer than the farthest bucket": lambda: batch_of((29, 17), (25, 29)),
    "a label in the middle is not learned": lambda: batch_of((5, 6), (6, 4), hole=True),
}
every_batch = pytest.mark.parametrize("name", BATCHES)


@pytest.mark.proves("t5", PARITY)
@every_batch
@pytest.mark.parametrize("kind", ["v1.0", "v1.1"])
def test_t5(tmp_path: Path, kind: str, name: str) -> None:
    system, reference = t5(tmp_path, kind)
    assert_parity(system, reference, BATCHES[name](), tmp_path / "grad")


@pytest.mark.proves("bart", PARITY)
@every_batch
def test_bart(tmp_path: Path, name: str) -> None:
    system, reference = bart(tmp_path, scale_embedding=len(name) % 2 == 0)
    bart_parity(system, reference, BATCHES[name](), tmp_path / "grad")


def bart_parity(system: System, reference: Any, batch: Batch, folder: Path) -> None:
    """As `assert_parity`, but for the constant on the scores: it is a buffer, and files of gradients hold its value."""
    result = reference_call(system, reference, batch)
    loss = system.loss(batch).mean
    _close("output", system(batch), result.logits, 1e-5)
    _close("loss", loss, result.loss, 1e-5)
    result.loss.backward()
    loss.backward()
    gradients = file_gradients(reference, folder)
    compare_gradients(system, gradients | {"final_logits_bias": torch.zeros(1, VOCAB)})


def masked(lengths: tuple[int, ...]) -> Batch:
    ids, valid = texts(lengths)
    labels = torch.where(torch.rand(ids.shape) < 0.3, ids, IGNORE).masked_fill(~valid, IGNORE)
    labels[0, 0] = 5
    return Batch(ids=ids, valid=valid, types=torch.randint(0, 2, ids.shape), labels=labels)


@pytest.mark.proves("bert", PARITY)
@pytest.mark.parametrize("lengths", [(7, 7), (1,), (13, 4, 1), (30, 29)])
def test_bert(tmp_path: Path, lengths: tuple[int, ...]) -> None:
    """Outputs at padding are nobody's: only those of words are compared."""
    system, reference = bert(tmp_path, "BertForMaskedLM")
    batch = masked(lengths)
    inputs = {theirs: batch[ours] for ours, theirs in BERT.reference.inputs.items()}
    result, loss = reference(**inputs), system.loss(batch).mean
    _close("output", system(batch)[batch["valid"]], result.logits[batch["valid"]], 1e-5)
    _close("loss", loss, result.loss, 1e-5)
    result.loss.backward()
    loss.backward()
    compare_gradients(system, file_gradients(reference, tmp_path / "grad"))


@pytest.mark.proves("bert", "parity: the backbone and its pooler (transformers)")
def test_bert_without_a_head(tmp_path: Path) -> None:
    system, reference = bert(tmp_path, "BertModel")
    batch = masked((9, 30, 2))
    inputs = {theirs: batch[ours] for ours, theirs in BERT.reference.inputs.items() if ours != "labels"}
    result = reference(**inputs)
    _close("vectors", system.vectors(batch)[batch["valid"]], result.last_hidden_state[batch["valid"]], 1e-5)
    _close("output", system(batch), result.pooler_output, 1e-5)
    direction = torch.randn(24)
    (result.pooler_output @ direction).sum().backward()
    (system(batch) @ direction).sum().backward()
    compare_gradients(system, file_gradients(reference, tmp_path / "grad"))


@pytest.mark.proves("t5", "parity: padding in the decoder (transformers)")
@pytest.mark.proves("bart", "parity: padding in the decoder (transformers)")
@pytest.mark.parametrize("make", [lambda f: t5(f, "v1.0"), lambda f: bart(f)])
def test_padding_in_the_decoder(tmp_path: Path, make: Any) -> None:
    system, reference = make(tmp_path)
    (ids, valid), (target, spoken) = texts((6, 9, 2)), texts((3, 8, 1))
    want = reference(input_ids=ids, attention_mask=valid, decoder_input_ids=target, decoder_attention_mask=spoken)
    b = system.backbone
    got = b.logits(b(b.text(ids, valid), b.target(target, spoken)).x)
    _close("output", got[spoken], want.logits[spoken], 1e-5)


def test_the_fused_attention_of_transformers_agrees_too(tmp_path: Path) -> None:
    batch = batch_of((13, 4, 1), (9, 1, 6))
    assert_parity(*t5(tmp_path / "t5", "v1.1", "sdpa"), batch, tmp_path / "grad1")
    bart_parity(*bart(tmp_path / "bart", "sdpa"), batch, tmp_path / "grad2")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (8, 10), (4, 3), (64, 4000)])
def test_buckets_of_distances(buckets: int, farthest: int, causal: bool) -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-3 * farthest, 3 * farthest)
    want = T5Attention._relative_position_bucket(distance, not causal, buckets, farthest)
    assert torch.equal(RelativeBias(buckets=buckets, max_distance=farthest).bucket(distance, causal=causal), want)


# ---- generation


def greedy(system: Any, ids: Tensor, valid: Tensor, count: int) -> list[list[int]]:
    """The tokens of each row until one that stops it."""
    memory = system.new_memory(len(ids), count + 3)
    rows: list[list[int]] = [[] for _ in ids]
    open_rows = set(range(len(ids)))
    with torch.inference_mode():
        scores = system.prefill(Batch(ids=ids, valid=valid), memory)
        for _ in range(count):
            best = scores.argmax(-1)
            for i in tuple(open_rows):
                rows[i].append(int(best[i]))
                if rows[i][-1] in system.stop_ids:
                    open_rows.discard(i)
            if not open_rows:
                break
            scores = system.step(best, memory)
    return rows


def expected(reference: Any, ids: Tensor, valid: Tensor, count: int, lead: int = 1) -> list[list[int]]:
    """What transformers generates, without what every answer begins with and up to the stop token."""
    out = reference.generate(
        input_ids=ids, attention_mask=valid.long(), max_new_tokens=count + lead - 1, do_sample=False, num_beams=1
    )
    eos = reference.config.eos_token_id
    return [row[: row.index(eos) + 1] if eos in row else row for row in out[:, lead:].tolist()]


def sharpen(reference: Any, *, layers: float, embedding: float) -> None:
    """Random models say one token for ever: larger layers make answers that depend on the prompt.

    A token that some of these answers have and others lack becomes the one that stops.
    """
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(layers if ".layer" in name else embedding)
    ids, valid = prompts()
    reference.generation_config.eos_token_id = reference.generation_config.forced_eos_token_id = None
    answers = reference.generate(input_ids=ids, attention_mask=valid.long(), max_new_tokens=12, do_sample=False)
    rows = [set(row[3:]) for row in answers.tolist()]
    stop = min(range(3, VOCAB), key=lambda token: abs(sum(token in row for row in rows) - len(rows) // 2))
    reference.config.eos_token_id = reference.generation_config.eos_token_id = stop


PROMPTS = (1, 2, 3, 5, 8, 13, 21, 4, 9, 6, 7, 12, 17, 11, 10, 14, 19, 25, 29, 1)


def prompts() -> tuple[Tensor, Tensor]:
    torch.manual_seed(7)
    return texts(PROMPTS)


@pytest.mark.proves("t5", "generation: greedy text of 20 prompts equals transformers, alone and in a batch")
@pytest.mark.parametrize("kind", ["v1.0", "v1.1"])
def test_t5_greedy(tmp_path: Path, kind: str) -> None:
    _, reference = t5(tmp_path, kind, num_decoder_layers=2)  # transformers' cache has as many layers as the encoder
    sharpen(reference, layers=4.0 if kind == "v1.0" else 1.5, embedding=1.0)
    reference.save_pretrained(tmp_path)
    same_answers(T5.from_folder(tmp_path, "hf"), reference)


@pytest.mark.proves("bart", "generation: greedy text of 20 prompts equals transformers, alone and in a batch")
@pytest.mark.parametrize("forced", [None, 7])
def test_bart_greedy(tmp_path: Path, forced: int | None) -> None:
    _, reference = bart(tmp_path, decoder_layers=2)
    sharpen(reference, layers=8.0, embedding=4.0)
    reference.generation_config.forced_bos_token_id = forced
    reference.save_pretrained(tmp_path)
    if forced is not None:  # the published configs have it in this file
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"forced_bos_token_id": forced}))
    same_answers(BART.from_folder(tmp_path, "hf"), reference, lead=1 if forced is None else 2)


def same_answers(system: System, reference: Any, lead: int = 1) -> None:
    ids, valid = prompts()
    want = expected(reference, ids, valid, 12, lead)
    assert len({tuple(row) for row in want}) > 5, "the answers depend on the prompts"
    assert len({len(row) for row in want}) > 1, "some answers stop"
    assert greedy(system, ids, valid, 12) == want
    for i, n in enumerate(PROMPTS[:6]):
        assert greedy(system, ids[i : i + 1, :n], valid[i : i + 1, :n], 12) == [want[i]]


# ---- files


@pytest.mark.proves("t5", "weights: files of several ages")
def test_t5_files_with_second_names(tmp_path: Path) -> None:
    """Flan-T5's files repeat the embedding table; the first files hold a table that nothing reads."""
    system, reference = t5(tmp_path, "v1.1")
    weights = load_file(tmp_path / "model.safetensors")
    for stack in ("encoder", "decoder"):
        weights[f"{stack}.embed_tokens.weight"] = weights["shared.weight"].clone()
    weights["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.zeros(12, 3)
    save_file(weights, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["scale_decoder_outputs"]  # transformers 4 wrote the tie as it was
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False, "n_positions": 512}))
    assert_parity(T5.from_folder(tmp_path, "hf"), reference, batch_of((5, 3), (4, 2)), tmp_path / "grad")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"lm_head\.weight"):
        T5.from_folder(tmp_path, "hf")
    assert system.config.backbone.tied is False


@pytest.mark.proves("bart", "weights: files of the backbone alone")
def test_bart_files_of_the_backbone_alone(tmp_path: Path) -> None:
    reference = transformers.BartModel(transformers.BartConfig(**BART_SIZES))
    save_reference(reference, tmp_path / "base")
    system = BART.from_folder(tmp_path / "base", "hf")
    batch = batch_of((5, 3), (4, 2))
    whole = transformers.BartForConditionalGeneration.from_pretrained(tmp_path / "base").eval()
    want = whole(input_ids=batch["ids"], attention_mask=batch["valid"], labels=batch["labels"])
    _close("output", system(batch), want.logits, 1e-5)
    again = BART.from_folder(system.save(tmp_path / "again"), "hf")
    assert again.config == system.config
    assert transformers.BartModel.from_pretrained(tmp_path / "again").config.d_model == 24


@pytest.mark.proves("bert", "weights: files converted from TensorFlow, with both heads")
def test_bert_files_of_2018(tmp_path: Path) -> None:
    """``gamma`` and ``beta``, a tied output layer that is spelled out, and the head of the next sentence."""
    reference = transformers.BertForPreTraining(transformers.BertConfig(**BERT_SIZES))
    save_reference(reference, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in weights.items()
    }
    old["cls.predictions.decoder.weight"] = old["bert.embeddings.word_embeddings.weight"].clone()
    old["bert.embeddings.position_ids"] = torch.arange(30)[None]
    save_file(old, tmp_path / "model.safetensors")
    batch = masked((9, 9))
    inputs = {theirs: batch[ours] for ours, theirs in BERT.reference.inputs.items() if ours != "labels"}
    for name in ("BertForPreTraining", "BertForMaskedLM"):  # the published config names the second
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": [name]}))
        _close("output", BERT.from_folder(tmp_path, "hf")(batch), reference(**inputs).prediction_logits, 1e-5)


@pytest.mark.parametrize(
    "make", [lambda f: t5(f, "v1.0"), lambda f: t5(f, "v1.1"), bart, lambda f: bert(f, "BertModel")]
)
def test_transformers_reads_what_we_write(tmp_path: Path, make: Any) -> None:
    system, reference = make(tmp_path / "theirs")
    system.save(tmp_path / "ours")
    twin, info = type(reference).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert all(torch.equal(t, twin.state_dict()[n]) for n, t in reference.state_dict().items())


@pytest.mark.parametrize(
    ("cls", "config", "problem"),
    [
        (T5, {"model_type": "t5", "feed_forward_proj": "gated-tanh"}, "understood: gated-gelu, gated-silu, relu"),
        (T5, {"model_type": "t5", "relative_attention_num_buckets": 7}, "relative_attention_num_buckets 7"),
        (T5, {"model_type": "t5", "is_sparse": True}, "is_sparse"),
        (BART, {"model_type": "bart", "normalize_before": True}, "normalize_before is True"),
        (BART, {"model_type": "bart", "d_model": 1023}, "not a multiple of encoder_attention_heads"),
        (BART, {"model_type": "bart", "architectures": ["BartForQuestionAnswering"]}, "understood: BartForCond"),
        (BERT, {"model_type": "bert", "position_embedding_type": "relative_key"}, "relative_key"),
        (BERT, {"model_type": "bert", "is_decoder": True}, "is_decoder is True"),
        (BERT, {"model_type": "bert", "architectures": "BertModel"}, "architectures is 'BertModel', expected list"),
    ],
)
def test_a_config_that_asks_for_something_else_is_refused(cls: Any, config: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as error:
        cls.formats["hf"].read(config)
    assert problem in str(error.value)
