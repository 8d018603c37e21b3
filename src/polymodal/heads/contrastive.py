"""Heads of the dual encoders: how two unit vectors become a score, and the loss, equal on one rank and on many."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from polymodal.core.batch import Loss
from polymodal.core.distributed import gather_with_grad, rank, ring_shift, world_size


class ContrastiveHead(nn.Module):
    """CLIP's: a learned scale, stored as its logarithm, and symmetric cross-entropy over the pairs of a batch.

    Source: Radford et al. 2021, https://arxiv.org/abs/2103.00020, section 2.5 and figure 3.
    """

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @torch.no_grad()
    def clamp(self) -> None:
        """Keeps the scale within 1 to 100; called after each optimiser step."""
        self.logit_scale.clamp_(0, math.log(100))

    def logits(
        self, images: Float[Tensor, "images dim"], texts: Float[Tensor, "texts dim"]
    ) -> Float[Tensor, "images texts"]:
        """Scaled cosines; their softmax over texts is the zero-shot probability."""
        return self.logit_scale.float().exp() * images @ texts.T

    def loss(self, images: Float[Tensor, "batch dim"], texts: Float[Tensor, "batch dim"]) -> Loss:
        """Each rank scores its own rows against the columns of all ranks.

        That equals the loss of one big batch only because the gradient flows back through the gather.
        """
        local = images.shape[0]
        labels = torch.arange(local, device=images.device) + rank() * local
        by_image = self.logits(images, gather_with_grad(texts))
        by_text = self.logits(texts, gather_with_grad(images))
        total = (
            F.cross_entropy(by_image, labels, reduction="sum") + F.cross_entropy(by_text, labels, reduction="sum")
        ) / 2
        right = (by_image.detach().argmax(1) == labels).float().mean()
        return Loss(total=total, weight=local, metrics={"accuracy": right, "scale": self.logit_scale.detach().exp()})


class TwoWayHead(nn.Module):
    """CLAP's: as CLIP's, with a scale for each direction.

    Source: Wu et al. 2022, https://arxiv.org/abs/2211.06687, and the official code.
    """

    def __init__(self) -> None:
        super().__init__()
        self.media_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.text_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @torch.no_grad()
    def clamp(self) -> None:
        """Keeps both scales within 1 to 100; called after each optimiser step."""
        for scale in (self.media_scale, self.text_scale):
            scale.clamp_(0, math.log(100))

    def logits(
        self, media: Float[Tensor, "media dim"], texts: Float[Tensor, "texts dim"]
    ) -> Float[Tensor, "media texts"]:
        """Scaled cosines; their softmax over texts is the zero-shot probability."""
        return self.media_scale.float().exp() * media @ texts.T

    def loss(self, media: Float[Tensor, "batch dim"], texts: Float[Tensor, "batch dim"]) -> Loss:
        """Each rank scores its own rows against the columns of all ranks, as in `ContrastiveHead`."""
        local = media.shape[0]
        labels = torch.arange(local, device=media.device) + rank() * local
        by_media = self.logits(media, gather_with_grad(texts))
        by_text = self.text_scale.float().exp() * texts @ gather_with_grad(media).T
        losses = [F.cross_entropy(scores, labels, reduction="sum") for scores in (by_media, by_text)]
        right = (by_media.detach().argmax(1) == labels).float().mean()
        metrics = {"accuracy": right, "scale": self.media_scale.detach().exp()}
        return Loss(total=sum(losses, media.new_zeros(())) / 2, weight=local, metrics=metrics)


class SigmoidHead(nn.Module):
    """SigLIP's: a learned scale and bias, and a yes/no question for every pair: +1 on the diagonal, -1 elsewhere.

    Source: Zhai et al. 2023, https://arxiv.org/abs/2303.15343, algorithm 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor([math.log(10)]))
        self.logit_bias = nn.Parameter(torch.tensor([-10.0]))

    def logits(
        self, images: Float[Tensor, "images dim"], texts: Float[Tensor, "texts dim"]
    ) -> Float[Tensor, "images texts"]:
        """Scaled, shifted cosines; the sigmoid of each is the probability that the pair belongs together."""
        return self.logit_scale.float().exp() * images @ texts.T + self.logit_bias.float()

    def loss(self, images: Float[Tensor, "batch dim"], texts: Float[Tensor, "batch dim"]) -> Loss:
        """The sum over all pairs of the global batch, divided by the number of rows, not of pairs.

        Across ranks the text shards go round a ring, so that a rank never holds more than two of them.
        """
        logits = self.logits(images, texts)
        # -logsigmoid(-x) for all pairs, and the diagonal corrected: -logsigmoid(x) = -logsigmoid(-x) - x.
        total = F.softplus(logits).sum() - logits.diagonal().sum()
        other = texts
        for _ in range(world_size() - 1):
            other = ring_shift(other)
            total = total + F.softplus(self.logits(images, other)).sum()
        right = (logits.detach().argmax(1) == torch.arange(len(logits), device=logits.device)).float().mean()
        metrics = {"accuracy": right, "scale": self.logit_scale.detach().exp()[0], "bias": self.logit_bias.detach()[0]}
        return Loss(total=total, weight=images.shape[0], metrics=metrics)
