"""Who judges what nano MusicGen and VALL-E made: statistics of spectra, and two judges that are fitted in closed form.

They have no luck and no schedule. They are fitted to other pieces, or to other voices and sentences, than they are
asked about.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from polymodal.modalities.mel import WhisperMel

AXES = 40  # of voices: what differs less than along these is noise
SHRUNK = 0.1  # towards a covariance without correlations: there are fewer sounds than one with them needs
WIDTH = 1.0  # of a kernel: the mean of squared differences of standardised statistics at which likeness is 1 / e
RIDGE = 1e-2


def statistics(wave: Float[Tensor, " samples"]) -> Float[Tensor, " features"]:
    """Of a sound at 16 kHz while it sounds: each log-mel band's mean, spread, and mean change from frame to frame."""
    mels = WhisperMel().whole(wave[None])[0]
    loud = mels.mean(0)
    mels = mels[:, loud > loud.max() - 0.75]  # of 30 dB below the loudest
    change = mels.diff(dim=1, prepend=mels[:, :1]).abs()
    return torch.cat([mels.mean(1), mels.std(1, correction=0), change.mean(1)])


@dataclass(frozen=True)
class Namer:
    """Says what kind a sound is of: regression of the kinds on Gaussian kernels around the sounds that it knows."""

    mean: Float[Tensor, " features"]
    scale: Float[Tensor, " features"]
    known: Float[Tensor, "sounds features"]
    weights: Float[Tensor, "sounds kinds"]

    @classmethod
    def fit(cls, x: Float[Tensor, "sounds features"], kinds: Int[Tensor, " sounds"]) -> Namer:
        """To sounds and the numbers of their kinds."""
        mean, scale = x.mean(0), x.std(0) + 1e-4
        known = (x - mean) / scale
        wanted = F.one_hot(kinds).float()
        kernel = likeness(known, known) + RIDGE * torch.eye(len(x))
        return cls(mean, scale, known, torch.linalg.solve(kernel.double(), (wanted - wanted.mean(0)).double()).float())

    def names(self, x: Float[Tensor, "sounds features"]) -> Int[Tensor, " sounds"]:
        return (likeness((x - self.mean) / self.scale, self.known) @ self.weights).argmax(1)


def likeness(
    x: Float[Tensor, "sounds features"], others: Float[Tensor, "others features"]
) -> Float[Tensor, "sounds others"]:
    """Gaussian kernels."""
    return torch.exp(-torch.cdist(x, others).square() / (WIDTH * x.shape[1]))


@dataclass(frozen=True)
class Comparer:
    """Says how alike two sounds are: cosines of Fisher's discriminants, along which one kind differs by mere noise."""

    mean: Float[Tensor, " features"]
    matrix: Float[Tensor, "features axes"]

    @classmethod
    def fit(cls, x: Float[Tensor, "sounds features"], kinds: Int[Tensor, " sounds"]) -> Comparer:
        """To sounds and the numbers of their kinds, every one of which occurs."""
        x = x.double()
        mean, counts = x.mean(0), torch.bincount(kinds)
        means = x.new_zeros(len(counts), x.shape[1]).index_add_(0, kinds, x) / counts[:, None]
        within = (x - means[kinds]).T @ (x - means[kinds]) / (len(x) - len(counts))
        within = (1 - SHRUNK) * within + SHRUNK * within.diag().diag() + 1e-9 * torch.eye(len(within))
        white = torch.linalg.inv(torch.linalg.cholesky(within)).T
        axes = torch.linalg.svd((means - mean) @ white, full_matrices=False)[2][: min(AXES, len(counts) - 1)]
        return cls(mean.float(), (white @ axes.T).float())

    def alike(
        self, x: Float[Tensor, "sounds features"], others: Float[Tensor, "others features"]
    ) -> Float[Tensor, "sounds others"]:
        """Cosines."""
        mine, theirs = (F.normalize((each - self.mean) @ self.matrix, dim=1) for each in (x, others))
        return mine @ theirs.T
