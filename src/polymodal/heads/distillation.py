"""Self-distillation with a moving-average teacher: DINO's head and the losses of DINO, iBOT and KoLeo."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from polymodal.core.distributed import gather_with_grad
from polymodal.core.errors import DataError


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """What DINOv2 is trained for; the defaults are those of the official ViT-L/14.

    Crops are square, in pixels. ``warmup`` and ``frozen`` are shares of the run: how long the teacher's temperature
    rises from the first to the second of ``temperatures``, and how long the last layers of the heads stay as they are.
    """

    global_size: int = 224
    local_size: int = 98
    num_locals: int = 8
    num_prototypes: int = 131072
    hidden_dim: int = 2048
    bottleneck_dim: int = 384
    ibot_bottleneck_dim: int = 256
    student_temperature: float = 0.1
    temperatures: tuple[float, float] = (0.04, 0.07)
    momentum: float = 0.994
    koleo_weight: float = 0.1
    warmup: float = 30 / 500
    frozen: float = 1 / 500

    def momentum_at(self, step: int, total_steps: int) -> float:
        """The teacher's momentum after ``step`` (from 0): from ``momentum`` to 1 along half a cosine."""
        return 1 + (self.momentum - 1) * (1 + math.cos(math.pi * step / total_steps)) / 2

    def temperature_at(self, step: int, total_steps: int) -> float:
        """The teacher's temperature in ``step`` (from 0)."""
        low, high = self.temperatures
        last = round(self.warmup * total_steps) - 1
        return low + (high - low) * step / last if step < last else high


class PrototypeHead(nn.Module):
    """A three-layer MLP to a unit vector of ``bottleneck_dim``, then a weight-normed linear layer without bias.

    Row i of the last layer is ``scale[i]`` times a unit vector, so that a prototype cannot win by its length alone.

    Source: facebookresearch/dinov2, dino_head.py.
    """

    def __init__(self, dim: int, hidden_dim: int, bottleneck_dim: int, num_prototypes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        self.prototypes = nn.Parameter(torch.empty(num_prototypes, bottleneck_dim))
        self.scale = nn.Parameter(torch.empty(num_prototypes, 1))  # two axes: it takes weight decay, as a weight does

    @torch.no_grad()
    def init_weights(self) -> None:
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        nn.init.kaiming_uniform_(self.prototypes, a=5**0.5)  # torch's default for a linear layer
        nn.init.ones_(self.scale)

    def forward(self, x: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows prototypes"]:
        unit = F.normalize(self.mlp(x), dim=-1, eps=1e-6)
        return F.linear(unit, (self.scale * F.normalize(self.prototypes, dim=-1)).to(unit.dtype))


def prototype_heads(dim: int, config: DistillationConfig) -> nn.ModuleDict:
    """The heads of one network: ``dino`` for class tokens and, separate, ``ibot`` for patches."""
    widths = {"dino": config.bottleneck_dim, "ibot": config.ibot_bottleneck_dim}
    return nn.ModuleDict(
        {name: PrototypeHead(dim, config.hidden_dim, width, config.num_prototypes) for name, width in widths.items()}
    )


@torch.no_grad()
def sinkhorn_knopp(
    logits: Float[Tensor, "rows prototypes"], temperature: float | Float[Tensor, ""], iterations: int = 3
) -> Float[Tensor, "rows prototypes"]:
    """Soft assignments of rows to prototypes in which every prototype gets about the same share of all ranks' rows.

    Alternates between giving every prototype the same total and giving every row the total one, and ends with the
    rows. Ranks may hold different numbers of rows. In logarithms: the exponentials of ``logits / temperature``
    overflow fp32 when the prototypes grow.

    Source: Caron et al. 2020, https://arxiv.org/abs/2006.09882.
    """
    log = logits.float() / temperature
    for _ in range(iterations):
        log = log - gather_with_grad(log.logsumexp(0, keepdim=True)).logsumexp(0)
        log = log - log.logsumexp(1, keepdim=True)
    return log.exp()


def distillation(
    student: Float[Tensor, "... prototypes"], teacher: Float[Tensor, "... prototypes"], temperature: float
) -> Float[Tensor, "..."]:
    """Cross-entropy of the student's softmax at ``temperature`` against the teacher's probabilities."""
    return -(teacher * F.log_softmax(student.float() / temperature, dim=-1)).sum(-1)


def masked_mean(losses: Float[Tensor, " masked"], masks: Bool[Tensor, "pictures patches"]) -> Float[Tensor, ""]:
    """Mean over the masked patches of each picture, then summed over pictures (one without masked patches adds zero).

    ``losses`` has one entry for each True of ``masks``, in row order.
    """
    weights = 1 / masks.sum(1, keepdim=True).clamp_min(1)
    return (losses * weights.expand_as(masks)[masks]).sum()


def koleo(x: Float[Tensor, "rows dim"]) -> Float[Tensor, ""]:
    """Minus the mean logarithm of the distance from each unit vector to its nearest neighbour among the rows.

    Give it one view of each picture: two views of one picture must not repel each other.

    Source: Sablayrolles et al. 2018, https://arxiv.org/abs/1806.03198.

    Raises:
        DataError: there is one row only, which has no neighbour.
    """
    if x.shape[0] < 2:
        raise DataError("the KoLeo loss compares the pictures of a micro-batch with each other: it needs two or more")
    with torch.autocast(x.device.type, enabled=False):
        unit = F.normalize(x.float(), dim=-1, eps=1e-8)
        with torch.no_grad():
            nearest = (unit @ unit.T).fill_diagonal_(-2).argmax(1)
        return -(F.pairwise_distance(unit, unit[nearest], eps=1e-8) + 1e-8).log().mean()
