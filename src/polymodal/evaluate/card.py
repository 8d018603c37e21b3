"""The evaluation card: a score with all that it takes to believe it.

Beside the run with pictures stand a blind run, in which they are left out, and one in which each question gets the
pictures of another. A model that scores alike without looking has learned the questions.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import platform
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import PIL
import torch

from polymodal import __version__
from polymodal.core.errors import DataError, MediaError
from polymodal.core.files import file_hash
from polymodal.core.sample import Audio, Image, Sample, Text, Video
from polymodal.evaluate.parsers import Parser
from polymodal.evaluate.tasks import Answers, Item, Task
from polymodal.evaluate.text_metrics import Estimate, estimate

Run: TypeAlias = Literal["true", "blind", "shuffled"]
EXAMPLES: Final = 3  # of each sort
_CLIP: Final = 200  # characters of a text in the card; the file of answers has them whole


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one run scored. Unparsed answers are in the score, as wrong."""

    score: Estimate
    unparsed: int
    details: dict[str, float | None]


@dataclass(frozen=True, kw_only=True)
class KindScore:
    """The score of the questions of one kind, with and without their pictures."""

    score: Estimate
    blind: float
    constant: float  # of the answer that is right most often for this kind
    unparsed: int
    parser: str


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The score of the same answers under another parser."""

    score: float
    unparsed: int


@dataclass(frozen=True, kw_only=True)
class Example:
    """One question and how its answer was judged."""

    question: str
    picture: str
    references: list[str]
    answer: str
    parsed: str | None
    score: float


@dataclass(frozen=True, kw_only=True)
class Card:
    """The result of `evaluate`.

    Scores run from ``worst`` to ``best``. ``parsed_only`` is the score over the answers that could be parsed (None if
    there are none); ``guessed`` credits each unparsed choice with one over its options; ``constant`` is what the most
    frequent right answer of each kind scores when it is always given; ``chance`` is the share of guessing.
    ``over_blind`` and ``over_shuffled`` are the mean gains of the same questions, positive where pictures help.
    """

    task: str
    model: str
    settings: dict[str, str | int | float]
    prompt: str
    metric: str
    worst: float
    best: float
    parser: str
    questions: int
    pictures: int
    true: Outcome
    blind: Outcome
    shuffled: Outcome | None  # None if there are not two different pictures
    over_blind: Estimate
    over_shuffled: Estimate | None
    sees: bool  # the blind score is worse than the interval of the true one, and the gain's interval is above 0
    constant: float
    chance: float | None
    guessed: float | None
    parsed_only: float | None
    readings: dict[str, Reading]
    kinds: dict[str, KindScore]
    examples: dict[str, list[Example]]  # right, wrong, unparsed
    notes: list[str]
    seed: int
    started: str
    seconds: float
    answered: int  # in this run; the rest was in the file
    versions: dict[str, str]

    @property
    def runs(self) -> list[tuple[str, Outcome, Estimate | None]]:
        """Name, outcome and what pictures gain over it, of each run that there is."""
        blind = ("blind", self.blind, self.over_blind)
        rows: list[tuple[str, Outcome, Estimate | None]] = [("with pictures", self.true, None), blind]
        return rows if self.shuffled is None else [*rows, ("other pictures", self.shuffled, self.over_shuffled)]

    @property
    def percent(self) -> bool:
        """Whether scores are shares."""
        return (self.worst, self.best) in {(0.0, 1.0), (1.0, 0.0)}

    def shown(self, e: Estimate) -> str:
        """A score or a gain with its interval, for people."""
        digits = 1 if (e.high - e.low) / abs(self.best - self.worst) < 0.1 else 0
        if self.percent:
            return f"{100 * e.value:.{digits}f} % [{100 * e.low:.{digits}f}, {100 * e.high:.{digits}f}]"
        return f"{e.value:.{digits + 1}f} [{e.low:.{digits + 1}f}, {e.high:.{digits + 1}f}]"

    def to_json(self) -> str:
        """The whole card."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False, allow_nan=False)

    def to_markdown(self) -> str:
        """A page for people."""
        return _page(self)


