"""Codes of pictures: codebooks of three kinds, their losses, the autoencoders around them, the adversarial weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from polymodal.core.errors import ConfigError
from polymodal.tokenizers.fsq import FiniteCodes
from polymodal.tokenizers.pyramid import PlainConfig, PyramidConfig, last_layer
from polymodal.tokenizers.rvq import DEAD
from polymodal.tokenizers.vq import (
    AveragedCodes,
    LearnedCodes,
    PatchDiscriminator,
    VQConfig,
    VQModel,
    adaptive_weight,
    hinge,
)

DIM = 4
CODES: dict[str, Any] = {
    "learned": LearnedCodes(size=16, dim=DIM),
    "averaged": AveragedCodes(size=16, dim=DIM),
    "finite": FiniteCodes(levels=(4, 3, 3)),
}
NETS: dict[str, Any] = {
    "pyramid": PyramidConfig(widths=(8, 16), num_blocks=1, attention=(1,), latent_dim=6, groups=4),
    "plain": PlainConfig(latent_dim=12),
}


def clouds(rows: int = 8, side: int = 8, seed: int = 0) -> Tensor:
    """Vectors of 12 tight clouds, on a grid."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(12, DIM, generator=torch.Generator().manual_seed(9)) * 3
    which = torch.randint(12, (rows, side, side), generator=generator)
    return (centres[which] + 0.05 * torch.randn(rows, side, side, DIM, generator=generator)).permute(0, 3, 1, 2)


@pytest.mark.proves("vqgan", "codes: the nearest entry, a straight-through gradient, the two losses by their weights")
def test_learned_codes_by_hand() -> None:
    quantizer = LearnedCodes(size=5, dim=DIM, commitment=0.3, codebook=0.7).build()
    quantizer.reset()
    assert quantizer.entries.weight.abs().max() <= 1 / 5
    x = torch.randn(2, DIM, 3, 2, requires_grad=True)
    out = quantizer(x)
    rows = x.detach().permute(0, 2, 3, 1).reshape(-1, DIM)
    codes = torch.cdist(rows, quantizer.entries.weight).argmin(1)
    assert torch.equal(out.codes.flatten(), codes)
    torch.testing.assert_close(out.x, quantizer.decode(out.codes))
    direction = torch.randn_like(x)
    torch.testing.assert_close(torch.autograd.grad((out.x * direction).sum(), x, retain_graph=True)[0], direction)
    error = (rows - quantizer.entries.weight[codes]).pow(2).mean()
    torch.testing.assert_close(out.penalty, error)
    pull, entries = torch.autograd.grad(out.penalty, [x, quantizer.entries.weight])
    difference = x.detach() - quantizer.decode(out.codes).detach()
    torch.testing.assert_close(pull, 0.3 * 2 * difference / x.numel())
    expected = torch.zeros(5, DIM).index_add(0, codes, -0.7 * 2 * difference.permute(0, 2, 3, 1).reshape(-1, DIM))
    torch.testing.assert_close(entries, expected / x.numel())


@pytest.mark.proves("vqgan", "codes: moving averages start by k-means, follow the data, and replace the dead")
def test_averaged_codes_learn() -> None:
    torch.manual_seed(0)
    quantizer, held_out = AveragedCodes(size=48, dim=DIM).build().train(), clouds(seed=7)
    quantizer.reset()

    def error() -> float:
        return float((quantizer.decode(quantizer.encode(held_out)) - held_out).pow(2).mean())

    before = error()
    quantizer(clouds())
    assert error() < 0.2 * before, "k-means"
    for step in range(30):
        quantizer(clouds(seed=step))
    assert error() < 0.01
    with torch.no_grad():
        quantizer.book.entries[3], quantizer.book.counts[3] = 1000.0, 0.0
    x = clouds(seed=50)
    quantizer(x)
    rows = x.permute(0, 2, 3, 1).reshape(-1, DIM)
    assert (quantizer.book.entries[3] - rows).abs().sum(1).min() == 0
    assert quantizer.book.counts[3] == DEAD
    state = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    quantizer.eval()(x)
    quantizer.train().encode(x)
    assert all(torch.equal(tensor, state[name]) for name, tensor in quantizer.state_dict().items())
    assert not list(quantizer.parameters())


