"""Runs a model without numbers: floating-point tensors have shapes and no values, integers are computed for real.

What a run would compute and hold is counted on the way, so that a model of any size is priced in seconds and without
memory. Counts of tokens, masks and positions are data that a model branches on; they are small and stay exact.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Final, Literal, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from polymodal.nn.skeleton import skeleton

Kind = Literal["linear", "matmul", "convolution", "attention", "curve", "plain", "view"]

# torch's counter knows the fused attention of GPUs only; on a CPU the same products are made.
_CPU_ATTENTION = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
)
_INDEXED = (
    torch.ops.aten.index,
    torch.ops.aten.index_put,
    torch.ops.aten.index_put_,
    torch.ops.aten._index_put_impl_,
)
# They read as much as they write, of a table that may be large.
_GATHERS = (torch.ops.aten.embedding, torch.ops.aten.index, torch.ops.aten.index_select, torch.ops.aten.gather)
# Element by element, and bound by arithmetic instead of memory.
_CURVES: Final = frozenset(
    f"aten::{name}{suffix}"
    for name in [
        "gelu",
        "silu",
        "_softmax",
        "_log_softmax",
        "tanh",
        "sigmoid",
        "exp",
        "log",
        "erf",
        "pow",
        "sin",
        "cos",
    ]
    for suffix in ("", "_", "_backward", "_backward_data")
)


class Work(NamedTuple):
    """One operation, as far as its time depends on it."""

    kind: Kind
    rows: int  # of a product: how many rows share what is read of the other matrix; 0 elsewhere
    flops: int
    bytes: int  # read and written
    dtype: str  # "float32", "bfloat16"; of a linear layer also "int8", if it will be quantised, and "packed float32"


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Held:
    """Bytes that tensors hold: now, and at most."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._storages: dict[int, int] = {}

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = self._storages[key] = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key).atexit = False

    def _free(self, key: int) -> None:
        self.now -= self._storages.pop(key)


