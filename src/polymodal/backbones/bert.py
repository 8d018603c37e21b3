"""BERT: a bidirectional encoder with norms after each addition, learned positions and token types."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from polymodal.backbones.decoder import Plain
from polymodal.backbones.encdec import Block, Scores, StackConfig
from polymodal.core.errors import ConfigError, MediaError
from polymodal.core.tokens import Modality, Tokens
from polymodal.nn.cache import sight
from polymodal.nn.mlp import ACTIVATIONS, ActivationName
from polymodal.nn.norm import Layer


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """A BERT encoder; ``context`` is the longest text in tokens.

    ``offset`` rows of the table of positions stand before the first one (RoBERTa: 2).
    """

    vocab_size: int
    context: int
    dim: int
    num_layers: int
    num_heads: int
    hidden_dim: int
    activation: ActivationName = "gelu"
    norm_eps: float = 1e-12
    num_types: int = 2
    offset: int = 0

    def __post_init__(self) -> None:
        if self.dim % self.num_heads:
            raise ConfigError(f"dim {self.dim} is not a multiple of num_heads {self.num_heads}")

    @property
    def stack(self) -> StackConfig:
        """The layers, as `Block` takes them."""
        return StackConfig(
            num_layers=self.num_layers, num_heads=self.num_heads, head_dim=self.dim // self.num_heads, bias=True,
            mlp=Plain(hidden_dim=self.hidden_dim, activation=self.activation),
        )  # fmt: skip


class Bert(nn.Module):
    """Embeddings and post-norm blocks."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        c = self.config = config
        norm = Layer(eps=c.norm_eps)
        self.embed_tokens = nn.Embedding(c.vocab_size, c.dim)
        self.position = nn.Embedding(c.offset + c.context, c.dim)
        self.types = nn.Embedding(c.num_types, c.dim)
        self.norm = norm.build(c.dim)
        self.blocks = nn.ModuleList(Block(c.dim, c.stack, norm, i, post_norm=True) for i in range(c.num_layers))

    def text(
        self,
        ids: Int[Tensor, "batch tokens"],
        valid: Bool[Tensor, "batch tokens"] | None = None,
        types: Int[Tensor, "batch tokens"] | None = None,
    ) -> Tokens:
        """Embedded text, ready for `forward`; ``types`` tell the first from the second text and are 0 if not given.

        Raises:
            MediaError: the text is longer than the context.
        """
        length = ids.shape[1]
        if length > self.config.context:
            raise MediaError(f"a text of {length} tokens; this encoder reads at most {self.config.context}")
        kinds = self.types.weight[0] if types is None else self.types(types)
        first = self.config.offset
        x = self.norm(self.embed_tokens(ids) + kinds + self.position.weight[first : first + length])
        return Tokens.of(x, causal=False, modality=Modality.TEXT, valid=valid)

    def forward(self, tokens: Tokens) -> Tokens:
        """All tokens after the last block."""
        see, x = sight(tokens), tokens.x
        for block in self.blocks:
            x = block(x, Scores(mask=see.mask, causal=see.causal))
        return tokens.with_x(x)


class BertPooler(nn.Module):
    """A tanh layer over the first token."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch dim"]:
        return torch.tanh(self.proj(x[:, 0]))


class MaskedHead(nn.Module):
    """Scores of the vocabulary: a layer and a norm before the embedding table, a bias after it."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(config.dim, config.dim)
        self.activation = ACTIVATIONS[config.activation]
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(
        self, x: Float[Tensor, "*batch dim"], table: Float[Tensor, "vocab dim"]
    ) -> Float[Tensor, "*batch vocab"]:
        return F.linear(self.norm(self.activation(self.proj(x))), table, self.bias.to(x.dtype))


@torch.no_grad()
def bert_init_(model: nn.Module, std: float = 0.02) -> None:
    """The official code's scheme: normals cut at two standard deviations, zero biases."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
