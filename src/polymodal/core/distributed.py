"""Collectives that losses need. Without `torch.distributed` each is the identity of one process.

A loss sums over its own rows and the trainer adds the gradients of all ranks, so the backward of a collective hands
every rank the gradient of the *sum* of all ranks' totals. That makes two ranks equal to one, without a factor.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor


def is_distributed() -> bool:
    """Whether several processes work together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """How many processes work together."""
    return dist.get_world_size() if is_distributed() else 1


def gather_with_grad(x: Shaped[Tensor, "rows ..."]) -> Shaped[Tensor, "all_rows ..."]:
    """The rows of all ranks in rank order; every rank holds the same number.

    The backward returns, for this rank's rows, the gradients of all ranks added up (a reduce-scatter).
    """
    return _Gather.apply(x) if is_distributed() else x


def ring_shift(x: Shaped[Tensor, "rows ..."], shift: int = 1) -> Shaped[Tensor, "rows ..."]:
    """What the rank ``shift`` places before this one holds; its backward sends gradients the other way.

    ``ring_shift(x, 1)`` repeated ``world_size()`` times shows every rank's rows once and ends at one's own.
    """
    return _Ring.apply(x, shift) if is_distributed() else x


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # gloo has no reduce-scatter in every supported release; an all-reduce and a cut is equal in values.
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total[rank() * ctx.rows : (rank() + 1) * ctx.rows]


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: int) -> Tensor:
        ctx.shift = shift
        return _exchange(x, shift)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _exchange(grad, -ctx.shift), None


def _exchange(x: Tensor, shift: int) -> Tensor:
    here, count = rank(), world_size()
    if shift % count == 0:
        return x.clone()
    x = x.contiguous()
    received = torch.empty_like(x)
    transfers = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, x, (here + shift) % count),
            dist.P2POp(dist.irecv, received, (here - shift) % count),
        ]
    )
    for transfer in transfers:
        transfer.wait()
    return received
