"""From files to rows: threads read, decode and pre-process while the model encodes."""

from __future__ import annotations

import datetime as dt
import hashlib
import io
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image as PILImage

from polymodal.core.batch import Batch
from polymodal.core.errors import MediaError
from polymodal.core.files import file_hash
from polymodal.core.sample import Audio, Image, Sample, is_sound
from polymodal.core.verbs import Embeds
from polymodal.modalities.image import decode, open_picture, read_picture, thumbnail
from polymodal.modalities.waveform import waveform
from polymodal.retrieve.walk import Found

BATCH = 64
THUMBNAIL = 160  # pixels on the longer side
_EXIF, _ORIGINAL, _DATE = 0x8769, 0x9003, 0x0132  # the tag of the EXIF directory, the times in it and beside it


@dataclass(frozen=True, slots=True)
class Failed:
    """A file that gave no row, and why."""

    file: Found
    reason: str


@dataclass(frozen=True, slots=True)
class Done:
    """A file and its row of the table of pictures (or of sounds, which are 0 pixels wide)."""

    file: Found
    row: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Read:
    file: Found
    row: dict[str, Any]  # all but the vector
    inputs: Batch  # of one sample


def embed_files(model: Embeds, files: Sequence[Found], *, workers: int) -> Iterator[list[Done | Failed]]:
    """Reads, decodes and embeds files, in order and in batches.

    Each file is read and decoded once. At most two batches of pre-processed pictures wait in memory, beside one decoded
    picture a worker.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    waiting: deque[Future[_Read | Failed]] = deque()
    left = iter(files)
    try:
        while True:
            while len(waiting) < 2 * BATCH and (file := next(left, None)) is not None:
                waiting.append(pool.submit(_read, model, file))
            if not waiting:
                return
            yield _encode(model, [waiting.popleft().result() for _ in range(min(BATCH, len(waiting)))])
    finally:
        pool.shutdown(cancel_futures=True)


def _encode(model: Embeds, batch: list[_Read | Failed]) -> list[Done | Failed]:
    read = [item for item in batch if isinstance(item, _Read)]
    if not read:
        return list(_failures(batch))
    with torch.inference_mode():
        inputs = Batch({name: torch.cat([item.inputs[name] for item in read]) for name in read[0].inputs})
        vectors = model.encode(inputs).float().cpu()
    done: list[Done | Failed] = list(_failures(batch))
    for item, vector, finite in zip(read, vectors.numpy(), vectors.isfinite().all(1).tolist(), strict=True):
        if finite:
            done.append(Done(item.file, {**item.row, "vector": vector}))
        else:
            done.append(Failed(item.file, "the model gives no finite vector for it"))
    return done


def _failures(batch: list[_Read | Failed]) -> Iterator[Failed]:
    return (item for item in batch if isinstance(item, Failed))


def _read(model: Embeds, file: Found) -> _Read | Failed:
    read = _sound if is_sound(file.path) else _picture
    try:
        inputs, facts = read(model, file.path)
    except MediaError as error:
        return Failed(file, str(error).removeprefix(f"{file.path}: "))
    except MemoryError:
        return Failed(file, "not enough memory")
    row = {
        "path": file.path,
        "bytes": file.size,
        "mtime_ns": file.mtime_ns,
        "modified": file_time(file.mtime_ns),
        **facts,
    }
    return _Read(file, row, inputs)


def _picture(model: Embeds, path: str) -> tuple[Batch, dict[str, Any]]:
    data = read_picture(path, where=path)
    opened = open_picture(Image(data, name=path))
    picture = decode(Image(opened, name=path))
    facts = {
        "hash": hashlib.sha256(data).hexdigest(),
        "time": _taken(opened),
        "width": picture.width,
        "height": picture.height,
        "thumbnail": jpeg(thumbnail(picture, THUMBNAIL)),
    }
    # `opened` keeps its pixels: nothing is decoded twice, and the model treats transparency in its own way.
    return model.prepare([Sample((Image(opened, name=path),))]), facts


def _sound(model: Embeds, path: str) -> tuple[Batch, dict[str, Any]]:
    inputs = model.prepare([Sample((Audio(path),))])
    return inputs, {"hash": file_hash(path), "time": None, "width": 0, "height": 0, "thumbnail": thumbnail_of(path)}


def thumbnail_of(path: str | Path) -> bytes:
    """A picture, or a sound as a drawn waveform, small, as the bytes of a JPEG.

    Raises:
        MediaError: it cannot be decoded.
    """
    if is_sound(path):
        return jpeg(waveform(Audio(path), THUMBNAIL, THUMBNAIL // 2))
    return jpeg(thumbnail(decode(Image(path)), THUMBNAIL))


def _taken(picture: PILImage.Image) -> dt.datetime | None:
    """When the picture was taken, on the clock of the camera."""
    try:
        exif = picture.getexif()
        text = exif.get_ifd(_EXIF).get(_ORIGINAL) or exif.get(_DATE)
        return dt.datetime.strptime(str(text).strip("\0 ")[:19], "%Y:%m:%d %H:%M:%S")
    except Exception:  # a hostile directory raises anything, and a picture without a time is still a picture
        return None


def jpeg(picture: PILImage.Image) -> bytes:
    """A picture as the bytes of a JPEG, for a thumbnail: pixels only."""
    bare = picture.copy()
    bare.info = {}  # Pillow would copy the comment, of which a JPEG holds no more than 64 kB
    buffer = io.BytesIO()
    bare.save(buffer, "JPEG", quality=82)
    return buffer.getvalue()


def file_time(mtime_ns: int) -> dt.datetime | None:
    """A file's time on this machine's clock; None where a broken file system gives a year that no calendar has."""
    try:
        return dt.datetime.fromtimestamp(mtime_ns / 1e9)
    except (OverflowError, ValueError, OSError):
        return None
