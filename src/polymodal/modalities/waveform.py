"""Sound as a picture that people recognise: how loud it is from its beginning to its end."""

from __future__ import annotations

import numpy as np
from PIL import Image as PILImage

from polymodal.core.sample import Audio
from polymodal.modalities.audio import blocks

_RATE, _STEP = 8_000, 0.01  # samples a second, and the seconds that one peak is of
_PAPER, _INK = (244, 244, 246), (58, 74, 110)


def waveform(audio: Audio, width: int, height: int) -> PILImage.Image:
    """The peaks of a sound around a middle line, the loudest as high as the picture; any length, in bounded memory.

    Raises:
        MediaError: the sound cannot be decoded.
    """
    size = round(_STEP * _RATE)
    peaks: list[float] = []
    for block in blocks(audio, _RATE, 10):
        steps = block[0].abs().split(size)
        peaks += [float(step.max()) for step in steps]
    # Each column is the loudest of the moments that it stands for; a short sound repeats them.
    first = np.arange(width) * len(peaks) // width
    last = np.maximum((np.arange(width) + 1) * len(peaks) // width, first + 1)
    columns = np.array([max(peaks[a:b]) for a, b in zip(first, last, strict=True)])
    reach = np.maximum(columns / max(columns.max(), 1e-3) * (height / 2 - 2), 0.5)
    inked = np.abs(np.arange(height)[:, None] - (height - 1) / 2) <= reach
    return PILImage.fromarray(np.where(inked[..., None], np.array(_INK, np.uint8), np.array(_PAPER, np.uint8)))
