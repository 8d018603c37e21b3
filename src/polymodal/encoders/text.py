"""The text towers of the dual encoders: learned positions, pre-norm blocks, causal (CLIP) or not (SigLIP)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from polymodal.core.errors import ConfigError, MediaError
from polymodal.core.tokens import Modality, Tokens
from polymodal.nn.block import Block
from polymodal.nn.mlp import ActivationName


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """A text tower; ``context`` is the longest text in tokens."""

    vocab_size: int
    context: int
    dim: int
    num_layers: int
    num_heads: int
    hidden_dim: int
    activation: ActivationName = "gelu"
    norm_eps: float = 1e-5
    causal: bool = True

    def __post_init__(self) -> None:
        if self.dim % self.num_heads:
            raise ConfigError(f"dim {self.dim} is not a multiple of num_heads {self.num_heads}")


class TextTower(nn.Module):
    """Token and position embeddings through pre-norm blocks and a last norm."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        c = self.config = config
        self.embed_tokens = nn.Embedding(c.vocab_size, c.dim)
        self.position = nn.Parameter(torch.empty(c.context, c.dim))
        self.blocks = nn.ModuleList(
            Block(c.dim, c.num_heads, c.hidden_dim, activation=c.activation, norm_eps=c.norm_eps)
            for _ in range(c.num_layers)
        )
        self.norm = nn.LayerNorm(c.dim, eps=c.norm_eps)

    def forward(self, ids: Int[Tensor, "batch tokens"], valid: Bool[Tensor, "batch tokens"] | None = None) -> Tokens:
        """All tokens after the last norm. A causal tower needs no ``valid``: padding comes last and nothing sees it.

        Raises:
            MediaError: the text is longer than the context.
        """
        return self.last_two(ids, valid)[1]

    def last_two(
        self, ids: Int[Tensor, "batch tokens"], valid: Bool[Tensor, "batch tokens"] | None = None
    ) -> tuple[Float[Tensor, "batch tokens dim"], Tokens]:
        """The tokens before the last block, not normed, and `forward`'s."""
        length = ids.shape[1]
        if length > self.config.context:
            raise MediaError(f"a text of {length} tokens; this tower reads at most {self.config.context}")
        x = self.embed_tokens(ids)
        tokens = Tokens.of(
            x + self.position[:length].to(x.dtype), causal=self.config.causal, modality=Modality.TEXT, valid=valid
        )
        before = x = tokens.x
        mask = None if valid is None else tokens.mask()
        for block in self.blocks:
            before, x = x, block(x, mask=mask, causal=self.config.causal and mask is None)
        return before, tokens.with_x(self.norm(x))

    def at(self, tokens: Tokens, index: Int[Tensor, " batch"]) -> Float[Tensor, "batch dim"]:
        """The vectors at one position a row."""
        return tokens.x[torch.arange(tokens.shape[0], device=index.device), index]
