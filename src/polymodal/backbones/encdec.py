"""Encoder-decoder language models of the T5 and BART families.

What they differ in are configs that compose: where the norms stand, relative or learned positions, the feed-forward
layer, biases, scales. `encdec_families` reads them from the Hub. An encoder alone (Stable Diffusion 3, MusicGen) is
`EncDec.encoder` with `EncDec.embed`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from polymodal.backbones.decoder import Gated, Learned, Plain
from polymodal.core.batch import Batch
from polymodal.core.chat import Chat
from polymodal.core.errors import ConfigError, MediaError
from polymodal.core.sample import Text
from polymodal.core.tokens import Modality, Tokens
from polymodal.nn.attention import attend
from polymodal.nn.cache import KVCache, sight
from polymodal.nn.mlp import ACTIVATIONS, ActivationName
from polymodal.nn.norm import Norm


class UnbiasedMLP(nn.Module):
    """Two linear layers without biases and an activation between them."""

    def __init__(self, dim: int, hidden_dim: int, activation: ActivationName) -> None:
        super().__init__()
        self.up_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        return self.down_proj(self.activation(self.up_proj(x)))


@dataclass(frozen=True, kw_only=True)
class Unbiased:
    """``down(activation(up(x)))`` without biases (T5 1.0)."""

    hidden_dim: int
    activation: ActivationName = "relu"

    def build(self, dim: int) -> nn.Module:
        return UnbiasedMLP(dim, self.hidden_dim, self.activation)


@dataclass(frozen=True, kw_only=True)
class RelativeBias:
    """T5's positions: a learned number for each head and bucket of distances, added to the scores of all layers.

    Half of the buckets are single distances, the others grow with the logarithm up to ``max_distance``; what lies
    further shares the last one.
    """

    buckets: int = 32
    max_distance: int = 128

    def __post_init__(self) -> None:
        if self.buckets < 4 or self.buckets % 2 or self.max_distance <= self.buckets // 2:
            raise ConfigError(f"{self.buckets} buckets do not share out distances up to {self.max_distance}")

    def bucket(self, distance: Int[Tensor, "*shape"], *, causal: bool) -> Int[Tensor, "*shape"]:
        """Buckets of distances (place of the key less that of the query); causal ones tell no later keys apart."""
        if causal:
            count, first, far = self.buckets, torch.zeros_like(distance), (-distance).clamp(min=0)
        else:
            count = self.buckets // 2
            first, far = (distance > 0).long() * count, distance.abs()
        single = count // 2
        turns = torch.log(far.clamp(min=1).float() / single) / math.log(self.max_distance / single)
        grown = single + (turns * (count - single)).long()
        return first + torch.where(far < single, far, grown.clamp(max=count - 1))


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """The layers of an encoder or of a decoder.

    Attributes:
        bias: whether the four projections of attention have one.
        key_bias: whether that of the keys has one, too (Whisper: no).
        scale: of the scores; ``head_dim ** -0.5`` if None (T5: 1).
    """

    num_layers: int
    num_heads: int
    head_dim: int
    mlp: Gated | Plain | Unbiased
    bias: bool = False
    key_bias: bool = True
    scale: float | None = None


@dataclass(frozen=True, kw_only=True)
class CrossDecoderConfig:
    """A decoder of text that reads what was encoded elsewhere.

    Attributes:
        position: of each stack, which have tables of their own.
        post_norm: norms stand after each addition and behind the embeddings (BART), not before each layer and behind
            the last one (T5).
        start_id: what the decoder reads first.
        pad_id: what the decoder reads in the place of a label that is not learned.
        fixed_id: a token whose vector gets no gradient where it is read (BART: padding).
        embed_scale: of the token embeddings.
        logit_scale: of the vectors before the output layer (T5 1.0: ``dim ** -0.5``).
        tied: the output layer is the embedding table.
        logit_bias: a constant is added to the scores (BART's files have one; it is not trained).
    """

    vocab_size: int
    dim: int
    decoder: StackConfig
    norm: Norm
    position: RelativeBias | Learned
    post_norm: bool
    start_id: int
    pad_id: int
    fixed_id: int | None = None
    embed_scale: float | None = None
    logit_scale: float | None = None
    tied: bool = True
    logit_bias: bool = False


@dataclass(frozen=True, kw_only=True)
class EncDecConfig(CrossDecoderConfig):
    """An encoder-decoder language model."""

    encoder: StackConfig


KeysValues: TypeAlias = tuple[Float[Tensor, "batch heads keys head_dim"], Float[Tensor, "batch heads keys head_dim"]]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What one attention does to its scores: a mask or the causal pattern, or a bias that has them in it."""

    mask: Bool[Tensor, "batch 1 #queries keys"] | None = None
    causal: bool = False
    bias: Float[Tensor, "#batch heads queries keys"] | None = None


class Attention(nn.Module):
    """Attention whose keys and values are computed apart from it, once for many queries."""

    def __init__(self, dim: int, config: StackConfig, context_dim: int | None = None) -> None:
        super().__init__()
        c = self.config = config
        inner, context_dim = c.num_heads * c.head_dim, context_dim or dim
        self.q_proj = nn.Linear(dim, inner, bias=c.bias)
        self.k_proj = nn.Linear(context_dim, inner, bias=c.bias and c.key_bias)
        self.v_proj = nn.Linear(context_dim, inner, bias=c.bias)
        self.o_proj = nn.Linear(inner, dim, bias=c.bias)

    def keys_values(self, context: Float[Tensor, "batch keys context_dim"]) -> KeysValues:
        k, v = self.k_proj(context), self.v_proj(context)
        return self._heads(k), self._heads(v)

    def forward(
        self,
        x: Float[Tensor, "batch queries dim"],
        k: Float[Tensor, "batch heads keys head_dim"],
        v: Float[Tensor, "batch heads keys head_dim"],
        scores: Scores,
    ) -> Float[Tensor, "batch queries dim"]:
        q = self._heads(self.q_proj(x))
        k, v = k.to(q.dtype), v.to(q.dtype)
        if scores.bias is None:
            out = attend(q, k, v, mask=scores.mask, causal=scores.causal, scale=self.config.scale)
        else:
            bias = scores.bias.to(q.dtype)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.config.scale)
        return self.o_proj(rearrange(out, "b h n d -> b n (h d)"))

    def _heads(self, x: Float[Tensor, "batch tokens inner"]) -> Float[Tensor, "batch heads tokens head_dim"]:
        return rearrange(x, "b n (h d) -> b h n d", d=self.config.head_dim)


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a decoder needs of the encoder's output: keys and values of each of its layers, and which are valid."""

    layers: tuple[KeysValues, ...]
    valid: Bool[Tensor, "batch source"]

    @property
    def scores(self) -> Scores:
        return Scores() if bool(self.valid.all()) else Scores(mask=self.valid[:, None, None])

    def select(self, rows: Int[Tensor, " kept"]) -> Source:
        """These rows in this order, some perhaps more than once."""
        return Source(layers=tuple((k[rows], v[rows]) for k, v in self.layers), valid=self.valid[rows])

    def put(self, row: int, other: Source, source: int) -> Source:
        """With one row of ``other`` in the place of a row; the shorter of the two is padded."""
        width = max(self.valid.shape[1], other.valid.shape[1])

        def placed(mine: Tensor, theirs: Tensor, axis: int) -> Tensor:
            pad = [0, 0] * (mine.ndim - 1 - axis)
            mine = F.pad(mine, [*pad, 0, width - mine.shape[axis]])
            mine[row] = F.pad(theirs[source : source + 1], [*pad, 0, width - theirs.shape[axis]])[0].to(mine.dtype)
            return mine

        pairs = zip(self.layers, other.layers, strict=True)
        layers = tuple((placed(k, k2, 2), placed(v, v2, 2)) for (k, v), (k2, v2) in pairs)
        return Source(layers=layers, valid=placed(self.valid, other.valid, 1))


