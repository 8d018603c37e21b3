"""Films of episodes: the cameras side by side, and below them what the robot was told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from PIL import Image as PILImage
from PIL import ImageDraw

from polymodal.core.observation import Observation

HEIGHT: Final = 256  # of a camera's picture
_LINE: Final = 18


def frame(observation: Observation, caption: Sequence[str], cameras: int) -> PILImage.Image:
    """One picture of the film; a camera that is missing stays black, as do all of an observation without pictures."""
    views = [PILImage.fromarray(picture) for picture in observation.images.values()]
    scaled = [view.resize((max(1, HEIGHT * view.width // view.height), HEIGHT)) for view in views]
    width = max([sum(view.width for view in scaled), cameras * HEIGHT])
    out = PILImage.new("RGB", (width + width % 2, HEIGHT + _LINE * len(caption) + 6))
    at = 0
    for view in scaled:
        out.paste(view, (at, 0))
        at += view.width
    draw = ImageDraw.Draw(out)
    for n, text in enumerate(caption):
        draw.text((6, HEIGHT + 3 + _LINE * n), text, fill=(255, 255, 255), font_size=13)
    return out
