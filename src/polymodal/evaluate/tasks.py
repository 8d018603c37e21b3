"""What a model is asked and how its answers are judged: tasks, their metrics, and readers of official files.

All that evaluation knows of a model is `Answers`: samples in, texts out.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Final, TypeAlias

from polymodal.core.errors import ConfigError, DataError
from polymodal.core.files import read_json
from polymodal.core.sample import Image, Sample
from polymodal.evaluate import text_metrics as scores
from polymodal.evaluate.parsers import POPE_OFFICIAL, SHORT, STATED, VERBATIM, YES_NO, Parser

Answers: TypeAlias = Callable[[Sequence[Sample]], Sequence[str]]
"""Answers a batch of samples, each of pictures and a question, with one text each, in order."""

WORD_OR_PHRASE: Final = "{question}\nAnswer the question using a single word or phrase."
SINGLE_WORD: Final = "{question}\nAnswer the question with a single word."
DESCRIBE: Final = "Describe this picture in one sentence."


# ---- metrics ----


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One score an answer, and numbers of all of them together; None where a number is undefined."""

    each: list[float]
    details: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """Judges parsed answers (None where unparsed) by their references.

    ``best`` may be the smaller of the two ends. ``references`` is the least number that a question needs.
    """

    name: str
    judge: Callable[[Sequence[str | None], Sequence[Sequence[str]]], Scores]
    worst: float = 0.0
    best: float = 1.0
    references: int = 1

    @property
    def bounds(self) -> tuple[float, float]:
        return min(self.worst, self.best), max(self.worst, self.best)

    def goodness(self, score: float) -> float:
        """The score as a share of the way from worst to best."""
        return (score - self.worst) / (self.best - self.worst)


def _one_by_one(
    score: Callable[[str, Sequence[str]], float], **others: Callable[[str, Sequence[str]], float]
) -> Callable[[Sequence[str | None], Sequence[Sequence[str]]], Scores]:
    """Judges each answer alone; unparsed is 0. ``others`` become details by their names."""

    def each(
        one: Callable[[str, Sequence[str]], float], answers: Sequence[str | None], truths: Sequence[Sequence[str]]
    ) -> list[float]:
        return [0.0 if said is None else one(said, truth) for said, truth in zip(answers, truths, strict=True)]

    def judge(answers: Sequence[str | None], truths: Sequence[Sequence[str]]) -> Scores:
        details = {name.replace("_", " "): _mean(each(one, answers, truths)) for name, one in others.items()}
        return Scores(each=each(score, answers, truths), details=dict(details))

    return judge


def _mean(values: Sequence[float | int]) -> float:
    return sum(values) / len(values)


def _judge_yes_no(answers: Sequence[str | None], truths: Sequence[Sequence[str]]) -> Scores:
    labels = [truth[0] for truth in truths]
    found = scores.yes_no_scores(answers, labels)
    return Scores(
        each=[float(said == label) for said, label in zip(answers, labels, strict=True)],
        details={
            "precision": found.precision,
            "recall": found.recall,
            "F1": found.f1,
            "yes ratio": found.yes_ratio,
            "yes ratio of the labels": _mean([label == "yes" for label in labels]),
        },
    )


def _judge_characters(answers: Sequence[str | None], truths: Sequence[Sequence[str]]) -> Scores:
    said = [answer or "" for answer in answers]
    pairs = [
        min((scores.character_edits(text, truth) for truth in many), key=lambda pair: pair[0] / max(1, pair[1]))
        for text, many in zip(said, truths, strict=True)
    ]
    length = sum(pair[1] for pair in pairs)
    return Scores(
        each=[scores.character_accuracy(text, many) for text, many in zip(said, truths, strict=True)],
        details={
            "character error rate": sum(pair[0] for pair in pairs) / length if length else None,
            "read without an error": _mean([pair[0] == 0 for pair in pairs]),
        },
    )


def _judge_cider(answers: Sequence[str | None], truths: Sequence[Sequence[str]]) -> Scores:
    said = [answer or "" for answer in answers]
    return Scores(
        each=scores.cider_d(said, truths), details={"mean words": _mean([len(scores.tokenise(s)) for s in said])}
    )


