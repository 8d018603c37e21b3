"""What nano-vlm learns from and is asked about: scenes of shapes, small charts, lines of text; every truth is known."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
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
    "existence": 3, "count": 5, "relation": 4, "colour": 1, "shape": 2, "which": 1, "place": 1, "comparison": 1,
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
MAPS: Final = ("shape", "colour", "middle", "letter", "second", "next")  # what a patch is named for
EMPTY: Final = 0.2  # of the patches that show nothing are learned: most do
DESCRIBED: Final = 0.7  # of the rows end with a description: a yes or no teaches little where to look
DESCRIBE: Final = ("describe the picture in one sentence.", "describe the picture.", "what do you see?")


@lru_cache(maxsize=1)
def tokenizer() -> LanguageTokenizer:
    """Words of the questions of training, of colours and of shapes; other words are spelled."""
    wordings = [*questions.WORDINGS.values(), *charts.WORDINGS.values(), *documents.WORDINGS.values()]
    said = [w for group in wordings for i, w in enumerate(group) if i not in HELD_OUT_PARAPHRASES]
    said += [*shapes.COLOURS, *shapes.SHAPES, *map(shapes.plural, shapes.SHAPES), *shapes.RELATIONS]
    said += ["objects", "yes", "no", questions.UNKNOWN, "left top right bottom middle further lower higher", NOTHING]
    said += [*DESCRIBE, "bar pie chart text lines", *MAPS, *(f"{noun} {noun}s" for noun in charts.NOUNS.values())]
    words = {word for text in said for word in re.findall("[a-z]+", re.sub(r"\{.*?\}", " ", text))}
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
class Lesson:
    """A picture, what is asked about it, and the words that its patches have in some `MAPS`."""

    pixels: UInt8[np.ndarray, "size size 3"]
    asked: Sequence[tuple[str, str]]
    maps: Callable[[], dict[str, list[str]]]  # made where they are learned from


def _weighted(rng: np.random.Generator, weights: dict[str, float]) -> str:
    shares = np.array(list(weights.values()), float)
    return list(weights)[int(rng.choice(len(shares), p=shares / shares.sum()))]


def of_scene(rng: np.random.Generator, turns: int) -> Lesson:
    scene, first = questions.pose(rng, kind=_weighted(rng, KINDS))
    more = [questions.ask(scene, rng, kind=_weighted(rng, KINDS)) for _ in range(turns - 1)]
    found = _different([first, *more], describe_scene(scene), rng)
    return Lesson(shapes.render(scene, SIZE), found, partial(map_scene, scene))


def describe_scene(scene: shapes.Scene) -> str:
    """``top left red cup, middle right blue star``: as one reads, by the patch of its middle."""
    across, down = questions.THIRDS
    return ", ".join(
        f"{down[int(3 * t.y)]} {across[int(3 * t.x)]} {t.colour} {t.shape}"
        for t in sorted(scene.things, key=lambda t: (int(t.y * SIZE / PATCH), t.x))
    )


def of_chart(rng: np.random.Generator, turns: int) -> Lesson:
    chart = charts.chart(rng, size=SIZE)
    marks = zip(chart.categories, chart.values[0], strict=True)
    if len(charts.questions(chart)) == len(charts.QUESTIONS):
        said = ", ".join(f"{name} {charts.number_text(value)}" for name, value in marks)
    else:
        said = ", ".join(name for name, _ in marks)
    asked = [charts.ask(chart, rng, kind=_weighted(rng, CHARTED)) for _ in range(turns)]
    found = _different(asked, f"{chart.kind} chart: {said}", rng)
    return Lesson(charts.render(chart, SIZE), found, lambda: map_letters(charts.letters(chart, SIZE)))


def of_line(rng: np.random.Generator) -> Lesson:
    page = documents.line(rng, size=SIZE)
    asked = documents.ask(page, rng)
    assert asked is not None
    found = (DESCRIBE[0], f"text: {asked.answer}") if rng.random() < 0.1 else (asked.question, asked.answer)
    return Lesson(documents.render(page, SIZE), [found], lambda: map_letters(documents.letters(page)))


def _different(asked: Sequence[Asked | None], described: str, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Each question once; the description comes last, so that none can be answered from it."""
    found = list(dict.fromkeys((one.question, one.answer) for one in asked if one is not None))
    if not found or rng.random() < DESCRIBED:
        found.append((DESCRIBE[rng.integers(len(DESCRIBE))], described))
    return found


# ---- what the patches show


