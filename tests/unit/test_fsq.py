"""Finite scalar quantisation: every code is a point, every point is reached, gradients pass."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from polymodal.core.errors import ConfigError
from polymodal.tokenizers.fsq import FSQ, CosmosCodes, CosmosFSQ, FiniteCodes

KINDS = [pytest.param(FiniteCodes, id="paper"), pytest.param(CosmosCodes, id="cosmos")]


@pytest.mark.proves("cosmos_tokenizer", "FSQ: 64,000 codes of levels 8, 8, 8, 5, 5, 5, all of which round-trip")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("levels", [(8, 8, 8, 5, 5, 5), (3,), (2, 7), (8, 5, 5, 5), (4, 4)])
def test_every_code_round_trips(kind: type[FiniteCodes], levels: tuple[int, ...]) -> None:
    config = kind(levels=levels)
    assert config.size == math.prod(levels)
    assert config.size == 64_000 or len(levels) < 6
    fsq, codes = config.build(), torch.arange(config.size)
    numbers = fsq.numbers(codes)
    assert torch.equal(fsq.code(numbers), codes)
    assert len(numbers.unique(dim=0)) == config.size, "no two codes are one point"
    assert numbers.abs().max() <= 1
    digits = np.stack(np.unravel_index(np.arange(config.size), levels, order="F"), 1)  # the first is the fastest
    half = np.array(levels) // 2
    np.testing.assert_allclose(numbers.numpy(), (digits - half) / half, rtol=1e-6)
    grid = torch.arange(16).view(1, 2, 2, 4) % config.size
    assert fsq.decode(grid).shape == (1, len(levels), 2, 2, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_code_is_the_code_of_some_vector(kind: type[FiniteCodes]) -> None:
    fsq = kind(levels=(8, 5, 2, 3)).build()
    line = torch.linspace(-6, 6, 4001)
    for axis, levels in enumerate(fsq.config.levels):
        x = torch.zeros(1, 4, 4001)
        x[:, axis] = line
        digit = fsq.encode(x) // math.prod(fsq.config.levels[:axis]) % levels
        assert digit.unique().tolist() == list(range(levels))
        assert (digit.diff() >= 0).all(), "monotone"


def test_the_bound_is_that_of_the_paper() -> None:
    """An even number of levels is off centre by half a step; the outermost values are never quite reached."""
    fsq = FSQ(FiniteCodes(levels=(8, 5)))
    ends = fsq.bound(torch.tensor([[-50.0, -50.0], [50.0, 50.0]]))
    torch.testing.assert_close(ends, torch.tensor([[-3.9965, -1.998], [2.9965, 1.998]]))
    zero = fsq.bound(torch.zeros(1, 2))
    half = 3.5 * 0.999
    torch.testing.assert_close(zero, torch.tensor([[math.tanh(math.tan(0.5 / half)) * half - 0.5, 0.0]]))


def test_the_bound_of_cosmos() -> None:
    """Zero stays zero, and the outermost values are passed."""
    fsq = CosmosFSQ(CosmosCodes(levels=(8, 5)))
    torch.testing.assert_close(fsq.bound(torch.zeros(1, 2)), torch.zeros(1, 2), rtol=0, atol=1e-6)
    ends = fsq.bound(torch.tensor([[-50.0, -50.0], [50.0, 50.0]]))
    torch.testing.assert_close(ends, torch.tensor([[-4.0035, -2.002], [3.0035, 2.002]]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_bound(kind: type[FiniteCodes]) -> None:
    fsq, direction = kind(levels=(8, 5)).build(), torch.randn(3, 2, 4)
    x = torch.randn(3, 2, 4, requires_grad=True)
    out = fsq(x)
    (gradient,) = torch.autograd.grad((out.x * direction).sum(), x)
    bounded = fsq.bound(x.transpose(1, 2)).transpose(1, 2) / torch.tensor([4.0, 2.0])[:, None]
    (expected,) = torch.autograd.grad((bounded * direction).sum(), x)
    torch.testing.assert_close(gradient, expected)
    assert gradient.abs().min() > 0
    assert out.penalty == 0
    torch.testing.assert_close(out.x, fsq.decode(out.codes), rtol=0, atol=1e-6)


@pytest.mark.parametrize("levels", [(), (1, 5), (8,) * 11])
def test_levels_that_cannot_be(levels: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="levels"):
        FiniteCodes(levels=levels)