EXACT: Final = Metric(name="exact match", judge=_one_by_one(scores.exact_match))
YES_OR_NO: Final = Metric(name="accuracy (positive: yes)", judge=_judge_yes_no)
VQA: Final = Metric(name="VQA accuracy", judge=_one_by_one(scores.vqa_accuracy), references=2)
ANLS: Final = Metric(name="ANLS", judge=_one_by_one(scores.anls, exact_match=scores.exact_match))
RELAXED: Final = Metric(
    name="relaxed accuracy (5 %)",
    judge=_one_by_one(
        scores.relaxed_accuracy, strict_years=scores.relaxed_strict_years, lenient_numbers=scores.relaxed_lenient
    ),
)
CHARACTERS: Final = Metric(name="character accuracy", judge=_judge_characters)
CIDER_D: Final = Metric(name="CIDEr-D", judge=_judge_cider, best=10.0)


def chair_metric(words: scores.ObjectWords) -> Metric:
    """CHAIR_s, where less is better; references are the objects that a picture shows, of which there may be none."""

    def judge(answers: Sequence[str | None], truths: Sequence[Sequence[str]]) -> Scores:
        found = scores.chair([answer or "" for answer in answers], truths, words)
        return Scores(
            each=[float(wrong) for wrong in found.hallucinated],
            details={
                "CHAIR_i": found.instances,
                "object recall": found.recall,
                "object mentions": float(found.mentions),
                "mean words": found.mean_words,
            },
        )

    return Metric(name="CHAIR_s", judge=judge, worst=1.0, best=0.0, references=0)


