"""What the world models share: the verb `imagine`. Not a system itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError, MediaError
from polymodal.systems.base import System


class WorldModel(System):
    """Base of the world models: the `Imagines` protocol. Inside, frames are in [-1, 1].

    A batch of `loss` holds ``frames`` (batch time 3 height width) and ``actions`` (batch time-1 action), as `lesson`
    makes them. A subclass has ``size``, ``history`` and ``action_scale`` and gives `rolled`.

    Attributes:
        action_scale: what each number of an action is divided by; what is left is about one.
    """

    action_scale: tuple[float, ...]
    history: int
    size: tuple[int, int]

    @property
    def action_dim(self) -> int:
        return len(self.action_scale)

    def rolled(
        self,
        frames: Float[Tensor, "batch context 3 height width"],
        actions: Float[Tensor, "batch steps action"],
        seeds: Sequence[int],
    ) -> Float[Tensor, "batch future 3 height width"]:
        """`imagine` of frames in [-1, 1] and scaled actions, where the weights are; a seed for each row."""
        raise NotImplementedError

    def scaled(self, actions: Float[Tensor, "batch steps action"]) -> Float[Tensor, "batch steps action"]:
        return actions / actions.new_tensor(self.action_scale)

    def lesson(
        self, frames: Float[Tensor, "batch time 3 height width"], actions: Float[Tensor, "batch time-1 action"]
    ) -> Batch:
        """What `loss` reads of frames in [0, 1] and actions in their own units."""
        return Batch(frames=frames * 2 - 1, actions=self.scaled(actions))

    @torch.no_grad()
    def imagine(
        self,
        frames: Float[Tensor, "batch context 3 height width"],
        actions: Float[Tensor, "batch steps action"],
        *,
        seed: int | Sequence[int] = 0,
    ) -> Float[Tensor, "batch future 3 height width"]:
        """See `core.verbs.Imagines`."""
        (rows, context), (width, height), name = frames.shape[:2], self.size, type(self).__name__
        if frames.shape[3:] != (height, width):
            across, down = frames.shape[4], frames.shape[3]
            raise MediaError(f"{name} ({self.source}) sees frames of {width} x {height} pixels, not {across} x {down}")
        if actions.shape[2] != self.action_dim:
            raise MediaError(f"actions of {actions.shape[2]} numbers; {name} ({self.source}) is told {self.action_dim}")
        if not context or actions.shape[1] < context:
            raise MediaError(
                f"{actions.shape[1]} actions and {context} frames: there is one action between each two frames, and "
                "one more for each frame to come"
            )
        if not rows or not (frames.isfinite().all() and actions.isfinite().all()):
            raise MediaError(f"{rows} films for {name} ({self.source}): one at least, of frames and actions all finite")
        seeds: Sequence[int] = range(seed, seed + rows) if isinstance(seed, int) else list(seed)
        if len(seeds) != rows or min(seeds) < 0:
            raise ConfigError(f"seeds {seed} for {rows} films: one for each, and none is negative")
        with self.evaluating():
            inside = frames.to(self.device).float() * 2 - 1
            made = self.rolled(inside, self.scaled(actions.to(self.device).float()), seeds)
        return (made.float().cpu() / 2 + 0.5).clamp(0, 1)


def check_scale(scale: Sequence[float]) -> None:
    """Refuses an ``action_scale`` that nothing can be divided by.

    Raises:
        ConfigError: it is empty, or holds zero or what is not finite.
    """
    if not scale or not all(math.isfinite(each) and each for each in scale):
        raise ConfigError(
            f"actions are scaled by what is finite and not zero, a number for each of theirs; not {scale}"
        )
