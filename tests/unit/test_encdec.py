"""Encoder-decoders and BERT: masks, caches, memories, prompts, initialisation."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from polymodal.backbones.bert import Bert, BertConfig, bert_init_
from polymodal.backbones.decoder import Gated, Learned, Plain
from polymodal.backbones.encdec import (
    EncDec,
    EncDecConfig,
    EncDecMemory,
    RelativeBias,
    StackConfig,
    Unbiased,
    bart_init_,
    t5_init_,
)
from polymodal.core.batch import Batch
from polymodal.core.chat import Chat
from polymodal.core.errors import ConfigError, MediaError, UnsupportedError
from polymodal.core.sample import Image, Sample
from polymodal.core.tokens import Tokens
from polymodal.core.verbs import Counts, Generates, Memory, Trains
from polymodal.nn.norm import RMS, Layer
from polymodal.nn.precision import cast
from polymodal.samplers.autoregressive import Settings, complete
from polymodal.systems.bart import BART, BARTConfig
from polymodal.systems.bert import BERT, BERTConfig
from polymodal.systems.t5 import T5, T5Config
from polymodal.tokenizers.language import LanguageTokenizer

VOCAB = 300


def t5_config(dim: int = 24, heads: int = 3, mlp: Any = None) -> EncDecConfig:
    shape: dict[str, Any] = {
        "num_heads": heads,
        "head_dim": 6,
        "scale": 1.0,
        "mlp": mlp or Unbiased(hidden_dim=2 * dim),
    }
    return EncDecConfig(
        vocab_size=VOCAB, dim=dim, encoder=StackConfig(num_layers=2, **shape), norm=RMS(), post_norm=False,
        decoder=StackConfig(num_layers=3, **shape), position=RelativeBias(buckets=8, max_distance=10), start_id=0,
        pad_id=0, logit_scale=dim**-0.5,
    )  # fmt: skip


def bart_config(dim: int = 24, context: int = 20) -> EncDecConfig:
    stack = StackConfig(num_layers=2, num_heads=3, head_dim=dim // 3, mlp=Plain(hidden_dim=2 * dim), bias=True)
    return EncDecConfig(
        vocab_size=VOCAB, dim=dim, encoder=stack, decoder=stack, norm=Layer(), post_norm=True,
        position=Learned(count=context, offset=2), start_id=2, pad_id=1, fixed_id=1, logit_bias=True,
    )  # fmt: skip


CONFIGS = {"t5": t5_config, "bart": bart_config}
both = pytest.mark.parametrize("name", CONFIGS)


def model(name: str) -> EncDec:
    """A model with noise on every weight, so that nothing is zero or one."""
    out = EncDec(CONFIGS[name]())
    (t5_init_ if name == "t5" else bart_init_)(out)
    with torch.no_grad():
        for parameter in out.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return out.eval()


def ids_of(*lengths: int) -> tuple[Tensor, Tensor]:
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.randint(3, VOCAB, valid.shape).masked_fill(~valid, 1), valid


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=2e-5, rtol=0)


# ---- positions


def bucket(distance: int, buckets: int, farthest: int, causal: bool) -> int:
    """The paper's rule, one distance at a time."""
    first, count = 0, buckets
    if not causal:
        count //= 2
        first = count if distance > 0 else 0
    far = max(-distance, 0) if causal else abs(distance)
    single = count // 2
    if far < single:
        return first + far
    grown = single + int(math.log(far / single) / math.log(farthest / single) * (count - single) + 1e-7)
    return first + min(grown, count - 1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (8, 10), (4, 3), (16, 1000)])
def test_buckets(buckets: int, farthest: int, causal: bool) -> None:
    distances = torch.arange(-2 * farthest, 2 * farthest + 1)
    got = RelativeBias(buckets=buckets, max_distance=farthest).bucket(distances, causal=causal).tolist()
    assert got == [bucket(d, buckets, farthest, causal) for d in distances.tolist()]
    assert set(got) <= set(range(buckets))


