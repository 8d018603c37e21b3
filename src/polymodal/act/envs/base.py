"""What every environment of ours offers beside Gymnasium's methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import gymnasium
import numpy as np
from gymnasium import spaces
from jaxtyping import Float32, UInt8

from polymodal.act.limits import Kind, Limits, Zone
from polymodal.core.errors import ConfigError, UnsupportedError, did_you_mean

Action: TypeAlias = Float32[np.ndarray, " action_dim"]
Picture: TypeAlias = UInt8[np.ndarray, "height width 3"]


class RobotEnv(gymnasium.Env[dict[str, Any], np.ndarray], ABC):
    """A Gymnasium environment that is seen by cameras and told what to do.

    An observation is ``{"images": {camera: uint8 (size, size, 3)}, "state": float32}``. ``info`` has ``instruction``
    and ``success``. ``reset(seed=s)`` gives the same episode always. ``reset(options={"swapped": True})`` draws an
    episode for one target and tells another: ``success`` is then of the told one, ``success_shown`` of the other, and
    either ends the episode; who follows the words never reaches the second.

    Attributes:
        cameras: names of the pictures of an observation; the first is the one that films show.
        state_names: of the numbers of the state.
        action_names: of the numbers of an action, in the units of ``action_space``.
        fps: actions a second.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"]}
    render_mode = "rgb_array"
    known_cameras: ClassVar[tuple[str, ...]]
    fps: ClassVar[int]
    state_names: tuple[str, ...]
    action_names: ClassVar[tuple[str, ...]]

    def __init__(self, *, size: int, cameras: Sequence[str] | None, action_space: spaces.Box) -> None:
        self.size = size
        self.cameras = self.known_cameras if cameras is None else tuple(cameras)
        for name in self.cameras:
            if name not in self.known_cameras:
                raise ConfigError(f"there is no camera {name!r} here{did_you_mean(name, self.known_cameras)}")
        self.action_space = action_space
        pictures: dict[str, spaces.Space[Any]] = {
            name: spaces.Box(0, 255, (size, size, 3), np.uint8) for name in self.cameras
        }
        state = spaces.Box(-np.inf, np.inf, (len(self.state_names),), np.float32)
        self.observation_space = spaces.Dict({"images": spaces.Dict(pictures), "state": state})

    @abstractmethod
    def expert(self) -> Callable[[], Action]:
        """A scripted demonstrator of the running episode: each call gives the next action."""

    @abstractmethod
    def picture(self, camera: str) -> Picture:
        """What a camera sees now."""

    @abstractmethod
    def state(self) -> Float32[np.ndarray, " state_dim"]:
        """What the robot knows of itself now."""

    def limits(self) -> Limits:
        """What a guard holds this robot to; how fast it may move is learned from demonstrations (`Limits.learned`)."""
        return self.limits_of(tuple("choice" for _ in self.action_names))

    def limits_of(
        self,
        kinds: tuple[Kind, ...],
        *,
        rest: tuple[float, ...] | None = None,
        scale: tuple[float, ...] | None = None,
        measured: tuple[int, ...] | None = None,
        workspace: Zone | None = None,
    ) -> Limits:
        """`Limits` of the action space, with what the numbers mean."""
        assert isinstance(self.action_space, spaces.Box)
        low, high = (tuple(float(x) for x in end) for end in (self.action_space.low, self.action_space.high))
        return Limits(low=low, high=high, kinds=kinds, rest=rest, scale=scale, measured=measured, workspace=workspace)

    def render(self) -> Picture:
        return self.picture((self.cameras or self.known_cameras)[0])

    def observe(self) -> dict[str, Any]:
        return {"images": {name: self.picture(name) for name in self.cameras}, "state": self.state()}

    def action(self, action: Any) -> Action:
        """A finite action, clipped to what the robot can do.

        Raises:
            ConfigError: it has another shape, or is not finite.
        """
        assert isinstance(self.action_space, spaces.Box)
        values = np.asarray(action, np.float32)
        if values.shape != self.action_space.shape or not np.isfinite(values).all():
            raise ConfigError(f"an action here is {self.action_space.shape[0]} finite numbers, not {action!r:.200}")
        return np.clip(values, self.action_space.low, self.action_space.high)

    def cannot_swap(self, why: str) -> UnsupportedError:
        return UnsupportedError(f"no other target can be told in this scene: {why}. Take tabletop or babyai/GoToLocal")


def is_swapped(options: Mapping[str, Any] | None) -> bool:
    """Whether a reset asks to be told another target than the episode is drawn for."""
    return bool((options or {}).get("swapped", False))
