"""Gated cross-attention: layers between those of a frozen language model through which text sees pictures.

Source: Alayrac et al., "Flamingo", 2022, https://arxiv.org/abs/2204.14198, sections 3.2 and 3.3. Gates start at zero,
so that a fresh model is its language model, exactly. A text token sees the picture that came last before it, and one
before all pictures sees nothing: what it gets is zero, not the mean that a softmax over nothing gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from polymodal.core.errors import ConfigError
from polymodal.nn.attention import attend
from polymodal.nn.cache import KVCache
from polymodal.nn.mlp import MLP, GatedMLP
from polymodal.nn.norm import Layer, Norm

KeysValues: TypeAlias = tuple[Float[Tensor, "batch heads keys head_dim"], Float[Tensor, "batch heads keys head_dim"]]


@dataclass(frozen=True, kw_only=True)
class GatedConfig:
    """One gated block.

    Attributes:
        mlp: its feed-forward layer, without biases.
        norm: of the text before attention and before the feed-forward layer.
        qk_norm: of each head's queries and keys (Idefics).
        vector_gate: a gate for each channel rather than one for all.
    """

    num_heads: int
    head_dim: int
    hidden_dim: int
    mlp: Literal["gelu", "swiglu"] = "gelu"
    norm: Norm = Layer()  # noqa: RUF009  # frozen
    qk_norm: Norm | None = None
    vector_gate: bool = False

    def __post_init__(self) -> None:
        if min(self.num_heads, self.head_dim) < 1:
            raise ConfigError("gated attention needs at least one head and one dimension a head")


@dataclass(frozen=True, eq=False, kw_only=True)
class MediaSight:
    """Which of the media's keys each text token sees.

    A token that sees none has every key in ``mask``, so that its softmax is not empty, and False in ``sees``.
    """

    mask: Bool[Tensor, "batch 1 queries keys"]
    sees: Bool[Tensor, "batch queries 1"]

    @classmethod
    def of_last(cls, order: Int[Tensor, "batch queries"], pictures: int, size: int) -> MediaSight:
        """Each token sees one picture.

        Args:
            order: the number of the picture that a token sees, counted from one in its row; 0 for none.
            pictures: how many a row has room for.
            size: vectors that a picture has.
        """
        number = torch.arange(1, pictures + 1, device=order.device).repeat_interleave(size)
        none = (order == 0).unsqueeze(-1)
        return cls(mask=((order.unsqueeze(-1) == number) | none).unsqueeze(1), sees=~none)


class CrossAttention(nn.Module):
    """Text attends to media; no biases."""

    def __init__(self, config: GatedConfig, dim: int, source: int) -> None:
        super().__init__()
        c = self.config = config
        inner = c.num_heads * c.head_dim
        self.q_proj = nn.Linear(dim, inner, bias=False)
        self.k_proj = nn.Linear(source, inner, bias=False)
        self.v_proj = nn.Linear(source, inner, bias=False)
        self.o_proj = nn.Linear(inner, dim, bias=False)
        self.q_norm = nn.Identity() if c.qk_norm is None else c.qk_norm.build(c.head_dim)
        self.k_norm = nn.Identity() if c.qk_norm is None else c.qk_norm.build(c.head_dim)

    def keys_values(self, media: Float[Tensor, "batch keys source"]) -> KeysValues:
        return self.k_norm(self._heads(self.k_proj(media))), self._heads(self.v_proj(media))

    def forward(
        self,
        x: Float[Tensor, "batch queries dim"],
        k: Float[Tensor, "batch heads keys head_dim"],
        v: Float[Tensor, "batch heads keys head_dim"],
        sight: MediaSight,
    ) -> Float[Tensor, "batch queries dim"]:
        q = self.q_norm(self._heads(self.q_proj(x)))
        out = attend(q, k.to(q.dtype), v.to(q.dtype), mask=sight.mask)
        return self.o_proj(rearrange(out, "b h n d -> b n (h d)").masked_fill(~sight.sees, 0.0))

    def _heads(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch heads tokens head_dim"]:
        return rearrange(x, "b n (h d) -> b h n d", h=self.config.num_heads)


class GatedBlock(nn.Module):
    """``x + tanh(gate) attention(norm(x), media)``, then ``x + tanh(gate) mlp(norm(x))``, each with a gate of its own.

    Args:
        config: its shape.
        dim: width of the text.
        source: width of the media.
    """

    def __init__(self, config: GatedConfig, dim: int, source: int) -> None:
        super().__init__()
        c, swiglu = config, config.mlp == "swiglu"
        self.attn_norm = c.norm.build(dim)
        self.attn = CrossAttention(c, dim, source)
        self.attn_gate = nn.Parameter(torch.empty(dim if c.vector_gate else 1))
        self.mlp_norm = c.norm.build(dim)
        self.mlp = GatedMLP(dim, c.hidden_dim) if swiglu else MLP(dim, c.hidden_dim, bias=False)
        self.mlp_gate = nn.Parameter(torch.empty(dim if c.vector_gate else 1))

    @torch.no_grad()
    def init_weights(self, std: float | None = None) -> None:
        """Closed gates; linear layers normal with ``std``, or as torch has them (OpenFlamingo's)."""
        nn.init.zeros_(self.attn_gate)
        nn.init.zeros_(self.mlp_gate)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters() if std is None else nn.init.normal_(module.weight, std=std)

    def forward_media(self, media: Float[Tensor, "batch keys source"]) -> KeysValues:
        """Keys and values of the media, for `forward`: copies, since FSDP2 watches what comes out, and not views."""
        k, v = self.attn.keys_values(media)
        return k.contiguous(), v.contiguous()

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], media: KeysValues | None, sight: MediaSight | None
    ) -> Float[Tensor, "batch tokens dim"]:
        """The text after it has seen the media; without any, the feed-forward layer alone works."""
        if media is not None and sight is not None:
            x = x + self.attn_gate.to(x.dtype).tanh() * self.attn(self.attn_norm(x), *media, sight)
        return x + self.mlp_gate.to(x.dtype).tanh() * self.mlp(self.mlp_norm(x))


