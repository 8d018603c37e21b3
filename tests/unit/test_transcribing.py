"""Whisper's rules on scripted scores: what may be written, when an answer is believed, where the next window begins."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from polymodal.core.errors import UnsupportedError
from polymodal.core.transcript import WRITERS, Heard, Listening, Segment, Word
from polymodal.samplers.alignment import punctuated, word_times
from polymodal.samplers.autoregressive import Constraint, ScoredGuide
from polymodal.samplers.speech import Decoding, Hears, Tape, hear_all
from polymodal.samplers.timestamps import Piece, SpeechTokens, TimestampRules, Timestamps, pieces
from polymodal.tokenizers.speech import spell, train_speech_bpe

# Ids: letters below 30, then the control tokens, then a time for each of the 50 steps of a second and its end.
END, START, EN, DE, TRANSLATE, TRANSCRIBE, PREVIOUS, NO_SPEECH, NO_TIMES = range(30, 39)
FIRST = NO_TIMES + 1
VOCAB = FIRST + 51
SPEECH = SpeechTokens(
    start=START, end=END, no_timestamps=NO_TIMES, previous=PREVIOUS, languages={"en": EN, "de": DE},
    tasks={"transcribe": TRANSCRIBE, "translate": TRANSLATE}, suppress=(3, START, EN, DE, PREVIOUS, NO_SPEECH),
    suppress_first=(5, END), latest=20,
)  # fmt: skip


def at(step: int) -> int:
    """The token of a time."""
    return FIRST + step


# ---- what may be written


def allowed(written: Sequence[int], scores: Tensor | None = None) -> set[int]:
    fine = TimestampRules(SPEECH, written).allowed_by(torch.zeros(VOCAB) if scores is None else scores)
    return set(fine.nonzero()[:, 0].tolist())


def spike(token: int, height: float = 20.0) -> Tensor:
    scores = torch.zeros(VOCAB)
    scores[token] = height
    return scores


TIMES, LETTERS = set(range(FIRST, VOCAB)), set(range(30)) - {3}


def test_the_first_token_is_an_early_time() -> None:
    assert allowed([], spike(7)) == {at(i) for i in range(21)}


def test_times_come_in_pairs_and_do_not_go_back() -> None:
    text = spike(7)
    assert allowed([at(4)], text) == LETTERS | {END, TRANSLATE, TRANSCRIBE}
    assert allowed([at(4), 7], text) == LETTERS | {END, TRANSLATE, TRANSCRIBE} | {at(i) for i in range(5, 51)}
    # The second half of a pair may be the same time, and nothing but a time or the end.
    assert allowed([at(4), 7, at(9)], spike(END)) == {END, TRANSLATE, TRANSCRIBE} - {TRANSLATE, TRANSCRIBE} | {
        END, *(SPEECH.tasks.values()), *(at(i) for i in range(9, 51)),
    }  # fmt: skip
    assert allowed([at(4), 7, at(9), at(9)], text).isdisjoint(TIMES)
    assert not allowed([at(4), 7, at(50), at(50), 7], text) & TIMES


def test_a_time_is_forced_by_all_times_together() -> None:
    """Each of them is less probable than the best letter; together they are not."""
    scores = torch.full((VOCAB,), -20.0)
    scores[7], scores[FIRST:] = 3.0, 0.0
    assert allowed([at(0), 7], scores) == {at(i) for i in range(1, 51)}  # 50 times 1 against e ** 3 = 20
    scores[7] = 4.5
    assert 7 in allowed([at(0), 7], scores)  # e ** 4.5 = 90


def test_random_answers_obey() -> None:
    generator = torch.Generator().manual_seed(0)
    assert isinstance(Timestamps(SPEECH), Constraint)
    for _ in range(60):
        guide, written = Timestamps(SPEECH).start(), []
        assert isinstance(guide, ScoredGuide)
        for _ in range(40):
            scores = torch.randn(VOCAB, generator=generator) * 3
            token = int(scores.masked_fill(~guide.allowed_by(scores), -torch.inf).argmax())
            if token == END:
                break
            guide.take(token)
            written.append(token)
        times = [token for token in written if token >= FIRST]
        assert times == sorted(times)
        assert times[0] <= at(20)
        assert not set(written) & {*SPEECH.suppress, NO_TIMES}
        parts, _ = pieces(written, FIRST, 50)
        assert all(part.end > part.start for part in parts if len(part.tokens) > 1 or part.tokens[0] < FIRST)


def test_a_prompt_says_what_is_asked() -> None:
    assert SPEECH.prompt("de", "translate") == [START, DE, TRANSLATE]
    assert SPEECH.prompt("en", "transcribe", timestamps=False, before=[1, 2]) == [
        PREVIOUS, 1, 2, START, EN, TRANSCRIBE, NO_TIMES,
    ]  # fmt: skip
    with pytest.raises(UnsupportedError, match="'xx', but: de, en"):
        SPEECH.prompt("xx", "transcribe")
    english = replace(SPEECH, languages={}, tasks={}, previous=None)
    assert english.prompt(None, "transcribe", before=[1]) == english.prompt("en", "transcribe") == [START]
    with pytest.raises(UnsupportedError, match="English alone"):
        english.prompt("de", "transcribe")
    with pytest.raises(UnsupportedError, match="translate"):
        english.prompt("en", "translate")


@pytest.mark.parametrize(
    ("written", "parts", "done"),
    [
        ([at(0), 1, 2, at(9), at(9), 4, at(20)], [(0, 9, 4), (9, 20, 3)], None),  # nothing behind the last time
        ([at(0), 1, 2, at(9), at(9), 4], [(0, 9, 4)], 9),  # the unfinished one is heard again
        ([at(2), 1, at(9), at(12), 4, at(20), at(20)], [(2, 9, 3), (12, 20, 3)], 20),
        ([at(0), 1, 2], [(0, 50, 3)], None),
        ([at(0), 1, 2, at(7)], [(0, 7, 4)], None),
        ([at(3)], [(0, 3, 1)], None),
        ([], [(0, 50, 0)], None),
    ],
)
def test_answers_are_cut_at_their_times(
    written: list[int], parts: list[tuple[int, int, int]], done: int | None
) -> None:
    found, until = pieces(written, FIRST, 50)
    assert [(p.start, p.end, len(p.tokens)) for p in found] == parts
    assert until == done
    assert [t for p in found for t in p.tokens] == written[: sum(len(p.tokens) for p in found)]
    assert isinstance(found[0], Piece)


# ---- windows


@dataclass
class Script:
    """What a model says of a window: these tokens, each so much more probable than others."""

    tokens: Sequence[int]
    height: float = 20.0
    silence: float = -20.0  # the score of <|nospeech|> against 0 of all others
    language: str = "en"


class Memo:
    """Where the rows of an answer stand."""

    def __init__(self, script: Script, length: int) -> None:
        self.script, self.lengths, self.capacity, self.said = script, [length], 64, 0

    def select(self, rows: Tensor) -> None:
        self.lengths = [self.lengths[i] for i in rows.tolist()]

    def put(self, row: int, other: Any, source: int = 0) -> None:
        raise NotImplementedError

    def cut(self, row: int, length: int) -> None:
        raise NotImplementedError


class Scripted:
    """A model that answers from a script, which is asked for by the start of the window and the number of the try."""

    speech = SPEECH
    context = 64

    def __init__(self, scripts: dict[int, Sequence[Script]]) -> None:
        self.scripts = scripts
        self.tries: dict[int, int] = {}
        self.prompts: list[list[int]] = []

    def hear(self, features: Tensor) -> int:
        return int(features[0])

    def _script(self, start: int, number: int) -> Script:
        scripts = self.scripts[start]
        return scripts[min(number, len(scripts) - 1)]

    def begin(self, heard: int, ids: Sequence[int], places: Sequence[int]) -> tuple[Any, Tensor]:
        if list(ids) == [START]:
            return None, spike(SPEECH.languages[self._script(heard, 0).language])[None]
        assert [ids[i] for i in places] == [START, ids[-1]]
        number = self.tries[heard] = self.tries.get(heard, -1) + 1
        self.prompts.append(list(ids))
        script = self._script(heard, number)
        memory = Memo(script, len(ids))
        return memory, torch.stack([spike(NO_SPEECH, script.silence), self._scores(memory)])

    def _scores(self, memory: Memo) -> Tensor:
        tokens = [*memory.script.tokens, END]
        return spike(tokens[min(memory.said, len(tokens) - 1)], memory.script.height)

    def step(self, ids: Tensor, memory: Memo) -> Tensor:
        memory.lengths = [n + 1 for n in memory.lengths]
        memory.said += 1
        return self._scores(memory).expand(len(ids), -1)

    def text(self, ids: Sequence[int]) -> str:
        return "".join(f" {chr(97 + i)}" for i in ids)

    def spell(self, ids: Sequence[int], language: str | None) -> list[list[int]]:
        return [[i] for i in ids]

    def align(self, heard: int, ids: Sequence[int], steps: int) -> tuple[Tensor, Tensor]:
        """It looks one step further with each token."""
        weights = torch.full((2, len(ids), steps), 0.01)
        weights[:, range(len(ids)), range(len(ids))] = 1.0
        return weights, torch.stack([spike(token) for token in [*ids[1:], END]])


UNIT = 320  # samples of a step


def heard(
    model: Scripted, length: int = 100, listening: Listening | None = None, after: Heard | None = None, **more: Any
) -> list[Heard]:
    """All of a sound of so many steps by a model whose windows have 50."""

    def window(start: int) -> tuple[Tensor, int] | None:
        left = length * UNIT - start
        return (torch.tensor([start // UNIT]), min(left, 50 * UNIT)) if left > 0 else None

    listening = listening or Listening(language="en")
    return list(hear_all(model, window, 16000, listening, Decoding(**more), after))


def words_of(windows: Iterable[Heard]) -> list[tuple[float, float, str]]:
    return [(round(s.start, 6), round(s.end, 6), s.text) for one in windows for s in one.segments]


PLAIN = {
    0: [Script([at(0), 1, 2, at(10), at(10), 4, at(30), at(30), 9])],
    30: [Script([at(5), 6, at(40)])],
    80: [Script([at(0), 8, at(20)])],
}


def test_the_next_window_begins_at_the_last_time() -> None:
    model = Scripted(PLAIN)
    assert isinstance(model, Hears)
    windows = heard(model)
    assert words_of(windows) == [(0.0, 0.2, " b c"), (0.2, 0.6, " e"), (0.6, 1.4, " g"), (1.6, 2.0, " i")]
    assert [one.until for one in windows] == [30 * UNIT, 80 * UNIT, 100 * UNIT]
    assert all(one.segments[0].language == "en" for one in windows)


def test_the_next_window_is_told_what_was_said() -> None:
    model = Scripted(PLAIN)
    heard(model)
    asked, said = [START, EN, TRANSCRIBE], [at(0), 1, 2, at(10), at(10), 4, at(30)]
    assert model.prompts == [asked, [PREVIOUS, *said, *asked], [PREVIOUS, *said, at(5), 6, at(40), *asked]]
    model = Scripted(PLAIN)
    heard(model, previous=False)
    assert model.prompts == [asked] * 3


def test_no_more_is_told_than_half_the_context() -> None:
    long = [at(0), *([1, 2, 4, 6, 7, 8, 9] * 6)[:29], at(20), at(20)]
    model = Scripted({0: [Script(long)], 20: [Script([at(0), 1, at(30)])], 70: [Script([at(0), 9, at(30)])]})
    heard(model, repeats=100.0)
    assert [len(prompt) for prompt in model.prompts] == [3, 1 + 31 + 3, 1 + 31 + 3]
    assert model.prompts[2][29:32] == [at(0), 1, at(30)]


@pytest.mark.parametrize(("tries", "told"), [(2, True), (4, False)])
def test_doubtful_answers_are_drawn_again(tries: int, told: bool) -> None:
    """Repetitions first, then improbable ones; what was drawn at more than 0.5 is not told to the next window."""
    bad = [Script([at(0), *[1] * 25, at(30), at(30)]), *[Script([at(0), 2, at(30), at(30)], height=0.5)] * (tries - 1)]
    good = Script([at(0), 7, at(30), at(30)], height=30.0)
    model = Scripted({0: [*bad, good], 30: [Script([at(0), 8, at(20)])], 80: [Script([at(0), 9, at(20)])]})
    windows = heard(model)
    assert words_of(windows)[0] == (0.0, 0.6, " h")
    assert windows[0].segments[0].temperature == pytest.approx(0.2 * tries)
    assert model.tries[0] == tries
    assert (model.prompts[tries + 1][0] == PREVIOUS) == told
    # Only that one window is forgotten.
    assert model.prompts[-1][0] == PREVIOUS


def test_the_last_try_counts() -> None:
    flat = Script([at(0), 1, at(49)], height=0.5)
    model = Scripted({0: [flat]})
    heard(model, length=1)
    assert model.tries[0] == 5
    (one,) = heard(Scripted({0: [flat]}), length=1, temperatures=(0.0,))
    assert one.segments[0].temperature == 0.0
    assert one.until == UNIT  # whatever time it says


def test_beams_search_at_temperature_zero_alone() -> None:
    windows = heard(Scripted(PLAIN), beams=3)
    assert words_of(windows) == words_of(heard(Scripted(PLAIN)))


@pytest.mark.parametrize(
    ("silence", "height", "words"), [(20.0, 0.5, False), (20.0, 30.0, True), (-20.0, 30.0, True)]
)  # fmt: skip
def test_silence_is_skipped_where_the_words_are_improbable_too(silence: float, height: float, words: bool) -> None:
    model = Scripted({0: [Script([at(0), 1, at(20)], height, silence)], 50: [Script([at(0), 2, at(20)])]})
    windows = heard(model)
    assert bool(windows[0].segments) == words
    assert windows[0].until == 50 * UNIT
    assert model.tries[0] == 0  # it is not asked again
    assert bool(windows[0].context) == words


def test_a_language_is_found_in_each_window() -> None:
    model = Scripted({0: [replace(PLAIN[0][0], language="de")], 30: PLAIN[30], 80: PLAIN[80]})
    windows = heard(model, listening=Listening())
    assert [one.segments[0].language for one in windows] == ["de", "en", "en"]
    assert [prompt[-2] for prompt in model.prompts] == [DE, EN, EN]
    with pytest.raises(UnsupportedError, match="xx"):
        heard(model, listening=Listening(language="xx"))


def test_a_run_that_was_cut_goes_on_with_the_same_words() -> None:
    whole = heard(Scripted(PLAIN))
    for cut in range(1, 3):
        kept = Heard.from_json(json.loads(json.dumps(whole[cut - 1].to_json())))
        assert kept == whole[cut - 1]
        model = Scripted(PLAIN)
        assert whole[:cut] + heard(model, after=kept) == whole


def test_pieces_without_a_word_are_left_out() -> None:
    model = Scripted({0: [Script([at(0)])], 50: [Script([at(0), 2, at(20)])]})
    windows = heard(model)
    assert [len(one.segments) for one in windows] == [0, 1]
    assert windows[0].context == ()


# ---- words


def test_words_get_times() -> None:
    windows = heard(Scripted(PLAIN), listening=Listening(language="en", words=True))
    first, second = windows[0].segments
    assert [w.text for w in (*first.words, *second.words)] == [" b", " c", " e"]
    times = [(w.start, w.end) for w in (*first.words, *second.words)]
    assert all(a <= b for a, b in times)
    assert all(b == c for (_, b), (c, _) in itertools.pairwise(times))
    assert all(w.probability > 0.99 for w in (*first.words, *second.words))
    assert windows[1].segments[0].words[0].start >= 0.6  # from the start of the sound, not of the window


def test_the_token_of_a_language_is_no_word() -> None:
    """What OpenAI publishes does not forbid it in the middle of an answer."""
    model = Scripted({0: [Script([at(0), 1, DE, 2, at(20), at(20), DE, at(50)])]})
    model.speech = replace(SPEECH, suppress=())
    (window,) = heard(model, length=50, listening=Listening(language="en", words=True))
    assert words_of([window]) == [(0.0, 0.4, " b c")]
    assert [word.text for word in window.segments[0].words] == [" b", " c"]


def test_a_broken_character_is_no_reason_to_join_the_words_behind_it() -> None:
    tokenizer = train_speech_bpe(["a lazy dog é猫"] * 2, 400, languages=("en",), seconds=1.0)
    before, behind = (tokenizer.encode(text, special=False) for text in (" a lazy 猫", " dog é."))
    byte = tokenizer.backend.token_to_id("ÿ")  # 0xFF, which no text holds
    ids = [*before, byte, *behind]
    words = spell(tokenizer, ids, "en")
    assert [tokenizer.decode(word) for word in words] == [" a", " lazy", " 猫\ufffd", " dog", " é", "."]
    assert list(itertools.chain(*words)) == ids


def test_the_path_follows_the_attention() -> None:
    """Four tokens behind a prompt of two look at their own tenth of the sound."""
    weights = torch.full((3, 7, 40), 0.01)
    for token in range(5):  # said at the place before their own, the end too
        weights[:, 1 + token, 8 * token : 8 * token + 8] = 1.0
    assert word_times(weights, 2, [1, 2, 1]) == [(0, 8), (8, 24), (24, 32)]


def test_marks_belong_to_words() -> None:
    spoken = [' "', "Hello", ",", " world", "!", '"']
    words = punctuated([Word(text=t, start=float(i), end=i + 1.0, probability=1.0) for i, t in enumerate(spoken)])
    assert [(w.text, w.start, w.end) for w in words] == [(' "Hello,', 1, 2.0), (' world!"', 3, 4.0)]


# ---- streams and files


def test_a_tape_gives_what_a_file_has() -> None:
    sound, generator = torch.arange(5000.0), torch.Generator().manual_seed(0)
    for _ in range(20):
        sizes = torch.randint(1, 400, (200,), generator=generator).tolist()

        def parts(sizes: list[int]) -> Iterator[Tensor]:
            start = 0
            for size in sizes:
                yield sound[start : start + size]
                start += size

        tape, place = Tape(parts(sizes)), 0
        end = min(sum(sizes), 5000)
        while place < end + 100:
            count = int(torch.randint(1, 900, (), generator=generator))
            assert torch.equal(tape.read(place, count), sound[place : min(place + count, end)])
            assert len(tape._held) <= count + 900  # no more than is still to be read
            place += int(torch.randint(0, 1200, (), generator=generator))
    with pytest.raises(UnsupportedError, match="back"):
        tape.read(0, 1)


HOSTILE = "  the end --> of\n\nit <b>&\n"
SEGMENTS = (
    Segment(start=0.0, end=1.5, text=" one two", words=(
        Word(text=" one", start=0.0, end=0.5, probability=0.5), Word(text=" two<", start=0.5, end=1.5, probability=0.5),
    )),
    Segment(start=59.9996, end=3661.25, text=HOSTILE),
)  # fmt: skip


def test_srt() -> None:
    assert WRITERS["srt"](SEGMENTS) == (
        "1\n00:00:00,000 --> 00:00:01,500\none two\n\n2\n00:01:00,000 --> 01:01:01,250\nthe end -> of it <b>&\n\n"
    )


def test_vtt() -> None:
    lines = WRITERS["vtt"](SEGMENTS).split("\n")
    assert lines[:4] == [
        "WEBVTT", "", "00:00:00.000 --> 00:00:01.500",
        "<00:00:00.000><c> one</c><00:00:00.500><c> two&lt;</c>",
    ]  # fmt: skip
    assert lines[5:7] == ["00:01:00.000 --> 01:01:01.250", "the end -&gt; of it &lt;b&gt;&amp;"]
    assert sum("-->" in line for line in lines) == 2


def test_text_and_json() -> None:
    assert WRITERS["txt"](SEGMENTS[:1]) == "one two\n"
    whole = json.loads(WRITERS["json"](SEGMENTS))
    assert whole["text"].startswith("one two  the end")
    assert whole["segments"][0]["words"][1] == {"text": " two<", "start": 0.5, "end": 1.5, "probability": 0.5}
    assert all(re.fullmatch(r"(WEBVTT\n\n)?", write(())) or name == "json" for name, write in WRITERS.items())
