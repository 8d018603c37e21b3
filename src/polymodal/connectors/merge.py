"""Fewer tokens of a picture or a clip: like ones merged (ToMe), or neighbours in space or time pooled.

ToMe: Bolya et al. 2023, https://arxiv.org/abs/2210.09461; official code: facebookresearch/ToMe.
Deviation: tokens keep their order (ToMe moves the merged ones to the end), so that positions and causal language
models still mean something, and no merging is exactly the identity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from polymodal.core.errors import ConfigError, did_you_mean


@dataclass(frozen=True, eq=False, kw_only=True)
class Matching:
    """Which merged token each token becomes part of."""

    target: Int[Tensor, "batch tokens"]
    count: int  # tokens that are left

    def merge(
        self, x: Float[Tensor, "batch tokens dim"], sizes: Float[Tensor, "batch tokens"] | None = None
    ) -> tuple[Float[Tensor, "batch merged dim"], Float[Tensor, "batch merged"]]:
        """Means of the tokens that become one, weighted by their sizes, and the sums of the sizes.

        Args:
            x: what to merge, of the tokens that were matched.
            sizes: how many original tokens each token stands for; one each when None.
        """
        if sizes is None:
            sizes = x.new_ones(x.shape[:2], dtype=torch.float32)
        if self.count == x.shape[1]:
            return x, sizes
        # Sums in fp32: in bf16, counts above 256 and small tokens beside large sums would be lost.
        exact = torch.promote_types(x.dtype, torch.float32)
        weight = sizes.to(exact)[..., None]
        total = self._sum(weight)
        return (self._sum(x.to(exact) * weight) / total).to(x.dtype), total[..., 0].to(sizes.dtype)

    def unmerge(self, x: Float[Tensor, "batch merged dim"]) -> Float[Tensor, "batch tokens dim"]:
        """A copy of its merged token for each token, e.g. for dense outputs."""
        return x.gather(1, self.target[..., None].expand(-1, -1, x.shape[2]))

    def _sum(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch merged dim"]:
        out = x.new_zeros(x.shape[0], self.count, x.shape[2])
        return out.scatter_add(1, self.target[..., None].expand_as(x), x)


@torch.no_grad()
def match(keys: Float[Tensor, "batch tokens dim"], r: int, *, protected: int = 0) -> Matching:
    """Bipartite soft matching: ``r`` tokens at even places join the odd ones that they are most like.

    Each even token is paired with the odd token of the highest cosine similarity; the ``r`` best pairs merge, and
    several may merge into one. For batches without padding.

    Args:
        keys: what is compared: in a ViT, the keys of its attention, averaged over the heads.
        r: how many tokens fewer there will be; at most `most_merged`.
        protected: that many leading tokens (a class token) stay as they are.

    Raises:
        ConfigError: there are fewer tokens to merge.
    """
    batch, tokens, _ = keys.shape
    if not 0 <= r <= most_merged(tokens, protected):
        raise ConfigError(
            f"{r} of {tokens} tokens ({protected} of them protected) cannot be merged at once; at most "
            f"{most_merged(tokens, protected)} can"
        )
    place = torch.arange(tokens, device=keys.device).expand(batch, tokens)
    if r == 0:
        return Matching(target=place, count=tokens)
    unit = F.normalize(keys[:, protected:].float(), dim=-1)
    even, odd = unit[:, ::2], unit[:, 1::2]
    best, partner = (even @ odd.mT).max(-1)
    merged = best.argsort(dim=-1, descending=True, stable=True)[:, :r]
    goes = protected + 2 * merged
    joins = protected + 2 * partner.gather(1, merged) + 1
    # Each token's place among those that are left; a merged one has its partner's.
    stays = torch.ones_like(place).scatter(1, goes, 0)
    left = stays.cumsum(1) - 1
    return Matching(target=left.scatter(1, goes, left.gather(1, joins)), count=tokens - r)


def most_merged(tokens: int, protected: int = 0) -> int:
    """How many tokens one `match` can merge: those at even places that have an odd one."""
    free = max(tokens - protected, 0)
    return (free + 1) // 2 if free > 1 else 0


def size_bias(sizes: Float[Tensor, "batch tokens"]) -> Float[Tensor, "batch 1 1 tokens"]:
    """Proportional attention: add this to the attention logits, and a token counts as the many that it stands for."""
    return sizes.log()[:, None, None, :]


Pooling: TypeAlias = Literal["bilinear", "average"]


def pool_space(
    x: Float[Tensor, "*batch tokens dim"], grid: tuple[int, int], size: tuple[int, int], how: Pooling = "bilinear"
) -> Float[Tensor, "*batch pooled dim"]:
    """A grid of tokens, row by row, to another size.

    Args:
        x: the tokens, without a class token.
        grid: rows and columns of ``x``.
        size: rows and columns of the result, e.g. `strided`: LLaVA-OneVision makes 14 x 14 of 27 x 27.
        how: ``bilinear`` samples without antialiasing and with half-pixel centres, as LLaVA-OneVision; ``average``
            takes the mean of the cells that each new one covers, as LLaVA-NeXT-Video's pooling by 2.

    Raises:
        ConfigError: ``grid`` is not that of ``x``, or ``how`` is not known.
    """
    if grid[0] * grid[1] != x.shape[-2]:
        raise ConfigError(f"{x.shape[-2]} tokens are not a grid of {grid[0]} x {grid[1]}")
    if min(size) < 1:
        raise ConfigError(f"a grid cannot be pooled to {size[0]} x {size[1]}")
    cells = rearrange(x, "... (h w) d -> (...) d h w", h=grid[0])
    if how == "bilinear":
        cells = F.interpolate(cells, size=size, mode="bilinear", align_corners=False)
    elif how == "average":
        cells = F.adaptive_avg_pool2d(cells, size)
    else:
        raise ConfigError(f"no pooling is called {how!r}{did_you_mean(how, ('bilinear', 'average'))}")
    return rearrange(cells, "b d h w -> b (h w) d").reshape(*x.shape[:-2], size[0] * size[1], x.shape[-1])


def strided(grid: tuple[int, int], stride: int) -> tuple[int, int]:
    """Rows and columns after pooling by ``stride``, rounded up: 27 x 27 by 2 is 14 x 14."""
    return math.ceil(grid[0] / stride), math.ceil(grid[1] / stride)


def pool_time(x: Float[Tensor, "batch frames tokens dim"], frames: int) -> Float[Tensor, "batch pooled tokens dim"]:
    """Means over time of each token: ``frames`` even stretches of it, which share a frame where they do not divide.

    Video-ChatGPT's temporal features are ``pool_time(x, 1)``.

    Raises:
        ConfigError: more frames are asked for than there are.
    """
    if not 1 <= frames <= x.shape[1]:
        raise ConfigError(f"{x.shape[1]} frames cannot be pooled to {frames}")
    pooled = F.adaptive_avg_pool1d(rearrange(x, "b f n d -> b (n d) f"), frames)
    return rearrange(pooled, "b (n d) f -> b f n d", d=x.shape[3])
