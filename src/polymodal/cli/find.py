"""The commands that find pictures: index, search, classify, embed, and demo."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shlex
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.cli.common import MODEL, Commands, command, count, load_model, model_name, with_json, with_model
from polymodal.cli.show import bar, console, plain, print_json
from polymodal.core.errors import ConfigError, MissingDependency, PolymodalError

if TYPE_CHECKING:
    from polymodal.retrieve.index import Report
    from polymodal.retrieve.reader import Hit, Reader

SHOWN_FAILURES = 20


def _index(arguments: argparse.Namespace) -> int:
    _need_store()
    from polymodal.retrieve.reader import META, Meta

    path = _index_path(arguments)
    exists = (path / META).is_file()
    if not exists and not arguments.folders:
        raise ConfigError(f"there is no index at {path} yet: say which folders to index, polymodal index DIR")
    rebuild = exists and arguments.rebuild
    old = None
    if exists:
        with contextlib.suppress(PolymodalError) if rebuild else contextlib.nullcontext():
            old = Meta.read(path)
    folders = [Path(f).expanduser().resolve() for f in arguments.folders]
    if rebuild and old:
        away = [r for r in old.roots if not Path(r).is_dir()]
        if away and not folders:
            raise ConfigError(
                f"not there now: {', '.join(away)}. Their pictures would be lost to the index: mount them, or say "
                "which folders it shall hold: polymodal index DIR --rebuild"
            )
        folders += [Path(r) for r in old.roots if r not in away]
    if rebuild and not folders:
        raise ConfigError(
            f"the index at {path} does not say which folders it was made of; say which folders: "
            "polymodal index DIR --rebuild"
        )
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{folder} is not a folder" if folder.exists() else f"{folder} does not exist")
    name = model_name(arguments.model or (old.model if old else "") or MODEL)
    model = _embedder(name)
    from polymodal.retrieve.index import Index

    index = Index.open(path) if exists and not rebuild else Index.create(path, model, name=name, overwrite=True)
    with bar("indexing") as show:
        report = index.update(model, folders, progress=lambda p: show(p.done, p.total), workers=arguments.workers)
    if arguments.json:
        print_json({**vars(report), "index": str(path), "pictures": index.stats().pictures})
    else:
        _print_report(report, index.stats().pictures, path)
    return 0


def _print_report(report: Report, pictures: int, path: Path) -> None:
    parts = [f"{getattr(report, what):,} {what}" for what in ("added", "changed", "moved", "deleted", "unchanged")]
    embedded = report.added + report.changed
    rate = f", {embedded / report.seconds:,.0f} pictures/s" if embedded else ""
    print(f"{pictures:,} pictures in {plain(str(path))}: {', '.join(parts)} ({report.seconds:.1f} s{rate})")
    if report.failed:
        print(f"{len(report.failed):,} could not be indexed; they are tried again when they change:")
        for name, reason in report.failed[:SHOWN_FAILURES]:
            print(f"  {plain(name)}: {plain(reason)}")
        if len(report.failed) > SHOWN_FAILURES:
            print(f"  ... and {len(report.failed) - SHOWN_FAILURES:,} more; --json lists all")


def _search(arguments: argparse.Namespace) -> int:
    _need_store()
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    from polymodal.retrieve.filters import to_sql
    from polymodal.retrieve.reader import Meta

    path = _index_path(arguments)
    meta = Meta.read(path)
    if arguments.filter:
        to_sql(arguments.filter)  # a mistake is told before anything is loaded
    name = model_name(arguments.model or meta.model or MODEL)
    query = arguments.words if arguments.image is None else Path(arguments.image).expanduser()
    # The store takes as long to import as torch does: each gets a core.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_ignore_interrupts) as pool:
        pool.submit(_open, path)
        model = _embedder(name)
        meta.check(path, model.fingerprint)
        from polymodal.core.sample import Text

        part = Text(query) if isinstance(query, str) else _medium(query)
        vector = model.embed([part])[0].tolist()
        wants_page = arguments.html is not None
        found = pool.submit(_find, path, vector, arguments.top, arguments.filter, wants_page)
        hits, thumbnails, pictures = found.result()
    title = query if isinstance(query, str) else query.name
    if wants_page:
        _write_page(Path(arguments.html), title, query, hits, thumbnails, f"of {pictures:,} pictures, by {name}")
    if arguments.json:
        print_json({"query": str(query), "model": name, "index": str(path), "hits": [_hit_json(h) for h in hits]})
    else:
        _print_hits(title, hits)
        if wants_page:
            print(f"page: {plain(str(Path(arguments.html).resolve()))}")
    return 0


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the main process, which ends this one


_reader: Reader | None = None


def _open(path: Path) -> None:
    global _reader
    from polymodal.retrieve.reader import Reader

    _reader = Reader.open(path)


def _find(
    path: Path, vector: list[float], top: int, where: str | None, page: bool
) -> tuple[list[Hit], dict[str, bytes], int]:
    if _reader is None:
        _open(path)
    assert _reader is not None
    hits = _reader.nearest(vector, top=top, where=where)
    return hits, _reader.thumbnails([h.path for h in hits]) if page else {}, _reader.store.pictures.count_rows()


def _write_page(
    target: Path, title: str, query: str | Path, hits: list[Hit], thumbnails: dict[str, bytes], about: str
) -> None:
    from polymodal.core.files import atomic_write
    from polymodal.retrieve.gallery import Shelf, page

    picture = None
    if isinstance(query, Path):
        from polymodal.retrieve.ingest import thumbnail_of

        picture = thumbnail_of(query)
    shelf = Shelf(query=title, hits=hits, picture=picture)
    atomic_write(target.expanduser(), page(title, f"the {len(hits)} nearest {about}", [shelf], thumbnails))


def _hit_json(hit: Hit) -> dict[str, Any]:
    return {
        "path": hit.path,
        "score": hit.score,
        "width": hit.size[0],
        "height": hit.size[1],
        "bytes": hit.bytes,
        "time": hit.time.isoformat() if hit.time else None,
        "duplicates": list(hit.duplicates),
    }


def _print_hits(title: str, hits: Sequence[Hit], marks: frozenset[str] = frozenset(), root: Path | None = None) -> None:
    from rich.table import Table
    from rich.text import Text

    from polymodal.retrieve.gallery import size_text

    if not hits:
        print(f"{plain(title)}: nothing was found")
        return
    table = Table(title=Text(plain(title), style="bold"), title_justify="left", box=None, pad_edge=False)
    table.add_column("", justify="right", style="dim")
    table.add_column("score", justify="right", style="cyan")
    table.add_column("file", overflow="fold")
    table.add_column("size", justify="right", style="dim", no_wrap=True)
    if marks:
        table.add_column("")
    for rank, hit in enumerate(hits, 1):
        name = Text(plain(_short(hit.path, root or Path.cwd())))
        if hit.duplicates:
            name.append(f"  +{len(hit.duplicates)} near-duplicate{'s' * (len(hit.duplicates) > 1)}", style="dim")
        row: list[str | Text] = [
            str(rank),
            f"{hit.score:.3f}",
            name,
            f"{hit.size[0]}x{hit.size[1]}  {size_text(hit.bytes)}" if hit.size[0] else size_text(hit.bytes),
        ]
        if marks:
            row.append(Text("never seen in training" if hit.path in marks else "", style="green"))
        table.add_row(*row)
    console().print(table)


def _short(path: str, root: Path) -> str:
    return os.path.relpath(path, root) if Path(path).is_relative_to(root) else path


def _classify(arguments: argparse.Namespace) -> int:
    labels = [label.strip() for label in arguments.labels.split(",") if label.strip()]
    name = model_name(arguments.model or MODEL)
    model = _embedder(name)
    from polymodal.core.sample import Image
    from polymodal.retrieve.zeroshot import TEMPLATES, Matches, classify

    if not isinstance(model, Matches):
        raise ConfigError(f"{name} does not compare pictures with words; take a CLIP or a SigLIP")
    images = [Image(Path(p).expanduser()) for p in arguments.pictures]
    templates = arguments.template or TEMPLATES
    shares = classify(model, images, labels, templates=templates, calibrate=arguments.calibrate)
    rows: list[dict[str, Any]] = [
        {
            "path": path,
            "labels": [{"label": labels[i], "probability": float(share[i])} for i in share.argsort(descending=True)],
        }
        for path, share in zip(arguments.pictures, shares, strict=True)
    ]
    if arguments.json:
        print_json(rows)
        return 0
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("file", overflow="fold")
    for place in range(min(3, len(labels))):
        table.add_column(("label", "then", "then")[place], overflow="fold")
    for row in rows:
        best = [Text(f"{plain(r['label'])} {100 * r['probability']:.0f} %") for r in row["labels"][:3]]
        table.add_row(Text(plain(row["path"])), *best)
    console().print(table)
    return 0


def _embed(arguments: argparse.Namespace) -> int:
    if (arguments.out is None) == (not arguments.json):
        raise ConfigError("say where the vectors go: --out FILE.npy, --out FILE.safetensors, or --json")
    out = Path(arguments.out).expanduser() if arguments.out else None
    if out is not None and out.suffix not in (".npy", ".safetensors"):
        raise ConfigError(f"{out}: vectors are written as .npy or .safetensors")
    model = _embedder(model_name(arguments.model or MODEL))
    from polymodal.core.files import atomic_path

    media = [_medium(Path(p).expanduser()) for p in arguments.files]
    done = 0
    with bar("embedding") as show:

        def advance(count: int) -> None:
            nonlocal done
            done += count
            show(done, len(media))

        vectors = model.embed(media, progress=advance).contiguous()
    if out is None:
        print_json([{"path": p, "vector": v} for p, v in zip(arguments.files, vectors.tolist(), strict=True)])
        return 0
    with atomic_path(out) as temporary:
        if out.suffix == ".npy":
            import numpy as np

            with temporary.open("wb") as file:
                np.save(file, vectors.numpy(), allow_pickle=False)
        else:
            from safetensors.torch import save_file

            save_file({"vectors": vectors}, temporary, {"paths": json.dumps(arguments.files)})
    print(f"{len(vectors)} vectors of {vectors.shape[1]} numbers in {plain(str(out))}")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    _need_store()
    from polymodal import demo

    folder = Path(arguments.folder)
    print("Drawing pictures from installed fonts (the first time takes some seconds) ...", flush=True)
    with bar("indexing") as show:
        done = demo.run(folder, progress=lambda p: show(p.done, p.total))
    report = done.report
    print(
        f"{report.added + report.unchanged:,} pictures in {plain(str(done.pictures))}, {len(done.unseen):,} of them "
        f"never seen in training; {report.added:,} indexed now, in {report.seconds:.1f} s\n"
    )
    for search in done.searches:
        _print_hits(f"{search.query}  ({1000 * search.seconds:.0f} ms)", search.hits, done.unseen, done.pictures)
        print()
    print(f"The same as a page: {plain(str(done.page))}")
    ours = shlex.join(["polymodal", "search", "a yellow animal", "--index", os.path.relpath(folder / "index")])
    print(f"Ask it more:        {ours}\nYour own pictures:  polymodal index ~/Pictures")
    return 0


def _medium(path: Path) -> Any:
    from polymodal.core.sample import Audio, Image, is_sound

    return Audio(path) if is_sound(path) else Image(path)


def _need_store() -> None:
    if importlib.util.find_spec("lancedb") is None:
        raise MissingDependency("an index", "lancedb", "search")


def _index_path(arguments: argparse.Namespace) -> Path:
    from polymodal.retrieve.reader import default_path

    return Path(arguments.index or default_path()).expanduser().resolve()


def _embedder(name: str) -> Any:
    from polymodal.core.verbs import Embeds

    model = load_model(name)
    if not isinstance(model, Embeds):
        raise ConfigError(f"{name} gives no vectors; take a CLIP or a SigLIP")
    return model


def _with_index(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--index", metavar="PATH", help="default: $POLYMODAL_INDEX, else ~/.local/share/polymodal/index")


def add(commands: Commands) -> None:
    """Declares the commands that find pictures."""
    sub = command(
        commands,
        "index",
        _index,
        "make pictures (or sounds) searchable, or bring the index up to date with their folders",
        """\
