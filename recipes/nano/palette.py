"""Where nano-draw's codes begin, and stay: as the most frequent squares of its pictures."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from polymodal.tokenizers.rvq import kmeans
from polymodal.tokenizers.vq import LearnedQuantizer, VQModel

SIDE = 4  # of a square, in pixels
VALUES = 3 * SIDE * SIDE
_PLAIN = 0.05  # deviation of colours in a square of one colour
_KEPT = 6  # for so many squares with an edge one of one colour is looked at: pictures have four times as many of these


@torch.no_grad()
def palette_(vision: VQModel, pixels: Float[Tensor, "pictures 3 height width"]) -> None:
    """Encoder and decoder pass squares as they are, and the codes are the centres of those of pictures.

    Squares drawn by a decoder from their mean colours are read right in 64 of 100 pictures, these in 99.
    """
    encoder, decoder = vision.encoder, vision.decoder
    assert isinstance(encoder, nn.Sequential)
    assert isinstance(decoder, nn.Sequential)
    halve, halve_again, last = (layer for layer in encoder if isinstance(layer, nn.Conv2d))
    double, double_again = (layer for layer in decoder if isinstance(layer, nn.ConvTranspose2d))
    for layer in (halve, halve_again, last, vision.quant_conv, vision.post_quant_conv, double, double_again):
        nn.init.zeros_(layer.weight)
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)
    for layers, channels in (((halve, double_again), 3), ((halve_again, double), 3 * SIDE)):
        for channel in range(channels):
            for place in range(4):  # of two by two; they stand in the middle of four by four
                kept, at = 4 * channel + place, (slice(None), slice(None), 1 + place // 2, 1 + place % 2)
                layers[0].weight[at][kept, channel] = layers[1].weight[at][kept, channel] = 1
    for layer in (last, vision.quant_conv, vision.post_quant_conv):
        nn.init.dirac_(layer.weight)
    for layer, above in ((halve, 1.0), (last, -1.0), (vision.post_quant_conv, 1.0), (double_again, -1.0)):
        assert layer.bias is not None
        nn.init.constant_(layer.bias, above)  # what is between passes rectifiers
    squares = rearrange(vision.latents(pixels), "b v r c -> (b r c) v")
    edge = rearrange(squares, "n (c p) -> n c p", c=3).std(2).sum(1) > _PLAIN
    plain = squares[~edge][:: max(1, int((~edge).sum()) * _KEPT // int(edge.sum()))]
    assert isinstance(vision.quantizer, LearnedQuantizer)
    vision.quantizer.entries.weight.copy_(kmeans(torch.cat([squares[edge], plain]), vision.quantizer.size)[0])
