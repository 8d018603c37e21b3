"""Linear layers whose weights lie as oneDNN reads them, for inference on a CPU.

A plain layer is laid out anew in each product of more than one row. Without that 8 answers are written in little more
time than one (`python -m benchmarks.bench_decode`).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polymodal.core.errors import ConfigError
from polymodal.nn.replace import replace_linear

_ROWS = 8  # of the products that the layout is chosen for; it serves others nearly as well


class PackedLinear(nn.Module):
    """A linear layer with a packed weight of the same precision. It is not trained; its state is that of the layer."""

    def __init__(self, weight: Float[Tensor, "out dim"], bias: Float[Tensor, " out"] | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)
        self.bias: Tensor | None
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch out"]:
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """What the layer had, bit for bit: a packed model has the fingerprint of the plain one, and can be saved."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self._packed.to_dense()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def can_pack(dtype: torch.dtype = torch.float32) -> bool:
    """Whether this build of torch has oneDNN's products, and this CPU those of ``dtype``."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def pack(model: nn.Module) -> nn.Module:
    """Replaces, in place, every `nn.Linear` inside ``model`` by a `PackedLinear`, and gives the model back.

    Args:
        model: built, loaded and cast, on a CPU. No second copy of a weight is kept.

    Raises:
        ConfigError: a layer is not on the CPU, this build of torch has no oneDNN, or this CPU no products of bf16.
    """
    if not can_pack():
        raise ConfigError("packing needs oneDNN, which this build of torch does not have")
    for module in model.modules():
        if type(module) is nn.Linear and not can_pack(module.weight.dtype):
            raise ConfigError(f"this CPU cannot pack layers in {module.weight.dtype}: load the model in fp32")
    return replace_linear(model, PackedLinear, "packed")
