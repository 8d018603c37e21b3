"""What nano MusicGen and VALL-E build on: the codec of recipes/nano/encodec.py, and sounds as its codes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from typing import Final

import numpy as np
import torch
from jaxtyping import Int16
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import polymodal
from polymodal.core.errors import ConfigError
from polymodal.systems.base import System
from polymodal.systems.encodec import EnCodec
from polymodal.systems.seanet_codec import EnCodecConfig, SEANetCodec

CODEC: Final = "polymodal/nano-encodec"
_ROWS: Final = 16  # sounds that are coded at a time


@lru_cache(maxsize=4)
def earlier(name: str, recipe: str) -> System:
    """A model that an earlier recipe made.

    Args:
        name: of a model that we ship, or the folder ``model`` of a run.
        recipe: what makes it.

    Raises:
        ConfigError: it is not there.
    """
    try:
        return polymodal.load(name)
    except ConfigError as error:
        made = f"runs/nano-{recipe.removesuffix('.py')}/model"
        raise ConfigError(f"{error}. To make it: polymodal train recipes/nano/{recipe}, which leaves {made}") from None


def codec(name: str) -> EnCodec:
    """The trained codec of this name or folder; errors as `earlier`."""
    made = earlier(name, "encodec.py")
    if not isinstance(made, EnCodec):
        raise ConfigError(f"{name} is a {type(made).__name__}, no codec of recipes/nano/encodec.py")
    return made


def lowered(made: EnCodec, bandwidth: float) -> EnCodecConfig:
    """The config of a codec with fewer books: one of the bit rates that it was trained for, in kbit/s."""
    return replace(made.config, bandwidths=(bandwidth,))


def install(made: EnCodec, part: SEANetCodec) -> None:
    """Gives ``part`` the weights of a codec, which may have more books."""
    learned = made.codec.state_dict()
    part.load_state_dict({name: learned[name] for name in part.state_dict()})


def coded(made: EnCodec, waves: Iterable[np.ndarray], books: int) -> list[Int16[Tensor, "_books _frames"]]:
    """The first books of the whole frames of each sound, ten at least: causal, so the same alone and in a batch."""
    assert made.config.seanet.causal
    codes: list[Tensor] = []
    left = iter(waves)
    while few := [torch.from_numpy(wave[: len(wave) // made.hop * made.hop]) for wave in islice(left, _ROWS)]:
        rows = made.quantize(pad_sequence(few, batch_first=True)[:, None], books).to(torch.int16)
        codes += [row[:, : len(wave) // made.hop].clone() for row, wave in zip(rows, few, strict=True)]
    return codes
