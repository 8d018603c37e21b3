"""Folders of parts, which diffusers calls pipelines: an index, and for each part a folder with its config and weights.

    model_index.json                              {"unet": ["diffusers", "UNet2DConditionModel"], ...}
    unet/config.json                              and diffusion_pytorch_model.safetensors
    text_encoder/config.json                      and model.safetensors
    scheduler/scheduler_config.json
    tokenizer/                                    the files of a tokenizer

Here that is one config and one checkpoint: `read_configs` puts each part's config where the index names its class, and
`PipelineCheckpoint` calls a part's tensors ``unet.conv_in.weight``. A system reads and writes both as any other does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from reprlib import repr as short
from typing import Any, Final

from torch import Tensor

from polymodal.core.errors import ConfigError, WeightsError
from polymodal.core.files import read_json, write_json
from polymodal.weights.fields import Fields
from polymodal.weights.files import SINGLE, Checkpoint, write_shards

INDEX: Final = "model_index.json"
DIFFUSION: Final = "diffusion_pytorch_model.safetensors"
FILES: Final = {"diffusers": DIFFUSION, "transformers": SINGLE}
LIBRARY, CLASS = "_library", "_class_name"
# What diffusers writes into a config and that says nothing about the weights.
_BOOKKEEPING = (LIBRARY, "_diffusers_version", "_name_or_path", "_use_default_values", "_ignore_files")


def read_configs(folder: Path, parts: Iterable[str]) -> dict[str, Any]:
    """The index, with the config of each of ``parts`` and of the scheduler in the place of its library and class.

    Other parts (tokenizers, filters) keep their class alone; a part that the index leaves empty is None.

    Raises:
        ConfigError: a file is missing or broken, or the index names something that is no part.
    """
    raw = read_json(folder / INDEX)
    if not isinstance(raw, dict):
        raise ConfigError(f"{folder / INDEX} is not an object of parts")
    wanted = dict.fromkeys(parts, "config.json") | {"scheduler": "scheduler_config.json"}
    out: dict[str, Any] = {}
    for name, entry in raw.items():
        if not isinstance(entry, list) or name.startswith("_"):
            out[name] = entry
        elif entry == [None, None]:
            out[name] = None
        elif len(entry) != 2 or not all(isinstance(word, str) for word in entry):
            raise ConfigError(f"{folder / INDEX}: {short(name)} is {short(entry)}, expected a library and a class")
        else:
            out[name] = {LIBRARY: entry[0], CLASS: entry[1]}
            if name in wanted:
                config = read_json(folder / name / wanted[name])
                if not isinstance(config, dict):
                    raise ConfigError(f"{folder / name / wanted[name]} is not an object")
                declared = config.get(CLASS, entry[1])
                # Schedulers of one family read each other's configs, and keep the class of the first.
                if declared != entry[1] and name != "scheduler":
                    raise ConfigError(f"{folder / name / wanted[name]} is of {short(declared)}, the index has {entry}")
                out[name] = config | out[name]
    return out


def part(f: Fields, name: str, *classes: str) -> Fields:
    """The config of a part, which has to be of one of these classes."""
    child = f.child(name)
    if not f.has(name):
        f.problems.append(f"{INDEX}: there is no {name} ({' or '.join(classes)})")
    child.require(CLASS, *classes)
    child.ignore("bookkeeping of diffusers, not part of the architecture", *_BOOKKEEPING)
    return child


def pipeline(raw: Mapping[str, Any], *classes: str) -> Fields:
    """The whole config of a pipeline, which has to be of one of these classes."""
    f = Fields(raw, INDEX)
    f.require(CLASS, *classes)
    f.ignore("bookkeeping of diffusers, not part of the architecture", *_BOOKKEEPING)
    return f


def diffusers_part(cls: str, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The entry of a part of diffusers in the whole config of a pipeline."""
    return {LIBRARY: "diffusers", CLASS: cls, **(config or {})}


def transformers_part(cls: str, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The entry of a part of transformers in the whole config of a pipeline."""
    return {LIBRARY: "transformers", CLASS: cls, **(config or {})}


class PipelineCheckpoint(Checkpoint):
    """The weights of a pipeline's parts as one checkpoint, each tensor under its part's name and its own.

    Args:
        files: the parts that hold weights, and the name that each one's file has where it is in one piece.

    Raises:
        WeightsError: what `Checkpoint` raises, of all parts together.
    """

    def __init__(self, folder: Path, files: Mapping[str, str]) -> None:
        self.folder, self.files = folder, []
        self._stack, self._where, self._meta = ExitStack(), {}, {}
        problems: list[str] = []
        for name, single in files.items():
            if not (folder / name).is_dir():
                problems.append(f"there is no folder {name}")
                continue
            try:
                opened = self._stack.enter_context(Checkpoint(folder / name, single))
            except WeightsError as error:
                problems += [f"{name}: {problem}" for problem in error.problems]
                continue
            self.files += opened.files
            for key, tensor in opened.meta().items():
                self._meta[f"{name}.{key}"], self._where[f"{name}.{key}"] = tensor, opened
        if problems:
            self.close()
            raise WeightsError(str(folder), problems)

    def read(self, name: str) -> Tensor:
        opened = self._where[name]
        assert isinstance(opened, Checkpoint)
        return opened.read(name.partition(".")[2])


def write_configs(folder: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Writes each part's config, and gives the index, which `write_parts` writes once the weights are there.

    The index that was there is removed first: a cut leaves no pipeline.
    """
    (folder / INDEX).unlink(missing_ok=True)
    index: dict[str, Any] = {}
    for name, value in raw.items():
        if value is None:
            index[name] = [None, None]
        elif not isinstance(value, Mapping) or LIBRARY not in value:
            index[name] = value
        else:
            index[name] = [value[LIBRARY], value[CLASS]]
            theirs = value[LIBRARY] == "transformers"
            config = {k: v for k, v in value.items() if k != LIBRARY and not (theirs and k == CLASS)}
            if config.keys() - {CLASS}:
                file = "scheduler_config.json" if name == "scheduler" else "config.json"
                write_json(folder / name / file, config)
    return index


def write_parts(
    folder: Path, index: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor]], *, shard_bytes: int = 5 << 30
) -> None:
    """Writes named tensors part by part, and last the index that `write_configs` gave.

    ``tensors`` come part by part, as rules do that are listed so.
    """
    done: set[str] = set()

    def bare(group: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        return ((key.partition(".")[2], tensor) for key, tensor in group)

    for name, group in groupby(tensors, lambda item: item[0].partition(".")[0]):
        assert name not in done, f"the rules of {name} are not listed together"
        done.add(name)
        write_shards(folder / name, bare(group), single=FILES[index[name][0]], shard_bytes=shard_bytes)
    write_json(folder / INDEX, index)
