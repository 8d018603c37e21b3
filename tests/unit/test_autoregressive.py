"""The generation loop against transformers, and properties of its rules."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from polymodal.core.errors import ConfigError, MediaError
from polymodal.nn.cache import KVCache
from polymodal.samplers.autoregressive import (
    Settings,
    Writer,
    complete,
    draw,
    filtered,
    generator,
    repeated,
    ruled,
    sample,
)
from tests.toy_lm import ToyLM, llama, tokenizer

TOKENIZER = tokenizer()
VOCAB = 320  # more than the tokenizer has, as the Hub's models often do
PROMPTS = [[5, 17, 200, 33, 8], [7], [100, 101, 102, 100, 101, 102, 9, 250, 3], [61, 60]]


@pytest.fixture(scope="module")
def model() -> ToyLM:
    torch.manual_seed(0)
    return ToyLM(VOCAB)


@pytest.fixture(scope="module")
def theirs(model: ToyLM) -> Any:
    return llama(model)


def reference(theirs: Any, prompt: list[int], tokens: int = 20, **options: Any) -> Any:
    defaults: dict[str, Any] = dict(do_sample=False, max_new_tokens=tokens, return_dict_in_generate=True)
    ids = torch.tensor([prompt])
    return theirs.generate(ids, attention_mask=torch.ones_like(ids), **{**defaults, **options})


def answers(model: ToyLM, prompts: list[list[int]], settings: Any = None, **options: Any) -> list[list[int]]:
    settings = Settings(**options) if settings is None else settings
    return [c.ids for c in complete(model, model.prompt(prompts), settings, TOKENIZER)]


def test_greedy_equals_transformers_alone_and_in_a_ragged_batch(model: ToyLM, theirs: Any) -> None:
    wanted = [reference(theirs, prompt).sequences[0, len(prompt) :].tolist() for prompt in PROMPTS]
    assert [answers(model, [prompt], max_new_tokens=20)[0] for prompt in PROMPTS] == wanted
    assert answers(model, PROMPTS, max_new_tokens=20) == wanted
    lengths = [3, 20, 1, 11]  # rows leave one after the other
    got = answers(model, PROMPTS, [Settings(max_new_tokens=n) for n in lengths])
    assert got == [ids[:n] for ids, n in zip(wanted, lengths, strict=True)]


@pytest.mark.parametrize(
    ("ours", "other"),
    [
        (dict(top_k=7), dict(top_k=7)),
        (dict(top_p=0.6), dict(top_p=0.6)),
        (dict(min_p=0.2), dict(min_p=0.2)),
        (dict(temperature=0.4, repetition_penalty=1.7), dict(temperature=0.4, repetition_penalty=1.7)),
        (dict(no_repeat_ngram=2), dict(no_repeat_ngram_size=2)),
        (dict(no_repeat_ngram=1), dict(no_repeat_ngram_size=1)),
        (
            dict(temperature=1.8, top_k=40, top_p=0.8, min_p=0.05, repetition_penalty=1.3, no_repeat_ngram=3),
            dict(temperature=1.8, top_k=40, top_p=0.8, min_p=0.05, repetition_penalty=1.3, no_repeat_ngram_size=3),
        ),
    ],
)
def test_rules_and_their_order_equal_transformers(
    model: ToyLM, theirs: Any, ours: dict[str, Any], other: dict[str, Any]
) -> None:
    prompt = PROMPTS[2][:5]  # 100 101 102 100 101: rules have something to do
    options = dict(do_sample=True, output_scores=True, output_logits=True, top_k=0)
    out = reference(theirs, prompt, 1, **{**options, **other})
    settings = Settings(**{"temperature": 1.0, **ours})
    got = filtered(ruled(out.logits[0][0].float(), settings, prompt, len(prompt), None), settings)
    torch.testing.assert_close(got, out.scores[0][0])
    assert 1 <= int(got.isfinite().sum()) <= VOCAB


@pytest.mark.parametrize("beams", [2, 5])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 1.7])
def test_beams_equal_transformers(model: ToyLM, theirs: Any, beams: int, length_penalty: float) -> None:
    stops = list(range(40, 60))  # so many that some beams end early
    model.stop_ids = tuple(stops)
    settings = Settings(beams=beams, n=2, length_penalty=length_penalty, max_new_tokens=12)
    try:
        together = complete(model, model.prompt(PROMPTS), settings, TOKENIZER)
    finally:
        model.stop_ids = ()
    ends = set()
    for row, prompt in enumerate(PROMPTS):
        out = reference(
            theirs, prompt, 12, num_beams=beams, num_return_sequences=2, length_penalty=length_penalty,
            eos_token_id=stops, output_scores=True,
        )  # fmt: skip
        mine = [c for c in together if c.row == row]
        for one, ids, score in zip(mine, out.sequences, out.sequences_scores, strict=True):
            assert one.ids == ids[len(prompt) :][: len(one.ids)].tolist()
            assert one.logprob / len(one.ids) ** length_penalty == pytest.approx(float(score), abs=1e-4)
            ends.add(one.finished)
    assert length_penalty > 1 or "stop" in ends


def test_as_many_beams_as_tokens_find_the_best_pair(model: ToyLM) -> None:
    prompt = PROMPTS[0]
    first = model.prefill(model.prompt([prompt]), model.new_memory(1, 9)).log_softmax(-1)[0]
    second = model.prefill(model.prompt([[*prompt, t] for t in range(VOCAB)]), model.new_memory(VOCAB, 9))
    total = first[:, None] + second.log_softmax(-1)
    (best,) = complete(model, model.prompt([prompt]), Settings(beams=VOCAB, max_new_tokens=2), TOKENIZER)
    assert best.ids == list(divmod(int(total.argmax()), VOCAB))
    assert best.logprob == pytest.approx(float(total.max()), abs=1e-4)


def test_guidance_equals_transformers(model: ToyLM, theirs: Any) -> None:
    against = [[9, 9], [4, 5, 6, 7], [1], [2, 3]]
    wanted = [
        reference(theirs, p, 8, guidance_scale=2.5, negative_prompt_ids=torch.tensor([a])).sequences[0, len(p) :]
        for p, a in zip(PROMPTS, against, strict=True)
    ]
    settings = [Settings(max_new_tokens=8, guidance=2.5, n=n) for n in (1, 2, 1, 3)]
    settings[2] = Settings(max_new_tokens=8)  # a row without guidance among them
    wanted[2] = reference(theirs, PROMPTS[2], 8).sequences[0, len(PROMPTS[2]) :]
    got = complete(model, model.prompt(PROMPTS), settings, TOKENIZER, against=model.prompt(against))
    assert [c.row for c in got] == [0, 1, 1, 2, 3, 3, 3]
    for answer in got:
        assert answer.ids == wanted[answer.row].tolist()
    with pytest.raises(ConfigError, match="against="):
        complete(model, model.prompt(PROMPTS), settings, TOKENIZER)


def test_samples_have_the_filtered_distribution(model: ToyLM) -> None:
    settings = Settings(temperature=1.5, top_k=12, top_p=0.9, seed=3, n=1000, max_new_tokens=1)
    scores = model.prefill(model.prompt([PROMPTS[0]]), model.new_memory(1, 9))[0]
    chances = filtered(scores, settings).double().softmax(0)
    drawn = torch.tensor(answers(model, [PROMPTS[0]], settings)).flatten().bincount(minlength=VOCAB)
    kept = chances > 0
    assert 3 < int(kept.sum()) <= 12
    assert int(drawn[~kept].sum()) == 0
    assert chisquare(drawn[kept].numpy(), (chances[kept] * 1000).numpy()).pvalue > 0.01


def test_draw_never_takes_what_is_ruled_out() -> None:
    numbers = torch.Generator().manual_seed(0)
    scores = torch.tensor([-torch.inf, 0.0, -torch.inf, 5.0, -torch.inf])
    assert {draw(scores, numbers) for _ in range(300)} == {1, 3}


def test_a_seed_gives_the_same_answer_alone_and_in_a_batch(model: ToyLM) -> None:
    settings = [Settings(temperature=1.0, seed=seed, max_new_tokens=15) for seed in (1, 2, 1, -5)]
    together = answers(model, PROMPTS, settings)
    torch.manual_seed(99)
    assert [answers(model, [p], s)[0] for p, s in zip(PROMPTS, settings, strict=True)] == together
    several = answers(model, [PROMPTS[0]], temperature=1.0, seed=1, max_new_tokens=15, n=4)
    assert several[0] == together[0]
    assert len({tuple(ids) for ids in several}) == 4
    seeds = [Settings(seed=seed) for seed in (1, -1, 2**40, 0)]
    assert len({generator(s, c).initial_seed() for s in seeds for c in range(3)}) == 12


def test_without_a_seed_the_global_one_decides(model: ToyLM) -> None:
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(answers(model, PROMPTS[:1], temperature=1.0, max_new_tokens=8))
    assert runs[0] == runs[1] != runs[2]


def test_log_probabilities_are_those_of_the_model(model: ToyLM) -> None:
    settings = Settings(max_new_tokens=6, logprobs=3, temperature=0.7, top_k=5, repetition_penalty=1.5, seed=0)
    (answer,) = complete(model, model.prompt([PROMPTS[0]]), settings, TOKENIZER)
    ids = torch.tensor([[*PROMPTS[0], *answer.ids]])
    exact = model.decoder.logits(model.decoder(model.decoder.text(ids)).x)[0].log_softmax(-1)[len(PROMPTS[0]) - 1 :]
    for step, row in zip(answer.steps, exact, strict=False):
        assert step.token is not None
        assert step.logprob == pytest.approx(float(row[step.token]), abs=1e-4)
        assert [t for t, _ in step.top] == row.topk(3).indices.tolist()
        assert [p for _, p in step.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


def test_best_of_gives_the_most_probable(model: ToyLM) -> None:
    options: dict[str, Any] = dict(temperature=1.0, seed=4, max_new_tokens=8)
    every = complete(model, model.prompt([PROMPTS[0]]), Settings(**options, n=6), TOKENIZER)
    best = complete(model, model.prompt([PROMPTS[0]]), Settings(**options, n=2, best_of=6), TOKENIZER)
    ranked = sorted(every, key=lambda c: c.logprob / len(c.ids), reverse=True)
    assert [c.ids for c in best] == [c.ids for c in ranked[:2]]


def test_frequency_and_presence_count_the_answer_only() -> None:
    scores, ids = torch.arange(6.0), [0, 0, 1, 5, 5, 3]
    got = ruled(scores, Settings(frequency_penalty=0.5, presence_penalty=2.0), ids, 3, None)
    assert got.tolist() == [0, 1, 2, 0.5, 4, 2]


@given(st.lists(st.integers(0, 3), max_size=12), st.integers(1, 4))
def test_repeated_ngrams(ids: list[int], size: int) -> None:
    known = {tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)}
    assert repeated(ids, size) == [t for t in range(4) if (*ids, t)[-size:] in known and len(ids) >= size]


def test_an_answer_has_no_ngram_twice(model: ToyLM) -> None:
    (ids,) = answers(model, [[5, 6]], max_new_tokens=60, no_repeat_ngram=2)
    pairs = list(itertools.pairwise([5, 6, *ids]))
    assert len(set(pairs)) == len(pairs)


# ---- text and ends ----


class Pieces:
    """A stream whose tokens are given pieces of text."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces

    def push(self, token: int) -> str:
        return self.pieces[token]

    def finish(self) -> str:
        return ""


