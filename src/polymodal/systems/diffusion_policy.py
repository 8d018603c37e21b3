"""Diffusion Policy: noise on a stretch of actions is taken off, step by step, by a U-Net that knows what was seen.

Paper: Chi et al., "Diffusion Policy: Visuomotor Policy Learning via Action Diffusion", 2023,
https://arxiv.org/abs/2303.04137. Official code: real-stanford/diffusion_policy. Hub: lerobot/diffusion_pusht.

    cameras, now and before -> ResNet-18 -> spatial softmax -> linear, ReLU --+
    states, now and before ---------------------------------------------------+-> FiLM
    noise ------------------------------------------------> U-Net over time, 100 times -> actions

Training details kept here: two observations; stretches of 16 actions that begin at the first of them, so that 15 are to
come; random crops while training, the middle else; group norm in the ResNet, since running averages of weights do not
go with batch norm; noise as the target, a squared-cosine schedule of 100 steps, samples kept within [-1, 1], which the
extremes of the data are scaled to. The paper trains with AdamW at 1e-4, betas 0.95 and 0.999, weight decay 1e-6, and
keeps an average of the weights (a stage's ``ema``).

Deviations: steps past an episode's end are not learned, where the official code repeats the last action; an action
before the first, or one that is not known, is a copy of the next. A batch has one crop, as in LeRobot. Pictures without
statistics of their own are scaled by ImageNet's. Files are LeRobot's; the official ones are pickles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Literal, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from polymodal.backbones.unet1d import UNet1d, UNet1dConfig
from polymodal.core.batch import Batch, Loss
from polymodal.core.errors import ConfigError
from polymodal.core.observation import Observation
from polymodal.core.verbs import TensorSpec
from polymodal.encoders.keypoints import SpatialSoftmax
from polymodal.encoders.resnet import ResNet, ResNetConfig, resnet_rules
from polymodal.heads.diffusion import diffusion_loss
from polymodal.nn.noise import Prediction, squared_cosine
from polymodal.samplers.diffusion import ddim, ddpm
from polymodal.systems import lerobot
from polymodal.systems.chunk_heads import noise_for
from polymodal.weights.fields import Fields
from polymodal.weights.format import Format, write_whole
from polymodal.weights.rules import Rule, renames, rule


@dataclass(frozen=True, kw_only=True)
class DiffusionPolicyConfig:
    """Attributes:
    history: observations that are looked at.
    horizon: actions of a stretch, which begins at the first of these observations.
    crop: height and width of what is seen of a picture; None: all.
    shared: one ResNet for all cameras, instead of one for each.
    steps: of the schedule that is trained.
    taken: how many of them are taken to act.
    """

    cameras: tuple[str, ...]
    image_height: int
    image_width: int
    state_width: int
    action_width: int
    history: int = 2
    horizon: int = 16
    vision: ResNetConfig = field(default_factory=lambda: ResNetConfig(norm="group"))
    keypoints: int = 32
    crop: tuple[int, int] | None = None
    shared: bool = False
    backbone: UNet1dConfig = field(default_factory=UNet1dConfig)
    prediction: Prediction = "noise"
    sampler: Literal["ddpm", "ddim"] = "ddpm"
    steps: int = 100
    taken: int = 100

    def __post_init__(self) -> None:
        if self.horizon % self.backbone.multiple or not 1 <= self.history <= self.horizon:
            raise ConfigError(f"a horizon of {self.horizon} with {self.history} observations and {self.backbone}")
        if not 1 <= self.taken <= self.steps or self.vision.norm == "frozen_batch" or not self.cameras:
            raise ConfigError("Diffusion Policy takes some of its steps, trains its norms and has a camera")
        if self.crop is not None and (self.crop[0] > self.image_height or self.crop[1] > self.image_width):
            raise ConfigError(f"a crop of {self.crop} out of {self.image_height} x {self.image_width} pixels")

    @property
    def seen(self) -> tuple[int, int]:
        """Height and width of what the ResNet reads."""
        return self.crop or (self.image_height, self.image_width)


class Camera(nn.Module):
    """A picture as the places of features."""

    def __init__(self, config: DiffusionPolicyConfig) -> None:
        super().__init__()
        c, width = config, 2 * config.keypoints
        self.backbone = ResNet(c.vision)
        self.pool = SpatialSoftmax(c.vision.dim, c.keypoints, c.vision.grid(*c.seen))
        self.out = nn.Linear(width, width)

    def forward(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        return torch.relu(self.out(self.pool(self.backbone(pixels)).flatten(1)))


@final
class DiffusionPolicy(lerobot.LeRobotPolicy):
    """Visuomotor policy learning via action diffusion."""

    config: DiffusionPolicyConfig
    normalisation = "minmax"

    def __init__(self, config: DiffusionPolicyConfig) -> None:
        super().__init__(config)
        c = config
        self.cameras, self.history, self.horizon = c.cameras, c.history, c.horizon - c.history + 1
        self.state_width, self.action_width = c.state_width, c.action_width
        self.vision = nn.ModuleList(Camera(c) for _ in c.cameras[: 1 if c.shared else None])
        known = c.state_width + len(c.cameras) * 2 * c.keypoints
        self.backbone = UNet1d(c.backbone, c.action_width, c.history * known)

    def init_weights(self) -> None:
        """The official code's: torch's own, and He's normal in the ResNet."""
        for camera in self.vision:
            assert isinstance(camera, Camera)
            camera.backbone.init_weights()

    def inputs_spec(self) -> dict[str, TensorSpec]:
        c = self.config
        return {
            "pixels": TensorSpec(shape=(c.history, len(c.cameras), 3, c.image_height, c.image_width)),
            "state": TensorSpec(shape=(c.history, c.state_width)),
            "actions": TensorSpec(shape=(c.horizon, c.action_width)),
            "actions_valid": TensorSpec(shape=(c.horizon,), dtype=torch.bool),
        }

    def observe(self, observations: Sequence[Observation]) -> Batch:
        """As of every policy, with an axis of moments behind the batch's; a missing past is the first moment again."""
        windows = [self._window(o) for o in observations]
        flat = super().observe([o for window in windows for o in window])
        return Batch({name: tensor.unflatten(0, (-1, self.history)) for name, tensor in flat.items()})

    def _window(self, observation: Observation) -> list[Observation]:
        window = observation.window(self.history)
        return [window[0]] * (self.history - len(window)) + window

    def lesson(
        self,
        observations: Sequence[Observation],
        actions: Float[Tensor, "batch horizon action_dim"],
        valid: Bool[Tensor, "batch horizon"],
    ) -> Batch:
        """As of every policy, with the actions of the past before those to come."""
        rows = []
        for observation, future in zip(observations, actions, strict=True):
            row = list(future)
            for earlier in reversed(self._window(observation)[:-1]):
                known = earlier is not observation and earlier.action is not None
                row.insert(0, torch.from_numpy(earlier.action).to(future) if known else row[0])
            rows.append(torch.stack(row))
        whole = F.pad(valid, (self.history - 1, 0), value=True)
        return Batch(self.observe(observations), actions=self.to_network(torch.stack(rows)), actions_valid=whole)

    def forward(self, batch: Batch) -> Float[Tensor, "batch known"]:
        """What is known: of each moment the state and what every camera sees."""
        pixels = self._crop(batch["pixels"])
        cameras = [self.vision[0 if self.config.shared else n] for n in range(pixels.shape[2])]
        seen = [camera(pixels[:, :, n].flatten(0, 1)) for n, camera in enumerate(cameras)]
        return torch.cat([batch["state"], torch.cat(seen, 1).unflatten(0, pixels.shape[:2])], -1).flatten(1)

    def _crop(self, pixels: Float[Tensor, "*batch height width"]) -> Float[Tensor, "*batch rows columns"]:
        room = [side - seen for side, seen in zip(pixels.shape[-2:], self.config.seen, strict=True)]
        top, left = (int(torch.randint(more + 1, ())) if self.training else round(more / 2) for more in room)
        return pixels[..., top : top + self.config.seen[0], left : left + self.config.seen[1]]

    def loss(self, batch: Batch) -> Loss:
        """Squared error of the prediction, summed over the numbers of valid steps."""
        c, denoiser = self.config, partial(self.backbone, known=self(batch))
        mask = batch["actions_valid"][..., None]
        return diffusion_loss(
            denoiser, batch["actions"], left=squared_cosine(c.steps), prediction=c.prediction, mask=mask
        )

    def chunk(
        self, batch: Batch, generator: torch.Generator | None = None
    ) -> Float[Tensor, "batch horizon action_width"]:
        c, known = self.config, self(batch)
        sample = ddim if c.sampler == "ddim" else partial(ddpm, generator=generator)
        noise = noise_for(known, (c.horizon, c.action_width), generator)
        actions = sample(
            partial(self.backbone, known=known), noise, left=squared_cosine(c.steps), steps=c.taken,
            prediction=c.prediction,
        )  # fmt: skip
        return actions[:, c.history - 1 :]


