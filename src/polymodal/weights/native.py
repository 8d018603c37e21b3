"""Polymodal's own format, for systems that no other library has: the config as it is, tensors under our names.

The config file follows from the types of the config's fields, so that what is written is what is read. Nested configs
are called ``..._config``, as in the Hub's files; where a field may hold one of several, ``type`` says which.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from polymodal.weights.fields import LARGEST, MOST_LAYERS, Fields
from polymodal.weights.format import Format
from polymodal.weights.rules import Rule, rule

_FAR = 2**40  # contexts of rotary positions have no end
_DEEPEST = 10  # parts of a name


def native_format(model_type: str, config: type) -> Format:
    """The format of a system whose config is this dataclass, under a `model_type` of our own."""

    def read(raw: Mapping[str, Any]) -> tuple[Any, dict[str, str]]:
        f = Fields(raw)
        f.require("model_type", model_type)
        make = _read(f, config)
        report = f.done()
        return make(), report

    return Format(
        read=read,
        write=lambda c: {"architectures": ["Polymodal"], "model_type": model_type, **_write(c)},
        rules=lambda _: same_names(),
    )


def same_names() -> list[Rule]:
    """Rules for files that have our own names."""
    words = [f"{{w{depth}}}" for depth in range(_DEEPEST)]
    patterns = [".".join(words[:depth]) for depth in range(1, _DEEPEST + 1)]
    return [rule(pattern, pattern) for pattern in patterns]


def _write(config: Any) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            named = {"type": type(value).__name__} if len(_configs(_hints(config)[f.name])) > 1 else {}
            out[f"{f.name}_config"] = {**named, **_write(value)}
        elif not (value is None and _configs(_hints(config)[f.name])):
            out[f.name] = list(value) if isinstance(value, tuple) else value
    return out


def _read(f: Fields, config: type) -> Callable[[], Any]:
    """Looks at every field; what is returned makes the config, once there are no problems."""
    parts = {field.name: _read_field(f, field, _hints(config)[field.name]) for field in fields(config)}
    return lambda: config(**{name: make() for name, make in parts.items()})


def _read_field(f: Fields, field: Field[Any], hint: Any) -> Callable[[], Any]:
    name, default = field.name, field.default
    configs, plain = _configs(hint), [t for t in _options(hint) if not is_dataclass(t)]
    if configs:
        name += "_config"
        if not f.has(name) and type(None) in plain:
            f.child(name)
            return lambda: None
        if name not in f and field.default_factory is not MISSING:
            return field.default_factory
        child = f.child(name)
        if len(configs) == 1:
            return _read(child, configs[0])
        # Of a type that is not known, the first one's fields are looked at: the likeliest's.
        likely = sorted(configs, key=lambda c: -sum(each.name in child for each in fields(c)))
        return _read(child, child.choose("type", {c.__name__: c for c in likely}))
    value = _read_plain(f, name, plain, default)
    return lambda: value


def _read_plain(f: Fields, name: str, options: list[Any], default: Any) -> Any:
    given = {} if default is MISSING else {"default": default}
    words = [word for option in options if get_origin(option) is Literal for word in get_args(option)]
    if words:
        return f.choose(name, {word: word for word in words}, **given)
    kind = next(option for option in options if option is not type(None))
    if get_origin(kind) is tuple:
        if default is not MISSING and f.optional(name, list) is None:
            return default
        return f.numbers(name, get_args(kind)[0])
    if type(None) in options:
        return f.optional(name, kind)
    least = 0 if name.endswith(("_id", "new_tokens")) or default == 0 else 1
    most = MOST_LAYERS if name in ("num_layers", "layers") else _FAR if name in ("context", "theta") else LARGEST
    return f.take(name, kind, least=least, most=most, **given)


def _hints(config: Any) -> dict[str, Any]:
    return get_type_hints(config if isinstance(config, type) else type(config))


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _configs(hint: Any) -> list[type]:
    return [option for option in _options(hint) if isinstance(option, type) and is_dataclass(option)]