@pytest.mark.parametrize(("buckets", "farthest"), [(2, 128), (7, 128), (32, 16), (0, 1)])
def test_buckets_that_share_nothing_out(buckets: int, farthest: int) -> None:
    with pytest.raises(ConfigError):
        RelativeBias(buckets=buckets, max_distance=farthest)


# ---- what sees what


@both
def test_padding_changes_nothing(name: str) -> None:
    m = model(name)
    ids, valid = ids_of(4, 9, 1)
    target, spoken = ids_of(7, 2, 5)
    whole = m.logits(m(m.text(ids, valid), m.target(target, spoken)).x)
    for i, (n, k) in enumerate(zip((4, 9, 1), (7, 2, 5), strict=True)):
        alone = m.logits(m(m.text(ids[i : i + 1, :n]), m.target(target[i : i + 1, :k])).x)
        close(whole[i, :k], alone[0])


def test_padding_of_the_encoder_may_come_first_where_positions_are_relative() -> None:
    m = model("t5")
    ids, _ = ids_of(5)
    left = torch.cat([torch.full((1, 3), 7), ids], 1)
    target, _ = ids_of(4)
    close(m(m.text(left, torch.arange(8)[None] >= 3), m.target(target)).x, m(m.text(ids), m.target(target)).x)


@both
def test_the_decoder_sees_no_later_token_and_all_of_the_encoder(name: str) -> None:
    m = model(name)
    source = m.embed(ids_of(6)[0]).detach().requires_grad_()
    target = m.embed(ids_of(5)[0]).detach().requires_grad_()
    tokens = m.text(torch.zeros(1, 6, dtype=torch.int64)).with_x(source)
    out = m(tokens, m.target(torch.zeros(1, 5, dtype=torch.int64)).with_x(target)).x
    out[0, 2].square().sum().backward()
    assert target.grad is not None
    assert source.grad is not None
    assert target.grad[0, :3].abs().sum(-1).gt(0).all()
    assert not target.grad[0, 3:].any()
    assert source.grad[0].abs().sum(-1).gt(0).all()


def test_packed_samples_do_not_see_each_other_in_the_encoder() -> None:
    m = model("t5")
    one, two = m.text(ids_of(4)[0]), m.text(ids_of(6)[0])
    packed = Tokens.concat([one, two])
    sample = torch.tensor([[0] * 4 + [1] * 6])
    position = torch.cat([one.position, two.position], 1)
    packed = Tokens(
        x=packed.x, valid=packed.valid, block=torch.zeros_like(sample), position=position, modality=packed.modality,
        sample=sample,
    )  # fmt: skip
    close(m.encode(packed).x, torch.cat([m.encode(one).x, m.encode(two).x], 1))
    with pytest.raises(AssertionError, match="one sample a row"):
        m.source(m.encode(packed))


# ---- caches


def steps(m: EncDec, memory: EncDecMemory, target: Tensor) -> Tensor:
    return torch.stack([m.step(target[:, i], memory) for i in range(target.shape[1])], 1)


@both
def test_cached_decoding_is_decoding(name: str) -> None:
    m = model(name)
    ids, valid = ids_of(4, 9, 1)
    target, _ = ids_of(12, 12, 12)
    start = torch.full((3, 1), m.config.start_id)
    whole = m.logits(m(m.text(ids, valid), m.target(torch.cat([start, target], 1))).x)
    memory = m.new_memory(3, 13)
    assert isinstance(memory, Memory)
    first = m.prefill(m.text(ids, valid), memory)
    close(first, whole[:, 0])
    close(steps(m, memory, target), whole[:, 1:])
    assert memory.lengths == [13] * 3
    with pytest.raises(MediaError, match="do not fit"):
        m.step(target[:, 0], memory)


@both
def test_what_an_answer_is_forced_to_begin_with(name: str) -> None:
    m = model(name)
    tokens = m.text(ids_of(5)[0])
    plain, forced = m.new_memory(1, 8), m.new_memory(1, 8)
    m.prefill(tokens, plain)
    close(m.prefill(tokens, forced, (9,)), m.step(torch.tensor([9]), plain))


