"""Checkpoint files that are cut, lie or are hostile: each is refused with a reason, before anything is loaded."""

from __future__ import annotations

import json
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import polymodal
from polymodal.core.errors import ConfigError, WeightsError
from tests.nano import nano

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole checkpoint in one file."""
    return nano("siglip").save(tmp_path / "model")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A whole checkpoint in several files."""
    return nano("siglip").save(tmp_path / "model", shard_bytes=60_000)


def refused(folder: Path) -> list[str]:
    """Loads, expects to be refused, and gives the problems."""
    with pytest.raises(WeightsError, match="nothing was loaded") as error:
        polymodal.load(folder)
    assert all(p in str(error.value) for p in error.value.problems), "the message lists every problem"
    return error.value.problems


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def write_raw(folder: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    """A file in the layout of safetensors, with any header; ``length`` is what it claims of the header."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = struct.pack("<Q", len(encoded) if length is None else length)
    (folder / "model.safetensors").write_bytes(size + encoded + data)
    return folder


def test_shards_load_as_one_file_does(shards: Path, tmp_path: Path) -> None:
    assert len(list(shards.glob("*.safetensors"))) > 2
    sharded, whole = polymodal.load(shards), polymodal.load(nano("siglip").save(tmp_path / "whole"))
    assert sharded.fingerprint == whole.fingerprint


@pytest.mark.parametrize("kept", [0, 4, 8, 100, 0.5, -1])
def test_a_truncated_file(folder: Path, kept: float) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    (problem,) = refused(folder)
    assert "model.safetensors is not a whole safetensors file" in problem


def test_a_truncated_shard_and_a_missing_one_are_both_named(shards: Path) -> None:
    first, second, *_ = sorted(shards.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-1])
    second.unlink()
    problems = refused(shards)
    assert any(first.name in p and "not a whole" in p for p in problems)
    assert any(second.name in p and "not in this folder" in p for p in problems)


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
LIES: dict[str, tuple[Any, bytes, int | None]] = {
    "header longer than the file": ({"a": ONE}, b"\0" * 8, 10**6),
    "header of 2^63 bytes": ({"a": ONE}, b"\0" * 8, 2**63),
    "header of 2^64 - 1 bytes": ({"a": ONE}, b"\0" * 8, 2**64 - 1),
    "no header": (b"", b"", None),
    "header that is no JSON": (b"\xff" * 20, b"", None),
    "header that is a list": ([ONE], b"\0" * 8, None),
    "overlapping tensors": ({"a": ONE, "b": ONE | {"data_offsets": [4, 12]}}, b"\0" * 12, None),
    "one tensor twice": ({"a": ONE, "b": ONE}, b"\0" * 8, None),
    "a hole between tensors": ({"a": ONE, "b": ONE | {"data_offsets": [16, 24]}}, b"\0" * 24, None),
    "offsets past the end": ({"a": ONE | {"data_offsets": [0, 800]}}, b"\0" * 8, None),
    "offsets backwards": ({"a": ONE | {"data_offsets": [8, 0]}}, b"\0" * 8, None),
    "negative offsets": ({"a": ONE | {"data_offsets": [-8, 0]}}, b"\0" * 8, None),
    "a shape that needs more bytes": ({"a": ONE | {"shape": [3]}}, b"\0" * 8, None),
    "a shape of exabytes": ({"a": ONE | {"shape": [2**40, 2**20]}}, b"\0" * 8, None),
    "a shape that overflows": ({"a": ONE | {"shape": [2**40, 2**40]}}, b"\0" * 8, None),
    "a shape that overflows to the right size": ({"a": ONE | {"shape": [2**62 + 1, 2]}}, b"\0" * 8, None),
    "an empty shape that overflows": (
        {"a": ONE | {"shape": [2**40, 2**40, 0], "data_offsets": [0, 0]}},
        b"",
        None,
    ),
    "a negative shape": ({"a": ONE | {"shape": [-2]}}, b"\0" * 8, None),
    "a dtype that is none": ({"a": ONE | {"dtype": "F33"}}, b"\0" * 8, None),
    "a dtype that torch has not": (
        {"a": {"dtype": "F8_E8M0", "shape": [8], "data_offsets": [0, 8]}},
        b"\0" * 8,
        None,
    ),
    "bytes that no tensor owns": ({"a": ONE}, b"\0" * 9, None),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies(folder: Path, lie: str) -> None:
    header, data, length = LIES[lie]
    problems = refused(write_raw(folder, header, data, length=length))
    assert problems


def test_a_well_formed_stranger_is_told_everything_that_is_missing(folder: Path) -> None:
    problems = refused(write_raw(folder, {"a": ONE}, b"\0" * 8))
    assert "unexpected: a (2,): no rule takes it" in problems
    assert sum(p.startswith("missing from the checkpoint") for p in problems) > 50


@pytest.mark.parametrize(
    "file",
    ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..", ".", "", "model.bin", 7, None, ["a"]],
)
def test_an_index_that_leads_elsewhere(shards: Path, file: Any, tmp_path: Path) -> None:
    torch.save({}, tmp_path / "model.bin")
    nano("siglip").save(tmp_path / "sub")
    name = next(iter(json.loads((shards / INDEX).read_text())["weight_map"]))
    problems = refused(edit_index(shards, lambda index: index.update({name: file})))
    assert f"the index puts {name} in {file!r}, which is not a safetensors file of this folder" in problems


def test_index_and_shards_that_disagree(shards: Path) -> None:
    index = json.loads((shards / INDEX).read_text())["weight_map"]
    (gone, *_), moved = index, list(index)[-1]
    files = sorted(set(index.values()))

    def change(weight_map: dict[str, str]) -> None:
        del weight_map[gone]
        weight_map[moved] = files[0]
        weight_map["invented"] = files[1]

    problems = refused(edit_index(shards, change))
    assert f"{index[gone]} holds {gone}, which the index does not list" in problems
    assert f"{files[0]} lacks {moved}, which the index puts there" in problems
    assert f"{index[moved]} holds {moved}, which the index does not list" in problems
    assert f"{files[1]} lacks invented, which the index puts there" in problems


def test_a_tensor_in_two_shards(shards: Path) -> None:
    first = sorted(shards.glob("*.safetensors"))[0]
    copy = shards / "model-copy.safetensors"
    copy.write_bytes(first.read_bytes())
    index = json.loads((shards / INDEX).read_text())["weight_map"]
    named = [n for n, file in index.items() if file == first.name]
    problems = refused(edit_index(shards, lambda index: index.update({named[0]: copy.name})))
    assert f"{named[0]} is in two files" in problems


@pytest.mark.parametrize("content", ["{}", "[]", "7", '{"weight_map": ["a"]}', '{"weight_map": null}'])
def test_an_index_without_a_map(shards: Path, content: str) -> None:
    (shards / INDEX).write_text(content)
    assert refused(shards) == [f"{INDEX} has no weight_map from names to files"]


def test_an_index_that_is_no_json(shards: Path) -> None:
    (shards / INDEX).write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        polymodal.load(shards)


class Bomb:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt", "model.pkl"])
def test_a_pickle_is_never_opened(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    (problem,) = refused(folder)
    assert "no model.safetensors" in problem
    assert f"{name} is a pickle, which can run code" in problem
    assert not (tmp_path / "boom").exists()


def test_a_pickle_called_safetensors_is_never_opened(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    refused(folder)
    assert not (tmp_path / "boom").exists()


def test_a_single_file_is_read_before_an_index_as_transformers_does(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {"a": "../../secret"}}')
    assert polymodal.load(folder)


def test_a_directory_is_not_a_file(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    assert "no model.safetensors" in refused(folder)[0]


NO_CONFIGS = ["", "{", "[]", "null", "7", '"clip"', "\x00", "{}", '{"model_type": ["clip"]}', "[" * 10**5, "9" * 10**4]


@pytest.mark.parametrize("content", NO_CONFIGS, ids=range(len(NO_CONFIGS)))
def test_a_config_that_is_none(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        polymodal.load(folder)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        polymodal.load(tmp_path)


def test_names_from_a_stranger_are_only_names(folder: Path) -> None:
    """A tensor called like a format string, a path or a terminal command changes nothing."""
    names = ["{i}", "{0.__class__}", "vision_model.encoder.layers.{i}.mlp.fc1.weight", "../../x", "\x1b[2J", "", "a\nb"]
    header = {n: ONE | {"data_offsets": [8 * i, 8 * i + 8]} for i, n in enumerate(names)}
    problems = refused(write_raw(folder, header, b"\0" * 8 * len(names)))
    for name in names:
        assert any(p.startswith(f"unexpected: {name}") for p in problems), name


def test_nothing_is_allocated_for_what_a_file_claims(folder: Path) -> None:
    """A config that asks for 160 GB, beside a small file, is refused by a process that may have 4 GB more."""
    config = json.loads((folder / "config.json").read_text())
    for part in ("vision_config", "text_config"):
        config[part] |= {"hidden_size": 2**16, "intermediate_size": 2**18, "num_hidden_layers": 2}
    config["text_config"]["projection_size"] = 2**16
    (folder / "config.json").write_text(json.dumps(config))
    script = (
        "import resource, sys, polymodal\n"
        "from polymodal.core.errors import WeightsError\n"
        "import polymodal.systems.siglip\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**32, used + 2**32))\n"
        "try:\n    polymodal.load(sys.argv[1])\n"
        "except WeightsError as error:\n    print(len(error.problems))\n"
    )
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 50


@pytest.mark.parametrize("fields", [{"num_hidden_layers": 10**9}, {"hidden_size": 2**62}, {"vocab_size": 10**15}])
def test_a_config_of_a_size_that_cannot_be_is_refused_before_it_is_built(folder: Path, fields: dict[str, int]) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= fields
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="expected 1 to 1"):
        polymodal.load(folder)
