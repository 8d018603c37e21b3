"""Names, paths and tables of LeRobot data sets of version 3."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import numpy as np
from jaxtyping import Float32, UInt8

from polymodal.core.errors import MissingDependency
from polymodal.modalities.action import QUANTILES, Statistics

VERSION: Final = "v3.0"
STATE, ACTION, CAMERA = "observation.state", "action", "observation.images."
DATA: Final = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO: Final = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES: Final = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
INFO, STATS, TASKS = "meta/info.json", "meta/stats.json", "meta/tasks.parquet"
STATISTICS: Final = ("min", "max", "mean", "std", "count", *QUANTILES)


def arrow() -> tuple[Any, Any]:
    """The modules ``pyarrow`` and ``pyarrow.parquet``.

    Raises:
        MissingDependency: pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise MissingDependency("a LeRobot data set", "pyarrow", "act") from None
    return pa, pq


def feature(kind: str, shape: Sequence[int], names: Sequence[str] | None) -> Mapping[str, Any]:
    """An entry of the ``features`` of ``meta/info.json``."""
    return {"dtype": kind, "shape": list(shape), "names": None if names is None else list(names)}


def task_table(tasks: Mapping[str, int]) -> Any:
    """As pandas writes a table whose index are the texts."""
    pa, _ = arrow()
    about = {
        "index_columns": ["task"],
        "column_indexes": [],
        "columns": [
            {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy, "metadata": None}
            for name, kind, numpy in (("task_index", "int64", "int64"), ("task", "unicode", "object"))
        ],
    }
    table = pa.table({"task_index": list(tasks.values()), "task": list(tasks)})
    return table.replace_schema_metadata({"pandas": json.dumps(about)})


def vectors(pa: Any, rows: Float32[np.ndarray, "steps dim"]) -> Any:
    """A list of numbers a step; plain numbers where it is one, as LeRobot stores them."""
    values = pa.array(np.ascontiguousarray(rows, np.float32).ravel())
    return values if rows.shape[1] == 1 else pa.FixedSizeListArray.from_arrays(values, rows.shape[1])


def describe(row: dict[str, Any], key: str, statistics: Statistics, *, deep: bool = False) -> None:
    """Adds statistics to a row; of pictures ``(3, 1, 1)`` deep."""
    raw = statistics.to_json()
    for name in STATISTICS:
        values = raw[name]
        row[f"stats/{key}/{name}"] = [[[value]] for value in values] if deep and name != "count" else values


def write_film(path: Path, clips: Sequence[np.ndarray], fps: float | int, *, lossless: bool) -> None:
    """Encodes pictures ``(steps, height, width, 3)`` of several episodes, one after the other.

    Every second frame is a key frame: any frame is two away from where a decoder can start. So is the first of each
    episode, and the quality of a frame is a constant: an episode's pictures do not depend on which others share its
    file.
    """
    import av
    from av.video.frame import PictureType

    with av.open(str(path), "w", format="mp4") as film:
        stream: Any = film.add_stream(
            "libx264rgb" if lossless else "libx264", rate=Fraction(fps).limit_denominator(1001)
        )
        _, stream.height, stream.width, _ = clips[0].shape
        # Whole colours: halved ones are as wide as the things in a small picture.
        stream.pix_fmt = "rgb24" if lossless else "yuv444p"
        stream.options = {
            "qp": "0" if lossless else "18", "g": "2", "bf": "0", "sc_threshold": "0", "forced-idr": "1",
            "preset": "veryfast", "threads": "1",
        }  # fmt: skip
        for clip in clips:
            for step, pixels in enumerate(clip):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "rgb24")
                if step == 0:
                    frame.pict_type = PictureType.I
                film.mux(stream.encode(frame))
        film.mux(stream.encode(None))


def of_pictures(pixels: UInt8[np.ndarray, "steps height width 3"]) -> Statistics:
    """Of each channel from 0 to 1, from its histogram; counted in frames."""
    levels = np.arange(256) / 255
    counts = np.stack([np.bincount(pixels[..., c].ravel(), minlength=256) for c in range(3)])
    parts = counts / counts.sum(1, keepdims=True)
    below = parts.cumsum(1)
    mean = parts @ levels
    at = {name: levels[(below >= q).argmax(1)] for name, q in QUANTILES.items()}
    low, high = levels[(counts > 0).argmax(1)], levels[255 - (counts[:, ::-1] > 0).argmax(1)]
    std = np.sqrt(np.maximum(parts @ levels**2 - mean**2, 0))
    return Statistics(min=low, max=high, mean=mean, std=std, **at, count=len(pixels))
