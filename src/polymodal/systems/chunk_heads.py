"""Heads that turn a vector into a chunk of actions, one for each way of the literature. Not a system itself.

Each config builds a module that has ``loss(condition, actions, mask)`` and ``predict(condition, generator)``. That of
tokens (`systems.token_head`) learns ``labels`` instead, and predicts under its tokenizer's constraint.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from polymodal.core.batch import Loss
from polymodal.core.errors import ConfigError
from polymodal.heads.action import BinsHead, L1Head, masked
from polymodal.heads.denoiser import ChunkDenoiser
from polymodal.heads.diffusion import diffusion_loss
from polymodal.heads.flow import Beta, LogitNormal, Uniform, Velocity, flow_loss
from polymodal.nn.noise import Prediction, squared_cosine
from polymodal.samplers.diffusion import ddim
from polymodal.samplers.flow import continued, euler
from polymodal.systems.token_head import Tokens

Actions: TypeAlias = Float[Tensor, "batch horizon action_width"]
Condition: TypeAlias = Float[Tensor, "batch dim"]
Mask: TypeAlias = Bool[Tensor, "batch horizon action_width"]


@dataclass(frozen=True, kw_only=True)
class L1:
    """Values, and their absolute error (ACT, OpenVLA-OFT)."""

    def build(self, dim: int, horizon: int, width: int) -> L1Actions:
        return L1Actions(dim, horizon, width)


class L1Actions(L1Head):
    """See `L1`."""

    def predict(self, condition: Condition, generator: torch.Generator | None = None) -> Actions:
        return self(condition)


@dataclass(frozen=True, kw_only=True)
class Bins:
    """256 classes for each value (RT-1).

    Attributes:
        width: of the vector of one value.
    """

    width: int = 32

    def build(self, dim: int, horizon: int, width: int) -> BinsActions:
        return BinsActions(dim, horizon, width, self.width)


class BinsActions(BinsHead):
    """See `Bins`."""

    def predict(self, condition: Condition, generator: torch.Generator | None = None) -> Actions:
        return self.likeliest(condition)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which of an action's numbers is the largest, for robots that do that one thing (BabyAI).

    Attributes:
        temperature: of the draw; at 1 each is done as often as it was shown.
    """

    temperature: float = 1.0

    def build(self, dim: int, horizon: int, width: int) -> ChoiceActions:
        return ChoiceActions(self, dim, horizon, width)


class ChoiceActions(L1Head):
    """See `Choice`."""

    def __init__(self, config: Choice, dim: int, horizon: int, width: int) -> None:
        super().__init__(dim, horizon, width)
        self.config = config

    def loss(self, x: Condition, actions: Actions, mask: Bool[Tensor, "batch ..."] | None = None) -> Loss:
        """Cross-entropy of the choice of each step that ``mask`` keeps in part: what a robot cannot do is learned."""
        error = F.cross_entropy(self(x).float().flatten(0, 1), actions.argmax(-1).flatten(), reduction="none")
        return masked(error.view(actions.shape[:2]), None if mask is None else mask.expand(actions.shape).any(-1))

    def predict(self, condition: Condition, generator: torch.Generator | None = None) -> Actions:
        scores = self(condition).float() / self.config.temperature
        device = scores.device if generator is None else generator.device
        drawn = torch.multinomial(scores.softmax(-1).flatten(0, 1).to(device), 1, generator=generator)
        return 2.0 * F.one_hot(drawn.view(scores.shape[:2]), scores.shape[-1]).to(scores) - 1


@dataclass(frozen=True, kw_only=True)
class Flow:
    """A velocity from noise to actions (pi0).

    Attributes:
        steps: of Euler's method.
        given: a chunk learns to begin with any number of given actions up to this one, as real-time chunking asks of it
            (Black et al. 2025, https://arxiv.org/abs/2512.05964). With 0 it learns of none, and is pulled towards them.
    """

    hidden_dim: int = 256
    num_layers: int = 3
    steps: int = 10
    given: int = 0
    times: Beta | Uniform | LogitNormal = field(default_factory=Beta)

    def build(self, dim: int, horizon: int, width: int) -> FlowActions:
        return FlowActions(self, dim, horizon, width)


