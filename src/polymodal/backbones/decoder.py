"""One decoder for the language models of the Llama, Mistral, Qwen, Gemma, Phi-3, OPT and GPT-2 families.

What they differ in are configs that compose: the norm, the positions, the attention, the feed-forward layer, which
layers see a window only. `families` reads them from the Hub.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from polymodal.core.errors import ConfigError, MediaError, UnsupportedError
from polymodal.core.packing import Packing
from polymodal.core.tokens import Modality, Tokens
from polymodal.nn.attention import attend
from polymodal.nn.cache import Keeps, KVCache, Sight, sight
from polymodal.nn.mlp import MLP, ActivationName, GatedMLP
from polymodal.nn.norm import Heads, Norm
from polymodal.nn.rope import Rope, rotate


@dataclass(frozen=True, kw_only=True)
class Learned:
    """A learned table of positions; ``offset`` rows before the first are never read (OPT has two)."""

    count: int
    offset: int = 0


@dataclass(frozen=True, kw_only=True)
class Gated:
    """``down(activation(gate(x)) * up(x))``."""

    hidden_dim: int
    activation: ActivationName = "silu"

    def build(self, dim: int) -> nn.Module:
        return GatedMLP(dim, self.hidden_dim, self.activation)


@dataclass(frozen=True, kw_only=True)
class Plain:
    """``down(activation(up(x)))`` with biases."""

    hidden_dim: int
    activation: ActivationName = "gelu"

    def build(self, dim: int) -> nn.Module:
        return MLP(dim, self.hidden_dim, self.activation)


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Grouped-query attention.

    Attributes:
        qk_norm: of each head's queries and keys before they are rotated (Qwen 3, Gemma 3; Chameleon).
        soft_cap: of the scores (Gemma 2).
        scale: of the scores; ``head_dim ** -0.5`` if None.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Norm | Heads | None = None
    soft_cap: float | None = None
    scale: float | None = None

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"{self.num_heads} heads do not share {self.num_kv_heads} key-value heads evenly")


@dataclass(frozen=True, kw_only=True)
class Window:
    """Layers that see only the last ``size`` tokens, perhaps with rotary positions of their own (Gemma 3)."""

    size: int
    layers: tuple[int, ...]
    rope: Rope | None = None


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder-only language model.

    Attributes:
        pre_norms: norms before attention and feed-forward.
        post_norms: norms after them, before they are added (Gemma 2 and 3 have both; the large Chameleon these alone).
        embed_scale: of the token embeddings (Gemma: the root of ``dim``).
        tied: the output layer is the embedding table.
        soft_cap: of the logits (Gemma 2).
        std: of the normal distribution of fresh weights.
    """

    vocab_size: int
    context: int
    dim: int
    num_layers: int
    attention: AttentionConfig
    mlp: Gated | Plain
    norm: Norm
    position: Rope | Learned
    window: Window | None = None
    pre_norms: bool = True
    post_norms: bool = False
    embed_scale: float | None = None
    tied: bool = False
    soft_cap: float | None = None
    std: float = 0.02


Rotary: TypeAlias = tuple[Float[Tensor, "batch 1 tokens half"], Float[Tensor, "batch 1 tokens half"]]


@dataclass(frozen=True)
class View:
    """What one layer needs to know of the tokens: which keys each sees, and the angles of their positions."""

    sight: Sight
    rotary: Rotary | None


