"""Tasks read from official files, and the card of a small answerer that really looks."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage

from polymodal.core.errors import DataError, MediaError
from polymodal.core.sample import Image, Sample, Text, Video
from polymodal.evaluate.card import Card, _derangement, evaluate
from polymodal.evaluate.parsers import CHOICE, NUMBER, SHORT, VERBATIM, YES_NO
from polymodal.evaluate.tasks import (
    ANLS,
    CHARACTERS,
    CIDER_D,
    EXACT,
    RELAXED,
    VQA,
    YES_OR_NO,
    Item,
    Task,
    chartqa,
    coco_captions,
    coco_chair,
    docvqa,
    pope,
    read_synonyms,
    vqa,
    world_task,
)

COLOURS = ("red", "lime", "blue", "white", "black", "yellow", "cyan", "magenta")


def picture(colour: str, size: int = 4) -> PILImage.Image:
    return PILImage.new("RGB", (size, size), colour)


def colour_of(image: Image) -> str:
    """What a picture of one colour shows, decoded from whatever it is."""
    source = image.source
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    opened = PILImage.open(source) if isinstance(source, str | Path | io.BytesIO) else source
    pixel = np.asarray(opened)[0, 0].tolist()
    return next(name for name in COLOURS if list(picture(name).getpixel((0, 0))) == pixel)


class Looker:
    """Names the colour of the first picture; without one, it always says the same. Remembers what it was asked."""

    def __init__(self, fallback: str = "red", limit: int | None = None) -> None:
        self.fallback, self.limit = fallback, limit
        self.asked: list[Sample] = []

    def __call__(self, samples: Sequence[Sample]) -> list[str]:
        if self.limit is not None and len(self.asked) + len(samples) > self.limit:
            raise KeyboardInterrupt
        self.asked.extend(samples)
        return [self.answer(sample) for sample in samples]

    def answer(self, sample: Sample) -> str:
        seen = [colour_of(image) for image in sample.images]
        question = sample.texts[-1].text
        if question.startswith("Is it "):
            return "Yes." if (seen[0] if seen else self.fallback) in question else "No."
        return f"{seen[0] if seen else self.fallback}."


def colours(repeats: int = 6) -> Task:
    items = [Item.of(picture(c, 4 + i), "Which colour?", c, kind="name") for c in COLOURS for i in range(repeats)]
    return world_task("colours", items)


def written(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in COLOURS:
        picture(name).save(folder / f"{name}.png")
    return folder


# ---- a card ----


def test_a_model_that_looks() -> None:
    looker = Looker()
    card = evaluate(looker, colours(), model="looker", seed=3)
    assert (card.true.score.value, card.true.unparsed, card.questions, card.pictures) == (1, 0, 48, 48)
    assert card.blind.score.value == 1 / 8
    assert card.shuffled is not None
    assert card.shuffled.score.value < 0.4
    assert card.sees
    assert not card.notes
    assert card.over_blind.value == 7 / 8
    assert 0.7 < card.over_blind.low < 7 / 8 < card.over_blind.high <= 1
    assert card.constant == 1 / 8
    assert card.answered == len(looker.asked) == 48 + 1 + 48, "without pictures, all 48 questions are one"
    assert (card.parser, card.metric, card.seed) == (SHORT.name, "exact match", 3)


def test_a_model_that_does_not_look_is_found_out() -> None:
    card = evaluate(lambda samples: ["red"] * len(samples), colours(), model="stone")
    assert card.true.score.value == card.blind.score.value == card.constant == 1 / 8
    assert card.over_blind.value == 0
    assert card.over_blind.low < 0 < card.over_blind.high
    assert not card.sees
    assert any("nothing here shows that the model looks" in note for note in card.notes)
    assert any("most frequent" in note for note in card.notes)
    assert "nothing here shows" in card.to_markdown()


def test_a_model_that_pictures_confuse_does_not_see() -> None:
    task = world_task("white", [Item.of(picture("white", i), "Which colour?", "white") for i in range(2, 30)])
    card = evaluate(lambda s: ["white" if not one.images else "red" for one in s], task, model="confused")
    assert not card.sees
    assert card.over_blind.value == -1
    assert any("better than the true score" in note for note in card.notes)


def test_what_each_run_asks() -> None:
    looker, questions = Looker(), [f"Which colour has number {i}?" for i in range(len(COLOURS))]
    task = world_task("colours", [(picture(c), question, c) for c, question in zip(COLOURS, questions, strict=True)])
    evaluate(looker, task, model="looker")
    pictured, blind = looker.asked[:16], looker.asked[16:]
    assert [sample.parts for sample in blind] == [(Text(question),) for question in questions]
    assert [colour_of(s.images[0]) for s in pictured] == [c for c in COLOURS for _ in "ts"], "one after the other"
    true, shuffled = ([sample.texts[0].text for sample in pictured[start::2]] for start in (0, 1))
    assert true == questions
    assert sorted(shuffled) == questions
    assert all(a != b for a, b in zip(true, shuffled, strict=True))


def test_questions_about_one_picture_move_together_and_widen_the_interval() -> None:
    items = [
        Item.of(picture(c, 9 + i), f"Is it {q}?", "yes" if q == c else "no", options=("yes", "no"), kind=q)
        for c in COLOURS[:4]
        for i in range(3)
        for q in COLOURS[:4]
    ]
    task = world_task("is it", items, metric=YES_OR_NO, parser=YES_NO)
    card = evaluate(Looker(), task, model="looker")
    assert card.pictures == 12
    assert card.true.score.method == "Wilson over groups"
    assert card.chance == 0.5
    assert card.true.details["F1"] == 1
    assert card.true.details["yes ratio"] == card.true.details["yes ratio of the labels"] == 0.25
    assert card.constant == 0.75
    assert card.blind.details["recall"] == 0.25
    assert list(card.kinds) == list(COLOURS[:4])
    assert card.kinds["red"].blind == 0.25
    assert card.kinds["lime"].blind == 0.75


def test_unparsed_answers_are_wrong_and_counted() -> None:
    items = [Item.of(picture(c), "Which?", "A", options=("red", "blue")) for c in COLOURS]
    items += [Item.of(picture(c, 7), "Which?", "B", options=("red", "blue", "lime", "cyan")) for c in COLOURS]
    task = Task(name="choice", items=tuple(items), metric=EXACT, parser=CHOICE, also=(SHORT,))

    def answer(samples: Sequence[Sample]) -> list[str]:
        return ["The answer is A" if s.images and s.images[0].source.size == (4, 4) else "well..." for s in samples]

    card = evaluate(answer, task, model="half")
    assert (card.true.score.value, card.true.unparsed, card.parsed_only) == (0.5, 8, 1)
    assert card.chance == (1 / 2 + 1 / 4) / 2
    assert card.guessed == 0.5 + 0.25 / 2
    assert card.readings[SHORT.name].score == 0
    assert card.readings[SHORT.name].unparsed == 0
    assert card.blind.unparsed == 16
    assert [len(card.examples[sort]) for sort in ("right", "wrong", "unparsed")] == [3, 0, 3]
    assert any("8 answers (50 %) could not be parsed" in note for note in card.notes)
    silent = evaluate(lambda s: ["" for _ in s], task, model="silent")
    assert (silent.true.unparsed, silent.parsed_only, silent.true.score.value) == (16, None, 0)


def test_a_parser_for_each_kind() -> None:
    items = [Item.of(picture("red", i), "How many?", str(i), kind="count") for i in range(2, 6)]
    items += [Item.of(picture("red", i), "Which colour?", "red", kind="colour") for i in range(2, 6)]
    task = world_task("mixed", items, parsers={"count": NUMBER})
    card = evaluate(
        lambda samples: [f"I see {s.images[0].source.width if s.images else 0}" for s in samples], task, model="counter"
    )
    assert card.kinds["count"].score.value == 1
    assert card.kinds["colour"].score.value == 0
    assert (card.kinds["count"].parser, card.kinds["colour"].parser) == (NUMBER.name, SHORT.name)
    assert card.parser == f"{NUMBER.name} · {SHORT.name}"


def test_captions_and_characters() -> None:
    texts = {c: f"a {c} square on a page" for c in COLOURS}
    captions = Task(
        name="captions",
        items=tuple(Item.of(picture(c), "Describe.", texts[c], f"one {c} thing") for c in COLOURS),
        metric=CIDER_D,
        parser=VERBATIM,
    )
    card = evaluate(lambda s: [texts[colour_of(i.images[0])] if i.images else "a page" for i in s], captions, model="x")
    assert 4 < card.true.score.value < 10
    assert card.blind.score.value < 2
    assert card.sees
    assert f"CIDEr-D: {card.true.score.value:.1f} [" in card.to_markdown()
    assert card.best == 10
    reading = world_task(
        "read", [(picture("red", 5), "Read.", "SALE 50"), (picture("red"), "Read.", "ab")], metric=CHARACTERS
    )
    read = evaluate(lambda s: ["SALE 5O" if i.images else "" for i in s], reading, model="x")
    assert read.true.score.value == pytest.approx((6 / 7 + 0) / 2)
    assert read.true.details["character error rate"] == pytest.approx((1 + 7) / 9)
    assert read.blind.unparsed == 2


def test_less_is_better_for_chair(tmp_path: Path, images: Path) -> None:
    task = coco_chair(*coco(tmp_path), images, {"red": "red", "blue": "blue", "dog": "dog", "ball": "ball"})
    assert [item.references for item in task.items] == [("dog", "red"), ("ball", "blue"), ()]

    def sees(samples: Sequence[Sample]) -> list[str]:
        return [f"a {colour_of(s.images[0])} dog" if s.images else "a red ball and dogs" for s in samples]

    card = evaluate(sees, task, model="x")
    assert card.true.score.value == pytest.approx(2 / 3), "there is a dog in one picture of three"
    assert card.true.details["CHAIR_i"] == pytest.approx(2 / 5)
    assert card.true.details["object recall"] == 3 / 4
    assert card.blind.score.value == 1
    assert card.over_blind.value == pytest.approx(1 / 3), "a gain is positive, though less is better"
    assert not card.sees, "three pictures do not show it"
    assert "less is better" in card.to_markdown()


def test_media_of_many_kinds() -> None:
    clip = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    items = [
        Item.of([picture("red"), picture("blue")], "Two?", "x"),
        Item.of([picture("blue"), picture("red")], "Two?", "x"),
        Item.of(Video(clip, fps=1.0), "Clip?", "x"),
        Item.of(Video(clip, fps=2.0), "Clip?", "x"),
        Item.of(picture("lime"), "One?", "x"),
        Item(sample=Sample.of("None?"), references=("x",)),
    ]
    seen: list[Sample] = []

    def answer(samples: Sequence[Sample]) -> list[str]:
        seen.extend(samples)
        return ["x"] * len(samples)

    card = evaluate(answer, Task(name="media", items=tuple(items), metric=EXACT, parser=SHORT), model="x")
    assert card.pictures == 5
    assert card.shuffled is not None
    assert card.shuffled.score.n == 4, "a lone picture and a question without one have no partner"
    assert any("4 of 6 questions" in note for note in card.notes)
    pairs = [[colour_of(i) for i in sample.images] for sample in seen[:4]]
    assert pairs == [["red", "blue"], ["red", "blue"], ["blue", "red"], ["blue", "red"]], "true, then shuffled"
    assert [s.videos[0].fps for s in seen[4:8]] == [1.0, 1.0, 2.0, 2.0]
    assert [len(s.images) for s in seen[8:]] == [1, 0, 0, 0, 0, 0], "the lone picture, and what has none"


def test_one_picture_alone() -> None:
    card = evaluate(Looker(), world_task("one", [(picture("red"), q, "red") for q in ("a?", "b?")]), model="x")
    assert card.shuffled is card.over_shuffled is None
    assert (card.true.score.low, card.true.score.high) == (0, 1)
    assert not card.sees
    assert any("one picture" in note for note in card.notes)
    json.loads(card.to_json())
    assert "other pictures" not in card.to_markdown()


@given(st.lists(st.integers(0, 12), min_size=1, max_size=30), st.integers(0, 5))
def test_a_derangement_moves_all_and_keeps_groups(numbers: list[int], seed: int) -> None:
    media = [tuple(f"image {n} {i}" for i in range(1 + n % 2)) for n in numbers]
    partners = _derangement(media, seed)
    assert sorted(partners) == sorted(partners.values())
    assert all(a != b and len(a) == len(b) for a, b in partners.items())
    for size in (1, 2):
        sets = {m for m in media if len(m) == size}
        assert len(sets & partners.keys()) == (len(sets) if len(sets) > 1 else 0)
    assert partners == _derangement(media, seed)


def test_json_and_markdown() -> None:
    nasty = "a|b `c` <b>\n# [x](y) \ud800" + "z" * 300
    items = [Item.of(picture(c), f"Which | {i}?", c, kind=f"k|{i % 2}") for i, c in enumerate(COLOURS)]
    task = Task(name="n|1", items=tuple(items), metric=EXACT, parser=SHORT, also=(VERBATIM,))
    settings = {"longest answer": 16, "dtype": "fp32"}
    card = evaluate(lambda s: [nasty] * len(s), task, model="m", settings=settings, seed=5)
    content = json.loads(card.to_json())
    assert content["true"]["score"]["n"] == 8
    assert content["settings"] == settings
    assert {"polymodal", "torch", "python"} <= content["versions"].keys()
    assert content["examples"]["wrong"][0]["answer"].endswith("characters)")
    page = card.to_markdown()
    page.encode()
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert all("\\|" in line or line.count("|") in {4, 6, 8} for line in table)
    assert "<b>" not in page.replace("\\<b\\>", "")
    assert "longest answer 16" in page
    again = evaluate(lambda s: [nasty] * len(s), task, model="m", settings=settings, seed=5)
    fixed = ("seconds", "started")
    assert {k: v for k, v in vars(again).items() if k not in fixed} == {
        k: v for k, v in vars(card).items() if k not in fixed
    }


# ---- going on ----


def same(a: Card, b: Card) -> bool:
    left, right = json.loads(a.to_json()), json.loads(b.to_json())
    for key in ("seconds", "started", "answered"):
        left.pop(key), right.pop(key)
    return left == right


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    file, whole = tmp_path / "runs" / "answers.jsonl", evaluate(Looker(), colours(2), model="looker")
    with pytest.raises(KeyboardInterrupt):
        evaluate(Looker(limit=20), colours(2), model="looker", resume=file, batch_size=8)
    assert len(file.read_text().splitlines()) == 1 + 16
    told: list[tuple[int, int]] = []
    second = Looker()
    card = evaluate(
        second, colours(2), model="looker", resume=file, batch_size=8, progress=lambda n, of: told.append((n, of))
    )
    assert len(second.asked) == card.answered == 33 - 16
    assert told[0] == (16, 33)
    assert told[-1] == (33, 33)
    assert same(card, whole)
    third = Looker(limit=0)
    assert same(evaluate(third, colours(2), model="looker", resume=file), whole)


def test_another_seed_asks_other_shuffled_questions_alone(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    task = world_task("t", [(picture(c), f"Which colour, {i}?", c) for i, c in enumerate(COLOURS)])
    assert evaluate(Looker(), task, model="looker", resume=file).answered == 24
    again = Looker()
    card = evaluate(again, task, model="looker", resume=file, seed=9)
    assert 0 < card.answered == len(again.asked) <= 8
    assert same(card, evaluate(Looker(), task, model="looker", seed=9))


@pytest.mark.parametrize("cut", [1, 5, 40, 90])
def test_a_torn_line_is_asked_again(tmp_path: Path, cut: int) -> None:
    file = tmp_path / "answers.jsonl"
    whole = evaluate(Looker(), colours(1), model="looker", resume=file)
    content = file.read_bytes()
    file.write_bytes(content[:-cut])
    card = evaluate(Looker(), colours(1), model="looker", resume=file)
    assert card.answered == 1
    assert same(card, whole)
    assert sorted(file.read_bytes().splitlines()) == sorted(content.splitlines())


def test_answers_belong_to_pictures_questions_and_runs(tmp_path: Path, images: Path) -> None:
    file = tmp_path / "a.jsonl"
    from_files = world_task("files", [(images / f"{c}.png", "Which colour?", c) for c in COLOURS])
    first = evaluate(Looker(), from_files, model="m", resume=file)
    in_memory = [((images / f"{c}.png").read_bytes(), "Which colour?", c) for c in COLOURS]
    again = evaluate(Looker(limit=0), world_task("bytes", in_memory), model="m", resume=file)
    assert again.true.score == first.true.score, "the same bytes are the same picture wherever they lie"
    picture("white", 30).save(images / "red.png")
    changed = Looker()
    evaluate(changed, from_files, model="m", resume=file)
    assert "white" in [colour_of(s.images[0]) for s in changed.asked if s.images]
    assert all(s.images for s in changed.asked), "the blind question was asked before"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"answers of": "other", "settings": {}}\n', "other"),
        ('{"answers of": "m", "settings": {"t": 1}}\n', "settings"),
        ("[]\n", "jsonl:1: is not the head"),
        ("once upon a time", "is no file of answers"),
        ("once upon a time\n", "jsonl:1: is not the head"),
        ('{"answers of": "m", "settings": {}}\nnonsense\n', "jsonl:2: is no answer"),
        ('{"answers of": "m", "settings": {}}\n{"key": 1, "answer": "x"}\n', "jsonl:2"),
        ('{"answers of": "m", "settings": {}}\n{"key": "1"}\n', "jsonl:2"),
        ('{"answers of": "m", "settings": {}}\n\xff\n', "jsonl:2"),
    ],
)
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=message):
        evaluate(Looker(limit=0), colours(1), model="m", resume=file)
    assert file.read_bytes() == content.encode("latin-1")


def test_a_folder_is_no_file_of_answers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be used for answers"):
        evaluate(Looker(), colours(1), model="m", resume=tmp_path)


def test_two_runs_do_not_share_a_file(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"

    def impatient(samples: Sequence[Sample]) -> list[str]:
        with pytest.raises(DataError, match="another process"):
            evaluate(Looker(limit=0), colours(1), model="m", resume=file)
        return Looker()(samples)

    whole = evaluate(impatient, colours(1), model="m", resume=file)
    assert same(evaluate(Looker(limit=0), colours(1), model="m", resume=file), whole), "and the lock is gone"


def test_a_torn_head_is_written_again(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    evaluate(Looker(), colours(1), model="m", resume=file)
    whole = file.read_bytes()
    file.write_bytes(whole[:9])
    evaluate(Looker(), colours(1), model="m", resume=file)
    assert file.read_bytes() == whole


@pytest.mark.parametrize("given", [["x"], "xxxxxxxx", [1] * 8, ["x"] * 9])
def test_a_model_has_to_answer_each(given: Any) -> None:
    with pytest.raises(DataError, match=r"asked 8 questions and gave"):
        evaluate(lambda samples: given, colours(1), model="m", batch_size=8)


def test_what_cannot_be_evaluated(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="batch size"):
        evaluate(Looker(), colours(1), model="m", batch_size=0)
    gone = world_task("gone", [(tmp_path / "gone.png", "What?", "red")])
    with pytest.raises(MediaError, match=r"gone\.png"):
        evaluate(Looker(), gone, model="m")
    half = PILImage.open(io.BytesIO(png()[:60]))
    with pytest.raises(MediaError):
        evaluate(Looker(), world_task("half", [(half, "What?", "red")]), model="m")
    looker = Looker()
    maybe = world_task("maybe", [(picture("red"), "Is it red?", "maybe")], metric=YES_OR_NO)
    with pytest.raises(DataError, match="neither"):
        evaluate(looker, maybe, model="m")
    assert not looker.asked, "before any question"


def png() -> bytes:
    out = io.BytesIO()
    picture("red", 40).save(out, "PNG")
    return out.getvalue()


# ---- tasks ----


def test_items_and_tasks_refuse() -> None:
    with pytest.raises(DataError, match="no question"):
        Item(sample=Sample.of(picture("red")), references=("x",))
    with pytest.raises(DataError, match=r"str\(number\)"):
        Item.of(picture("red"), "how many?", 3)
    item = Item.of(picture("red"), "What?", "red", kind="colour")
    with pytest.raises(DataError, match="no questions"):
        world_task("none", [])
    with pytest.raises(DataError, match="at least 2"):
        Task(name="v", items=(item,), metric=VQA, parser=SHORT)
    with pytest.raises(DataError, match="'count'"):
        world_task("w", [item], parsers={"count": NUMBER})
    with pytest.raises(DataError, match="'red' of the kind 'colour' is read as None by 'last number/2'"):
        world_task("w", [item], parser=NUMBER)
    with pytest.raises(DataError, match=r"'Stop\.'"):
        world_task("w", [(picture("red"), "Read.", "Stop.")])
    assert world_task("w", [(picture("red"), "Read.", "Stop.")], parser=VERBATIM).items[0].references == ("Stop.",)


def test_a_part_of_a_task() -> None:
    task = colours(2)
    part = task.part(5, seed=1)
    assert len(part.items) == 5
    assert part == task.part(5, seed=1)
    places = [task.items.index(item) for item in part.items]
    assert places == sorted(places)
    assert "5 of 16" in part.name
    assert task.part(99) is task
    mixed = world_task(
        "m", [Item.of(picture("red"), "n?", str(i), kind=str(i)) for i in range(4)], parsers={"1": NUMBER}
    )
    for seed in range(4):
        mixed.part(1, seed=seed)
    with pytest.raises(DataError):
        task.part(0)


POPE = [
    {"question_id": 1, "image": "red.png", "text": "Is it red?", "label": "yes"},
    {"question_id": 2, "image": "red.png", "text": "Is it blue?", "label": "no"},
    {"question_id": 3, "image": "blue.png", "text": "Is it blue?", "label": "yes"},
    {"question_id": 4, "image": "blue.png", "text": "Is it lime?", "label": "no"},
]


def lines(rows: Sequence[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_pope(tmp_path: Path, images: Path) -> None:
    task = pope(written(tmp_path / "coco_pope_popular.json", lines(POPE)), images)
    assert task.name == "coco_pope_popular"
    assert [item.references for item in task.items] == [("yes",), ("no",)] * 2
    assert task.items[0].sample.texts[0].text == "Is it red?\nAnswer the question using a single word or phrase."
    assert task.items[1].id == "2"
    card = evaluate(Looker(), task, model="looker")
    assert (card.true.score.value, card.pictures, card.chance) == (1, 2, 0.5)
    assert card.readings["POPE official"].score == 1
    shouting = evaluate(lambda s: ["NO"] * len(s), task, model="shouts")
    assert (shouting.true.score.value, shouting.true.details["yes ratio"]) == (0.5, 0)
    assert shouting.true.details["precision"] is None
    assert "undefined" in shouting.to_markdown()
    silent = evaluate(lambda s: [""] * len(s), task, model="silent")
    assert (silent.true.score.value, silent.true.unparsed) == (0, 4)
    assert silent.readings["POPE official"].score == 0.5, "the official script takes silence for yes"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no questions"),
        ("\n\n", "has no questions"),
        (lines(POPE)[:-20], r"pope\.json:4: is not a line of JSON"),
        (json.dumps(POPE), r"pope\.json:1: should be an object, not list"),
        (lines([POPE[0], {**POPE[1], "label": "maybe"}]), r"pope\.json:2: the label 'maybe'"),
        (lines([POPE[0], {**POPE[1], "label": True}]), r"pope\.json:2: 'label' should be str, not bool"),
        (lines([{"image": "red.png", "text": "?"}]), "lacks 'label'; it has image, text"),
        (lines([{**POPE[0], "text": " "}]), "question is empty"),
        (lines([{**POPE[0], "image": "../red.png"}]), "no name of a picture inside"),
        (lines([{**POPE[0], "image": "/etc/passwd"}]), "no name of a picture inside"),
        (lines([{**POPE[0], "image": "C:\\red.png"}]), "no name of a picture inside"),
        (lines([{**POPE[0], "image": ""}]), "no name of a picture inside"),
        (
            lines([POPE[0], {**POPE[1], "image": "x.png"}, {**POPE[1], "image": "y.png"}]),
            r"2 of 3 pictures are not in .*the first is x\.png \(.*pope\.json:2\)",
        ),
        ("[" * 100_000, "is not a line of JSON"),
    ],
)
def test_pope_refuses(tmp_path: Path, images: Path, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        pope(written(tmp_path / "pope.json", content), images)


def test_files_that_are_no_text(tmp_path: Path, images: Path) -> None:
    (tmp_path / "b").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "b", tmp_path / "gone", tmp_path):
        for read in (pope, chartqa, docvqa, coco_captions):
            with pytest.raises(DataError):
                read(path, images)
    with pytest.raises(DataError, match="no place for the question"):
        pope(written(tmp_path / "p", lines(POPE)), images, prompt="Answer!")


def vqa_files(folder: Path, *, people: int = 10) -> tuple[dict, dict]:
    questions = {
        "data_subtype": "val2014",
        "questions": [{"image_id": 7, "question_id": 70, "question": "Which colour?"}],
    }
    answers = [{"answer": "red" if i < 3 else "blue", "answer_id": i} for i in range(people)]
    annotations = {"annotations": [{"question_id": 70, "image_id": 7, "answer_type": "other", "answers": answers}]}
    (folder / "COCO_val2014_000000000007.png").write_bytes((folder / "red.png").read_bytes())
    return questions, annotations


PATTERN = "COCO_{subtype}_{image_id:012d}.png"


def test_vqa(tmp_path: Path, images: Path) -> None:
    questions, annotations = vqa_files(images)
    files = written(tmp_path / "q.json", questions), written(tmp_path / "a.json", annotations)
    task = vqa(*files, images, pattern=PATTERN)
    assert task.items[0].kind == "other"
    card = evaluate(Looker(), task, model="looker")
    assert card.true.score.value == pytest.approx(0.9), "three of ten people agree"
    assert card.constant == 1
    with pytest.raises(DataError, match=r"1 of 1 pictures .* COCO_val2014_000000000007\.jpg"):
        vqa(*files, images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, a: a["annotations"].clear(), "question 70 has no annotation in"),
        (lambda q, a: a["annotations"][0]["answers"].pop(), "9 answers; VQA accuracy is over the answers of ten"),
        (
            lambda q, a: a["annotations"][0].update(answers="red"),
            r"annotations\[0\]: 'answers' should be list, not str",
        ),
        (lambda q, a: a["annotations"][0]["answers"].append(3), r"answers\[10\]: should be an object, not int"),
        (lambda q, a: q["questions"].append([]), r"questions\[1\]: should be an object, not list"),
        (lambda q, a: q["questions"].clear(), "has no questions"),
        (lambda q, a: q["questions"][0].update(question_id="70"), "'question_id' should be int, not str"),
        (lambda q, a: q.pop("questions"), "an object with a list 'questions', and has data_subtype"),
    ],
)
def test_vqa_refuses(tmp_path: Path, images: Path, change: Any, message: str) -> None:
    questions, annotations = vqa_files(images)
    change(questions, annotations)
    files = written(tmp_path / "q.json", questions), written(tmp_path / "a.json", annotations)
    with pytest.raises(DataError, match=message):
        vqa(*files, images, pattern=PATTERN)


def test_vqa_pattern_and_swapped_files(tmp_path: Path, images: Path) -> None:
    questions, annotations = vqa_files(images)
    files = written(tmp_path / "q.json", questions), written(tmp_path / "a.json", annotations)
    with pytest.raises(DataError, match="pattern"):
        vqa(*files, images, pattern="{id}.jpg")
    with pytest.raises(DataError, match="'questions', and has annotations; is it the right file"):
        vqa(*reversed(files), images, pattern=PATTERN)


def test_chartqa(tmp_path: Path, images: Path) -> None:
    human = [{"imgname": "red.png", "query": "How many?", "label": "100"}]
    made = [{"imgname": "blue.png", "query": "Which?", "label": ["blue"]}]
    files = written(tmp_path / "test_human.json", human), written(tmp_path / "test_augmented.json", made)
    task = chartqa(files, images)
    assert task.metric is RELAXED
    card = evaluate(
        lambda s: ["103" if "many" in i.texts[0].text else "The answer is Blue." for i in s], task, model="x"
    )
    assert {kind: k.score.value for kind, k in card.kinds.items()} == {"test_human": 1, "test_augmented": 0}
    assert card.readings["stated answer/1"].score == 1
    assert card.true.details == {"strict years": 0.5, "lenient numbers": 0.5}
    assert len(chartqa(files[0], images).items) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "has no questions"),
        ({"a": 1}, "should be a list, not dict"),
        ([{"imgname": "red.png", "query": "?", "label": []}], "label has to be"),
        ([{"imgname": "red.png", "query": "?", "label": [3]}], "label has to be"),
        ([{"imgname": "red.png", "query": "?", "label": 3}], "'label' should be str or list, not int"),
        ([{"imgname": 3, "query": "?", "label": "3"}], r"c\.json\[0\]: 'imgname' should be str, not int"),
        ('[{"imgname": "red.p', "not valid JSON.*download it again"),
    ],
)
def test_chartqa_refuses(tmp_path: Path, images: Path, content: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        chartqa(written(tmp_path / "c.json", content), images)
    with pytest.raises(DataError, match="no files"):
        chartqa([], images)


def test_docvqa(tmp_path: Path, images: Path) -> None:
    row = {"questionId": 5, "question": "Which?", "answers": ["redd", "rouge"], "image": "documents/red.png"}
    task = docvqa(written(tmp_path / "val.json", {"data": [row]}), images)
    assert (task.metric, task.items[0].id) == (ANLS, "5")
    assert evaluate(Looker(), task, model="x").true.score.value == pytest.approx(0.75)
    infographic = {"image_local_name": "red.png", **{key: row[key] for key in ("questionId", "question", "answers")}}
    (item,) = docvqa(written(tmp_path / "infographics.json", {"data": [infographic]}), images).items
    assert colour_of(item.sample.images[0]) == "red"
    (images / "documents").mkdir()
    picture("blue").save(images / "documents" / "red.png")
    nearer = docvqa(written(tmp_path / "val.json", {"data": [row]}), images)
    assert colour_of(nearer.items[0].sample.images[0]) == "blue", "the path that the file gives comes first"
    test_split = {key: value for key, value in row.items() if key != "answers"}
    for bad, message in (
        ([test_split], "take the validation split"),
        ([{**row, "answers": []}], "not empty"),
        ([{**row, "answers": [1]}], "list of texts"),
        ([{**row, "questionId": None}], "'questionId' should be int or str, not NoneType"),
        ([{key: value for key, value in row.items() if key != "image"}], "lacks 'image'"),
        ([], "has no questions"),
    ):
        with pytest.raises(DataError, match=message):
            docvqa(written(tmp_path / "val.json", {"data": bad}), images)


def coco(folder: Path) -> tuple[Path, Path]:
    captions = {
        "images": [{"id": i, "file_name": f"{name}.png"} for i, name in enumerate(("red", "blue", "white", "lime"))],
        "annotations": [
            {"image_id": 0, "caption": "A red thing."},
            {"image_id": 0, "caption": "Something red, or a dog"},
            {"image_id": 1, "caption": "A blue thing."},
            {"image_id": 2, "caption": "Nothing at all."},
        ],
    }
    instances = {
        "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "ball"}],
        "annotations": [{"image_id": 1, "category_id": 2}, {"image_id": 99, "category_id": 1}],
    }
    return written(folder / "captions.json", captions), written(folder / "instances.json", instances)


def test_coco_captions(tmp_path: Path, images: Path) -> None:
    path, _ = coco(tmp_path)
    task = coco_captions(path, images)
    assert [item.id for item in task.items] == ["0", "1", "2"], "a picture without a caption is left out"
    assert task.items[0].references == ("A red thing.", "Something red, or a dog")
    card = evaluate(lambda s: ["a red thing"] * len(s), task, model="x")
    assert card.true.score.value > 1
    content = json.loads(path.read_text())
    content["annotations"].append({"image_id": 12, "caption": "?"})
    with pytest.raises(DataError, match="picture 12 has a caption"):
        coco_captions(written(path, content), images)
    with pytest.raises(DataError, match="'annotations'"):
        coco_captions(written(path, {"images": []}), images)
    with pytest.raises(DataError, match="has no questions"):
        coco_captions(written(path, {"images": [], "annotations": []}), images)


def test_coco_chair_refuses(tmp_path: Path, images: Path) -> None:
    captions, instances = coco(tmp_path)
    with pytest.raises(DataError, match="category 'ball'"):
        coco_chair(captions, instances, images, {"dog": "dog"})
    content = json.loads(instances.read_text())
    content["annotations"].append({"image_id": 1, "category_id": 5})
    with pytest.raises(DataError, match="category 5"):
        coco_chair(captions, written(instances, content), images, {"dog": "dog", "ball": "ball"})


def test_synonyms(tmp_path: Path) -> None:
    path = written(
        tmp_path / "s.txt", "person, man, baby, passenger\ndog, puppy\nmotorcycle,  motor bike\n\ntrain\ntie\n"
    )
    synonyms = read_synonyms(path)
    assert synonyms["puppy"] == synonyms["baby dog"] == "dog"
    assert synonyms["motor bike"] == "motorcycle"
    assert (synonyms["passenger train"], synonyms["bow tie"]) == ("train", "tie")
    assert synonyms["baby animal"] == "", "an animal is no object of the list, and no person"
    for content in ("", " , \n"):
        with pytest.raises(DataError, match="has no words"):
            read_synonyms(written(path, content))
