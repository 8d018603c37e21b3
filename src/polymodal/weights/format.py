"""What a system declares about the files of others: their format, and their implementation to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from polymodal.core.errors import ConfigError
from polymodal.core.files import read_json, write_json
from polymodal.weights.files import SINGLE, Checkpoint, write_shards
from polymodal.weights.pipeline import PipelineCheckpoint, read_configs, write_configs, write_parts
from polymodal.weights.rules import Rule


@dataclass(frozen=True, kw_only=True)
class Format:
    """How a system's checkpoints look in one library's files: the config, the names, the image processor."""

    read: Callable[[Mapping[str, Any]], tuple[Any, dict[str, str]]]  # config file -> (Config, what was done per field)
    write: Callable[[Any], dict[str, Any]]  # Config -> config file
    rules: Callable[[Any], list[Rule]]
    config_file: str = "config.json"
    weights_file: str = SINGLE
    # Where the library keeps its pre-processing, if not in the Hub's preprocessor_config.json: (folder, Config) -> the
    # processor, and the processor -> fields that the config file gets.
    read_images: Callable[[Path, Any], Any] | None = None
    write_images: Callable[[Any], dict[str, Any]] | None = None
    # Of a pipeline (see `weights.pipeline`): its folders that hold weights, and the name of the file in each.
    parts: Mapping[str, str] = field(default_factory=dict)

    def config(self, folder: Path) -> Any:
        """What `read` reads, from the files of a folder."""
        return read_configs(folder, self.parts) if self.parts else read_json(folder / self.config_file)

    def open(self, folder: Path, raw: Mapping[str, Any]) -> Checkpoint:
        """The tensors of a folder with this `config`; parts that it leaves empty are not looked for."""
        if self.parts:
            return PipelineCheckpoint(folder, {n: file for n, file in self.parts.items() if raw.get(n) is not None})
        return Checkpoint(folder, self.weights_file)

    def store(
        self, folder: Path, raw: dict[str, Any], tensors: Iterable[tuple[str, Tensor]], *, shard_bytes: int
    ) -> None:
        """Writes what `config` and `open` read."""
        if self.parts:
            write_parts(folder, write_configs(folder, raw), tensors, shard_bytes=shard_bytes)
            return
        write_shards(folder, tensors, single=self.weights_file, shard_bytes=shard_bytes)
        write_json(folder / self.config_file, raw)  # last: what was interrupted is not taken for a model


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The public implementation of a system, for proofs: how to call it on our inputs and what to compare."""

    package: str
    cls: str
    inputs: Mapping[str, str]  # our input name -> its keyword
    output: str  # the attribute of its result that equals our `forward`
    extra: Mapping[str, Any] | None = None  # further keywords of its call
    loss: bool = True  # whether its result has a `.loss` equal to ours


def different_fields(one: Any, other: Any, prefix: str = "") -> list[str]:
    """The fields, nested ones dotted, in which two configs of one type differ."""
    out = []
    for name in (f.name for f in fields(one)):
        a, b = getattr(one, name), getattr(other, name)
        if is_dataclass(a) and type(a) is type(b):
            out += different_fields(a, b, f"{prefix}{name}.")
        elif a != b:
            out.append(f"{prefix}{name}")
    return out


def write_whole(
    config: Any, raw: dict[str, Any], read: Callable[[Mapping[str, Any]], tuple[Any, dict[str, str]]]
) -> dict[str, Any]:
    """``raw``, if it is read as the config that it was written from.

    Raises:
        ConfigError: something of the config has no field there.
    """
    lost = different_fields(config, read(raw)[0])
    if lost:
        raise ConfigError(f"the Hub's format has no field for {', '.join(lost)} of this config")
    return raw
