"""Folders of parts: whole or not there, sharded, and not fooled by their index."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import polymodal
from polymodal.core.errors import ConfigError, WeightsError
from polymodal.weights.files import SINGLE
from polymodal.weights.pipeline import (
    DIFFUSION,
    INDEX,
    PipelineCheckpoint,
    diffusers_part,
    read_configs,
    transformers_part,
    write_configs,
    write_parts,
)
from tests.nano import nano

RAW: dict[str, Any] = {
    "_class_name": "Some", "flag": True, "nothing": None, "unet": diffusers_part("U", {"width": 3}),
    "text": transformers_part("T", {"model_type": "t"}), "tokenizer": transformers_part("Tok"),
    "scheduler": diffusers_part("S", {"steps": 5}),
}  # fmt: skip
FILES = {"text": SINGLE, "unet": DIFFUSION}


def tensors() -> Iterator[tuple[str, Tensor]]:
    yield "text.a.weight", torch.arange(6.0)
    yield "text.b", torch.ones(3)
    yield "unet.a.weight", torch.zeros(2, 2)


def written(folder: Path) -> Path:
    write_parts(folder, write_configs(folder, RAW), tensors())
    return folder


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    folder = written(tmp_path)
    assert read_configs(folder, FILES) == RAW
    assert json.loads((folder / INDEX).read_text())["nothing"] == [None, None]
    assert json.loads((folder / "text" / "config.json").read_text()) == {"model_type": "t"}
    assert not (folder / "tokenizer").exists()
    with PipelineCheckpoint(folder, FILES) as checkpoint:
        assert [path.relative_to(folder).as_posix() for path in checkpoint.files] == [
            f"text/{SINGLE}", f"unet/{DIFFUSION}"
        ]  # fmt: skip
        for name, tensor in tensors():
            assert torch.equal(checkpoint.read(name), tensor)
            assert checkpoint.meta()[name].shape == tensor.shape


def test_a_cut_leaves_no_pipeline(tmp_path: Path) -> None:
    folder = written(tmp_path)

    def cut() -> Iterator[tuple[str, Tensor]]:
        yield from tensors()
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_parts(folder, write_configs(folder, RAW), cut())
    assert not (folder / INDEX).exists()
    with pytest.raises(ConfigError, match="does not exist"):
        read_configs(folder, FILES)


def test_a_cut_between_two_configs_leaves_no_pipeline(tmp_path: Path) -> None:
    folder = written(tmp_path)
    changed = RAW | {"unet": diffusers_part("U", {"width": 4}), "text": transformers_part("T", {"model_type": object})}
    with pytest.raises(TypeError, match="JSON"):
        write_configs(folder, changed)
    assert json.loads((folder / "unet" / "config.json").read_text())["width"] == 4
    assert not (folder / INDEX).exists()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (["diffusers"], "expected a library and a class"),
        ([None, "U"], "expected a library and a class"),
        (["diffusers", {"a": 1}], "expected a library and a class"),
        (["diffusers", "U", "more"], "expected a library and a class"),
        (["diffusers", "Other"], "is of 'U'"),
    ],
)
def test_an_entry_that_is_none_is_refused(tmp_path: Path, entry: Any, message: str) -> None:
    folder = written(tmp_path)
    (folder / INDEX).write_text(json.dumps(json.loads((folder / INDEX).read_text()) | {"unet": entry}))
    with pytest.raises(ConfigError, match=message):
        read_configs(folder, FILES)


@pytest.mark.parametrize("content", ["", "[]", "7", "{", "[" * 100_000])
@pytest.mark.parametrize("file", [INDEX, "unet/config.json", "scheduler/scheduler_config.json"])
def test_a_file_that_is_no_object_is_refused(tmp_path: Path, file: str, content: str) -> None:
    folder = written(tmp_path)
    (folder / file).write_text(content)
    with pytest.raises(ConfigError, match=file.rpartition("/")[2]):
        read_configs(folder, FILES)


def test_only_parts_that_are_asked_for_are_opened(tmp_path: Path) -> None:
    """Names in an index lead nowhere: what the reader does not know by name stays closed."""
    folder = written(tmp_path / "model")
    (tmp_path / "config.json").write_text("{broken")
    raw = json.loads((folder / INDEX).read_text()) | {"..": ["diffusers", "U"], "/etc": ["os", "system"]}
    (folder / INDEX).write_text(json.dumps(raw))
    got = read_configs(folder, FILES)
    assert got[".."] == diffusers_part("U")
    assert got["/etc"]["_class_name"] == "system"


def test_problems_of_all_parts_are_listed(tmp_path: Path) -> None:
    folder = written(tmp_path)
    (folder / "unet" / DIFFUSION).write_bytes(b"x" * 20)
    with pytest.raises(WeightsError) as error:
        PipelineCheckpoint(folder, FILES | {"vae": DIFFUSION})
    assert [problem.split(":")[0] for problem in error.value.problems] == ["unet", "there is no folder vae"]


@pytest.mark.proves("stable_diffusion", "weights: sharded parts")
def test_parts_in_shards(tmp_path: Path) -> None:
    model = nano("stable_diffusion")
    folder = model.save(tmp_path / "model", shard_bytes=300_000)
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    again = polymodal.load(folder)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    whole = again.save(folder)  # over itself, in one piece
    assert (whole / "unet" / DIFFUSION).is_file()
    assert not (whole / "unet" / f"{DIFFUSION}.index.json").exists()
    assert polymodal.load(whole).fingerprint == again.fingerprint