class FlowActions(ChunkDenoiser):
    """See `Flow`."""

    def __init__(self, config: Flow, dim: int, horizon: int, width: int) -> None:
        super().__init__(dim, horizon, width, hidden_dim=config.hidden_dim, num_layers=config.num_layers)
        self.config, self.shape = config, (horizon, width)
        if not 0 <= config.given < horizon:
            raise ConfigError(f"a chunk of {horizon} steps cannot learn to begin with {config.given} given ones")
        # How many are given, and which: as values of their own, for in a chunk they stand where there else is noise.
        self.given = nn.Embedding(config.given + 1, dim) if config.given else None
        self.before = nn.Linear(config.given * width, dim, bias=False) if config.given else None

    def loss(self, condition: Condition, actions: Actions, mask: Mask, done: Actions | None = None) -> Loss:
        """Of what is wanted, ``actions``; where noise moved the robot beside that, what was ``done`` is given."""
        if self.given is None:
            return flow_loss(partial(self, condition=condition), actions, times=self.config.times, mask=mask)
        count = torch.randint(self.config.given + 1, (len(actions),), device=actions.device)
        later = torch.arange(self.shape[0], device=actions.device) >= count[:, None]
        velocity = self._after(actions if done is None else done, count, condition)
        return flow_loss(velocity, actions, times=self.config.times, mask=mask & later[..., None])

    def predict(self, condition: Condition, generator: torch.Generator | None = None) -> Actions:
        noise = noise_for(condition, self.shape, generator)
        count = torch.zeros(len(noise), dtype=torch.int64, device=noise.device)
        return euler(self._after(noise, count, condition), noise, steps=self.config.steps)

    def go_on(
        self,
        condition: Condition,
        previous: Float[Tensor, "batch steps action_width"],
        frozen: int,
        generator: torch.Generator | None = None,
    ) -> Actions:
        """`predict`, but it begins as what is left of the chunk before (`samplers.flow.continued`). A flow that learned
        to begin with what is given is pulled only towards the rest.

        Raises:
            ConfigError: more actions are given than it learned to go on from.
        """
        noise = noise_for(condition, self.shape, generator)
        if self.given is not None and frozen > self.config.given:
            raise ConfigError(
                f"a chunk that is {frozen} steps late, and the policy learned to go on from {self.config.given}: "
                f"train it with Flow(given={frozen})"
            )
        previous = previous.to(noise)
        velocity = self._after(previous, torch.full((len(noise),), frozen, device=noise.device), condition)
        chunk = continued(velocity, noise, previous, frozen, steps=self.config.steps)
        return chunk if self.given is None else torch.cat([previous[:, :frozen], chunk[:, frozen:]], 1)

    def _after(
        self, done: Float[Tensor, "batch steps action_width"], count: Int[Tensor, " batch"], condition: Condition
    ) -> Velocity:
        """The velocity of chunks whose first actions, ``count`` of each row, are those of ``done``."""
        if self.given is None or self.before is None:
            return partial(self, condition=condition)
        given = (torch.arange(self.shape[0], device=done.device) < count[:, None])[..., None]
        done = F.pad(done, (0, 0, 0, self.shape[0] - done.shape[1])) * given
        condition = condition + self.given(count) + self.before(done[:, : self.config.given].flatten(1))
        return lambda x, t: self(torch.where(given, done, x), t, condition)


@dataclass(frozen=True, kw_only=True)
class Diffusion:
    """Noise that is taken off again (Diffusion Policy, Octo).

    Attributes:
        steps: of the schedule that is trained.
        taken: how many of them DDIM takes.
    """

    hidden_dim: int = 256
    num_layers: int = 3
    steps: int = 100
    taken: int = 10
    prediction: Prediction = "noise"

    def build(self, dim: int, horizon: int, width: int) -> DiffusionActions:
        return DiffusionActions(self, dim, horizon, width)


class DiffusionActions(ChunkDenoiser):
    """See `Diffusion`."""

    def __init__(self, config: Diffusion, dim: int, horizon: int, width: int) -> None:
        super().__init__(dim, horizon, width, hidden_dim=config.hidden_dim, num_layers=config.num_layers)
        self.config, self.shape = config, (horizon, width)

    def _denoise(self, x: Actions, step: Tensor, condition: Condition) -> Actions:
        return self(x, (step.float() + 1) / self.config.steps, condition)

    def loss(self, condition: Condition, actions: Actions, mask: Mask) -> Loss:
        c, denoiser = self.config, partial(self._denoise, condition=condition)
        return diffusion_loss(denoiser, actions, left=squared_cosine(c.steps), prediction=c.prediction, mask=mask)

    def predict(self, condition: Condition, generator: torch.Generator | None = None) -> Actions:
        c, noise = self.config, noise_for(condition, self.shape, generator)
        denoiser = partial(self._denoise, condition=condition)
        return ddim(denoiser, noise, left=squared_cosine(c.steps), steps=c.taken, prediction=c.prediction)


def noise_for(condition: Tensor, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Noise of one chunk a row; drawn on the generator's own device, so that a seed means the same on all."""
    device = condition.device if generator is None else generator.device
    noise = torch.randn(len(condition), *shape, device=device, generator=generator)
    return noise.to(condition.device)


Head: TypeAlias = L1 | Bins | Choice | Tokens | Flow | Diffusion
