"""How fast this machine multiplies matrices and moves memory: measured once, kept in the cache, read by `plan`."""

from __future__ import annotations

import itertools
import math
import platform
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from polymodal.backbones.decoder import AttentionConfig, Decoder, DecoderConfig, Gated
from polymodal.core.errors import ConfigError
from polymodal.core.files import cache_dir, read_json, write_json
from polymodal.nn.attention import attend
from polymodal.nn.dryrun import DryRun, Work
from polymodal.nn.norm import RMS
from polymodal.nn.packed import PackedLinear, can_pack
from polymodal.nn.quantise import Int8Linear
from polymodal.nn.rope import Rope

AGAIN = "measure this machine: polymodal plan --calibrate"
_MATRIX = 1024  # sides of the matrices that are multiplied
_ROWS = (1, 4, 16, 64, 256, 1024)
_SETS = (2**22, 2**25, 2**27)  # bytes of weights that are read in turn: in the caches, about as large, far larger
_SIZES = (2**14, 2**17, 2**20, 2**23, 2**26)  # bytes of a tensor that is read and written
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_PACKED = "packed "

Curve: TypeAlias = tuple[tuple[int, float], ...]  # what is varied -> what is reached each second


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Rates of a machine, in operations or bytes a second.

    Attributes:
        products: of matrices by the rows that share one read of the weights, for each dtype of linear layers, plain and
            packed, and for so many bytes of weights that are read in turn.
        attention: of the fused kernel, by queries.
        moves: of tensors that are added, by their bytes; ``curves`` of those that pass an activation; both slowed
            down to the mix of operations that a decoder has beside its products.
        call: seconds that an operation takes however small it is, with what Python does around it.
    """

    name: str
    cpu: str
    threads: int
    torch: str
    date: str
    products: Mapping[str, tuple[tuple[int, Curve], ...]]
    attention: Mapping[str, Curve]
    convolution: Mapping[str, float]
    moves: Curve
    curves: Curve
    call: float

    def seconds(self, work: Mapping[Work, int], weights: int) -> float:
        """How long this work takes, of a model that holds so many bytes of weights."""
        return sum(times * (self.call + self._one(item, weights)) for item, times in work.items())

    def _one(self, work: Work, weights: int) -> float:
        dtype = work.dtype if work.dtype in self.products else "float32"
        half = dtype if dtype in self.attention else "float32"
        if work.kind == "view":
            return 0.0
        if work.kind == "plain":
            return work.bytes / _at(self.moves, work.bytes)
        if work.kind == "curve":
            return work.bytes / _at(self.curves, work.bytes)
        if work.kind == "convolution":
            return work.flops / self.convolution[half]
        if work.kind == "attention":
            rate = _at(self.attention[half], work.rows)
            return max(work.flops / rate, work.bytes / _at(self.moves, work.bytes))
        held = tuple((size, _at(curve, work.rows)) for size, curve in self.products[dtype])
        return work.flops / _at(held, max(weights, 1))

    def save(self) -> Path:
        path = _file()
        write_json(path, asdict(self))
        return path

    @classmethod
    def read(cls) -> Machine:
        """What `calibrate` measured here.

        Raises:
            ConfigError: it was never measured, or on another processor, torch or number of threads.
        """
        path = _file()
        if not path.is_file():
            raise ConfigError(f"no latency: this machine was never measured ({path} is not there); {AGAIN}")
        raw = read_json(path)
        names = {f.name for f in fields(cls)}
        if not isinstance(raw, dict) or set(raw) != names:
            raise ConfigError(f"no latency: {path} is of another version of polymodal; {AGAIN}")
        now = {"cpu": _cpu(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        changed = [f"{what} is {value}, it was {raw[what]}" for what, value in now.items() if raw[what] != value]
        if changed:
            raise ConfigError(f"no latency: what was measured no longer holds ({'; '.join(changed)}); {AGAIN}")
        return cls(**{name: _tuples(value) for name, value in raw.items()})


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _tuples(v) for name, v in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _file() -> Path:
    name = re.sub(r"[^A-Za-z0-9._-]", "_", platform.node()) or "this"
    return cache_dir() / f"machine-{name}.json"


def _cpu() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _at(curve: Curve, x: float | int) -> float:
    """The rate at ``x``, between the measured ones in proportion on logarithmic axes."""
    if x <= curve[0][0]:
        return curve[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if x <= x1:
            share = math.log(x / x0) / math.log(x1 / x0)
            return y0 * (y1 / y0) ** share
    return curve[-1][1]


# ---- measuring


def calibrate(seconds: float = 0.05) -> Machine:
    """Measures this machine, about ``seconds`` for each of some hundred rates, and keeps the result."""
    with torch.no_grad():
        moves, call = _elementwise(lambda x: x + x, 3, seconds), _call()
        machine = Machine(
            name=platform.node(), cpu=_cpu(), threads=torch.get_num_threads(), torch=torch.__version__,
            date=time.strftime("%Y-%m-%d"), call=call, moves=moves,
            curves=_elementwise(torch.nn.functional.gelu, 2, seconds),
            products={
                kind: tuple((held, _products(kind, held, seconds, moves, call)) for held in _SETS)
                for kind in (*_DTYPES, *(_PACKED + name for name, dtype in _DTYPES.items() if can_pack(dtype)), "int8")
            },
            attention={name: _attention(d, seconds) for name, d in _DTYPES.items()},
            convolution={name: _convolution(d, seconds) for name, d in _DTYPES.items()},
        )  # fmt: skip
        slower = _mix(machine)
    moves, curves = (tuple((x, y / slower) for x, y in curve) for curve in (machine.moves, machine.curves))
    machine = replace(machine, moves=moves, curves=curves)
    machine.save()
    return machine


def _time(work: Callable[[], object], budget: float, before: Callable[[], object] | None = None) -> float:
    """Seconds of the fastest of as many runs as the budget has: what else runs on a machine only adds."""
    # A single thread's own time leaves out the turns that other programs take.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    work()
    best, rounds, end = math.inf, 0, time.perf_counter() + budget
    while rounds < 3 or (time.perf_counter() < end and rounds < 1000):
        if before is not None:
            before()
        began = clock()
        work()
        best = min(best, clock() - began)
        rounds += 1
    return best


def _layer(kind: str) -> nn.Module:
    """A linear layer of `Machine.products`."""
    plain = nn.Linear(_MATRIX, _MATRIX, bias=False)
    nn.init.normal_(plain.weight, std=_MATRIX**-0.5)
    if kind == "int8":
        return Int8Linear(plain.weight)
    plain.to(_DTYPES[kind.removeprefix(_PACKED)])
    return PackedLinear(plain.weight) if kind.startswith(_PACKED) else plain


def _products(kind: str, held: int, budget: float, moves: Curve, call: float) -> Curve:
    """By rows, of layers with so many bytes of weights together."""
    dtype = _DTYPES.get(kind.removeprefix(_PACKED))
    layers = [_layer(kind) for _ in range(max(1, held // (_MATRIX**2 * (1 if dtype is None else dtype.itemsize))))]
    out = []
    for rows in _ROWS:
        # With many rows a product takes long, and where its weights were matters little.
        some = layers if rows <= 16 else layers[:4]
        x = torch.randn(rows, _MATRIX).to(dtype or torch.float32)

        def run(some: list[nn.Module] = some, x: Tensor = x) -> None:
            for layer in some:
                layer(x)

        spent = _time(run, budget) / len(some)
        if kind == "int8":  # norm, quotient and product around it are operations of their own
            around = sum(call + size / _at(moves, size) for size in (x.nbytes, 2 * x.nbytes, 2 * x.nbytes))
            spent = max(spent - around, spent / 4)
        out.append((rows, 2 * rows * _MATRIX**2 / spent))
    return tuple(out)


def _attention(dtype: torch.dtype, budget: float) -> Curve:
    heads, keys, dim = 8, 512, 64
    out = []
    for queries in (1, 32, 512):
        q, k = (torch.randn(1, heads, n, dim).to(dtype) for n in (queries, keys))
        spent = _time(lambda q=q, k=k: attend(q, k, k), budget)  # type: ignore[misc]
        out.append((queries, 4 * heads * queries * keys * dim / spent))
    return tuple(out)


def _convolution(dtype: torch.dtype, budget: float) -> float:
    layer, x = nn.Conv2d(3, 512, 14, 14).to(dtype), torch.randn(1, 3, 224, 224).to(dtype)
    return 2 * 256 * 512 * 3 * 14 * 14 / _time(lambda: layer(x), budget)


def _elementwise(function: Callable[[Tensor], Tensor], passes: int, budget: float) -> Curve:
    """Bytes a second by the bytes of all ``passes`` over a tensor."""
    out = []
    for size in _SIZES:
        x = torch.randn(size // 4)
        out.append((passes * size, passes * size / _time(lambda x=x: function(x), budget)))  # type: ignore[misc]
    return tuple(out)


def _decoder(dim: int, layers: int) -> tuple[Decoder, DryRun, Decoder]:
    """A decoder, and one without numbers."""
    config = DecoderConfig(
        vocab_size=64, context=256, dim=dim, num_layers=layers, mlp=Gated(hidden_dim=2 * dim), norm=RMS(),
        position=Rope(), attention=AttentionConfig(num_heads=dim // 32, num_kv_heads=dim // 32, head_dim=32),
    )  # fmt: skip
    dry, model = DryRun(), Decoder(config)
    model.init_weights()
    return model, dry, dry.build(lambda: Decoder(config))


def _read(model: Decoder, tokens: int) -> object:
    cache = model.new_cache(1, tokens)
    return model.logits(model(model.text(torch.zeros(1, tokens, dtype=torch.int64)), cache).x)


def _call() -> float:
    """Of a decoder too small for anything else to take time, its code out of the caches as between large products."""
    model, dry, shape = _decoder(32, 4)
    with dry.counted() as (work, _):
        _read(shape, 1)
    sweep = torch.zeros(2**24)
    return _time(lambda: _read(model, 1), 0.5, before=lambda: sweep.add_(1)) / sum(work.values())


def _mix(machine: Machine) -> float:
    """How much longer what a decoder does beside its products takes than additions of as many bytes."""
    model, dry, shape = _decoder(512, 4)
    with dry.counted() as (work, _):
        _read(shape, 192)
    beside = {item: times for item, times in work.items() if item.kind in ("plain", "curve")}
    weights = sum(p.nbytes for p in model.parameters())
    rest = machine.seconds(work - Counter(beside), weights) + machine.call * sum(beside.values())
    alone = machine.seconds(beside, weights) - machine.call * sum(beside.values())
    return max(1.0, (_time(lambda: _read(model, 192), 0.5) - rest) / alone)
