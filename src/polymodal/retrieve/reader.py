"""Reading an index: vectors in, pictures out. No model and no torch, so that it opens fast."""

from __future__ import annotations

import datetime as dt
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from polymodal.core.errors import ConfigError, IndexStateError
from polymodal.core.files import read_json
from polymodal.retrieve.filters import to_sql
from polymodal.retrieve.store import FAILURES, PICTURES, Store

R = TypeVar("R", bound="Reader")
FORMAT = 1
META = "index.json"
SAME = 0.985  # cosine from which two pictures count as one
FACTS = ["path", "hash", "bytes", "time", "width", "height"]


def default_path() -> Path:
    """Where the index of this user is: ``$POLYMODAL_INDEX``, else ``~/.local/share/polymodal/index``."""
    return Path(os.environ.get("POLYMODAL_INDEX") or Path.home() / ".local/share/polymodal/index")


@dataclass(frozen=True, kw_only=True)
class Meta:
    """What an index says of itself, in ``index.json``; reading it opens no table."""

    format: int
    model: str  # what `polymodal.load` takes; empty for a model that was made in Python
    fingerprint: str
    dim: int
    roots: tuple[str, ...]

    @classmethod
    def read(cls, path: str | Path) -> Meta:
        """Reads the description of the index at ``path``.

        Raises:
            IndexStateError: there is no index, or one of another format.
        """
        file = Path(path) / META
        if not file.is_file():
            raise IndexStateError(f"there is no index at {path}; make one: polymodal index DIR{_at(path)}")
        value = read_meta(file)
        if value["format"] != FORMAT:
            raise IndexStateError(
                f"{path} is not an index of format {FORMAT}, the one that this version reads and writes; "
                f"make it anew: polymodal index DIR{_at(path)} --rebuild"
            )
        return cls(**{**value, "roots": tuple(value["roots"])})

    def check(self, path: str | Path, fingerprint: str) -> None:
        """Raises IndexStateError when a model of this fingerprint gives vectors of another kind."""
        if fingerprint != self.fingerprint:
            name = f" --model {shlex.quote(self.model)}" if self.model else ""
            folders = shlex.join(self.roots) or "DIR"
            raise IndexStateError(
                f"the index at {path} was made by another model ({self.model or 'unnamed'}, {self.fingerprint[:12]}; "
                f"this one is {fingerprint[:12]}): their vectors cannot be compared. Use that model{name}, or index "
                f"again with this one: polymodal index {folders}{_at(path)} --rebuild"
            )


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One picture that was found."""

    path: str
    score: float  # cosine
    size: tuple[int, int]  # width, height in pixels, upright
    bytes: int
    time: dt.datetime | None  # when it was taken (EXIF)
    duplicates: tuple[str, ...] = ()  # further pictures of the same content, less near to the query


@dataclass(frozen=True, kw_only=True)
class Stats:
    """What an index holds."""

    pictures: int
    failures: int
    bytes_on_disk: int
    roots: tuple[str, ...]
    model: str
    dim: int
    scanned: int  # pictures that a search compares one by one: all below 20,000, else those added lately


class Reader:
    """An index that is searched by vectors; `Index` adds models and writing."""

    def __init__(self, path: Path, meta: Meta) -> None:
        self.path = path
        self.meta = meta
        self.store = Store(path / "tables", meta.dim)

    @classmethod
    def open(cls: type[R], path: str | Path) -> R:
        """An index that exists.

        Raises:
            IndexStateError: there is none, or one of another format.
        """
        path = Path(path).expanduser().resolve()
        return cls(path, Meta.read(path))

    def nearest(self, vector: ArrayLike, *, top: int = 20, where: str | None = None, group: bool = True) -> list[Hit]:
        """The pictures nearest to a vector, best first.

        Args:
            vector: ``(dim,)``, of any length but zero.
            top: how many hits.
            where: a filter, such as ``width>=640 and path~"holiday"``.
            group: puts near-duplicates into the ``duplicates`` of the best of them: the same file content, or a cosine
                of at least 0.985 to the vector of a better hit.

        Raises:
            ConfigError: the filter is not understood, or the vector has another shape.
        """
        if top < 1:
            raise ConfigError(f"top={top}: at least one hit has to be asked for")
        condition = to_sql(where) if where else None
        unit = self._unit(vector)
        if not group:
            return [_hit(row) for row in self.store.nearest(unit, top, condition, FACTS).to_pylist()]
        limit = 2 * top
        while True:
            found = self.store.nearest(unit, limit, condition, [*FACTS, "vector"])
            hits = _grouped(found)
            # Many copies of few pictures: look further, but not for ever.
            if len(hits) >= top or found.num_rows < limit or limit >= 50 * top:
                return hits[:top]
            limit *= 4

    def _unit(self, vector: ArrayLike) -> np.ndarray:
        vector = np.asarray(vector, dtype=np.float32)
        if vector.shape != (self.meta.dim,) or not np.isfinite(vector).all() or not vector.any():
            raise ConfigError(
                f"a query vector is {self.meta.dim} finite numbers that are not all zero, not {vector.shape} of them"
            )
        return vector / np.linalg.norm(vector)

    def thumbnails(self, paths: Sequence[str]) -> dict[str, bytes]:
        """JPEG bytes by path, for those that are in the index."""
        return {
            row["path"]: row["thumbnail"]
            for table in self.store.rows(PICTURES, paths, ["path", "thumbnail"])
            for row in table.to_pylist()
        }

    def stats(self) -> Stats:
        files = (Path(folder) / name for folder, _, names in os.walk(self.path) for name in names)
        return Stats(
            pictures=self.store.pictures.count_rows(),
            failures=self.store.tables[FAILURES].count_rows(),
            bytes_on_disk=sum(f.stat().st_size for f in files if f.is_file()),
            roots=self.meta.roots,
            model=self.meta.model,
            dim=self.meta.dim,
            scanned=self.store.unindexed,
        )


def read_meta(file: Path) -> dict[str, Any]:
    """The content of an ``index.json`` that an index of any format has written.

    Raises:
        IndexStateError: something else has written it, or it is damaged.
    """
    try:
        value = read_json(file)
    except ConfigError:
        value = None
    if not isinstance(value, dict) or not {"format", "fingerprint"} <= value.keys():
        raise IndexStateError(
            f"{file} does not describe an index: it is damaged, or another program's. Remove {file.parent} if nothing "
            f"in it is needed, and make an index anew: polymodal index DIR{_at(file.parent)}"
        )
    return value


def _at(path: str | Path) -> str:
    """The command line option for an index that is not at the default place."""
    return "" if Path(path) == default_path() else f" --index {shlex.quote(str(path))}"


def _hit(row: dict[str, Any]) -> Hit:
    return Hit(
        path=row["path"],
        score=1.0 - row["_distance"],
        size=(row["width"], row["height"]),
        bytes=row["bytes"],
        time=row["time"],
    )


def _grouped(found: Any) -> list[Hit]:
    """Hits of a pyarrow table, best first, each with its near-duplicates."""
    vectors = np.stack(found["vector"].to_numpy()) if found.num_rows else np.empty((0, 1), np.float32)
    hits: list[Hit] = []
    leaders = np.empty_like(vectors)  # row i is the vector of hit i
    hashes: dict[str, int] = {}
    copies: list[list[str]] = []
    for number, row in enumerate(found.drop_columns(["vector"]).to_pylist()):
        like = hashes.get(row["hash"])
        if like is None and hits:
            cosines = leaders[: len(hits)] @ vectors[number]
            like = int(cosines.argmax()) if cosines.max() >= SAME else None
        if like is None:
            hashes[row["hash"]] = len(hits)
            leaders[len(hits)] = vectors[number]
            hits.append(_hit(row))
            copies.append([])
        else:
            hashes.setdefault(row["hash"], like)
            copies[like].append(row["path"])
    return [replace(hit, duplicates=tuple(c)) for hit, c in zip(hits, copies, strict=True)]