class DryRun(TorchDispatchMode):
    """Inside, operations give tensors without values. Tensors of `empty` and `build` are such; others may be mixed in.

    Attributes:
        work: how often each operation was done.
        held: what the tensors made inside hold; neither parameters nor what `empty` gives is among them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.work: Counter[Work] = Counter()
        self.held = Held()
        self._linear: dict[int, str] = {}  # storages of linear layers' weights -> the dtype that they are computed in

    # -- making

    def empty(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor without values on the CPU."""
        with self.fake:
            return torch.empty(tuple(shape), dtype=dtype)

    def like(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors without values, but for integers and for one number an entry: places may follow from these."""
        return {
            k: self.empty(t.shape, t.dtype) if t.is_floating_point() and t.ndim > 1 else t for k, t in tensors.items()
        }

    def build(self, make: Callable[[], nn.Module]) -> Any:
        """A module whose parameters have no values; ``make`` builds it, on the meta device."""
        with skeleton():
            module = make()
        made: dict[int, nn.Parameter] = {}
        for part in module.modules():
            for name, old in part.named_parameters(recurse=False, remove_duplicate=False):
                if id(old) not in made:
                    made[id(old)] = nn.Parameter(self.empty(old.shape, old.dtype), old.requires_grad)
                part._parameters[name] = made[id(old)]
            for name, buffer in part.named_buffers(recurse=False):
                real = not buffer.is_floating_point()
                part._buffers[name] = (
                    torch.zeros(buffer.shape, dtype=buffer.dtype) if real else self.empty(buffer.shape, buffer.dtype)
                )
        for part in module.modules():
            if isinstance(part, nn.Linear):
                self._mark(part.weight, _named(part.weight.dtype))
        # Kept alive by us: a storage's number stands for it only as long as it lives.
        self._made = list(made.values())
        return module

    def _mark(self, weight: Tensor, dtype: str) -> None:
        self._linear[weight.untyped_storage()._cdata] = dtype

    def quantise(self, module: nn.Module) -> None:
        """Gives the linear layers of a built module the operations of `nn.quantise.Int8Linear`."""
        for part in list(module.modules()):
            for name, child in list(part.named_children()):
                if type(child) is nn.Linear:
                    setattr(part, name, _Int8Shape(child))
                    self._mark(child.weight, "int8")

    def pack(self, module: nn.Module) -> None:
        """Gives the linear layers of a built module the rates of `nn.packed.PackedLinear`, which does the same."""
        for part in module.modules():
            if type(part) is nn.Linear:
                self._mark(part.weight, f"packed {_named(part.weight.dtype)}")

    # -- running

    @contextmanager
    def counted(self) -> Iterator[tuple[Counter[Work], Held]]:
        """What is done inside, and what its tensors hold beyond what was held before."""
        before, held = Counter(self.work), self.held
        start, held.peak = held.now, held.now
        work: Counter[Work] = Counter()
        extra = Held()
        with self:
            yield work, extra
        work.update(self.work - before)
        extra.now, extra.peak = held.now - start, held.peak - start

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if given:
            dry = any(isinstance(t, FakeTensor) for t in given)
        else:  # a new tensor; numbers that are drawn or counted off may become places, so they are real
            filled = func.overloadpacket is torch.ops.aten.full and isinstance(args[1], int)
            dtype = kwargs.get("dtype") or (torch.int64 if filled else torch.get_default_dtype())
            drawn = torch.Tag.nondeterministic_seeded in func.tags
            dry = dtype.is_floating_point and not drawn and func.overloadpacket is not torch.ops.aten.arange
        if dry and func.overloadpacket in _INDEXED:  # how many places a mask has is known here only
            args = (args[0], _places(args[1]), *args[2:])
        with self.fake if dry else nullcontext():
            out = func(*args, **kwargs)
        if dry and func.overloadpacket is torch.ops.aten.argmin:  # codes become tokens: the first stands for any
            out = torch.zeros(out.shape, dtype=out.dtype)
        made = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
        known = {t.untyped_storage()._cdata for t in given}
        made = [t for t in made if t.untyped_storage()._cdata not in known]
        self._count(func, args, kwargs, out, given, made)
        for tensor in made:
            self.held.add(tensor)
        return out

    def _count(
        self, func: Any, args: Any, kwargs: Any, out: Any, given: Sequence[Tensor], made: Sequence[Tensor]
    ) -> None:
        packet, flops, rows = func.overloadpacket, 0, 0
        marks = [self._linear.get(t.untyped_storage()._cdata) for t in given]
        mark = next((m for m in marks if m is not None), None)
        # An int8 weight is held and read in a quarter of the bytes.
        size = sum(t.nbytes // 4 if m == "int8" else t.nbytes for t, m in zip(given, marks, strict=True))
        size += sum(t.nbytes for t in made)
        kind: Kind = "plain"
        if packet in _CPU_ATTENTION:
            backward = packet is _CPU_ATTENTION[1]
            shapes = [t.shape for t in args[: 4 if backward else 3]]
            kind, rows = "attention", shapes[-3][-2]
            flops = (sdpa_backward_flop_count if backward else sdpa_flop_count)(*shapes)
        elif packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=out)
            if "convolution" in str(packet):
                kind = "convolution"
            else:
                kind, rows = "matmul" if mark is None else "linear", out.shape[-2]
        elif not made and not func._schema.is_mutable:
            kind, size = "view", 0
        elif packet in _GATHERS:
            size = 2 * sum(t.nbytes for t in made)
        elif func._schema.name in _CURVES:
            kind = "curve"
        floats = [t.dtype for t in (*given, *made) if t.is_floating_point()]
        dtype = _named(floats[-1]) if floats else "int"
        self.work[Work(kind, rows, flops, size, mark if kind == "linear" and mark else dtype)] += 1


def _places(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Masks as the places where they are true."""
    out: list[Tensor | None] = []
    for index in indices:
        mask = index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor)
        out += index.nonzero(as_tuple=True) if index is not None and mask else [index]
    return out


class _Int8Shape(nn.Module):
    """The operations of an `Int8Linear`, whose kernel takes no tensors without values."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.float()
        scale = torch.linalg.vector_norm(rows, torch.inf, -1, keepdim=True)
        out = nn.functional.linear(rows / scale, self.weight).mul_(scale)
        return (out if self.bias is None else out.add_(self.bias)).to(x.dtype)
