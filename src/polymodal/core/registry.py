"""A table of names and where each lives; nothing is imported before it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from polymodal.core.errors import ConfigError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the table of systems."""

    name: str
    module: str  # dotted module that holds the system
    cls: str  # the class in it
    paper: str
    year: int
    url: str
    model_types: tuple[str, ...] = ()  # `model_type` values of Hub configs that this system reads
    modalities: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()  # those that it reads, where another system has the same `model_type`

    def resolve(self) -> Any:
        return getattr(importlib.import_module(self.module), self.cls)


@dataclass(frozen=True)
class Registry(Mapping[str, Entry]):
    """A mapping that suggests a name when one is not found."""

    kind: str
    entries: tuple[Entry, ...]
    _by_name: dict[str, Entry] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        by_name = {e.name: e for e in self.entries}
        assert len(by_name) == len(self.entries), f"two {self.kind}s share a name"
        object.__setattr__(self, "_by_name", by_name)

    def __getitem__(self, name: str) -> Entry:
        try:
            return self._by_name[name]
        except KeyError:
            raise ConfigError(f"no {self.kind} is called {name!r}{did_you_mean(name, self._by_name)}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)
