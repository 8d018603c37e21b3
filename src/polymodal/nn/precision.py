"""Weights in a lower precision for inference, with the islands that must stay fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import nn

from polymodal.core.errors import ConfigError

Precision = Literal["auto", "fp32", "bf16"]
M = TypeVar("M", bound=nn.Module)
_Conv = nn.Conv1d | nn.ConvTranspose1d | nn.Conv2d | nn.Conv3d


class FullPrecision(nn.Module):
    """A part that stays in fp32 whatever is around it."""


def fast_bf16(device: torch.device | None = None) -> bool:
    """Whether ``device``, by default the best of this machine, multiplies bf16 matrices faster than fp32 ones: a GPU
    does, and a CPU with AVX512-BF16 or AMX.
    """
    if torch.cuda.is_available() if device is None else device.type != "cpu":
        return True
    if not callable(getattr(torch.cpu, "get_capabilities", None)):  # torch before 2.13 cannot say
        cpu = Path("/proc/cpuinfo")
        return cpu.is_file() and any(flag in cpu.read_text() for flag in ("avx512_bf16", "amx_bf16"))
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


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
