"""Weights in a lower precision for inference, with the islands that must stay fp32."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from polymodal.core.errors import ConfigError
from polymodal.core.precision import Precision, fast_bf16

M = TypeVar("M", bound=nn.Module)
_Conv = nn.Conv1d | nn.ConvTranspose1d | nn.Conv2d | nn.Conv3d


class FullPrecision(nn.Module):
    """A part that stays in fp32 whatever is around it."""


def cast(model: M, precision: Precision) -> M:
    """Casts, in place, the matrices of ``model``; scalars, tables of fewer than two axes outside layers and parts that
    are `FullPrecision` stay fp32.

    ``auto`` is bf16 where the machine is faster in it and fp32 elsewhere.
    """
    if precision not in ("auto", "fp32", "bf16"):
        raise ConfigError(f"precision is 'auto', 'fp32' or 'bf16', not {precision!r}")
    if precision == "fp32" or (precision == "auto" and not fast_bf16()):
        return model
    islands = {part for island in model.modules() if isinstance(island, FullPrecision) for part in island.modules()}
    for module in model.modules():
        if module in islands:
            continue
        if isinstance(module, nn.Linear | _Conv | nn.LayerNorm | nn.Embedding):
            module.to(torch.bfloat16)
        else:
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim > 1:
                    setattr(module, name, nn.Parameter(parameter.to(torch.bfloat16), parameter.requires_grad))
    return model
