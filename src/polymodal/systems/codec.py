"""What the neural codecs share: the verb `Codes`, token counts, training with discriminators. Not a system itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polymodal.core.batch import Batch, Loss
from polymodal.core.errors import MediaError
from polymodal.core.sample import Sample
from polymodal.core.verbs import TensorSpec
from polymodal.heads.codec import Balancer, MultiScaleSpectrum, adversarial, feature_matching, hinge
from polymodal.modalities.audio import blocks
from polymodal.systems.exact import ExactSystem
from polymodal.tokenizers.rvq import Quantised
from polymodal.weights.format import Format

C = TypeVar("C", bound="Codec")


class Codec(ExactSystem):
    """Base of the codecs, for waveforms ``batch channels samples`` in [-1, 1]; a batch has them as ``wave``."""

    terms: ClassVar[Mapping[str, float]]  # weights of the losses of `reconstruction`, as the paper adds them up
    segment: ClassVar[float] = 1.0  # seconds of a training example

    # -- what subclasses give

    sample_rate: int
    channels: int
    hop: int  # samples a frame stands for
    num_codebooks: int
    codebook_size: int

    def latents(self, wave: Float[Tensor, "batch channels samples"]) -> Float[Tensor, "batch dim frames"]:
        """The encoder's vectors, ``frames(samples)`` of them."""
        raise NotImplementedError

    def autoencode(
        self, wave: Float[Tensor, "batch channels samples"]
    ) -> tuple[Float[Tensor, "batch channels samples"], Quantised]:
        """What the codec makes of waveforms, as long as they are, and what it went through."""
        raise NotImplementedError

    def reconstruction(
        self, made: Float[Tensor, "batch channels samples"], wave: Float[Tensor, "batch channels samples"]
    ) -> dict[str, Float[Tensor, ""]]:
        """How far one is from the other, by the names of ``terms``; means over the batch."""
        raise NotImplementedError

    # -- codes

    @property
    def frame_rate(self) -> float:
        """Frames of codes a second."""
        return self.sample_rate / self.hop

    def frames(self, samples: int) -> int:
        """How many frames a waveform of so many samples becomes: the one count that everybody uses."""
        return -(-samples // self.hop)

    def count(self, sample: Sample) -> int:
        """Codes of the sounds of a sample, at all codebooks. They are read through once, block by block."""
        lengths = [sum(b.shape[1] for b in blocks(a, self.sample_rate, 10, self.channels)) for a in sample.audios]
        return self.num_codebooks * sum(map(self.frames, lengths))

    def check(self, wave: Float[Tensor, "batch channels samples"]) -> None:
        if wave.shape[1] != self.channels or not wave.shape[2]:
            raise MediaError(
                f"{type(self).__name__} reads waveforms of {self.channels} channel(s) at {self.sample_rate} Hz, not "
                f"{wave.shape[1]} channel(s) of {wave.shape[2]} samples"
            )

    def inputs_spec(self) -> dict[str, TensorSpec]:
        return {"wave": TensorSpec(shape=(self.channels, round(self.segment * self.sample_rate)))}

    # -- weights

    def load_images(self, folder: Path, fmt: Format) -> None:
        """A preprocessor in these folders is one of sound; the config says it all."""

    # -- training without discriminators; `Adversarial` trains as the papers do

    def forward(self, batch: Batch) -> Float[Tensor, "batch channels samples"]:
        return self.autoencode(batch["wave"])[0]

    def loss(self, batch: Batch) -> Loss:
        """The weighted losses of reconstruction, and the codebooks' penalty."""
        made, quantised = self.autoencode(batch["wave"])
        parts = self.reconstruction(made, batch["wave"])
        total = torch.stack([self.terms[name] * part for name, part in parts.items()]).sum() + quantised.penalty
        metrics = {name: part.detach() for name, part in (parts | {"penalty": quantised.penalty}).items()}
        return Loss(total=batch.size * total, weight=batch.size, metrics=metrics)


class Adversarial(nn.Module):
    """A codec that learns, as ``codec``, beside the discriminators that it learns to deceive.

    One optimiser trains both, each with gradients of its own: the losses of the codec are differentiated as far as its
    output only, balanced there, and handed on; that of the discriminators sees a detached waveform. AdamW treats
    parameters one by one, so this is two optimisers. Clipping would tie both together: a stage has ``clip=None``. In a
    stage that freezes the discriminators they are left out, and the codec learns from its own losses alone.

    Args:
        adversarial, features: shares of the gradient at the output, beside those of the codec's ``terms``.
    """

    def __init__(
        self, codec: Codec, discriminators: MultiScaleSpectrum, *, adversarial: float = 4.0, features: float = 4.0
    ) -> None:
        super().__init__()
        self.codec, self.discriminators = codec, discriminators
        self.balancer = Balancer({"adversarial": adversarial, "features": features, **codec.terms})

    def loss(self, batch: Batch) -> Loss:
        """The balanced losses of the codec, its penalty outside the balance, and the discriminators' hinge loss."""
        wave = batch["wave"]
        made, quantised = self.codec.autoencode(wave)
        output = made.detach().float().requires_grad_()  # where the codec ends, and its losses begin
        parts, verdict = self.codec.reconstruction(output, wave), output.new_zeros(())
        if any(parameter.requires_grad for parameter in self.discriminators.parameters()):
            real, fake = self.discriminators(wave), self.discriminators(output)
            parts |= {"adversarial": adversarial(fake), "features": feature_matching(real, fake)}
            verdict = hinge(real, fake)
        handed = (made * self.balancer(parts, output)).sum()  # has the balanced gradient
        value = torch.stack([self.balancer.weights[name] * part for name, part in parts.items()]).sum()
        codec = handed + (value - handed).detach()  # and the value that people can read
        metrics = parts | {"penalty": quantised.penalty, "hinge": verdict}
        return Loss(
            total=batch.size * (codec + quantised.penalty + verdict),
            weight=batch.size,
            metrics={name: part.detach() for name, part in metrics.items()},
        )

    # -- the rest of the verb Trains

    def after_step(self, step: int, total_steps: int) -> None:
        self.codec.after_step(step, total_steps)

    def no_decay(self) -> Iterable[str]:
        return [f"codec.{name}" for name in self.codec.no_decay()]

    def blocks(self) -> Iterable[nn.Module]:
        return self.codec.blocks()
