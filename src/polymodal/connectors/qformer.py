"""The Q-Former: a fixed number of learned queries that read a picture, and text that shares their self-attention.

Source: Li et al., "BLIP-2", 2023, https://arxiv.org/abs/2301.12597, section 3.1; official code: salesforce/LAVIS. It is
a BERT in which the queries have feed-forward layers of their own and, in every other layer, attend to the picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from polymodal.core.errors import ConfigError, MediaError
from polymodal.nn.attention import attend
from polymodal.nn.mlp import MLP, ActivationName


@dataclass(frozen=True, kw_only=True)
class TextTables:
    """The embeddings of a Q-Former that reads text, too; ``context`` is the longest text in tokens."""

    vocab_size: int = 30523  # BERT's and [DEC]
    context: int = 512


@dataclass(frozen=True, kw_only=True)
class QFormerConfig:
    """A Q-Former of BERT-base's shape.

    Attributes:
        cross_every: layers 0, ``cross_every``, 2 ``cross_every`` ... attend to the picture.
        text: None where only the queries are run, as in front of a language model.
    """

    num_queries: int = 32
    dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    hidden_dim: int = 3072
    cross_every: int = 2
    activation: ActivationName = "gelu"
    norm_eps: float = 1e-12
    text: TextTables | None = None

    def __post_init__(self) -> None:
        if self.num_heads < 1 or self.dim % self.num_heads:
            raise ConfigError(f"dim {self.dim} is not a multiple of num_heads {self.num_heads}")
        if self.cross_every < 1 or self.num_queries < 1:
            raise ConfigError("a Q-Former needs at least one query, and a first layer that reads the picture")

    def build(self, source: int, target: int) -> QueryConnector:
        return QueryConnector(self, source, target)

    def count(self, tokens: int) -> int:
        """Tokens that so many features become: always as many as there are queries."""
        return self.num_queries


KeysValues: TypeAlias = tuple[Float[Tensor, "batch heads keys head_dim"], Float[Tensor, "batch heads keys head_dim"]]


class QFormerAttention(nn.Module):
    """Attention whose keys and values are computed apart from it: those of the queries serve the text again."""

    def __init__(self, dim: int, num_heads: int, source: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(source, dim)
        self.v_proj = nn.Linear(source, dim)
        self.o_proj = nn.Linear(dim, dim)

    def keys_values(self, context: Float[Tensor, "batch keys source"]) -> KeysValues:
        # Copies, since blocks return them: FSDP2 watches what a block returns, and a view may lose its watch.
        return self._heads(self.k_proj(context)).contiguous(), self._heads(self.v_proj(context)).contiguous()

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        k: Float[Tensor, "batch heads keys head_dim"],
        v: Float[Tensor, "batch heads keys head_dim"],
        mask: Bool[Tensor, "batch 1 #tokens keys"] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        out = attend(self._heads(self.q_proj(x)), k, v, mask=mask)
        return self.o_proj(rearrange(out, "b h n d -> b n (h d)"))

    def _heads(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch heads tokens head_dim"]:
        return rearrange(x, "b n (h d) -> b h n d", h=self.num_heads)


class QFormerBlock(nn.Module):
    """Self-attention of queries and text, cross-attention of the queries, and a feed-forward layer for each kind.

    Norms stand after each addition, as in BERT.
    """

    def __init__(self, config: QFormerConfig, layer: int, source: int) -> None:
        super().__init__()
        c, crosses = config, layer % config.cross_every == 0

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(c.dim, eps=c.norm_eps)

        self.attn = QFormerAttention(c.dim, c.num_heads, c.dim)
        self.attn_norm = norm()
        self.cross_attn = QFormerAttention(c.dim, c.num_heads, source) if crosses else None
        self.cross_norm = norm() if crosses else None
        self.mlp = MLP(c.dim, c.hidden_dim, c.activation)
        self.mlp_norm = norm()
        self.text_mlp = None if c.text is None else MLP(c.dim, c.hidden_dim, c.activation)
        self.text_norm = None if c.text is None else norm()

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        image: Float[Tensor, "batch patches source"] | None,
        *,
        mask: Bool[Tensor, "batch 1 #tokens known"] | None = None,
        before: KeysValues | None = None,
        queries: int = 0,
    ) -> tuple[Float[Tensor, "batch tokens dim"], tuple[Tensor, Tensor]]:
        """The tokens after this layer, and their keys and values in it.

        Args:
            x: queries, if any, and text.
            image: what the queries read.
            mask: True where a token may look; everywhere if None.
            before: keys and values that come before those of ``x``.
            queries: how many of ``x`` are queries.
        """
        k, v = own = self.attn.keys_values(x)
        if before is not None:
            k, v = torch.cat([before[0], k], 2), torch.cat([before[1], v], 2)
        x = self.attn_norm(x + self.attn(x, k, v, mask))
        parts = []
        if queries:
            q = x[:, :queries]
            if self.cross_attn is not None and self.cross_norm is not None:
                assert image is not None, "queries read a picture"
                q = self.cross_norm(q + self.cross_attn(q, *self.cross_attn.keys_values(image)))
            parts.append(self.mlp_norm(q + self.mlp(q)))
        if x.shape[1] > queries:
            assert self.text_mlp is not None
            assert self.text_norm is not None
            text = x[:, queries:]
            parts.append(self.text_norm(text + self.text_mlp(text)))
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0], own


@dataclass(frozen=True, eq=False, kw_only=True)
class Seen:
    """The queries after they have read a picture, and their keys and values in each layer."""

    x: Float[Tensor, "batch queries dim"]
    layers: tuple[KeysValues, ...]


class QFormer(nn.Module):
    """Queries and text under three masks: each kind alone, both together, or text after the queries.

    Args:
        config: its shape.
        source: the width of the picture's features.
    """

    def __init__(self, config: QFormerConfig, source: int) -> None:
        super().__init__()
        c = self.config = config
        self.queries = nn.Parameter(torch.empty(c.num_queries, c.dim))
        self.embed_tokens = None if c.text is None else nn.Embedding(c.text.vocab_size, c.dim)
        self.position = None if c.text is None else nn.Embedding(c.text.context, c.dim)
        self.norm = nn.LayerNorm(c.dim, eps=c.norm_eps)
        self.blocks = nn.ModuleList(QFormerBlock(c, layer, source) for layer in range(c.num_layers))

    @torch.no_grad()
    def init_weights(self, std: float = 0.02) -> None:
        """BERT's normals; the queries are not zero, and their feed-forward layers start as copies of the text's.

        At zero the norm behind the embeddings would multiply the queries' gradient by the root of its epsilon's
        inverse: a million.
        """
        nn.init.normal_(self.queries, std=std)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            assert isinstance(block, QFormerBlock)
            if block.text_mlp is not None:
                block.mlp.load_state_dict(block.text_mlp.state_dict())

    def forward(self, image: Float[Tensor, "batch patches source"]) -> Seen:
        """The queries alone read the picture (the uni-modal mask)."""
        x = self.norm(self.queries.expand(image.shape[0], -1, -1))
        image = image.to(x.dtype)
        layers = []
        for block in self.blocks:
            x, own = block(x, image, queries=x.shape[1])
            layers.append(own)
        return Seen(x=x, layers=tuple(layers))

    def read(
        self, ids: Int[Tensor, "batch tokens"], valid: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        """Text alone, which sees all of itself (the uni-modal mask)."""
        x = self._embed(ids)
        mask = None if valid is None else valid[:, None, None]
        for block in self.blocks:
            x, _ = block(x, None, mask=mask)
        return x

    def read_both(
        self,
        image: Float[Tensor, "batch patches source"],
        ids: Int[Tensor, "batch tokens"],
        valid: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch queries dim"]:
        """The queries of pairs in which queries and text see each other (the bi-directional mask)."""
        n = len(self.queries)
        x = torch.cat([self.norm(self.queries.expand(image.shape[0], -1, -1)), self._embed(ids)], 1)
        image = image.to(x.dtype)
        mask = None if valid is None else nn.functional.pad(valid, (n, 0), value=True)[:, None, None]
        for block in self.blocks:
            x, _ = block(x, image, mask=mask, queries=n)
        return x[:, :n]

    def tell(
        self, ids: Int[Tensor, "batch tokens"], seen: Seen, valid: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        """Text that sees the queries and its own beginning (the causal mask); the queries see no text.

        Their keys and values come from `forward`, so that they are run once for this and for the uni-modal mask.
        """
        x, length = self._embed(ids), ids.shape[1]
        see = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()[None, None]
        see = see.expand(len(ids), -1, -1, -1) if valid is None else see & valid[:, None, None]
        mask = nn.functional.pad(see, (seen.x.shape[1], 0), value=True)
        for block, before in zip(self.blocks, seen.layers, strict=True):
            x, _ = block(x, None, mask=mask, before=before)
        return x

    def _embed(self, ids: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens dim"]:
        assert self.embed_tokens is not None, "this Q-Former reads no text"
        assert self.position is not None
        length, most = ids.shape[1], self.position.num_embeddings
        if length > most:
            raise MediaError(f"a text of {length} tokens; this Q-Former reads at most {most}")
        return self.norm(self.embed_tokens(ids) + self.position.weight[:length])


class QueryConnector(nn.Module):
    """A Q-Former and a linear layer: what it read, as tokens of a backbone."""

    def __init__(self, config: QFormerConfig, source: int, target: int) -> None:
        super().__init__()
        self.qformer = QFormer(config, source)
        self.proj = nn.Linear(config.dim, target)

    @torch.no_grad()
    def init_weights(self) -> None:
        self.qformer.init_weights()
        nn.init.normal_(self.proj.weight, std=0.02)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Float[Tensor, "batch tokens source"]) -> Float[Tensor, "batch queries target"]:
        return self.proj(self.qformer(x).x)
