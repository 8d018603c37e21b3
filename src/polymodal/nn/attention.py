"""Multi-head attention on PyTorch's fused kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn


class Attention(nn.Module):
    """Self- or cross-attention with separate projections, named as the Llama family names them."""

    def __init__(self, dim: int, num_heads: int, *, bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, dim, bias=bias)
        self.k_proj = nn.Linear(dim, dim, bias=bias)
        self.v_proj = nn.Linear(dim, dim, bias=bias)
        self.o_proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Float[Tensor, "batch queries dim"],
        context: Float[Tensor, "batch keys dim"] | None = None,
        *,
        mask: Bool[Tensor, "batch #heads #queries keys"] | None = None,
        causal: bool = False,
    ) -> Float[Tensor, "batch queries dim"]:
        """Attends from ``x`` to ``context`` (to itself when None); ``mask`` is True where a query may look."""
        context = x if context is None else context
        q, k, v = (
            rearrange(t, "b n (h d) -> b h n d", h=self.num_heads)
            for t in (self.q_proj(x), self.k_proj(context), self.v_proj(context))
        )
        return self.o_proj(rearrange(attend(q, k, v, mask=mask, causal=causal), "b h n d -> b n (h d)"))


# Up to this many keys, the backward of the fused CPU kernel is slower than the plain product (bf16, 65 keys: 2.6 s
# against 1.7 s of CPU time for a whole training step), and the score matrix is small.
_PLAIN_KEYS = 256


def attend(
    q: Float[Tensor, "batch heads queries head_dim"],
    k: Float[Tensor, "batch heads keys head_dim"],
    v: Float[Tensor, "batch heads keys head_dim"],
    *,
    mask: Bool[Tensor, "batch #heads #queries keys"] | None = None,
    causal: bool = False,
) -> Float[Tensor, "batch heads queries head_dim"]:
    """Scaled dot-product attention, by the kernel that is fastest for the device and the direction."""
    if not (q.device.type == "cpu" and torch.is_grad_enabled() and k.shape[2] <= _PLAIN_KEYS):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).to(v.dtype) @ v