Only what changed is read again: files of known size and time are not opened, moved files keep their
vectors, deleted ones leave. It may be interrupted or killed at any time; the same command goes on.
Broken and hostile files are listed at the end and never fatal.

examples:
  polymodal index ~/Pictures ~/Scans        add two folders
  polymodal index                           bring all known folders up to date
  polymodal index ~/Pictures --model openai/clip-vit-base-patch32 --rebuild""",
    )
    sub.add_argument("folders", nargs="*", metavar="DIR", help="folders to look through (default: all known ones)")
    _with_index(sub)
    with_model(sub, f"that of the index, else {MODEL}")
    sub.add_argument("--rebuild", action="store_true", help="empty the index first and fill it with this model")
    sub.add_argument("--workers", type=count, metavar="N", help="decoding threads (default: one a core)")
    with_json(sub)

    from polymodal.retrieve.filters import GRAMMAR

    sub = command(
        commands,
        "search",
        _search,
        "find pictures or sounds, by words or by one that is like them",
        f"""\
The score is the cosine between the query and the picture. Near-duplicates stand under the best of
them: the same file content, or a cosine of at least 0.985 to a better hit.

filters:
{GRAMMAR}

examples:
  polymodal search "a red fruit" --top 5
  polymodal search --image cat.jpg --html cats.html
  polymodal search "a beach" --filter 'width>=640 and path~"holiday"' --json""",
    )
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument("words", nargs="?", metavar="WORDS", help="what the pictures should show, or the sounds be of")
    what.add_argument("--image", "--sound", metavar="FILE", help="find what is like this picture or sound")
    sub.add_argument("--top", type=count, default=20, metavar="N", help="how many (default: 20)")
    sub.add_argument("--filter", metavar="TEST", help="only pictures that pass a test, see below")
    sub.add_argument("--html", metavar="FILE", help="also write a gallery: one file that works offline")
    with_json(sub)
    _with_index(sub)
    with_model(sub, "that of the index")

    sub = command(
        commands,
        "classify",
        _classify,
        "put pictures into classes that you name",
        """\
