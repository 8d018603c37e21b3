"""A decoder over steps: what a robot saw at each, then empty places for the numbers of its action (RT-1).

Source: Brohan et al. 2022, https://arxiv.org/abs/2212.06817; google-research/robotics_transformer,
``transformer.py`` and ``transformer_network.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from polymodal.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class StepDecoderConfig:
    """Pre-norm layers of which the second half is one linear layer; heads may be wider than tokens together.

    Attributes:
        dropout: of attention and of what the linear layers add.
    """

    dim: int = 512
    num_layers: int = 8
    num_heads: int = 8
    head_dim: int = 128
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if min(self.num_heads, self.head_dim) < 1 or not 0 <= self.dropout < 1:
            raise ConfigError("a decoder needs at least one head of one dimension, and keeps some of its values")


class StepBlock(nn.Module):
    """``x + attention(norm(x))``, then ``x + linear(norm(x))``."""

    def __init__(self, c: StepDecoderConfig) -> None:
        super().__init__()
        self.num_heads, self.dropout = c.num_heads, c.dropout
        inner = c.num_heads * c.head_dim
        self.attn_norm = nn.LayerNorm(c.dim, eps=1e-6)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(c.dim, inner) for _ in range(3))
        self.o_proj = nn.Linear(inner, c.dim)
        self.mlp_norm = nn.LayerNorm(c.dim, eps=1e-6)
        self.mlp = nn.Linear(c.dim, c.dim)

    def init_weights(self) -> None:
        """Glorot as Keras computes it: to it (dim, heads, head_dim) are ``dim`` places of ``heads`` inputs each."""
        inner, dim = self.q_proj.weight.shape
        head_dim = inner // self.num_heads
        for layer in (self.q_proj, self.k_proj, self.v_proj):
            glorot_(layer, dim * (self.num_heads + head_dim))
        glorot_(self.o_proj, self.num_heads * (head_dim + dim))
        glorot_(self.mlp, 2 * dim)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "tokens tokens"]
    ) -> Float[Tensor, "batch tokens dim"]:
        y, dropout = self.attn_norm(x), self.dropout if self.training else 0.0
        q, k, v = (
            rearrange(proj(y), "b n (h d) -> b h n d", h=self.num_heads)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        x = x + self.o_proj(rearrange(y, "b h n d -> b n (h d)"))
        return x + F.dropout(self.mlp(self.mlp_norm(x)), dropout)


@torch.no_grad()
def glorot_(layer: nn.Linear, fans: int) -> None:
    """Uniform weights for this sum of fan-in and fan-out, zero biases."""
    bound = (6 / fans) ** 0.5
    nn.init.uniform_(layer.weight, -bound, bound)
    nn.init.zeros_(layer.bias)


class StepDecoder(nn.Module):
    """Of steps of ``seen`` tokens and ``places`` empty ones, at most ``history``.

    A place sees the tokens of its step and of those before it, and no place; what is read for a place stands one token
    before it, so that the first is read at the last token seen.
    """

    def __init__(self, config: StepDecoderConfig, *, history: int, seen: int, places: int) -> None:
        super().__init__()
        c = config
        self.seen, self.places = seen, places
        self.embed = nn.Linear(c.dim, c.dim)
        self.position = nn.Parameter(torch.empty(history * (seen + places), c.dim))
        self.blocks = nn.ModuleList(StepBlock(c) for _ in range(c.num_layers))

    @torch.no_grad()
    def init_weights(self) -> None:
        glorot_(self.embed, 2 * self.embed.in_features)
        nn.init.xavier_uniform_(self.position)
        for block in self.blocks:
            assert isinstance(block, StepBlock)
            block.init_weights()

    def mask(self, steps: int) -> Bool[Tensor, "tokens tokens"]:
        """True where a token may look: at itself and what stands before it, but never from a place to a place."""
        place = (torch.arange(self.seen + self.places, device=self.position.device) >= self.seen).repeat(steps)
        before = torch.ones(len(place), len(place), dtype=torch.bool, device=place.device).tril()
        return before & ~(place[:, None] & place)

    def forward(self, x: Float[Tensor, "batch steps seen dim"]) -> Float[Tensor, "batch steps places dim"]:
        steps = x.shape[1]
        x = F.pad(x, (0, 0, 0, self.places)).flatten(1, 2)
        x, mask = self.embed(x) + self.position[: x.shape[1]], self.mask(steps)
        for block in self.blocks:
            x = block(x, mask)
        return x.unflatten(1, (steps, -1))[:, :, self.seen - 1 : -1]
