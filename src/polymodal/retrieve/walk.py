"""Finding the pictures or the sounds under a folder, whatever the folder holds."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from polymodal.core.sample import IMAGE_SUFFIXES


@dataclass(frozen=True, slots=True)
class Found:
    """A file as the folder shows it; nothing of it was read."""

    path: str  # absolute
    size: int  # bytes
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A file or folder that cannot be looked at. Unless ``gone``, what is known of it and below it stays known."""

    path: str
    reason: str
    gone: bool = False


def walk(root: str, skip: str = "", suffixes: Collection[str] = IMAGE_SUFFIXES) -> Iterator[Found | Unreadable]:
    """The files under ``root``, recursively, that end in one of ``suffixes``, in whatever letters.

    Hidden files and folders and the folder ``skip`` are left out. Links to folders are followed after the real folders,
    and each real folder is visited once, so a loop of links ends. Pipes, devices and sockets are never opened.
    """
    seen: set[tuple[int, int]] = set()
    if skip and Path(skip).is_dir():
        own = os.stat(skip)
        seen.add((own.st_dev, own.st_ino))
    folders: list[str] = [root]
    links: list[str] = []
    while folders or links:
        folder = folders.pop() if folders else links.pop()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                listed = sorted(entries, key=lambda e: e.name)
        except FileNotFoundError:
            continue  # deleted since its parent was listed
        except OSError as error:
            yield Unreadable(folder, f"the folder cannot be read: {error.strerror}")
            continue
        for entry in listed:
            if entry.name.startswith("."):
                continue
            wanted = os.path.splitext(entry.name)[1].lower() in suffixes
            try:
                if entry.is_dir():
                    (links if entry.is_symlink() else folders).append(entry.path)
                elif wanted:
                    yield _look(entry)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ELOOP):
                    yield Unreadable(entry.path, f"cannot be looked at: {error.strerror}")
                elif wanted and entry.is_symlink():
                    yield Unreadable(entry.path, "a link to nothing", gone=True)


def _look(entry: os.DirEntry[str]) -> Found | Unreadable:
    try:
        entry.path.encode()
    except UnicodeEncodeError:
        return Unreadable(entry.path, "the name is not valid UTF-8: rename it", gone=True)
    status = entry.stat()
    if not stat.S_ISREG(status.st_mode):
        return Unreadable(entry.path, "not a regular file", gone=True)
    return Found(entry.path, status.st_size, status.st_mtime_ns)
