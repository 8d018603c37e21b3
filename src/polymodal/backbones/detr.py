"""DETR's Transformer: norms after each addition, and places that are added to queries and keys in every layer.

Source: Carion et al., "End-to-End Object Detection with Transformers", 2020, https://arxiv.org/abs/2005.12872; official
code: facebookresearch/detr, of which ACT's is a copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from polymodal.core.errors import ConfigError
from polymodal.nn.attention import Attention, attend
from polymodal.nn.mlp import ACTIVATIONS
from polymodal.weights.rules import Rule, Split, renames, rule

Places = Float[Tensor, "#batch tokens dim"]


@dataclass(frozen=True, kw_only=True)
class DetrConfig:
    """The shape of every layer; the stacks may differ in their number."""

    dim: int = 512
    num_heads: int = 8
    hidden_dim: int = 3200
    activation: Literal["relu", "gelu"] = "relu"
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or self.dim % 4:
            raise ConfigError(f"dim {self.dim} must be a multiple of num_heads {self.num_heads}, and of 4 for places")


class PlacedAttention(Attention):
    """Attention whose queries and keys know their places; its values do not."""

    def forward(  # type: ignore[override]
        self,
        x: Float[Tensor, "batch queries dim"],
        place: Float[Tensor, "#batch queries dim"],
        context: Float[Tensor, "batch keys dim"],
        context_place: Float[Tensor, "#batch keys dim"],
        *,
        valid: Bool[Tensor, "batch keys"] | None = None,
    ) -> Float[Tensor, "batch queries dim"]:
        q, k, v = (
            rearrange(t, "b n (h d) -> b h n d", h=self.num_heads)
            for t in (self.q_proj(x + place), self.k_proj(context + context_place), self.v_proj(context))
        )
        mask = None if valid is None else valid[:, None, None]
        return self.o_proj(rearrange(attend(q, k, v, mask=mask), "b h n d -> b n (h d)"))

    @torch.no_grad()
    def init_weights(self) -> None:
        """Torch's of its own attention: Xavier-uniform over the three matrices as one, zero biases."""
        bound = (6 / (4 * self.q_proj.in_features)) ** 0.5
        for proj in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.uniform_(proj.weight, -bound, bound)
            nn.init.zeros_(proj.bias)
        nn.init.zeros_(self.o_proj.bias)


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward layer."""

    def __init__(self, config: DetrConfig) -> None:
        super().__init__()
        c = config
        self.attn = PlacedAttention(c.dim, c.num_heads)
        self.attn_norm = nn.LayerNorm(c.dim)
        self.up_proj, self.down_proj = nn.Linear(c.dim, c.hidden_dim), nn.Linear(c.hidden_dim, c.dim)
        self.mlp_norm = nn.LayerNorm(c.dim)
        self.activation, self.dropout = ACTIVATIONS[c.activation], nn.Dropout(c.dropout)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], place: Places, valid: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        x = self.attn_norm(x + self.dropout(self.attn(x, place, x, place, valid=valid)))
        return self.feed_forward(x)

    def feed_forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        hidden = self.dropout(self.activation(self.up_proj(x)))
        return self.mlp_norm(x + self.dropout(self.down_proj(hidden)))


class DecoderLayer(EncoderLayer):
    """The same, with cross-attention to what an encoder gives between the two."""

    def __init__(self, config: DetrConfig) -> None:
        super().__init__(config)
        self.cross_attn = PlacedAttention(config.dim, config.num_heads)
        self.cross_norm = nn.LayerNorm(config.dim)

    def forward(  # type: ignore[override]
        self,
        x: Float[Tensor, "batch queries dim"],
        place: Float[Tensor, "#batch queries dim"],
        context: Float[Tensor, "batch keys dim"],
        context_place: Float[Tensor, "#batch keys dim"],
    ) -> Float[Tensor, "batch queries dim"]:
        x = self.attn_norm(x + self.dropout(self.attn(x, place, x, place)))
        x = self.cross_norm(x + self.dropout(self.cross_attn(x, place, context, context_place)))
        return self.feed_forward(x)


class DetrEncoder(nn.Module):
    """Layers one after the other."""

    def __init__(self, config: DetrConfig, num_layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(EncoderLayer(config) for _ in range(num_layers))

    @torch.no_grad()
    def init_weights(self, *, xavier: bool) -> None:
        """Torch's defaults; ``xavier`` makes every matrix Xavier-uniform, as DETR has it."""
        for module in self.modules():
            if isinstance(module, PlacedAttention):
                module.init_weights()
                if xavier:
                    nn.init.xavier_uniform_(module.o_proj.weight)
            elif isinstance(module, EncoderLayer) and xavier:
                nn.init.xavier_uniform_(module.up_proj.weight)
                nn.init.xavier_uniform_(module.down_proj.weight)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], place: Places, valid: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        for block in self.blocks:
            x = block(x, place, valid)
        return x


