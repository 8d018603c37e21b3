"""Which precision is fast where."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

Precision = Literal["auto", "fp32", "bf16"]


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