def written(pieces: list[str], stop: tuple[str, ...]) -> tuple[str, bool]:
    writer, text = Writer(Pieces(pieces), stop), ""
    for token in range(len(pieces)):
        more, stopped = writer.push(token)
        text += more
        whole = "".join(pieces[: token + 1])
        assert whole.startswith(text)
        assert stopped or len(whole) - len(text) < max(map(len, stop), default=1), "too much is held back"
        if stopped:
            return text, True
    more, stopped = writer.finish()
    return text + more, stopped


@given(
    st.text("ab", max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3).map(tuple),
    st.sets(st.integers(1, 11)),
)
def test_stop_strings_at_every_split(text: str, stop: tuple[str, ...], cuts: set[int]) -> None:
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    wanted = (text[: min(ends)[1]], True) if ends else (text, False)
    edges = [0, *sorted(c for c in cuts if c < len(text)), len(text)]
    assert written([text[a:b] for a, b in itertools.pairwise(edges)], stop) == wanted


def test_stop_strings_and_held_back_bytes_of_a_real_model(model: ToyLM) -> None:
    (whole,) = complete(model, model.prompt([PROMPTS[0]]), Settings(max_new_tokens=40), TOKENIZER)
    assert whole.finished == "length"
    assert whole.text == TOKENIZER.decode(whole.ids)
    for start in range(0, len(whole.text) - 3, 12):
        stop = whole.text[start : start + 3]
        options = [Settings(max_new_tokens=40, stop=("\0never", stop))] * 2
        cut, _ = complete(model, model.prompt([PROMPTS[0], PROMPTS[1]]), options, TOKENIZER)
        if "\N{REPLACEMENT CHARACTER}" in stop:
            continue  # broken bytes at a later cut may be whole ones at an earlier
        assert cut.finished == "string"
        assert cut.text == whole.text[: whole.text.index(stop)]


