"""Multi-head attention on PyTorch's fused kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn


class Attention(nn.Module):
    """Self- or cross-attention with separate projections, named as the Llama family names them.

    ``context_dim`` is the width of what is attended to, where that is not ``dim``.
    """

    def __init__(
        self, dim: int, num_heads: int, *, bias: bool = True, key_bias: bool = True, context_dim: int | None = None
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, dim, bias=bias)
        self.k_proj = nn.Linear(context_dim or dim, dim, bias=bias and key_bias)
        self.v_proj = nn.Linear(context_dim or dim, dim, bias=bias)
        self.o_proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Float[Tensor, "batch queries dim"],
        context: Float[Tensor, "batch keys context_dim"] | None = None,
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
    k: Float[Tensor, "batch kv_heads keys head_dim"],
    v: Float[Tensor, "batch kv_heads keys head_dim"],
    *,
    mask: Bool[Tensor, "batch #heads #queries keys"] | None = None,
    causal: bool = False,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> Float[Tensor, "batch heads queries head_dim"]:
    """Scaled dot-product attention, by the kernel that is fastest for the device and the direction.

    Args:
        q: queries; their heads are a multiple of those of ``k`` and ``v``, neighbours share one (grouped queries).
        k: keys.
        v: values.
        mask: True where a query may look.
        causal: each query sees the keys up to its own place; as many keys as queries.
        scale: of the scores; ``head_dim ** -0.5`` if not given.
        soft_cap: scores pass through ``cap * tanh(score / cap)`` (Gemma 2).
    """
    groups, queries = q.shape[1] // k.shape[1], q.shape[2]
    if groups > 1 and queries == 1 and (mask is None or mask.shape[1] == 1):
        # One query a row: the heads that share a key become its queries, and nothing is copied.
        folded = rearrange(q, "b (h g) 1 d -> b h g d", g=groups)
        out = attend(folded, k, v, mask=mask, scale=scale, soft_cap=soft_cap)
        return rearrange(out, "b h g d -> b (h g) 1 d")
    if groups > 1:
        k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    plain = q.device.type == "cpu" and torch.is_grad_enabled() and k.shape[2] <= _PLAIN_KEYS
    if not plain and soft_cap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-1, -2)
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if causal:
        mask = torch.ones(queries, k.shape[2], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).to(v.dtype) @ v
