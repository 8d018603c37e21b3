"""Rows by number, as files hold them: in memory, JSON lines, tars, parquet. Media stay where they are."""

from __future__ import annotations

import bisect
import json
import tarfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np

from polymodal.core.errors import DataError, MissingDependency
from polymodal.core.sample import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from polymodal.data.rows import Stored, inside

_MAX_LINE = 2**28  # bytes of a row in a file of rows
_MAX_GROUP = 2**30  # bytes of a row group
_MAX_ROWS = 2**20  # rows of a row group
_TOO_LARGE = "has row groups of over a million rows or a GiB: write it with a smaller row_group_size"
_BATCH = 64  # rows of parquet that are unpacked at once: a page of a few bytes can say a text a million times


@runtime_checkable
class Store(Protocol):
    """Rows by number, as a file holds them."""

    where: str

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """Where a row stands, for a message."""
        ...

    def scan(self) -> Iterator[Any]:
        """All rows without their media; a `DataError` in place of one that cannot be read."""
        ...

    def row(self, i: int) -> Any:
        """One row. Called from several threads at once."""
        ...


class Listed:
    """Rows in memory."""

    def __init__(self, where: str | Path, rows: Iterable[Any]) -> None:
        self.where, self._rows = str(where), list(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, i: int) -> str:
        return f"{Path(self.where).name}: row {i}"

    def scan(self) -> Iterator[Any]:
        return iter(self._rows)

    def row(self, i: int) -> Any:
        return self._rows[i]


class Lines:
    """JSON lines, read from the file one by one; empty lines are no rows."""

    def __init__(self, path: Path) -> None:
        self.where, self._path = str(path), path
        starts, numbers, start = [], [], 0
        with _opened(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE + 1), b""), 1):
                if line.strip():
                    starts.append(start)
                    numbers.append(number)
                start += len(line)
        self._starts, self._numbers = np.array(starts, np.int64), np.array(numbers, np.int64)

    def __len__(self) -> int:
        return len(self._starts)

    def name(self, i: int) -> str:
        return f"{self._path.name}:{self._numbers[i]}"

    def scan(self) -> Iterator[Any]:
        with _opened(self._path) as file:
            for i in range(len(self)):
                try:
                    yield self._read(file, i)
                except DataError as error:
                    yield error

    def row(self, i: int) -> Any:
        with _opened(self._path) as file:
            return self._read(file, i)

    def _read(self, file: Any, i: int) -> Any:
        file.seek(self._starts[i])
        line = file.readline(_MAX_LINE + 1)
        if len(line) > _MAX_LINE:
            raise DataError(f"the line has more than {_MAX_LINE:,} bytes")
        return _parsed(line)


class Joined:
    """The rows of several files, one after the other."""

    def __init__(self, stores: Sequence[Store]) -> None:
        self.where, self._stores = f"{stores[0].where} and {len(stores) - 1} more", stores
        self._ends = np.cumsum([len(store) for store in stores]).tolist()

    def __len__(self) -> int:
        return self._ends[-1]

    def _at(self, i: int) -> tuple[Store, int]:
        n = bisect.bisect_right(self._ends, i)
        return self._stores[n], i - (self._ends[n - 1] if n else 0)

    def name(self, i: int) -> str:
        store, n = self._at(i)
        return store.name(n)

    def scan(self) -> Iterator[Any]:
        for store in self._stores:
            yield from store.scan()

    def row(self, i: int) -> Any:
        store, n = self._at(i)
        return store.row(n)


