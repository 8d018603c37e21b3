"""One writer an index."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from polymodal.core.errors import IndexStateError


@contextlib.contextmanager
def writer(path: Path) -> Iterator[None]:
    """Holds the lock file ``path``, which names the process that writes.

    The lock is the kernel's: it ends with its process, however that ends, so a file left behind by a killed process
    never blocks and a reused process number never misleads.

    Raises:
        IndexStateError: another process is writing; the message has its number.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 32).decode(errors="replace").strip() or "unknown"
            raise IndexStateError(
                f"{path.parent}: process {holder} is writing to this index; wait for it to end (searches go on)"
            ) from None
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(handle)
