"""The random numbers of an item of a world's split."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from polymodal.core.errors import DataError, did_you_mean


def generator(world: str, splits: Collection[str], split: str, index: int, seed: int) -> np.random.Generator:
    """The same for the same item, whatever was drawn before.

    Raises:
        DataError: there is no such split.
    """
    if split not in splits:
        raise DataError(f"no split {split!r} of {world}{did_you_mean(split, splits)}")
    return np.random.default_rng([seed, index, *split.encode()])
