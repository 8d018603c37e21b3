"""Tokens: what every tower and backbone reads, and the attention pattern that follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from polymodal.core.errors import MediaError


class Modality(IntEnum):
    """What a token stands for."""

    TEXT = 0
    IMAGE = 1
    AUDIO = 2
    VIDEO = 3
    STATE = 4
    ACTION = 5


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A batch of token sequences with everything that attention needs to know about them.

    A token attends to the tokens of its own sample whose block number is at most its own. That one number gives causal
    text (each token its own block), bidirectional pictures (one block for all), prefix-LM, and the observation, state
    and action blocks of a policy.
    """

    x: Shaped[Tensor, "batch tokens ..."]  # vectors, or integer codes before embedding
    valid: Bool[Tensor, "batch tokens"]
    block: Int[Tensor, "batch tokens"]
    position: Int[Tensor, "batch tokens axes"]  # 1 axis for text, 2 for pictures, 3 (time, height, width) for M-RoPE
    modality: Int[Tensor, "batch tokens"]
    sample: Int[Tensor, "batch tokens"]  # which packed sample; no attention across samples

    @classmethod
    def of(
        cls,
        x: Shaped[Tensor, "batch tokens ..."],
        *,
        causal: bool,
        modality: Modality,
        valid: Bool[Tensor, "batch tokens"] | None = None,
        position: Int[Tensor, "batch tokens axes"] | None = None,
    ) -> Tokens:
        """One unpacked sample a row; the bookkeeping tensors are expanded views that cost no memory."""
        batch, length = x.shape[:2]
        count = torch.arange(length, device=x.device)
        zero = count.new_zeros(1, 1).expand(batch, length)
        return cls(
            x=x,
            valid=torch.ones(1, 1, dtype=torch.bool, device=x.device).expand(batch, length) if valid is None else valid,
            block=count.expand(batch, length) if causal else zero,
            position=count[None, :, None].expand(batch, length, 1) if position is None else position,
            modality=zero + int(modality),
            sample=zero,
        )

    def with_x(self, x: Shaped[Tensor, "batch tokens ..."]) -> Tokens:
        return replace(self, x=x)

    @property
    def shape(self) -> tuple[int, int]:
        return self.x.shape[0], self.x.shape[1]

    def mask(self) -> Bool[Tensor, "batch 1 tokens tokens"]:
        """True where a query (second last axis) may look at a key (last axis).

        A padding token looks at itself only, so that no row of a softmax is empty.
        """
        see = self.block[:, :, None] >= self.block[:, None, :]
        see &= self.sample[:, :, None] == self.sample[:, None, :]
        see &= self.valid[:, None, :] & self.valid[:, :, None]
        return (see | torch.eye(self.shape[1], dtype=torch.bool, device=see.device)).unsqueeze(1)

    @staticmethod
    def concat(parts: Sequence[Tokens]) -> Tokens:
        """Joins along the token axis; each part sees all parts before it and none after it.

        Positions go on from the largest position of the parts before, per sample, as M-RoPE asks.
        """
        assert parts, "concat needs at least one part"
        axes = max(p.position.shape[2] for p in parts)
        blocks, positions = [], []
        next_block = parts[0].block.new_zeros(parts[0].shape[0], 1)
        next_position = next_block
        for part in parts:
            block = part.block + next_block
            position = part.position.expand(-1, -1, axes) + next_position[:, :, None]
            blocks.append(block)
            positions.append(position)
            if part.shape[1]:
                next_block = block.amax(1, keepdim=True) + 1
                next_position = position.amax((1, 2)).unsqueeze(1) + 1
        return Tokens(
            x=torch.cat([p.x for p in parts], 1),
            valid=torch.cat([p.valid for p in parts], 1),
            block=torch.cat(blocks, 1),
            position=torch.cat(positions, 1),
            modality=torch.cat([p.modality for p in parts], 1),
            sample=torch.cat([p.sample for p in parts], 1),
        )

    def scatter(self, where: Bool[Tensor, "batch tokens"], features: Shaped[Tensor, "features dim"]) -> Tokens:
        """Puts ``features``, in order, where ``where`` is true.

        Raises:
            MediaError: the number of places differs from the number of features.
        """
        places = int(where.sum())
        if places != features.shape[0]:
            raise MediaError(
                f"{places} placeholder tokens for {features.shape[0]} media features: the processor and the model "
                "disagree on the token count, or the prompt was cut inside a medium"
            )
        return self.with_x(self.x.masked_scatter(where.unsqueeze(-1), features.to(self.x.dtype)))