def test_stop_strings_end_beams(model: ToyLM) -> None:
    (whole,) = complete(model, model.prompt([PROMPTS[0]]), Settings(max_new_tokens=12, beams=3), TOKENIZER)
    stop = re.sub("\N{REPLACEMENT CHARACTER}", "", whole.text)[1:2]
    found = complete(
        model, model.prompt([PROMPTS[0]]), Settings(max_new_tokens=12, beams=3, n=3, stop=(stop,)), TOKENIZER
    )
    assert "string" in {c.finished for c in found}
    assert all(stop not in c.text for c in found)


def test_end_tokens_have_no_text(model: ToyLM) -> None:
    (ids,) = answers(model, [PROMPTS[0]], max_new_tokens=10)
    model.stop_ids = (ids[4],)
    try:
        (answer,) = complete(model, model.prompt([PROMPTS[0]]), Settings(max_new_tokens=10), TOKENIZER)
    finally:
        model.stop_ids = ()
    at = ids.index(ids[4])
    assert (answer.finished, answer.ids, answer.text) == ("stop", ids[: at + 1], TOKENIZER.decode(ids[:at]))


def test_the_context_ends_an_answer_and_a_prompt_too_long_is_refused() -> None:
    small = ToyLM(VOCAB, context=12)
    (answer,) = complete(small, small.prompt([[1] * 10]), Settings(max_new_tokens=99), TOKENIZER)
    assert (len(answer.ids), answer.finished) == (3, "length")  # the last one is written, and read by nobody
    assert len(answers(small, [[1] * 12], max_new_tokens=5)[0]) == 1
    (beam, *_) = complete(small, small.prompt([[1] * 10]), Settings(max_new_tokens=99, beams=2), TOKENIZER)
    assert (len(beam.ids), beam.finished) == (3, "length")
    with pytest.raises(MediaError, match="do not fit"):
        answers(small, [[1] * 13], max_new_tokens=1)