@both
def test_rows_are_selected_with_what_they_read(name: str) -> None:
    m = model(name)
    ids, valid = ids_of(4, 9, 2)
    memory = m.new_memory(3, 10)
    m.prefill(m.text(ids, valid), memory)
    target = torch.randint(3, VOCAB, (3, 5))
    steps(m, memory, target[:, :2])
    order = torch.tensor([2, 0, 2])
    memory.select(order)
    got = steps(m, memory, target[order][:, 2:])
    fresh = m.new_memory(3, 10)
    m.prefill(m.text(ids[order], valid[order]), fresh)
    close(got, steps(m, fresh, target[order])[:, 2:])


@both
def test_a_row_of_another_memory_with_a_longer_source_and_answer(name: str) -> None:
    """As an engine batches: rows come when they come, of all lengths."""
    m = model(name)
    sources = [ids_of(n)[0] for n in (3, 8, 5)]
    targets = [torch.randint(3, VOCAB, (1, n)) for n in (6, 2, 4)]
    pool = m.new_memory(3, 12)
    for row in (1, 0, 2):
        lone = m.new_memory(1, 10)
        m.prefill(m.text(sources[row]), lone)
        steps(m, lone, targets[row])
        pool.put(row, lone)
    assert pool.lengths == [7, 3, 5]
    more = torch.randint(3, VOCAB, (3, 4))
    got = steps(m, pool, more)
    for row in range(3):
        lone = m.new_memory(1, 12)
        m.prefill(m.text(sources[row]), lone)
        close(got[row], steps(m, lone, torch.cat([targets[row], more[row : row + 1]], 1))[0, -4:])
    pool.cut(0, 8)
    again = m.step(more[:, 1], pool)
    close(again[0], got[0, 1])


def test_a_memory_counts_the_source_among_its_bytes() -> None:
    m = model("t5")
    memory = m.new_memory(2, 5)
    empty = memory.nbytes
    m.prefill(m.text(ids_of(7, 7)[0]), memory)
    assert memory.nbytes - empty == 2 * 3 * 2 * 7 * 3 * 6 * 4  # keys and values, layers, rows, tokens, heads, dim, fp32


@both
def test_bf16(name: str) -> None:
    m = cast(model(name), "bf16")
    ids, valid = ids_of(4, 9)
    memory = m.new_memory(2, 6)
    scores = m.prefill(m.text(ids, valid), memory)
    assert scores.dtype == torch.float32
    assert bool(torch.isfinite(m.step(scores.argmax(-1), memory)).all())


# ---- inputs


def test_labels_are_shifted_behind_the_start_token() -> None:
    m = model("bart")
    assert m.shift(torch.tensor([[5, 6, 7], [8, -100, -100]])).tolist() == [[2, 5, 6], [2, 8, 1]]


def test_a_text_beyond_the_table_of_positions() -> None:
    m = model("bart")
    with pytest.raises(MediaError, match="21 tokens; this backbone reads at most 20"):
        m.encode(m.text(torch.zeros(1, 21, dtype=torch.int64)))
    with pytest.raises(MediaError, match="a prompt of 21 tokens"):
        m.prompt([[3] * 21])
    assert m.new_memory(1, 500).capacity == 20
    b = Bert(bert_config())
    with pytest.raises(MediaError, match="12 tokens; this encoder reads at most 11"):
        b.text(torch.zeros(1, 12, dtype=torch.int64))


@both
def test_a_row_without_a_token(name: str) -> None:
    m = model(name)
    with pytest.raises(MediaError, match="no token"):
        m.prefill(
            m.text(torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[True] * 3, [False] * 3])), m.new_memory(2, 3)
        )
    with pytest.raises(MediaError, match="empty prompt"):
        m.prompt([[3], []])


# ---- the systems


