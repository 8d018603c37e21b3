"""The index of pictures or sounds: create, update, search."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from polymodal.core.errors import ConfigError, IndexStateError
from polymodal.core.files import file_hash, write_json
from polymodal.core.sample import Sample
from polymodal.core.verbs import Embeds
from polymodal.retrieve.ingest import Done, Failed, embed_files, file_time
from polymodal.retrieve.lock import writer
from polymodal.retrieve.reader import FORMAT, META, Hit, Meta, Reader, read_meta
from polymodal.retrieve.store import FAILURES, PICTURES, Store
from polymodal.retrieve.walk import Found, Unreadable, walk

COMMIT_SECONDS, COMMIT_ROWS = 10.0, 4096  # the work that a kill may cost


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far an update is. ``done`` counts the files that are finished, failed ones too."""

    done: int
    total: int
    failed: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Report:
    """What an update did. ``failed`` lists every file that is not searchable and why, also from earlier runs."""

    added: int = 0
    changed: int = 0
    moved: int = 0
    deleted: int = 0
    unchanged: int = 0
    failed: list[tuple[str, str]]
    seconds: float


class Index(Reader):
    """Pictures of any number of folders, searchable by words and by pictures; or sounds, if its model hears.

    >>> index = Index.create("my-index", model)
    >>> index.update(model, ["~/Pictures"])
    >>> index.search("a red fruit", model=model)[0].path
    """

    @classmethod
    def create(cls, path: str | Path, model: Embeds, *, name: str = "", overwrite: bool = False) -> Index:
        """An empty index for the vectors of ``model``.

        Args:
            path: the folder to keep it in.
            model: what `update` and `search` will be called with.
            name: what `polymodal.load` takes to get that model, so that others can search without saying it.
            overwrite: empties an index that is already there.

        Raises:
            IndexStateError: there is an index, another process is writing to it, or the folder holds other things.
        """
        path = Path(path).expanduser().resolve()
        _refuse_strangers(path)
        with writer(path / "lock"):
            if (path / META).is_file() and not overwrite:
                raise IndexStateError(f"there is an index at {path} already")
            # Tables first: a kill in between leaves an empty index that the next run fills.
            if (path / "tables").is_dir():
                shutil.rmtree(path / "tables")
            meta = Meta(format=FORMAT, model=name, fingerprint=model.fingerprint, dim=model.embedding_dim, roots=())
            write_json(path / META, asdict(meta))
            return cls(path, meta)

    # -- writing ------------------------------------------------------------------------------------------------------

    def update(
        self,
        model: Embeds,
        folders: Iterable[str | Path] = (),
        *,
        progress: Callable[[Progress], None] | None = None,
        workers: int | None = None,
    ) -> Report:
        """Brings the index up to date with the folders, at a cost in proportion to what changed.

        Files whose size and time are as stored are not opened. A file that was moved (same content, old place empty)
        keeps its vector. Work is committed every 10 seconds: after a kill or an error, the next call goes on there.

        Args:
            model: the model of this index.
            folders: folders to look through; none means all that the index knows. Known folders that are not
                there now (an unplugged disk) are listed as failed and keep their pictures.
            progress: called after each batch.
            workers: decoding threads; default, one a core and at least two.

        Raises:
            IndexStateError: another process is writing, or ``model`` is not the model of the index.
            ConfigError: a folder does not exist.
        """
        given = [Path(f).expanduser().resolve() for f in folders]
        for folder in given:
            if not folder.is_dir():
                raise ConfigError(f"{folder} is not a folder" if folder.exists() else f"{folder} does not exist")
        with writer(self.path / "lock"):
            # Another process may have written, or rebuilt it all, since this index was opened.
            self.meta = Meta.read(self.path)
            self.meta.check(self.path, model.fingerprint)
            self.store = Store(self.path / "tables", self.meta.dim)
            self._remember_roots(given)
            update = _Update(self, model, progress, workers or max(2, os.cpu_count() or 1))
            report = update.run(_outermost([str(f) for f in given] or list(self.meta.roots)))
            self.store.tidy()
        return report

    def _remember_roots(self, folders: Sequence[Path]) -> None:
        roots = tuple(_outermost([*self.meta.roots, *map(str, folders)]))
        self.meta = replace(self.meta, roots=roots)
        write_json(self.path / META, asdict(self.meta))

    # -- reading ------------------------------------------------------------------------------------------------------

    def search(
        self, query: Any, *, model: Embeds | None = None, top: int = 20, where: str | None = None, group: bool = True
    ) -> list[Hit]:
        """The pictures nearest to a query, best first; see `nearest` for ``top``, ``where`` and ``group``.

        Args:
            query: with a model, anything that `Sample.of` takes (words, a picture); without, a vector ``(dim,)``.
            model: the model of this index.

        Raises:
            IndexStateError: ``model`` is not the model of the index.
            ConfigError: the filter is not understood, or the vector has another shape.
        """
        if model is not None:
            self.meta.check(self.path, model.fingerprint)
            query = model.embed([Sample.of(query)])[0].cpu().numpy()
        return self.nearest(query, top=top, where=where, group=group)