class DetrDecoder(DetrEncoder):
    """Learned queries, which begin as zeros and are told apart by their places, read what an encoder gives."""

    def __init__(self, config: DetrConfig, num_layers: int, num_queries: int) -> None:
        nn.Module.__init__(self)
        self.queries = nn.Embedding(num_queries, config.dim)
        self.blocks = nn.ModuleList(DecoderLayer(config) for _ in range(num_layers))
        self.norm = nn.LayerNorm(config.dim)
        # The first self-attention reads zeros: its values are one bias, whoever looks at whom. Kept for files' sake.
        first = self.blocks[0].attn
        assert isinstance(first, PlacedAttention)
        first.q_proj.requires_grad_(False)
        first.k_proj.requires_grad_(False)
        first.v_proj.weight.requires_grad_(False)

    def forward(  # type: ignore[override]
        self, context: Float[Tensor, "batch keys dim"], context_place: Float[Tensor, "#batch keys dim"]
    ) -> Float[Tensor, "batch queries dim"]:
        place = self.queries.weight[None]
        x = torch.zeros_like(place).expand(len(context), -1, -1)
        for block in self.blocks:
            x = block(x, place, context, context_place)
        return self.norm(x)


def sincos_grid(dim: int, rows: int, columns: int, device: torch.device) -> Float[Tensor, "1 places {dim}"]:
    """DETR's places of a feature map: y, then x, each from almost 0 to 2 pi, sines and cosines in turn."""
    period = 10_000 ** (2 * (torch.arange(dim // 2, device=device) // 2) / (dim // 2))

    def axis(length: int) -> Tensor:
        at = torch.arange(1, length + 1, device=device) / (length + 1e-6) * 2 * torch.pi
        angle = at[:, None] / period
        return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], -1).flatten(1)

    y, x = axis(rows)[:, None].expand(-1, columns, -1), axis(columns)[None].expand(rows, -1, -1)
    return torch.cat([y, x], -1).flatten(0, 1)[None]


def sincos_line(dim: int, length: int) -> Float[Tensor, "{length} {dim}"]:
    """Places of "Attention is all you need": sines and cosines in turn."""
    angle = torch.arange(length)[:, None] / 10_000 ** (2 * (torch.arange(dim) // 2) / dim)
    return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], -1).flatten(1)


def detr_rules(theirs: str, ours: str, *, decoder: bool = False) -> list[Rule]:
    """The layers as DETR's code, ACT's and LeRobot's name them: ``{theirs}.layers.{i}`` to ``{ours}.blocks.{i}``."""
    t, o = f"{theirs}.layers.{{i}}", f"{ours}.blocks.{{i}}"
    attentions = {"self_attn": "attn"} | ({"multihead_attn": "cross_attn"} if decoder else {})
    norms = ("attn_norm", "cross_norm", "mlp_norm") if decoder else ("attn_norm", "mlp_norm")
    rules = []
    for name, attention in attentions.items():
        qkv = [f"{o}.{attention}.{letter}_proj" for letter in "qkv"]
        rules += [
            rule(f"{t}.{name}.in_proj_{p}", [f"{proj}.{p}" for proj in qkv], Split(3)) for p in ("weight", "bias")
        ]
        rules += renames(t, o, {f"{name}.out_proj": f"{attention}.o_proj"})
    names = {"linear1": "up_proj", "linear2": "down_proj"} | {f"norm{n}": norm for n, norm in enumerate(norms, 1)}
    return rules + renames(t, o, names)
