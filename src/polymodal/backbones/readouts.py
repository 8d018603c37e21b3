"""A Transformer over words and moments, in which one token of each moment reads and is not read (Octo).

Source: Octo Model Team 2024, https://arxiv.org/abs/2405.12213; octo-models/octo, ``octo_module.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from polymodal.core.errors import ConfigError
from polymodal.nn.block import Block
from polymodal.nn.init import siglip_tower_


@dataclass(frozen=True, kw_only=True)
class ReadoutConfig:
    """A Transformer as ViT has it; Octo-Small's if nothing is said."""

    dim: int = 384
    num_layers: int = 12
    num_heads: int = 6
    hidden_dim: int = 1536

    def __post_init__(self) -> None:
        if self.dim % self.num_heads:
            raise ConfigError(f"dim {self.dim} is not a multiple of num_heads {self.num_heads}")


def sight(words: int, seen: int, steps: int) -> Bool[Tensor, "tokens tokens"]:
    """Where each token may look; ``words`` come first, then for each step the tokens ``seen`` and its readout.

    Words see words. What is seen sees the words and all that is seen up to its own step. Readouts see that and the
    readouts up to their own.
    """
    step = torch.cat([torch.full((words,), -1), torch.arange(steps).repeat_interleave(seen + 1)])
    readout = torch.cat([torch.zeros(words), F.one_hot(torch.tensor(seen), seen + 1).repeat(steps)]).bool()
    return (step <= step[:, None]) & (readout[:, None] | ~readout)


class ReadoutTransformer(nn.Module):
    """Learned places for words, for what is seen and for readouts, which are nothing else; blocks; a last norm."""

    def __init__(self, config: ReadoutConfig, *, words: int, steps: int, seen: int) -> None:
        super().__init__()
        c = config
        self.word_position = nn.Parameter(torch.empty(words, c.dim))
        self.position = nn.Parameter(torch.empty(steps, seen + 1, c.dim))
        self.blocks = nn.ModuleList(
            Block(c.dim, c.num_heads, c.hidden_dim, activation="gelu_tanh") for _ in range(c.num_layers)
        )
        self.norm = nn.LayerNorm(c.dim, eps=1e-6)

    @torch.no_grad()
    def init_weights(self) -> None:
        siglip_tower_(self.blocks)
        for place in (self.word_position, self.position):
            nn.init.normal_(place, std=0.02)

    def forward(
        self,
        words: Float[Tensor, "batch words dim"],
        words_valid: Bool[Tensor, "batch words"],
        x: Float[Tensor, "batch steps seen dim"],
        seen: Bool[Tensor, "batch steps"],
    ) -> Float[Tensor, "batch steps dim"]:
        """The readouts; no token looks at words that are not valid, nor at a step that was not seen."""
        count, width = words.shape[1], x.shape[2] + 1
        x = (F.pad(x, (0, 0, 0, 1)) + self.position).flatten(1, 2)
        there = torch.cat(
            [words_valid, F.pad(seen[..., None].expand(-1, -1, width - 1), (0, 1), value=True).flatten(1)], 1
        )
        mask = sight(count, width - 1, seen.shape[1]).to(x.device) & there[:, None, None]
        x = torch.cat([words + self.word_position[:count], x], 1)
        for block in self.blocks:
            x = block(x, mask=mask)
        return self.norm(x[:, count:].unflatten(1, (-1, width))[:, :, -1])
