"""The command line: parses, calls, prints. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.core.errors import ConfigError, MissingDependency, PolymodalError

if TYPE_CHECKING:
    from polymodal.retrieve.index import Report
    from polymodal.retrieve.reader import Hit, Reader

MODEL = "polymodal/nano-clip"
SHOWN_FAILURES = 20


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0, 1 for an error that is the user's to mend, 130 for Ctrl-C; 2 for usage exits."""
    arguments = _parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return arguments.run(arguments)
    except PolymodalError as error:
        if arguments.debug:
            raise
        print("polymodal: " + plain(str(error), keep="\n"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\npolymodal: interrupted; nothing is lost, run the same command again", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) has enough. Python would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:  # a full disk, a folder that may not be written to
        if arguments.debug:
            raise
        where = f": {error.filename}" if error.filename is not None else ""
        print("polymodal: " + plain(f"{error.strerror or error}{where}", keep="\n"), file=sys.stderr)
        return 1


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    print("polymodal: " + plain(str(message), keep="\n"), file=sys.stderr)


def plain(text: str, keep: str = "") -> str:
    """``text`` without anything that a terminal would obey: file names are written by strangers."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


# ---- commands ----


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
    name = _model_name(arguments.model or (old.model if old else "") or MODEL)
    model = _load(name)
    from polymodal.retrieve.index import Index

    index = Index.open(path) if exists and not rebuild else Index.create(path, model, name=name, overwrite=True)
    with _bar("indexing") as show:
        report = index.update(model, folders, progress=lambda p: show(p.done, p.total), workers=arguments.workers)
    if arguments.json:
        _print_json({**vars(report), "index": str(path), "pictures": index.stats().pictures})
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
    name = _model_name(arguments.model or meta.model or MODEL)
    query = arguments.words if arguments.image is None else Path(arguments.image).expanduser()
    # The store takes as long to import as torch does: each gets a core.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_ignore_interrupts) as pool:
        pool.submit(_open, path)
        model = _load(name)
        meta.check(path, model.fingerprint)
        from polymodal.core.sample import Image, Text

        part = Text(query) if isinstance(query, str) else Image(query)
        vector = model.embed([part])[0].tolist()
        wants_page = arguments.html is not None
        found = pool.submit(_find, path, vector, arguments.top, arguments.filter, wants_page)
        hits, thumbnails, pictures = found.result()
    title = query if isinstance(query, str) else query.name
    if wants_page:
        _write_page(Path(arguments.html), title, query, hits, thumbnails, f"of {pictures:,} pictures, by {name}")
    if arguments.json:
        _print_json({"query": str(query), "model": name, "index": str(path), "hits": [_hit_json(h) for h in hits]})
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
        from polymodal.core.sample import Image
        from polymodal.modalities.image import decode
        from polymodal.retrieve.ingest import THUMBNAIL, jpeg, thumbnail

        picture = jpeg(thumbnail(decode(Image(query)), THUMBNAIL))
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
            f"{hit.size[0]}x{hit.size[1]}  {size_text(hit.bytes)}",
        ]
        if marks:
            row.append(Text("never seen in training" if hit.path in marks else "", style="green"))
        table.add_row(*row)
    _console().print(table)


def _short(path: str, root: Path) -> str:
    return os.path.relpath(path, root) if Path(path).is_relative_to(root) else path


def _classify(arguments: argparse.Namespace) -> int:
    labels = [label.strip() for label in arguments.labels.split(",") if label.strip()]
    name = _model_name(arguments.model or MODEL)
    model = _load(name)
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
        _print_json(rows)
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
    _console().print(table)
    return 0


def _embed(arguments: argparse.Namespace) -> int:
    if (arguments.out is None) == (not arguments.json):
        raise ConfigError("say where the vectors go: --out FILE.npy, --out FILE.safetensors, or --json")
    out = Path(arguments.out).expanduser() if arguments.out else None
    if out is not None and out.suffix not in (".npy", ".safetensors"):
        raise ConfigError(f"{out}: vectors are written as .npy or .safetensors")
    model = _load(_model_name(arguments.model or MODEL))
    from polymodal.core.files import atomic_path
    from polymodal.core.sample import Image

    images = [Image(Path(p).expanduser()) for p in arguments.files]
    done = 0
    with _bar("embedding") as show:

        def advance(count: int) -> None:
            nonlocal done
            done += count
            show(done, len(images))

        vectors = model.embed(images, progress=advance).contiguous()
    if out is None:
        _print_json([{"path": p, "vector": v} for p, v in zip(arguments.files, vectors.tolist(), strict=True)])
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


def _train(arguments: argparse.Namespace) -> int:
    sys.path.insert(0, os.getcwd())  # a recipe may import its neighbours
    from polymodal.train import fit, load_run

    run = load_run(arguments.recipe)
    out = Path(arguments.out or f"runs/{run.name}")
    result = fit(
        run,
        out,
        resume=not arguments.fresh,
        until_step=arguments.until_step,
        device=arguments.device,
        parallel=arguments.parallel,
    )
    if int(os.environ.get("RANK", "0")) > 0:
        return 0  # the first process speaks for all
    from polymodal.systems.base import System

    if result.finished and isinstance(result.model, System):
        print(f"model: {plain(str(result.model.save(out / 'model')))}")
    print(f"{run.name}: step {result.step} of {run.steps}, loss {result.loss:.4f}, in {plain(str(result.folder))}")
    for name, value in result.metrics.items():
        bar = run.expect.get(name)
        print(f"  {name:<28} {value:.4f}" + (f"  (bar {bar.value}, chance {bar.chance})" if bar else ""))
    missed = [name for name, reached in result.reached.items() if not reached] if result.finished else []
    if missed:
        print(f"polymodal: below the bar: {', '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0


def _ls(arguments: argparse.Namespace) -> int:
    from importlib import resources

    from polymodal.systems import TABLE
    from polymodal.weights.hub import shipped

    file = resources.files("polymodal.systems") / "proofs.json"
    proofs: dict[str, dict[str, str]] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    names = [arguments.system] if arguments.system else list(TABLE)
    rows = [_system(TABLE[name], proofs.get(name, {})) for name in names]
    models = {name: str(path) for name, path in shipped().items()}
    if arguments.json:
        _print_json({"systems": rows, "shipped": models})
        return 0
    from rich.table import Table

    if arguments.system:
        _print_system(rows[0])
        return 0
    table = Table(box=None, pad_edge=False)
    for column in ("system", "paper", "year", "verbs", "presets", "proven"):
        table.add_column(column, overflow="fold", style="bold" if column == "system" else "")
    for row in rows:
        passed = sum(outcome == "passed" for outcome in row["proofs"].values())
        proven = f"{passed} of {len(row['proofs'])}" if row["proofs"] else "not run"
        table.add_row(
            row["name"], row["paper"], str(row["year"]), " ".join(row["verbs"]), str(len(row["presets"])), proven
        )
    _console().print(table)
    print("\nshipped models: " + (", ".join(models) or "none"))
    print("polymodal ls SYSTEM lists its presets and what each proof is")
    return 0


def _system(entry: Any, proofs: dict[str, str]) -> dict[str, Any]:
    from polymodal.core.verbs import verbs_of

    cls = entry.resolve()
    presets = getattr(sys.modules[cls.__module__], "PRESETS", {})
    return {
        "name": entry.name,
        "paper": entry.paper,
        "year": entry.year,
        "url": entry.url,
        "verbs": list(verbs_of(cls)),
        "presets": list(presets),
        "proofs": proofs,
    }


def _print_system(row: dict[str, Any]) -> None:
    print(f"{row['name']}: {row['paper']} ({row['year']}), {row['url']}")
    print(f"verbs: {', '.join(row['verbs'])}")
    print("presets:", *[f"\n  {preset}" for preset in row["presets"]] or ["none"])
    print("proofs:", *[f"\n  {outcome:<8} {claim}" for claim, outcome in row["proofs"].items()] or ["not run"])


def _verify(arguments: argparse.Namespace) -> int:
    from polymodal.core.files import write_json
    from polymodal.verify import verify

    certificate = verify(arguments.name, arguments.revision)
    if arguments.out:
        write_json(arguments.out, certificate.to_json())
    if arguments.json:
        _print_json(certificate.to_json())
    else:
        print(plain(certificate.text(), keep="\n"))
    return 0 if certificate.ok else 1


def _plan(arguments: argparse.Namespace) -> int:
    from polymodal.plan import Input, price

    if arguments.checklist:
        return _checklist(arguments)
    if arguments.calibrate:
        from polymodal.machine import calibrate

        print("Measuring this machine (about half a minute; best when it is quiet) ...", file=sys.stderr, flush=True)
        rates = calibrate()
        if arguments.name is None:
            print(f"{plain(rates.name)}: {plain(rates.cpu)}, {rates.threads} threads, measured {rates.date}")
            return 0
    if arguments.name is None:
        raise ConfigError("say what to price: a preset of polymodal ls SYSTEM, a shipped model or a folder")
    given = Input(
        images=tuple(arguments.image) if arguments.image else None, frames=arguments.frames, fps=arguments.fps,
        text=arguments.text, new=arguments.new, batch=arguments.batch,
    )  # fmt: skip
    plan = price(arguments.name, given, dtype=arguments.dtype, train=arguments.train)
    if arguments.json:
        _print_json(plan.to_json())
    else:
        _print_plan(plan)
    return 0


def _print_plan(plan: Any) -> None:
    from rich.table import Table
    from rich.text import Text

    title = Text(f"{plain(plan.name)}: {plan.system}, {plan.dtype}, batch {plan.input.batch}", style="bold")
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=False)
    table.add_column("", style="dim")
    table.add_column("", overflow="fold")
    table.add_column("", justify="right", style="cyan")
    last = ""
    for section, what, much in plan.rows():
        table.add_row("" if section == last else Text(plain(section)), Text(plain(what)), much)
        last = section
    _console().print(table)
    if plan.note:
        print(plain(plan.note))


def _checklist(arguments: argparse.Namespace) -> int:
    from polymodal.checklist import QUESTIONS, recommend

    answers = {}
    for question in QUESTIONS:
        names = list(question.options)
        print(question.ask, file=sys.stderr)
        for name, meaning in question.options.items():
            print(f"  {name:<10} {meaning}", file=sys.stderr)
        answers[question.key] = _line(f"[{names[0]}] ") or names[0]
    memory = _line("How many GiB of memory may it take? [8] ") or "8"
    try:
        room = float(memory)
    except ValueError:
        raise ConfigError(f"{memory!r} is not a number of GiB") from None
    found = recommend(answers, room)
    if arguments.json:
        _print_json(found.to_json())
        return 0
    print(plain(found.text(), keep="\n") + "\n")
    _print_plan(found.plan)
    return 0


def _line(ask: str) -> str:
    """A line of the terminal or of a pipe; the question goes to stderr, so that --json stays whole."""
    print(ask, end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip()


def _ask(arguments: argparse.Namespace) -> int:
    model, settings = _writer(arguments)
    row = _answer(arguments, model, settings, arguments.files, arguments.question)
    if arguments.json:
        _print_json(row)
    return 0


def _caption(arguments: argparse.Namespace) -> int:
    from polymodal.ask import CAPTION

    model, settings = _writer(arguments)
    rows: list[dict[str, Any]] = []
    failed = 0
    for file in arguments.files:
        if len(arguments.files) > 1 and not arguments.json:
            print(f"{plain(file)}: ", end="", flush=True)
        try:
            rows.append(_answer(arguments, model, settings, [file], arguments.prompt or CAPTION, first=len(rows)))
        except PolymodalError as error:  # the others are still described
            failed += 1
            print("polymodal: " + plain(str(error), keep="\n"), file=sys.stderr)
    if arguments.json:
        _print_json(rows)
    return 1 if failed else 0


def _answer(
    arguments: argparse.Namespace, model: Any, settings: Any, files: Sequence[str], question: str, first: int = 0
) -> dict[str, Any]:
    """Streams one answer, unless it is wanted as JSON; ``first`` numbers the pictures of ``--show``."""
    from polymodal.ask import seen, stream
    from polymodal.core.chat import Chat
    from polymodal.core.sample import Image, Sample

    parts = [Sample.of(Path(file).expanduser()).parts[0] for file in files]
    shown: list[dict[str, Any]] = []
    for number, part in enumerate(parts if arguments.show else []):
        if not isinstance(part, Image):
            continue
        pictures, tokens = seen(model, part)
        folder = Path(arguments.show)
        folder.mkdir(parents=True, exist_ok=True)
        names = [str(folder / f"{first + number}-{tile}.png") for tile in range(len(pictures))]
        for picture, file in zip(pictures, names, strict=True):
            picture.save(file)
        shown.append({"file": part.where, "tokens": tokens, "seen": names})
    steps = []
    for step in stream(model, Chat.of([*parts, question]), settings):
        steps.append(step)
        if not arguments.json:
            print(plain(step.text, keep="\n"), end="", flush=True)
    if not arguments.json:
        print()
        for each in shown:
            print(plain(f"{each['file']}: {each['tokens']} tokens from {', '.join(each['seen'])}"))
    text = "".join(step.text for step in steps)
    row = {"files": list(files), "question": question, "answer": text, "finished": steps[-1].finished}
    return row | {"tokens": len(steps), "model": arguments.model} | ({"seen": shown} if shown else {})


def _chat(arguments: argparse.Namespace) -> int:
    from polymodal.ask import stream
    from polymodal.core.chat import Chat
    from polymodal.core.sample import Sample

    model, settings = _writer(arguments)
    waiting = [Sample.of(Path(file).expanduser()).parts[0] for file in arguments.files]
    chat: Chat | None = None
    print("Type a message. /add FILE shows a picture with the next, /new starts over, Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return 0
        command, _, rest = line.partition(" ")
        text = ""
        try:
            if command == "/new":
                chat, waiting = None, []
            elif command == "/add":
                waiting += [Sample.of(Path(rest.strip()).expanduser()).parts[0]]
            elif line:
                turn: list[Any] = [*waiting, line]
                waiting = []  # a picture that cannot be read must not spoil the next message, too
                asked = Chat.of(turn) if chat is None else chat.ask(turn)
                try:
                    for step in stream(model, asked, settings):
                        text += step.text
                        print(plain(step.text, keep="\n"), end="", flush=True)
                except KeyboardInterrupt:  # enough of this answer; the conversation goes on
                    pass
                print()
                chat = asked.reply(text)
        except PolymodalError as error:  # the conversation goes on without this turn
            print(("\n" if text else "") + "polymodal: " + plain(str(error), keep="\n"), file=sys.stderr)


def _writer(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The model that a command asks, and how it is to answer."""
    import torch

    from polymodal.api import load
    from polymodal.core.verbs import Generates
    from polymodal.tokenizers.language import LanguageTokenizer

    model = load(arguments.model, precision="auto")
    if not isinstance(model, Generates):
        raise ConfigError(f"{arguments.model} writes no text, it gives vectors: take a vision-language model")
    if not isinstance(model.tokenizer, LanguageTokenizer):
        raise ConfigError(f"{arguments.model} has no tokenizer.json, so it can neither read nor write text")
    return model.cuda() if torch.cuda.is_available() else model, _settings(arguments, model)


def _settings(arguments: argparse.Namespace, model: Any) -> Any:
    from polymodal.core.files import read_json
    from polymodal.samplers.autoregressive import Settings

    constraint = None
    if arguments.schema is not None:
        from polymodal.samplers.constraints import Constraint, Vocabulary

        words = Vocabulary(model.tokenizer.backend.to_str(), model.vocab_size, model.stop_ids)
        constraint = Constraint.json(read_json(arguments.schema), words)
    return Settings(
        max_new_tokens=arguments.max_tokens, temperature=arguments.temperature, top_p=arguments.top_p,
        seed=arguments.seed, constraint=constraint,
    )  # fmt: skip


def _demo(arguments: argparse.Namespace) -> int:
    _need_store()
    from polymodal import demo

    folder = Path(arguments.folder)
    print("Drawing pictures from installed fonts (the first time takes some seconds) ...", flush=True)
    with _bar("indexing") as show:
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


# ---- shared ----


def _need_store() -> None:
    if importlib.util.find_spec("lancedb") is None:
        raise MissingDependency("an index", "lancedb", "search")


def _index_path(arguments: argparse.Namespace) -> Path:
    from polymodal.retrieve.reader import default_path

    return Path(arguments.index or default_path()).expanduser().resolve()


def _model_name(name: str) -> str:
    """What an index may remember: a folder by its whole path."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.is_dir() else name


def _load(name: str) -> Any:
    import torch

    from polymodal.api import load
    from polymodal.core.verbs import Embeds

    model = load(name, precision="auto")
    if not isinstance(model, Embeds):
        raise ConfigError(f"{name} gives no vectors; take a CLIP or a SigLIP")
    return model.cuda() if torch.cuda.is_available() else model


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))  # ASCII only, so that odd file names survive any pipe


def _console(*, stderr: bool = False) -> Any:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=not sys.stdout.isatty())


@contextlib.contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A live bar on the error stream, where that is a terminal. Yields ``show(done, total)``."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        ProgressColumn,
        SpinnerColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bar
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:,.0f} pictures/s" if speed else "", style="dim")

    columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate()]
    console = _console(stderr=True)
    with Bar(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


# ---- parsing ----


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)


def _parser() -> argparse.ArgumentParser:
    from polymodal import __version__

    parser = argparse.ArgumentParser(
        prog="polymodal",
        description="Find pictures by words and ask about them; train, load and check the models that do it.",
        epilog="""\
a first look:
  polymodal demo                          pictures, an index and five searches, from nothing
  polymodal index ~/Pictures              then:
  polymodal search "a dog on the beach"

polymodal COMMAND --help teaches each command with examples.""",
        formatter_class=_Help,
    )
    parser.add_argument("--version", action="version", version=f"polymodal {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], purpose: str, examples: str) -> Any:
        sub = commands.add_parser(
            name,
            help=purpose,
            description=purpose[0].upper() + purpose[1:] + ".",
            epilog=examples,
            formatter_class=_Help,
        )
        sub.set_defaults(run=run)
        sub.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
        return sub

    def with_model(sub: Any, default: str = MODEL) -> None:
        sub.add_argument(
            "--model", metavar="NAME", help=f"a shipped model, a folder or a Hub name (default: {default})"
        )

    def with_index(sub: Any) -> None:
        sub.add_argument(
            "--index", metavar="PATH", help="default: $POLYMODAL_INDEX, else ~/.local/share/polymodal/index"
        )

    def with_json(sub: Any) -> None:
        sub.add_argument("--json", action="store_true", help="print JSON")

    sub = command(
        "index",
        _index,
        "make pictures searchable, or bring the index up to date with their folders",
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
    with_index(sub)
    with_model(sub, f"that of the index, else {MODEL}")
    sub.add_argument("--rebuild", action="store_true", help="empty the index first and fill it with this model")
    sub.add_argument("--workers", type=_count, metavar="N", help="decoding threads (default: one a core)")
    with_json(sub)

    from polymodal.retrieve.filters import GRAMMAR

    sub = command(
        "search",
        _search,
        "find pictures by words or by a picture",
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
    what.add_argument("words", nargs="?", metavar="WORDS", help="what the pictures should show")
    what.add_argument("--image", metavar="FILE", help="find pictures like this one")
    sub.add_argument("--top", type=_count, default=20, metavar="N", help="how many (default: 20)")
    sub.add_argument("--filter", metavar="TEST", help="only pictures that pass a test, see below")
    sub.add_argument("--html", metavar="FILE", help="also write a gallery: one file that works offline")
    with_json(sub)
    with_index(sub)
    with_model(sub, "that of the index")

    sub = command(
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
        "embed",
        _embed,
        "write the vectors of pictures",
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

    def with_settings(sub: Any) -> None:
        sub.add_argument("--model", metavar="NAME", required=True, help="a folder or a Hub name")
        sub.add_argument("--max-tokens", type=_count, default=256, metavar="N", help="tokens at most (default: 256)")
        sub.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 takes the best (default: 0)")
        sub.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample from this share (default: 1)")
        sub.add_argument("--seed", type=int, metavar="N", help="of the samples, to get the same answer again")
        sub.add_argument("--schema", metavar="FILE", help="a JSON schema that the answer must follow")

    sub = command(
        "ask",
        _ask,
        "ask a vision-language model about pictures",
        """\
The answer streams as it is written. Nothing of a prompt is ever cut: what does not fit is an error.

examples:
  polymodal ask chart.png "Which bar is highest?" --model llava-hf/llava-1.5-7b-hf
  polymodal ask a.png b.png "What differs?" --model ~/models/qwen2-vl --json
  polymodal ask receipt.jpg "Read it" --schema receipt.schema.json --model ~/models/qwen2-vl
  polymodal ask photo.jpg "What is this?" --show seen/ --model ~/models/llava-next    what the model saw""",
    )
    sub.add_argument("files", nargs="*", metavar="FILE", help="pictures, in the order in which the model reads them")
    sub.add_argument("question", metavar="QUESTION")
    sub.add_argument("--show", metavar="DIR", help="write exactly the pixels and tiles that the model saw")
    with_settings(sub)
    with_json(sub)

    sub = command(
        "caption",
        _caption,
        "describe pictures, one by one",
        """\
examples:
  polymodal caption *.jpg --model llava-hf/llava-1.5-7b-hf
  polymodal caption a.png --prompt "caption en" --model google/paligemma-3b-mix-224""",
    )
    sub.add_argument("files", nargs="+", metavar="FILE")
    sub.add_argument("--prompt", metavar="TEXT", help="what to ask for (default: one sentence)")
    sub.add_argument("--show", metavar="DIR", help="write exactly the pixels and tiles that the model saw")
    with_settings(sub)
    with_json(sub)

    sub = command(
        "chat",
        _chat,
        "talk with a model about pictures, in the terminal",
        """\
/add FILE shows a picture with the next message, /new starts over, Ctrl-D ends. Messages are also read
from a pipe, one a line.

examples:
  polymodal chat photo.jpg --model llava-hf/llava-1.5-7b-hf
  polymodal chat a.png b.png --model ~/models/qwen2-vl --temperature 0.7""",
    )
    sub.add_argument("files", nargs="*", metavar="FILE", help="pictures that go with the first message")
    with_settings(sub)

    sub = command(
        "train",
        _train,
        "train the run of a recipe, going on where it was interrupted",
        """\
A recipe is a Python file with a function `run` that returns a polymodal.train.Run. A finished run leaves
its model in the Hub's format in DIR/model, its loss curve in DIR/curve.png and its numbers in
DIR/result.json. The exit status is 1 when it ends below a bar that the recipe sets.

examples:
  polymodal train recipes/nano/clip.py
  polymodal train recipes/nano/clip.py --out runs/trial --until-step 100
  torchrun --nproc-per-node 2 -m polymodal train recipes/nano/clip.py --parallel ddp""",
    )
    sub.add_argument("recipe", metavar="PATH", help="a recipe's file or dotted module")
    sub.add_argument("--out", metavar="DIR", help="default: runs/ and the name of the run")
    sub.add_argument("--fresh", action="store_true", help="start over instead of going on")
    sub.add_argument("--until-step", type=_count, metavar="N", help="stop there, with a checkpoint")
    sub.add_argument("--device", metavar="NAME", help="default: a GPU if there is one")
    sub.add_argument("--parallel", choices=("ddp", "fsdp"), help="how the processes of torchrun share the work")

    sub = command(
        "ls",
        _ls,
        "list the systems, their presets, what is proven of each, and the shipped models",
        """\
examples:
  polymodal ls
  polymodal ls clip
  polymodal ls --json""",
    )
    sub.add_argument("system", nargs="?", metavar="SYSTEM", help="show one in full")
    with_json(sub)

    sub = command(
        "verify",
        _verify,
        "check a checkpoint and write what agrees with the reference implementation",
        """\
Loads it, checks names, shapes, dtypes and every field of its config, and runs the reference
implementation where that is installed. Ends with 1 if anything is wrong.

examples:
  polymodal verify polymodal/nano-clip
  polymodal verify ~/models/clip-vit-base-patch32 --out certificate.json""",
    )
    sub.add_argument("name", metavar="NAME_OR_PATH")
    sub.add_argument("--revision", metavar="REVISION", help="a Hub commit, tag or branch")
    sub.add_argument("--out", metavar="FILE", help="write the certificate as JSON, too")
    with_json(sub)

    sub = command(
        "plan",
        _plan,
        "price a system before it runs: tokens, parameters, operations, memory, time",
        """\
Nothing is downloaded, loaded or computed. Tokens and parameters are exact; time is known after
--calibrate has measured this machine once. --checklist asks what you want to build, and recommends a
system, the size of it that fits, and how to evaluate it.

examples:
  polymodal plan llava-hf/llava-1.5-7b-hf --image 1280x720 --text 40 --new 100 --dtype bf16
  polymodal plan ~/models/qwen2-vl --frames 60 --fps 2 --json
  polymodal plan polymodal/nano-clip --batch 64 --train
  polymodal plan --calibrate
  polymodal plan --checklist""",
    )
    sub.add_argument("name", nargs="?", metavar="NAME_OR_PRESET", help="a preset, a shipped model or a folder")
    sub.add_argument("--image", action="append", type=_size, metavar="WxH", help="of a picture; may be given again")
    sub.add_argument("--frames", type=int, default=0, metavar="N", help="of a clip")
    sub.add_argument("--fps", type=float, default=2.0, metavar="F", help="of the clip (default: 2)")
    sub.add_argument("--text", type=_count, default=32, metavar="N", help="tokens of text (default: 32)")
    sub.add_argument("--new", type=_count, default=64, metavar="N", help="tokens of the answer (default: 64)")
    sub.add_argument("--batch", type=_count, default=1, metavar="N", help="so many inputs at once")
    sub.add_argument("--dtype", choices=("fp32", "bf16", "int8"), default="fp32", help="of weights (default: fp32)")
    sub.add_argument("--train", action="store_true", help="also a training step, in fp32 with AdamW")
    sub.add_argument("--calibrate", action="store_true", help="measure this machine first")
    sub.add_argument("--checklist", action="store_true", help="ask what to build, and recommend a system")
    with_json(sub)

    sub = command(
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
    return parser


def _size(text: str) -> tuple[int, int]:
    width, by, height = text.lower().partition("x")
    if not (by and width.isdigit() and height.isdigit()):
        raise argparse.ArgumentTypeError(f"{text} is not a size such as 640x480")
    return int(width), int(height)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


if __name__ == "__main__":
    sys.exit(main())