def test_averaged_codes_cost_commitment_alone() -> None:
    quantizer = CODES["averaged"].build().eval()
    x = clouds().requires_grad_()
    out = quantizer(x)
    torch.testing.assert_close(out.penalty, 0.25 * F.mse_loss(x, quantizer.decode(out.codes)))
    (gradient,) = torch.autograd.grad(out.x.sum(), x)
    torch.testing.assert_close(gradient, torch.ones_like(x))


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("codes", CODES)
def test_pictures_become_codes_and_pictures_again(net: str, codes: str) -> None:
    torch.manual_seed(0)
    config = VQConfig(net=NETS[net], codes=CODES[codes], resolution=16)
    model = VQModel(config)
    model.init_weights()
    pixels = torch.rand(3, 3, 16, 24) * 2 - 1
    made, coded = model.eval()(pixels)
    factor = config.net.factor
    assert made.shape == pixels.shape
    assert coded.codes.shape == (3, 16 // factor, 24 // factor)
    assert config.num_codes == (16 // factor) ** 2
    assert 0 <= int(coded.codes.min()) <= int(coded.codes.max()) < config.codes.size
    assert torch.equal(model.encode(pixels), coded.codes)
    torch.testing.assert_close(model.decode(coded.codes), made, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.encode(pixels[1:2])[0], coded.codes[1]), "alone as in a batch"
    made.square().mean().backward()
    assert model.encoder.get_parameter(next(n for n, _ in model.encoder.named_parameters())).grad is not None


def test_published_shapes() -> None:
    """VQGAN f16 of the official code, and VQ-VAE of the paper: 32 x 32 codes of a picture of ImageNet."""
    assert PyramidConfig().factor == 16
    assert VQConfig(net=PlainConfig(), resolution=128).grid == 32
    plain = PlainConfig()
    with torch.device("meta"):
        shapes = [tuple(p.shape) for p in plain.encoder().parameters() if p.ndim == 4]
    assert shapes[:2] == [(256, 3, 4, 4), (256, 256, 4, 4)]
    assert shapes[2:6] == [(256, 256, 3, 3), (256, 256, 1, 1)] * 2


@pytest.mark.proves("vqgan", "adversarial weight: the ratio of the gradients on the decoder's last layer, by hand")
def test_the_adaptive_weight() -> None:
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    expected = 0.8 * a.norm() / (b.norm() + 1e-4)
    torch.testing.assert_close(adaptive_weight(a, b), expected)
    assert adaptive_weight(a, b * 0) == pytest.approx(0.8 * min(1e4, float(a.norm()) / 1e-4))
    assert adaptive_weight(a * 1e9, b * 1e-9) == pytest.approx(0.8 * 1e4)
    assert not adaptive_weight(a.requires_grad_(), b).requires_grad


@pytest.mark.parametrize("net", NETS)
def test_the_last_layer_makes_pixels(net: str) -> None:
    weight = last_layer(NETS[net].decoder())
    assert 3 in weight.shape[:2]


@pytest.mark.proves("vqgan", "discriminator: patches, hinge loss, its published size and initialisation")
def test_the_discriminator() -> None:
    torch.manual_seed(0)
    judge = PatchDiscriminator()
    assert judge(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)
    assert sum(p.numel() for p in judge.parameters()) == 2_765_633
    weights = torch.cat([p.detach().flatten() for n, p in judge.named_parameters() if p.ndim == 4])
    assert float(weights.std()) == pytest.approx(0.02, rel=0.02)
    real, made = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 0.5])
    assert float(hinge(real, made)) == pytest.approx(0.5 * (0.5 + 0.75))
    touched = torch.zeros(1, 3, 256, 256, requires_grad=True)
    judge.eval()(touched)[0, 0, 15, 15].backward()
    assert touched.grad is not None
    seen = touched.grad[0, 0].nonzero()
    assert (seen.max(0).values - seen.min(0).values + 1).tolist() == [70, 70], "patches of 70 pixels"


@pytest.mark.parametrize("wrong", [{"widths": (10,), "groups": 4}, {"widths": ()}, {"attention": (7,)}])
def test_nets_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        PyramidConfig(**wrong)
    with pytest.raises(ConfigError):
        VQConfig(net=PlainConfig(), resolution=30)
