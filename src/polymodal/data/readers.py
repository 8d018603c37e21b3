"""Data sets on disk as sequences of lessons: JSON of LLaVA and ShareGPT, JSON lines, COCO captions, VQA, tars, parquet.

A data set is checked whole when it is opened, and every bad row is reported; media are read when a row is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar, overload

import numpy as np

from polymodal.core.chat import Chat
from polymodal.core.errors import ConfigError, DataError, MediaError, did_you_mean
from polymodal.core.files import read_json
from polymodal.data.rows import Media, lesson, majority
from polymodal.data.stores import Joined, Lines, Listed, Parquet, Store, Tar

T = TypeVar("T", covariant=True)
WORD_OR_PHRASE: Final = "{question}\nAnswer the question using a single word or phrase."
_SHOWN = 50  # problems in a message


class BadRows(DataError):
    """Rows of a data set are not what they should be; ``problems`` has one entry for each."""

    def __init__(self, where: str, problems: Sequence[str], rows: int) -> None:
        self.problems = tuple(problems)
        more = len(problems) - _SHOWN
        super().__init__(
            f"{where}: {len(problems)} of {rows} rows are bad, nothing was opened. Mend them, pass the folder of their "
            "media as root, or leave them out with skip_bad=True\n"
            + "\n".join(f"  - {problem}" for problem in problems[:_SHOWN])
            + (f"\n  - ... and {more} more" if more > 0 else "")
        )


class Dataset(Sequence[T]):
    """Rows of a file as what a model learns from, in their order.

    Args:
        store: the rows.
        root: where their media lie.
        read: what a row becomes: `rows.lesson` makes a `Chat`, `rows.sample` a `Sample`.
        skip_bad: leave bad rows out; ``skipped`` says which, and why.

    Raises:
        BadRows: rows are bad; all of them are listed.
        DataError: there is no row.
    """

    def __init__(self, store: Store, root: Path, read: Callable[[Any, Media], T], *, skip_bad: bool = False) -> None:
        self.store, self.read, self._media = store, read, Media(root=root)
        problems, kept, looking = [], [], Media(root=root, checking=True)
        for number, row in enumerate(store.scan()):
            try:
                if isinstance(row, DataError):
                    raise row
                read(row, looking)
                kept.append(number)
            except (DataError, MediaError) as error:
                problems.append(f"{store.name(number)}: {error}")
        if problems and not skip_bad:
            raise BadRows(store.where, problems, len(store))
        if not kept:
            raise DataError(f"{store.where}: there is no {'good ' if problems else ''}row")
        self.skipped = tuple(problems)
        self._kept = np.array(kept)

    def __len__(self) -> int:
        return len(self._kept)

    @overload
    def __getitem__(self, i: int) -> T: ...
    @overload
    def __getitem__(self, i: slice) -> list[T]: ...
    def __getitem__(self, i: int | slice) -> T | list[T]:
        if isinstance(i, slice):
            return [self[n] for n in range(*i.indices(len(self)))]
        number = int(self._kept[i])
        try:
            return self.read(self.store.row(number), self._media)
        except (DataError, MediaError) as error:  # it was good when it was opened
            raise DataError(f"{self.store.name(number)}: {error}") from error

    def raw(self, i: int) -> Any:
        """The row as the file has it: the ten answers of a VQA question, or a field that no lesson has."""
        return self.store.row(int(self._kept[i]))


def open_dataset(
    path: str | Path | Sequence[str | Path],
    *,
    root: str | Path | None = None,
    kind: str | None = None,
    read: Callable[[Any, Media], T] = lesson,  # type: ignore[assignment]
    skip_bad: bool = False,
) -> Dataset[T]:
    """A data set of a file, of several files of one kind, or of all those in a folder, in the order of their names.

    Args:
        path: ``.json`` (a list of rows, or COCO captions), ``.jsonl``, ``.tar`` or ``.parquet``.
        root: the folder below which paths of media lie; that of the first file if not given.
        kind: one of `KINDS`, where the suffix does not say it.
        read: what a row becomes: `rows.lesson` (with ``partial(lesson, prompt=...)`` for captions) or `rows.sample`.
        skip_bad: leave bad rows out instead of refusing the data set; ``skipped`` of the result lists them.

    Raises:
        BadRows: rows are bad; all of them are listed.
        DataError: a file is missing, cut off, or of another kind.
        MissingDependency: pyarrow is missing, which reads parquet.
    """
    files = _files(path)
    kinds = {kind or _SUFFIXES.get(file.suffix.lower()) for file in files}
    if len(kinds) > 1:
        raise DataError(f"{path}: files of several kinds; open each for itself and mix them with Mixture")
    (found,) = kinds
    if found not in KINDS:
        said = kind or files[0].suffix
        raise DataError(f"{files[0]}: {said!r} is no kind of data set{did_you_mean(said, [*KINDS, *_SUFFIXES])}")
    stores = [KINDS[found](file) for file in files]
    store = stores[0] if len(stores) == 1 else Joined(stores)
    return Dataset(store, Path(root) if root is not None else files[0].parent, read, skip_bad=skip_bad)


def vqa(
    questions: str | Path,
    annotations: str | Path,
    images: str | Path,
    *,
    prompt: str = WORD_OR_PHRASE,
    pattern: str = "COCO_{subtype}_{image_id:012d}.jpg",
    skip_bad: bool = False,
) -> Dataset[Chat]:
    """VQA v2: lessons whose answer is what most people say; all ten are under ``answers`` of `Dataset.raw`.

    Args:
        prompt: how a question is put; ``{question}`` stands for it.
        pattern: the name of a picture; ``{subtype}`` is the questions file's ``data_subtype``, e.g. train2014.

    Source: https://visualqa.org/vqa_v1_download.html
    """
    asked = _json(Path(questions))
    truths = _by(_list(_json(Path(annotations)), "annotations", annotations), "question_id")

    def rows() -> Iterator[Any]:
        for row in _list(asked, "questions", questions):
            try:
                truth = truths[row["question_id"]]
                people = [each["answer"] for each in truth["answers"]]
                yield {
                    "image": pattern.format(subtype=asked.get("data_subtype", ""), image_id=row["image_id"]),
                    "question": prompt.replace("{question}", row["question"]),
                    "answer": truth.get("multiple_choice_answer") or majority(people),
                    "answers": people, "question_id": row["question_id"],
                }  # fmt: skip
            except (DataError, LookupError, ValueError, TypeError) as error:
                yield DataError(f"its question, picture or annotation is missing or malformed ({error!r:.80})")

    return Dataset(Listed(questions, rows()), Path(images), lesson, skip_bad=skip_bad)


# ---- files of one JSON document


def _json_rows(path: Path) -> Store:
    content = _json(path)
    if isinstance(content, list):
        return Listed(path, content)
    if isinstance(content, dict) and {"images", "annotations"} <= content.keys():
        return Listed(path, _captions(content, path))
    if isinstance(content, dict) and "questions" in content:
        raise DataError(f"{path}: questions of VQA have their answers in another file: open them with readers.vqa")
    raise DataError(f"{path}: should be a list of rows, or COCO captions (an object with images and annotations)")


def _captions(content: Mapping[str, Any], path: Path) -> Iterator[Any]:
    """A row for each caption of a COCO file."""
    pictures = _by(_list(content, "images", path), "id")
    for row in _list(content, "annotations", path):
        if not isinstance(row, dict) or "caption" not in row:
            yield DataError("the annotation is no caption: take the captions_*.json of COCO")
        elif not isinstance(number := row.get("image_id"), int | str) or number not in pictures:
            yield DataError(f"the picture {number!r:.40} is not among the images of the file")
        else:
            yield {"image": pictures[number].get("file_name"), "caption": row["caption"], "image_id": number}


# ---- opening

KINDS: Final[dict[str, Callable[[Path], Store]]] = {
    "json": _json_rows, "jsonl": Lines, "tar": Tar, "parquet": Parquet,
}  # fmt: skip
_SUFFIXES: Final = {
    ".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".tar": "tar", ".parquet": "parquet",
}  # fmt: skip


def _files(path: str | Path | Sequence[str | Path]) -> list[Path]:
    files = [Path(path)] if isinstance(path, str | Path) else [Path(each) for each in path]
    if len(files) == 1 and files[0].is_dir():
        files = sorted(file for file in files[0].iterdir() if file.suffix.lower() in _SUFFIXES)
        if not files:
            raise DataError(f"{path}: the folder has no file that ends in {', '.join(_SUFFIXES)}")
    if not files:
        raise DataError("a data set needs at least one file")
    return files


def _json(path: Path) -> Any:
    try:
        return read_json(path)
    except (ConfigError, OSError) as error:
        raise DataError(f'{error}. If it holds one object a line, pass kind="jsonl"') from None


def _list(content: Any, key: str, where: str | Path) -> list[Any]:
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        raise DataError(f"{where}: should be an object with a list {key!r}; is it the right file?")
    return content[key]


def _by(rows: Sequence[Any], key: str) -> dict[Any, dict[str, Any]]:
    """Objects by a number or name of theirs."""
    return {row[key]: row for row in rows if isinstance(row, dict) and isinstance(row.get(key), int | str)}