class Tar:
    """A WebDataset tar: the members of one key (their name up to its first dot) are a row; nothing is unpacked.

    ``json`` is the row, ``txt`` its caption, and pictures and clips are its media in the order of the archive,
    whatever the row calls them, and no fewer than it names. Members with other endings are not read.
    """

    def __init__(self, path: Path) -> None:
        self.where, self._path = str(path), path
        self._rows: dict[str, dict[str, tuple[int, int]]] = {}
        self._problems: dict[str, str] = {}
        size = _size(path)
        try:
            with tarfile.open(path, "r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # else it keeps them all
                    if member.size < 0:  # it leads back, and round for ever
                        raise tarfile.ReadError(f"{member.name!r:.80} has a negative size")
                    self._add(member, size)
                end = tar.offset
        except (tarfile.TarError, OSError, ValueError) as error:
            raise DataError(
                f"{path}: is no tar, or cut off ({error}). A compressed one has to be decompressed once: rows are read "
                "in any order"
            ) from None
        if end + tarfile.BLOCKSIZE > size:
            raise DataError(f"{path}: is cut off, its end is missing: download it again")
        with _opened(path) as file:  # tarfile takes a bad header, zeros and the end of a first archive for the end
            file.seek(end)
            while block := file.read(2**20):
                if rest := block.lstrip(b"\0"):
                    raise DataError(f"{path}: is damaged, or several tars in one, at byte {file.tell() - len(rest):,}")
        self._keys = list(self._rows)

    def _add(self, member: tarfile.TarInfo, size: int) -> None:
        folder, _, base = member.name.rpartition("/")
        stem, _, ending = base.partition(".")
        key, ending, good = f"{folder}/{stem}" if folder else stem, ending.lower(), inside(member.name)
        if member.isdir() or (good and not stem):  # folders, the archive's own "." too, and hidden files are no rows
            return
        row = self._rows.setdefault(key, {})
        if not good:
            self._problems[key] = f"{member.name!r:.80} leads out of the archive"
        elif not member.isreg() or member.issparse():
            self._problems[key] = f"{member.name!r:.80} is a link or a device, not a file"
        elif ending in row:
            self._problems[key] = f"two members are called {member.name!r:.80}"
        elif member.offset_data + member.size > size:
            raise DataError(f"{self.where}: is cut off in {member.name!r:.80}: download it again")
        row[ending] = member.offset_data, member.size

    def __len__(self) -> int:
        return len(self._keys)

    def name(self, i: int) -> str:
        return f"{self._path.name}:{self._keys[i]!r:.120}"

    def scan(self) -> Iterator[Any]:
        for i in range(len(self)):
            try:
                yield self.row(i)
            except DataError as error:
                yield error

    def row(self, i: int) -> Any:
        key = self._keys[i]
        if (problem := self._problems.get(key)) is not None:
            raise DataError(problem)
        members, row = self._rows[key], {}
        if "json" in members:
            row = _parsed(self._bytes("json", *members["json"]))
            row = {"messages": row} if isinstance(row, list) else row
            if not isinstance(row, dict):
                raise DataError(f"its json should be an object, not {row!r:.60}")
        if "txt" in members:
            try:
                row["caption"] = self._bytes("txt", *members["txt"]).decode()
            except UnicodeDecodeError:
                raise DataError("its txt is not UTF-8") from None
        media: dict[str, list[Stored]] = {"images": [], "videos": []}
        for ending, (start, size) in members.items():
            last = f".{ending.rpartition('.')[2]}"
            kind = "images" if last in IMAGE_SUFFIXES else "videos" if last in VIDEO_SUFFIXES else None
            if kind is not None:
                media[kind].append(Stored(f"{self.name(i)} {ending}", partial(self._bytes, ending, start, size)))
        for name in ("image", "images", "video", "videos"):
            named = row.pop(name, None) or []
            named = named if isinstance(named, list) else [named]
            if len(named) > len(media[f"{name.removesuffix('s')}s"]):
                raise DataError(f"its json names media that the archive does not hold: {named!r:.80}")
        return row | media

    def _bytes(self, ending: str, start: int, size: int) -> bytes:
        if ending in ("json", "txt") and size > _MAX_LINE:
            raise DataError(f"its {ending} has {size:,} bytes, more than the {_MAX_LINE:,} allowed")
        with _opened(self._path) as file:
            file.seek(start)
            content = file.read(size)
        if len(content) != size:
            raise DataError(f"{self.where} has become shorter since it was opened")
        return content


class Parquet:
    """Rows of a parquet file. A row is read with its row group, of which the last few are kept.

    Pictures are columns of bytes, or of ``{bytes, path}`` as those of the Hub, or lists of these. Checking reads their
    bytes only where the file does not say that none are missing.
    """

    _GROUPS: Final = 4

    def __init__(self, path: Path) -> None:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            raise MissingDependency("reading parquet", "pyarrow", "data") from None
        self.where, self._path = str(path), path
        _size(path)
        self._errors: tuple[type[Exception], ...] = (pa.ArrowException, OSError, ValueError)

        def binary(kind: Any) -> bool:
            return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

        def held(kind: Any) -> bool:  # more than the bytes, which say by themselves how many there are
            kind = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
            at = kind.get_field_index("bytes") if pa.types.is_struct(kind) and kind.num_fields > 1 else -1
            return at >= 0 and binary(kind.field(at).type)

        try:
            self._file = pq.ParquetFile(path, memory_map=True)
            fields, leaves = list(self._file.schema_arrow), self._file.schema
            groups = [self._file.metadata.row_group(g) for g in range(self._file.num_row_groups)]
            self._leaves = [leaves.column(i).path for i in range(len(leaves))]
        except self._errors as error:
            raise DataError(f"{path}: is no parquet file, or cut off ({error})") from None
        if any(group.num_rows > _MAX_ROWS or group.total_byte_size > _MAX_GROUP for group in groups):
            raise DataError(f"{path}: {_TOO_LARGE}")
        self._ends = np.cumsum([group.num_rows for group in groups]).tolist()
        self._bare = {field.name for field in fields if binary(field.type)}
        self._held = {field.name for field in fields if held(field.type)}
        self._table = pa.Table.from_batches
        self._groups: dict[int, Any] = {}
        self._lock = threading.Lock()  # a reader of pyarrow is not for several threads

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def name(self, i: int) -> str:
        return f"{self._path.name}: row {i}"

    def scan(self) -> Iterator[Any]:
        for group in range(len(self._ends)):
            next(self._batches(group, rows=1), None)  # it finds damaged metadata; asked for those, pyarrow aborts
            unread = {leaf for i, leaf in enumerate(self._leaves) if self._is_whole(group, i)}
            tops = {leaf.partition(".")[0] for leaf in unread}
            bare = dict.fromkeys(tops & self._bare, Stored("", bytes))
            leaves = [leaf for leaf in self._leaves if leaf not in unread]
            for batch in self._batches(group, leaves):
                with self._reading(group):
                    rows = batch.to_pylist()
                for row in rows:
                    yield bare | {name: _unread(value) if name in tops else value for name, value in row.items()}

    def _is_whole(self, group: int, column: int) -> bool:
        """Whether a column is the bytes of media, none of which are missing: checking leaves it where it is."""
        leaf = self._leaves[column]
        if leaf not in self._bare and not (leaf.endswith(".bytes") and leaf.partition(".")[0] in self._held):
            return False
        chunk = self._file.metadata.row_group(group).column(column)
        said = chunk.statistics if chunk.physical_type == "BYTE_ARRAY" else None  # of a damaged type pyarrow aborts
        return said is not None and said.has_null_count and said.null_count == 0

    def _batches(self, group: int, columns: list[str] | None = None, rows: int = _BATCH) -> Iterator[Any]:
        size, missing = 0, self._file.metadata.row_group(group).num_rows
        with self._reading(group):
            for batch in self._file.iter_batches(rows, row_groups=[group], columns=columns):
                size, missing = size + batch.nbytes, missing - batch.num_rows
                if size > _MAX_GROUP:
                    raise DataError(f"{self.where}: {_TOO_LARGE}")
                yield batch
            if missing:
                raise ValueError(f"{missing} rows are missing")

    @contextmanager
    def _reading(self, group: int) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            raise DataError(f"{self.where}: row group {group} cannot be read ({error})") from None

    def row(self, i: int) -> Any:
        group = bisect.bisect_right(self._ends, i)
        with self._lock:
            if group not in self._groups:
                self._groups[group] = self._table(list(self._batches(group)))
                while len(self._groups) > self._GROUPS:
                    del self._groups[next(iter(self._groups))]
            table = self._groups[group]
        with self._reading(group):
            return table.slice(i - (self._ends[group - 1] if group else 0), 1).to_pylist()[0]


def _size(path: Path) -> int:
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    return path.stat().st_size


def _opened(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"it is not JSON: {error}") from None


def _unread(value: Any) -> Any:
    """A medium, or a list of media, of which only the path was read."""
    if isinstance(value, list):
        return [_unread(each) for each in value]
    return None if value is None else Stored("", bytes)
