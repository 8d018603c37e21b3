"""What a policy is shown at one moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Float32, UInt8


@dataclass(frozen=True, kw_only=True, eq=False)
class Observation:
    """Camera pictures, the robot's state and what it is told.

    Attributes:
        images: a picture by the name of its camera.
        state: joint positions or the like, in the robot's own units; None for a robot that says nothing of itself.
        instruction: what is to be done, in words.
        time: seconds since the episode began, when the pictures were taken.
        past: what was shown before, the oldest first, to a policy with a history; those have no past of their own.
        action: what was done then, in the robot's own units, where that is known; a lesson may teach it, too.
    """

    images: Mapping[str, UInt8[np.ndarray, "height width 3"]] = field(default_factory=dict)
    state: Float32[np.ndarray, " state_dim"] | None = None
    instruction: str = ""
    time: float = 0.0
    past: tuple[Observation, ...] = ()
    action: Float32[np.ndarray, " action_dim"] | None = None

    def window(self, history: int) -> list[Observation]:
        """The last ``history`` of them, this one at the end; at the beginning of an episode there are fewer."""
        return [*self.past, self][-history:]


def with_past(
    observations: Sequence[Observation], history: int, actions: Float32[np.ndarray, "steps action_dim"] | None = None
) -> list[Observation]:
    """The steps of one episode, each with those before it, as a policy of this history is shown them."""
    if actions is not None:
        observations = [replace(o, action=action) for o, action in zip(observations, actions, strict=True)]
    return [replace(o, past=tuple(observations[max(0, n + 1 - history) : n])) for n, o in enumerate(observations)]
