"""The Perceiver resampler: a fixed number of learned latents read a picture or clip of any number of features.

Source: Alayrac et al., "Flamingo", 2022, https://arxiv.org/abs/2204.14198, section 3.1 and appendix A.1.1; code of
its open twin: mlfoundations/open_flamingo. Keys and values are those of the media and of the latents, each after a norm
of their own; frames are told apart by a learned vector, places within a frame by the tower alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from polymodal.core.errors import ConfigError, MediaError
from polymodal.nn.attention import attend
from polymodal.nn.mlp import MLP, ActivationName


@dataclass(frozen=True, kw_only=True)
class ResamplerConfig:
    """A resampler; it is as wide as what it reads, and its feed-forward layers four times that.

    Attributes:
        qk_norm: of each head's queries and keys (Idefics).
        num_frames: the longest clip in frames; None where only pictures are read, and frames have no vectors.
    """

    num_latents: int = 64
    num_layers: int = 6
    num_heads: int = 8
    head_dim: int = 64
    activation: ActivationName = "gelu"
    qk_norm: bool = False
    num_frames: int | None = None

    def __post_init__(self) -> None:
        if min(self.num_latents, self.num_heads, self.head_dim) < 1:
            raise ConfigError("a resampler needs at least one latent, one head and one dimension a head")

    def build(self, source: int, target: int) -> ResamplerConnector:
        return ResamplerConnector(self, source, target)

    def count(self, tokens: int) -> int:
        """Tokens that so many features become: always as many as there are latents."""
        return self.num_latents


class PerceiverAttention(nn.Module):
    """The latents attend to the media and to themselves, in one softmax."""

    def __init__(self, config: ResamplerConfig, dim: int) -> None:
        super().__init__()
        c, self.num_heads = config, config.num_heads
        inner = c.num_heads * c.head_dim
        self.media_norm = nn.LayerNorm(dim)
        self.latents_norm = nn.LayerNorm(dim)
        self.q_proj = nn.Linear(dim, inner, bias=False)
        self.k_proj = nn.Linear(dim, inner, bias=False)
        self.v_proj = nn.Linear(dim, inner, bias=False)
        self.o_proj = nn.Linear(inner, dim, bias=False)
        self.q_norm = nn.LayerNorm(c.head_dim) if c.qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(c.head_dim) if c.qk_norm else nn.Identity()

    def forward(
        self, media: Float[Tensor, "media tokens dim"], latents: Float[Tensor, "media latents dim"]
    ) -> Float[Tensor, "media latents dim"]:
        latents = self.latents_norm(latents)
        source = torch.cat([self.media_norm(media), latents], 1)
        q, k, v = (
            rearrange(t, "b n (h d) -> b h n d", h=self.num_heads)
            for t in (self.q_proj(latents), self.k_proj(source), self.v_proj(source))
        )
        return self.o_proj(rearrange(attend(self.q_norm(q), self.k_norm(k), v), "b h n d -> b n (h d)"))


class ResamplerBlock(nn.Module):
    """Attention and a feed-forward layer without biases, each added to the latents."""

    def __init__(self, config: ResamplerConfig, dim: int) -> None:
        super().__init__()
        self.attn = PerceiverAttention(config, dim)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = MLP(dim, 4 * dim, config.activation, bias=False)

    def forward(
        self, media: Float[Tensor, "media tokens dim"], latents: Float[Tensor, "media latents dim"]
    ) -> Float[Tensor, "media latents dim"]:
        latents = latents + self.attn(media, latents)
        return latents + self.mlp(self.mlp_norm(latents))


class Resampler(nn.Module):
    """Latents through blocks and a last norm."""

    def __init__(self, config: ResamplerConfig, dim: int) -> None:
        super().__init__()
        c = self.config = config
        self.latents = nn.Parameter(torch.empty(c.num_latents, dim))
        self.frames = None if c.num_frames is None else nn.Parameter(torch.empty(c.num_frames, dim))
        self.blocks = nn.ModuleList(ResamplerBlock(c, dim) for _ in range(c.num_layers))
        self.norm = nn.LayerNorm(dim)

    @torch.no_grad()
    def init_weights(self, std: float | None = None) -> None:
        """Latents and frames of deviation one; linear layers normal with ``std``, or as torch has them."""
        nn.init.normal_(self.latents)
        if self.frames is not None:
            nn.init.normal_(self.frames)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters() if std is None else nn.init.normal_(module.weight, std=std)

    def forward(
        self, x: Float[Tensor, "media tokens dim"] | Float[Tensor, "media frames tokens dim"]
    ) -> Float[Tensor, "media latents dim"]:
        """The latents after they have read each medium: the features of a picture, or of the frames of a clip.

        Raises:
            MediaError: a clip has more frames than there are vectors for.
        """
        x = x.unsqueeze(1) if x.ndim == 3 else x
        if self.frames is not None:
            if x.shape[1] > len(self.frames):
                raise MediaError(f"a clip of {x.shape[1]} frames; this resampler reads at most {len(self.frames)}")
            x = x + self.frames[: x.shape[1], None].to(x.dtype)
        media = x.flatten(1, 2)
        latents = self.latents.to(x.dtype).expand(len(x), -1, -1)
        for block in self.blocks:
            latents = block(media, latents)
        return self.norm(latents)


class ResamplerConnector(nn.Module):
    """A resampler and a linear layer: what it read, as tokens of a backbone."""

    def __init__(self, config: ResamplerConfig, source: int, target: int) -> None:
        super().__init__()
        self.resampler = Resampler(config, source)
        self.proj = nn.Linear(source, target)

    @torch.no_grad()
    def init_weights(self) -> None:
        self.resampler.init_weights()
        nn.init.normal_(self.proj.weight, std=0.02)
        nn.init.zeros_(self.proj.bias)

    def forward(
        self, x: Float[Tensor, "media tokens source"] | Float[Tensor, "media frames tokens source"]
    ) -> Float[Tensor, "media latents target"]:
        return self.proj(self.resampler(x))