def evaluate(
    answers: Answers,
    task: Task,
    *,
    model: str,
    settings: Mapping[str, str | int | float] | None = None,
    seed: int = 0,
    batch_size: int = 16,
    resume: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Card:
    """Asks a model all questions of a task three times - true, blind, shuffled - and judges its answers.

    A question that is asked twice about the same pictures is answered once.

    Args:
        answers: answers a batch of samples; in the blind run they hold no pictures.
        task: what to ask.
        model: its name and what pins its weights, for the card.
        settings: what else decides answers (the longest answer, the temperature, the dtype), for the card.
        seed: of which picture a question gets in the shuffled run, of the bootstrap and of the examples.
        batch_size: how many samples ``answers`` gets at once.
        resume: a file of JSON lines to which answers are added as they come; what it already holds is not asked again.
        progress: is told how many of how many questions are answered.

    Raises:
        DataError: the task and its metric do not fit, the model gave something else than a text for each sample, or the
            file holds another model's answers.
        MediaError: a picture cannot be read.
    """
    if batch_size < 1:
        raise DataError(f"a batch size of {batch_size} answers nothing: give at least 1")
    began, started = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
    items, metric, options = task.items, task.metric, dict(settings or {})
    # Judged first: a task whose references its metric refuses fails here, and not after hours of answers.
    usual = _most_frequent(items)
    constant = metric.judge([usual[item.kind] for item in items], [item.references for item in items]).each

    hashes = _Hashes()
    seen = [tuple(hashes(part) for part in _media(item.sample)) for item in items]
    asked = _runs(items, seen, seed)
    keys = {run: {i: _key(sample, run, hashes) for i, sample in samples.items()} for run, samples in asked.items()}
    # What is asked about the same media stands together, whatever the run: they go through their tower once.
    places = {media: place for place, media in enumerate(dict.fromkeys(seen))}

    def place(sample: Sample) -> int:
        return places.get(tuple(hashes(part) for part in _media(sample)), len(places))

    every = [(keys[run][i], sample) for run, samples in asked.items() for i, sample in samples.items()]
    every.sort(key=lambda pair: place(pair[1]))
    wanted = dict(every)
    with _Store(resume, model=model, settings=options) as store:
        todo = [key for key in wanted if key not in store.answers]
        done = len(wanted) - len(todo)
        if progress:
            progress(done, len(wanted))
        for start in range(0, len(todo), batch_size):
            batch = todo[start : start + batch_size]
            store.add(batch, _checked(answers([wanted[key] for key in batch]), len(batch)))
            if progress:
                progress(done + start + len(batch), len(wanted))

    def judge(run: Run) -> _Judged:
        said = {i: store.answers[key] for i, key in keys[run].items()}
        return _Judged(task, said, {i: task.reader(items[i]) for i in said})

    def sure(scores: Sequence[float], which: Sequence[int], span: tuple[float, float] = metric.bounds) -> Estimate:
        return estimate(scores, groups=[seen[i] or i for i in which], bounds=span, seed=seed)

    def outcome(of: _Judged) -> Outcome:
        return Outcome(score=sure(list(of.scores.values()), list(of.scores)), unparsed=of.unparsed, details=of.details)

    def gain(over: _Judged) -> Estimate:
        span = abs(metric.best - metric.worst)
        sign = 1 if metric.best > metric.worst else -1
        return sure(
            [sign * (true.scores[i] - score) for i, score in over.scores.items()], list(over.scores), (-span, span)
        )

    true, blind = judge("true"), judge("blind")
    shuffled = judge("shuffled") if asked["shuffled"] else None
    kinds = {}
    for kind in dict.fromkeys(item.kind for item in items):
        which = [i for i, item in enumerate(items) if item.kind == kind]
        kinds[kind] = KindScore(
            score=sure([true.scores[i] for i in which], which),
            blind=_mean([blind.scores[i] for i in which]),
            constant=_mean([constant[i] for i in which]),
            unparsed=sum(true.parsed[i] is None for i in which),
            parser=task.reader(items[which[0]]).name,
        )
    readings = {}
    for parser in task.also:
        other = _Judged(task, true.said, dict.fromkeys(true.said, parser))
        readings[parser.name] = Reading(score=_mean(list(other.scores.values())), unparsed=other.unparsed)
    read = [score for i, score in true.scores.items() if true.parsed[i] is not None]
    choices = [len(item.options) for item in items if item.options]
    guessable = len(choices) == len(items)
    score, unseen, over_blind = outcome(true), outcome(blind), gain(blind)
    edge = score.score.low if metric.best > metric.worst else score.score.high
    card = Card(
        task=task.name,
        model=model,
        settings=options,
        prompt=task.prompt,
        metric=metric.name,
        worst=metric.worst,
        best=metric.best,
        parser=" · ".join(dict.fromkeys(task.reader(item).name for item in items)),
        questions=len(items),
        pictures=len(set(seen) - {()}),
        true=score,
        blind=unseen,
        shuffled=outcome(shuffled) if shuffled else None,
        over_blind=over_blind,
        over_shuffled=gain(shuffled) if shuffled else None,
        sees=metric.goodness(unseen.score.value) < metric.goodness(edge) and over_blind.low > 0,
        constant=_mean(constant),
        chance=_mean([1 / n for n in choices]) if guessable else None,
        guessed=_mean([1 / n if true.parsed[i] is None else true.scores[i] for i, n in enumerate(choices)])
        if guessable
        else None,
        parsed_only=_mean(read) if read else None,
        readings=readings,
        kinds=kinds if len(kinds) > 1 else {},
        examples=_examples(true, seed),
        notes=[],
        seed=seed,
        started=started,
        seconds=round(time.perf_counter() - began, 3),
        answered=len(todo),
        versions={
            "polymodal": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
        },
    )
    return dataclasses.replace(card, notes=_notes(card))


class _Judged:
    """The answers of one run as they were read and scored, by the number of the question."""

    def __init__(self, task: Task, said: Mapping[int, str], parsers: Mapping[int, Parser]) -> None:
        self.task, self.said = task, said
        self.parsed = {i: parsers[i](text, task.items[i].options) for i, text in said.items()}
        judged = task.metric.judge(list(self.parsed.values()), [task.items[i].references for i in said])
        self.scores = dict(zip(said, judged.each, strict=True))
        self.details = judged.details
        self.unparsed = sum(text is None for text in self.parsed.values())


def _mean(values: Sequence[float | int]) -> float:
    return sum(values) / len(values)


def _most_frequent(items: Sequence[Item]) -> dict[str, str | None]:
    """The reference that occurs most often in each kind; the first of equals."""
    counts: dict[str, Counter[str]] = {}
    for item in items:
        counts.setdefault(item.kind, Counter()).update(item.references)
    return {kind: count.most_common(1)[0][0] if count else None for kind, count in counts.items()}


def _checked(given: Any, wanted: int) -> Sequence[str]:
    if isinstance(given, str) or len(given) != wanted or not all(isinstance(text, str) for text in given):
        what = (
            f"{len(given)} of {sorted({type(g).__name__ for g in given})}" if not isinstance(given, str) else "one text"
        )
        raise DataError(f"the model was asked {wanted} questions and gave {what}: it has to give one text for each")
    return given


# ---- pictures and clips ----


def _media(sample: Sample) -> list[Image | Video | Audio]:
    return [part for part in sample.parts if not isinstance(part, Text)]


class _Hashes:
    """SHA-256 of media: of the bytes of a file, of the pixels or samples of everything else."""

    def __init__(self) -> None:
        self._files: dict[Path, str] = {}

    def __call__(self, part: Image | Video | Audio) -> str:
        if isinstance(part, Audio):
            return f"audio {self._hash(part)} {part.start} {part.end} {part.rate}"
        if isinstance(part, Video):
            return f"video {self._hash(part)} {part.start} {part.end} {part.fps}"
        return f"image {self._hash(part)}"

    def _hash(self, part: Image | Video | Audio) -> str:
        source = part.source
        if isinstance(source, str | Path):
            path = Path(source)
            if path not in self._files:
                try:
                    self._files[path] = file_hash(path)
                except OSError as error:
                    raise MediaError(f"{part.where}: cannot be read ({error.strerror or error})") from None
            return self._files[path]
        if isinstance(source, bytes | bytearray):
            return hashlib.sha256(source).hexdigest()
        try:
            pixels = np.asarray(source)
        except Exception as error:  # a broken picture raises whatever its decoder does
            raise MediaError(f"{part.where}: cannot be read ({error})") from error
        head = f"{getattr(source, 'mode', 'array')} {pixels.dtype} {pixels.shape}\n".encode()
        return hashlib.sha256(head + pixels.tobytes()).hexdigest()


def _runs(items: Sequence[Item], seen: Sequence[tuple[str, ...]], seed: int) -> dict[Run, dict[int, Sample]]:
    """What is asked in each run, by the number of the question."""
    first = {media: item.sample for item, media in zip(reversed(items), reversed(seen), strict=True)}
    partners = _derangement(seen, seed)
    return {
        "true": {i: item.sample for i, item in enumerate(items)},
        "blind": {i: Sample(tuple(item.sample.texts)) for i, item in enumerate(items)},
        "shuffled": {
            i: _with_media(item.sample, _media(first[partners[media]]))
            for i, (item, media) in enumerate(zip(items, seen, strict=True))
            if media in partners
        },
    }


def _derangement(seen: Sequence[tuple[str, ...]], seed: int) -> dict[tuple[str, ...], tuple[str, ...]]:
    """For each set of media another one of the same kinds and number, in one random cycle, so that none keeps its own.

    Whole sets change places, so that questions about one picture stay together. A set whose kinds no other has, and a
    question without media, have no place in it.
    """
    alike: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for media in dict.fromkeys(seen):
        if media:
            alike.setdefault(tuple(each.split()[0] for each in media), []).append(media)
    partners: dict[tuple[str, ...], tuple[str, ...]] = {}
    rng = random.Random(seed)
    for sets in alike.values():
        rng.shuffle(sets)
        if len(sets) > 1:
            partners.update(zip(sets, [*sets[1:], sets[0]], strict=True))
    return partners


def _with_media(sample: Sample, media: Sequence[Image | Video | Audio]) -> Sample:
    """The sample with these in place of its own media."""
    new = iter(media)
    return Sample(tuple(part if isinstance(part, Text) else next(new) for part in sample.parts))


def _key(sample: Sample, run: Run, hashes: _Hashes) -> str:
    """What names an answer: the run, and the texts and media of the sample in their order."""
    parts = [part.text if isinstance(part, Text) else [hashes(part)] for part in sample.parts]
    return hashlib.sha256(json.dumps([run, parts]).encode()).hexdigest()


# ---- answers in a file ----


class _Store:
    """Answers by key, in a file of JSON lines if there is a path: a line that names the model, then a line an answer.

    Lines are written whole, in one call a batch. What a kill leaves of a last line is cut off, and asked again.
    """

    def __init__(self, path: str | Path | None, *, model: str, settings: Mapping[str, Any]) -> None:
        self.answers: dict[str, str] = {}
        self._handle: int | None = None
        if path is None:
            return
        path, head = Path(path), {"answers of": model, "settings": dict(settings)}
        first = (json.dumps(head) + "\n").encode()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel's: it ends with this process
            old = path.read_bytes()
            whole = old[: old.rfind(b"\n") + 1]
            if whole:
                self._read(path, whole, head)
            elif not first.startswith(old):
                raise DataError(f"{path}: is no file of answers; give another name")
            os.ftruncate(self._handle, len(whole))
            if not whole:
                self._write(first)
        except BlockingIOError:
            self.close()
            raise DataError(f"{path}: another process adds answers to it; wait for it, or give another name") from None
        except OSError as error:
            self.close()
            raise DataError(f"{path}: cannot be used for answers ({error.strerror}); give another name") from None
        except DataError:
            self.close()
            raise

    def _read(self, path: Path, content: bytes, head: dict[str, Any]) -> None:
        first, *lines = content.split(b"\n")[:-1]
        try:
            found = json.loads(first)
        except ValueError:
            found = None
        if not isinstance(found, dict) or found.keys() != head.keys():
            raise DataError(f"{path}:1: is not the head of a file of answers; give another name")
        if found != head:
            raise DataError(
                f"{path}: holds answers of {found['answers of']!r} with the settings {found['settings']}, not of "
                f"{head['answers of']!r} with {head['settings']}; give another name"
            )
        for i, line in enumerate(lines, 2):
            try:
                row = json.loads(line)
                key, answer = row["key"], row["answer"]
            except (ValueError, TypeError, KeyError):
                raise DataError(f"{path}:{i}: is no answer; delete the line, and it is asked again") from None
            if not isinstance(key, str) or not isinstance(answer, str):
                raise DataError(f"{path}:{i}: key and answer should be texts; delete the line, and it is asked again")
            self.answers[key] = answer

    def add(self, keys: Sequence[str], answers: Sequence[str]) -> None:
        new = dict(zip(keys, answers, strict=True))
        self.answers.update(new)
        if self._handle is not None:
            lines = [json.dumps({"key": key, "answer": answer}) + "\n" for key, answer in new.items()]
            self._write("".join(lines).encode())

    def _write(self, content: bytes) -> None:
        assert self._handle is not None
        while content:
            content = content[os.write(self._handle, content) :]

    def close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __enter__(self) -> _Store:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


# ---- for people ----


def _examples(judged: _Judged, seed: int) -> dict[str, list[Example]]:
    metric, parsed, score = judged.task.metric, judged.parsed, judged.scores
    order = list(parsed)
    random.Random(seed).shuffle(order)
    order.sort(key=lambda i: -metric.goodness(score[i]))  # stable: equals stay shuffled
    read = [i for i in order if parsed[i] is not None]
    right = [i for i in read if score[i] != metric.worst][:EXAMPLES]
    wrong = [i for i in reversed(read) if score[i] != metric.best and i not in right][:EXAMPLES]
    unparsed = [i for i in order if parsed[i] is None][:EXAMPLES]

    def example(i: int) -> Example:
        item, text = judged.task.items[i], parsed[i]
        return Example(
            question=_clip(" ".join(part.text for part in item.sample.texts)),
            picture=_clip(", ".join(part.where for part in _media(item.sample))),
            references=[_clip(reference) for reference in item.references],
            answer=_clip(judged.said[i]),
            parsed=None if text is None else _clip(text),
            score=score[i],
        )

    chosen = {"right": right, "wrong": wrong, "unparsed": unparsed}
    return {name: [example(i) for i in which] for name, which in chosen.items()}


def _clip(text: str) -> str:
    text = text.encode("utf-8", "replace").decode()  # a lone surrogate cannot be written
    return text if len(text) <= _CLIP else f"{text[:_CLIP]}… ({len(text):,} characters)"


def _notes(card: Card) -> list[str]:
    """What a reader should not overlook."""
    notes = []
    if card.true.score.holds(card.blind.score.value):
        where = "is inside the interval of the true score"
    else:
        where = (
            "is better than the true score" if card.over_blind.value < 0 else "may still be as good on other questions"
        )
    if not card.sees:
        notes.append(f"The blind score {where}: nothing here shows that the model looks.")
    if card.shuffled is None:
        notes.append("No question has another's pictures to take (of the same number and kind): no shuffled run.")
    elif (moved := card.shuffled.score.n) < card.questions:
        notes.append(f"The shuffled run has {moved} of {card.questions} questions: the others found no partner.")
    if card.true.unparsed:
        share = card.true.unparsed / card.questions
        notes.append(f"{card.true.unparsed} answers ({100 * share:.0f} %) could not be parsed and count as wrong.")
    score = card.true.score
    if card.constant >= score.low if card.best > card.worst else card.constant <= score.high:
        notes.append("Always giving the most frequent right answer scores no worse than the low end of the interval.")
    if card.pictures == 1:
        notes.append("All questions are about one picture: the score says nothing about others.")
    return notes


def _page(card: Card) -> str:
    def number(value: float | None, digits: int = 1) -> str:
        if value is None:
            return "undefined"
        return f"{100 * value:.{digits}f} %" if card.percent else f"{value:.{digits + 1}f}"

    sure = card.shown
    lines = [f"# {_cell(card.task)}: {_cell(card.model)}", ""]
    lines += [
        f"**{_cell(card.metric)}: {sure(card.true.score)}**, {'more' if card.best > card.worst else 'less'} is better"
    ]
    for note in card.notes:
        lines += ["", f"> {_cell(note)}"]
    lines += [
        "",
        "| run | score, 95 % interval | gain of the pictures | questions | unparsed |",
        "|---|---|---|---|---|",
    ]
    for name, run, gain in card.runs:
        lines.append(f"| {name} | {sure(run.score)} | {sure(gain) if gain else ''} | {run.score.n} | {run.unparsed} |")
    lines.append(f"| always the most frequent answer | {number(card.constant)} | | {card.questions} | |")
    if card.chance is not None:
        lines.append(f"| guessing | {number(card.chance)} | | {card.questions} | |")
    if card.guessed is not None and card.true.unparsed:
        lines.append(f"| with pictures, unparsed guessed | {number(card.guessed)} | | {card.questions} | 0 |")
    if card.true.unparsed:
        read = card.questions - card.true.unparsed
        lines.append(f"| with pictures, parsed answers alone | {number(card.parsed_only)} | | {read} | |")
    for parser, reading in card.readings.items():
        lines.append(
            f"| with pictures, read by {parser} | {number(reading.score)} | | {card.questions} | {reading.unparsed} |"
        )
    if card.true.details:
        lines += ["", "| | with pictures | blind |", "|---|---|---|"]
        for name, value in card.true.details.items():
            lines.append(f"| {name} | {_plain_number(value)} | {_plain_number(card.blind.details[name])} |")
    if card.kinds:
        lines += ["", "| kind | score, 95 % interval | blind | always the same | questions | unparsed | parser |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for kind, k in card.kinds.items():
            means = f"{sure(k.score)} | {number(k.blind)} | {number(k.constant)}"
            lines.append(f"| {_cell(kind)} | {means} | {k.score.n} | {k.unparsed} | {k.parser} |")
    for name, examples in card.examples.items():
        if examples:
            lines += [
                "",
                f"Examples, {name}:",
                "",
                "| question | right | answer | read as | score |",
                "|---|---|---|---|---|",
            ]
        for e in examples:
            right = " / ".join(dict.fromkeys(e.references))
            read_as = "-" if e.parsed is None else _cell(e.parsed)
            lines.append(f"| {_cell(e.question)} | {_cell(right)} | {_cell(e.answer)} | {read_as} | {e.score:.2f} |")
    settings = ", ".join(f"{key} {value}" for key, value in card.settings.items()) or "none given"
    versions = ", ".join(f"{name} {version}" for name, version in card.versions.items())
    lines += [
        "",
        f"{card.questions} questions about {card.pictures} pictures · prompt: {_cell(card.prompt)} · "
        f"parser: {card.parser} · interval: {card.true.score.method} · settings: {_cell(settings)} · "
        f"seed {card.seed} · {card.started}, {card.seconds:,.1f} s for {card.answered} answers · {versions}",
        "",
    ]
    return "\n".join(lines)


def _plain_number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def _cell(text: str) -> str:
    """Text from anywhere as one cell of a table that stays text."""
    return re.sub(r"([\\|`*_<>\[\]#&])", r"\\\1", " ".join(text.split()))
