"""The worlds that ask: every answer is found again by other means, splits leak nothing, blind guesses gain little."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from polymodal.core.errors import DataError
from polymodal.data.worlds import charts, documents, questions, shapes
from polymodal.data.worlds.asked import HELD_OUT_PARAPHRASES, PARAPHRASES, Asked, chance, prior
from polymodal.data.worlds.charts import Chart
from polymodal.data.worlds.documents import Line, Page
from polymodal.data.worlds.questions import UNKNOWN


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def blind(asked: Sequence[Asked]) -> dict[str, float]:
    """Accuracy on every second question of a guess from the text alone, learned from the others."""
    seen: defaultdict[str, Counter[str]] = defaultdict(Counter)
    anything: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for one in asked[::2]:
        seen[one.question][one.answer] += 1
        anything[one.kind][one.answer] += 1
    hits: defaultdict[str, list[bool]] = defaultdict(list)
    for one in asked[1::2]:
        guesses = seen[one.question] or anything[one.kind]
        hits[one.kind].append(one.answer == guesses.most_common(1)[0][0])
    return {kind: float(np.mean(found)) for kind, found in hits.items()}


# ------------------------------------------------------------------------------------------------------------ shapes

_Scene = shapes.Scene
_COLOUR = "|".join(shapes.COLOURS)
_SHAPE = "|".join(shapes.SHAPES)
_NAME = rf"(?:(?:{_COLOUR}) )?(?:{_SHAPE})"
_SAME = {"further left": ("x", -1), "further right": ("x", 1), "higher": ("y", -1), "lower": ("y", 1)}
_SIDES = {"left of": ("x", -1), "right of": ("x", 1), "above": ("y", -1), "below": ("y", 1)}


def called(scene: _Scene, name: str) -> list[shapes.Thing]:
    """The objects that a name such as ``red cups``, ``cups`` or ``red objects`` fits."""
    words = [word for word in name.split() if word not in ("the", "a", "an")]
    nouns = {shape: shape for shape in shapes.SHAPES} | {"object": None, "objects": None}
    nouns |= {shape + ("es" if shape == "cross" else "s"): shape for shape in shapes.SHAPES}
    shape, colours = nouns[words[-1]], words[:-1]
    assert len(colours) <= 1, name
    return [t for t in scene.things if shape in (None, t.shape) and (not colours or t.colour == colours[0])]


def truth(scene: _Scene, asked: Asked) -> str:
    """The answer, worked out from the words of the question and the objects alone."""
    text = asked.question
    if further := re.search("|".join(_SAME), text):
        axis, sign = _SAME[further[0]]
        names = re.findall(rf"the ({_NAME})", text)
        (a,), (b,) = (called(scene, name) for name in names)
        return names[0] if sign * (getattr(a, axis) - getattr(b, axis)) > 0 else names[1]
    if "left, middle or right" in text or "top, middle or bottom" in text:
        (thing,) = called(scene, re.findall(rf"the ({_NAME})", text)[0])
        axis, names = ("x", ("left", "middle", "right")) if "left" in text else ("y", ("top", "middle", "bottom"))
        return names[np.digitize(getattr(thing, axis), [1 / 3, 2 / 3])]
    plural = rf"(?:(?:{_COLOUR}) objects|crosses|(?:{_SHAPE})s|objects)"
    nouns = re.findall(plural, text)
    if len(nouns) == 2:
        a, b = (len(called(scene, noun)) for noun in nouns)
        return "yes" if (b < a if "fewer" not in text else a < b) else "no"
    if nouns:
        return str(len(called(scene, nouns[0])))
    if side := re.search(" (" + "|".join(_SIDES) + ") ", text):
        axis, sign = _SIDES[side[1]]
        first, second = (called(scene, name) for name in re.findall(rf"the ({_NAME})", text))
        if not first or not second:
            return UNKNOWN
        (a,), (b,) = first, second
        apart = sign * (getattr(a, axis) - getattr(b, axis))
        assert abs(apart) > 0.099, "too close to say"
        return "yes" if apart > 0 else "no"
    if thing := re.search(rf"the ({_SHAPE})\b", text):
        found = called(scene, thing[1])
        assert len(found) <= 1
        return found[0].colour if found else UNKNOWN
    if thing := re.search(rf"the ((?:{_COLOUR}) object)\b", text):
        return called(scene, thing[1])[0].shape
    named = re.search(rf"\ban? ({_NAME})\b", text)
    assert named, text
    return "yes" if called(scene, named[1]) else "no"


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("kind", questions.KINDS)
def test_every_answer_about_shapes_is_true(kind: str, held_out: bool) -> None:
    generator = rng(7)
    posed = [questions.pose(generator, kind=kind, held_out=held_out, reworded=i % 2 == 0) for i in range(100)]
    wrong = [(a, truth(s, a)) for s, a in posed if truth(s, a) != a.answer]
    assert not wrong, wrong[:3]
    for i, (_, asked) in enumerate(posed):
        assert asked.kind == kind
        assert (asked.paraphrase in HELD_OUT_PARAPHRASES) == (i % 2 == 0)
        assert asked.question == asked.question.lower()
        assert asked.answer == asked.answer.lower()
    assert {a.paraphrase for _, a in posed} == set(range(PARAPHRASES))


def test_any_scene_can_be_asked_about() -> None:
    generator = rng(8)
    for i in range(150):
        scene = shapes.scene(generator, held_out=i % 2 == 0)
        asked = questions.ask(scene, generator)
        assert asked is not None
        assert truth(scene, asked) == asked.answer
    alone = shapes.scene(generator, objects=1)
    assert questions.ask(alone, generator, kind="relation") is None
    with pytest.raises(DataError, match="Did you mean 'count'"):
        questions.ask(alone, generator, kind="counts")


def test_held_out_pairs_are_asked_about_in_evaluation_only() -> None:
    pair = re.compile(rf"({_COLOUR}) ({_SHAPE})\b")
    generator = rng(9)

    def named(held_out: bool, kind: str) -> list[bool]:
        posed = [questions.pose(generator, kind=kind, held_out=held_out) for _ in range(20)]
        assert all(({(t.colour, t.shape) for t in s.things} & shapes.HELD_OUT != set()) == held_out for s, _ in posed)
        return [not shapes.HELD_OUT.isdisjoint(pair.findall(a.question + " " + a.answer)) for _, a in posed]

    for kind in questions.KINDS:
        assert not any(named(False, kind))
    for kind in ("existence", "relation", "which", "place"):
        assert all(named(True, kind))


def test_wrong_existence_questions_are_plausible() -> None:
    generator = rng(10)
    for held_out in (False, True):
        posed = [questions.pose(generator, kind="existence", held_out=held_out) for _ in range(100)]
        absent = [(s, a) for s, a in posed if a.answer == "no"]
        assert 0.35 < len(absent) / len(posed) < 0.65
        for scene, asked in absent:
            found = re.search(rf"({_COLOUR}) ({_SHAPE})\b", asked.question)
            assert found
            assert any(t.colour == found[1] or t.shape == found[2] for t in scene.things)


@pytest.mark.slow
def test_blind_guesses_about_shapes_are_worth_little() -> None:
    generator = rng(11)
    asked = [questions.pose(generator, kind=kind)[1] for kind in questions.KINDS for _ in range(1000)]
    constant, text = prior(asked), blind(asked)
    for guess in (constant, text):
        for kind, most in {
            "existence": 0.56, "relation": 0.56, "comparison": 0.56, "count": 0.24, "colour": 0.2, "shape": 0.2,
            "which": 0.56, "place": 0.4,
        }.items():  # fmt: skip
            assert guess[kind] < most, (kind, guess[kind])
    assert constant["unanswerable"] == 1
    # What cannot be answered is asked in the words of what can: the text does not give it away.
    shared = [a for a in asked if a.kind in ("colour", "unanswerable") and "colo" in a.question]
    assert {a.question for a in shared if a.answer == UNKNOWN} <= {a.question for a in shared if a.answer != UNKNOWN}


def test_what_is_named_first_is_the_answer_half_of_the_time() -> None:
    generator = rng(13)
    asked = [questions.pose(generator, kind="which")[1] for _ in range(200)]
    asked += [a for _ in range(200) if (a := charts.ask(charts.chart(generator), generator, kind="larger")) is not None]
    for found in (asked[:200], asked[200:]):
        middles = [(a.question.index(a.answer), re.search(r",? (?:or|and) ", a.question)) for a in found]
        first = [at < middle.start() for at, middle in middles if middle is not None]
        assert len(first) == 200
        assert 0.4 < np.mean(first) < 0.6


def test_counts_up_to_five_are_equally_frequent() -> None:
    generator = rng(12)
    counts = Counter(questions.pose(generator, kind="count")[1].answer for _ in range(200))
    assert set(counts) == set("012345")
    assert min(counts.values()) > 14


def test_questions_depend_on_the_generator_only() -> None:
    def draw(seed: int) -> list[tuple[_Scene, Asked]]:
        generator = rng(seed)
        return [questions.pose(generator) for _ in range(20)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert chance("a", "b") == chance("a", "b") != chance("b", "a")


# ------------------------------------------------------------------------------------------------------------ charts


def drawable() -> None:
    pytest.importorskip("matplotlib", reason="pip install 'polymodal[train]'")


def chart_truth(chart: Chart, asked: Asked) -> str:
    """The answer, worked out from the names in the question and the numbers of the chart."""
    marks = {
        f"{series} in {category}" if series else category: value
        for series, values in zip(chart.series, chart.values, strict=True)
        for category, value in zip(chart.categories, values, strict=True)
    }
    named = sorted(marks, key=len, reverse=True)
    found = re.findall("|".join(rf"\b{re.escape(name)}\b" for name in named), asked.question)
    if asked.kind in ("highest", "lowest"):
        scope = re.search(r" for (\w+)[?.]$", asked.question)
        column = {k: v for k, v in marks.items() if not scope or k.startswith(f"{scope[1]} in ")}
        return (max if asked.kind == "highest" else min)(column, key=column.__getitem__).split(" in ")[-1]
    if asked.kind == "count":
        if "lines" in asked.question:
            return str(len(chart.series))
        return str(len(marks) if "bars" in asked.question else len(chart.categories))
    values = [marks[name] for name in found]
    if asked.kind == "larger":
        return found[int(values[1] > values[0])]
    (number,) = values if asked.kind == "value" else (sum(values),)
    if asked.kind == "difference":
        number = max(values) - min(values)
    return str(round(number, 4)).removesuffix(".0")


@pytest.mark.parametrize("kind", charts.QUESTIONS)
def test_every_answer_about_charts_is_true(kind: str) -> None:
    generator = rng(20)
    seen = set()
    for i in range(80):
        chart = charts.chart(generator, held_out=i % 3 == 0)
        asked = charts.ask(chart, generator, kind=kind, reworded=i % 2 == 0)
        assert (asked is None) == (kind not in charts.questions(chart))
        if asked is None:
            assert chart.kind == "pie"
            assert not chart.style.labelled
            continue
        assert chart_truth(chart, asked) == asked.answer, (chart, asked)
        assert (asked.kind, asked.paraphrase in HELD_OUT_PARAPHRASES) == (kind, i % 2 == 0)
        assert asked.question + asked.answer == (asked.question + asked.answer).lower()
        seen.add(asked.paraphrase)
    assert seen == set(range(PARAPHRASES))


def test_held_out_words_and_styles_never_occur_in_training() -> None:
    def drawn(held_out: bool) -> list[Chart]:
        generator = rng(21)
        return [charts.chart(generator, held_out=held_out) for _ in range(300)]

    def words(found: Sequence[Chart]) -> set[str]:
        return {name for chart in found for name in chart.categories + chart.series} - {""}

    def styles(found: Sequence[Chart]) -> set[tuple[str, str, str]]:
        return {(chart.style.palette, chart.style.theme, chart.style.font) for chart in found}

    train, held = drawn(False), drawn(True)
    assert not words(train) & words(held)
    assert not styles(train) & styles(held)
    # Each part of a held-out style is known from training, only not together.
    assert all({s[i] for s in styles(held)} <= {s[i] for s in styles(train)} for i in range(3))
    assert len(words(held)) > 40
    assert len(styles(held)) > 10


def test_numbers_of_charts_can_be_read() -> None:
    generator = rng(22)
    for _ in range(150):
        chart = charts.chart(generator)
        for values in chart.values:
            assert len(set(values)) == len(values) == len(chart.categories)
            if chart.kind == "pie":
                assert sum(values) == 100
                assert all(1.19 * a <= b for a, b in itertools.pairwise(sorted(values)))
            elif not chart.style.labelled:
                assert chart.style.ticks
                steps = [value * 20 / chart.top for value in values]  # quarters of the five ticks
                assert all(step == int(step) and 2 <= step <= 20 for step in steps)


@pytest.mark.parametrize("size", [56, 80, 112, 224, 448])
def test_no_text_of_a_chart_is_cut_or_lies_on_another(size: int) -> None:
    drawable()
    from matplotlib.text import Text

    generator = rng(23)
    for i in range(24):
        kind = None if size < 100 else charts.KINDS[i % 4]
        chart = charts.chart(generator, kind=kind, size=size, held_out=i % 3 == 0)
        sheet = charts._drawn(chart, size)
        boxes = [
            (text.get_text(), text.get_window_extent(sheet.canvas.get_renderer()))
            for text in sheet.figure.findobj(Text)
            if text.get_text()
        ]
        assert {str(name).lower() for name, _ in boxes} >= set(chart.categories)
        for name, box in boxes:
            assert box.x0 > -1, (chart, name)
            assert box.y0 > -1.5, (chart, name)
            assert box.x1 < size + 1, (chart, name)
            assert box.y1 < size + 1.5, (chart, name)
        for (name, a), (other, b) in itertools.combinations(boxes, 2):
            across, up = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
            # Boxes have room for accents and tails: a little of it may be shared.
            assert min(across, up) < 3 or across * up < 0.2 * min(a.width * a.height, b.width * b.height), (name, other)


@pytest.mark.parametrize("horizontal", [False, True])
def test_bars_are_as_long_as_their_values(horizontal: bool) -> None:
    drawable()
    generator = rng(24)
    for _ in range(8):
        chart = charts.chart(generator, kind="bar")
        style = dataclasses.replace(
            chart.style, horizontal=horizontal, labelled=False, ticks=True, edged=False, colourful=False, grid=False
        )
        chart = dataclasses.replace(chart, style=style)
        picture = charts.render(chart, 224)
        paint = np.array([int(charts._colours(style)[0][i : i + 2], 16) for i in (1, 3, 5)])
        bars = (np.abs(picture.astype(int) - paint) <= 2).all(-1)
        lengths = bars.sum(1 if horizontal else 0)
        inside = np.flatnonzero(lengths > 4)
        groups = np.split(inside, np.flatnonzero(np.diff(inside) > 1) + 1)
        measured = np.array([np.median(lengths[group]) for group in groups])
        assert len(measured) == len(chart.categories)
        values = np.array(chart.values[0])
        np.testing.assert_allclose(measured / measured.max(), values / values.max(), atol=2.5 / measured.max())


def test_charts_depend_on_the_generator_only() -> None:
    drawable()
    chart = charts.chart(rng(25))
    assert chart == charts.chart(rng(25)) != charts.chart(rng(26))
    picture = charts.render(chart, 100)
    assert picture.shape == (100, 100, 3)
    assert picture.dtype == np.uint8
    np.testing.assert_array_equal(picture, charts.render(chart, 100))
    for kind in charts.KINDS:
        chart = charts.chart(rng(27), kind=kind)
        first = chart.values[0]
        moved = dataclasses.replace(chart, values=((first[1], first[0], *first[2:]), *chart.values[1:]))
        assert (charts.render(chart, 224) != charts.render(moved, 224)).any()


def test_impossible_charts_are_refused() -> None:
    with pytest.raises(DataError, match="Did you mean 'line'"):
        charts.chart(rng(), kind="lines")
    with pytest.raises(DataError, match="at least 56"):
        charts.chart(rng(), size=40)
    with pytest.raises(DataError, match="at least 56"):
        charts.render(charts.chart(rng()), 40)
    with pytest.raises(DataError, match="Did you mean 'value'"):
        charts.ask(charts.chart(rng()), rng(), kind="values")


# --------------------------------------------------------------------------------------------------------- documents


@pytest.fixture(scope="module")
def fonts() -> None:
    try:
        documents.fonts(held_out=False)
        documents.fonts(held_out=True)
    except DataError as error:
        pytest.skip(str(error))


def pages(seed: int, count: int, size: int = 224, held_out: bool = False) -> list[Page]:
    generator = rng(seed)
    kinds = [documents.KINDS[i % len(documents.KINDS)] for i in range(count)]
    return [documents.page(generator, kind=kind, size=size, held_out=held_out) for kind in kinds]


def lines(seed: int, count: int, size: int = 224, held_out: bool = False) -> list[Page]:
    generator = rng(seed)
    return [documents.line(generator, size=size, held_out=held_out) for _ in range(count)]


@pytest.mark.usefixtures("fonts")
@pytest.mark.parametrize("size", [112, 224, 448])
def test_boxes_hold_all_the_ink_of_their_word(size: int) -> None:
    for page in pages(30, 5, size) + lines(30, 6, size):
        for word in page.words:
            alone = dataclasses.replace(page, lines=(Line(words=(word,)),), rules=())
            rows, columns = np.nonzero((documents.render(alone, size) != page.paper).any(-1))
            found = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            left, top, right, bottom = word.box
            assert 0 <= left <= found[0] <= found[2] <= right <= size, (word, found)
            assert 0 <= top <= found[1] <= found[3] <= bottom <= size, (word, found)
            assert np.abs(np.subtract(found, word.box)).max() == 0, (word, found)


@pytest.mark.usefixtures("fonts")
def test_nothing_else_is_drawn_and_words_do_not_overlap() -> None:
    for page in pages(31, 40) + lines(31, 20):
        inked = (documents.render(page, page.size) != page.paper).any(-1)
        for left, top, right, bottom in [word.box for word in page.words] + list(page.rules):
            inked[top:bottom, left:right] = False
        assert not inked.any()
        for a, b in itertools.combinations([word.box for word in page.words], 2):
            across, down = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
            assert across <= 1 or down <= 2, (a, b)  # slanted letters and tails may reach a little further


@pytest.mark.usefixtures("fonts")
def test_text_is_in_reading_order() -> None:
    for page in pages(32, 50) + lines(32, 20):
        for line in page.lines:
            origins = [word.origin for word in line.words]
            assert [x for x, _ in origins] == sorted({x for x, _ in origins})
            assert len({y for _, y in origins}) == 1
            assert line.box[0] == line.words[0].box[0]
        baselines = [line.words[0].origin[1] for line in page.lines]
        breaks = [i for i, (a, b) in enumerate(itertools.pairwise(baselines)) if b <= a]
        assert len(breaks) == (page.kind == "columns")
        if breaks:
            after = page.lines[breaks[0] + 1 :]
            beside = [
                line for line in page.lines[: breaks[0] + 1] if line.words[0].origin[1] >= baselines[breaks[0] + 1]
            ]
            assert max(line.box[2] for line in beside) < min(line.box[0] for line in after)
        assert page.text.split() == [word.text for word in page.words]


def page_truth(page: Page, asked: Asked) -> str:
    """The answer, read off the lines of the page."""
    rows = [line.text.lower() for line in page.lines]
    if asked.kind == "read":
        return " ".join(rows)
    if asked.kind == "title":
        tall = [line.text for line in page.lines if line.words[0].height > min(w.height for w in page.words)]
        return " ".join(tall).lower()
    if asked.kind == "total":
        prices = [float(row.split()[-1]) for row in rows if re.search(r"\d\.\d\d$", row)]
        assert prices[-1] == pytest.approx(sum(prices[:-1]))
        return f"{sum(prices[:-1]):.2f}"
    if asked.kind == "next":
        word = asked.question.split('"')[1]
        text = " ".join(rows).replace(".", " . ").split()
        assert text.count(word) == 1
        return text[text.index(word) + 1]
    if page.kind == "form":
        (row,) = (row for row in rows if re.search(rf"\b{row.split(':')[0]}\b", asked.question) and ":" in row)
        return row.split(": ")[1]
    named = re.search(r"(\w+) of (\w+)", asked.question)
    assert named
    (row,) = (row.split() for row in rows if row.split()[0] == named[2] and re.search(r"\d", row))
    if page.kind == "receipt":
        return row[1]
    (header,) = (row.split() for row in rows if row.split()[0] == "item")
    return row[header.index(named[1])]


@pytest.mark.usefixtures("fonts")
def test_every_answer_about_documents_is_true() -> None:
    generator = rng(33)
    seen: defaultdict[str, set[int]] = defaultdict(set)
    for i, page in enumerate(pages(33, 80) + lines(33, 20)):
        for kind in documents.QUESTIONS:
            for reworded in (False, True):
                asked = documents.ask(page, generator, kind=kind, reworded=reworded)
                if asked is not None:
                    assert page_truth(page, asked) == asked.answer, (page.text, asked)
                    assert (asked.paraphrase in HELD_OUT_PARAPHRASES) == reworded
                    seen[f"{page.kind} {kind}"].add(asked.paraphrase)
        assert documents.ask(page, generator) is not None or (page.kind == "form" and not page.title), i
    assert set(seen) >= {"line read", "article title", "form value", "table value", "receipt total", "columns next"}
    assert all(len(paraphrases) >= 4 for paraphrases in seen.values())


@pytest.mark.usefixtures("fonts")
def test_held_out_fonts_never_occur_in_training() -> None:
    def families(held_out: bool) -> set[str | None]:
        found = lines(34, 150, size=64, held_out=held_out) + pages(34, 10, held_out=held_out)
        return {documents._font(face, 20).getname()[0] for face in {w.face for page in found for w in page.words}}

    train, held = families(False), families(True)
    assert not train & held
    assert train <= documents.FAMILIES.keys()
    assert train == set(documents.fonts(held_out=False))
    assert held == set(documents.fonts(held_out=True))
    split = [documents.held_out_family(family) for family in documents.FAMILIES]
    assert 0.15 < np.mean(split) < 0.4


@pytest.mark.usefixtures("fonts")
@pytest.mark.parametrize("size", [48, 56, 64, 112, 224, 448])
def test_lines_of_one_to_three_words_fit_every_size(size: int) -> None:
    found = lines(35, 60, size)
    assert {len(page.words) for page in found} == {1, 2, 3}
    for page in found:
        assert all(word.height >= 10 for word in page.words)
        assert documents.render(page, size).shape == (size, size, 3)
    assert len({page.text for page in found}) == 60


@pytest.mark.usefixtures("fonts")
def test_wear_keeps_the_words_visible_and_is_repeatable() -> None:
    generator = rng(36)
    for page in lines(36, 15) + pages(36, 5):
        worn = documents.wear(generator)
        picture = documents.render(page, page.size, worn)
        np.testing.assert_array_equal(picture, documents.render(page, page.size, worn))
        clean = dataclasses.replace(worn, noise=0.0, uneven=0.0)
        drawn = np.abs(documents.render(page, page.size, clean).astype(int) - page.paper).max(-1) > 25
        assert drawn.sum() > 20
        assert not drawn[[0, -1]].any()  # rotation pushes nothing over the edge
        assert not drawn[:, [0, -1]].any()
    assert documents.render(pages(36, 1)[0], 100).shape == (100, 100, 3)


@pytest.mark.usefixtures("fonts")
def test_documents_depend_on_the_generator_only() -> None:
    assert pages(37, 10) == pages(37, 10) != pages(38, 10)
    asked = [documents.ask(page, generator) for generator in [rng(1)] for page in pages(37, 10)]
    assert asked == [documents.ask(page, generator) for generator in [rng(1)] for page in pages(37, 10)]


def test_impossible_documents_are_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    for draw in (documents.page, documents.line):
        with pytest.raises(DataError, match=r"apt-get install .*fonts-dejavu-core"):
            draw(rng(), folder=tmp_path)
        with pytest.raises(DataError, match="at least"):
            draw(rng(), size=40)
    with pytest.raises(DataError, match="Did you mean 'table'"):
        documents.page(rng(), kind="tables")
