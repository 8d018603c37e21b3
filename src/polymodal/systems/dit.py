"""DiT: pictures of a class, out of noise that a Transformer takes off the latents of an autoencoder.

Paper: Peebles & Xie, "Scalable Diffusion Models with Transformers", 2022, https://arxiv.org/abs/2212.09748. Official
code: facebookresearch/DiT. Hub: facebook/DiT-XL-2-256, facebook/DiT-XL-2-512.

    noisy latents -> patches of 2 x 2 + places (fixed sines) -> 28 blocks -> noise, and variance, of each value
    step -> waves -> MLP --+-> scale, shift and gate of every layer (adaLN-Zero)
    class -> a vector -----+
    latents -> the autoencoder's decoder (frozen) -> pixels

Training details kept here: every gate and the output start at exactly zero, the rest as in the official code; 1,000
steps whose betas grow evenly from 0.0001 to 0.02; the loss is the squared error of the noise and, for the variance
alone, the variational bound in bits (improved diffusion's hybrid); one class in ten is replaced by none; latents are
drawn from the posterior and multiplied by 0.18215. The paper trains with AdamW at 1e-4, no weight decay, batches of
256, flips as its only augmentation, and keeps a moving average of the weights at 0.9999, which is what its files hold.

Deviations: guidance is that of all channels, as in the paper and in diffusers; the official script guides the first
three of four. Pictures are drawn without the learned variance (diffusers drops it, too). Files of diffusers are read as
it computes them, with an epsilon of 1e-5 before the feed-forward layers and the step's waves spaced by 1/127; the
official code has 1e-6 and 1/128, and so have the presets (their files say ``freq_shift`` 0, which diffusers ignores).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from polymodal.backbones.dit import DiTBackbone, DiTBackboneConfig, dit_rules, read_dit, write_dit
from polymodal.core.batch import Batch, Loss
from polymodal.core.errors import ConfigError, MediaError, did_you_mean
from polymodal.core.sample import Sample
from polymodal.core.verbs import TensorSpec
from polymodal.heads.reconstruction import unpatchify
from polymodal.heads.variational import variance_bound
from polymodal.nn.noise import Schedule, add_noise
from polymodal.samplers.diffusion import Diffusion
from polymodal.systems.latent_painting import LatentPainter
from polymodal.systems.painting import Condition
from polymodal.systems.scheduler_files import read_scheduler, write_scheduler
from polymodal.systems.vae_files import CLASS as VAE_CLASS
from polymodal.systems.vae_files import read_vae, vae_rules, write_vae
from polymodal.tokenizers.pyramid import PyramidConfig
from polymodal.tokenizers.vae import VAE, VAEConfig
from polymodal.weights.fields import Fields
from polymodal.weights.format import Format, write_whole
from polymodal.weights.pipeline import DIFFUSION, diffusers_part, part, pipeline
from polymodal.weights.rules import Rule

PIPELINE: Final = "DiTPipeline"
TRANSFORMER: Final = "DiTTransformer2DModel"
LINEAR: Final = Diffusion(schedule=Schedule(curve="linear", first=1e-4, last=0.02))


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """A Transformer over latents, their autoencoder, how it was trained, and what the classes are called.

    ``labels`` may be empty; a class may have several names, with commas between them.
    """

    backbone: DiTBackboneConfig
    vae: VAEConfig
    sampling: Diffusion = LINEAR
    labels: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.backbone.channels != self.vae.pyramid.latent_dim:
            raise ConfigError(
                f"a DiT of {self.backbone.channels} channels, and latents of {self.vae.pyramid.latent_dim}"
            )
        if len(self.labels) not in (0, self.backbone.num_classes):
            raise ConfigError(f"{len(self.labels)} names for {self.backbone.num_classes} classes")
        if self.sampling.prediction != "noise" or self.sampling.schedule.curve != "linear":
            raise ConfigError("DiT learns the noise of a schedule whose betas grow evenly")


@final
class DiT(LatentPainter):
    """A diffusion told by a class."""

    config: DiTConfig
    guidance = 4.0

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        self.backbone = DiTBackbone(config.backbone)
        self.vae = VAE(config.vae).requires_grad_(False)
        self.sampling: Diffusion = config.sampling
        names = enumerate(config.labels)
        self._ids = {name.strip().lower(): i for i, every in names for name in every.split(",")}

    def init_weights(self) -> None:
        """The official code's; the autoencoder is drawn as for its own training."""
        self.backbone.init_weights()
        self.vae.init_weights()

    def inputs_spec(self) -> dict[str, TensorSpec]:
        width, height = self.size
        return {
            "pixels": TensorSpec(shape=(self.config.vae.pyramid.channels, height, width)),
            "label": TensorSpec(shape=(), dtype=torch.int64, high=self.config.backbone.num_classes),
        }

    # -- classes

    def prompt(self, texts: Sequence[str]) -> Batch:
        """Classes by one of their names, or by number; the empty text is none.

        Raises:
            MediaError: there is no such class.
        """
        return Batch(label=torch.tensor([self._class(text) for text in texts]))

    def _class(self, text: str) -> int:
        count, name = self.config.backbone.num_classes, text.strip().lower()
        if not name:
            return count
        if name.isascii() and name.isdigit() and len(name) < 10 and int(name) < count:
            return int(name)
        if name not in self._ids:
            hint = did_you_mean(name, self._ids) if self._ids else ""
            raise MediaError(f"{text[:80]!r} is no class; this model paints classes 0 to {count - 1}{hint[:300]}")
        return self._ids[name]

    def drop(self, batch: Batch, rows: Bool[Tensor, " batch"]) -> Batch:
        return Batch(batch, label=batch["label"].masked_fill(rows, self.config.backbone.num_classes))

    def condition(self, batch: Batch) -> Condition:
        return Batch(label=batch["label"])

    # -- pictures

    @property
    def multiple(self) -> int:
        return self.config.backbone.patch_size * self.config.vae.pyramid.factor

    @property
    def size(self) -> tuple[int, int]:
        side = self.config.backbone.latent_size * self.config.vae.pyramid.factor
        return side, side

    def latents(self, size: tuple[int, int]) -> tuple[int, ...]:
        if size != self.size:
            raise ConfigError(
                f"this DiT paints {self.size[0]} x {self.size[1]} pixels alone, not {size[0]} x {size[1]}"
            )
        return super().latents(size)

    def places(self, size: tuple[int, int]) -> int:
        return (size[0] // self.multiple) * (size[1] // self.multiple)

    def count(self, sample: Sample) -> int:
        """Patches of pictures; classes are no tokens."""
        self.prompt([part.text for part in sample.texts] or [""])
        return self.places(self.size) * len(sample.images)

    def both(
        self, x: Float[Tensor, "batch *latents"], when: Float[Tensor, " batch"], condition: Condition
    ) -> Float[Tensor, "batch ..."]:
        """The noise and, behind it along the channels, what is said of its variance."""
        c = self.config.backbone
        return unpatchify(self.backbone(x, when, condition["label"]), c.patch_size, c.latent_size, c.latent_size)

    def denoise(
        self, x: Float[Tensor, "batch *latents"], when: Float[Tensor, " batch"], condition: Condition
    ) -> Float[Tensor, "batch *latents"]:
        return self.both(x, when, condition)[:, : self.config.backbone.channels]

    def loss(self, batch: Batch) -> Loss:
        """Squared error of the noise and, where variances are learned, the bound that they are learned by: a row's."""
        if self.config.backbone.out_channels == self.config.backbone.channels:
            return super().loss(batch)
        if self.training:
            chance = batch["chance"] if "chance" in batch else torch.randint(100, (batch.size,), device=self.device)
            batch = self.drop(batch, chance < self.dropped)
        x, s = self._painted(batch), self.sampling.schedule
        noise = batch["noise"] if "noise" in batch else torch.randn_like(x)
        step = batch["when"] if "when" in batch else torch.randint(s.steps, (len(x),), device=x.device)
        noisy = add_noise(x, noise, step, s.left)
        predicted, said = self.both(noisy, step.float(), self.condition(batch)).float().chunk(2, 1)
        error = (predicted - noise).square().flatten(1).mean(1)
        added = torch.linspace(s.first, s.last, s.steps, dtype=torch.float64)
        bound = variance_bound(x, noisy, predicted, said, step, added)
        means = {"noise": error.detach().mean(), "variance": bound.detach().mean()}
        return Loss(total=(error + bound).sum(), weight=len(x), metrics=means)


def read_hf(raw: Mapping[str, Any]) -> tuple[DiTConfig, dict[str, str]]:
    f = pipeline(raw, PIPELINE)
    backbone = read_dit(part(f, "transformer", TRANSFORMER))
    vae = read_vae(part(f, "vae", VAE_CLASS))
    sampling = read_scheduler(f, raw)
    labels: tuple[str, ...] = ()
    if f.has("id2label"):
        names = Fields(f.take("id2label", dict), "model_index.json: id2label", f.problems)
        labels = tuple(names.take(str(i), str) for i in range(0 if backbone is None else backbone.num_classes))
        names.done()
    f.ignore("there are no names of classes", *(["id2label"] if not labels else []))
    report = f.done()
    assert backbone is not None
    return DiTConfig(backbone=backbone, vae=vae, sampling=sampling, labels=labels), report


def write_hf(c: DiTConfig) -> dict[str, Any]:
    raw = {
        "_class_name": PIPELINE, "scheduler": write_scheduler(c.sampling),
        "transformer": diffusers_part(TRANSFORMER, write_dit(c.backbone)),
        "vae": diffusers_part(VAE_CLASS, write_vae(c.vae)),
        **({"id2label": {str(i): name for i, name in enumerate(c.labels)}} if c.labels else {}),
    }  # fmt: skip
    return write_whole(c, raw, read_hf)


def rules_hf(c: DiTConfig) -> list[Rule]:
    return [*dit_rules(c.backbone, "transformer.", "backbone."), *vae_rules("vae.", "vae.", c.vae)]


DiT.formats = {
    "hf": Format(read=read_hf, write=write_hf, rules=rules_hf, parts={"transformer": DIFFUSION, "vae": DIFFUSION})
}


def preset(latent_size: int) -> DiTConfig:
    """DiT-XL/2."""
    vae = VAEConfig(pyramid=PyramidConfig(widths=(128, 256, 512, 512), latent_dim=4))
    return DiTConfig(backbone=DiTBackboneConfig(latent_size=latent_size), vae=vae)


PRESETS = {f"facebook/DiT-XL-2-{8 * side}": partial(preset, side) for side in (32, 64)}
