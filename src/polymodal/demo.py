"""`polymodal demo`: pictures of installed fonts in a folder, an index of them, five searches, a page."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image as PILImage

from polymodal.api import load
from polymodal.core.errors import IndexStateError
from polymodal.core.files import atomic_path, atomic_write
from polymodal.core.sample import Image
from polymodal.core.verbs import Embeds
from polymodal.data.worlds import pictograms
from polymodal.data.worlds.pictograms import Pictograms
from polymodal.modalities.image import decode
from polymodal.retrieve.gallery import Shelf, page
from polymodal.retrieve.index import Index, Progress, Report
from polymodal.retrieve.ingest import jpeg
from polymodal.retrieve.reader import Hit

MODEL = "polymodal/nano-clip"
ARTISTS = (pictograms.EMOJI, pictograms.OUTLINES)  # the second one's hand is unknown to the model
SIZE = 96
QUERIES = ("umbrella", "red heart", "snowman", "flag of japan")
ASKED_WITH = "bicycle"  # what the picture of the last search shows
SHOWN = 5
UNSEEN = "never seen in training"


@dataclass(frozen=True, kw_only=True)
class Search:
    """One search of the demo."""

    query: str
    hits: list[Hit]
    seconds: float
    picture: Path | None = None  # what was asked with, where it was not words


@dataclass(frozen=True, kw_only=True)
class Demo:
    """What `run` did."""

    pictures: Path
    unseen: frozenset[str]  # paths of pictures that the model was not trained on
    report: Report
    searches: list[Search]
    page: Path


def run(folder: Path, *, progress: Callable[[Progress], None] | None = None) -> Demo:
    """Draws, indexes and searches in ``folder``; a second call draws and indexes nothing again.

    Raises:
        DataError: fonts are not installed; the message has the command.
    """
    folder = folder.expanduser().resolve()
    unseen = draw(folder / "pictures")
    model = load(MODEL, precision="auto")
    assert isinstance(model, Embeds)
    index = _index(folder / "index", model)
    report = index.update(model, [folder / "pictures"], progress=progress)
    searches = [_search(index, model, query) for query in QUERIES]
    asked = folder / "asked.png"
    _draw_question(asked)
    searches.append(_search(index, model, f"pictures like asked.png ({ASKED_WITH}, tilted, on another ground)", asked))
    target = folder / "search.html"
    atomic_write(target, _page(index, searches, unseen))
    return Demo(pictures=folder / "pictures", unseen=unseen, report=report, searches=searches, page=target)


def draw(folder: Path) -> frozenset[str]:
    """Writes the pictures that are missing, each named for what it shows. Returns those that are not training data."""
    world = Pictograms.load(artists=ARTISTS)
    trained = set(world.split("train").tolist())
    rows = [i for i, record in enumerate(world.records) if record.tone is None]
    names: dict[str, int] = {}  # path -> row
    for row in rows:
        record = world.records[row]
        name = re.sub(r"[^\w &()-]+", " ", record.name).strip() or record.concept
        file = str(folder / record.artist / name)
        names[f"{file}.png" if f"{file}.png" not in names else f"{file} {record.concept}.png"] = row
    missing = [(Path(file), row) for file, row in names.items() if not Path(file).is_file()]
    for start in range(0, len(missing), 64):
        some = missing[start : start + 64]
        pixels = pictograms.plain(world.rgba([row for _, row in some]), SIZE).permute(0, 2, 3, 1).numpy()
        for (path, _), picture in zip(some, pixels, strict=True):
            with atomic_path(path) as temporary:
                PILImage.fromarray(np.ascontiguousarray(picture)).save(temporary, "PNG")
    return frozenset(path for path, row in names.items() if row not in trained)


def _draw_question(path: Path) -> None:
    """A picture to ask with: one of the indexed pictures, tilted, smaller and on another ground."""
    world = Pictograms.load(artists=ARTISTS)
    row = next(i for i, r in enumerate(world.records) if (r.artist, r.name) == (ARTISTS[0], ASKED_WITH))
    picture = pictograms.compose(world.rgba([row]), np.random.default_rng(3), SIZE)[0].permute(1, 2, 0).numpy()
    with atomic_path(path) as temporary:
        PILImage.fromarray(np.ascontiguousarray(picture)).save(temporary, "PNG")


def _index(path: Path, model: Embeds) -> Index:
    try:
        index = Index.open(path)
        index.meta.check(path, model.fingerprint)
    except IndexStateError:  # none yet, or one of an earlier model: the demo's index is nobody's treasure
        return Index.create(path, model, name=MODEL, overwrite=True)
    return index


def _search(index: Index, model: Embeds, query: str, picture: Path | None = None) -> Search:
    started = time.monotonic()
    hits = index.search(query if picture is None else Image(picture), model=model, top=SHOWN)
    return Search(query=query, hits=hits, seconds=time.monotonic() - started, picture=picture)


def _page(index: Index, searches: list[Search], unseen: frozenset[str]) -> str:
    thumbnails = index.thumbnails(sorted({h.path for s in searches for h in s.hits}))
    badges = {path: UNSEEN for path in thumbnails if path in unseen}
    shelves = [
        Shelf(
            query=s.query,
            hits=s.hits,
            note=f"{1000 * s.seconds:.0f} ms",
            picture=jpeg(decode(Image(s.picture))) if s.picture else None,
            badges=badges,
        )
        for s in searches
    ]
    about = (
        f"{index.stats().pictures:,} pictures found by what they show: {MODEL} sees pixels, never file names. "
        "Green: pictures that it was not trained on."
    )
    return page("Pictures by words", about, shelves, thumbnails)