def map_scene(scene: shapes.Scene) -> dict[str, list[str]]:
    """For each patch the shape and colour of what lies on its centre; and at the middle of each object its shape."""
    side = SIZE // PATCH
    maps = {name: [NOTHING] * PATCHES for name in MAPS[:3]}
    for thing in scene.things:
        row, column = (min(int(at * side), side - 1) for at in (thing.y, thing.x))
        maps["middle"][row * side + column] = thing.shape
        left, top, right, bottom = (edge / PATCH for edge in thing.box(SIZE))
        for row in range(max(round(top), 0), min(round(bottom), side)):
            for column in range(max(round(left), 0), min(round(right), side)):
                maps["shape"][row * side + column] = thing.shape
                maps["colour"][row * side + column] = thing.colour
    return maps


def map_letters(letters: Sequence[tuple[str, float, float]]) -> dict[str, list[str]]:
    """For each patch the first and second letter whose middle lies in it, and what is read next after them.

    ``letters`` are in reading order with x and y of their middles; a blank lies nowhere, but can be next.
    """
    side = SIZE // PATCH
    found: list[list[tuple[str, str]]] = [[] for _ in range(PATCHES)]
    for (letter, x, y), (after, _, _) in zip(letters, [*letters[1:], (" ", 0.0, 0.0)], strict=True):
        if letter != " ":
            row, column = (min(max(int(at / PATCH), 0), side - 1) for at in (y, x))
            found[row * side + column].append((letter.lower(), after.lower()))
    return {
        "letter": [patch[0][0] if patch else NOTHING for patch in found],
        "second": [patch[1][0] if len(patch) > 1 else NOTHING for patch in found],
        "next": [patch[-1][1] if patch else NOTHING for patch in found],
    }


# ---- to learn from


def with_noise(question: str, rng: np.random.Generator, share: float) -> str:
    """Now and then words that do not belong there: questions come in other words than those of training."""
    if rng.random() > share:
        return question
    words = question.split()
    for _ in range(int(rng.integers(1, 5))):
        words.insert(int(rng.integers(len(words) + 1)), documents.WORDS[rng.integers(len(documents.WORDS))])
    return " ".join(words)


def pixels_of(lessons: Sequence[Lesson]) -> Float[Tensor, "lessons 3 size size"]:
    return IMAGES.normalise(torch.from_numpy(np.stack([lesson.pixels for lesson in lessons])).permute(0, 3, 1, 2))


def collate(lessons: Sequence[Lesson], rng: np.random.Generator, *, noise: float = 0.12) -> Batch:
    """Rows of a picture with what is asked about it, as the chat template writes them.

    ``noise`` is how many of the questions hold words that mean nothing here.
    """
    image, ask, end = (_control(name) for name in ("<|image|>", "<|im_start|>", "<|im_end|>"))
    rows: list[list[int]] = []
    labels: list[list[int]] = []
    for lesson in lessons:
        row, label = [image] * PATCHES, [IGNORE] * PATCHES
        for question, answer in lesson.asked:
            q, a = _ids(with_noise(question, rng, noise)), _ids(answer)
            row += [*q, ask, *a, end]
            label += [*[IGNORE] * (len(q) + 1), *a, end]
        rows.append(row)
        labels.append(label)
    number = torch.arange(len(rows))
    frames = {"frames": torch.ones_like(number), "frames_row": number}
    media = {"pixels": pixels_of(lessons), "pixels_row": number, **frames}
    return Batch(text_batch(rows) | {"labels": padded(labels, fill=IGNORE)} | media)


@lru_cache(maxsize=len(MAPS))
def vocabulary(name: str) -> Int[Tensor, " words"]:
    """The ids of the words of a map, in order."""
    spelled = string.ascii_lowercase + string.digits + ".% "
    words = shapes.SHAPES if name in ("shape", "middle") else tuple(shapes.COLOURS) if name == "colour" else spelled
    return torch.tensor(sorted({_ids(word)[0] for word in [*words, NOTHING]}))


def names_of(lessons: Sequence[Lesson], rng: np.random.Generator) -> Int[Tensor, "lessons maps patches"]:
    """For each of `MAPS` the ids of the words of the patches."""
    ids = np.full((len(lessons), len(MAPS), PATCHES), IGNORE)
    empty = _ids(NOTHING)[0]
    for i, lesson in enumerate(lessons):
        for name, words in lesson.maps().items():
            ids[i, MAPS.index(name)] = [_ids(word)[0] for word in words]
    ids[(ids == empty) & (rng.random(ids.shape) > EMPTY)] = IGNORE
    return torch.from_numpy(ids)


def look(lessons: Sequence[Lesson], rng: np.random.Generator) -> Batch:
    """Pictures to name the patches of."""
    return Batch(pixels=pixels_of(lessons), names=names_of(lessons, rng))


def both(lessons: Sequence[Lesson], rng: np.random.Generator) -> Batch:
    """What is asked about pictures, more of it in strange words, and the names of their patches."""
    return Batch(collate(lessons, rng, noise=0.5) | {"names": names_of(lessons, rng)})


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
