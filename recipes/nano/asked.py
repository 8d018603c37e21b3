"""What nano-vlm learns from and is asked about: scenes of shapes, small charts, lines of text; every truth is known."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from typing import Final

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from polymodal.core.batch import Batch, padded, text_batch
from polymodal.data.worlds import charts, documents, questions, shapes
from polymodal.data.worlds.asked import HELD_OUT_PARAPHRASES, Asked
from polymodal.evaluate.tasks import Task
from polymodal.evaluation import TASKS, World
from polymodal.heads.lm import IGNORE
from polymodal.modalities.image import CLIP_MEAN, CLIP_STD, Exact, ImageProcessor
from polymodal.tokenizers.language import LanguageTokenizer

SIZE, PATCH = 80, 8
PATCHES = (SIZE // PATCH) ** 2
IMAGES = ImageProcessor(resize=Exact(height=SIZE, width=SIZE), mean=CLIP_MEAN, std=CLIP_STD)
# A question, then its answer: no names of roles, each of which would be a token.
TEMPLATE = """\
{%- for message in messages -%}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for part in message.content -%}
            {{- part.text if part.type == 'text' else '<|image|>' -}}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>' if message.role == 'assistant' else '<|im_start|>' -}}
{%- endfor -%}
"""
# How often each kind is asked first of a scene, and what is asked of a chart.
KINDS: Final[dict[str, float]] = {
    "existence": 3, "count": 5, "relation": 6, "colour": 1, "shape": 2, "which": 1, "place": 1, "comparison": 1,
    "unanswerable": 1,
}  # fmt: skip
CHARTED: Final[dict[str, float]] = {
    "value": 6, "highest": 1, "lowest": 1, "count": 1, "larger": 1, "difference": 0.3, "sum": 0.3,
}  # fmt: skip
# The bars: which questions of which world.
ASKED: Final = {
    "existence": ("questions", "existence"), "count": ("questions", "count"), "relation": ("questions", "relation"),
    "reading": ("documents", "read"), "chart value": ("charts", "value"),
}  # fmt: skip
NOTHING: Final = "nothing"  # what a patch without an object or a letter is called
VALUE: Final = ("first", "then", "third", "last")  # the signs of a number, as it is answered
MAPS: Final = ("shape", "colour", "middle", "letter", "second", "next", "row", "column", *VALUE)  # what names a patch
THINGS: Final = ("many", "across", "down", *VALUE)  # what names a thing in a question: how many, and where the one is
# What the later of two things in a question is named for: where the other is, if that is clear.
RELATED: Final = {"beside": ("left", "right"), "over": ("above", "below")}
NAMED: Final = (*THINGS, *RELATED)
# In the place of one of them, a token follows, not a word: a patch that a word names or an answer reads, or the word
# before it that names a thing.
LIES: Final = -1
MEETS: Final = -2
PLACES: Final = {
    "row": [str(i // (SIZE // PATCH)) for i in range(PATCHES)],
    "column": [str(i % (SIZE // PATCH)) for i in range(PATCHES)],
}
KNOWN: Final[Mapping[str, str | None]] = {  # the shape that a word of a question means, None for any
    "object": None, "objects": None, **{s: s for s in shapes.SHAPES}, **{shapes.plural(s): s for s in shapes.SHAPES},
}  # fmt: skip
CHARTS: Final = 12_000  # charts of training: each is met several times, with other questions
EMPTY: Final = 0.2  # of the patches that show nothing are learned: most do
DESCRIBED: Final = 0.7  # of the rows end with a description: a yes or no teaches little where to look
DESCRIBE: Final = ("describe the picture in one sentence.", "describe the picture.", "what do you see?")


@lru_cache(maxsize=1)
def asked_words() -> frozenset[str]:
    """The words of the questions of training, without what they are about."""
    wordings = [*questions.WORDINGS.values(), *charts.WORDINGS.values(), *documents.WORDINGS.values()]
    return _words(w for group in wordings for i, w in enumerate(group) if i not in HELD_OUT_PARAPHRASES)


def _words(texts: Iterable[str]) -> frozenset[str]:
    return frozenset(word for text in texts for word in re.findall("[a-z]+", re.sub(r"\{.*?\}", " ", text)))


@lru_cache(maxsize=1)
def idle_words() -> tuple[str, ...]:
    """Those of them that tell no thing, place or more and less."""
    telling = _words([*KNOWN, *shapes.RELATIONS, "higher lower no not more fewer larger most least"])
    return tuple(sorted(word for word in asked_words() - telling if not word.endswith("est")))


@lru_cache(maxsize=1)
def tokenizer() -> LanguageTokenizer:
    """Words of the questions of training, of colours and of shapes; other words are spelled."""
    said = [*shapes.COLOURS, *shapes.SHAPES, *map(shapes.plural, shapes.SHAPES), *shapes.RELATIONS]
    said += ["objects", "yes", "no", questions.UNKNOWN, "left top right bottom middle further lower higher", NOTHING]
    said += [*DESCRIBE, "bar pie chart text lines", *(f"{noun} {noun}s" for noun in charts.NOUNS.values())]
    words = asked_words() | _words(said)
    found = LanguageTokenizer.of_words(word for word in words if len(word) > 1 or word == "a")
    return replace(found, config={**found.config, "chat_template": TEMPLATE})


@lru_cache(maxsize=200_000)
def _ids(text: str) -> tuple[int, ...]:
    return tuple(tokenizer().encode(text, special=False))


def _control(name: str) -> int:
    found = tokenizer().backend.token_to_id(name)
    assert found is not None
    return found


@dataclass(frozen=True)
class Thing:
    """What words of a question name: what is said of it, of `THINGS`, the patches in which it lies, and, if it is one
    thing of a scene, its place."""

    said: Mapping[str, str]
    at: Sequence[int]
    place: tuple[float, float] | None = None


@dataclass(frozen=True)
class Lesson:
    """A picture, what is asked about it, and the words that its patches have in some `MAPS`."""

    pixels: UInt8[np.ndarray, "size size 3"]
    asked: Sequence[tuple[str, str]]
    maps: Callable[[], Mapping[str, Sequence[str | None]]]  # made where they are learned from
    things: Callable[[list[str]], dict[int, Thing]]  # what the words of a question name, at the last of them
    reads: Callable[[str], dict[int, int]] = lambda answer: {}  # where letters of an answer are read: the patches


def _weighted(rng: np.random.Generator, weights: dict[str, float]) -> str:
    shares = np.array(list(weights.values()), float)
    return list(weights)[int(rng.choice(len(shares), p=shares / shares.sum()))]


def of_scene(rng: np.random.Generator, turns: int) -> Lesson:
    scene, first = questions.pose(rng, kind=_weighted(rng, KINDS))
    more = [questions.ask(scene, rng, kind=_weighted(rng, KINDS)) for _ in range(turns - 1)]
    found = _different([first, *more], describe_scene(scene), rng)
    return Lesson(shapes.render(scene, SIZE), found, partial(map_scene, scene), partial(things_of_scene, scene))


def describe_scene(scene: shapes.Scene) -> str:
    """``top left red cup, middle right blue star``: as one reads, by the patch of its middle."""
    across, down = questions.THIRDS
    return ", ".join(
        f"{down[int(3 * t.y)]} {across[int(3 * t.x)]} {t.colour} {t.shape}"
        for t in sorted(scene.things, key=lambda t: (int(t.y * SIZE / PATCH), t.x))
    )


@lru_cache(maxsize=CHARTS)
def drawn(index: int) -> tuple[charts.Chart, UInt8[np.ndarray, "size size 3"], list[tuple[str, float, float]]]:
    """A chart of training, its picture and its letters: it takes eight times as long to draw as a scene."""
    chart = charts.chart(np.random.default_rng([SIZE, index]), size=SIZE)
    return chart, charts.render(chart, SIZE), charts.letters(chart, SIZE)


def of_chart(rng: np.random.Generator, turns: int) -> Lesson:
    chart, pixels, letters = drawn(int(rng.integers(CHARTS)))
    values = values_of(chart)
    said = ", ".join(f"{name} {value}" for name, value in values.items()) or ", ".join(chart.categories)
    asked = [charts.ask(chart, rng, kind=_weighted(rng, CHARTED)) for _ in range(turns)]
    found = _different(asked, f"{chart.kind} chart: {said}", rng)
    return Lesson(pixels, found, partial(map_letters, letters, values), partial(things_of_chart, letters, values))


def values_of(chart: charts.Chart) -> dict[str, str]:
    """What each bar or slice stands at, as it is answered; none where the chart does not tell."""
    if len(charts.questions(chart)) < len(charts.QUESTIONS):
        return {}
    return dict(zip(chart.categories, map(charts.number_text, chart.values[0]), strict=True))


def of_line(rng: np.random.Generator) -> Lesson:
    page = documents.line(rng, size=SIZE)
    asked = documents.ask(page, rng)
    assert asked is not None
    found = (DESCRIBE[0], f"text: {asked.answer}") if rng.random() < 0.1 else (asked.question, asked.answer)
    letters = documents.letters(page)
    maps, reads = partial(map_letters, letters, {}), partial(reads_of_line, letters)
    return Lesson(documents.render(page, SIZE), [found], maps, lambda words: {}, reads)


def _different(asked: Sequence[Asked | None], described: str, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Each question once; the description comes last, so that none can be answered from it."""
    found = list(dict.fromkeys((one.question, one.answer) for one in asked if one is not None))
    if not found or rng.random() < DESCRIBED:
        found.append((DESCRIBE[rng.integers(len(DESCRIBE))], described))
    return found


