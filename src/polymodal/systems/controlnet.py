"""ControlNet: Stable Diffusion that also looks at a picture: edges, poses, depths, scribbles.

Paper: Zhang et al., "Adding Conditional Control to Text-to-Image Diffusion Models", 2023,
https://arxiv.org/abs/2302.05543. Official code: lllyasviel/ControlNet. Hub: a pipeline of Stable Diffusion 1 or 2 that
has a folder ``controlnet`` with such files as those of lllyasviel/control_v11p_sd15_canny.

    control picture, noisy latents, step, text -> a copy of the U-Net's way down -> convolutions of zeros --+
    noisy latents, step, text -> the U-Net (frozen), to whose way down and middle these are added -----------> the noise

Training details kept here: only the copy trains, which begins with the U-Net's weights; the last convolution of what
looks at the control picture, and those between copy and U-Net, begin at zero, so that a fresh one changes nothing; the
U-Net's way up is frozen, too, and gradients pass through it; half of the texts are replaced by the empty one.

``scale`` multiplies what is added. With ``guess`` the control picture leads (the paper's guess mode): finer residuals
count less, from a tenth on, and what guidance leads away from is not told of it.

Deviations: control pictures have sides of multiples of what the U-Net paints. Those of SDXL are not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polymodal.backbones.controlnet import (
    CLASS as CONTROL,
)
from polymodal.backbones.controlnet import (
    ControlConfig,
    ControlEncoder,
    control_rules,
    read_control,
    write_control,
)
from polymodal.core.batch import Batch
from polymodal.core.drawing import Drawing, Settled
from polymodal.core.errors import ConfigError
from polymodal.core.verbs import TensorSpec
from polymodal.systems.latent_painting import TextPainter
from polymodal.systems.painting import Condition
from polymodal.systems.stable_diffusion_files import (
    PARTS,
    SIZES,
    StableDiffusionConfig,
    base_rules,
    read_base,
    write_base,
)
from polymodal.weights.format import Format, write_whole
from polymodal.weights.pipeline import CLASS, DIFFUSION, diffusers_part, part, pipeline
from polymodal.weights.rules import Rule

PIPELINE: Final = "StableDiffusionControlNetPipeline"


@dataclass(frozen=True, kw_only=True)
class ControlNetConfig:
    """A Stable Diffusion, and the copy of its way down."""

    base: StableDiffusionConfig
    control: ControlConfig = field(default_factory=ControlConfig)

    def __post_init__(self) -> None:
        if self.control.factor != self.base.vae.pyramid.factor:
            raise ConfigError(
                f"control pictures are made {self.control.factor} times smaller, pictures "
                f"{self.base.vae.pyramid.factor} times"
            )


@final
class ControlNet(TextPainter):
    """Stable Diffusion, told by a control picture through a trainable copy."""

    config: ControlNetConfig
    dropped: int = 50
    scale: float = 1.0
    guess: bool = False

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__(config, config.base)
        self.backbone.requires_grad_(False)
        self.control = ControlEncoder(config.control, config.base.backbone)

    def init_weights(self) -> None:
        """A copy of a U-Net that is fresh, too; `over` takes a trained one.

        A frozen U-Net with the zeros of its own training would let no gradient through, so that here it has none.
        """
        super().init_weights()
        for module in self.backbone.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.reset_parameters()
        self.control.init_weights()
        self.control.copy(self.backbone.encoder)

    @classmethod
    def over(cls, model: TextPainter, control: ControlConfig | None = None) -> ControlNet:
        """A ControlNet to be trained for this Stable Diffusion, whose weights it copies.

        Raises:
            ConfigError: it is of another U-Net, or has a ControlNet already.
        """
        if not isinstance(model.config, StableDiffusionConfig):
            raise ConfigError(f"a ControlNet is made for a Stable Diffusion, not for a {type(model).__name__}")
        made = cls.build(ControlNetConfig(base=model.config, control=control or ControlConfig()))
        for name in ("text", "backbone", "vae"):
            made.get_submodule(name).load_state_dict(model.get_submodule(name).state_dict())
        made.control.copy(made.backbone.encoder)
        made.tokenizer = model.tokenizer
        return made

    def inputs_spec(self) -> dict[str, TensorSpec]:
        spec = super().inputs_spec()
        return {**spec, "control": replace(spec["pixels"], shape=(self.config.control.channels, *self.size[::-1]))}

    def condition(self, batch: Batch) -> Condition:
        """Of a text, and of the ``control`` picture (in [0, 1]) where the batch has one."""
        told = super().condition(batch)
        return self.look_at(told, batch["control"]) if "control" in batch else told

    def settled(self, drawing: Drawing, *, begun: tuple[int, int] | None = None, masked: bool = False) -> Settled:
        """With how the control picture counts."""
        settled = super().settled(drawing, begun=begun, masked=masked)
        return replace(settled, control_scale=float(self.scale), control_guess=self.guess)

    def look_at(
        self, condition: Condition, control: Float[Tensor, "batch 3 height width"], *, against: bool = False
    ) -> Condition:
        weight = 0.0 if against and self.guess else self.scale
        shown = self.control.look(control.to(self.control.look.first.weight.dtype))
        return Batch(condition, shown=shown, weight=torch.full((len(control),), weight, device=control.device))

    def denoise(
        self, x: Float[Tensor, "batch *latents"], when: Float[Tensor, " batch"], condition: Condition
    ) -> Float[Tensor, "batch *latents"]:
        context, c = condition["context"], condition
        if "shown" not in c:
            return self.backbone(x, when, context)
        residuals = self.control(x, when, context, c["shown"], weight=c["weight"], guess=self.guess)
        return self.backbone(x, when, context, residuals=residuals)


def read_hf(raw: Mapping[str, Any]) -> tuple[ControlNetConfig, dict[str, str]]:
    f = pipeline(raw, PIPELINE)
    control, mine = read_control(part(f, "controlnet", CONTROL))
    base = read_base(f, raw)
    if replace(mine, side=base.backbone.side, out_channels=base.backbone.out_channels) != base.backbone:
        raise ConfigError(f"the ControlNet is a copy of another U-Net: {mine} beside {base.backbone}")
    return ControlNetConfig(base=base, control=control), f.done()


def write_hf(c: ControlNetConfig) -> dict[str, Any]:
    control = diffusers_part(CONTROL, write_control(c.control, c.base.backbone))
    return write_whole(c, {CLASS: PIPELINE, "controlnet": control, **write_base(c.base)}, read_hf)


def rules_hf(c: ControlNetConfig) -> list[Rule]:
    return [*base_rules(c.base), *control_rules("controlnet.", "control.", c.base.backbone)]


ControlNet.formats = {
    "hf": Format(read=read_hf, write=write_hf, rules=rules_hf, parts={**PARTS, "controlnet": DIFFUSION})
}


def preset(name: str) -> ControlNetConfig:
    """Over a published Stable Diffusion."""
    return ControlNetConfig(base=SIZES[name]())


PRESETS = {f"{name} with a ControlNet": partial(preset, name) for name in SIZES}