class _Update:
    """One run of `Index.update`."""

    def __init__(self, index: Index, model: Embeds, progress: Callable[[Progress], None] | None, workers: int) -> None:
        self.index, self.store = index, index.store
        self.model, self.progress, self.workers = model, progress, workers
        self.started = time.monotonic()
        self.known: dict[str, tuple[int, int]] = {}  # pictures under the roots: (bytes, mtime_ns)
        self.refused: dict[str, tuple[int, int]] = {}  # failures under the roots
        self.failed: list[tuple[str, str]] = []
        self.done = self.total = self.added = self.changed = 0

    def run(self, roots: Sequence[str]) -> Report:
        present = [root for root in roots if Path(root).is_dir()]
        self.failed += [
            (root, "the folder is not there; its pictures stay in the index") for root in roots if root not in present
        ]
        reasons = self._load_known(present)

        todo: list[Found] = []
        seen: set[str] = set()
        kept: list[str] = []  # what cannot be looked at now is not taken for deleted
        for root in present:
            # The mount point of a disk that is not mounted looks like this.
            if _is_empty(root) and any(_under(p, root) for p in self.known):
                self.failed.append((root, "the folder is empty; its pictures stay (use --rebuild if they are gone)"))
                kept.append(root)
        unchanged = 0
        for item in (item for root in present for item in self._walk(root)):
            if isinstance(item, Unreadable):
                self.failed.append((item.path, item.reason))
                if not item.gone:
                    kept.append(item.path)
                continue
            seen.add(item.path)
            state = (item.size, item.mtime_ns)
            if self.known.get(item.path) == state:
                unchanged += 1
            elif self.refused.get(item.path) == state:
                self.failed.append((item.path, reasons[item.path]))
            else:
                todo.append(item)

        missing = [p for p in self.known if p not in seen and not any(_under(p, k) for k in kept)]
        self.store.remove(FAILURES, [p for p in self.refused if p in self.known or p not in seen])
        self.total = len(todo)
        moved = self._move([f for f in todo if f.path not in self.known], missing)
        self.store.remove(PICTURES, [p for p in missing if p not in moved.values()])
        self._embed([f for f in todo if f.path not in moved])
        return Report(
            added=self.added,
            changed=self.changed,
            moved=len(moved),
            deleted=len(missing) - len(moved),
            unchanged=unchanged,
            failed=self.failed,
            seconds=time.monotonic() - self.started,
        )

    def _walk(self, root: str) -> Iterator[Found | Unreadable]:
        return walk(root, str(self.index.path), self.model.suffixes)

    def _load_known(self, roots: Sequence[str]) -> dict[str, str]:
        """Fills what is stored under the roots, read as columns; gives the reasons of the failures."""
        reasons: dict[str, str] = {}
        for name, into in ((PICTURES, self.known), (FAILURES, self.refused)):
            extra = ["reason"] if name == FAILURES else []
            table = self.store.columns(name, ["path", "bytes", "mtime_ns", *extra])
            paths = table["path"].to_pylist()
            if extra:
                reasons = dict(zip(paths, table["reason"].to_pylist(), strict=True))
            states = zip(table["bytes"].to_pylist(), table["mtime_ns"].to_pylist(), strict=True)
            into.update((p, s) for p, s in zip(paths, states, strict=True) if any(_under(p, r) for r in roots))
        return reasons

    def _move(self, new: Sequence[Found], missing: Sequence[str]) -> dict[str, str]:
        """Gives new files whose content is that of a missing one its row. Returns new path -> old path."""
        sizes = {f.size for f in new}
        old = [p for p in missing if self.known[p][0] in sizes]
        sizes = {self.known[p][0] for p in old}
        candidates = [f for f in new if f.size in sizes]
        if not candidates:
            return {}
        by_hash: dict[str, list[str]] = {}
        for table in self.store.rows(PICTURES, old, ["path", "hash"]):
            for row in table.to_pylist():
                by_hash.setdefault(row["hash"], []).append(row["path"])
        moved: dict[str, str] = {}
        files: dict[str, Found] = {}  # by old path
        with ThreadPoolExecutor(self.workers) as pool:
            for file, digest in zip(candidates, pool.map(_hash, candidates), strict=True):
                if places := by_hash.get(digest):
                    moved[file.path] = places.pop()
                    files[moved[file.path]] = file
        for rows in self.store.rows(PICTURES, list(files)):
            self._rewrite(rows, files)
        return moved

    def _rewrite(self, rows: Any, files: dict[str, Found]) -> None:
        import pyarrow as pa

        old = rows["path"].to_pylist()
        new = {
            "path": [files[p].path for p in old],
            "mtime_ns": [files[p].mtime_ns for p in old],
            "modified": [file_time(files[p].mtime_ns) for p in old],
        }
        for name, values in new.items():
            at = rows.schema.get_field_index(name)
            rows = rows.set_column(at, rows.schema.field(at), pa.array(values, rows.schema.field(at).type))
        # New rows first: a kill in between leaves two rows, and the next run removes the one whose file is missing.
        self.store.add(PICTURES, rows)
        self.store.remove(PICTURES, old)
        self._tell(len(old))

    def _embed(self, files: Sequence[Found]) -> None:
        done: list[Done] = []
        failed: list[Failed] = []
        committed = time.monotonic()
        try:
            for batch in embed_files(self.model, files, workers=self.workers):
                for item in batch:
                    if isinstance(item, Done):
                        done.append(item)
                    else:
                        failed.append(item)
                        self.failed.append((item.file.path, item.reason))
                self._tell(len(batch))
                if len(done) >= COMMIT_ROWS or time.monotonic() - committed >= COMMIT_SECONDS:
                    # Taken away first: an interrupt may come when the rows are in the table, and they go in once.
                    rows, refused, done, failed = done, failed, [], []
                    self._commit(rows, refused)
                    committed = time.monotonic()
        finally:  # also when interrupted: what is finished is kept
            self._commit(done, failed)

    def _commit(self, done: Sequence[Done], failed: Sequence[Failed]) -> None:
        added = [d.row for d in done if d.file.path not in self.known]
        changed = [d.row for d in done if d.file.path in self.known]
        refused = [
            {"path": f.file.path, "bytes": f.file.size, "mtime_ns": f.file.mtime_ns, "reason": f.reason} for f in failed
        ]
        self.store.add(PICTURES, self.store.table(PICTURES, added))
        self.store.replace(PICTURES, self.store.table(PICTURES, changed))
        self.store.replace(FAILURES, self.store.table(FAILURES, refused))
        self.store.remove(PICTURES, [f.file.path for f in failed if f.file.path in self.known])
        self.store.remove(FAILURES, [d.file.path for d in done if d.file.path in self.refused])
        self.added += len(added)
        self.changed += len(changed)

    def _tell(self, more: int) -> None:
        self.done += more
        if self.progress is not None:
            seconds = time.monotonic() - self.started
            self.progress(Progress(done=self.done, total=self.total, failed=len(self.failed), seconds=seconds))


def _refuse_strangers(path: Path) -> None:
    """Raises IndexStateError when the folder holds what an index has not written: it may be emptied next."""
    names = {p.name for p in path.iterdir()} if path.is_dir() else set()
    own = {"lock", META, "tables"} if META in names else {"lock"}
    others = sorted(n for n in names - own if not (n.startswith(f".{META}.") and n.endswith(".tmp")))
    if others:
        shown = ", ".join(others[:3]) + ", ..." * (len(others) > 3)
        raise IndexStateError(f"{path} holds other files ({shown}); an index wants a folder of its own")
    if META in names:
        read_meta(path / META)


def _is_empty(folder: str) -> bool:
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is None
    except OSError:
        return False  # `walk` says why it cannot be looked at


def _hash(file: Found) -> str:
    try:
        return file_hash(file.path)
    except OSError:
        return ""  # not a move; reading it for embedding will say what is wrong


def _under(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _outermost(folders: Sequence[str]) -> list[str]:
    """The folders without those that lie in another of them."""
    unique = dict.fromkeys(folders)
    return [f for f in unique if not any(_under(f, other) for other in unique if other != f)]
