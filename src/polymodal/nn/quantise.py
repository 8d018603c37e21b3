"""Linear layers in int8 for inference on a CPU.

Weights have one scale for each output, inputs one for each token, found as they come: a token's result does not depend
on what else is in its batch, and sums of integers are exact. Layers lose about a hundredth of the norm of their output,
two on CPUs without VNNI.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polymodal.core.errors import ConfigError
from polymodal.nn.replace import replace_linear

_LEVELS = 127
# Without VNNI, kernels add two products of 8 bits in 16: inputs have to leave a bit free, or the sums are cut.
_INPUT_LEVELS = 127 if torch.cpu._is_vnni_supported() else 63


class Int8Linear(nn.Module):
    """A linear layer with packed int8 weights; it has no parameters and is neither trained nor saved."""

    def __init__(self, weight: Float[Tensor, "out dim"], bias: Float[Tensor, " out"] | None = None) -> None:
        super().__init__()
        weight = weight.detach().float().cpu()
        self.out_features, self.in_features = weight.shape
        self._bias = None if bias is None else bias.detach().float().cpu()
        scales = (weight.abs().amax(1) / _LEVELS).clamp_min(torch.finfo(torch.float32).tiny)
        with warnings.catch_warnings():  # packing takes a quantized tensor, which torch says it will rename
            warnings.simplefilter("ignore", UserWarning)
            zeros = torch.zeros_like(scales, dtype=torch.int64)
            quantized = torch.quantize_per_channel(weight, scales.double(), zeros, 0, torch.qint8)
            self._packed = torch.ops.quantized.linear_prepack(quantized, None)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch out"]:
        rows = x.float()
        scale = rows.abs().amax(-1, keepdim=True).add_(torch.finfo(torch.float32).tiny)
        # All tokens within [-1, 1], so that the kernel's one scale for its input is right for each.
        out = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            rows / scale, 1 / _INPUT_LEVELS, _INPUT_LEVELS + 1, self._packed
        ).mul_(scale)
        return (out if self._bias is None else out.add_(self._bias)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self._bias is not None}"


def quantise_int8(model: nn.Module, *, skip: Sequence[str] = ()) -> nn.Module:
    """Replaces, in place, every `nn.Linear` inside ``model`` by an `Int8Linear`, and gives the model back.

    An output layer that is tied to an embedding table is no `nn.Linear` and stays in fp32; where the model takes one,
    ``Int8Linear(table.weight)`` goes beside the table.

    Args:
        model: built and loaded, on a CPU.
        skip: names of modules that stay as they are with all that is in them, e.g. ``("vision", "decoder.lm_head")``.

    Raises:
        ConfigError: ``skip`` names no module, a layer is not on the CPU, or this machine has no int8 kernels.
    """
    if torch.backends.quantized.engine not in ("x86", "fbgemm", "onednn"):
        raise ConfigError(f"int8 needs torch's x86 kernels; this build has {torch.backends.quantized.engine}")
    return replace_linear(model, Int8Linear, "int8", skip=skip)
