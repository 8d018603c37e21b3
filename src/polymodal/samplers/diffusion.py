"""Going back through the steps of a diffusion: DDPM draws anew at each, DDIM is determined by its beginning.

Source: Ho et al. 2020, https://arxiv.org/abs/2006.11239; Song et al. 2020, https://arxiv.org/abs/2010.02502. Steps are
spaced as diffusers' "leading" has them: 0, n, 2n, ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from polymodal.nn.noise import Prediction, sample_and_noise

Denoiser: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(noisy data, step of each row) -> what the model predicts."""


def _backwards(total: int, steps: int) -> Iterator[tuple[int, int]]:
    """(step, the one it leads to); below zero there is no noise left."""
    assert 1 <= steps <= total, f"{steps} of {total} steps"
    stride = total // steps
    return ((step, step - stride) for step in range((steps - 1) * stride, -1, -stride))


def _estimated(
    denoiser: Denoiser, x: Tensor, now: int, left: Tensor, prediction: Prediction, clip: float | None
) -> tuple[Tensor, Tensor]:
    """The sample and the noise that the model sees in ``x``."""
    step = torch.full((len(x),), now, device=x.device)
    sample, rest = sample_and_noise(prediction, denoiser(x, step), x, step, left)
    return sample if clip is None else sample.clamp(-clip, clip), rest


def ddim(
    denoiser: Denoiser,
    noise: Float[Tensor, "batch *shape"],
    *,
    left: Float[Tensor, " total"],
    steps: int,
    prediction: Prediction = "noise",
    clip: float | None = 1.0,
) -> Float[Tensor, "batch *shape"]:
    """What noise becomes, always the same.

    Args:
        denoiser: the model.
        noise: of deviation one.
        left: the schedule that the model was trained with, see `nn.noise`.
        steps: how many of its steps are taken.
        prediction: what the model predicts.
        clip: the estimated sample is kept within plus and minus this at each step.
    """
    x = noise
    for now, then in _backwards(len(left), steps):
        sample, rest = _estimated(denoiser, x, now, left, prediction, clip)
        after = float(left[then]) if then >= 0 else 1.0
        x = after**0.5 * sample + (1 - after) ** 0.5 * rest
    return x


def ddpm(
    denoiser: Denoiser,
    noise: Float[Tensor, "batch *shape"],
    *,
    left: Float[Tensor, " total"],
    steps: int,
    prediction: Prediction = "noise",
    clip: float | None = 1.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch *shape"]:
    """What noise becomes, with new noise of the posterior's variance at each step but the last; see `ddim`."""
    x = noise
    for now, then in _backwards(len(left), steps):
        sample, _ = _estimated(denoiser, x, now, left, prediction, clip)
        before, after = float(left[now]), float(left[then]) if then >= 0 else 1.0
        kept = before / after
        x = after**0.5 * (1 - kept) / (1 - before) * sample + kept**0.5 * (1 - after) / (1 - before) * x
        if then >= 0:
            # On the generator's own device, so that a seed means the same on all.
            where = x.device if generator is None else generator.device
            fresh = torch.randn(x.shape, device=where, dtype=x.dtype, generator=generator)
            x = x + ((1 - after) / (1 - before) * (1 - kept)) ** 0.5 * fresh.to(x.device)
    return x
