"""LeRobot data sets of version 3: demonstrations in parquet, their pictures in video.

https://github.com/huggingface/lerobot, `docs/source/lerobot-dataset-v3.mdx`. `Demonstrations` reads them,
`lerobot_writer.Writer` writes them, and `Windows` makes a policy's lessons of them.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64, UInt8
from torch import Tensor

from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError, DataError, did_you_mean
from polymodal.core.files import read_json
from polymodal.core.observation import Observation
from polymodal.core.sample import Image, Video
from polymodal.data.lerobot_format import ACTION, CAMERA, INFO, STATE, STATS, TASKS, arrow
from polymodal.data.rows import inside
from polymodal.modalities import image, video
from polymodal.modalities.action import Statistics

MEMORY: Final = 2**31  # bytes of decoded pictures that are kept
_FIELD: Final = re.compile(r"\{(video_key|(chunk|file)_index(:0?\dd)?)\}")  # of a path; a width could be huge


class Demonstrations:
    """A data set in a folder, read by the number of a frame.

    What ``meta/info.json`` does not count is not there: it is written last, so that an interrupted writer has added
    nothing. Numbers are read at once, pictures when they are asked for; what was decoded is kept while it fits into
    ``memory``. Thread-safe.

    Attributes:
        cameras: names, without ``observation.images.``.
        state: of all frames; None where the robot says nothing of itself.
        action: of all frames, in the robot's units.
        episodes: number -> (its first frame, the frame after its last).
        instructions: what the frames' episodes were told.

    Raises:
        DataError: no data set, of another version, or its files contradict each other.
        MissingDependency: pyarrow is not installed.
    """

    def __init__(self, folder: str | Path, *, cameras: Sequence[str] | None = None, memory: int = MEMORY) -> None:
        self.folder = Path(folder)
        self.info = self._info()
        features = self.info["features"]
        known = {key.removeprefix(CAMERA): key for key, f in features.items() if f["dtype"] in ("video", "image")}
        for name in cameras or ():
            if name not in known:
                raise DataError(f"{self.folder} has no camera {name!r}{did_you_mean(name, known)}")
        self.cameras = tuple(known if cameras is None else cameras)
        self._keys = {name: known[name] for name in self.cameras}
        self.fps = float(self.info["fps"])
        self.rows = self._episodes()  # of the table of episodes, without the statistics
        self.episodes = [(row["dataset_from_index"], row["dataset_to_index"]) for row in self.rows]
        wanted = [key for key in (STATE, ACTION) if key in features]
        table = self._table(["index", "task_index", *wanted, *(k for k in self._keys.values() if not self._filmed(k))])
        self.action = self._matrix(table, ACTION)
        self.state = self._matrix(table, STATE) if STATE in features else None
        self._stored = {key: table[key] for key in self._keys.values() if not self._filmed(key)}
        self.task_index: Int64[np.ndarray, " frames"] = table["task_index"].to_numpy()
        self.instructions = self._tasks()
        numbered = self.task_index.dtype.kind in "iu" and self.task_index.min() >= 0  # with a gap they are no integers
        if not numbered or self.task_index.max() >= len(self.instructions):
            raise self._broken(f"frames of tasks that {TASKS} does not list")
        self._memory, self._lock = memory, threading.Lock()
        self._decoded: dict[tuple[str, int, int], np.ndarray] = {}
        self._starts = np.array([start for start, _ in self.episodes])

    def __len__(self) -> int:
        return len(self.action)

    @cached_property
    def statistics(self) -> dict[str, Statistics]:
        """Of ``state`` and ``action``, as ``meta/stats.json`` has them.

        Raises:
            DataError: it lacks them.
        """
        try:
            raw = read_json(self.folder / STATS)
            wanted = {"action": ACTION} | ({} if self.state is None else {"state": STATE})
            return {name: Statistics.from_json(raw[key]) for name, key in wanted.items()}
        except (ConfigError, KeyError, TypeError) as error:
            raise DataError(f"{self.folder / STATS} lacks the statistics of actions or states: {error}") from None

    def episode_of(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, "right")) - 1

    def chunk(
        self, index: int, horizon: int
    ) -> tuple[Float32[np.ndarray, "horizon action_dim"], Bool[np.ndarray, " horizon"]]:
        """The actions from a frame on; past the end of the episode its last one, which is not valid."""
        steps = index + np.arange(horizon)
        end = self.episodes[self.episode_of(index)][1]
        return self.action[np.minimum(steps, end - 1)], steps < end

    def observations(self, indices: Sequence[int]) -> list[Observation]:
        """What the robot saw and was told at some frames.

        Raises:
            MediaError: a picture cannot be decoded.
        """
        seen = {camera: self.pictures(camera, indices) for camera in self.cameras}
        return [
            Observation(
                images={camera: pictures[place] for camera, pictures in seen.items()},
                state=None if self.state is None else self.state[index],
                instruction=self.instructions[self.task_index[index]],
                time=(index - self.episodes[self.episode_of(index)][0]) / self.fps,
            )
            for place, index in enumerate(indices)
        ]

    def pictures(self, camera: str, indices: Sequence[int]) -> list[UInt8[np.ndarray, "height width 3"]]:
        """What a camera saw at some frames."""
        key = self._keys[camera]
        if not self._filmed(key):
            column = self._stored[key]
            return [np.asarray(image.decode(Image(column[int(i)].as_py()["bytes"]))) for i in indices]
        places: dict[tuple[int, int], dict[int, list[int]]] = {}  # file -> frame in it -> places in the answer
        for place, index in enumerate(indices):
            file, frame = self._place(key, int(index))
            places.setdefault(file, {}).setdefault(frame, []).append(place)
        out: list[Any] = [None] * len(indices)
        for file, frames in places.items():
            for frame, pixels in self._film(key, file, sorted(frames)):
                for place in frames[frame]:
                    out[place] = pixels
        return out

    # ---- films

    def _filmed(self, key: str) -> bool:
        return self.info["features"][key]["dtype"] == "video"

    def _place(self, key: str, index: int) -> tuple[tuple[int, int], int]:
        """The file of a frame and its number there."""
        row = self.rows[self.episode_of(index)]
        try:
            file = (row[f"videos/{key}/chunk_index"], row[f"videos/{key}/file_index"])
            return file, round(row[f"videos/{key}/from_timestamp"] * self.fps) + index - row["dataset_from_index"]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise self._broken(f"the table of episodes does not say where the films of {key} are ({error!r})") from None

    def _film(self, key: str, file: tuple[int, int], frames: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        clip = Video(self._path("video_path", video_key=key, chunk_index=file[0], file_index=file[1]))
        with self._lock:  # the threads of a loader would else decode the same file
            kept = self._decoded.get((key, *file))
            if kept is None and (count := self._lengths[key, file]) * self._bytes(key) <= self._memory:
                kept = np.stack([pixels for _, pixels in self._decode(key, clip, range(count))])
                self._memory -= kept.nbytes
                self._decoded[key, *file] = kept
        if kept is not None:
            yield from ((frame, kept[frame]) for frame in frames)
        else:
            yield from self._decode(key, clip, frames)

    def _decode(self, key: str, clip: Video, frames: Sequence[int] | range) -> Iterator[tuple[int, np.ndarray]]:
        times = [(frame + 0.5) / self.fps for frame in frames]  # in the middle, whatever the container rounds
        for frame, (_, pixels) in zip(frames, video.decode(clip, times), strict=True):
            if pixels.size != self._bytes(key):  # what the memory was reckoned with
                raise self._broken(f"the pictures of {key} are {pixels.shape} and not as {INFO} says")
            yield frame, pixels

    def _bytes(self, key: str) -> int:
        return math.prod(self.info["features"][key]["shape"])

    @cached_property
    def _lengths(self) -> dict[tuple[str, tuple[int, int]], int]:
        """Frames of each file of each camera."""
        out: dict[tuple[str, tuple[int, int]], int] = {}
        for key in filter(self._filmed, self._keys.values()):
            for _, end in self.episodes:
                file, last = self._place(key, end - 1)
                out[key, file] = max(out.get((key, file), 0), last + 1)
        return out

    # ---- tables

    def _info(self) -> dict[str, Any]:
        try:
            info = read_json(self.folder / INFO)
            version, features = info["codebase_version"], info["features"]
            numbers = [info[name] for name in ("total_frames", "total_episodes", "fps")]
            paths = [info["data_path"], *([info["video_path"]] if info.get("video_path") else [])]
            for path in paths:  # of a stranger: it must not lead out of the folder
                if not inside(_FIELD.sub("a", path)) or set("{}") & set(_FIELD.sub("", path)):
                    raise ValueError(f"the path {path!r} leaves the folder, or has odd fields")
            if not isinstance(version, str) or not version.startswith("v3"):
                raise ValueError(f"its version is {version!r}; convert it to v3.0 with LeRobot's own script")
            if not all(isinstance(n, int | float) and n > 0 for n in numbers) or ACTION not in features:
                raise ValueError("it counts no frames, or has no action")
            for key, f in features.items():
                if not inside(key):  # the folder of its films
                    raise ValueError(f"the feature {key!r} leaves the folder")
                if not isinstance(f["dtype"], str) or not f["shape"] or any(type(n) is not int for n in f["shape"]):
                    raise ValueError("a feature has no type or no shape")
        except (ConfigError, KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            raise DataError(f"{self.folder} is no LeRobot data set of version 3: {error}") from None
        return info

    def _path(self, template: str, **places: Any) -> Path:
        try:
            name = self.info[template].format(**places)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._broken(f"{template} leads to no file ({error!r})") from None
        if not inside(name):  # the names of cameras are a stranger's, too
            raise self._broken(f"the path {name!r} leaves the folder")
        return self.folder / name

    def _episodes(self) -> list[dict[str, Any]]:
        rows = self.episode_table(lambda column: not column.startswith("stats/"))
        places = ("dataset_from_index", "dataset_to_index", "data/chunk_index", "data/file_index")
        if not all(type(row.get(name)) is int for row in rows for name in places):
            raise self._broken("the table of episodes does not say where each one is")
        spans = [(row["dataset_from_index"], row["dataset_to_index"]) for row in rows]
        ends = [0, *(end for _, end in spans)]
        whole = [start for start, _ in spans] == ends[:-1] and all(a < b for a, b in spans)
        if not whole or ends[-1] != self.info["total_frames"] or len(rows) != self.info["total_episodes"]:
            raise self._broken("the episodes do not follow each other, or are not as many as it counts")
        return rows

    def episode_table(self, wanted: Callable[[str], bool]) -> list[dict[str, Any]]:
        """The columns of the table of episodes that are wanted, by their names."""
        _, pq = arrow()
        rows: list[dict[str, Any]] = []
        try:
            for path in sorted((self.folder / "meta/episodes").glob("chunk-*/file-*.parquet")):
                columns = [c for c in pq.read_schema(path).names if c == "episode_index" or wanted(c)]
                rows += pq.read_table(path, columns=columns, partitioning=None).to_pylist()
            return sorted(rows, key=lambda row: row["episode_index"])[: self.info["total_episodes"]]
        except Exception as error:  # of Arrow or of the system
            raise self._broken(f"the table of episodes cannot be read ({error})") from None

    def _table(self, columns: Sequence[str]) -> Any:
        pa, pq = arrow()
        files = dict.fromkeys((row["data/chunk_index"], row["data/file_index"]) for row in self.rows)
        paths = [self._path("data_path", chunk_index=chunk, file_index=file) for chunk, file in files]
        try:
            tables = [pq.read_table(path, columns=list(columns), partitioning=None) for path in paths]
            table = pa.concat_tables(tables).slice(0, self.info["total_frames"])
            whole = len(table) == self.info["total_frames"]  # a stranger may count more than fit into memory
            ordered = whole and (table["index"].to_numpy() == np.arange(len(table))).all()
        except Exception as error:
            raise self._broken(f"a data file cannot be read ({error})") from None
        if not ordered:
            raise self._broken("frames are missing, or are not in the order of their numbers")
        return table

    def _matrix(self, table: Any, key: str) -> Float32[np.ndarray, "frames dim"]:
        import pyarrow.compute as pc

        column, width = table[key].combine_chunks(), math.prod(self.info["features"][key]["shape"])
        listed = column.type.num_fields > 0
        try:
            # Each row: a longer one beside a shorter one would give all between them the numbers of other frames.
            even = not listed or pc.all(pc.equal(pc.list_value_length(column), width)).as_py()
            values = column.flatten() if listed else column
            array = values.to_numpy(zero_copy_only=False).astype(np.float32, copy=False).reshape(len(table), -1)
        except Exception as error:  # of Arrow or of numpy
            raise self._broken(f"{key} does not hold numbers ({error})") from None
        if column.null_count or not even or array.shape[1] != width:
            raise self._broken(f"{key} has rows of more or fewer than the {width} numbers of its shape")
        return array

    def _tasks(self) -> list[str]:
        _, pq = arrow()
        try:
            table = pq.read_table(self.folder / TASKS, partitioning=None)
            texts = next(name for name in table.column_names if name != "task_index")  # pandas' index
            of = dict(zip(table["task_index"].to_pylist(), map(str, table[texts].to_pylist()), strict=True))
            return [of[number] for number in range(len(of))]
        except Exception as error:
            raise self._broken(f"{TASKS} cannot be read ({error!r})") from None

    def _broken(self, why: str) -> DataError:
        return DataError(f"{self.folder}: {why}; the data set is broken or incomplete")


@dataclass(frozen=True)
class Windows:
    """Each frame with the actions that follow it, as a policy's lesson.

    Args:
        data: the demonstrations.
        lesson: a policy's method of this name, or what wraps it, e.g. to say which robot the data are of.
        horizon: actions of a lesson.
    """

    data: Demonstrations
    lesson: Callable[[Sequence[Observation], Tensor, Tensor], Batch]
    horizon: int

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, indices: Sequence[int], rng: np.random.Generator) -> Batch:
        chunks = [self.data.chunk(int(index), self.horizon) for index in indices]
        actions, valid = (torch.from_numpy(np.stack(part)) for part in zip(*chunks, strict=True))
        return self.lesson(self.data.observations(indices), actions, valid)
