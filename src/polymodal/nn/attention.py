"""Multi-head attention on PyTorch's fused kernel."""

from __future__ import annotations

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
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.o_proj(rearrange(out, "b h n d -> b n (h d)"))