class EncDecMemory(KVCache):
    """The decoder's cache and what its rows read from the encoder."""

    source: Source | None = None

    @property
    def nbytes(self) -> int:
        held = () if self.source is None else self.source.layers
        return super().nbytes + sum(k.nbytes + v.nbytes for k, v in held)

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        super().select(rows)
        self.source = None if self.source is None else self.source.select(rows)

    def put(self, row: int, other: KVCache, source: int = 0) -> None:
        super().put(row, other, source)
        assert isinstance(other, EncDecMemory)
        assert other.source is not None, "there is nothing to copy before a prefill"
        if self.source is None:  # rows that are never read need values, too
            self.source = other.source.select(torch.full((self.rows,), source, device=self.block.device))
        else:
            self.source = self.source.put(row, other.source, source)


class Block(nn.Module):
    """Self-attention, attention to a source where there is one, and feed-forward, with norms before or after each."""

    def __init__(
        self, dim: int, config: StackConfig, norm: Norm, layer: int, *, post_norm: bool, context_dim: int | None = None
    ) -> None:
        super().__init__()
        self.layer, self.post_norm = layer, post_norm
        self.attn_norm = norm.build(dim)
        self.attn = Attention(dim, config)
        self.cross_norm = None if context_dim is None else norm.build(dim)
        self.cross_attn = None if context_dim is None else Attention(dim, config, context_dim)
        self.mlp_norm = norm.build(dim)
        self.mlp = config.mlp.build(dim)

    def forward_source(self, context: Float[Tensor, "batch keys context_dim"]) -> KeysValues:
        """Keys and values of the encoder's output for this layer: copies, since FSDP2 watches no views."""
        assert self.cross_attn is not None
        k, v = self.cross_attn.keys_values(context)
        return k.contiguous(), v.contiguous()

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        scores: Scores,
        *,
        source: KeysValues | None = None,
        source_scores: Scores | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        h = self._before(self.attn_norm, x)
        k, v = self.attn.keys_values(h)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        x = self._after(self.attn_norm, x + self.attn(h, k, v, scores))
        if source is not None:
            assert self.cross_attn is not None
            assert self.cross_norm is not None
            h = self._before(self.cross_norm, x)
            x = self._after(self.cross_norm, x + self.cross_attn(h, *source, source_scores or Scores()))
        return self._after(self.mlp_norm, x + self.mlp(self._before(self.mlp_norm, x)))

    def _before(self, norm: nn.Module, x: Tensor) -> Tensor:
        return x if self.post_norm else norm(x)

    def _after(self, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x) if self.post_norm else x


