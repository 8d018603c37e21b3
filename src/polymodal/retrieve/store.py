"""The tables of an index: LanceDB, embedded, every write one atomic commit.

`pictures` holds a row a picture: its path, facts, thumbnail and vector. `failures` holds what could not be read, so
that it is not read again before it changes.
"""

from __future__ import annotations

import datetime as dt
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from polymodal.core.errors import MissingDependency
from polymodal.retrieve.filters import any_path

FLAT_ROWS = 20_000  # below this an exact scan answers within 0.1 s and nothing has to be trained
TAIL_ROWS = 2_000  # rows that the vector index may not know yet; they are scanned exactly beside it
FRAGMENTS = 32  # files a table may be in pieces of before they are put together
PROBES, CANDIDATES = 40, 160  # partitions visited; rows compared exactly: recall@10 > 0.999 at 100,000
# A search that began before a compaction still reads the old files; none lasts this long.
KEEP_VERSIONS = dt.timedelta(minutes=10)
FRESH = dt.timedelta(seconds=2)  # how soon a reader sees what another process wrote
IN_LIST = 500  # paths named in one condition
PICTURES, FAILURES = "pictures", "failures"


class Store:
    """The two tables under one folder.

    Args:
        path: the folder that LanceDB keeps its tables in; made when it does not exist.
        dim: the length of the vectors.

    Raises:
        MissingDependency: lancedb is not installed.
    """

    def __init__(self, path: Path, dim: int) -> None:
        os.environ.setdefault("LANCE_LOG", "error")  # its warnings (empty partitions) are not a user's business
        try:
            import lancedb
        except ModuleNotFoundError:
            raise MissingDependency("an index", "lancedb", "search") from None
        import pyarrow as pa

        self.schemas = {
            PICTURES: pa.schema(
                [
                    pa.field("path", pa.string(), nullable=False),
                    pa.field("hash", pa.string(), nullable=False),  # SHA-256 of the file
                    pa.field("bytes", pa.int64(), nullable=False),
                    pa.field("mtime_ns", pa.int64(), nullable=False),
                    pa.field("modified", pa.timestamp("us")),  # the file's time, for filters
                    pa.field("time", pa.timestamp("us")),  # EXIF
                    pa.field("width", pa.int32(), nullable=False),
                    pa.field("height", pa.int32(), nullable=False),
                    pa.field("thumbnail", pa.binary(), nullable=False),  # JPEG
                    pa.field("vector", pa.list_(pa.float32(), dim), nullable=False),
                ]
            ),
            FAILURES: pa.schema(
                [
                    pa.field("path", pa.string(), nullable=False),
                    pa.field("bytes", pa.int64(), nullable=False),
                    pa.field("mtime_ns", pa.int64(), nullable=False),
                    pa.field("reason", pa.string(), nullable=False),
                ]
            ),
        }
        self.database = lancedb.connect(path, read_consistency_interval=FRESH)
        self.tables = {
            name: self.database.create_table(name, schema=schema, exist_ok=True)
            for name, schema in self.schemas.items()
        }

    @property
    def pictures(self) -> Any:
        return self.tables[PICTURES]

    def table(self, name: str, rows: Sequence[dict[str, Any]]) -> Any:
        """Rows as a pyarrow table with the columns of one of ours."""
        import pyarrow as pa

        columns = []
        for field in self.schemas[name]:
            values = [row[field.name] for row in rows]
            if field.name == "vector":
                flat = np.concatenate(values) if values else np.empty(0, np.float32)
                columns.append(pa.FixedSizeListArray.from_arrays(pa.array(flat, pa.float32()), type=field.type))
            else:
                columns.append(pa.array(values, field.type))
        return pa.Table.from_arrays(columns, schema=self.schemas[name])

    def add(self, name: str, rows: Any) -> None:
        """Appends a pyarrow table of paths that ours does not hold: one commit."""
        if rows.num_rows:
            self.tables[name].add(rows)

    def replace(self, name: str, rows: Any) -> None:
        """Writes rows over those of the same path: one commit, so a kill leaves either the old row or the new one."""
        if rows.num_rows:
            merge = self.tables[name].merge_insert("path").when_matched_update_all().when_not_matched_insert_all()
            merge.execute(rows)

    def remove(self, name: str, paths: Sequence[str]) -> None:
        for some in _portions(paths):
            self.tables[name].delete(any_path(some))

    def rows(self, name: str, paths: Sequence[str], columns: list[str] | None = None) -> Iterator[Any]:
        """The rows of these paths as pyarrow tables, `IN_LIST` paths at a time, in no order."""
        for some in _portions(paths):
            query = self.tables[name].search().where(any_path(some)).limit(None)
            yield query.select(columns or self.schemas[name].names).to_arrow()

    def columns(self, name: str, columns: list[str]) -> Any:
        """Whole columns, as a pyarrow table."""
        return self.tables[name].search().select(columns).limit(None).to_arrow()

    def nearest(self, vector: np.ndarray, limit: int, where: str | None, columns: list[str]) -> Any:
        """The rows nearest to a vector by cosine, best first, with ``_distance`` = 1 - cosine, as a pyarrow table.

        Exact without a vector index; with one, its candidates are compared exactly, and so are rows it does not know.
        """
        query = self.pictures.search(vector, vector_column_name="vector").distance_type("cosine")
        # A narrow filter may empty the nearest partitions: then, and only then, more are visited.
        query = query.minimum_nprobes(PROBES).maximum_nprobes(0).refine_factor(max(2, math.ceil(CANDIDATES / limit)))
        if where:
            query = query.where(where, prefilter=True)
        return query.limit(limit).select([*columns, "_distance"]).to_arrow()

    def tidy(self) -> None:
        """Trains or extends the vector index and puts fragments together, when there is enough to gain."""
        for table in self.tables.values():
            stats: Any = table.stats()
            if stats["fragment_stats"]["num_small_fragments"] > FRAGMENTS:
                table.optimize(cleanup_older_than=KEEP_VERSIONS)
        indices = self.pictures.list_indices()
        if not indices:
            if self.pictures.count_rows() >= FLAT_ROWS:
                from lancedb.index import IvfRq

                self.pictures.create_index("vector", config=IvfRq(distance_type="cosine"))
        elif self.unindexed > TAIL_ROWS:
            self.pictures.optimize(cleanup_older_than=KEEP_VERSIONS)

    @property
    def unindexed(self) -> int:
        """Rows that a search scans exactly."""
        indices = self.pictures.list_indices()
        if not indices:
            return self.pictures.count_rows()
        return self.pictures.index_stats(indices[0].name).num_unindexed_rows


def _portions(paths: Sequence[str]) -> Iterator[list[str]]:
    for start in range(0, len(paths), IN_LIST):
        yield list(paths[start : start + IN_LIST])