Each label is framed by a few sentences ("a picture of {}", ...) and their mean is compared with the
picture. The shares are calibrated in this sense: they are the softmax, over your labels, of the
model's own logits at the temperature it was trained with, so they add up to 100 % and say nothing
about labels that you did not name. --calibrate also divides by the share that the model gives each
label for pictures that show nothing (grey, black, white, noise), which takes away its liking for
some of the words.

examples:
  polymodal classify cat.jpg --labels cat,dog,horse
  polymodal classify *.png --labels "a cat,a dog" --template "a blurry photo of {}" --json""",
    )
    sub.add_argument("pictures", nargs="+", metavar="IMG")
    sub.add_argument("--labels", required=True, metavar="A,B,C", help="at least two, with commas between them")
    sub.add_argument(
        "--template", action="append", metavar="TEXT", help="a sentence with {} for the label; may be given again"
    )
    sub.add_argument("--calibrate", action="store_true", help="take away what the model sees in empty pictures")
    with_json(sub)
    with_model(sub)

    sub = command(
        commands,
        "embed",
        _embed,
        "write the vectors of pictures or sounds",
        """\
A row a picture, in the order given, each of length 1.

examples:
  polymodal embed *.jpg --out vectors.npy
  polymodal embed a.png b.png --out vectors.safetensors     the paths are in its metadata
  polymodal embed a.png --json""",
    )
    sub.add_argument("files", nargs="+", metavar="FILE")
    sub.add_argument("--out", metavar="FILE", help="a .npy or .safetensors file")
    with_json(sub)
    with_model(sub)


def add_demo(commands: Commands) -> None:
    """Declares ``demo``, the last of all."""
    sub = command(
        commands,
        "demo",
        _demo,
        "draw pictures, index them and find them by words, from nothing",
        """\
The pictures come from emoji fonts of this machine; some of them, and one whole artist, were never
seen in training, and are marked. Nothing is downloaded and nothing is opened.

examples:
  polymodal demo
  polymodal demo --folder ~/polymodal-demo""",
    )
    sub.add_argument("--folder", default="demo", metavar="DIR", help="where to put it all (default: demo)")
