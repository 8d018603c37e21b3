"""Pictures drawn again in one colour, so that their form has to be learned and not only their paint."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8

_RGBA = UInt8[np.ndarray, "batch height width 4"]


def _light(rgba: _RGBA) -> Float[np.ndarray, "batch height width"]:
    """Luminance on white paper, 0 to 1."""
    alpha = rgba[..., 3].astype(np.float32) / 255
    return (rgba[..., :3] @ np.array([0.299, 0.587, 0.114], np.float32)) / 255 * alpha + 1 - alpha


def _one_colour(value: np.ndarray, alpha: np.ndarray) -> _RGBA:
    planes = np.stack([value, value, value, alpha], -1)
    return (planes.clip(0, 1) * 255).round().astype(np.uint8)


def outline(rgba: _RGBA) -> _RGBA:
    """Black lines where the luminance changes."""
    down, across = np.gradient(_light(rgba), axis=(1, 2))
    return _one_colour(np.zeros(rgba.shape[:3]), 5 * np.hypot(down, across) - 0.1)


def ink(rgba: _RGBA) -> _RGBA:
    """Black where the picture is darker than its own mean, nothing elsewhere."""
    light, inside = _light(rgba), rgba[..., 3] > 127
    mean = (light * inside).sum((1, 2)) / np.maximum(inside.sum((1, 2)), 1)
    return _one_colour(np.zeros(rgba.shape[:3]), 0.5 + 8 * (mean[:, None, None] - light) * inside - 0.5 * ~inside)


def grey(rgba: _RGBA) -> _RGBA:
    """The luminance alone."""
    return _one_colour(_light(rgba), rgba[..., 3] / 255)


def redraw(rgba: _RGBA, rng: np.random.Generator) -> _RGBA:
    """A copy in which two in five pictures are redrawn: half of those as outlines, the rest in ink or grey."""
    out, hand = rgba.copy(), rng.random(len(rgba))
    for draw, low, high in ((outline, 0.0, 0.2), (ink, 0.2, 0.3), (grey, 0.3, 0.4)):
        here = (hand >= low) & (hand < high)
        out[here] = draw(rgba[here])
    return out
