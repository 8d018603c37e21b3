"""Opening media files that strangers named or wrote."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from polymodal.core.errors import MediaError


@contextlib.contextmanager
def open_medium(path: str | Path, *, where: str, medium: str, max_bytes: int) -> Iterator[BinaryIO]:
    """A media file, open for reading; ``where`` names it in errors and ``medium`` says what it should be.

    Raises:
        MediaError: there is no such regular file, it is too large, or it may not be read.
    """
    if "://" in str(path):
        raise MediaError(f"{where}: addresses are not fetched; download the {medium} and pass its path or bytes")
    try:
        # Looked at after it is opened, so that it is what is read; opened so that a pipe does not block for ever.
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    except IsADirectoryError:
        raise MediaError(f"{where}: is a folder, not a {medium}") from None
    except FileNotFoundError:
        raise MediaError(f"{where}: there is no such file") from None
    except PermissionError:
        raise MediaError(f"{where}: may not be read (permission denied)") from None
    except OSError as error:
        raise MediaError(f"{where}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise MediaError(f"{where}: cannot be read") from error
    with file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise MediaError(f"{where}: is not a regular file")
        check_bytes(where, facts.st_size, max_bytes)
        yield file


def check_bytes(where: str, size: int, limit: int) -> None:
    """Refuses more encoded bytes than are allowed.

    Raises:
        MediaError: there are more.
    """
    if size > limit:
        raise MediaError(f"{where}: {size:,} bytes are more than the {limit:,} allowed")