def test_cancel_ends_one_row_and_frees_it(model: ToyLM) -> None:
    wanted = answers(model, PROMPTS, max_new_tokens=10)
    steps, rows = [], []
    cancelled = set()
    for step in sample(
        model, model.prompt(PROMPTS), Settings(max_new_tokens=10), TOKENIZER, cancel=lambda row: row in cancelled
    ):
        steps.append(step)
        rows.append(len(model.memories[-1].lengths))
        if len(steps) == 9:
            cancelled.add(2)
    mine = [s for s in steps if s.row == 2]
    assert mine[-1].finished == "cancel"
    assert [s.token for s in mine] == [*wanted[2][: len(mine) - 1], None]
    assert len(mine) < 6
    assert 3 in rows
    assert model.memories[-1].lengths == []
    for row in (0, 1, 3):
        assert [s.token for s in steps if s.row == row] == wanted[row]


# ---- constraints ----


@pytest.fixture(scope="module")
def talker() -> ToyLM:
    torch.manual_seed(1)
    return ToyLM(VOCAB, stop_ids=TOKENIZER.eos_ids)


@pytest.fixture(scope="module")
def vocabulary() -> Any:
    pytest.importorskip("llguidance")
    from polymodal.samplers.constraints import Vocabulary

    return Vocabulary(TOKENIZER.backend.to_str(), VOCAB, TOKENIZER.eos_ids)


