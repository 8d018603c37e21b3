"""The autoencoder of latent diffusion with a decoder that looks at neighbouring frames, so that films do not flicker.

Pictures are encoded one by one. In the decoder a block that convolves over frames stands behind each residual block,
and a last convolution over frames behind the last one; how much of each is taken is learned, and half of it at first.

Source: Blattmann et al., "Align your Latents", 2023, https://arxiv.org/abs/2304.08818; "Stable Video Diffusion", 2023,
https://arxiv.org/abs/2311.15127. Official code: Stability-AI/generative-models.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from polymodal.nn.blend import Blend
from polymodal.tokenizers.pyramid import Decoder, PyramidConfig, ResidualBlock
from polymodal.tokenizers.vae import VAE, VAEConfig

EPS = 1e-5  # of the norms over frames


def _over_frames(dim: int) -> nn.Conv3d:
    return nn.Conv3d(dim, dim, (3, 1, 1), padding=(1, 0, 0))


class FilmBlock(nn.Module):
    """A residual block of each frame and one over time; the batch is the frames of one film."""

    def __init__(self, dim: int, out: int, groups: int) -> None:
        super().__init__()
        self.space = ResidualBlock(dim, out, groups)
        self.norm1, self.norm2 = (nn.GroupNorm(groups, out, eps=EPS) for _ in range(2))
        self.conv1, self.conv2 = _over_frames(out), _over_frames(out)
        self.blend = Blend(0.0)

    def forward(self, x: Float[Tensor, "frames dim height width"]) -> Float[Tensor, "frames out height width"]:
        x = self.space(x)
        film = rearrange(x, "f d h w -> 1 d f h w")
        h = self.conv1(F.silu(self.norm1(film)))
        changed = film + self.conv2(F.silu(self.norm2(h)))
        return self.blend(rearrange(changed, "1 d f h w -> f d h w"), x)


class FilmDecoder(Decoder):
    """The latents of the frames of one film to their pixels."""

    def __init__(self, config: PyramidConfig) -> None:
        super().__init__(config, FilmBlock)
        self.over_time = _over_frames(config.channels)

    def forward(self, x: Float[Tensor, "frames latent rows columns"]) -> Float[Tensor, "frames channels height width"]:
        film = rearrange(super().forward(x), "f c h w -> 1 c f h w")
        return rearrange(self.over_time(film), "1 c f h w -> f c h w")


@dataclass(frozen=True, kw_only=True)
class FilmPyramidConfig(PyramidConfig):
    """A pyramid for pictures on the way down and for films on the way up."""

    def decoder(self) -> nn.Module:
        return FilmDecoder(self)


class FilmVAE(VAE):
    """`encode` takes any pictures, `decode` (and `reconstruct`) the frames of one film."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__(config)
        self.unmix = nn.Identity()  # there is no 1x1 convolution before this decoder

    def films(self, latents: Float[Tensor, "batch frames latent rows columns"]) -> Float[Tensor, "batch frames c h w"]:
        """Pixels of the frames of films."""
        return torch.stack([self.decode(film) for film in latents])