_FIXED: Final = {
    "type": "diffusion", "resize_shape": None, "crop_ratio": 1.0, "crop_is_random": True,
    "beta_schedule": "squaredcos_cap_v2", "clip_sample": True, "clip_sample_range": 1.0,
}  # fmt: skip
_PREDICTIONS: Final[Mapping[str, Prediction]] = {"epsilon": "noise", "sample": "sample"}
_SAMPLERS: Final[Mapping[str, Literal["ddpm", "ddim"]]] = {"DDPM": "ddpm", "DDIM": "ddim"}


def read_lerobot(raw: Mapping[str, Any]) -> tuple[DiffusionPolicyConfig, dict[str, str]]:
    f = Fields(raw)
    for name, value in _FIXED.items():
        f.require(name, value)
    lerobot.read_common(f, "MIN_MAX")
    f.ignore("a squared cosine has neither", "beta_start", "beta_end")
    f.ignore("steps past an episode's end are never learned here", "do_mask_loss_for_padding")
    steps = f.take("num_train_timesteps", int, 100)
    crop = f.numbers("crop_shape", int) if f.has("crop_shape") else None
    f.optional("crop_shape", list)
    parts = {
        **lerobot.read_features(f), "history": f.take("n_obs_steps", int), "horizon": f.take("horizon", int),
        "keypoints": f.take("spatial_softmax_num_keypoints", int, 32), "crop": crop,
        "shared": not f.take("use_separate_rgb_encoder_per_camera", bool, False),
        "prediction": f.choose("prediction_type", _PREDICTIONS, "epsilon"),
        "sampler": f.choose("noise_scheduler_type", _SAMPLERS, "DDPM"), "steps": steps,
        "taken": f.optional("num_inference_steps", int) or steps,
    }  # fmt: skip
    vision = {**lerobot.read_backbone(f), "norm": "group" if f.take("use_group_norm", bool) else "batch"}
    backbone: dict[str, Any] = {
        "widths": f.numbers("down_dims", int), "kernel_size": f.take("kernel_size", int, 5),
        "num_groups": f.take("n_groups", int, 8), "step_dim": f.take("diffusion_step_embed_dim", int, 128),
        "scale": f.take("use_film_scale_modulation", bool, True),
    }  # fmt: skip
    report = f.done()
    config = DiffusionPolicyConfig(**parts, vision=ResNetConfig(**vision), backbone=UNet1dConfig(**backbone))
    return config, report


