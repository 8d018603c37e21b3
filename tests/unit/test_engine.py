"""The engine: answers are those of the loop, whoever else is there; requests come, go, fail and are cancelled."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError, MediaError
from polymodal.nn.feature_cache import FeatureCache, content_key
from polymodal.samplers.autoregressive import Settings, complete
from polymodal.serve.engine import Engine, EngineConfig
from tests.toy_lm import ToyLM, tokenizer

TOKENIZER = tokenizer()
VOCAB = 320


@pytest.fixture(scope="module")
def model() -> ToyLM:
    torch.manual_seed(0)
    return ToyLM(VOCAB, stop_ids=(11, 12, 13))


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def prompts(count: int, longest: int = 40) -> list[list[int]]:
    numbers = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, longest, (count,), generator=numbers).tolist()
    return [torch.randint(20, VOCAB, (n,), generator=numbers).tolist() for n in lengths]


def alone(model: ToyLM, chat: list[int], settings: Settings, against: list[int] | None = None) -> list[Any]:
    other = None if against is None else model.prompt([against])
    return summary(complete(model, model.prompt([chat]), settings, TOKENIZER, against=other))


def summary(answers: Any) -> list[Any]:
    return [(a.ids, a.text, a.finished) for a in answers]


def test_answers_are_the_same_among_others(model: ToyLM) -> None:
    chats = prompts(8)
    settings = [
        Settings(max_new_tokens=12),
        Settings(max_new_tokens=3),
        Settings(max_new_tokens=12, temperature=1.0, seed=1, n=3),
        Settings(max_new_tokens=8, beams=3),
        Settings(max_new_tokens=8, guidance=2.0),
        Settings(max_new_tokens=1),
        Settings(max_new_tokens=20, temperature=0.8, seed=2, best_of=2),
        Settings(max_new_tokens=16, repetition_penalty=1.3),
    ]
    wanted = [
        alone(model, chat, s, [9, 9] if s.guidance != 1 else None) for chat, s in zip(chats, settings, strict=True)
    ]
    for tokens, chunk in [(2000, 512), (300, 7)]:  # all at once; in turn, in small pieces
        with Engine(model, TOKENIZER, EngineConfig(tokens=tokens, chunk=chunk)) as engine:
            handles = [
                engine.submit(model.prompt([c]), s, against=model.prompt([[9, 9]]) if s.guidance != 1 else None)
                for c, s in zip(chats, settings, strict=True)
            ]
            assert [summary(h.result()) for h in handles] == wanted
        assert engine.load == (0, 0)


def test_requests_run_together_and_long_prompts_are_read_in_chunks(model: ToyLM) -> None:
    model.read.clear()
    with Engine(model, TOKENIZER, EngineConfig(tokens=4000, chunk=16)) as engine:
        first = engine.submit(model.prompt([[30] * 5]), Settings(max_new_tokens=200))
        steps = iter(first)
        next(steps)
        second = engine.submit(model.prompt([[31] * 40]), Settings(max_new_tokens=2))
        second.result()
        assert model.read[:4] == [5, 16, 16, 8]
        first.cancel()
        rest = list(steps)
        assert rest[-1].finished in ("cancel", "stop")


def test_the_budget_holds(model: ToyLM) -> None:
    with Engine(model, TOKENIZER, EngineConfig(tokens=120)) as engine:
        handles = [engine.submit(model.prompt([[40 + i] * 10]), Settings(max_new_tokens=20)) for i in range(9)]
        seen = [engine.load for _ in handles[-1]]
        for handle in handles:
            handle.result()
        assert max(rows for _, rows in seen) <= 4  # 4 x 30 tokens
        with pytest.raises(MediaError, match="2 x 110"):
            engine.submit(model.prompt([[1] * 10]), Settings(max_new_tokens=100, n=2))


def test_common_beginnings_are_read_once(model: ToyLM) -> None:
    begin = prompts(1, 40)[0] * 9
    begin = begin[:50]
    chats = [[*begin, 33, 34], [*begin, 35], begin, [*begin, 33, 34], [9, *begin]]
    wanted = [alone(model, chat, Settings(max_new_tokens=6)) for chat in chats]
    model.read.clear()
    with Engine(model, TOKENIZER) as engine:
        got = [summary(engine.submit(model.prompt([c]), Settings(max_new_tokens=6)).result()) for c in chats]
        assert engine.prefixes is not None
        assert engine.prefixes.hits == 3
    assert got == wanted
    assert model.read == [52, 1, 1, 1, 51]


def test_prefixes_are_forgotten_in_order_of_use(model: ToyLM) -> None:
    a, b, c = ([60 + i] * 30 for i in range(3))
    model.read.clear()
    with Engine(model, TOKENIZER, EngineConfig(prefixes=70)) as engine:
        for chat in (a, b, a, c, a, b):
            engine.submit(model.prompt([chat]), Settings(max_new_tokens=1)).result()
        assert engine.prefixes is not None
        assert engine.prefixes.tokens <= 70
    assert model.read == [30, 30, 1, 30, 1, 30]


class Sees(ToyLM):
    """Its first two tokens stand for a picture."""

    def prefill(self, batch: Batch, memory: Any) -> Tensor:
        self.read.append(batch["ids"].shape[1])
        tokens = self.decoder.text(batch["ids"], batch["valid"])
        where = torch.zeros_like(batch["valid"])
        where[:, :2] = True
        tokens = tokens.scatter(where, batch["pixels"].flatten(0, 1))
        last = batch["valid"].sum(1) - 1
        return self.decoder.logits(self.decoder(tokens, memory).x[torch.arange(batch.size), last])

    def plain_from(self, batch: Batch) -> int:
        return 2


def test_a_prefix_holds_for_its_picture_only() -> None:
    model = Sees(VOCAB)
    pictures = [torch.randn(1, 2, 32) * 3 for _ in range(2)]

    def ask(picture: int, text: list[int]) -> Batch:
        return Batch(**model.prompt([[0, 0, *text]]), pixels=pictures[picture].clone())

    questions = [(0, [5] * 20), (1, [5] * 20), (0, [*[5] * 20, 6, 7]), (1, [*[5] * 20, 6, 7])]
    settings = Settings(max_new_tokens=6)
    wanted = [summary(complete(model, ask(*q), settings, TOKENIZER)) for q in questions]
    assert wanted[0] != wanted[1]
    model.read.clear()
    with Engine(model, TOKENIZER) as engine:
        assert [summary(engine.submit(ask(*q), settings).result()) for q in questions] == wanted
    assert model.read == [22, 22, 2, 2]


class Breaks(ToyLM):
    """Cannot read a prompt that begins with 1, and breaks down on the token 2."""

    def prefill(self, batch: Batch, memory: Any) -> Tensor:
        if int(batch["ids"][0, 0]) == 1:
            raise MediaError("a broken picture")
        scores = super().prefill(batch, memory)
        return torch.full_like(scores, float("nan")) if int(batch["ids"][0, 0]) == 2 else scores

    def step(self, ids: Tensor, memory: Any) -> Tensor:
        if max(memory.lengths) == 50:
            raise RuntimeError("out of memory")
        return super().step(ids, memory)


def test_an_error_is_its_request_s_own() -> None:
    model = Breaks(VOCAB)
    good = Settings(max_new_tokens=15)
    wanted = alone(model, [7, 8], good)
    with Engine(model, TOKENIZER) as engine:
        fine = [engine.submit(model.prompt([[7, 8]]), good) for _ in range(2)]
        unreadable = engine.submit(model.prompt([[1, 8]]), good)
        broken = engine.submit(model.prompt([[2, 8]]), good)
        fine.append(engine.submit(model.prompt([[7, 8]]), good))
        with pytest.raises(MediaError, match="a broken picture"):
            unreadable.result()
        with pytest.raises(ConfigError, match="precision"):
            broken.result()
        assert [summary(h.result()) for h in fine] == [wanted] * 3
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.submit(model.prompt([[7, 8]]), Settings(max_new_tokens=90)).result()
        assert summary(engine.submit(model.prompt([[7, 8]]), good).result()) == wanted


def test_cancel_frees_the_room_for_others(model: ToyLM) -> None:
    with Engine(ToyLM(VOCAB), TOKENIZER, EngineConfig(tokens=210)) as engine:
        long = engine.submit(model.prompt([[30] * 5]), Settings(max_new_tokens=200))
        steps = iter(long)
        next(steps)
        waits = engine.submit(model.prompt([[31] * 5]), Settings(max_new_tokens=200))
        dropped = engine.submit(model.prompt([[31] * 5]), Settings(max_new_tokens=200))
        dropped.cancel()
        (none,) = dropped.result()  # while the first one still runs
        assert (none.finished, none.ids) == ("cancel", [])
        long.cancel()
        assert list(steps)[-1].finished == "cancel"
        assert next(iter(waits)).token is not None
        waits.cancel()


def test_close_ends_everything(model: ToyLM) -> None:
    engine = Engine(ToyLM(VOCAB), TOKENIZER, EngineConfig(tokens=210))
    handles = [engine.submit(model.prompt([[30] * 5]), Settings(max_new_tokens=200)) for _ in range(3)]
    next(iter(handles[0]))
    engine.close()
    engine.close()
    assert {answer.finished for h in handles for answer in h.result()} == {"cancel"}
    with pytest.raises(ConfigError, match="closed"):
        engine.submit(model.prompt([[1]]), Settings(max_new_tokens=5))


def test_bad_requests(model: ToyLM) -> None:
    with Engine(model, TOKENIZER) as engine:
        one = model.prompt([[1, 2]])
        with pytest.raises(ConfigError, match="against="):
            engine.submit(one, Settings(guidance=2.0))
        with pytest.raises(ConfigError, match="against="):
            engine.submit(one, Settings(), against=one)
        with pytest.raises(ConfigError, match="one prompt, not 2"):
            engine.submit(model.prompt([[1], [2]]), Settings())
        with pytest.raises(MediaError, match="do not fit"):
            engine.submit(model.prompt([[1] * 300]), Settings(max_new_tokens=1)).result()
    with pytest.raises(ConfigError):
        EngineConfig(chunk=0)


# ---- features ----


def test_a_key_is_content_shape_dtype_and_pre_processing() -> None:
    x = torch.arange(12, dtype=torch.int32)
    keys = [
        content_key(x, "a"), content_key(x, "b"), content_key(x.reshape(3, 4), "a"),
        content_key(x.view(torch.float32), "a"), content_key(x + (x == 11), "a"),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert content_key(x.reshape(3, 4).t().contiguous().t().reshape(12), "a") == keys[0]
    assert content_key(torch.tensor(1.0), "") != content_key(torch.ones(1), "")
    content_key(torch.zeros(0, dtype=torch.bfloat16), "")


@given(st.lists(st.integers(0, 5), max_size=30))
def test_features_are_kept_by_last_use_within_the_limit(asked: list[int]) -> None:
    sizes = [4, 8, 12, 16, 20, 100]  # bytes
    cache, made, known = FeatureCache(40), [], []

    def make(i: int) -> Tensor:
        made.append(i)
        return torch.full((sizes[i],), i, dtype=torch.uint8)

    for i in asked:
        before = len(made)
        assert cache.get(str(i), lambda i=i: make(i)).tolist() == [i] * sizes[i]
        assert (len(made) == before) == (i in known)
        known = [*(j for j in known if j != i), i]
        if sizes[i] > 40:
            known.remove(i)
        while sum(sizes[j] for j in known) > 40:
            known.pop(0)
        assert cache.nbytes == sum(sizes[j] for j in known) <= 40
    assert cache.hits + cache.misses == len(asked)


def test_features_have_no_history_and_hold_no_batch() -> None:
    cache, batch = FeatureCache(1000), torch.ones(100, 4, requires_grad=True)
    kept = cache.get("a", lambda: (batch * 2)[3])
    assert not kept.requires_grad
    assert kept.untyped_storage().nbytes() == kept.nbytes == cache.nbytes