def test_constrained_answers_belong_to_the_language(talker: ToyLM, vocabulary: Any) -> None:
    from polymodal.samplers.constraints import Constraint

    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "y"]}, "b": {"type": "boolean"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    rules = [
        Constraint.json(schema, vocabulary),
        Constraint.regex("[0-9]{2}:[0-5][0-9]", vocabulary),
        Constraint.choices(["yes", "no", 'maybe "so"\n'], vocabulary),
        Constraint.grammar('start: "<" inner ">"\ninner: "a" | "(" inner ")"', vocabulary),
    ]
    shapes: list[dict[str, Any]] = [dict(), dict(temperature=1.5, seed=0, n=3), dict(beams=3, n=2)]
    for shape in shapes:
        settings = [Settings(constraint=c, max_new_tokens=60, **shape) for c in rules]
        for answer in complete(talker, talker.prompt(PROMPTS), settings, TOKENIZER):
            text = answer.text
            if answer.finished == "length":
                assert answer.row == 3, "only the grammar has words without end"
                continue
            assert answer.finished in ("stop", "constraint")
            if answer.row == 0:
                found = json.loads(text)
                assert found.keys() == {"a", "b"}
                assert found["a"] in ("x", "y")
                assert isinstance(found["b"], bool)
            elif answer.row == 1:
                assert re.fullmatch("[0-9]{2}:[0-5][0-9]", text)
            elif answer.row == 2:
                assert text in ("yes", "no", 'maybe "so"\n')
            else:
                assert re.fullmatch(r"<\(*a\)*>", text)
                assert text.count("(") == text.count(")")


def test_unusable_constraints_are_refused(vocabulary: Any) -> None:
    from polymodal.samplers.constraints import Constraint, Vocabulary

    for make, text in [
        (lambda: Constraint.json({"type": "blah"}, vocabulary), "schema"),
        (lambda: Constraint.json("[", vocabulary), "schema"),
        (lambda: Constraint.regex("(", vocabulary), r"pattern '\('"),
        (lambda: Constraint.grammar("start: foo", vocabulary), "grammar"),
        (lambda: Constraint.choices([], vocabulary), "choices"),
        (lambda: Vocabulary("{}", 10, [1]), "tokenizer"),
        (lambda: Vocabulary(TOKENIZER.backend.to_str(), VOCAB, []), "stop_ids"),
    ]:
        with pytest.raises(ConfigError, match=text):
            make()


def test_rules_that_leave_nothing_say_so(talker: ToyLM, vocabulary: Any) -> None:
    from polymodal.samplers.constraints import Constraint

    settings = Settings(constraint=Constraint.regex("(00){9}", vocabulary), no_repeat_ngram=1)
    with pytest.raises(ConfigError, match="leave no token"):
        answers(talker, [[5]], settings)


@pytest.mark.parametrize("wrong", [
    dict(max_new_tokens=0), dict(temperature=-1.0), dict(temperature=float("nan")), dict(top_k=0), dict(top_p=0.0),
    dict(min_p=1.5), dict(repetition_penalty=0.0), dict(stop=("",)), dict(n=0), dict(n=3, best_of=2), dict(beams=0),
    dict(beams=2, temperature=1.0), dict(beams=2, n=3), dict(guidance=float("nan")),
])  # fmt: skip
def test_impossible_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Settings(**wrong)


def test_broken_scores_are_reported(model: ToyLM) -> None:
    broken = ToyLM(VOCAB)
    assert broken.decoder.lm_head is not None
    broken.decoder.lm_head.weight.data[3] = float("nan")
    with pytest.raises(ConfigError, match="precision"):
        answers(broken, [[1, 2]])


# ---- the memory ----


@given(st.lists(st.integers(0, 3), max_size=7), st.lists(st.integers(0, 6), max_size=5))
def test_rows_of_a_memory_are_moved(first: list[int], second: list[int]) -> None:
    cache = KVCache(num_layers=2, rows=4, capacity=3, num_kv_heads=1, head_dim=2)
    cache.lengths = [3, 1, 2, 0]
    for row in range(4):
        cache.keys[:, row], cache.values[:, row], cache.block[row] = row + 1, -row - 1, row + 1
    expected = list(range(4))
    for order in (first, [i for i in second if i < len(first)]):
        cache.select(torch.tensor(order, dtype=torch.int64))
        expected = [expected[i] for i in order]
        assert cache.lengths == [[3, 1, 2, 0][i] for i in expected]
        for place, row in enumerate(expected):
            length: int = cache.lengths[place]
            for tensor, value in ((cache.keys, row + 1), (cache.values, -row - 1)):
                held: Tensor = tensor[:, place, :, :length]
                assert bool((held == value).all())
            assert bool((cache.block[place] == row + 1).all())
