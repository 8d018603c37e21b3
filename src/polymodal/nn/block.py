"""The pre-norm Transformer block that the towers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from polymodal.nn.attention import Attention
from polymodal.nn.mlp import MLP, ActivationName, GatedMLP


class DropPath(nn.Module):
    """Drops a residual branch for whole samples with probability ``rate`` while training (stochastic depth)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        if not self.training or self.rate == 0.0:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= self.rate
        return x * keep.to(x.dtype) / (1.0 - self.rate)


class LayerScale(nn.Module):
    """A learned scale for each channel of a residual branch."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.init = init
        self.weight = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        return x * self.weight.to(x.dtype)


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``; the branches may be scaled and dropped."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden_dim: int,
        *,
        activation: ActivationName | Literal["swiglu"] = "gelu",
        norm_eps: float = 1e-6,
        qkv_bias: bool = True,
        key_bias: bool = True,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.attn_norm = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, bias=qkv_bias, key_bias=key_bias)
        self.mlp_norm = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = GatedMLP(dim, hidden_dim, bias=True) if activation == "swiglu" else MLP(dim, hidden_dim, activation)
        self.attn_scale = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.mlp_scale = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        *,
        mask: Bool[Tensor, "batch #heads #tokens tokens"] | None = None,
        causal: bool = False,
    ) -> Float[Tensor, "batch tokens dim"]:
        x = x + self.drop_path(self.attn_scale(self.attn(self.attn_norm(x), mask=mask, causal=causal)))
        return x + self.drop_path(self.mlp_scale(self.mlp(self.mlp_norm(x))))

    def forward_between(
        self, x: Float[Tensor, "batch tokens dim"], change: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "batch tokens dim"]:
        """`forward`, with ``change`` made to what stands between attention and feed-forward (FiLM)."""
        x = change(x + self.drop_path(self.attn_scale(self.attn(self.attn_norm(x)))))
        return x + self.drop_path(self.mlp_scale(self.mlp(self.mlp_norm(x))))

    def forward_rows(
        self,
        x: Float[Tensor, "batch tokens dim"],
        rows: Float[Tensor, "batch rows dim"],
        *,
        mask: Bool[Tensor, "batch #heads #rows tokens"] | None = None,
    ) -> Float[Tensor, "batch rows dim"]:
        """The output for ``rows`` only, which attend to all of ``x``: all that a last block owes a pooled head."""
        rows = rows + self.drop_path(self.attn_scale(self.attn(self.attn_norm(rows), self.attn_norm(x), mask=mask)))
        return rows + self.drop_path(self.mlp_scale(self.mlp(self.mlp_norm(rows))))
