"""Two stacks of one shape of attention: a trunk that reads, and a narrower expert that also sees what the trunk keeps.

In each layer the expert's tokens attend to the keys and values of the trunk's and to their own; nothing else is shared.
The trunk's tokens come in earlier blocks and never see the expert's: what the expert needs of them is computed once, in
training with its gradient, when acting for all steps of a sampler.

Source: Black et al., "pi0: A Vision-Language-Action Flow Model for General Robot Control", 2024,
https://arxiv.org/abs/2410.24164.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polymodal.backbones.decoder import (
    AttentionConfig,
    Decoder,
    DecoderBlock,
    DecoderConfig,
    Gated,
    SelfAttention,
    View,
)
from polymodal.core.errors import ConfigError
from polymodal.core.tokens import Tokens
from polymodal.nn.cache import Keeps, Sight
from polymodal.nn.init import lecun_normal_
from polymodal.nn.norm import AdaptiveRMS, AdaptiveRMSNorm, OffsetRMS
from polymodal.nn.rope import Rope


@dataclass(frozen=True, kw_only=True)
class ExpertConfig:
    """A second stack: as many layers, and in each the same attention, as the trunk has."""

    dim: int
    mlp: Gated
    norm: OffsetRMS | AdaptiveRMS = field(default_factory=OffsetRMS)


class Kept:
    """The trunk's keys and values, layer by layer, as it reads."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        assert layer == len(self.layers)
        self.layers.append((k, v))
        return k, v


@dataclass(frozen=True)
class Prefix:
    """What the trunk has read, as tokens that stand behind it see it; it can be read again and again."""

    layers: list[tuple[Tensor, Tensor]]
    view: View

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.layers[layer]
        return torch.cat([keys.to(k.dtype), k], 2), torch.cat([values.to(v.dtype), v], 2)


def _normed(norm: nn.Module, x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor | float]:
    """What was normed, and the gate of what is computed from it."""
    return (norm(x), 1.0) if condition is None else norm(x, condition)


class ExpertBlock(nn.Module):
    """Attention and feed-forward, each after a norm and behind its gate."""

    def __init__(self, config: ExpertConfig, attention: AttentionConfig, layer: int) -> None:
        super().__init__()
        c, self.layer = config, layer
        self.attn_norm = c.norm.build(c.dim)
        self.attn = SelfAttention(c.dim, attention)
        self.mlp_norm = c.norm.build(c.dim)
        self.mlp = c.mlp.build(c.dim)

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        view: View,
        keeps: Keeps,
        condition: Float[Tensor, "batch dim"] | None,
    ) -> Float[Tensor, "batch tokens dim"]:
        y, gate = _normed(self.attn_norm, x, condition)
        x = x + gate * self.attn(y, view, keeps, self.layer)
        y, gate = _normed(self.mlp_norm, x, condition)
        return x + gate * self.mlp(y)


class Expert(nn.Module):
    """The second stack, without embeddings: what it reads are vectors."""

    def __init__(self, config: ExpertConfig, trunk: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(ExpertBlock(config, trunk.attention, layer) for layer in range(trunk.num_layers))
        self.norm = config.norm.build(config.dim)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Variances of one over the fan-in, as openpi's code has it; norms and gates as they are built."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                lecun_normal_(module)
        for module in self.modules():
            if isinstance(module, AdaptiveRMSNorm):
                module.init_weights()


class Experts(nn.Module):
    """A trunk and its expert; `read` what the trunk is shown, then `forward` the expert's tokens behind it."""

    def __init__(self, trunk: DecoderConfig, expert: ExpertConfig) -> None:
        super().__init__()
        if not isinstance(trunk.position, Rope) or trunk.position.sections is not None or trunk.window is not None:
            raise ConfigError("an expert stands behind a trunk with plain rotary positions and no windows")
        self.trunk = Decoder(trunk)
        self.expert = Expert(expert, trunk)
        for module in self._unread():
            module.requires_grad_(False)

    def _unread(self) -> Iterator[nn.Module]:
        """What only the trunk's own output goes through: kept for the file's sake."""
        last = self.trunk.blocks[-1]
        assert isinstance(last, DecoderBlock)
        yield from (last.attn.q_proj, last.attn.o_proj, last.attn.q_norm, last.attn_post_norm)
        yield from (last.mlp_norm, last.mlp, last.mlp_post_norm, self.trunk.norm)
        if self.trunk.lm_head is not None:
            yield self.trunk.lm_head

    @torch.no_grad()
    def init_weights(self) -> None:
        self.trunk.init_weights()
        self.expert.init_weights()

    def read(self, tokens: Tokens, behind: Tokens) -> Prefix:
        """What the trunk keeps of its tokens for those ``behind`` them, of which all but ``x`` is read."""
        kept = Kept()
        x = self.trunk.enter(tokens)
        *blocks, last = zip(self.trunk.blocks, self.trunk.views(tokens), strict=True)
        for block, view in blocks:
            x = block(x, view, kept)
        block, view = last
        assert isinstance(block, DecoderBlock)
        block.forward_keys(x, view, kept)
        return Prefix(kept.layers, self._view(tokens, behind))

    def _view(self, tokens: Tokens, behind: Tokens) -> View:
        whole = Tokens.concat([part.with_x(part.x[..., :0]) for part in (tokens, behind)])
        new, c = behind.shape[1], self.trunk.config
        assert isinstance(c.position, Rope)
        rotary = c.position.angles(whole.position[:, -new:], c.attention.head_dim)
        return View(Sight(mask=whole.mask()[:, :, -new:]), rotary)

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        prefix: Prefix,
        condition: Float[Tensor, "batch dim"] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """The expert's vectors after its last norm; ``condition`` is what adaptive norms are told."""
        assert (condition is not None) == isinstance(self.expert.config.norm, AdaptiveRMS)
        for block in self.expert.blocks:
            x = block(x, prefix.view, prefix, condition)
        return _normed(self.expert.norm, x, condition)[0]
