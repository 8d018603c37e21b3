"""Connectionist temporal classification (Graves et al. 2006): texts that are shorter than what they label."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from polymodal.core.batch import IGNORE, Loss
from polymodal.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CTCConfig:
    """Scores of tokens and of none (``blank_id``) at each step.

    Attributes:
        by_length: whether each text counts alike, its loss divided by its length, or each of its tokens.
        zero_infinity: whether a text that is too long for its sound counts nothing, in place of infinity.
    """

    vocab_size: int = 32
    blank_id: int = 0
    by_length: bool = False
    zero_infinity: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.blank_id < self.vocab_size:
            raise ConfigError(f"the blank {self.blank_id} is not in a vocabulary of {self.vocab_size}")


class Said(NamedTuple):
    """One token of a greedy path, the steps that it spans (``stop`` excluded), and the mean of its log-probability."""

    token: int
    start: int
    stop: int
    logprob: float


class CTCHead(nn.Module):
    """A linear layer and its loss."""

    def __init__(self, config: CTCConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.proj = nn.Linear(dim, config.vocab_size)

    @torch.no_grad()
    def init_weights(self) -> None:
        nn.init.normal_(self.proj.weight, std=0.02)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Float[Tensor, "batch steps dim"]) -> Float[Tensor, "batch steps vocab"]:
        return self.proj(x)

    def loss(
        self,
        logits: Float[Tensor, "batch steps vocab"],
        steps: Int[Tensor, " batch"],
        labels: Int[Tensor, "batch tokens"],
    ) -> Loss:
        """Of all alignments of each text with its steps; weighs as many as there are texts, or tokens of them."""
        c = self.config
        spoken = labels != IGNORE
        lengths = spoken.sum(1)
        with torch.backends.cudnn.flags(enabled=False):  # cuDNN's needs the blank at 0 and texts under 256 tokens
            losses = F.ctc_loss(
                logits.float().log_softmax(-1).transpose(0, 1), labels[spoken], steps, lengths, blank=c.blank_id,
                reduction="none", zero_infinity=c.zero_infinity,
            )  # fmt: skip
        if c.by_length:
            return Loss(total=(losses / lengths.clamp_min(1)).sum(), weight=len(labels))
        return Loss(total=losses.sum(), weight=int(lengths.sum()))

    def path(self, logits: Float[Tensor, "steps vocab"]) -> list[Said]:
        """The likeliest token of each step, runs of one joined, blanks left out."""
        best, ids = logits.float().log_softmax(-1).max(-1)
        said, at = [], 0
        for token, run in groupby(ids.tolist()):
            stop = at + len(list(run))
            if token != self.config.blank_id:
                said.append(Said(token, at, stop, float(best[at:stop].mean())))
            at = stop
        return said
