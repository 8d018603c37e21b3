"""LeRobot data sets: what is written is read back, whatever interrupts the writer and whoever wrote it."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage

pytest.importorskip("av")
pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402

from polymodal.core.batch import Batch  # noqa: E402
from polymodal.core.errors import DataError, MediaError, PolymodalError  # noqa: E402
from polymodal.core.observation import Observation  # noqa: E402
from polymodal.data import lerobot_writer  # noqa: E402
from polymodal.data.lerobot import Demonstrations, Windows  # noqa: E402
from polymodal.data.lerobot_writer import Episode, Writer  # noqa: E402
from polymodal.data.lessons import Mixture  # noqa: E402
from polymodal.data.loader import Loader  # noqa: E402
from polymodal.modalities.action import Statistics  # noqa: E402

LENGTHS = (5, 1, 7, 3)
SIZES = {"front": (32, 48), "wrist": (31, 33)}


def episode(number: int) -> Episode:
    rng = np.random.default_rng(number)
    steps = LENGTHS[number % len(LENGTHS)]
    images = {}
    for camera, (height, width) in SIZES.items():
        smooth = np.linspace(0, 1, height)[:, None, None] * rng.uniform(0, 255, 3) * np.ones((1, width, 1))
        images[camera] = np.stack([smooth * (t + 1) / steps for t in range(steps)]).round().astype(np.uint8)
    return Episode(
        task=f"do {'this' if number % 3 else 'that'}",
        action=rng.standard_normal((steps, 3)).astype(np.float32),
        state=rng.standard_normal((steps, 2)).astype(np.float32),
        images=images,
        extra={"attempt": number},
    )


def writer(folder: Path, *, fps: float | int = 10, lossless: bool = False, robot: str = "arm") -> Writer:
    return Writer(
        folder, fps=fps, cameras=SIZES, state_names=["a", "b"], action_names=["x", "y", "z"], robot=robot,
        lossless=lossless,
    )  # fmt: skip


def write(folder: Path, numbers: Sequence[int], **options: Any) -> Path:
    with writer(folder, **options) as out:
        for number in numbers:
            out.add(episode(number))
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("lerobot"), range(6))


@pytest.fixture(scope="module")
def opened(written: Path) -> Demonstrations:
    return Demonstrations(written, cameras=[])


def content(folder: Path) -> list[bytes]:
    data = Demonstrations(folder)
    assert data.state is not None
    pictures = [np.stack(data.pictures(camera, range(len(data)))) for camera in ("front",)]
    tasks = [data.instructions[number] for number in data.task_index]
    return [a.tobytes() for a in (data.action, data.state, *pictures)] + [repr((data.episodes, tasks)).encode()]


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("memory", [0, 2**30])
def test_what_is_written_is_read_back(tmp_path: Path, lossless: bool, memory: int) -> None:
    data = Demonstrations(write(tmp_path, range(6), lossless=lossless), memory=memory)
    wanted = [episode(n) for n in range(6)]
    assert data.cameras == ("front", "wrist")
    assert data.fps == 10
    assert (data.action == np.concatenate([e.action for e in wanted])).all()
    assert data.state is not None
    assert (data.state == np.concatenate([e.state for e in wanted])).all()
    order = np.random.default_rng(0).permutation(len(data)).tolist()
    for camera in data.cameras:
        true = np.concatenate([e.images[camera] for e in wanted])[order].astype(int)
        error = np.abs(np.stack(data.pictures(camera, order)) - true)
        assert error.max() == 0 if lossless else error.mean() < 1.5
    start, end = data.episodes[2]
    seen = data.observations([start, end - 1])
    assert [o.instruction for o in seen] == ["do this"] * 2
    assert [o.time for o in seen] == [0, pytest.approx((end - 1 - start) / 10)]
    for name, key in (("action", "action"), ("state", "state")):
        exact = Statistics.from_array(np.concatenate([getattr(e, key) for e in wanted]))
        read = data.statistics[name]
        assert read.count == len(data)
        for field in ("min", "max", "mean", "std", "q01", "q10", "q50", "q90", "q99"):
            np.testing.assert_allclose(getattr(read, field), getattr(exact, field))


def test_format_of_version_3(written: Path) -> None:
    info = json.loads((written / "meta/info.json").read_text())
    assert info["codebase_version"] == "v3.0"
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"], info["fps"]) == (6, 22, 2, 10)
    assert info["features"]["action"] == {"dtype": "float32", "shape": [3], "names": ["x", "y", "z"]}
    assert info["features"]["observation.images.front"]["shape"] == [32, 48, 3]
    rows = pq.read_table(written / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert rows[2]["tasks"] == ["do this"]
    assert (rows[2]["dataset_from_index"], rows[2]["dataset_to_index"], rows[2]["length"]) == (6, 13, 7)
    assert rows[2]["videos/observation.images.wrist/from_timestamp"] == pytest.approx(0.6)
    assert np.shape(rows[2]["stats/observation.images.wrist/mean"]) == (3, 1, 1)
    stats = json.loads((written / "meta/stats.json").read_text())
    assert np.shape(stats["observation.images.front"]["q99"]) == (3, 1, 1)
    data = pq.ParquetFile(written / "data/chunk-000/file-000.parquet")
    assert data.num_row_groups == 6  # one an episode
    table = data.read()
    assert table["action"].type == pa.list_(pa.float32(), 3)
    assert table["frame_index"].to_pylist()[:7] == [0, 1, 2, 3, 4, 0, 0]
    assert table["timestamp"].type == pa.float32()
    tasks = pq.read_table(written / "meta/tasks.parquet")
    assert json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] == ["task"]


def test_statistics_of_pictures_are_theirs(written: Path) -> None:
    stats = json.loads((written / "meta/stats.json").read_text())["observation.images.front"]
    pixels = np.concatenate([episode(n).images["front"] for n in range(6)]).reshape(-1, 3) / 255
    for name, of in (("min", np.min), ("max", np.max), ("mean", np.mean), ("std", np.std)):
        np.testing.assert_allclose(np.ravel(stats[name]), of(pixels, axis=0), atol=1e-9)


@given(index=st.integers(0, 21), horizon=st.integers(1, 12))
def test_chunks_end_with_their_episode(opened: Demonstrations, index: int, horizon: int) -> None:
    data = opened
    actions, valid = data.chunk(index, horizon)
    start, end = data.episodes[data.episode_of(index)]
    assert start <= index < end
    assert valid.sum() == min(horizon, end - index)
    assert (actions[valid] == data.action[index : index + valid.sum()]).all()
    assert (actions[~valid] == data.action[end - 1]).all()


def test_an_interruption_anywhere_leaves_a_whole_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, whole = write(tmp_path / "before", range(3)), write(tmp_path / "whole", range(6))
    write(tmp_path / "whole2", range(3))
    write(tmp_path / "whole2", range(3, 6))
    assert content(tmp_path / "whole2") == content(whole)
    for crash in range(1, 9):
        folder = tmp_path / f"crash{crash}"
        shutil.copytree(before, folder)
        calls = 0

        def failing(real: Any, at: int, *given: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                raise KeyboardInterrupt
            return real(*given)

        for name in ("atomic_path", "write_json"):
            monkeypatch.setattr(lerobot_writer, name, partial(failing, getattr(lerobot_writer, name), crash))
        interrupted = crash < 8  # two films, data, episodes, tasks, statistics, info: seven files
        try:
            write(folder, range(3, 6))
        except KeyboardInterrupt:
            assert interrupted
        else:
            assert not interrupted
        monkeypatch.undo()
        assert content(folder) == content(whole if not interrupted else before)
        (folder / "data/.left.tmp").touch()
        write(folder, range(6 if not interrupted else 3, 6))
        assert content(folder) == content(whole)
        assert not list(folder.rglob("*.tmp"))
        assert json.loads((folder / "meta/stats.json").read_text())["action"]["count"] == [22]


@pytest.mark.parametrize("crash", [1, 3, 6, 7])  # of a first film, the data, the statistics, the information
def test_an_interruption_while_what_is_held_is_written_loses_and_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash: int
) -> None:
    for folder in ("cut", "whole"):
        write(tmp_path / folder, range(3))
    write(tmp_path / "whole", range(3, 6))
    left = crash

    def failing(real: Any, *given: Any) -> Any:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(lerobot_writer, "_EVERY", 3)  # the third is written as it comes, and then the end of the block
    for name in ("atomic_path", "write_json"):
        monkeypatch.setattr(lerobot_writer, name, partial(failing, getattr(lerobot_writer, name)))
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "cut", range(3, 6))
    assert content(tmp_path / "cut") == content(tmp_path / "whole")
    for name in ("stats", "info"):
        assert (tmp_path / f"cut/meta/{name}.json").read_text() == (tmp_path / f"whole/meta/{name}.json").read_text()


def test_an_error_keeps_the_episodes_that_are_whole(tmp_path: Path) -> None:
    def fails() -> None:
        with writer(tmp_path) as out:
            out.add(episode(0))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert len(Demonstrations(tmp_path).episodes) == 1


def test_episodes_are_written_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lerobot_writer, "_EVERY", 2)
    monkeypatch.setattr(lerobot_writer, "_CHUNK", 2)
    write(tmp_path, range(6))
    assert (tmp_path / "data/chunk-001/file-000.parquet").exists()
    data = Demonstrations(tmp_path)
    true = np.concatenate([episode(n).images["front"] for n in range(6)]).astype(int)
    assert np.abs(np.stack(data.pictures("front", range(22))) - true).mean() < 1.5
    assert content(write(tmp_path / "one", range(6))) == content(tmp_path)


def test_sets_of_others_are_read(written: Path, tmp_path: Path) -> None:
    """Lists without a length, pictures in the table, pandas without a name for its index."""
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    table = table.set_column(0, "action", pa.array(table["action"].to_pylist(), pa.list_(pa.float32())))
    pixels = np.concatenate([episode(n).images["front"] for n in range(6)])
    files = []
    for picture in pixels:
        PILImage.fromarray(picture).save(file := io.BytesIO(), "png")
        files.append({"bytes": file.getvalue(), "path": None})
    pq.write_table(table.append_column("observation.image", pa.array(files)), path)
    info = json.loads((tmp_path / "meta/info.json").read_text())
    info["features"]["observation.image"] = {"dtype": "image", "shape": [32, 48, 3], "names": None}
    (tmp_path / "meta/info.json").write_text(json.dumps(info))
    tasks = pq.read_table(tmp_path / "meta/tasks.parquet").rename_columns(["task_index", "__index_level_0__"])
    pq.write_table(tasks, tmp_path / "meta/tasks.parquet")
    data = Demonstrations(tmp_path)
    assert (np.stack(data.pictures("observation.image", range(22))) == pixels).all()
    assert (data.action == Demonstrations(written).action).all()
    assert data.observations([0])[0].instruction == "do that"


def lesson(observations: Sequence[Observation], actions: torch.Tensor, valid: torch.Tensor) -> Batch:
    pixels = torch.from_numpy(np.stack([o.images["wrist"] for o in observations]))
    return Batch(pixels=pixels, actions=actions, actions_valid=valid)


def test_windows_are_a_source(written: Path, tmp_path: Path) -> None:
    windows = Windows(Demonstrations(written, cameras=["wrist"]), lesson, horizon=4)
    other = Windows(Demonstrations(write(tmp_path, [3, 4])), lesson, horizon=4)
    with Loader(Mixture([windows, other]), batch_size=6, seed=0, start_step=0, stop_step=8, workers=2) as loader:
        batches = [item.batch for item in loader]
    assert [b["actions"].shape for b in batches] == [(6, 4, 3)] * 8
    assert batches[0]["pixels"].shape == (6, 31, 33, 3)
    assert all(b["actions_valid"][:, 0].all() for b in batches)
    again = windows.batch([3, 9], np.random.default_rng())
    assert (again["actions"][1] == torch.from_numpy(windows.data.chunk(9, 4)[0])).all()


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("meta/info.json", "missing"), ("meta/info.json", "cut"), ("meta/info.json", ("v3.0", "v2.1")),
        ("meta/info.json", ("data/chunk", "../../chunk")),
        ("meta/info.json", ("{file_index:03d}.mp4", "{file_index:999999999d}.mp4")),
        ("meta/info.json", ("{video_key}", "{video_key.__class__}")),
        ("meta/info.json", ('"observation.images.front": {', '"observation.images./../../../../front": {')),
        ("meta/info.json", ("        32,", "        33,")),  # the films' height
        ("meta/info.json", ('"total_frames": 22', '"total_frames": 23')),
        ("meta/info.json", ('"dtype": "float32"', '"dtype": 3')),
        ("meta/info.json", ('"action": {', '"actions": {')),
        ("data/chunk-000/file-000.parquet", "missing"), ("data/chunk-000/file-000.parquet", "cut"),
        ("meta/episodes/chunk-000/file-000.parquet", "missing"), ("meta/episodes/chunk-000/file-000.parquet", "cut"),
        ("meta/tasks.parquet", "missing"), ("meta/tasks.parquet", "cut"),
        ("meta/stats.json", "missing"), ("meta/stats.json", ('"action"', '"motion"')),
        ("videos/observation.images.front/chunk-000/file-000.mp4", "missing"),
        ("videos/observation.images.front/chunk-000/file-000.mp4", "cut"),
    ],
)  # fmt: skip
def test_a_broken_set_says_what_is_wrong(
    written: Path, tmp_path: Path, file: str, change: str | tuple[str, str]
) -> None:
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    path = tmp_path / file
    if change == "missing":
        path.unlink()
    elif change == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        text = path.read_text()
        assert change[0] in text
        path.write_text(text.replace(*change, 1))

    def read() -> None:
        data = Demonstrations(tmp_path)
        assert data.statistics
        data.observations(range(len(data)))

    with pytest.raises((DataError, MediaError), match=str(tmp_path)):
        read()


EPISODE_TABLE, FRAMES = "meta/episodes/chunk-000/file-000.parquet", "data/chunk-000/file-000.parquet"
ROW = [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("file", "column", "values"),
    [
        (EPISODE_TABLE, "data/chunk_index", None),
        (FRAMES, "action", [ROW] * 20 + [ROW[:2], [*ROW, 4.0]]),  # as many numbers as there should be
        (FRAMES, "action", [ROW] * 21 + [ROW[:2]]),
        (FRAMES, "action", [ROW] * 21 + [None]),
        (FRAMES, "observation.state", ["a"] * 22),
        (FRAMES, "task_index", [0] * 21 + [None]),
    ],
)
def test_broken_rows_of_tables_are_said(
    written: Path, tmp_path: Path, file: str, column: str, values: list[Any] | None
) -> None:
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    table = pq.read_table(tmp_path / file, partitioning=None)
    place = table.column_names.index(column)
    pq.write_table(
        table.drop_columns([column]) if values is None else table.set_column(place, column, pa.array(values)),
        tmp_path / file,
    )
    with pytest.raises(DataError, match=f"{tmp_path}: .* the data set is broken or incomplete"):
        Demonstrations(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"action": np.zeros((5, 2), np.float32)}, "does not fit"),
        ({"state": np.zeros((4, 2), np.float32)}, "one row a step"),
        ({"action": np.full((5, 3), np.nan, np.float32)}, "not finite"),
        ({"images": {"front": np.zeros((5, 32, 48, 3), np.uint8)}}, "does not fit"),
    ],
)
def test_an_episode_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    odd = episode(0)
    for name, value in change.items():
        object.__setattr__(odd, name, value)  # the checks of the tests would refuse it when it is made
    with writer(tmp_path) as out, pytest.raises(DataError, match=said):
        out.add(odd)
    assert not (tmp_path / "meta/info.json").exists()


def test_another_set_is_not_added_to(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    with pytest.raises(DataError, match="differs in fps"):
        writer(tmp_path, fps=20)
    with pytest.raises(DataError, match="action"):
        Writer(tmp_path, fps=10, cameras=SIZES, state_names=["a", "b"], action_names=["x"], robot="arm")
    with pytest.raises(PolymodalError, match="Did you mean 'wrist'"):
        Demonstrations(tmp_path, cameras=["wirst"])
