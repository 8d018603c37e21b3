"""Pooling tokens into one vector."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polymodal.core.tokens import Tokens
from polymodal.nn.attention import Attention
from polymodal.nn.init import siglip_mlp_
from polymodal.nn.mlp import MLP, ActivationName


class AttentionPool(nn.Module):
    """A learned probe attends to all tokens, then a residual MLP: SigLIP's MAP head.

    Source: Zhai et al. 2022, "Scaling Vision Transformers", https://arxiv.org/abs/2106.04560.
    """

    def __init__(
        self, dim: int, num_heads: int, hidden_dim: int, *, activation: ActivationName, norm_eps: float
    ) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.empty(dim))
        self.attn = Attention(dim, num_heads)
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = MLP(dim, hidden_dim, activation)

    @torch.no_grad()
    def init_weights(self) -> None:
        nn.init.xavier_uniform_(self.probe.view(1, 1, -1))
        for proj in (self.attn.q_proj, self.attn.k_proj, self.attn.v_proj, self.attn.o_proj):
            nn.init.xavier_uniform_(proj.weight)
            nn.init.zeros_(proj.bias)
        siglip_mlp_(self.mlp)

    def forward(self, tokens: Tokens) -> Float[Tensor, "batch dim"]:
        batch = tokens.shape[0]
        probe = self.probe.to(tokens.x.dtype).expand(batch, 1, -1)
        # An expanded mask is all true: attention without one takes the fast kernel.
        mask = None if tokens.valid.stride() == (0, 0) else tokens.valid[:, None, None, :]
        x = self.attn(probe, tokens.x, mask=mask)
        return (x + self.mlp(self.norm(x)))[:, 0]
