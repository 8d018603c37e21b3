"""The index keeps step with its folders: exactly, cheaply, whatever the files are and whenever it is killed."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from PIL.PngImagePlugin import PngInfo

from polymodal.core.errors import ConfigError, IndexStateError
from polymodal.core.sample import Image
from polymodal.modalities.image import thumbnail
from polymodal.retrieve import Index, Progress, Report
from polymodal.retrieve.ingest import Failed, embed_files
from polymodal.retrieve.lock import writer
from polymodal.retrieve.walk import Found, Unreadable, walk
from tests.histogram import Histogram

ROOT = Path(__file__).parents[2]


def draw(path: Path, seed: int, size: tuple[int, int] = (40, 30)) -> Path:
    """A picture of its own colours."""
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
    PILImage.fromarray(blocks).resize(size, PILImage.Resampling.NEAREST).save(path)
    return path


def rows(index: Index) -> dict[str, dict]:
    """All rows by path; a path that is there twice fails."""
    table = index.store.columns("pictures", index.store.schemas["pictures"].names).to_pylist()
    assert len({r["path"] for r in table}) == len(table)
    return {r["path"]: r for r in table}


def check(index: Index, model: Histogram, folder: Path) -> None:
    """The index holds exactly the readable pictures of the folder, each with the vector of its content."""
    files = sorted(str(p) for p in folder.rglob("*.png") if not p.name.startswith("broken"))
    stored = rows(index)
    assert sorted(stored) == files
    if files:
        wanted = model.embed([Image(f) for f in files])
        torch.testing.assert_close(torch.tensor([stored[f]["vector"] for f in files]), wanted)


def counts(report: Report) -> tuple[int, int, int, int, int]:
    return report.added, report.changed, report.moved, report.deleted, report.unchanged


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(6):
        draw(tmp_path / "pictures" / f"{'ab'[i % 2]}" / f"{i}.png", i)
    return tmp_path / "pictures"


@pytest.fixture
def model() -> Histogram:
    return Histogram()


@pytest.fixture
def index(tmp_path: Path, model: Histogram) -> Index:
    return Index.create(tmp_path / "index", model, name="histogram")


def test_follows_every_kind_of_change(index: Index, model: Histogram, folder: Path) -> None:
    assert counts(index.update(model, [folder])) == (6, 0, 0, 0, 0)
    check(index, model, folder)

    model.encoded = 0
    assert counts(index.update(model, [folder])) == (0, 0, 0, 0, 6)
    assert model.encoded == 0

    (folder / "a/0.png").rename(folder / "b/moved.png")
    (folder / "a/2.png").unlink()
    draw(folder / "a/4.png", 40, (41, 30))
    draw(folder / "c/new.png", 50)
    assert counts(index.update(model, [folder])) == (1, 1, 1, 1, 3)
    assert model.encoded == 2, "a moved picture keeps its vector"
    check(index, model, folder)
    assert counts(index.update(model)) == (0, 0, 0, 0, 6), "without folders, all known ones"


def test_same_size_and_time_is_not_read_but_a_new_time_is(index: Index, model: Histogram, folder: Path) -> None:
    index.update(model, [folder])
    os.utime(folder / "a/0.png", ns=(1, 1))
    report = index.update(model, [folder])
    assert counts(report) == (0, 1, 0, 0, 5)


def test_a_swap_of_two_names(index: Index, model: Histogram, folder: Path) -> None:
    index.update(model, [folder])
    (folder / "a/0.png").rename(folder / "t.png")
    (folder / "b/1.png").rename(folder / "a/0.png")
    (folder / "t.png").rename(folder / "b/1.png")
    index.update(model, [folder])
    check(index, model, folder)


def test_a_renamed_folder_moves_all_of_it(index: Index, model: Histogram, folder: Path) -> None:
    index.update(model, [folder])
    model.encoded = 0
    (folder / "a").rename(folder / "z")
    assert counts(index.update(model, [folder])) == (0, 0, 3, 0, 3)
    assert model.encoded == 0
    check(index, model, folder)


def test_facts(index: Index, model: Histogram, tmp_path: Path) -> None:
    picture = PILImage.new("RGB", (400, 200), "red")
    exif = PILImage.Exif()
    exif[0x0112] = 6  # lies on its side
    exif.get_ifd(0x8769)[0x9003] = "2021:03:04 05:06:07"
    (tmp_path / "p").mkdir()
    picture.save(tmp_path / "p/red.jpg", exif=exif)
    index.update(model, [tmp_path / "p"])
    (hit,) = index.search("red", model=model)
    assert hit.size == (200, 400)
    assert hit.score == pytest.approx(1, abs=1e-4)
    assert hit.bytes == (tmp_path / "p/red.jpg").stat().st_size
    assert hit.time is not None
    assert hit.time.isoformat() == "2021-03-04T05:06:07"
    (thumbnail,) = index.thumbnails([hit.path]).values()
    with PILImage.open(io.BytesIO(thumbnail)) as small:
        assert (small.format, small.size) == ("JPEG", (80, 160))
    stats = index.stats()
    assert (stats.pictures, stats.failures, stats.model, stats.dim) == (1, 0, "histogram", 64)
    assert stats.roots == (str(tmp_path / "p"),)
    assert stats.bytes_on_disk > hit.bytes


def test_a_transparent_picture_is_given_to_the_model_as_it_is(index: Index, tmp_path: Path) -> None:
    """The model, not the index, decides what lies under transparency."""
    (tmp_path / "p").mkdir()
    PILImage.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "p/clear.png")
    modes = []

    class Looks(Histogram):
        def prepare(self, items):
            modes.extend(s.images[0].source.mode for s in items)
            return super().prepare(items)

    index.update(Looks(), [tmp_path / "p"])
    assert modes == ["RGBA"]


@pytest.mark.parametrize("kind", ["gif", "png"])
def test_a_long_comment_neither_fails_nor_leaks(index: Index, model: Histogram, folder: Path, kind: str) -> None:
    comment = "secret " * 15_000  # a JPEG holds 64 kB
    facts = PngInfo()
    facts.add_text("comment", comment)
    with (folder / f"long.{kind}").open("wb") as file:
        PILImage.new("RGB", (8, 8), "red").save(file, kind, comment=comment.encode(), pnginfo=facts)
    assert index.update(model, [folder]).added == 7
    assert b"secret" not in index.thumbnails([str(folder / f"long.{kind}")]).popitem()[1]


def test_a_picture_that_memory_cannot_hold_fails_alone(
    index: Index, model: Histogram, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(folder / "wide.png", 9, (300, 20))
    real = thumbnail

    def small(picture: PILImage.Image, side: int) -> PILImage.Image:
        if picture.width == 300:
            raise MemoryError
        return real(picture, side)

    monkeypatch.setattr("polymodal.retrieve.ingest.thumbnail", small)
    report = index.update(model, [folder])
    assert report.added == 6
    assert report.failed == [(str(folder / "wide.png"), "not enough memory")]


def test_a_file_that_became_a_pipe_does_not_block(index: Index, model: Histogram, folder: Path) -> None:
    os.mkfifo(folder / "pipe.png")
    ((failed,),) = embed_files(model, [Found(str(folder / "pipe.png"), 10, 0)], workers=1)
    assert isinstance(failed, Failed)
    assert failed.reason == "is not a regular file"


def hostile(folder: Path) -> set[str]:
    """Files that must be listed and never be fatal."""
    folder.mkdir(exist_ok=True)
    whole = draw(folder / "whole.png", 1, (200, 200)).read_bytes()
    (folder / "whole.png").unlink()
    (folder / "broken-cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "broken-empty.jpg").write_bytes(b"")
    (folder / "broken-text.jpg").write_text("not a picture")
    bomb = bytearray(whole)
    bomb[16:24] = (100_000).to_bytes(4, "big") * 2  # a header of ten thousand million pixels
    (folder / "broken-bomb.png").write_bytes(bomb)
    os.mkfifo(folder / "broken-pipe.png")
    (folder / "broken-link.png").symlink_to("nowhere.png")
    with (folder / "broken-huge.tiff").open("wb") as huge:
        huge.truncate(2**40)  # a terabyte that takes no room
    return {p.name for p in folder.iterdir() if not p.is_dir()}


def test_hostile_files_are_listed_and_not_tried_again(index: Index, model: Histogram, folder: Path) -> None:
    bad = hostile(folder)
    before = {p: p.stat().st_atime_ns for p in folder.glob("broken-[cet]*")}
    report = index.update(model, [folder])
    assert report.added == 6
    assert {Path(p).name for p, _ in report.failed} == bad
    assert all(reason and "broken-" not in reason for _, reason in report.failed), "the reason does not repeat the path"
    check(index, model, folder)

    for path in before:
        os.utime(path, ns=(0, path.stat().st_mtime_ns))
    again = index.update(model, [folder])
    assert {Path(p).name for p, _ in again.failed} == bad
    assert again.added == 0
    assert all(p.stat().st_atime_ns == 0 for p in before), "what failed was opened again"

    draw(folder / "broken-text.png", 9).replace(folder / "broken-text.jpg")
    (folder / "broken-empty.jpg").unlink()
    mended = index.update(model, [folder])
    assert mended.added == 1
    assert {Path(p).name for p, _ in mended.failed} == bad - {"broken-text.jpg", "broken-empty.jpg"}
    assert index.stats().failures == len(bad) - 4, "the pipe and the link are looked at each time, not stored"


def test_a_picture_that_breaks_leaves_the_index(index: Index, model: Histogram, folder: Path) -> None:
    index.update(model, [folder])
    (folder / "a/0.png").write_bytes(b"gone")
    report = index.update(model, [folder])
    assert [Path(p).name for p, _ in report.failed] == ["0.png"]
    assert str(folder / "a/0.png") not in rows(index)


def test_a_vector_that_is_not_finite_fails_its_file_only(index: Index, folder: Path) -> None:
    class Sick(Histogram):
        def encode(self, batch):
            vectors = super().encode(batch)
            vectors[0] = float("nan")
            return vectors

    report = index.update(Sick(), [folder])
    assert report.added == 5
    assert len(report.failed) == 1


def test_walk(tmp_path: Path) -> None:
    folder = tmp_path / "w"
    for name in ("x.png", "deep/er/y.JPG", ".hidden.png", ".git/z.png", "index/thumb.png", "notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"?")
    (folder / "deep/loop").symlink_to(folder)
    (folder / "deep/self").symlink_to("self")
    (folder / "outside").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/o.webp").write_bytes(b"?")
    (folder / "a-link-before").symlink_to(folder / "deep")
    found = list(walk(str(folder), str(folder / "index")))
    assert {os.path.relpath(f.path, folder) for f in found} == {"x.png", "deep/er/y.JPG", "outside/o.webp"}
    assert all(isinstance(f, Found) and f.size == 1 for f in found)


def test_a_name_that_is_not_utf8_is_listed(index: Index, model: Histogram, folder: Path) -> None:
    os.rename(os.fsencode(folder / "a/0.png"), os.fsencode(folder) + b"/a/\xff.png")
    (folder / "deep").mkdir()
    os.rename(os.fsencode(folder / "deep"), os.fsencode(folder) + b"/\xfe")
    os.rename(os.fsencode(folder / "a/2.png"), os.fsencode(folder) + b"/\xfe/fine.png")
    report = index.update(model, [folder])
    assert report.added == 4
    assert ["UTF-8" in reason for _, reason in report.failed] == [True, True]


def test_what_cannot_be_looked_at_is_not_taken_for_deleted(
    index: Index, model: Histogram, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.update(model, [folder])
    real = os.scandir

    def denied(path: str):  # the tests may run as root, whom no permission stops
        if str(path).endswith("/a"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", denied)
    report = index.update(model, [folder])
    assert counts(report) == (0, 0, 0, 0, 3)
    assert report.failed == [(str(folder / "a"), "the folder cannot be read: Permission denied")]
    assert len(rows(index)) == 6


def test_a_root_that_is_away_keeps_its_pictures(index: Index, model: Histogram, folder: Path, tmp_path: Path) -> None:
    draw(tmp_path / "disk/1.png", 77)
    index.update(model, [folder, tmp_path / "disk"])
    (tmp_path / "disk").rename(tmp_path / "unplugged")
    report = index.update(model)
    assert counts(report) == (0, 0, 0, 0, 6)
    assert [p for p, _ in report.failed] == [str(tmp_path / "disk")]
    assert len(rows(index)) == 7
    with pytest.raises(ConfigError, match="does not exist"):
        index.update(model, [tmp_path / "disk"])
    with pytest.raises(ConfigError, match="is not a folder"):
        index.update(model, [folder / "a/0.png"])


def test_an_empty_mount_point_keeps_its_pictures(index: Index, model: Histogram, folder: Path, tmp_path: Path) -> None:
    draw(tmp_path / "disk/1.png", 77)
    index.update(model, [folder, tmp_path / "disk"])
    (tmp_path / "disk/1.png").rename(tmp_path / "away.png")
    for folders in ([], [tmp_path / "disk"]):
        report = index.update(model, folders)
        assert report.deleted == 0
        assert report.failed == [
            (str(tmp_path / "disk"), "the folder is empty; its pictures stay (use --rebuild if they are gone)")
        ]
    assert len(rows(index)) == 7
    (tmp_path / "away.png").rename(tmp_path / "disk/1.png")
    assert counts(index.update(model)) == (0, 0, 0, 0, 7)
    (tmp_path / "disk/1.png").rename(tmp_path / "disk/notes.txt")
    assert index.update(model).deleted == 1, "a folder that holds anything is there"


def test_overlapping_folders_hold_each_file_once(index: Index, model: Histogram, folder: Path) -> None:
    index.update(model, [folder / "a"])
    assert counts(index.update(model, [folder, folder / "b", folder])) == (3, 0, 0, 0, 3)
    assert index.stats().roots == (str(folder),)
    (folder / "b/1.png").unlink()
    assert counts(index.update(model, [folder / "a"])) == (0, 0, 0, 0, 3), "only what was asked for is looked through"
    check_rows = rows(index)
    assert str(folder / "b/1.png") in check_rows


def test_another_model_is_refused_with_the_command(index: Index, model: Histogram, folder: Path) -> None:
    index.update(model, [folder])
    other = Histogram(salt="-2")
    for act in (lambda: index.update(other, [folder]), lambda: index.search("red", model=other)):
        with pytest.raises(IndexStateError, match="--rebuild") as error:
            act()
        assert f"polymodal index {folder} --index {index.path} --rebuild" in str(error.value)
    Index.create(index.path, other, overwrite=True).update(other, [folder])
    check(Index.open(index.path), model, folder)


def test_open_says_what_is_wrong(tmp_path: Path, model: Histogram) -> None:
    with pytest.raises(IndexStateError, match="polymodal index DIR"):
        Index.open(tmp_path)
    (tmp_path / "photo.txt").write_text("mine")
    with pytest.raises(IndexStateError, match="folder of its own"):
        Index.create(tmp_path, model)
    index = Index.create(tmp_path / "i", model)
    with pytest.raises(IndexStateError, match="already"):
        Index.create(tmp_path / "i", model)
    meta = json.loads((index.path / "index.json").read_text())
    (index.path / "index.json").write_text(json.dumps({**meta, "format": 99}))
    with pytest.raises(IndexStateError, match="--rebuild"):
        Index.open(index.path)
    for damage in ("[]", "{}", "{"):
        (index.path / "index.json").write_text(damage)
        with pytest.raises(IndexStateError, match="damaged"):
            Index.open(index.path)


def test_a_strangers_folder_is_never_emptied(tmp_path: Path, model: Histogram) -> None:
    for number, names in enumerate((["index.json"], ["lock"], ["lock", "index.json"], ["index.json", "mine.txt"])):
        folder = tmp_path / str(number)
        (folder / "tables").mkdir(parents=True)
        (folder / "tables/precious").touch()
        for name in names:
            (folder / name).write_text('{"format": 1}')
        with pytest.raises(IndexStateError, match=r"does not describe an index|holds other files"):
            Index.create(folder, model, overwrite=True)
        assert (folder / "tables/precious").exists()
    index = Index.create(tmp_path / "i", model)
    (index.path / ".index.json.abc.tmp").touch()  # of a process that was killed
    Index.create(index.path, model, overwrite=True)
    (index.path / "mine.txt").touch()
    with pytest.raises(IndexStateError, match=r"holds other files \(mine.txt\)"):
        Index.create(index.path, model, overwrite=True)


def test_one_writer(index: Index, model: Histogram, folder: Path) -> None:
    with writer(index.path / "lock"), pytest.raises(IndexStateError, match=f"process {os.getpid()} is writing"):
        Index.open(index.path).update(model, [folder])
    (index.path / "lock").write_text("1\n")  # a living process, that holds nothing: the file alone locks nobody out
    assert index.update(model, [folder]).added == 6


def test_progress_counts_every_file(index: Index, model: Histogram, folder: Path) -> None:
    hostile(folder)
    index.update(model, [folder])
    (folder / "a").rename(folder / "z")
    draw(folder / "new.png", 99)
    seen: list[Progress] = []
    index.update(model, [folder], progress=seen.append)
    assert (seen[-1].done, seen[-1].total) == (4, 4), "three moved and one new"


def test_memory_is_bounded_by_batches_not_by_files(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads do not run ahead of a slow model by more than two batches."""
    for i in range(60):
        draw(tmp_path / f"many/{i}.png", i, (8, 8))
    monkeypatch.setattr("polymodal.retrieve.ingest.BATCH", 8)
    ahead: list[int] = []
    lock = threading.Lock()

    class Counts(Histogram):
        prepared = 0

        def prepare(self, items):
            with lock:
                self.prepared += 1
                ahead.append(self.prepared - self.encoded)
            return super().prepare(items)

    assert index.update(Counts(pause=0.02), [tmp_path / "many"], workers=4).added == 60
    assert max(ahead) <= 24, "two batches wait and one is encoded"