# ---- tasks ----


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question.

    Args:
        sample: pictures and the question as the model gets them.
        references: what is right; what several of them mean is the metric's matter.
        kind: scores are also given for each kind.
        options: of a choice, in the order of their letters; they stand in the question too. ``("yes", "no")`` of a
            yes/no question. With them, the score of guessing is known.
        id: what the official file calls it.
    """

    sample: Sample
    references: tuple[str, ...]
    kind: str = ""
    options: tuple[str, ...] = ()
    id: str = ""

    def __post_init__(self) -> None:
        if not any(part.text.strip() for part in self.sample.texts):
            raise DataError(f"item {self.id or self.kind or '?'}: there is no question, so no run without pictures")

    @classmethod
    def of(cls, picture: Any, question: str, *answers: Any, kind: str = "", options: Sequence[str] = ()) -> Item:
        """An item of a picture (or a list of them), a question and its answers, which are texts.

        Raises:
            DataError: the question is empty, or an answer is no text.
            MediaError: the picture is nothing that a sample takes.
        """
        if not all(isinstance(answer, str) for answer in answers):
            raise DataError(f"{question!r}: answers are texts, not {answers}; write a number as str(number)")
        pictures = picture if isinstance(picture, list | tuple) else [picture]
        return cls(sample=Sample.of([*pictures, question]), references=answers, kind=kind, options=tuple(options))


@dataclass(frozen=True, kw_only=True)
class Task:
    """Questions, how their answers are read and how they are judged.

    Args:
        parser: reads the answers; ``parsers`` replaces it for some kinds.
        also: other ways to read them, whose scores stand beside the main one.
        prompt: how the question was put, for the card.
    """

    name: str
    items: tuple[Item, ...]
    metric: Metric
    parser: Parser
    parsers: Mapping[str, Parser] = field(default_factory=dict)
    also: tuple[Parser, ...] = ()
    prompt: str = "{question}"

    def __post_init__(self) -> None:
        if not self.items:
            raise DataError(f"{self.name}: there are no questions")
        for i, item in enumerate(self.items):
            if len(item.references) < self.metric.references:
                raise DataError(
                    f"{self.name}: question {item.id or i} has {len(item.references)} references, and "
                    f"{self.metric.name} needs at least {self.metric.references}"
                )
        if unknown := self.parsers.keys() - {item.kind for item in self.items}:
            raise DataError(f"{self.name}: a parser is given for the kind {min(unknown)!r}, which no question has")

    def reader(self, item: Item) -> Parser:
        return self.parsers.get(item.kind, self.parser)

    def part(self, n: int, *, seed: int = 0) -> Task:
        """At most ``n`` of the questions, drawn with the seed, in their order; the name says so.

        Raises:
            DataError: ``n`` is not positive.
        """
        if n < 1:
            raise DataError(f"{n} questions are no part of {self.name}")
        if n >= len(self.items):
            return self
        kept = sorted(random.Random(seed).sample(range(len(self.items)), n))
        items = tuple(self.items[i] for i in kept)
        kinds = {item.kind for item in items}
        return replace(
            self,
            name=f"{self.name}[{n} of {len(self.items)}, seed {seed}]",
            items=items,
            parsers={kind: parser for kind, parser in self.parsers.items() if kind in kinds},
        )


def world_task(
    name: str,
    items: Iterable[Item | tuple[Any, str, str]],
    *,
    metric: Metric = EXACT,
    parser: Parser = SHORT,
    parsers: Mapping[str, Parser] | None = None,
    also: tuple[Parser, ...] = (),
) -> Task:
    """A task of made-up pictures with one right answer: items, or triples (picture, question, answer).

    Raises:
        DataError: there are none, or a parser reads a right answer as something else.
    """
    made = tuple(item if isinstance(item, Item) else Item.of(*item) for item in items)
    task = Task(name=name, items=made, metric=metric, parser=parser, parsers=parsers or {}, also=also)
    for item in task.items:
        for reference in item.references:
            read = task.reader(item)(reference, item.options)
            if read is None or not scores.exact_match(read, [reference]):
                raise DataError(
                    f"{name}: the right answer {reference!r} of the kind {item.kind!r} is read as {read!r} by "
                    f"{task.reader(item).name!r}; choose the parser that fits the kind"
                )
    return task


# ---- official files ----


def pope(path: str | Path, images: str | Path, *, prompt: str = WORD_OR_PHRASE) -> Task:
    """POPE: JSON lines of ``image``, ``text``, ``label`` (yes or no), and perhaps ``question_id`` and ``category``.

    Deviation: answers are read by `YES_NO`; the score of the official reading stands beside it.

    Source: https://github.com/RUCAIBox/POPE

    Raises:
        DataError: the file is not that, or pictures are missing from the folder ``images``.
    """
    pictures = _Pictures(path, images)
    items: list[Item] = []
    for where, row in _lines(path):
        label = _get(row, "label", str, where).strip().lower()
        if label not in {"yes", "no"}:
            raise DataError(f"{where}: the label {label!r} is neither yes nor no")
        question = _get(row, "text", str, where)
        items.append(
            Item(
                sample=_asked(pictures(_get(row, "image", str, where), where), question, prompt, where),
                references=(label,),
                kind=_get(row, "category", str, where, default=""),
                options=("yes", "no"),
                id=str(row.get("question_id", len(items) + 1)),
            )
        )
    pictures.check()
    return Task(
        name=Path(path).stem,
        items=_some(items, path),
        metric=YES_OR_NO,
        parser=YES_NO,
        also=(POPE_OFFICIAL,),
        prompt=prompt,
    )


def vqa(
    questions: str | Path,
    annotations: str | Path,
    images: str | Path,
    *,
    prompt: str = WORD_OR_PHRASE,
    pattern: str = "COCO_{subtype}_{image_id:012d}.jpg",
) -> Task:
    """VQA v2: a questions file and its annotations file, with ten answers a question; kinds are the answer types.

    Args:
        pattern: the name of a picture; ``{subtype}`` is the questions file's ``data_subtype``, e.g. val2014.

    Source: https://visualqa.org/vqa_v1_download.html

    Raises:
        DataError: the files are not that or do not belong together, or pictures are missing.
    """
    asked = _document(questions, "questions")
    truths: dict[int, tuple[str, dict[str, Any]]] = {}
    for where, row in _rows(_document(annotations, "annotations")["annotations"], f"{annotations}: annotations"):
        truths[_get(row, "question_id", int, where)] = (where, row)
    pictures = _Pictures(questions, images)
    items: list[Item] = []
    for where, row in _rows(asked["questions"], f"{questions}: questions"):
        number, image_id = (_get(row, key, int, where) for key in ("question_id", "image_id"))
        if number not in truths:
            raise DataError(f"{where}: question {number} has no annotation in {annotations}; take both of one split")
        there, truth = truths[number]
        people = [
            _get(each, "answer", str, place)
            for place, each in _rows(_get(truth, "answers", list, there), f"{there}.answers")
        ]
        if len(people) != 10:
            raise DataError(f"{there}: {len(people)} answers; VQA accuracy is over the answers of ten people")
        try:
            name = pattern.format(subtype=asked.get("data_subtype", ""), image_id=image_id)
        except (KeyError, IndexError, ValueError) as error:
            raise DataError(f"the pattern {pattern!r} of picture names takes {{subtype}} and {{image_id}}") from error
        items.append(
            Item(
                sample=_asked(pictures(name, where), _get(row, "question", str, where), prompt, where),
                references=tuple(people),
                kind=_get(truth, "answer_type", str, there, default=""),
                id=str(number),
            )
        )
    pictures.check()
    return Task(
        name=Path(questions).stem,
        items=_some(items, questions),
        metric=VQA,
        parser=SHORT,
        also=(STATED,),
        prompt=prompt,
    )


def chartqa(paths: str | Path | Sequence[str | Path], images: str | Path, *, prompt: str = SINGLE_WORD) -> Task:
    """ChartQA: lists of ``imgname``, ``query`` and ``label`` (a text, or a list of one); each file is a kind.

    Source: https://github.com/vis-nlp/ChartQA

    Raises:
        DataError: a file is not that, or pictures are missing from the folder ``images`` (the official one is ``png``).
    """
    files = [paths] if isinstance(paths, str | Path) else list(paths)
    items: list[Item] = []
    for path in files:
        pictures = _Pictures(path, images)
        before = len(items)
        for where, row in _rows(_json(path), str(path)):
            label = _get(row, "label", (str, list), where)
            labels = label if isinstance(label, list) else [label]
            if not labels or not all(isinstance(each, str) for each in labels):
                raise DataError(f"{where}: the label has to be a text or a list of texts")
            items.append(
                Item(
                    sample=_asked(
                        pictures(_get(row, "imgname", str, where), where), _get(row, "query", str, where), prompt, where
                    ),
                    references=tuple(labels),
                    kind=Path(path).stem,
                    id=f"{Path(path).stem} {len(items) - before}",
                )
            )
        pictures.check()
        _some(items[before:], path)
    if not files:
        raise DataError("ChartQA: no files were given; pass test_human.json and test_augmented.json")
    return Task(name="chartqa", items=tuple(items), metric=RELAXED, parser=SHORT, also=(STATED,), prompt=prompt)


def docvqa(path: str | Path, images: str | Path, *, prompt: str = WORD_OR_PHRASE) -> Task:
    """DocVQA and its kin: ``data`` as a list of ``questionId``, ``question``, ``answers`` and ``image``.

    InfographicVQA calls the picture ``image_local_name``. ``images`` is the folder that holds ``documents``, or
    ``documents`` itself.

    Source: https://www.docvqa.org

    Raises:
        DataError: the file is not that or has no answers (as test splits), or pictures are missing.
    """
    pictures = _Pictures(path, images)
    items: list[Item] = []
    for where, row in _rows(_document(path, "data")["data"], f"{path}: data"):
        if "answers" not in row:
            raise DataError(f"{where}: has no answers, as in a test split; take the validation split")
        answers = _get(row, "answers", list, where)
        if not answers or not all(isinstance(each, str) for each in answers):
            raise DataError(f"{where}: the answers have to be a list of texts, and not empty")
        key = "image_local_name" if "image_local_name" in row else "image"
        items.append(
            Item(
                sample=_asked(
                    pictures(_get(row, key, str, where), where), _get(row, "question", str, where), prompt, where
                ),
                references=tuple(answers),
                id=str(_get(row, "questionId", (int, str), where)),
            )
        )
    pictures.check()
    return Task(
        name=Path(path).stem, items=_some(items, path), metric=ANLS, parser=SHORT, also=(STATED,), prompt=prompt
    )


def coco_captions(path: str | Path, images: str | Path, *, prompt: str = DESCRIBE) -> Task:
    """COCO captions, judged by CIDEr-D: ``images`` with ``id`` and ``file_name``, ``annotations`` with ``caption``.

    Pictures without a caption are left out, as they are by the official script.

    Source: https://cocodataset.org/#format-data

    Raises:
        DataError: the file is not that, or pictures are missing.
    """
    items = _described(path, images, _captions(path), prompt)
    return Task(name=Path(path).stem, items=items, metric=CIDER_D, parser=VERBATIM, prompt=prompt)


def coco_chair(
    captions: str | Path,
    instances: str | Path,
    images: str | Path,
    synonyms: Mapping[str, str],
    *,
    prompt: str = DESCRIBE,
) -> Task:
    """COCO captions, judged by CHAIR: what a picture shows is what is annotated and what people's captions mention.

    Args:
        instances: the file of ``categories`` and ``annotations`` of objects of the same pictures.
        synonyms: word or phrase -> object; every category's name has to be among its words. `read_synonyms` reads the
            official list.

    Raises:
        DataError: a file is not that, a category is unknown to ``synonyms``, or pictures are missing.
    """
    words = scores.ObjectWords(synonyms)
    written = _captions(captions)
    content = _document(instances, "annotations", "categories")
    names: dict[int, str] = {}
    for where, row in _rows(content["categories"], f"{instances}: categories"):
        name = _get(row, "name", str, where)
        if name not in synonyms:
            raise DataError(f"{where}: no synonym list has the category {name!r}; add it as its own synonym")
        names[_get(row, "id", int, where)] = synonyms[name]
    shown = {image_id: {name for caption in many for name in words(caption)} for image_id, many in written.items()}
    for where, row in _rows(content["annotations"], f"{instances}: annotations"):
        category = _get(row, "category_id", int, where)
        if category not in names:
            raise DataError(f"{where}: the category {category} is not among the categories of the file")
        if (image_id := _get(row, "image_id", int, where)) in shown:
            shown[image_id].add(names[category])
    truths = {image_id: sorted(objects) for image_id, objects in shown.items()}
    items = _described(captions, images, truths, prompt)
    name = f"{Path(captions).stem} (CHAIR)"
    return Task(name=name, items=items, metric=chair_metric(words), parser=VERBATIM, prompt=prompt)


_ANIMALS: Final = (
    "bird",
    "cat",
    "dog",
    "horse",
    "sheep",
    "cow",
    "elephant",
    "bear",
    "zebra",
    "giraffe",
    "animal",
    "cub",
)


def read_synonyms(path: str | Path) -> dict[str, str]:
    """CHAIR's list: lines of words of one object, the first of which names it.

    The phrases that the official script has in its code are added: a baby or adult animal is the animal and no person,
    a passenger train no passenger, a toilet seat a toilet and a bow tie a tie.

    Deviation: words are stripped, so that its " motor bike", which never matched, does.

    Raises:
        DataError: the file is missing, is no text or is empty.
    """
    synonyms: dict[str, str] = {}
    for _, line in _text_lines(path):
        words = [word.strip().lower() for word in line.split(",") if word.strip()]
        synonyms.update(dict.fromkeys(words, words[0]) if words else {})
    if not synonyms:
        raise DataError(f"{path}: has no words; it should have lines such as 'dog, puppy, hound'")
    phrases = {f"{age} {animal}": animal for age in ("baby", "adult") for animal in _ANIMALS}
    phrases |= {"passenger jet": "jet", "passenger train": "train", "bow tie": "tie", "toilet seat": "toilet"}
    return {phrase: synonyms.get(word, "") for phrase, word in phrases.items()} | synonyms


# ---- reading ----


class _Pictures:
    """Finds the pictures of a file in a folder, and says at the end which are missing, all at once."""

    def __init__(self, path: str | Path, folder: str | Path) -> None:
        self.path, self.folder = path, Path(folder)
        self.missing: dict[str, str] = {}
        self.known: dict[str, Path] = {}

    def __call__(self, name: str, where: str) -> Image:
        if name not in self.known:
            pure = PurePosixPath(name)
            if not pure.name or pure.is_absolute() or ".." in pure.parts or PureWindowsPath(name).drive or "\0" in name:
                raise DataError(f"{where}: {name!r} is no name of a picture inside a folder")
            # Official files name folders of their own ("documents/a.png"); users may have given the inner one.
            places = [self.folder / pure, self.folder / pure.name]
            found = next((place for place in places if place.is_file()), None)
            if found is None:
                self.missing.setdefault(name, where)
            self.known[name] = found or places[0]
        return Image(self.known[name])

    def check(self) -> None:
        if self.missing:
            name, where = next(iter(self.missing.items()))
            raise DataError(
                f"{self.path}: {len(self.missing)} of {len(self.known)} pictures are not in {self.folder}, "
                f"the first is {name} ({where}); pass the folder that holds them"
            )


def _captions(path: str | Path) -> dict[int, list[str]]:
    written: dict[int, list[str]] = {}
    for where, row in _rows(_document(path, "images", "annotations")["annotations"], f"{path}: annotations"):
        written.setdefault(_get(row, "image_id", int, where), []).append(_get(row, "caption", str, where))
    return written


def _described(
    path: str | Path, folder: str | Path, references: Mapping[int, Sequence[str]], prompt: str
) -> tuple[Item, ...]:
    """An item for each picture of a COCO file that has references."""
    pictures = _Pictures(path, folder)
    items: list[Item] = []
    listed: set[int] = set()
    for where, row in _rows(_document(path, "images")["images"], f"{path}: images"):
        image_id = _get(row, "id", int, where)
        listed.add(image_id)
        if image_id in references:
            sample = Sample.of([pictures(_get(row, "file_name", str, where), where), prompt])
            items.append(Item(sample=sample, references=tuple(references[image_id]), id=str(image_id)))
    if strange := references.keys() - listed:
        raise DataError(f"{path}: picture {min(strange)} has a caption and is not among the images of the file")
    pictures.check()
    return _some(items, path)


def _asked(picture: Image, question: str, prompt: str, where: str) -> Sample:
    if "{question}" not in prompt:
        raise DataError(f"the prompt {prompt!r} has no place for the question: write {{question}} in it")
    if not question.strip():
        raise DataError(f"{where}: the question is empty")
    return Sample.of([picture, prompt.replace("{question}", question)])


def _some(items: Sequence[Item], path: str | Path) -> tuple[Item, ...]:
    if not items:
        raise DataError(f"{path}: has no questions")
    return tuple(items)


def _json(path: str | Path) -> Any:
    try:
        return read_json(path)
    except (ConfigError, OSError) as error:
        raise DataError(f"{error}. If it was downloaded, download it again") from None


def _document(path: str | Path, *keys: str) -> dict[str, Any]:
    """A JSON object with lists under ``keys``."""
    content = _json(path)
    for key in keys:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            held = ", ".join(sorted(content)) if isinstance(content, dict) else f"a {type(content).__name__}"
            raise DataError(f"{path}: should be an object with a list {key!r}, and has {held}; is it the right file?")
    return content


def _rows(content: Any, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a list, each with its place; JSON files have no lines to name."""
    if not isinstance(content, list):
        raise DataError(f"{where}: should be a list, not {type(content).__name__}; is it the right file?")
    for i, row in enumerate(content):
        if not isinstance(row, dict):
            raise DataError(f"{where}[{i}]: should be an object, not {type(row).__name__}")
        yield f"{where}[{i}]", row


def _text_lines(path: str | Path) -> Iterator[tuple[str, str]]:
    """The lines of a text file that are not blank, each with its place."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text ({error})") from None
    for i, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON may hold other line ends in its strings
        if line.strip():
            yield f"{path}:{i}", line


def _lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON-lines file, each with its place."""
    for where, line in _text_lines(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{where}: is not a line of JSON ({error}). If it was downloaded, download it again"
            ) from None
        if not isinstance(row, dict):
            raise DataError(f"{where}: should be an object, not {type(row).__name__}: each line is one question")
        yield where, row


_MISSING: Final = object()


def _get(row: Mapping[str, Any], key: str, kind: type | tuple[type, ...], where: str, default: Any = _MISSING) -> Any:
    value = row.get(key, default)
    if value is _MISSING:
        raise DataError(f"{where}: lacks {key!r}; it has {', '.join(sorted(row)) or 'nothing'}")
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if isinstance(value, bool) or not isinstance(value, kinds):
        wanted = " or ".join(k.__name__ for k in kinds)
        raise DataError(f"{where}: {key!r} should be {wanted}, not {type(value).__name__} ({value!r:.60})")
    return value
