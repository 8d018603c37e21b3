"""Scores of pictures: how near two sets of them are (FID, KID), how well they fit a text, how near one is to another.

FID and KID compare features, so a number means something only beside its extractor's name: published ones are of
Inception's, ours of whatever model gives the vectors, and the two are never compared. Both are of this seed, this
number of pictures and this size; FID falls with the number of pictures, KID does not.

Source: FID: Heusel et al. 2017, https://arxiv.org/abs/1706.08500. KID: Binkowski et al. 2018,
https://arxiv.org/abs/1801.01401. CLIP score: Hessel et al. 2021, https://arxiv.org/abs/2104.08718 (as commonly said:
100 times the cosine). SSIM: Wang et al. 2004, with the Gaussian window of 11 pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from polymodal.core.errors import DataError
from polymodal.core.verbs import Embeds
from polymodal.evaluate.text_metrics import Estimate, estimate

SUBSETS: Final = 100  # that KID is the mean of
SUBSET: Final = 1000  # pictures of each
_WINDOW, _SIGMA = 11, 1.5


@dataclass(frozen=True, eq=False)
class Features:
    """Vectors of pictures, and the name of what gave them: "Inception-v3", "polymodal/nano-clip 1f3a..."."""

    extractor: str
    values: Float[Tensor, "pictures dim"]

    def __post_init__(self) -> None:
        if not bool(torch.isfinite(self.values).all()):
            raise DataError(f"features of {self.extractor} that are no numbers")


def features(
    model: Embeds, pictures: Any, *, name: str, batch_size: int = 64, progress: Callable[[int], None] | None = None
) -> Features:
    """What a model of ours gives to pictures, named with the fingerprint of its weights."""
    values = model.embed(pictures, batch_size=batch_size, progress=progress)
    return Features(f"{name} {model.fingerprint}", values)


@dataclass(frozen=True, kw_only=True)
class Distance:
    """How far two sets of pictures are apart: 0 for the same, by which extractor's features, of how many pictures.

    ``spread`` is the deviation over subsets (KID) or None.
    """

    value: float
    extractor: str
    pictures: tuple[int, int]
    spread: float | None = None

    def __str__(self) -> str:
        spread = "" if self.spread is None else f" +- {self.spread:.4f}"
        return (
            f"{self.value:.4f}{spread} ({self.extractor}; {self.pictures[0]:,} against {self.pictures[1]:,} pictures)"
        )


def frechet_distance(made: Features, real: Features) -> Distance:
    """FID: the distance of two normal distributions with the means and covariances of the features.

    Raises:
        DataError: the features are of two extractors, or a set has fewer than two pictures.
    """
    a, b = _two(made, real)
    apart = (a.mean(0) - b.mean(0)).square().sum()
    # The trace of the root of a product of covariances is the sum of the singular values of one factor of the first
    # times one of the second: those of a QR decomposition will do, and need no root of a matrix.
    one, other = (torch.linalg.qr((x - x.mean(0)) / (len(x) - 1) ** 0.5, mode="r").R for x in (a, b))
    root = torch.linalg.svdvals(one @ other.T).sum()
    value = apart + one.square().sum() + other.square().sum() - 2 * root
    return Distance(value=max(0.0, float(value)), extractor=made.extractor, pictures=(len(a), len(b)))


def kernel_distance(
    made: Features, real: Features, *, subsets: int = SUBSETS, size: int = SUBSET, seed: int = 0
) -> Distance:
    """KID: the unbiased squared discrepancy under a cubic kernel, the mean over subsets; it may be below 0.

    Raises:
        DataError: the features are of two extractors, or a set has fewer than two pictures.
    """
    a, b = _two(made, real)
    size, rng = min(size, len(a), len(b)), np.random.default_rng(seed)
    if size == len(a) == len(b):
        subsets = 1  # every subset would be the whole
    found = []
    for _ in range(subsets):
        x, y = (each[torch.from_numpy(rng.choice(len(each), size, replace=False))] for each in (a, b))
        within = [(k.sum() - k.diagonal().sum()) / (size * (size - 1)) for k in (_kernel(x, x), _kernel(y, y))]
        found.append(float(sum(within) - 2 * _kernel(x, y).mean()))
    spread = float(np.std(found)) if subsets > 1 else None
    return Distance(value=float(np.mean(found)), extractor=made.extractor, pictures=(len(a), len(b)), spread=spread)


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _two(made: Features, real: Features) -> tuple[Tensor, Tensor]:
    if made.extractor != real.extractor:
        raise DataError(f"features of {made.extractor} and of {real.extractor} cannot be compared")
    if min(len(made.values), len(real.values)) < 2:
        raise DataError(f"a distribution of {min(len(made.values), len(real.values))} pictures: two are the least")
    return made.values.double(), real.values.double()


def clip_score(
    pictures: Float[Tensor, "pictures dim"], texts: Float[Tensor, "pictures dim"], *, seed: int = 0
) -> Estimate:
    """100 times the cosine (0 where it is below) between each picture and its text, as a model sees both."""
    score = F.cosine_similarity(pictures.double(), texts.double()).clamp(min=0) * 100
    return estimate(score.tolist(), bounds=(0.0, 100.0), seed=seed)


def psnr(
    made: Float[Tensor, "pictures channels height width"], real: Float[Tensor, "pictures channels height width"]
) -> Float[Tensor, " pictures"]:
    """Decibels between the largest value, 1, and the root of the mean squared error; infinite for the same picture."""
    error = (made.double() - real.double()).square().flatten(1).mean(1)
    return (-10 * error.log10()).float()


def ssim(
    made: Float[Tensor, "pictures channels height width"], real: Float[Tensor, "pictures channels height width"]
) -> Float[Tensor, " pictures"]:
    """Structural similarity of pictures in [0, 1]; 1 for the same picture.

    Raises:
        DataError: a side has fewer than 11 pixels.
    """
    if min(made.shape[2:]) < _WINDOW:
        raise DataError(
            f"structural similarity of {made.shape[3]} x {made.shape[2]} pixels: {_WINDOW} x {_WINDOW} at least"
        )
    place = torch.arange(_WINDOW, dtype=torch.float64, device=made.device) - _WINDOW // 2
    weights = torch.exp(-place.square() / (2 * _SIGMA**2))
    weights = weights / weights.sum()

    def local(x: Tensor) -> Tensor:
        """Means under the window, where all of it is inside."""
        flat = x.flatten(0, 1)[:, None]
        return F.conv2d(F.conv2d(flat, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))

    x, y = made.double(), real.double()
    mean_x, mean_y = local(x), local(y)
    var_x, var_y, both = local(x * x) - mean_x**2, local(y * y) - mean_y**2, local(x * y) - mean_x * mean_y
    small, smaller = 0.01**2, 0.03**2
    like = (2 * mean_x * mean_y + small) * (2 * both + smaller)
    like = like / ((mean_x**2 + mean_y**2 + small) * (var_x + var_y + smaller))
    return like.view(len(x), -1).mean(1).float()
