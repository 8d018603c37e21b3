"""Denoising diffusion: what was added to the data, or the data themselves, from noisy ones.

Source: Ho et al. 2020, https://arxiv.org/abs/2006.11239. Schedules, predictions and weights are those of `nn.noise`.
`edm_loss` is Karras et al.'s, 2022, https://arxiv.org/abs/2206.00364.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from polymodal.core.batch import Loss
from polymodal.heads.action import masked
from polymodal.nn.edm import Preconditioning, broad
from polymodal.nn.noise import Prediction, add_noise, min_snr_weight, target

Denoiser: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(noisy data, the step of each row) -> the prediction."""


def diffusion_loss(
    denoiser: Denoiser,
    x: Float[Tensor, "batch *shape"],
    *,
    left: Float[Tensor, " steps"],
    prediction: Prediction = "noise",
    mask: Bool[Tensor, "batch ..."] | None = None,
    generator: torch.Generator | None = None,
    gamma: float | None = None,
    noise: Float[Tensor, "batch *shape"] | None = None,
    step: Int[Tensor, " batch"] | None = None,
) -> Loss:
    """Squared error of the prediction at one drawn step a row; summed over the values that ``mask`` keeps.

    Args:
        denoiser: the model.
        x: data of any shape.
        left: the schedule, see `nn.noise`.
        prediction: what the model predicts.
        mask: True for values that are learned; it broadcasts to ``x``.
        generator: seeds noise and steps.
        gamma: weighs errors by `nn.noise.min_snr_weight`; None weighs all alike.
        noise: instead of what would be drawn.
        step: instead of the steps that would be drawn.
    """
    if noise is None:
        noise = torch.randn(x.shape, device=x.device, dtype=x.dtype, generator=generator)
    if step is None:
        step = torch.randint(len(left), (len(x),), device=x.device, generator=generator)
    predicted = denoiser(add_noise(x, noise, step, left), step)
    error = (predicted.float() - target(prediction, x, noise, step, left)).square()
    if gamma is not None:
        error = error * min_snr_weight(prediction, step, left, gamma).view(-1, *[1] * (x.ndim - 1))
    return masked(error, mask)


def edm_loss(
    denoiser: Denoiser,
    x: Float[Tensor, "batch *shape"],
    scaling: Preconditioning,
    *,
    noise: Float[Tensor, "batch *shape"] | None = None,
    offset: Float[Tensor, "batch channels ..."] | None = None,
    deviation: Float[Tensor, " batch"] | None = None,
) -> tuple[Loss, Float[Tensor, "batch *shape"]]:
    """Squared error of what the network says, which weighs all deviations alike; and the estimate of ``x``.

    Args:
        denoiser: (scaled noisy data, what it is told of the noise of each row) -> what it says.
        x: data.
        scaling: how the network reads and speaks.
        noise: instead of what would be drawn.
        offset: noise that all pixels of a channel share, instead of what would be drawn.
        deviation: of the noise of each row, likewise.
    """
    deviation = scaling.draw(len(x), x.device) if deviation is None else deviation
    noise = torch.randn_like(x) if noise is None else noise
    noisy = x + broad(deviation, x) * noise
    if scaling.offset:
        shared = x.new_zeros(*x.shape[:2], *[1] * (x.ndim - 2))
        noisy = noisy + scaling.offset * (torch.randn_like(shared) if offset is None else offset)
    kept, added = (broad(part(deviation), x) for part in (scaling.kept, scaling.added))
    said = denoiser(broad(scaling.reads(deviation), x) * noisy, scaling.told(deviation)).float()
    loss = masked((said - (x - kept * noisy) / added).square(), None)
    return loss, (kept * noisy + added * said).detach()