SCRIPT = """
import sys
from pathlib import Path
import polymodal.retrieve.index as module
from tests.histogram import Histogram
import polymodal.retrieve.ingest as ingest
module.COMMIT_SECONDS = 0.0
ingest.BATCH = 3
index = module.Index.open(sys.argv[1])
print("ready", flush=True)
report = index.update(Histogram(pause=0.05), [sys.argv[2]], progress=lambda p: print(p.done, flush=True))
print("end", report, flush=True)
"""


@pytest.mark.parametrize(
    "signals",
    [
        [signal.SIGKILL, signal.SIGINT],
        pytest.param([signal.SIGKILL] * 6, marks=pytest.mark.slow),
    ],
    ids=["a kill and an interrupt", "many kills"],
)
def test_killed_at_any_time_it_goes_on(index: Index, folder: Path, signals: list[signal.Signals]) -> None:
    for i in range(114):
        draw(folder / f"k/{i}.png", 100 + i, (8, 8))
    kept = 0
    for number, kind in enumerate(signals):
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(index.path), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("end"):
                pytest.fail("it ended before it was killed")
            if line.strip().isdigit() and int(line) >= 9:
                break
        time.sleep(0.007 * number)  # another place in the work each time
        process.send_signal(kind)
        process.communicate()
        stored = rows(Index.open(index.path))
        assert len(stored) >= kept + 6, "what was committed before the kill is there"
        kept = len(stored)
    model = Histogram()
    assert kept < 120
    report = Index.open(index.path).update(model, [folder])
    assert (report.added, report.unchanged) == (120 - kept, kept)
    assert model.encoded == 120 - kept, "nothing is embedded twice"
    check(Index.open(index.path), model, folder)


