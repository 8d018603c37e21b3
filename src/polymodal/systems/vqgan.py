"""VQGAN: pictures as whole numbers, and back, by a convolutional autoencoder with a codebook in its middle.

Papers: van den Oord et al., "Neural Discrete Representation Learning" (VQ-VAE), 2017,
https://arxiv.org/abs/1711.00937; Esser et al., "Taming Transformers for High-Resolution Image Synthesis", 2020,
https://arxiv.org/abs/2012.09841. Official code: CompVis/taming-transformers. Hub: the tokenizer of
facebook/chameleon-7b (its names, without a decoder).

    pixels -> pyramid -> 1x1 -> nearest entries (codes) -> 1x1 -> pyramid -> pixels

Training details kept here: straight-through gradient; commitment and codebook losses; small uniform entries, and
torch's own initialisation elsewhere; `picture_codec.AdversarialPictures` adds the patch discriminator with its hinge
loss and the adaptive weight, 0.8 of the ratio of the gradients on the decoder's last layer. The paper trains with
Adam at 4.5e-6 a picture of the batch, betas 0.5 and 0.9, and begins with the discriminator after some 10,000 to
250,000 steps: two stages here.

Deviations: the perceptual distance (LPIPS) is of networks that are not shipped: the training takes any other one. Codes
by moving averages, and FSQ, may stand in the place of the learned codebook.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from polymodal.core.errors import MediaError, UnsupportedError
from polymodal.core.sample import Sample
from polymodal.core.verbs import TensorSpec
from polymodal.modalities.image import HALF, Exact, ImageProcessor
from polymodal.systems.picture_codec import PictureCodec
from polymodal.systems.vqgan_files import read_vq, vq_rules, write_vq
from polymodal.tokenizers.pyramid import PyramidConfig
from polymodal.tokenizers.rvq import Coded
from polymodal.tokenizers.vq import LearnedCodes, VQConfig, VQModel
from polymodal.weights.fields import Fields
from polymodal.weights.format import Format, write_whole
from polymodal.weights.rules import Rule


def taming(*factors: int, codes: int, attention: int = 4) -> VQConfig:
    """A config of the official code, for pictures of 256 pixels."""
    net = PyramidConfig(widths=tuple(128 * n for n in factors), attention=(attention,))
    return VQConfig(net=net, codes=LearnedCodes(size=codes, commitment=1.0, codebook=0.25))


PRESETS = {
    "vqgan_imagenet_f16_1024": lambda: taming(1, 1, 2, 2, 4, codes=1024),
    "vqgan_imagenet_f16_16384": lambda: taming(1, 1, 2, 2, 4, codes=16384),
}


@final
class VQGAN(PictureCodec):
    """Pictures to codes and back."""

    config: VQConfig

    def __init__(self, config: VQConfig) -> None:
        super().__init__(config)
        self.codec = VQModel(config)
        self.factor, self.codebook_size = config.net.factor, config.codes.size
        if not config.paints:  # what only a decoder would train
            self.codec.post_quant_conv.requires_grad_(False)

    def init_weights(self) -> None:
        self.codec.init_weights()

    def inputs_spec(self) -> dict[str, TensorSpec]:
        c = self.config
        return {"pixels": TensorSpec(shape=(c.net.channels, c.resolution, c.resolution))}

    def default_images(self) -> ImageProcessor:
        side = self.config.resolution
        return ImageProcessor(resize=Exact(height=side, width=side), resample="bicubic", mean=HALF, std=HALF)

    def count(self, sample: Sample) -> int:
        """Codes of the pictures of a sample.

        Raises:
            MediaError: there is something else in it.
        """
        if len(sample.images) < len(sample.parts):
            raise MediaError("VQGAN makes codes of pictures; there is something else in the sample")
        return self.config.num_codes * len(sample.images)

    def autoencode(
        self, pixels: Float[Tensor, "batch channels *size"]
    ) -> tuple[Float[Tensor, "batch channels *size"], Float[Tensor, ""]]:
        made, coded = self.through(pixels)
        return made, coded.penalty

    def through(
        self, pixels: Float[Tensor, "batch channels height width"]
    ) -> tuple[Float[Tensor, "batch channels height width"], Coded]:
        """The pixels again, and the codes that they went through.

        Raises:
            MediaError: the sides are no multiples of a code's.
            UnsupportedError: the weights have no decoder.
        """
        self.check(pixels)
        self._must_paint()
        return self.codec(pixels)

    @torch.no_grad()
    def quantize(self, pixels: Float[Tensor, "batch channels height width"]) -> Int[Tensor, "batch rows columns"]:
        """Codes of pictures in [-1, 1]; errors as `through`."""
        self.check(pixels)
        return self.codec.encode(pixels.to(self.device))

    @torch.no_grad()
    def reconstruct(self, codes: Int[Tensor, "batch rows columns"]) -> Float[Tensor, "batch channels height width"]:
        """Pictures of codes; errors as `through`."""
        self._must_paint()
        return self.codec.decode(codes.to(self.device))

    def _must_paint(self) -> None:
        if not self.config.paints:
            raise UnsupportedError(f"these weights ({self.source}) have no decoder: they make codes, and no pictures")

    @property
    def last_layer(self) -> nn.Parameter:
        return self.codec.last_layer


def read_hf(raw: Mapping[str, Any]) -> tuple[VQConfig, dict[str, str]]:
    f = Fields(raw)
    config = read_vq(f)
    return config, f.done()


def write_hf(c: VQConfig) -> dict[str, Any]:
    return write_whole(c, {"architectures": ["ChameleonVQVAE"], **write_vq(c)}, read_hf)


def rules_hf(c: VQConfig) -> list[Rule]:
    return vq_rules("", "codec.", c)


VQGAN.formats = {"hf": Format(read=read_hf, write=write_hf, rules=rules_hf)}
