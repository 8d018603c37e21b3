"""Arrays in msgpack as openpi's clients and servers write them, read without trust: no pickles, no object arrays."""

from __future__ import annotations

import itertools
import math
from typing import Any, Final

import numpy as np

from polymodal.core.errors import MediaError, MissingDependency

_KINDS: Final = "biuf"  # booleans, integers, floats
_ARRAY, _NUMBER = b"__ndarray__", b"__npgeneric__"
_MOST_AXES: Final = 8
_MOST: Final = 1024  # tables and lists of a message, and entries of each: small ones take 70 times their bytes


def pack(value: Any) -> bytes:
    """A message of dictionaries, lists, texts, numbers and arrays."""
    return _msgpack().packb(value, default=_array)


def unpack(data: bytes) -> Any:
    """What `pack` or openpi's packer wrote. Arrays are views of the message and cannot be written to.

    Raises:
        MediaError: it is no such message: broken, too deep, of too many parts, an array of objects, or with another
            size than it says.
    """
    msgpack, parts = _msgpack(), itertools.count(1)

    def counted(part: Any) -> Any:
        if next(parts) > _MOST:
            raise MediaError(f"a message of more than {_MOST} tables and lists")
        return _checked(part) if isinstance(part, dict) else part

    try:
        return msgpack.unpackb(
            data, object_hook=counted, list_hook=counted, max_ext_len=0, max_array_len=_MOST, max_map_len=_MOST
        )
    except MediaError:
        raise
    except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as error:
        raise MediaError(f"a message that is no msgpack of arrays ({type(error).__name__})") from None


def _msgpack() -> Any:
    try:
        import msgpack
    except ModuleNotFoundError:
        raise MissingDependency("serving a policy", "msgpack", "act") from None
    return msgpack


def _array(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in _KINDS:
        if isinstance(value, np.generic):
            return {_NUMBER: True, b"data": value.item(), b"dtype": value.dtype.str}
        return {_ARRAY: True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    raise MediaError(f"{type(value).__name__} cannot be sent: arrays of numbers, numbers and texts can")


def _checked(raw: dict[Any, Any]) -> Any:
    if _ARRAY not in raw and _NUMBER not in raw:
        return raw
    name, data = raw.get(b"dtype"), raw.get(b"data")
    if not isinstance(name, str) or len(name) > 4 or name[:1] not in "<>|=" or name[1:2] not in _KINDS:
        raise MediaError("an array of something that is no number")
    try:
        dtype = np.dtype(name)
    except TypeError:
        raise MediaError("an array of an unknown type") from None
    if _NUMBER in raw:
        if not isinstance(data, bool | int | float):
            raise MediaError("a number that is none")
        try:
            return dtype.type(data)
        except OverflowError:
            raise MediaError("a number that its type cannot hold") from None
    shape = raw.get(b"shape")
    if not isinstance(shape, list) or len(shape) > _MOST_AXES or not all(type(n) is int and n >= 0 for n in shape):
        raise MediaError("an array whose shape is none")
    if not isinstance(data, bytes) or math.prod(shape) * dtype.itemsize != len(data):
        raise MediaError("an array with another number of bytes than its shape and type say")
    return np.frombuffer(data, dtype).reshape(shape)