def test_killed_between_the_steps_of_a_move(
    index: Index, model: Histogram, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.update(model, [folder])
    (folder / "a").rename(folder / "z")

    class Killed(BaseException):
        pass

    def die(self: object, name: str, paths: list[str]) -> None:
        if paths and name == "pictures":
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("polymodal.retrieve.store.Store.remove", die)
        with pytest.raises(Killed):
            index.update(model, [folder])
    assert len(rows(index)) == 9, "the new rows are written before the old ones go"
    model.encoded = 0
    assert counts(index.update(model, [folder])) == (0, 0, 0, 3, 6)
    assert model.encoded == 0
    check(index, model, folder)


def test_ten_thousand_unchanged_files_cost_no_query_each(
    index: Index, model: Histogram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts the calls to the store, which would grow with the files if there were one a file."""
    folder = tmp_path / "many"
    folder.mkdir()
    source = draw(tmp_path / "one.png", 1, (8, 8)).read_bytes()
    for i in range(300):
        (folder / f"{i}.png").write_bytes(source)
    index.update(model, [folder])
    calls: list[str] = []
    for name in ("columns", "rows", "add", "replace"):
        real = getattr(type(index.store), name)
        monkeypatch.setattr(type(index.store), name, lambda *a, _n=name, _r=real: calls.append(_n) or _r(*a))
    opened: list[str] = []
    monkeypatch.setattr("polymodal.retrieve.ingest.open_picture", lambda image: opened.append(image.where))
    assert counts(index.update(model, [folder])) == (0, 0, 0, 0, 300)
    assert opened == []
    assert calls.count("columns") == 2
    assert len(calls) < 10


def test_unreadable_is_not_gone_by_default() -> None:
    assert not Unreadable("p", "r").gone
