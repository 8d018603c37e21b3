"""Features of media that were read before: the same picture goes through its tower once."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable

import torch
from jaxtyping import Shaped
from torch import Tensor

from polymodal.core.errors import ConfigError


def content_key(tensor: Shaped[Tensor, "*shape"], fingerprint: str) -> str:
    """Hash of a tensor's bytes, shape and dtype, and of the pre-processing and tower that ``fingerprint`` names."""
    raw = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
    head = f"{fingerprint}\0{tuple(tensor.shape)}\0{tensor.dtype}\0"
    return hashlib.sha256(head.encode() + raw.numpy().tobytes()).hexdigest()


class FeatureCache:
    """Tensors by key, at most ``limit`` bytes of them; those that were asked for longest ago are forgotten first.

    Any thread may ask. Two that miss the same key at once both compute it.
    """

    def __init__(self, limit: int) -> None:
        if limit < 0:
            raise ConfigError(f"a cache of {limit} bytes")
        self.limit, self.nbytes, self.hits, self.misses = limit, 0, 0, 0
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: str, make: Callable[[], Tensor]) -> Tensor:
        """What was made for this key; made now, without its gradient history, if it is not known. Not to be changed."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                self.hits += 1
                return self._kept[key]
            self.misses += 1
        # A view would keep alive, and outside the count, the whole batch that it was cut from.
        value = make().detach().clone()
        with self._lock:
            if key not in self._kept and value.nbytes <= self.limit:
                self._kept[key] = value
                self.nbytes += value.nbytes
                while self.nbytes > self.limit:
                    self.nbytes -= self._kept.popitem(last=False)[1].nbytes
        return value

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()
            self.nbytes = 0