def write_lerobot(c: DiffusionPolicyConfig) -> dict[str, Any]:
    if c.prediction == "velocity":
        raise ConfigError("LeRobot's format has no name for the prediction 'velocity'")
    names = {ours: theirs for theirs, ours in {**_PREDICTIONS, **_SAMPLERS}.items()}
    mapping = {"VISUAL": "MEAN_STD", "STATE": "MIN_MAX", "ACTION": "MIN_MAX"}
    raw = {
        **_FIXED, "normalization_mapping": mapping, **lerobot.write_features(c), **lerobot.write_backbone(c.vision),
        "n_obs_steps": c.history, "horizon": c.horizon, "n_action_steps": c.horizon - c.history + 1,
        "crop_shape": None if c.crop is None else list(c.crop), "use_group_norm": c.vision.norm == "group",
        "spatial_softmax_num_keypoints": c.keypoints, "use_separate_rgb_encoder_per_camera": not c.shared,
        "down_dims": list(c.backbone.widths), "kernel_size": c.backbone.kernel_size, "n_groups": c.backbone.num_groups,
        "diffusion_step_embed_dim": c.backbone.step_dim, "use_film_scale_modulation": c.backbone.scale,
        "prediction_type": names[c.prediction], "noise_scheduler_type": names[c.sampler],
        "num_train_timesteps": c.steps, "num_inference_steps": c.taken,
    }  # fmt: skip
    return write_whole(c, raw, read_lerobot)


_SEQUENCE: Final = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}


def rules_lerobot(config: DiffusionPolicyConfig) -> list[Rule]:
    cameras = {0: ""} if config.shared else {n: f".{n}" for n in range(len(config.cameras))}
    rules = lerobot.statistics_rules()
    for number, infix in cameras.items():
        theirs, ours = f"diffusion.rgb_encoder{infix}", f"vision.{number}"
        rules += [rule(f"{theirs}.pool.pos_grid", f"{ours}.pool.pos_grid")]
        rules += renames(theirs, ours, {"pool.nets": "pool.nets", "out": "out"})
        for name, place in _SEQUENCE.items():
            for layer in resnet_rules("", "")[1:] if name.startswith("layer") else [rule(".{stage}.{p}", "")]:
                rest = layer.theirs[0].removeprefix(".{stage}")
                rules.append(rule(f"{theirs}.backbone.{place}{rest}", f"{ours}.backbone.{name}{rest}"))
    words = ["".join(f".{{w{depth}}}" for depth in range(length)) for length in range(2, 9)]
    return rules + [rule(f"diffusion.unet{name}", f"backbone{name}") for name in words]


DiffusionPolicy.formats = {"hf": Format(read=read_lerobot, write=write_lerobot, rules=rules_lerobot)}

PRESETS = {
    "lerobot/diffusion_pusht": lambda: DiffusionPolicyConfig(
        cameras=("observation.image",), image_height=96, image_width=96, state_width=2, action_width=2, crop=(84, 84),
        shared=True,
    )
}  # fmt: skip