class MediaCache(KVCache):
    """A `KVCache` that also holds, for every gated block, the keys and values of the picture that each row saw last.

    New text sees no other; a row without a picture sees nothing. What is forgotten by `cut` is text behind it.

    Args:
        media_shape: gated blocks, their heads, vectors of a picture, and the dimensions of a head.
    """

    def __init__(
        self,
        *,
        media_shape: tuple[int, int, int, int],
        num_layers: int,
        rows: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(
            num_layers=num_layers, rows=rows, capacity=capacity, num_kv_heads=num_kv_heads, head_dim=head_dim,
            dtype=dtype, device=device,
        )  # fmt: skip
        layers, heads, size, media_dim = media_shape
        self.media = torch.zeros(2, layers, rows, heads, size, media_dim, dtype=dtype, device=device)
        self.sees = [False] * rows

    @property
    def nbytes(self) -> int:
        return super().nbytes + self.media.nbytes

    def keep(
        self,
        layer: int,
        k: Float[Tensor, "rows heads keys head_dim"],
        v: Float[Tensor, "rows heads keys head_dim"],
        order: Int[Tensor, " rows"],
    ) -> None:
        """Stores what one gated block makes of the picture that each row sees from now on.

        Args:
            layer: which of the gated blocks.
            k: keys of all pictures of the rows.
            v: their values.
            order: the number of that picture, as `MediaSight.of_last` counts.
        """
        self.sees = (order > 0).tolist()
        rows, picture = torch.arange(self.rows, device=k.device), (order - 1).clamp(min=0)
        for kept, new in zip(self.media[:, layer], (k, v), strict=True):
            kept.copy_(rearrange(new, "b h (p n) d -> b p h n d", n=kept.shape[2])[rows, picture])

    def recall(self, layer: int) -> KeysValues:
        """What `keep` stored for one gated block."""
        return self.media[0, layer], self.media[1, layer]

    def sight_of(self, tokens: int) -> MediaSight | None:
        """What so many new tokens a row see of it; None if no row sees anything."""
        if not any(self.sees):
            return None
        order = torch.tensor(self.sees, device=self.media.device).long()[:, None]
        return MediaSight.of_last(order.expand(-1, tokens), 1, self.media.shape[4])

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        order = rows.tolist()
        if order != list(range(self.rows)):
            self.media = self.media[:, :, rows]
            self.sees = [self.sees[i] for i in order]
        super().select(rows)

    def put(self, row: int, other: KVCache, source: int = 0) -> None:
        assert isinstance(other, MediaCache), "a row of a model that sees, and one of a model that does not"
        super().put(row, other, source)
        self.media[:, :, row] = other.media[:, :, source]
        self.sees[row] = other.sees[source]