class Stack(nn.Module):
    """An encoder, or a decoder that reads one: positions, blocks and a norm."""

    def __init__(self, config: CrossDecoderConfig, stack: StackConfig, *, decoder: bool) -> None:
        super().__init__()
        c, p = config, config.position
        self.config, self.decoder = config, decoder
        self.position = (
            nn.Embedding(p.buckets, stack.num_heads)
            if isinstance(p, RelativeBias)
            else nn.Embedding(p.count + p.offset, c.dim)
        )
        context_dim = c.dim if decoder else None
        self.blocks = nn.ModuleList(
            Block(c.dim, stack, c.norm, i, post_norm=c.post_norm, context_dim=context_dim)
            for i in range(stack.num_layers)
        )
        self.norm = c.norm.build(c.dim)

    def enter(self, tokens: Tokens) -> Float[Tensor, "batch tokens dim"]:
        """What the first block reads.

        Raises:
            MediaError: a position lies beyond a learned table.
        """
        x, p = tokens.x, self.config.position
        if isinstance(p, Learned):
            place = tokens.position[..., 0]
            if place.numel() and int(place.max()) >= p.count:
                raise MediaError(f"{int(place.max()) + 1} tokens; this backbone reads at most {p.count}")
            x = x + self.position(place + p.offset)
        return self.norm(x) if self.config.post_norm else x

    def scores(self, tokens: Tokens, cache: KVCache | None = None) -> Scores:
        """What all self-attentions of this stack do to their scores."""
        see, p = sight(tokens) if cache is None else cache.sight(tokens), self.config.position
        if not isinstance(p, RelativeBias):
            return Scores(mask=see.mask, causal=see.causal)
        queries = tokens.position[..., 0]
        if cache is None:
            keys = queries
        else:  # a cache holds plain text: a key's place is its position
            count = max(cache.lengths) + tokens.shape[1]
            keys = torch.arange(count, device=queries.device).expand(len(queries), -1)
        if bool((queries == queries[:1]).all() & (keys == keys[:1]).all()):
            queries, keys = queries[:1], keys[:1]  # one bias for all rows
        distance = keys[:, None, :] - queries[:, :, None]
        bias = rearrange(self.position(p.bucket(distance, causal=self.decoder)), "b q k h -> b h q k").contiguous()
        mask = see.mask
        if see.causal:
            mask = torch.ones(bias.shape[2:], dtype=torch.bool, device=bias.device).tril()
        return Scores(bias=bias if mask is None else bias.masked_fill(~mask, -torch.inf))

    def forward(self, tokens: Tokens, source: Source | None = None, cache: KVCache | None = None) -> Tokens:
        """Vectors after the last norm; with a cache, the new tokens are added to it and see what it holds."""
        x, scores = self.enter(tokens), self.scores(tokens, cache)
        if source is None:
            for block in self.blocks:
                x = block(x, scores)
        else:
            cross = source.scores
            for block, keys_values in zip(self.blocks, source.layers, strict=True):
                x = block(x, scores, source=keys_values, source_scores=cross, cache=cache)
        if cache is not None:
            cache.advance(tokens)
        return tokens.with_x(x if self.config.post_norm else self.norm(x))


