"""Safetensors folders: read header first, tensor by tensor; written shard by shard."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from polymodal.core.errors import WeightsError
from polymodal.core.files import atomic_path, read_json, write_json, write_tensors

SINGLE = "model.safetensors"
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


class Checkpoint:
    """The safetensors files of a folder, open for reading; a context manager.

    Raises:
        WeightsError: no safetensors file, a file is truncated or not one, the index and the files disagree, a name in
            the index leaves the folder, or a tensor has a dtype or shape that torch has not.

    Where a single file and an index are both there, the single file is read, as transformers does.
    """

    def __init__(self, folder: Path, single: str = SINGLE) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._where: dict[str, Any] = {}
        self._meta: dict[str, Tensor] = {}
        problems: list[str] = []
        expected_names = self._files(single, problems)
        self.files = list(expected_names)
        for path, expected in expected_names.items():
            if not path.is_file():
                problems.append(f"{path.name}, which the index names, is not in this folder")
                continue
            try:
                shard = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            except (SafetensorError, OSError, struct.error) as error:
                problems.append(f"{path.name} is not a whole safetensors file ({error})")
                continue
            names = set(shard.keys())
            if expected is not None:
                problems += [f"{path.name} lacks {n}, which the index puts there" for n in sorted(expected - names)]
                problems += [f"{path.name} holds {n}, which the index does not list" for n in sorted(names - expected)]
            for name in sorted(names):
                if name in self._where:
                    problems.append(f"{name} is in two files")
                self._where[name] = shard
                self._describe(name, shard.get_slice(name), problems)
        if problems:
            self.close()
            raise WeightsError(str(folder), problems)

    def _files(self, single: str, problems: list[str]) -> dict[Path, set[str] | None]:
        if (self.folder / single).is_file():
            return {self.folder / single: None}
        index = self.folder / index_of(single)
        if index.is_file():
            whole = read_json(index)
            weight_map = whole.get("weight_map") if isinstance(whole, Mapping) else None
            if not isinstance(weight_map, Mapping):
                problems.append(f"{index.name} has no weight_map from names to files")
                return {}
            files: dict[Path, set[str] | None] = {}
            for name, file in weight_map.items():
                if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                    problems.append(
                        f"the index puts {name} in {file!r}, which is not a safetensors file of this folder"
                    )
                    continue
                expected = files.setdefault(self.folder / file, set())
                assert expected is not None
                expected.add(name)
            return files
        pickles = sorted(p.name for p in self.folder.iterdir() if p.suffix in PICKLES)
        hint = (
            f" ({pickles[0]} is a pickle, which can run code: convert it to safetensors where you trust it)"
            if pickles
            else ""
        )
        problems.append(f"no {single} and no {index.name} in this folder{hint}")
        return {}

    def _describe(self, name: str, view: Any, problems: list[str]) -> None:
        shape, dtype = view.get_shape(), _DTYPES.get(view.get_dtype())
        if dtype is None:
            problems.append(f"{name} has dtype {view.get_dtype()}, which is not understood")
            return
        try:
            self._meta[name] = torch.empty(shape, dtype=dtype, device="meta")
        except (RuntimeError, TypeError):  # an empty tensor may claim any length along its other axes
            problems.append(f"{name} has the shape {shape}, which is too large")

    def meta(self) -> dict[str, Tensor]:
        """Names, shapes and dtypes as meta tensors, read from the headers alone."""
        return dict(self._meta)

    def read(self, name: str) -> Tensor:
        """The tensor of this name, as it is in the file."""
        return self._where[name].get_tensor(name)

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def index_of(single: str) -> str:
    """The name of the index beside shards of ``single``."""
    return f"{single}.index.json"


def write_shards(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], *, single: str = SINGLE, shard_bytes: int = 5 << 30
) -> list[str]:
    """Writes named tensors as the file ``single``, or as numbered shards with an index beyond ``shard_bytes``.

    At most one shard is held beside what the iterator yields. An interruption leaves the earlier checkpoint of the
    folder, or none, and never a mixture. Returns the file names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return _publish(folder, tensors, single, shard_bytes)
    finally:
        for path in folder.glob(f"{_PART}*"):  # of this write, or of one that was killed
            path.unlink()


_PART = ".shard-"


def _publish(folder: Path, tensors: Iterable[tuple[str, Tensor]], single: str, shard_bytes: int) -> list[str]:
    shards: list[tuple[Path, list[str]]] = []
    total = 0
    for number, shard in enumerate(_fill(tensors, shard_bytes)):
        path = folder / f"{_PART}{number}.safetensors"
        with atomic_path(path) as temporary:
            write_tensors(temporary, shard)
        shards.append((path, list(shard)))
        total += sum(t.numel() * t.element_size() for t in shard.values())
    index = folder / index_of(single)
    if len(shards) == 1:
        shards[0][0].replace(folder / single)
        index.unlink(missing_ok=True)  # of an earlier, sharded save
        return [single]
    index.unlink(missing_ok=True)
    (folder / single).unlink(missing_ok=True)
    weight_map: dict[str, str] = {}
    files = []
    for number, (path, names) in enumerate(shards):
        file = f"{Path(single).stem}-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        path.replace(folder / file)
        files.append(file)
        weight_map |= dict.fromkeys(names, file)
    write_json(index, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return files


def _fill(tensors: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        if shard and size + nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.contiguous()
        size += nbytes
    if shard:
        yield shard
