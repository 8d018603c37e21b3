"""One process or many: where a process runs, how its gradients join, and sharded tensors from and to whole ones."""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from polymodal.core.batch import Batch, Loss
from polymodal.core.distributed import is_distributed, rank, world_size
from polymodal.core.errors import TrainError
from polymodal.core.verbs import Trains, verbs_of

Parallel: TypeAlias = Literal["ddp", "fsdp"]
VERB_METHODS = {"train": "loss", "embed": "encode", "classify": "logits"}  # what evaluation or training calls on a root


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which process this is, of how many, and its device."""

    device: torch.device
    rank: int = 0
    world: int = 1


def join(parallel: Parallel | None, device: str | None) -> Place:
    """Joins the process group that a launcher such as torchrun describes in the environment, if ``parallel`` says so.

    A group that exists already is used. Ours lives to the end of the process: a second one would read the addresses
    that the first has left at the launcher. gloo serves CPUs, NCCL serves GPUs.

    Raises:
        TrainError: several processes without ``parallel``, ``parallel`` without a launcher, or no such device.
    """
    if parallel not in (None, "ddp", "fsdp"):
        raise TrainError(f"parallel is {parallel!r}: it should be 'ddp', 'fsdp' or None")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.device(device)
        if where.type == "cuda" and where.index is None:
            where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:  # the latter of a build of torch without it
        raise TrainError(f"no device {device!r} to train on here: {str(error).partition(chr(10))[0]}") from None
    if where.type == "cuda":
        torch.cuda.set_device(where)
    if parallel is None:
        if is_distributed() or int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise TrainError("several processes would each train alone: pass parallel='ddp' or 'fsdp'")
    elif not dist.is_initialized():
        if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
            raise TrainError(
                f"parallel={parallel!r} needs a launcher: torchrun --nproc-per-node=2 and the script that calls fit"
            )
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    return Place(device=where, rank=rank(), world=world_size())


class Single:
    """One process: the model's own loss, nothing to join."""

    def __init__(self, model: nn.Module) -> None:
        assert isinstance(model, Trains)
        self.model = model

    def loss(self, batch: Batch) -> Loss:
        return self.model.loss(batch)

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Around forward and backward of a micro-batch; ranks join their gradients in the last one only."""
        yield

    def join(self, parameters: Iterable[nn.Parameter]) -> None:
        """Averages over the ranks what the backward has not averaged yet."""

    def settle(self) -> None:
        """Brings the parameters to rest after a forward without backward."""


class _LossAsForward(nn.Module):
    """DDP watches `forward` only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Loss:
        assert isinstance(self.model, Trains)
        return self.model.loss(batch)


class Replicated(Single):
    """DDP: every rank has the whole model, and gradients are averaged while the backward runs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.wrapped = DistributedDataParallel(_LossAsForward(model))

    def loss(self, batch: Batch) -> Loss:
        loss = self.wrapped(batch)
        assert isinstance(loss, Loss)
        return loss

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        with contextlib.nullcontext() if last else self.wrapped.no_sync():
            yield


class Sharded(Single):
    """FSDP2: every rank keeps a part of each parameter; a block is gathered when it runs and freed after.

    FSDP2 refuses parameters without an axis (CLIP's logit scale): they stay whole and are averaged in `join`.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__(model)
        assert isinstance(model, Trains)
        mesh = init_device_mesh(device.type, (world_size(),))
        whole = {p for p in model.parameters() if p.ndim == 0}
        for block in model.blocks():
            fully_shard(block, mesh=mesh, ignored_params=whole)
            for method in dir(type(block)):
                if method.startswith("forward_"):
                    register_fsdp_forward_method(block, method)
        self.root = fully_shard(model, mesh=mesh, ignored_params=whole)
        assert isinstance(self.root, FSDPModule)
        for verb in verbs_of(type(model)):
            if verb in VERB_METHODS:
                register_fsdp_forward_method(model, VERB_METHODS[verb])

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        self.root.set_requires_gradient_sync(last)
        yield

    def join(self, parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            if not isinstance(parameter, DTensor) and parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= world_size()

    def settle(self) -> None:
        self.root.reshard()


def parallelise(model: nn.Module, parallel: Parallel | None, place: Place) -> Single:
    """Wraps a model that lies on its device. A single process needs no wrapper, whatever was asked."""
    if place.world == 1 or parallel is None:
        return Single(model)
    return Replicated(model) if parallel == "ddp" else Sharded(model, place.device)


def local(tensor: Tensor) -> Tensor:
    """This rank's part, sharing memory with ``tensor``."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, gathered from all ranks if it is sharded (every rank must call)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_like(full: Tensor, like: Tensor) -> Tensor:
    """``full`` on the device and with the sharding of ``like``."""
    full = full.to(like.device)
    if isinstance(like, DTensor) and full.shape == like.shape:
        return distribute_tensor(full, like.device_mesh, like.placements)
    return full


@torch.no_grad()
def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The 2-norm over all gradients, equal on every rank."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    square = _square_sum([local(g) for g in gradients if isinstance(g, DTensor)])
    if square is not None:
        dist.all_reduce(square)
    own = _square_sum([g for g in gradients if not isinstance(g, DTensor)])
    parts = [part for part in (square, own) if part is not None]
    assert parts, "no parameter has a gradient"
    return torch.stack(parts).sum().sqrt()


def _square_sum(tensors: list[Tensor]) -> Tensor | None:
    if not tensors:
        return None
    norms: Any = torch._foreach_norm(tensors)
    return torch.stack([norm.float() for norm in norms]).square().sum()


def agree(values: Tensor) -> Tensor:
    """Adds up over the ranks, in place."""
    if is_distributed():
        dist.all_reduce(values)
    return values


def wait_for_all() -> None:
    """Returns when every rank has come here."""
    if is_distributed():
        dist.barrier()
