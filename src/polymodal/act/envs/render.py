"""MuJoCo's pictures without a screen, as fast as a CPU draws them."""

from __future__ import annotations

import atexit
import functools
import os
import sys
import weakref
from typing import Any

import numpy as np
from jaxtyping import UInt8

from polymodal.core.errors import UnsupportedError

# MuJoCo's default needs a screen. It reads this when it is imported, which others may have done before.
_late = sys.platform == "linux" and "MUJOCO_GL" not in os.environ and "mujoco" in sys.modules
if sys.platform == "linux":
    os.environ.setdefault("MUJOCO_GL", "egl")

_ADVICE = "install libegl1 libegl-mesa0 libgl1-mesa-dri libgles2 libopengl0 (Debian), or set MUJOCO_GL=osmesa"

try:
    import mujoco

    if _late:
        import mujoco.egl

        mujoco.gl_context.GLContext = mujoco.egl.GLContext
except ModuleNotFoundError:
    raise
except Exception as error:  # whatever the loader of a GL library raises
    raise UnsupportedError(f"MuJoCo cannot draw here ({error}): {_ADVICE}") from error


_OPEN: weakref.WeakSet[Painter] = weakref.WeakSet()


@functools.cache
def _close_at_exit() -> None:
    """Registered after the first context, and so run before EGL is shut down: to close a renderer later is an error."""

    def close() -> None:
        for painter in list(_OPEN):
            painter.close()

    atexit.register(close)


class Painter:
    """Draws the cameras of one model.

    Without multi-sampling, shadows and reflections: a software renderer spends nine tenths of its time on them.
    """

    def __init__(self, model: mujoco.MjModel, size: int, *, max_geoms: int = 1000) -> None:
        model.vis.quality.offsamples = 0
        model.vis.global_.offwidth = max(model.vis.global_.offwidth, size)
        model.vis.global_.offheight = max(model.vis.global_.offheight, size)
        try:
            self._renderer = mujoco.Renderer(model, size, size, max_geoms)
        except Exception as error:
            raise UnsupportedError(f"MuJoCo cannot draw here ({error}): {_ADVICE}") from error
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._renderer.scene.flags[flag] = 0
        _OPEN.add(self)
        _close_at_exit()

    def close(self) -> None:
        self._renderer.close()

    def __call__(self, data: mujoco.MjData, camera: str | Any) -> UInt8[np.ndarray, "size size 3"]:
        """What a camera of the model, by its name, or a free one sees."""
        self._renderer.update_scene(data, camera)
        return self._renderer.render().copy()