class CrossDecoder(nn.Module):
    """One embedding table, a decoder that reads a source, and the output layer."""

    logit_bias: Tensor | None

    def __init__(self, config: CrossDecoderConfig) -> None:
        super().__init__()
        c = self.config = config
        self.embed_tokens = nn.Embedding(c.vocab_size, c.dim, padding_idx=c.fixed_id)
        self.add_stacks()
        self.lm_head = None if c.tied else nn.Linear(c.dim, c.vocab_size, bias=False)
        self.register_buffer("logit_bias", torch.zeros(c.vocab_size) if c.logit_bias else None)

    def add_stacks(self) -> None:
        """Makes the decoder."""
        self.decoder = Stack(self.config, self.config.decoder, decoder=True)

    def embed(self, ids: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens dim"]:
        """Vectors of token ids, scaled as the family does."""
        x = self.embed_tokens(ids)
        return x if self.config.embed_scale is None else x * self.config.embed_scale

    def target(self, ids: Int[Tensor, "batch tokens"], valid: Bool[Tensor, "batch tokens"] | None = None) -> Tokens:
        """Text for the decoder; padding (``valid`` False) comes last."""
        return Tokens.of(self.embed(ids), causal=True, modality=Modality.TEXT, valid=valid)

    def shift(self, labels: Int[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens"]:
        """What the decoder reads to say ``labels``: the start token, then all but the last of them."""
        ids = torch.cat([torch.full_like(labels[:, :1], self.config.start_id), labels[:, :-1]], 1)
        return torch.where(ids < 0, self.config.pad_id, ids)  # labels that are not learned are negative

    def source(self, encoded: Tokens) -> Source:
        """What the decoder's layers need of the encoder's vectors, computed once for all its steps.

        Raises:
            MediaError: a row has no valid token.
        """
        assert bool((encoded.sample == encoded.sample[:, :1]).all()), "a decoder reads one sample a row"
        if not bool(encoded.valid.any(1).all()):
            raise MediaError("a row has no token for the decoder to read from")
        layers = []
        for block in self.decoder.blocks:
            assert isinstance(block, Block)
            layers.append(block.forward_source(encoded.x))
        return Source(layers=tuple(layers), valid=encoded.valid)

    def logits(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch vocab"]:
        """Scores of the next token from the decoder's vectors."""
        weight = self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        scale = self.config.logit_scale
        out = F.linear(x if scale is None else x * scale, weight)
        return out if self.logit_bias is None else out + self.logit_bias.to(out.dtype)

    def new_memory(self, rows: int, capacity: int) -> EncDecMemory:
        c, p, weight = self.config.decoder, self.config.position, self.embed_tokens.weight
        return EncDecMemory(
            num_layers=c.num_layers, rows=rows, capacity=min(capacity, p.count) if isinstance(p, Learned) else capacity,
            num_kv_heads=c.num_heads, head_dim=c.head_dim, dtype=weight.dtype, device=weight.device,
        )  # fmt: skip

    @torch.no_grad()
    def step(self, ids: Int[Tensor, " rows"], memory: EncDecMemory) -> Float[Tensor, "rows vocab"]:
        """Reads one more token of the answer a row; scores of the token after it, in fp32."""
        assert memory.source is not None, "step comes after prefill"
        tokens = memory.next_tokens(self.embed(ids.to(memory.block.device)[:, None]), Modality.TEXT)
        return self.logits(self.decoder(tokens, memory.source, memory).x[:, 0]).float()


class EncDec(CrossDecoder):
    """An encoder and a decoder that share an embedding table."""

    config: EncDecConfig

    def add_stacks(self) -> None:
        self.encoder = Stack(self.config, self.config.encoder, decoder=False)
        super().add_stacks()

    def text(self, ids: Int[Tensor, "batch tokens"], valid: Bool[Tensor, "batch tokens"] | None = None) -> Tokens:
        """Text for the encoder; padding (``valid`` False) may stand anywhere."""
        return Tokens.of(self.embed(ids), causal=False, modality=Modality.TEXT, valid=valid)

    def encode(self, tokens: Tokens) -> Tokens:
        """The encoder's vectors of anything that `text` or a connector made; tokens of one block see all of it."""
        return self.encoder(tokens)

    def forward(self, tokens: Tokens, target: Tokens) -> Tokens:
        """The decoder's vectors after its last norm, from what the encoder and the decoder read."""
        return self.decoder(target, self.source(self.encode(tokens)))

    # -- generation: what a system needs for the Generates protocol

    def prompt(self, rows: Sequence[Sequence[int]]) -> Batch:
        """Rows of ids as ``ids`` and ``valid``, padded at the end.

        Raises:
            MediaError: a row is empty, or longer than a table of positions.
        """
        longest, p = max(map(len, rows)), self.config.position
        if isinstance(p, Learned) and longest > p.count:
            raise MediaError(f"a prompt of {longest} tokens; this model reads at most {p.count}")
        if not all(rows):
            raise MediaError("an empty prompt: there is nothing to read")
        ids = torch.full((len(rows), longest), self.config.pad_id)
        valid = torch.zeros(ids.shape, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)], valid[i, : len(row)] = torch.tensor(row), True
        return Batch(ids=ids, valid=valid)

    def prefill(self, tokens: Tokens, memory: EncDecMemory, forced: Sequence[int] = ()) -> Float[Tensor, "rows vocab"]:
        """Encodes a prompt into an empty memory and starts the decoder; scores of its first token, in fp32.

        Args:
            tokens: what the encoder reads.
            memory: of as many rows.
            forced: what every answer begins with, behind the start token.
        """
        memory.source = self.source(self.encode(tokens))
        start = torch.tensor([[self.config.start_id, *forced]], device=tokens.x.device)
        out = self.decoder(self.target(start.expand(tokens.shape[0], -1)), memory.source, memory)
        return self.logits(out.x[:, -1]).float()


def only_text(chat: Chat) -> str:
    """The text of a chat that is one question: these models know no turns and no media.

    Raises:
        MediaError: it is more than that.
    """
    turn = chat.turns[-1]
    if len(chat.turns) > 1 or turn.role != "user" or chat.tools:
        raise MediaError("this model answers one text of a user; it was trained on no turns, no roles and no tools")
    if any(not isinstance(part, Text) for part in turn.parts):
        raise MediaError("this model reads text alone, and the question holds other media")
    return turn.text


class TextEncoder(nn.Module):
    """The encoder of an `EncDec` alone, for systems that only read; its names are those of the whole."""

    lm_head = None

    def __init__(self, config: EncDecConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.encoder = Stack(config, config.encoder, decoder=False)

    def forward(
        self, ids: Int[Tensor, "batch tokens"], valid: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """Vectors after the last norm."""
        return self.encoder(Tokens.of(self.embed_tokens(ids), causal=False, modality=Modality.TEXT, valid=valid)).x


@torch.no_grad()
def t5_init_(model: EncDec | TextEncoder) -> None:
    """Mesh-TensorFlow's scheme for T5: normals by fan-in, queries small enough to need no scale of the scores."""
    c = model.config
    nn.init.normal_(model.embed_tokens.weight)
    if model.lm_head is not None:
        nn.init.normal_(model.lm_head.weight, std=c.dim**-0.5)
    for module in model.modules():
        if isinstance(module, Attention):
            d = module.config.head_dim
            nn.init.normal_(module.q_proj.weight, std=(c.dim * d) ** -0.5)
            for layer in (module.k_proj, module.v_proj, module.o_proj):
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        elif isinstance(module, Block):
            for part in module.mlp.children():
                if isinstance(part, nn.Linear):
                    nn.init.normal_(part.weight, std=part.in_features**-0.5)
        elif isinstance(module, Stack):
            nn.init.normal_(module.position.weight, std=c.dim**-0.5)


@torch.no_grad()
def bart_init_(model: EncDec, std: float = 0.02) -> None:
    """fairseq's scheme for BART: normal matrices and tables, zero biases, a zero vector for padding."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    model.embed_tokens.weight[model.config.pad_id] = 0
