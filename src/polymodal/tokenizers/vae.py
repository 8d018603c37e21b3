"""Pictures as continuous latents, drawn from what a convolutional encoder makes of them: the autoencoder of latent
diffusion.

    pixels -> pyramid -> (1x1) -> mean, log variance -> mean + deviation * noise -> (- shift) * scale -> latents
    latents -> / scale + shift -> (1x1) -> pyramid -> pixels

Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2021,
https://arxiv.org/abs/2112.10752; official code CompVis/latent-diffusion. Stable Diffusion 1 and 2 and SDXL have 4
channels and 1x1 convolutions around the latents; SD3 and FLUX have 16, none of these, and a shift.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polymodal.core.batch import Loss
from polymodal.core.errors import ConfigError
from polymodal.nn.precision import FullPrecision
from polymodal.tokenizers.pyramid import PyramidConfig, init_convolutions_, last_layer
from polymodal.tokenizers.vq import adaptive_weight

KL_WEIGHT = 1e-6  # against a reconstruction error that is summed over pixels
JUDGED = 0.5  # of the discriminator's part, in the official code
LOG_VARIANCE = (-30.0, 20.0)  # what is said beyond it is not believed


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Attributes:
    pyramid: encoder and decoder; its ``latent_dim`` is the number of latent channels.
    scale: by which latents are multiplied, so that those of the training pictures have a deviation of about one.
    shift: what is taken off before.
    mixed: whether 1x1 convolutions stand behind the encoder and before the decoder.
    """

    pyramid: PyramidConfig
    scale: float = 0.18215
    shift: float = 0.0
    mixed: bool = True

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ConfigError(f"latents are multiplied by a positive number, not {self.scale}")


class Posterior(NamedTuple):
    """Independent normal distributions of latents, not yet shifted and scaled."""

    mean: Float[Tensor, "batch channels rows columns"]
    log_variance: Float[Tensor, "batch channels rows columns"]

    def at(self, noise: Float[Tensor, "batch channels rows columns"]) -> Float[Tensor, "batch channels rows columns"]:
        """The sample that standard normal ``noise`` becomes."""
        return self.mean + (0.5 * self.log_variance).exp() * noise

    def divergence(self) -> Float[Tensor, " batch"]:
        """From the standard normal distribution, summed over all latents of a picture."""
        excess = self.mean.square() + self.log_variance.exp() - 1 - self.log_variance
        return 0.5 * excess.sum((1, 2, 3))


class VAE(FullPrecision):
    """Encoder and decoder; pixels are in [-1, 1]. SDXL's has values that half precisions lose."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        c = self.config = config
        latent = c.pyramid.latent_dim
        self.encoder = c.pyramid.encoder(2 * latent)
        self.decoder = c.pyramid.decoder()
        self.mix = nn.Conv2d(2 * latent, 2 * latent, 1) if c.mixed else nn.Identity()
        self.unmix = nn.Conv2d(latent, latent, 1) if c.mixed else nn.Identity()

    def init_weights(self) -> None:
        """torch's own scheme, as the official code has it."""
        init_convolutions_(self)

    def shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """Channels, rows and columns of the latents of a picture of this width and height."""
        c = self.config.pyramid
        return c.latent_dim, size[1] // c.factor, size[0] // c.factor

    def posterior(self, pixels: Float[Tensor, "batch channels height width"]) -> Posterior:
        """What the encoder makes of pictures whose sides are multiples of ``config.pyramid.factor``."""
        mean, log_variance = self.mix(self.encoder(pixels)).chunk(2, 1)
        return Posterior(mean, log_variance.clamp(*LOG_VARIANCE))

    def encode(
        self,
        pixels: Float[Tensor, "batch channels height width"],
        noise: Float[Tensor, "batch latent rows columns"] | None = None,
    ) -> Float[Tensor, "batch latent rows columns"]:
        """Latents, shifted and scaled: drawn with standard normal ``noise``, else the likeliest."""
        posterior = self.posterior(pixels)
        drawn = posterior.mean if noise is None else posterior.at(noise)
        return (drawn - self.config.shift) * self.config.scale

    def reconstruct(
        self, drawn: Float[Tensor, "batch latent rows columns"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Pixels of a draw from a `Posterior`."""
        return self.decoder(self.unmix(drawn))

    def decode(
        self, latents: Float[Tensor, "batch latent rows columns"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Pixels of latents as `encode` gives them."""
        return self.reconstruct(latents / self.config.scale + self.config.shift)


def vae_loss(
    vae: VAE,
    pixels: Float[Tensor, "batch channels height width"],
    noise: Float[Tensor, "batch latent rows columns"],
    *,
    distance: Callable[[Tensor, Tensor], Float[Tensor, " batch"]] | None = None,
    judge: nn.Module | None = None,
    divergence: float = KL_WEIGHT,
) -> Loss:
    """What the official code trains the autoencoder by, a sum over all values of a picture.

    Args:
        vae: to be trained.
        pixels: in [-1, 1].
        noise: standard normal, for the draw from the posterior.
        distance: how far each picture is from another to the eye; it counts at every value beside the absolute error.
        judge: says of patches how real they are (`tokenizers.vq.PatchDiscriminator`), once reconstructions are good
            (the official code begins with it after 50,001 steps); weighed so that it moves the last layer half as much
            as reconstruction does, where there is a gradient to weigh.
        divergence: what the posterior's from the standard normal distribution counts.
    """
    posterior = vae.posterior(pixels)
    made = vae.reconstruct(posterior.at(noise))
    error = (made - pixels).abs().flatten(1).sum(1)
    if distance is not None:
        error = error + distance(made, pixels) * pixels[0].numel()
    apart = posterior.divergence()
    total = (error + divergence * apart).sum()
    metrics = {"error": error.detach().mean() / pixels[0].numel(), "divergence": apart.detach().mean()}
    if judge is not None:
        deceived = -judge(made).mean()
        weight = torch.ones(())
        if torch.is_grad_enabled():
            last = last_layer(vae.decoder)
            slopes = [torch.autograd.grad(cost, last, retain_graph=True)[0] for cost in (error.mean(), deceived)]
            weight = adaptive_weight(*slopes, weight=JUDGED)
        total = total + weight * deceived * len(pixels)
        metrics["judged"] = deceived.detach()
    return Loss(total, len(pixels), metrics)