def systems() -> list[Any]:
    t5 = T5.build(T5Config(backbone=t5_config()))
    bart = BART.build(BARTConfig(backbone=bart_config(), forced_id=5))
    return [t5, bart]


def tokenizer() -> LanguageTokenizer:
    return LanguageTokenizer.train_bpe(["what is the colour of the cup", "a cup of tea is the answer"], 299)


def test_prompts_are_one_text_each() -> None:
    for system in systems():
        assert isinstance(system, Generates)
        assert isinstance(system, Trains)
        assert isinstance(system, Counts)
        with pytest.raises(UnsupportedError, match=r"tokenizer\.json"):
            system.prompt([Chat.of("what")])
        system.tokenizer = tokenizer()
        batch = system.prompt([Chat.of("what is the cup"), Chat.of("tea")])
        assert batch["valid"].sum(1).tolist() == [system.count(Sample.of(t)) for t in ("what is the cup", "tea")]
        assert system.tokenizer.decode(batch["ids"][0].tolist()) == "what is the cup"
        assert bool((batch["ids"][1][~batch["valid"][1]] == system.config.backbone.pad_id).all())
        memory = system.new_memory(2, 9)
        scores = system.prefill(batch, memory)
        assert scores.shape == (2, system.vocab_size)
        assert system.step(scores.argmax(-1), memory).shape == (2, system.vocab_size)
        for chat in (
            Chat.of("a").reply("b"),
            Chat.of([{"role": "system", "content": "a"}]),
            Chat.of(["a", Image("a.png")]),
            Chat.of({"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "f"}]}),
        ):
            with pytest.raises(MediaError):
                system.prompt([chat])


@pytest.mark.parametrize("settings", [Settings(max_new_tokens=5), Settings(max_new_tokens=5, beams=3)])
@pytest.mark.parametrize("i", [0, 1])
def test_the_generation_loop_answers_alone_as_in_a_batch(i: int, settings: Settings) -> None:
    system, reader = systems()[i].eval(), tokenizer()
    with torch.no_grad():
        for parameter in system.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    system.tokenizer = reader
    chats = [Chat.of(text) for text in ("what is the cup", "tea", "a cup of tea is the answer of the cup")]
    together = complete(system, system.prompt(chats), settings, reader)
    alone = [complete(system, system.prompt([chat]), settings, reader)[0] for chat in chats]
    assert [answer.ids for answer in together] == [answer.ids for answer in alone]
    assert len({tuple(answer.ids) for answer in alone}) > 1


@pytest.mark.parametrize("i", [0, 1])
def test_the_loss_is_that_of_the_labels_one_by_one(i: int) -> None:
    system = systems()[i].eval()
    ids, valid = ids_of(5, 3)
    labels = torch.tensor([[5, 6, 7, 8], [9, 10, -100, -100]])
    loss = system.loss(Batch(ids=ids, valid=valid, labels=labels))
    scores = system(Batch(ids=ids, valid=valid, labels=labels)).log_softmax(-1)
    want = -sum(scores[r, c, labels[r, c]] for r in range(2) for c in range(4) if labels[r, c] >= 0)
    torch.testing.assert_close(loss.total, want)
    assert loss.weight == 6


def test_a_config_that_the_format_cannot_hold_is_not_written(tmp_path: Path) -> None:
    for system, name in zip(systems(), ("encoder.bias", "fixed_id"), strict=True):
        b = system.config.backbone
        odd = {"encoder.bias": replace(b, encoder=replace(b.encoder, bias=True)), "fixed_id": replace(b, fixed_id=None)}
        with pytest.raises(ConfigError, match=name):
            type(system).build(replace(system.config, backbone=odd[name])).save(tmp_path)


def test_padding_of_bart_learns_nothing_from_being_read() -> None:
    system = systems()[1]
    ids = torch.ones(1, 4, dtype=torch.int64)
    system.backbone.encode(system.backbone.text(ids)).x.square().sum().backward()
    assert not system.backbone.embed_tokens.weight.grad[1].any()


def bert_config() -> BertConfig:
    return BertConfig(vocab_size=VOCAB, context=11, dim=24, num_layers=2, num_heads=3, hidden_dim=48)


def test_padding_changes_nothing_in_bert() -> None:
    for output in ("masked words", "first token"):
        system = BERT.build(BERTConfig(text=bert_config(), output=output)).eval()
        ids, valid = ids_of(4, 9, 1)
        got = system(Batch(ids=ids, valid=valid))
        for i, n in enumerate((4, 9, 1)):
            alone = system(Batch(ids=ids[i : i + 1, :n]))[0]
            close(got[i] if output == "first token" else got[i, :n], alone)
    with pytest.raises(UnsupportedError, match="no loss"):
        system.loss(Batch(ids=ids))


def test_bert_counts_with_the_tokens_that_frame_a_text() -> None:
    system = BERT.build(BERTConfig(text=bert_config()))
    with pytest.raises(UnsupportedError, match=r"tokenizer\.json"):
        system.count(Sample.of("tea"))
    system.tokenizer = replace(tokenizer(), prefix=(1,), suffix=(2,))
    assert system.count(Sample.of(["tea", "tea"])) == 2 * (2 + len(tokenizer().encode("tea", special=False)))


def test_a_bert_whose_heads_do_not_divide_its_width() -> None:
    with pytest.raises(ConfigError):
        BertConfig(vocab_size=9, context=9, dim=10, num_layers=1, num_heads=3, hidden_dim=9)


# ---- initialisation


def std(weight: Tensor) -> float:
    return float(weight.detach().std())


def test_t5_begins_as_mesh_tensorflow_has_it() -> None:
    config = t5_config(dim=256, heads=32, mlp=Gated(hidden_dim=320))
    m = EncDec(EncDecConfig(**{**vars(config), "tied": False, "logit_scale": None}))
    t5_init_(m)
    block: Any = m.decoder.blocks[1]
    want = {
        m.embed_tokens: 1.0, m.lm_head: 256**-0.5, m.encoder.position: 256**-0.5, block.mlp.gate_proj: 256**-0.5,
        block.mlp.up_proj: 256**-0.5, block.mlp.down_proj: 320**-0.5, block.attn.q_proj: (256 * 6) ** -0.5,
        block.cross_attn.k_proj: 256**-0.5, block.attn.o_proj: (32 * 6) ** -0.5,
    }  # fmt: skip
    for module, expected in want.items():
        assert std(module.weight) == pytest.approx(expected, rel=0.1), module
    with torch.no_grad():  # so scores of attention begin near one without a scale
        x = block.attn_norm(torch.randn(4, 50, 256))
        q, (k, _) = block.attn.q_proj(x), block.attn.keys_values(x)
        scores = torch.einsum("bqhd,bhkd->bhqk", q.unflatten(-1, (32, 6)), k)
    assert 0.5 < std(scores) < 2


def test_bart_and_bert_begin_at_two_hundredths() -> None:
    m = EncDec(bart_config(dim=192))
    bart_init_(m)
    assert not m.embed_tokens.weight[1].any()
    b = Bert(BertConfig(vocab_size=VOCAB, context=64, dim=192, num_layers=1, num_heads=3, hidden_dim=192))
    bert_init_(b)
    block: Any = m.decoder.blocks[0]
    for layer in (block.attn.q_proj, block.cross_attn.o_proj, block.mlp.up_proj, m.decoder.position):
        assert std(layer.weight) == pytest.approx(0.02, rel=0.05)
    first: Any = b.blocks[0]
    for weight in (first.attn.q_proj.weight, b.embed_tokens.weight, b.position.weight):
        assert std(weight) == pytest.approx(0.02 * 0.8796, rel=0.05)
        assert float(weight.detach().abs().max()) <= 0.04
    assert not any(p.any() for n, p in [*m.named_parameters(), *b.named_parameters()] if n.endswith("proj.bias"))
