"""What the tokenizers of pictures and films share: sizes, counts, training with and without a discriminator. Not a
system itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from polymodal.core.batch import Batch, Loss
from polymodal.core.errors import MediaError
from polymodal.systems.exact import ExactSystem
from polymodal.tokenizers.vq import PatchDiscriminator, adaptive_weight, hinge

C = TypeVar("C", bound="PictureCodec")


class PictureCodec(ExactSystem):
    """Base of the tokenizers of pictures ``batch channels height width`` (of films: with frames before the height) in
    [-1, 1]; a batch has them as ``pixels``."""

    # -- what subclasses give

    factor: int  # pixels along each side of a code's square

    def autoencode(
        self, pixels: Float[Tensor, "batch channels *size"]
    ) -> tuple[Float[Tensor, "batch channels *size"], Float[Tensor, ""]]:
        """The pixels again, and what the codes cost."""
        raise NotImplementedError

    @property
    def last_layer(self) -> nn.Parameter:
        """The weights that make pixels."""
        raise NotImplementedError

    # -- sizes

    def check(self, pixels: Float[Tensor, "batch channels *size"]) -> None:
        """Nothing is padded or cut.

        Raises:
            MediaError: the sides are no multiples of a code's.
        """
        height, width = pixels.shape[-2:]
        if height % self.factor or width % self.factor or not pixels.numel():
            raise MediaError(
                f"{type(self).__name__} reads pictures whose sides are multiples of {self.factor} pixels, not "
                f"{width} x {height}: resize or crop them"
            )

    # -- training without a discriminator; `AdversarialPictures` trains with one

    def forward(self, batch: Batch) -> Float[Tensor, "batch channels *size"]:
        return self.autoencode(batch["pixels"])[0]

    def loss(self, batch: Batch) -> Loss:
        """L1 of pixels, and what the codes cost."""
        made, penalty = self.autoencode(batch["pixels"])
        error = F.l1_loss(made, batch["pixels"])
        metrics = {"l1": error.detach(), "penalty": penalty.detach()}
        return Loss(total=batch.size * (error + penalty), weight=batch.size, metrics=metrics)


def frames(pixels: Float[Tensor, "batch channels *size"]) -> Float[Tensor, "pictures channels height width"]:
    """The pictures of films, as they are the pictures of pictures."""
    return rearrange(pixels, "b c t h w -> (b t) c h w") if pixels.ndim == 5 else pixels


class AdversarialPictures(nn.Module):
    """A tokenizer that learns, as ``codec``, beside the discriminator that it learns to deceive (VQGAN).

    One optimiser trains both, each with gradients of its own: what the discriminator says is differentiated as far as
    the pixels only, and handed on; its own hinge loss sees detached pixels. How much deceiving counts follows from the
    gradients on the decoder's last layer (`adaptive_weight`). In a stage that freezes the discriminator it is left out:
    VQGAN trains that way at first.

    Args:
        codec: learns to reconstruct.
        judge: learns to tell.
        perceptual: a frozen distance of made and true pictures, added to L1 with weight 1.
    """

    def __init__(self, codec: PictureCodec, judge: PatchDiscriminator, *, perceptual: nn.Module | None = None) -> None:
        super().__init__()
        self.codec, self.judge = codec, judge
        self.perceptual = None if perceptual is None else perceptual.requires_grad_(False)

    def loss(self, batch: Batch) -> Loss:
        """Reconstruction, the codes' price, deceiving by its adaptive weight, and the discriminator's hinge loss."""
        real = batch["pixels"]
        made, penalty = self.codec.autoencode(real)
        output = made.detach().requires_grad_()  # where the codec ends, and its losses begin
        error = F.l1_loss(output, real)
        if self.perceptual is not None:
            error = error + self.perceptual(frames(output), frames(real))
        (pull,) = torch.autograd.grad(error, output)
        metrics = {"reconstruction": error.detach(), "penalty": penalty.detach()}
        verdict = error.new_zeros(())
        if any(parameter.requires_grad for parameter in self.judge.parameters()):
            scores = self.judge(frames(output))
            (push,) = torch.autograd.grad(-scores.mean(), output, retain_graph=True)
            last = self.codec.last_layer
            ours, theirs = (torch.autograd.grad(made, last, g, retain_graph=True)[0] for g in (pull, push))
            weight = adaptive_weight(ours, theirs)
            pull = pull + weight * push
            verdict = hinge(self.judge(frames(real)), scores)
            metrics |= {"adversarial": -scores.detach().mean(), "weight": weight, "hinge": verdict.detach()}
        handed = (made * pull.detach()).sum()  # has the gradient
        codec = handed + (error - handed).detach()  # and the value that people can read
        return Loss(total=batch.size * (codec + penalty + verdict), weight=batch.size, metrics=metrics)

    # -- the rest of the verb Trains

    def after_step(self, step: int, total_steps: int) -> None:
        self.codec.after_step(step, total_steps)

    def no_decay(self) -> Iterable[str]:
        return [f"codec.{name}" for name in self.codec.no_decay()]

    def blocks(self) -> Iterable[nn.Module]:
        return self.codec.blocks()
