"""A learned mean of two things, by which layers over time are put into a model of pictures."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Blend(nn.Module):
    """``share * a + (1 - share) * b``, with the sigmoid of one number for a share.

    Source: Blattmann et al., "Align your Latents", 2023, https://arxiv.org/abs/2304.08818.
    """

    def __init__(self, start: float) -> None:
        super().__init__()
        self.start = start
        self.mix_factor = nn.Parameter(torch.full((1,), start))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.mix_factor.fill_(self.start)

    def forward(self, a: Float[Tensor, "*shape"], b: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return torch.lerp(b, a, self.mix_factor.sigmoid().to(a.dtype))