# ---- what the patches show


def _cell(x: float, y: float) -> tuple[int, int]:
    """Row and column of the patch in which a point lies, given in pixels."""
    row, column = (min(max(int(at / PATCH), 0), SIZE // PATCH - 1) for at in (y, x))
    return row, column


def _patch(row: int, column: int) -> int:
    return row * (SIZE // PATCH) + column


def map_scene(scene: shapes.Scene) -> dict[str, list[str]]:
    """For each patch the shape and colour of what lies on its centre; and at the middle of each object its shape."""
    side = SIZE // PATCH
    maps = {name: [NOTHING] * PATCHES for name in MAPS[:3]}
    for thing in scene.things:
        row, column = _cell(thing.x * SIZE, thing.y * SIZE)
        maps["middle"][_patch(row, column)] = thing.shape
        left, top, right, bottom = (edge / PATCH for edge in thing.box(SIZE))
        for row in range(max(round(top), 0), min(round(bottom), side)):
            for column in range(max(round(left), 0), min(round(right), side)):
                maps["shape"][_patch(row, column)] = thing.shape
                maps["colour"][_patch(row, column)] = thing.colour
    return maps


def map_letters(letters: Sequence[tuple[str, float, float]], values: Mapping[str, str]) -> dict[str, list[str | None]]:
    """For each patch the first and second letter whose middle lies in it, and what is read next after them.

    ``letters`` are in reading order with x and y of their middles; a blank lies nowhere, but can be next. Where a name
    that has one of ``values`` is written, its patches tell the signs of that number, too.
    """
    found: list[list[tuple[str, str]]] = [[] for _ in range(PATCHES)]
    for (letter, x, y), (after, _, _) in zip(letters, [*letters[1:], (" ", 0.0, 0.0)], strict=True):
        if letter != " ":
            found[_patch(*_cell(x, y))].append((letter.lower(), after.lower()))
    maps: dict[str, list[str | None]] = {
        "letter": [patch[0][0] if patch else NOTHING for patch in found],
        "second": [patch[1][0] if len(patch) > 1 else NOTHING for patch in found],
        "next": [patch[-1][1] if patch else NOTHING for patch in found],
    }
    for text, places in texts(letters):
        for i, name in enumerate(VALUE if text in values else ()):
            signs = maps.setdefault(name, [None] * PATCHES)
            for cell in places:
                signs[_patch(*cell)] = (list(values[text]) + [NOTHING] * len(VALUE))[i]
    return maps


def texts(letters: Sequence[tuple[str, float, float]]) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """Each text in small letters, and the patches of its letters."""
    text, places = "", list[tuple[int, int]]()
    for letter, x, y in letters:
        if letter != " ":
            text, places = text + letter.lower(), [*places, _cell(x, y)]
        else:
            yield text, places
            text, places = "", []


# ---- what the words of a question name


def things_of_scene(scene: shapes.Scene, words: list[str]) -> dict[int, Thing]:
    """By the number of a word, how many things it names with the colour before it, and where they or the one lie."""
    named = {}
    for i, word in enumerate(words):
        if word not in KNOWN:
            continue
        colour = words[i - 1] if i and words[i - 1] in shapes.COLOURS else None
        found = [t for t in scene.things if KNOWN[word] in (None, t.shape) and colour in (None, t.colour)]
        cells = [_cell(t.x * SIZE, t.y * SIZE) for t in found]
        named[i] = _thing({"many": str(len(cells))}, cells, (found[0].x, found[0].y) if len(found) == 1 else None)
    return named


def things_of_chart(
    letters: Sequence[tuple[str, float, float]], values: Mapping[str, str], words: list[str]
) -> dict[int, Thing]:
    """By the number of a word that is the name of a bar or slice, where that begins, and what it stands at."""
    at = {text: places[:1] for text, places in texts(letters) if text in values}
    named = {}
    for i, word in enumerate(words):
        if word in values:
            signs = [*values[word], *[NOTHING] * len(VALUE)]
            named[i] = _thing(dict(zip(VALUE, signs, strict=False)), at.get(word, []))
    return named


def _thing(said: dict[str, str], cells: Sequence[tuple[int, int]], place: tuple[float, float] | None = None) -> Thing:
    if len(cells) == 1:
        said |= {"across": str(cells[0][1]), "down": str(cells[0][0])}
    return Thing(said, [_patch(*cell) for cell in cells], place)


def related(one: tuple[float, float], other: tuple[float, float]) -> dict[str, str]:
    """Where one thing is, seen from another: of `RELATED`."""
    found = {}
    for (name, (less, more)), a, b in zip(RELATED.items(), one, other, strict=True):
        found[name] = less if a < b - shapes.MARGIN else more if a > b + shapes.MARGIN else NOTHING
    return found


def reads_of_line(letters: Sequence[tuple[str, float, float]], answer: str) -> dict[int, int]:
    """By the number of a sign of an answer, the patch of the letter that it is."""
    text = "".join(letter for letter, _, _ in letters).strip().lower()
    start = answer.lower().find(text)
    assert start >= 0, f"{answer!r} is not what is written: {text!r}"
    return {start + i: _patch(*_cell(x, y)) for i, (letter, x, y) in enumerate(letters[: len(text)]) if letter != " "}


# ---- to learn from


def with_noise(words: Sequence[str], rng: np.random.Generator, share: float) -> list[int | str]:
    """The numbers of the words, now and then with words between them that do not belong there.

    Questions come in other words than those of training, and a word of another kind of question ("what does it say?")
    can be one of them ("would you say that ...").
    """
    found: list[int | str] = list(range(len(words)))
    if rng.random() < share:
        for _ in range(int(rng.integers(1, 5))):
            strange = documents.WORDS if rng.random() < 0.5 else idle_words()
            found.insert(int(rng.integers(len(found) + 1)), strange[rng.integers(len(strange))])
    return found


def pixels_of(lessons: Sequence[Lesson]) -> Float[Tensor, "lessons 3 size size"]:
    return IMAGES.normalise(torch.from_numpy(np.stack([lesson.pixels for lesson in lessons])).permute(0, 3, 1, 2))


def collate(lessons: Sequence[Lesson], rng: np.random.Generator, *, noise: float = 0.5) -> Batch:
    """Rows of a picture with what is asked about it, as the chat template writes them.

    ``noise`` is how many of the questions hold words that mean nothing here.
    """
    image, ask, end = (_control(name) for name in ("<|image|>", "<|im_start|>", "<|im_end|>"))
    rows: list[list[int]] = []
    labels: list[list[int]] = []
    things: list[list[tuple[int, int, int]]] = []  # token, which of NAMED, the word; or LIES or MEETS, a token
    for lesson in lessons:
        row, label, named = [image] * PATCHES, [IGNORE] * PATCHES, list[tuple[int, int, int]]()
        for question, answer in lesson.asked:
            words = question.split()
            known = lesson.things([word.strip(string.punctuation) for word in words])
            q, other = list[int](), None  # the thing named before, and its token
            for n, word in enumerate(with_noise(words, rng, noise)):
                text = words[word] if isinstance(word, int) else word
                ends = len(q) + len(_ids((" " if n else "") + text.rstrip(string.punctuation))) - 1
                q += _ids((" " if n else "") + text)
                if isinstance(word, int) and (thing := known.get(word)):
                    at = len(row) + ends
                    said = dict(thing.said)
                    if thing.place is not None:
                        if other is not None:
                            said |= related(other[0], thing.place)
                            named.append((at, MEETS, other[1]))
                        other = thing.place, at
                    named += [(at, NAMED.index(name), _ids(word)[0]) for name, word in said.items()]
                    named += [(at, LIES, patch) for patch in thing.at]
            a = _ids(answer)
            if places := lesson.reads(answer):
                starts = [start for start, _ in tokenizer().backend.encode(answer, add_special_tokens=False).offsets]
                ask_at = len(row) + len(q)  # a sign is said by the token before it
                named += [(ask_at + i, LIES, places[start]) for i, start in enumerate(starts) if start in places]
            row += [*q, ask, *a, end]
            label += [*[IGNORE] * (len(q) + 1), *a, end]
        rows.append(row)
        labels.append(label)
        things.append(named)
    number = torch.arange(len(rows))
    frames = {"frames": torch.ones_like(number), "frames_row": number}
    media = {"pixels": pixels_of(lessons), "pixels_row": number, **frames}
    most = max(map(len, things))
    pointed = torch.tensor([[*named, *[(IGNORE,) * 3] * (most - len(named))] for named in things])
    learned = {"labels": padded(labels, fill=IGNORE), "things": pointed.reshape(len(rows), most, 3)}
    return Batch(text_batch(rows) | learned | media)


@cache
def vocabulary(name: str) -> Int[Tensor, " words"]:
    """The ids of the words of a map, or of what things are named for, in order."""
    words: Sequence[str] = string.ascii_lowercase + string.digits + ".% "
    if name in ("shape", "middle"):
        words = shapes.SHAPES
    elif name == "colour":
        words = tuple(shapes.COLOURS)
    elif name in RELATED:
        words = RELATED[name]
    elif name not in ("letter", "second", "next"):
        words = string.digits + "."
    return torch.tensor(sorted({_ids(word)[0] for word in [*words, NOTHING]}))


def names_of(lessons: Sequence[Lesson], rng: np.random.Generator) -> Int[Tensor, "lessons maps patches"]:
    """For each of `MAPS` the ids of the words of the patches."""
    ids = np.full((len(lessons), len(MAPS), PATCHES), IGNORE)
    empty = _ids(NOTHING)[0]
    for i, lesson in enumerate(lessons):
        for name, words in {**lesson.maps(), **PLACES}.items():
            ids[i, MAPS.index(name)] = [IGNORE if word is None else _ids(word)[0] for word in words]
    ids[(ids == empty) & (rng.random(ids.shape) > EMPTY)] = IGNORE
    return torch.from_numpy(ids)


def look(lessons: Sequence[Lesson], rng: np.random.Generator) -> Batch:
    """Pictures to name the patches of."""
    return Batch(pixels=pixels_of(lessons), names=names_of(lessons, rng))


def point(lessons: Sequence[Lesson], rng: np.random.Generator) -> Batch:
    """What is asked about pictures, of which nothing but what its words name is to be told."""
    batch = collate(lessons, rng)
    del batch["labels"]
    return batch


def both(lessons: Sequence[Lesson], rng: np.random.Generator) -> Batch:
    """What is asked about pictures, and the names of their patches."""
    return Batch(collate(lessons, rng) | {"names": names_of(lessons, rng)})


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """New pictures for each row of each step: ``scenes`` and ``charts`` are shares, the rest are lines of text.

    Up to ``turns`` questions are asked about a picture; then it may be described.
    """

    scenes: float
    charts: float
    turns: int = 4
    collate: Callable[[Sequence[Lesson], np.random.Generator], Batch]

    def __len__(self) -> int:
        return 1_000_000  # they are drawn when they are asked for: the number only gives an epoch its length

    def lesson(self, rng: np.random.Generator) -> Lesson:
        kind = rng.random()
        if kind < self.scenes:
            return of_scene(rng, self.turns)
        return of_chart(rng, self.turns) if kind < self.scenes + self.charts else of_line(rng)

    def batch(self, indices: Sequence[int], rng: np.random.Generator) -> Batch:
        return self.collate([self.lesson(rng) for _ in indices], rng)


# ---- to be asked about


def tasks(count: int, seed: int = 1) -> Iterator[Task]:
    """Held-out scenes, fonts, words and wordings, as `polymodal evaluate` draws them: one task for each bar."""
    for name, (world, kind) in ASKED.items():
        drawn = TASKS[world]
        assert isinstance(drawn, World)
        yield replace(replace(drawn, kinds=(kind,)).task(name, SIZE, count, seed), name=name)
