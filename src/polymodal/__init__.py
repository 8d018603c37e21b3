"""Polymodal: every multimodal system of the literature as one short file over shared parts.

>>> import polymodal
>>> model = polymodal.load("polymodal/nano-clip")
>>> vectors = model.embed([polymodal.Image("cup.png"), "a red cup"])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from polymodal.api import build, load
    from polymodal.asking import ask, stream
    from polymodal.composition import compose
    from polymodal.core.chat import Chat
    from polymodal.core.drawing import Drawing
    from polymodal.core.errors import PolymodalError
    from polymodal.core.filming import Filming
    from polymodal.core.sample import Audio, Image, Sample, Text, Video
    from polymodal.films import film
    from polymodal.pictures import draw

# Where each public name lives: importing polymodal imports no torch. No module is called as a function here is: once
# it is imported, it would hide the function.
_LAZY = {
    "load": "polymodal.api",
    "build": "polymodal.api",
    "ask": "polymodal.asking",
    "stream": "polymodal.asking",
    "compose": "polymodal.composition",
    "draw": "polymodal.pictures",
    "film": "polymodal.films",
    "Chat": "polymodal.core.chat",
    "Drawing": "polymodal.core.drawing",
    "Filming": "polymodal.core.filming",
    "PolymodalError": "polymodal.core.errors",
    "Image": "polymodal.core.sample",
    "Audio": "polymodal.core.sample",
    "Text": "polymodal.core.sample",
    "Sample": "polymodal.core.sample",
    "Video": "polymodal.core.sample",
}

__all__ = [
    "Audio",
    "Chat",
    "Drawing",
    "Filming",
    "Image",
    "PolymodalError",
    "Sample",
    "Text",
    "Video",
    "__version__",
    "ask",
    "build",
    "compose",
    "draw",
    "film",
    "load",
    "stream",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in {"retrieve", "train", "data", "evaluate", "systems", "weights"}:
        return importlib.import_module(f"polymodal.{name}")
    raise AttributeError(f"module 'polymodal' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
