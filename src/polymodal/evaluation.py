"""The tasks by name, and the card of a model for one of them: what `polymodal evaluate` does.

Official tasks are read from the user's files; worlds are drawn, with the words, fonts, styles and pairs of colour and
shape that training never sees. Answers come from the engine, and stay in a file as they come.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
from PIL import Image as PILImage

from polymodal.asking import ask, engine_of, seen, submit
from polymodal.core.errors import DataError, MediaError, UnsupportedError, did_you_mean
from polymodal.core.files import atomic_write
from polymodal.core.sample import Image, Sample
from polymodal.data.worlds import charts, documents, questions, shapes
from polymodal.data.worlds.asked import Asked
from polymodal.evaluate.card import Card, evaluate
from polymodal.evaluate.parsers import NUMBER, SHORT, YES_NO, Parser
from polymodal.evaluate.tasks import (
    CHARACTERS,
    EXACT,
    RELAXED,
    Answers,
    Item,
    Metric,
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
from polymodal.samplers.autoregressive import Settings
from polymodal.serve.engine import Engine, Handle
from polymodal.systems.base import System

DRAWN: Final = 500  # questions of a world if it is not said how many
SIDES: Final = (56, 448)  # in pixels: the smallest and the largest pictures of a world
BATCH: Final = 16

Draw: TypeAlias = Callable[[np.random.Generator, str, int], tuple[np.ndarray, Asked | None]]


@dataclass(frozen=True, kw_only=True)
class Official:
    """A task of the user's files.

    Attributes:
        data: what the files are, in order; of the last there may be several where "..." stands behind it.
        make: takes the files and the folder of pictures.
        max_tokens: of an answer.
    """

    asks: str
    metric: str
    data: tuple[str, ...]
    make: Callable[[Sequence[Path], Path], Task]
    max_tokens: int = 32

    @property
    def measure(self) -> str:
        """What its answers are judged by."""
        return self.metric

    @property
    def wants(self) -> str:
        """What a user has to give."""
        return f"--data {' '.join(self.data)} --images DIR"

    def task(self, name: str, data: Sequence[Path], images: Path | None) -> Task:
        """The task of these files.

        Raises:
            DataError: they are not what the task wants, or pictures are missing.
        """
        named = [each for each in self.data if each != "..."]
        if len(data) < len(named) or (len(data) > len(named) and "..." not in self.data) or images is None:
            given = ", ".join([*map(str, data), *([f"--images {images}"] if images is not None else [])]) or "nothing"
            raise DataError(f"{name} wants {self.wants}; given: {given}")
        if not images.is_dir():
            raise DataError(f"{images} is no folder of pictures")
        return self.make(data, images)


@dataclass(frozen=True, kw_only=True)
class World:
    """A task of pictures that are drawn.

    Attributes:
        kinds: of questions, which come in turn.
        draw: a picture of so many pixels a side and a question of this kind; None where the picture allows none.
    """

    asks: str
    metric: Metric
    kinds: tuple[str, ...]
    draw: Draw
    parsers: Mapping[str, Parser] = field(default_factory=dict)
    parser: Parser = SHORT
    needs: str = ""
    max_tokens: int = 32

    @property
    def measure(self) -> str:
        """What its answers are judged by."""
        return self.metric.name

    @property
    def wants(self) -> str:
        """What a user has to give."""
        return f"nothing: it is drawn{self.needs}"

    def task(self, name: str, side: int, count: int, seed: int) -> Task:
        """So many questions about new pictures."""
        items = [self._item(kind, side, [seed, i]) for i, kind in zip(range(count), _around(self.kinds), strict=False)]
        parsers = {kind: parser for kind, parser in self.parsers.items() if kind in {item.kind for item in items}}
        title = f"{name} at {side} px [{count}, seed {seed}]"
        return world_task(title, items, metric=self.metric, parser=self.parser, parsers=parsers)

    def _item(self, kind: str, side: int, seed: Sequence[int]) -> Item:
        rng = np.random.default_rng(seed)
        while True:
            pixels, asked = self.draw(rng, kind, side)
            if asked is not None:
                picture = Image(PILImage.fromarray(pixels), name=f"{kind} {seed[1]}")
                return Item.of(picture, asked.question, asked.answer, kind=kind)


def _around(kinds: Sequence[str]) -> Iterator[str]:
    while True:
        yield from kinds


def _scene(rng: np.random.Generator, kind: str, side: int) -> tuple[np.ndarray, Asked | None]:
    scene, asked = questions.pose(rng, kind=kind, held_out=True, reworded=True)
    return shapes.render(scene, side), asked


def _chart(rng: np.random.Generator, kind: str, side: int) -> tuple[np.ndarray, Asked | None]:
    chart = charts.chart(rng, size=side, held_out=True)
    return charts.render(chart, side), charts.ask(chart, rng, kind=kind, reworded=True)


def _page(rng: np.random.Generator, kind: str, side: int) -> tuple[np.ndarray, Asked | None]:
    # Pages have no room below a size: there, all is laid out larger and shown smaller, as a model would see a page.
    size = max(side, documents.MIN_LINE_SIZE if kind == "read" else documents.MIN_SIZE)
    page = (documents.line if kind == "read" else documents.page)(rng, size=size, held_out=True)
    return documents.render(page, side), documents.ask(page, rng, kind=kind, reworded=True)


def _chair(data: Sequence[Path], images: Path) -> Task:
    captions, instances, synonyms = data
    return coco_chair(captions, instances, images, read_synonyms(synonyms))


LOWER_CASE: Final = Parser("short answer in lower case/1", lambda said, options: (SHORT(said) or "").lower() or None)

TASKS: Final[Mapping[str, Official | World]] = {
    "pope": Official(
        asks="is this object in the picture?", metric="accuracy, F1, share of yes", data=("QUESTIONS.json",),
        make=lambda data, images: pope(data[0], images),
    ),
    "vqa": Official(
        asks="questions that ten people answered (VQA v2)", metric="VQA accuracy",
        data=("QUESTIONS.json", "ANNOTATIONS.json"), make=lambda data, images: vqa(data[0], data[1], images),
    ),
    "chartqa": Official(
        asks="questions about charts (ChartQA)", metric="relaxed accuracy (5 %)", data=("TEST.json", "..."),
        make=chartqa,
    ),
    "docvqa": Official(
        asks="questions about documents (DocVQA, InfographicVQA)", metric="ANLS", data=("QUESTIONS.json",),
        make=lambda data, images: docvqa(data[0], images),
    ),
    "captions": Official(
        asks="a sentence about the picture (COCO)", metric="CIDEr-D", data=("CAPTIONS.json",), max_tokens=64,
        make=lambda data, images: coco_captions(data[0], images),
    ),
    "chair": Official(
        asks="the same: does it name what is not there?", metric="CHAIR, less is better",
        data=("CAPTIONS.json", "INSTANCES.json", "SYNONYMS.txt"), make=_chair, max_tokens=64,
    ),
    "questions": World(
        asks="scenes of shapes: " + ", ".join(questions.KINDS), metric=EXACT, kinds=questions.KINDS, draw=_scene,
        parsers={**dict.fromkeys(("existence", "relation", "comparison"), YES_NO), "count": NUMBER},
    ),
    "charts": World(
        asks="charts of made-up numbers: " + ", ".join(charts.QUESTIONS), metric=RELAXED, kinds=charts.QUESTIONS,
        draw=_chart, parsers=dict.fromkeys(("value", "difference", "sum", "count"), NUMBER), needs=" (with matplotlib)",
    ),
    "documents": World(
        asks="words and pages of text: " + ", ".join(documents.QUESTIONS), metric=CHARACTERS, kinds=documents.QUESTIONS,
        draw=_page, parser=LOWER_CASE, needs=" (in fonts of this machine)",
    ),
}  # fmt: skip


def task_of(
    name: str, *, data: Sequence[Path] = (), images: Path | None = None, limit: int | None = None, seed: int = 0,
    side: int = 224,
) -> Task:  # fmt: skip
    """A task by its name.

    Args:
        data: the official files.
        images: the folder of their pictures.
        limit: so many of the questions, drawn with the seed; of a world, so many are drawn.
        seed: also of what a world draws.
        side: of the pictures of a world, in pixels.

    Raises:
        DataError: no task has this name, it is not made of these files, or the seed is negative.
    """
    if seed < 0:
        raise DataError(f"a seed is 0 or more, not {seed}")
    if name not in TASKS:
        raise DataError(f"no task is called {name!r}{did_you_mean(name, TASKS)}")
    entry = TASKS[name]
    if isinstance(entry, Official):
        made = entry.task(name, data, images)
        return made if limit is None else made.part(limit, seed=seed)
    if data or images is not None:
        raise DataError(f"{name} takes no files: its pictures are drawn")
    return entry.task(name, side, DRAWN if limit is None else limit, seed)


def side_of(model: System) -> int:
    """Pictures of a world are as large as the model sees pictures: it is not asked to read what it cannot see."""
    try:
        shown, _ = seen(model, Image(PILImage.new("RGB", (224, 224))))
    except UnsupportedError:
        return 224
    return min(max(*shown[0].size, SIDES[0]), SIDES[1])


def run(
    model: System,
    name: str,
    task: Task,
    *,
    out: Path,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Card, Path]:
    """Asks a model the questions of a task, with pictures, blind and with others' pictures; writes the card.

    Args:
        model: answers greedily.
        name: of the task.
        task: its questions, of `task_of`.
        out: a folder for the card (``.md`` and ``.json``) and the answers (``.jsonl``); what these hold is not asked
            again.
        seed: of the shuffled pictures, the bootstrap and the examples.
        progress: is told how many of how many questions are answered.

    Returns:
        The card and its page.

    Raises:
        DataError: the folder holds answers of another model.
        UnsupportedError: the model writes no text.
        MediaError: a picture cannot be read, or a question is longer than the context.
    """
    settings = Settings(max_new_tokens=TASKS[name].max_tokens)
    with engine_of(model) as engine:
        card = evaluate(
            _answers(engine, model, settings), task, model=f"{_called(model)} ({model.fingerprint})", seed=seed,
            settings={"max_new_tokens": settings.max_new_tokens, "dtype": _dtype(model)}, batch_size=BATCH,
            resume=out / f"{name}.answers.jsonl", progress=progress,
        )  # fmt: skip
    page = out / f"{_stem(name, task)}.md"
    atomic_write(page.with_suffix(".json"), card.to_json() + "\n")
    atomic_write(page, card.to_markdown())
    return card, page


def _answers(engine: Engine, model: System, settings: Settings) -> Answers:
    def submitted(sample: Sample) -> Handle | None:
        try:
            return submit(engine, model, sample, settings)
        except MediaError:  # perhaps it is only larger than what the engine shares out; if not, `ask` tells the same
            return None

    def answer(samples: Sequence[Sample]) -> list[str]:
        handles = [submitted(sample) for sample in samples]
        texts = [None if handle is None else handle.result()[0].text for handle in handles]
        # The engine is idle now: what is too large for it has the model to itself.
        return [ask(model, s, settings) if text is None else text for s, text in zip(samples, texts, strict=True)]

    return answer


def _dtype(model: System) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def _called(model: System) -> str:
    return Path(model.source).name if Path(model.source).is_dir() else model.source


def _stem(name: str, task: Task) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", task.name.lower()).strip("-")
    return words if name in words.split("-") else f"{name}-{words}"
