"""Writing so that an interruption never leaves half a file, and hashing."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from polymodal.core.errors import ConfigError


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary sibling of ``path``; renames it onto ``path`` when the block ends without an error."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:  # said of what was asked for, not of a temporary name
        reason = f"{path.parent} is no folder" if path.parent.is_file() else error.strerror
        raise OSError(error.errno, f"cannot be written ({reason})", str(path)) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes 0600 files; a saved model is meant to be readable like any other file.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_target(path: str | Path) -> None:
    """Raises an OSError, as `atomic_path` does, where no file can be written: told before anything is computed."""
    path = Path(path)
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if path.is_dir():
        number, reason = errno.EISDIR, "it is a folder"
    elif not folder.is_dir():
        number, reason = errno.ENOTDIR, f"{folder} is no folder"
    elif not os.access(folder, os.W_OK | os.X_OK):
        number, reason = errno.EACCES, f"{folder} may not be written to"
    else:
        return
    raise OSError(number, f"cannot be written ({reason})", str(path))


def atomic_write(path: str | Path, content: str | bytes) -> None:
    """Writes ``content`` to ``path`` whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: str | Path, value: Any) -> None:
    """Writes ``value`` as JSON, whole or not at all."""
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: str | Path, tensors: dict[str, Any]) -> None:
    """Writes named tensors as a safetensors file.

    Raises:
        OSError: the system does not write it: the disk is full, for example.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        if (told := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        number = int(told[1])
        raise OSError(number, os.strerror(number), str(path)) from error


def read_json(path: str | Path) -> Any:
    """Reads a JSON file.

    Raises:
        ConfigError: the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8, or a number of thousands of digits
        raise ConfigError(f"{path} is not valid JSON: {error}") from None


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with Path(path).open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def cache_dir() -> Path:
    """Where rendered worlds and downloads are kept: ``$POLYMODAL_CACHE`` or ``~/.cache/polymodal``."""
    return Path(os.environ.get("POLYMODAL_CACHE") or Path.home() / ".cache" / "polymodal")
