"""DIAMOND: a world model that paints the next frame with a diffusion, told by the last frames and actions.

Paper: Alonso et al., "Diffusion for World Modeling: Visual Details Matter in Atari", 2024,
https://arxiv.org/abs/2405.12399. Official code: eloialonso/diamond. Hub: eloialonso/diamond (pickled, which is never
read here).

    4 frames, noisy next frame -> conv -> U-Net whose group norms are told -> conv -> what is left of the noise
    4 actions -> linear --+
    noise level -> waves -+-> two layers -> the condition of all norms

Training details kept here: EDM's scaling, with data of deviation 0.5 and noise of deviations between 0.002 and 20 whose
logarithms are drawn around -0.4 with a deviation of 1.2; noise of 0.3 that all pixels of a channel share, which is
reckoned as noise in the scaling and never drawn when a frame is made; past frames are told without noise, divided by
the data's deviation; the target has a deviation of one. A clip that is longer goes on from the model's own estimate of
each frame, kept within what can be seen and cut to 256 levels. Frames are made in 3 steps of Euler's method from 5 to
0.002, spaced by 7th roots, and begin with noise of deviation one, not five, as the official code has it. The paper
trains with AdamW at 1e-4, weight decay 0.01, 100 steps of warm-up and clipping at 1, 32 rows a step.

Deviations: an action is some numbers, which go through a linear layer without a bias: for a choice, as one-hot, that is
the official embedding. A past that is too short is filled with its first frame and with nothing done. Estimates are cut
to 256 levels when a frame is done and not between its steps. Rewards and ends of episodes, which have a network of
their own, are left out, and so is the agent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polymodal.backbones.adaptive_unet import AdaptiveUNet, AdaptiveUNetConfig
from polymodal.core.batch import Batch, Loss
from polymodal.core.errors import ConfigError
from polymodal.core.verbs import TensorSpec
from polymodal.heads.diffusion import edm_loss
from polymodal.nn.edm import Preconditioning, broad
from polymodal.nn.time import Embedder
from polymodal.samplers.diffusion import Euler
from polymodal.samplers.edm import Karras
from polymodal.samplers.guidance import Dice
from polymodal.systems.imagining import WorldModel, check_scale
from polymodal.weights.native import native_format

NOISE: Final = Preconditioning(data=0.5, offset=0.3, median=math.exp(-0.4), spread=1.2, least=0.002, most=20.0)
STRONGEST, FAINTEST = 5.0, 0.002  # noise when a frame is made


@dataclass(frozen=True, kw_only=True)
class DiamondConfig:
    """Frames of ``width`` x ``height`` pixels and the U-Net that makes them.

    Attributes:
        action_scale: what each number of an action is divided by.
        history: frames, and as many actions, that the next frame is told by.
        steps: in which a frame is made.
    """

    backbone: AdaptiveUNetConfig
    action_scale: tuple[float, ...]
    width: int = 64
    height: int = 64
    history: int = 4
    noise: Preconditioning = NOISE
    steps: int = 3

    def __post_init__(self) -> None:
        c = self.backbone
        if min(self.width, self.height, self.history, self.steps) < 1:
            raise ConfigError(
                f"frames of {self.width} x {self.height} pixels, told by {self.history}, made in {self.steps} steps: "
                "one at least of each"
            )
        check_scale(self.action_scale)
        if (c.in_channels, c.out_channels) != (3 * (self.history + 1), 3):
            raise ConfigError(f"{c.in_channels} channels for {self.history} frames and a noisy one, 3 for the next")
        if c.condition_dim % (2 * self.history):
            raise ConfigError(
                f"a condition of {c.condition_dim}: even, and a whole part of it for each of {self.history} actions"
            )


class Waves(nn.Module):
    """Cosines, then sines, of a number at random frequencies, which are drawn once (Fourier features)."""

    frequencies: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.zeros(dim // 2))

    def forward(self, x: Float[Tensor, " batch"]) -> Float[Tensor, "batch dim"]:
        angle = 2 * torch.pi * x[:, None].float() * self.frequencies
        return torch.cat([angle.cos(), angle.sin()], 1)


@final
class Diamond(WorldModel):
    """The last frames and actions to the next frame."""

    config: DiamondConfig

    def __init__(self, config: DiamondConfig) -> None:
        super().__init__(config)
        c, dim = config, config.backbone.condition_dim
        self.history, self.size, self.action_scale = c.history, (c.width, c.height), c.action_scale
        self.waves = Waves(dim)
        self.act = nn.Linear(self.action_dim, dim // c.history, bias=False)
        self.condition = Embedder(dim, dim)
        self.backbone = AdaptiveUNet(c.backbone)
        self.sampling = Karras(scaling=c.noise, solver=Euler(), most=STRONGEST, least=FAINTEST, clip=1.0)

    @torch.no_grad()
    def init_weights(self) -> None:
        """torch's own scheme, normal frequencies, normal embeddings of actions; the U-Net as it says."""
        nn.init.normal_(self.waves.frequencies)
        nn.init.normal_(self.act.weight)
        for layer in (self.condition.up_proj, self.condition.down_proj):
            layer.reset_parameters()
        self.backbone.init_weights()

    def inputs_spec(self) -> dict[str, TensorSpec]:
        """Two frames to be learned, of which the second is told the model's own estimate of the first."""
        c = self.config
        return {
            "frames": TensorSpec(shape=(c.history + 2, 3, c.height, c.width)),
            "actions": TensorSpec(shape=(c.history + 1, self.action_dim)),
        }

    def denoise(
        self,
        noisy: Float[Tensor, "batch 3 height width"],
        told: Float[Tensor, " batch"],
        frames: Float[Tensor, "batch history 3 height width"],
        actions: Float[Tensor, "batch history action"],
    ) -> Float[Tensor, "batch 3 height width"]:
        """What the network says of a scaled noisy frame.

        Args:
            noisy: scaled, as ``config.noise`` has it.
            told: of the noise, likewise.
            frames: what was seen before.
            actions: what was done at each of these.
        """
        dtype = self.backbone.first.weight.dtype
        condition = self.condition(self.waves(told).to(dtype) + self.act(actions.to(dtype)).flatten(1))
        seen = (frames / self.config.noise.data).flatten(1, 2)
        return self.backbone(torch.cat([seen, noisy], 1).to(dtype), condition)

    def forward(self, batch: Batch) -> Float[Tensor, "batch 3 height width"]:
        """What the network says of the frame behind the first ``history``, with ``noise`` of ``deviation`` on it."""
        n, scaling, deviation = self.history, self.config.noise, batch["deviation"]
        noisy = batch["frames"][:, n] + broad(deviation, batch["noise"]) * batch["noise"]
        noisy = broad(scaling.reads(deviation), noisy) * noisy
        return self.denoise(noisy, scaling.told(deviation), batch["frames"][:, :n], batch["actions"][:, :n])

    def loss(self, batch: Batch) -> Loss:
        """Squared error of what the network says of each frame behind the first ``history``."""
        seen = list(batch["frames"].unbind(1))
        losses = []
        for now in range(self.history, len(seen)):
            past = slice(now - self.history, now)
            frames, actions = torch.stack(seen[past], 1), batch["actions"][:, past]

            def model(noisy: Tensor, told: Tensor, frames: Tensor = frames, actions: Tensor = actions) -> Tensor:
                return self.denoise(noisy, told, frames, actions)

            loss, estimate = edm_loss(model, seen[now], self.config.noise)
            losses.append(loss)
            seen[now] = visible(estimate)
        return Loss(total=torch.stack([one.total for one in losses]).sum(), weight=sum(one.weight for one in losses))

    def rolled(
        self,
        frames: Float[Tensor, "batch context 3 height width"],
        actions: Float[Tensor, "batch steps action"],
        seeds: Sequence[int],
    ) -> Float[Tensor, "batch future 3 height width"]:
        context, steps, n, dice = frames.shape[1], actions.shape[1], self.history, Dice(seeds)
        missing = max(0, n - context)
        seen = [*[frames[:, 0]] * missing, *frames.unbind(1)]
        actions = torch.cat([actions.new_zeros(len(actions), missing, self.action_dim), actions], 1)
        points = self.sampling.points(self.config.steps)
        for now in range(len(seen), missing + steps + 1):
            past = slice(now - n, now)
            known, done = torch.stack(seen[past], 1), actions[:, past]

            def model(x: Tensor, when: Tensor, known: Tensor = known, done: Tensor = done) -> Tensor:
                scaling = self.config.noise
                scaled = broad(scaling.reads(when), x) * x
                return self.denoise(scaled, scaling.told(when), known, done).float()

            noise = dice(tuple(frames.shape[2:]), frames.device)
            seen.append(visible(self.sampling.sample(model, noise, points)))
        return torch.stack(seen[missing + context :], 1)


def visible(frames: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
    """Cut to the 256 levels of a picture."""
    return (frames.clamp(-1, 1) / 2 + 0.5).mul(255).floor() / 127.5 - 1


Diamond.formats = {"hf": native_format("polymodal_diamond", DiamondConfig)}


def paper(choices: int = 18) -> DiamondConfig:
    """The published sizes, for a game of so many choices (as one-hot): Atari has 18."""
    return DiamondConfig(backbone=AdaptiveUNetConfig(in_channels=15), action_scale=(1.0,) * choices)


PRESETS = {"eloialonso/diamond": paper}
