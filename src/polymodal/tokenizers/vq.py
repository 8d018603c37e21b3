"""Vector quantisation of pictures: VQ-VAE, VQGAN, and the discriminator that makes the second of the first.

Sources: van den Oord et al., "Neural Discrete Representation Learning", 2017, arXiv 1711.00937; Razavi et al., 2019,
arXiv 1906.00446 (moving averages); Esser et al., "Taming Transformers for High-Resolution Image Synthesis", 2020, arXiv
2012.09841, and its official code, CompVis/taming-transformers, whose numbers are the defaults.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from polymodal.core.distributed import gather_with_grad
from polymodal.core.errors import ConfigError
from polymodal.nn.precision import FullPrecision
from polymodal.tokenizers.fsq import FSQ, FiniteCodes
from polymodal.tokenizers.pyramid import CodecConfig, PyramidConfig, init_convolutions_, last_layer
from polymodal.tokenizers.rvq import Codebook, Coded, nearest


@dataclass(frozen=True, kw_only=True)
class LearnedCodes:
    """A codebook that trains by gradient.

    The papers weigh the pull on the encoder 0.25 and that on the entries 1; VQGAN's code, and Chameleon's, has them the
    other way round.

    Attributes:
        commitment: weight of the loss that pulls vectors to entries.
        codebook: weight of the loss that pulls entries to vectors.
    """

    size: int = 1024
    dim: int = 256
    commitment: float = 0.25
    codebook: float = 1.0

    def build(self) -> LearnedQuantizer:
        return LearnedQuantizer(self)


@dataclass(frozen=True, kw_only=True)
class AveragedCodes:
    """A codebook of moving averages, started by k-means, its dead entries replaced (`rvq.Codebook`)."""

    size: int = 1024
    dim: int = 256
    commitment: float = 0.25

    def build(self) -> AveragedQuantizer:
        return AveragedQuantizer(self)


CodesConfig: TypeAlias = LearnedCodes | AveragedCodes | FiniteCodes


class LearnedQuantizer(nn.Module):
    """Each vector becomes the nearest entry; the gradient passes straight through."""

    def __init__(self, config: LearnedCodes) -> None:
        super().__init__()
        self.config = config
        self.size, self.dim = config.size, config.dim
        self.entries = nn.Embedding(config.size, config.dim)

    def reset(self) -> None:
        """The official scheme: uniform, and small."""
        nn.init.uniform_(self.entries.weight, -1 / self.size, 1 / self.size)

    def forward(self, x: Float[Tensor, "batch dim *grid"]) -> Coded:
        codes = self.encode(x)
        chosen = self.decode(codes)
        penalty = self.config.commitment * F.mse_loss(x, chosen.detach())
        penalty = penalty + self.config.codebook * F.mse_loss(chosen, x.detach())
        return Coded(x + (chosen - x).detach(), codes, penalty)

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "batch dim *grid"]) -> Int[Tensor, "batch *grid"]:
        rows = rearrange(x.float(), "b d ... -> b ... d")
        return nearest(rows.reshape(-1, self.dim), self.entries.weight.float()).view(rows.shape[:-1])

    def decode(self, codes: Int[Tensor, "batch *grid"]) -> Float[Tensor, "batch dim *grid"]:
        return rearrange(self.entries(codes), "b ... d -> b d ...")


class AveragedQuantizer(nn.Module):
    """The same with entries that follow what is nearest to them while training, without a gradient."""

    def __init__(self, config: AveragedCodes) -> None:
        super().__init__()
        self.config = config
        self.size, self.dim = config.size, config.dim
        self.book = Codebook(config.size, config.dim)

    def reset(self) -> None:
        self.book.reset()

    def forward(self, x: Float[Tensor, "batch dim *grid"]) -> Coded:
        rows = rearrange(x.detach().float(), "b d ... -> b ... d").reshape(-1, self.dim)
        if self.training:
            self.book.start(rows)
        codes = self.encode(x)
        chosen = self.decode(codes)
        if self.training:
            self.book.learn(rows, codes.flatten())
        return Coded(x + (chosen - x).detach(), codes, self.config.commitment * F.mse_loss(x, chosen))

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "batch dim *grid"]) -> Int[Tensor, "batch *grid"]:
        rows = rearrange(x.float(), "b d ... -> b ... d")
        return nearest(rows.reshape(-1, self.dim), self.book.entries).view(rows.shape[:-1])

    def decode(self, codes: Int[Tensor, "batch *grid"]) -> Float[Tensor, "batch dim *grid"]:
        return rearrange(self.book.entries[codes], "b ... d -> b d ...")


Quantizer: TypeAlias = LearnedQuantizer | AveragedQuantizer | FSQ


@dataclass(frozen=True, kw_only=True)
class VQConfig:
    """An autoencoder of pictures with codes in its middle.

    Attributes:
        net: encoder and decoder.
        codes: which codes.
        resolution: of the pictures that it was made for, pixels a side.
        paints: whether it has a decoder (the files of Chameleon on the Hub have none).
    """

    net: CodecConfig = field(default_factory=PyramidConfig)
    codes: CodesConfig = field(default_factory=LearnedCodes)
    resolution: int = 256
    paints: bool = True

    def __post_init__(self) -> None:
        if self.resolution % self.net.factor:
            raise ConfigError(f"a resolution of {self.resolution} is no multiple of {self.net.factor} pixels a code")

    @property
    def grid(self) -> int:
        """Codes along each side of a picture."""
        return self.resolution // self.net.factor

    @property
    def num_codes(self) -> int:
        """Codes of a picture."""
        return self.grid**2


class VQModel(FullPrecision):
    """Pixels in [-1, 1] to codes, and codes to pixels; rounded vectors would have other codes."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        c = self.config = config
        self.encoder = c.net.encoder()
        self.quant_conv = nn.Conv2d(c.net.latent_dim, c.codes.dim, 1)
        self.quantizer: Quantizer = c.codes.build()
        self.post_quant_conv = nn.Conv2d(c.codes.dim, c.net.latent_dim, 1)
        self.decoder = c.net.decoder() if c.paints else None

    def init_weights(self) -> None:
        init_convolutions_(self)
        self.quantizer.reset()

    def latents(self, pixels: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim rows columns"]:
        """Vectors that are to be quantised."""
        return self.quant_conv(self.encoder(pixels))

    def paint(self, chosen: Float[Tensor, "batch dim rows columns"]) -> Float[Tensor, "batch channels height width"]:
        """Pixels of quantised vectors."""
        assert self.decoder is not None, "these weights have no decoder"
        return self.decoder(self.post_quant_conv(chosen.to(self.post_quant_conv.weight.dtype)))

    def forward(
        self, pixels: Float[Tensor, "batch channels height width"]
    ) -> tuple[Float[Tensor, "batch channels height width"], Coded]:
        """The pixels again, and the codes that they went through."""
        coded = self.quantizer(self.latents(pixels))
        return self.paint(coded.x), coded

    @torch.no_grad()
    def encode(self, pixels: Float[Tensor, "batch channels height width"]) -> Int[Tensor, "batch rows columns"]:
        return self.quantizer.encode(self.latents(pixels))

    @torch.no_grad()
    def decode(self, codes: Int[Tensor, "batch rows columns"]) -> Float[Tensor, "batch channels height width"]:
        return self.paint(self.quantizer.decode(codes))

    @property
    def last_layer(self) -> nn.Parameter:
        """What `adaptive_weight` looks at."""
        assert self.decoder is not None, "these weights have no decoder"
        return last_layer(self.decoder)


# ---- adversarial training


class PatchDiscriminator(nn.Module):
    """Says of each patch of a picture whether it is real: high if so (Isola et al. 2016, arXiv 1611.07004).

    Args:
        channels: of the pixels.
        filters: of the first layer; each layer doubles them, up to eight times as many.
        num_layers: with stride 2.
    """

    def __init__(self, channels: int = 3, filters: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        widths = [filters * min(2**i, 8) for i in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(channels, filters, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i in range(1, num_layers + 1):
            stride = 2 if i < num_layers else 1
            layers.append(nn.Conv2d(widths[i - 1], widths[i], 4, stride, 1, bias=False))
            layers += [nn.BatchNorm2d(widths[i]), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """pix2pix's: small normals."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, pixels: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch 1 rows columns"]:
        return self.layers(pixels)


def hinge(real: Float[Tensor, "..."], made: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """What a discriminator pays for real patches below 1 and for made ones above -1, half of each."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + made).mean())


def adaptive_weight(
    reconstruction: Tensor, adversarial: Tensor, *, weight: float = 0.8, most: float = 1e4
) -> Float[Tensor, ""]:
    """How much the adversarial loss counts: as much as reconstruction does, by their gradients.

    Args:
        reconstruction: the gradient of that loss on the decoder's last layer.
        adversarial: the gradient of that loss on it.
        weight: of the ratio of their norms.
        most: the ratio is cut there.
    """
    norms = torch.stack([reconstruction.detach().float().norm(), adversarial.detach().float().norm()])
    norms = gather_with_grad(norms[None]).mean(0)  # all processes weigh alike
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, most) * weight
