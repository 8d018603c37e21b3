"""Text, pictures and sound in turn: a span is whole or is not begun; what was written is taken apart as it comes."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest
import torch

from polymodal.core.errors import ConfigError, MediaError
from polymodal.core.events import Event, Kind
from polymodal.samplers.autoregressive import Guide, Settings, complete
from polymodal.samplers.modes import Interleaved, Mode, ModeGuide, Wordless, events
from tests.toy_lm import ToyLM

PICTURE = Mode(kind="image", begin=10, end=11, books=((15, 14, 13, 12),), rounds=3)
SOUND = Mode(kind="audio", begin=16, end=17, books=((18, 19), (20, 21, 22)))
MODES = (PICTURE, SOUND)
VOCAB = 26
TEXT = [*range(10), 23, 24]


def rules(room: int, most: dict[Kind, int] | None = None, *, only: Kind | None = None) -> Interleaved:
    return Interleaved(modes=MODES, vocab_size=VOCAB, room=room, most=most or {}, only=only, never=(25, 26))


def ids(guide: ModeGuide) -> list[int]:
    return guide.allowed().nonzero()[:, 0].tolist()


def test_pictures_by_hand() -> None:
    guide = rules(12, {"audio": 0}).start()
    assert isinstance(guide, Guide)
    assert ids(guide) == sorted([*TEXT, 10])
    guide.take(3)
    guide.take(10)
    for code in (12, 15, 12):
        assert ids(guide) == [12, 13, 14, 15]
        guide.take(code)
    twin = guide.copy()
    assert ids(guide) == [11]
    guide.take(11)
    assert ids(guide) == sorted([*TEXT, 10]), "six are left, which is room for one more"
    guide.take(0)
    assert ids(guide) == sorted([*TEXT, 10]), "five are just enough"
    guide.take(0)
    assert ids(guide) == TEXT
    assert not guide.ended
    assert ids(twin) == [11], "a copy goes its own way"


def test_sound_by_hand() -> None:
    """Books take turns, an end comes between rounds only, and in time."""
    guide = rules(8).start()
    for token, after in (
        (16, [18, 19]),
        (19, [20, 21, 22]),
        (20, [17, 18, 19]),
        (18, [20, 21, 22]),
        (22, [17, 18, 19]),
    ):
        guide.take(token)
        assert ids(guide) == after
    guide.take(18)
    guide.take(20)
    assert ids(guide) == [17], "the last token that there is room for"
    guide = rules(4).start()
    assert ids(guide) == sorted([*TEXT, 16]), "a picture would not fit"
    guide.take(1)
    assert ids(guide) == TEXT


@pytest.mark.parametrize("mode", MODES)
def test_one_span_alone(mode: Mode) -> None:
    guide, written = rules(6, only=mode.kind).start(), list[int]()
    while not guide.ended:
        written.append(ids(guide)[-1])
        guide.take(written[-1])
    assert written == {"image": [10, 15, 15, 15, 11], "audio": [16, 19, 22, 19, 22, 17]}[mode.kind]
    with pytest.raises(ConfigError, match=f"takes {mode.shortest} at least"):
        rules(mode.shortest - 1, only=mode.kind)


def tokens_of(stream: Iterable[Event[tuple[int, ...]]]) -> list[int]:
    """The inverse of `events`."""
    marks = {mode.kind: (mode.begin, mode.end) for mode in MODES}
    out: list[int] = []
    last = None
    for event in stream:
        if event.kind != "text" and event.index != last:
            out.append(marks[event.kind][0])
        last = event.index
        out += event.payload
        if event.kind != "text" and event.done:
            out.append(marks[event.kind][1])
    return out


@pytest.mark.proves("chameleon", "mode-aware sampling: whatever the model says, every picture is whole")
@pytest.mark.proves("omni", "mode-aware sampling: whatever the model says, every picture and every frame is whole")
@pytest.mark.parametrize("std", [0.5, 1e4])
@pytest.mark.parametrize("beams", [1, 3])
def test_every_span_is_whole(beams: int, std: float) -> None:
    torch.manual_seed(0)
    model = ToyLM(VOCAB, stop_ids=(2,), std=std)
    cases: list[tuple[int, dict[Kind, int]]] = [
        (30, {}), (31, {"image": 1}), (7, {}), (4, {}), (3, {}), (30, {"image": 0}), (60, {"image": 3, "audio": 1}),
        (30, {"image": 0, "audio": 0}),
    ]  # fmt: skip
    settings = [
        Settings(max_new_tokens=room, temperature=0.0 if beams > 1 else 2.0, seed=seed, beams=beams,
                 constraint=rules(room, most))
        for seed, (room, most) in enumerate(cases)
    ]  # fmt: skip
    batch = model.prompt([[1, 4, 5]] * len(settings))
    found = []
    for answer, (_, most) in zip(complete(model, batch, settings, Wordless()), cases, strict=True):
        written = [i for i in answer.ids if i != 2]
        stream = list(events(written, MODES))
        assert tokens_of(stream) == written
        kinds = [event.kind for event in stream if event.done]
        assert all(kinds.count(kind) <= count for kind, count in most.items())
        assert [event.index for event in stream if event.done] == list(range(len(kinds)))
        for event in stream:
            known = {"text": set(TEXT), "image": {12, 13, 14, 15}, "audio": {18, 19, 20, 21, 22}}[event.kind]
            assert set(event.payload) <= known
            assert len(event.payload) in {"text": (0, 1), "image": (3,), "audio": (0, 2)}[event.kind]
        found += kinds
    assert {"text", "image", "audio"} <= set(found) or beams > 1 or std > 1


def test_events_come_as_soon_as_they_can() -> None:
    """A text ends with what begins; a picture is there with its last code, a frame with its last book."""
    taken: list[int] = []

    def told() -> Iterable[int]:
        for token in (3, 4, 10, 15, 12, 14, 11, 16, 18, 21, 19, 20, 17, 5):
            taken.append(token)
            yield token

    seen = [(len(taken), e.kind, e.index, e.payload, e.done) for e in events(told(), MODES)]
    assert seen == [
        (1, "text", 0, (3,), False), (2, "text", 0, (4,), False), (3, "text", 0, (), True),
        (6, "image", 1, (15, 12, 14), True),
        (10, "audio", 2, (18, 21), False), (12, "audio", 2, (19, 20), False), (13, "audio", 2, (), True),
        (14, "text", 3, (5,), False), (14, "text", 3, (), True),
    ]  # fmt: skip
    assert PICTURE.codes((15, 12, 14)).tolist() == [[0, 3, 1]]
    assert SOUND.codes((18, 21, 19, 20)).tolist() == [[0, 1], [1, 0]]


@pytest.mark.proves("omni", "events: tokens to events and back loses nothing; what is not whole is refused")
def test_events_say_everything() -> None:
    draw = random.Random(0)
    for _ in range(300):
        ids: list[int] = []
        for _ in range(draw.randrange(6)):
            mode = draw.choice([None, *MODES])
            if mode is None:
                ids += draw.choices(TEXT, k=draw.randrange(1, 4))
                continue
            rounds = mode.rounds or draw.randrange(1, 4)
            ids += [mode.begin, *(draw.choice(book) for _ in range(rounds) for book in mode.books), mode.end]
        stream = list(events(ids, MODES))
        assert tokens_of(stream) == ids
        cut = ids[: draw.randrange(len(ids) + 1)]
        try:
            assert tokens_of(events(cut, MODES)) == cut
        except MediaError:
            assert any(cut.count(m.begin) > cut.count(m.end) for m in MODES)
    for wrong in (
        [10, 12, 12, 11],
        [10, 12, 12, 12, 12],
        [10, 12, 18],
        [16, 17],
        [16, 18, 17],
        [16, 20],
        [16, 18, 18],
        [10],
    ):
        with pytest.raises(MediaError, match="a span of"):
            list(events(wrong, MODES))
