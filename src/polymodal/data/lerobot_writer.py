"""Writing LeRobot data sets of version 3, so that an interruption at any moment leaves a whole one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
from jaxtyping import Float32, UInt8

from polymodal.core.errors import DataError, MissingDependency
from polymodal.core.files import atomic_path, write_json
from polymodal.data.lerobot import Demonstrations
from polymodal.data.lerobot_format import (
    ACTION,
    CAMERA,
    DATA,
    EPISODES,
    INFO,
    STATE,
    STATISTICS,
    STATS,
    TASKS,
    VERSION,
    VIDEO,
    arrow,
    describe,
    feature,
    of_pictures,
    task_table,
    vectors,
    write_film,
)
from polymodal.modalities.action import Statistics

_CHUNK: Final = 1000  # files of a folder
_EVERY, _SHARE, _HELD = 100, 0.1, 2**28  # episodes, part of what is there, bytes: from then on a file is written
_NUMBERS: Final = {"timestamp": "float32", "frame_index": "int64", "episode_index": "int64", "index": "int64",
                   "task_index": "int64"}  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Episode:
    """One demonstration. Row t of each array is what was seen at step t and what was done then."""

    task: str
    action: Float32[np.ndarray, "steps action_dim"]
    state: Float32[np.ndarray, "steps state_dim"]
    images: Mapping[str, UInt8[np.ndarray, "steps height width 3"]]
    extra: Mapping[str, int]  # further columns of the table of episodes

    def __len__(self) -> int:
        return len(self.action)


class Writer:
    """Adds episodes to a data set in a folder; makes it where there is none.

    Episodes are held in memory and written together, each file under a temporary name first, and the count of what is
    there last: a reader sees all of what was held or nothing of it. At the end of its ``with`` block, also when that
    ends by an error or Ctrl-C, all episodes that were added are written.

    Args:
        folder: of the data set.
        fps: frames a second.
        cameras: height and width of the pictures by the camera's name.
        state_names: of the numbers of the state.
        action_names: of the numbers of an action.
        robot: what it is of.
        lossless: films are exact (H.264 in RGB, which few players show), and at 64 pixels 1.6 times as large.

    Raises:
        DataError: there is a data set of other features.
        MissingDependency: pyarrow or PyAV is not installed.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        fps: float | int,
        cameras: Mapping[str, tuple[int, int]],
        state_names: Sequence[str],
        action_names: Sequence[str],
        robot: str,
        lossless: bool = False,
    ) -> None:
        arrow()
        if find_spec("av") is None:
            raise MissingDependency("writing films", "av", "act")
        self.folder, self.lossless = Path(folder), lossless
        self._fps = int(fps) if float(fps).is_integer() else float(fps)
        video_info = {
            "video.codec": "h264", "video.pix_fmt": "gbrp" if lossless else "yuv444p", "video.is_depth_map": False,
            "video.fps": self._fps, "video.channels": 3, "has_audio": False,
        }  # fmt: skip
        self._features = {
            ACTION: feature("float32", [len(action_names)], action_names),
            STATE: feature("float32", [len(state_names)], state_names),
        }
        for name, (height, width) in cameras.items():
            info = {"video.height": height, "video.width": width} | video_info
            shape = feature("video", [height, width, 3], ["height", "width", "channels"])
            self._features[CAMERA + name] = {**shape, "info": info}
        self._features |= {name: feature(kind, [1], None) for name, kind in _NUMBERS.items()}
        self._robot = robot
        self._held: list[Episode] = []
        self._actions: list[np.ndarray] = []
        self._states: list[np.ndarray] = []
        self._tasks: dict[str, int] = {}
        self._pictures: dict[str, list[Statistics]] = {CAMERA + name: [] for name in cameras}
        self.rows: list[dict[str, Any]] = []  # of the table of episodes, of what is written
        self.folder.mkdir(parents=True, exist_ok=True)
        for part in ("meta", "data", "videos"):  # nowhere else: the folder may be somebody's home
            for left in (self.folder / part).rglob(".*.tmp"):  # of a process that was killed
                left.unlink()
        if (self.folder / INFO).exists():
            self._resume()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.flush()

    @property
    def episodes(self) -> int:
        return len(self.rows) + len(self._held)

    @property
    def frames(self) -> int:
        return sum(row["length"] for row in self.rows) + sum(map(len, self._held))

    @property
    def tasks(self) -> int:
        return len(self._tasks)

    def add(self, episode: Episode) -> None:
        """Takes one more episode.

        Raises:
            DataError: its arrays are not of the data set's shapes, or numbers are not finite.
        """
        arrays = {ACTION: episode.action, STATE: episode.state}
        arrays |= {CAMERA + name: pictures for name, pictures in episode.images.items()}
        wanted = {key: tuple(f["shape"]) for key, f in self._features.items() if key not in _NUMBERS}
        if (given := {key: a.shape[1:] for key, a in arrays.items()}) != wanted:
            raise DataError(f"an episode of {given} does not fit into a data set of {wanted}")
        if not len(episode) or {len(a) for a in arrays.values()} != {len(episode)}:
            raise DataError(f"an episode has one row a step, not { ({key: len(a) for key, a in arrays.items()}) }")
        if not (np.isfinite(episode.action).all() and np.isfinite(episode.state).all()):
            raise DataError("an episode has states or actions that are not finite")
        self._held.append(episode)
        size = sum(a.nbytes for e in self._held for a in e.images.values())
        if len(self._held) >= max(_EVERY, _SHARE * len(self.rows)) or size > _HELD:
            self.flush()

    def flush(self) -> None:
        """Writes what is held. Until all of it is there it stays held: interrupted, this can be called again."""
        if not self._held:
            return
        number = 0 if not self.rows else _file_number(self.rows[-1]) + 1
        place = {"chunk_index": number // _CHUNK, "file_index": number % _CHUNK}
        for task in (episode.task for episode in self._held):
            self._tasks.setdefault(task, len(self._tasks))
        new, pictures = self._table_rows(place)
        for key in self._pictures:
            clips = [episode.images[key.removeprefix(CAMERA)] for episode in self._held]
            with atomic_path(self.folder / VIDEO.format(video_key=key, **place)) as path:
                write_film(path, clips, self._fps, lossless=self.lossless)
        self._write_data(self.folder / DATA.format(**place))
        pa, pq = arrow()
        _write(pq, pa.Table.from_pylist(new), self.folder / EPISODES.format(**place))
        _write(pq, task_table(self._tasks), self.folder / TASKS)
        actions = [*self._actions, *(episode.action for episode in self._held)]
        states = [*self._states, *(episode.state for episode in self._held)]
        write_json(self.folder / STATS, _statistics(actions, states, pictures))
        write_json(self.folder / INFO, self._info())  # from here on they are there
        self._held, self._actions, self._states, self._pictures = [], actions, states, pictures
        self.rows += [{k: v for k, v in row.items() if not k.startswith("stats/")} for row in new]

    # ---- what is there already

    def _resume(self) -> None:
        there = Demonstrations(self.folder)
        theirs = {key: (f["dtype"], f["shape"], f.get("names")) for key, f in there.info["features"].items()}
        ours = {key: (f["dtype"], f["shape"], f["names"]) for key, f in self._features.items()}
        if (theirs, there.fps) != (ours, float(self._fps)):
            odd = sorted(k for k in theirs.keys() | ours.keys() if theirs.get(k) != ours.get(k)) or ["fps"]
            raise DataError(f"{self.folder} holds a data set that differs in {', '.join(odd)}: take another folder")
        assert there.state is not None
        self._actions, self._states = [there.action], [there.state]
        self._tasks = {text: number for number, text in enumerate(there.instructions)}
        self.rows = there.rows
        for row in there.episode_table(lambda column: column.startswith(f"stats/{CAMERA}")):
            for key, known in self._pictures.items():
                raw = {name: np.ravel(row[f"stats/{key}/{name}"]).tolist() for name in STATISTICS}
                known.append(Statistics.from_json(raw))

    # ---- files

    def _table_rows(self, place: Mapping[str, int]) -> tuple[list[dict[str, Any]], dict[str, list[Statistics]]]:
        """Of what is held, and the statistics of all pictures."""
        pictures = {key: known.copy() for key, known in self._pictures.items()}
        first = frame = sum(row["length"] for row in self.rows)
        rows = []
        for number, episode in enumerate(self._held):
            row: dict[str, Any] = {
                "episode_index": len(self.rows) + number, "tasks": [episode.task], "length": len(episode),
                "dataset_from_index": frame, "dataset_to_index": frame + len(episode),
            }  # fmt: skip
            row |= {f"{of}/{name}": n for of in ("data", "meta/episodes") for name, n in place.items()}
            describe(row, ACTION, Statistics.from_array(episode.action))
            describe(row, STATE, Statistics.from_array(episode.state))
            for key, known in pictures.items():
                row |= {f"videos/{key}/{name}": n for name, n in place.items()}
                row[f"videos/{key}/from_timestamp"] = (frame - first) / self._fps
                row[f"videos/{key}/to_timestamp"] = (frame - first + len(episode)) / self._fps
                known.append(of_pictures(episode.images[key.removeprefix(CAMERA)]))
                describe(row, key, known[-1], deep=True)
            rows.append(row | dict(episode.extra))
            frame += len(episode)
        return rows, pictures

    def _write_data(self, path: Path) -> None:
        """One row group an episode, as LeRobot streams them."""
        pa, pq = arrow()
        frame = sum(row["length"] for row in self.rows)
        with atomic_path(path) as temporary:
            writer = None
            for number, episode in enumerate(self._held):
                steps = np.arange(len(episode))
                columns = {
                    ACTION: vectors(pa, episode.action),
                    STATE: vectors(pa, episode.state),
                    "timestamp": (steps / self._fps).astype(np.float32),
                    "frame_index": steps,
                    "episode_index": np.full(len(steps), len(self.rows) + number),
                    "index": frame + steps,
                    "task_index": np.full(len(steps), self._tasks[episode.task]),
                }
                table = pa.table(columns)
                writer = writer or pq.ParquetWriter(temporary, table.schema)
                writer.write_table(table)
                frame += len(steps)
            assert writer is not None
            writer.close()

    def _info(self) -> dict[str, Any]:
        return {
            "codebase_version": VERSION,
            "robot_type": self._robot,
            "total_episodes": self.episodes,
            "total_frames": self.frames,
            "total_tasks": self.tasks,
            "chunks_size": _CHUNK,
            "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 200,
            "fps": self._fps,
            "splits": {"train": f"0:{self.episodes}"},
            "data_path": DATA,
            "video_path": VIDEO if self._pictures else None,
            "features": self._features,
        }


def _statistics(
    actions: Sequence[np.ndarray], states: Sequence[np.ndarray], pictures: Mapping[str, Sequence[Statistics]]
) -> dict[str, Any]:
    """Exact, but for the quantiles of pictures, which are means of those of the episodes."""
    row: dict[str, Any] = {}
    describe(row, ACTION, Statistics.from_array(np.concatenate(actions)))
    describe(row, STATE, Statistics.from_array(np.concatenate(states)))
    for key, parts in pictures.items():
        describe(row, key, Statistics.merge(parts), deep=True)
    return {key: {n: row[f"stats/{key}/{n}"] for n in STATISTICS} for key in (ACTION, STATE, *pictures)}


def _file_number(row: Mapping[str, Any]) -> int:
    return row["data/chunk_index"] * _CHUNK + row["data/file_index"]


def _write(pq: Any, table: Any, path: Path) -> None:
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)