class SelfAttention(nn.Module):
    """Grouped-query self-attention with rotary positions and a cache."""

    def __init__(self, dim: int, config: AttentionConfig) -> None:
        super().__init__()
        c = self.config = config
        self.q_proj = nn.Linear(dim, c.num_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(dim, c.num_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(dim, c.num_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.num_heads * c.head_dim, dim, bias=c.out_bias)
        self.q_norm, self.k_norm = (self._norm(c, heads) for heads in (c.num_heads, c.num_kv_heads))

    @staticmethod
    def _norm(c: AttentionConfig, heads: int) -> nn.Module:
        if isinstance(c.qk_norm, Heads):
            return c.qk_norm.build_heads(heads, c.head_dim)
        return nn.Identity() if c.qk_norm is None else c.qk_norm.build(c.head_dim)

    def project(
        self, x: Float[Tensor, "batch tokens dim"], rotary: Rotary | None
    ) -> tuple[
        Float[Tensor, "batch heads tokens head_dim"],
        Float[Tensor, "batch kv_heads tokens head_dim"],
        Float[Tensor, "batch kv_heads tokens head_dim"],
    ]:
        """Queries, keys and values, normed and rotated: two experts can attend to each other's."""
        q, k, v = (
            rearrange(t, "b n (h d) -> b h n d", d=self.config.head_dim)
            for t in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        q, k = self.q_norm(q), self.k_norm(k)
        return (q, k, v) if rotary is None else (rotate(q, *rotary), rotate(k, *rotary), v)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], view: View, cache: Keeps | None, layer: int
    ) -> Float[Tensor, "batch tokens dim"]:
        q, k, v = self.project(x, view.rotary)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        out = attend(
            q, k.to(q.dtype), v.to(q.dtype), mask=view.sight.mask, causal=view.sight.causal, scale=self.config.scale,
            soft_cap=self.config.soft_cap,
        )  # fmt: skip
        return self.o_proj(rearrange(out, "b h n d -> b n (h d)"))


class DecoderBlock(nn.Module):
    """Attention and feed-forward, each after a norm, before one, or between two."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        c, self.layer = config, layer
        self.attn_norm = c.norm.build(c.dim) if c.pre_norms else nn.Identity()
        self.attn = SelfAttention(c.dim, c.attention)
        self.attn_post_norm = c.norm.build(c.dim) if c.post_norms else nn.Identity()
        self.mlp_norm = c.norm.build(c.dim) if c.pre_norms else nn.Identity()
        self.mlp = c.mlp.build(c.dim)
        self.mlp_post_norm = c.norm.build(c.dim) if c.post_norms else nn.Identity()

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], view: View, cache: Keeps | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        x = x + self.attn_post_norm(self.attn(self.attn_norm(x), view, cache, self.layer))
        return x + self.mlp_post_norm(self.mlp(self.mlp_norm(x)))

    def forward_keys(self, x: Float[Tensor, "batch tokens dim"], view: View, cache: Keeps) -> None:
        """Gives the cache this layer's keys and values, and computes nothing else."""
        cache.extend(self.layer, *self.attn.project(self.attn_norm(x), view.rotary)[1:])


class Decoder(nn.Module):
    """Embeddings, blocks, a last norm, and the output layer."""

    packed: bool = False  # see `pack_rows`

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        c = self.config = config
        self.embed_tokens = nn.Embedding(c.vocab_size, c.dim)
        self.position = (
            nn.Embedding(c.position.count + c.position.offset, c.dim) if isinstance(c.position, Learned) else None
        )
        self.blocks = nn.ModuleList(DecoderBlock(c, layer) for layer in range(c.num_layers))
        self.norm = c.norm.build(c.dim)
        self.lm_head = None if c.tied else nn.Linear(c.dim, c.vocab_size, bias=False)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normal weights and zero biases, as the families of the Hub are trained from; norms as they are built."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def embed(self, ids: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens dim"]:
        """Vectors of token ids, scaled as the family does."""
        x = self.embed_tokens(ids)
        scale = self.config.embed_scale
        return x if scale is None else x * torch.tensor(scale, dtype=x.dtype, device=x.device)

    def text(self, ids: Int[Tensor, "batch tokens"], valid: Bool[Tensor, "batch tokens"] | None = None) -> Tokens:
        """Plain causal text, ready for `forward`; padding (``valid`` False) comes last."""
        return Tokens.of(self.embed(ids), causal=True, modality=Modality.TEXT, valid=valid)

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        a, weight = self.config.attention, self.embed_tokens.weight
        return KVCache(
            num_layers=self.config.num_layers, rows=rows, capacity=min(capacity, self.config.context),
            num_kv_heads=a.num_kv_heads, head_dim=a.head_dim, dtype=weight.dtype, device=weight.device,
        )  # fmt: skip

    def views(self, tokens: Tokens, cache: KVCache | None = None) -> Iterator[View]:
        """For each layer, what its attention needs to know."""
        c, see = self.config, sight if cache is None else cache.sight
        rope = c.position if isinstance(c.position, Rope) else None
        reach = None if cache is None else cache.capacity
        rotary = None if rope is None else rope.angles(tokens.position, c.attention.head_dim, reach)
        far = near = View(see(tokens), rotary)
        if c.window is not None:
            turned = rotary if c.window.rope is None else c.window.rope.angles(tokens.position, c.attention.head_dim)
            near = View(see(tokens, c.window.size), turned)
        for layer in range(c.num_layers):
            yield near if c.window is not None and layer in c.window.layers else far

    def enter(self, tokens: Tokens) -> Float[Tensor, "batch tokens dim"]:
        """What the first block reads: learned positions are added here.

        Raises:
            MediaError: a position lies beyond the context of a learned table.
        """
        p = self.config.position
        if self.position is None or not isinstance(p, Learned):
            return tokens.x
        place = tokens.position[..., 0]
        if place.numel() and int(place.max()) >= p.count:
            raise MediaError(f"{int(place.max()) + 1} tokens; this backbone reads at most {p.count}")
        return tokens.x + self.position(place + p.offset)

    def forward(self, tokens: Tokens, cache: KVCache | None = None) -> Tokens:
        """Vectors after the last norm; with a cache, the new tokens are added to it and see what it holds."""
        if self.packed and cache is None:
            packing = Packing.of(tokens.valid)
            if len(packing.source) < tokens.shape[0]:
                return tokens.with_x(packing.unpack(self._run(packing.pack(tokens)).x))
        return self._run(tokens, cache)

    def _run(self, tokens: Tokens, cache: KVCache | None = None) -> Tokens:
        x = self.enter(tokens)
        for block, view in zip(self.blocks, self.views(tokens, cache), strict=True):
            x = block(x, view, cache)
        if cache is not None:
            cache.advance(tokens)
        return tokens.with_x(self.norm(x))

    def logits(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch vocab"]:
        """Scores of the next token from vectors after the last norm."""
        out = nn.functional.linear(x, self.embed_tokens.weight) if self.lm_head is None else self.lm_head(x)
        cap = self.config.soft_cap
        return out if cap is None else cap * torch.tanh(out / cap)


def pack_rows(model: nn.Module) -> None:
    """Lets the decoders of a model read several short rows of a batch as one, wherever no cache is filled.

    A transform of how a batch is computed: what goes in, what comes out and every gradient stay what they were.

    Raises:
        UnsupportedError: the model has no decoder.
    """
    decoders = [module for module in model.modules() if isinstance(module, Decoder)]
    if not decoders:
        raise UnsupportedError(f"{type(model).__name__} has no decoder whose rows could be packed")
    for decoder in decoders:
        decoder.packed = True
