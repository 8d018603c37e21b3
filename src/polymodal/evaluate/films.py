"""Scores of films: how near two sets of them are (FVD).

The distance is the one between pictures (`evaluate.pictures.frechet_distance`), of features of whole films. Published
figures are of I3D's: whoever has them makes `Features` of that name. Here any model that gives vectors to pictures
gives features to films, named as such, and the two are never compared. Both sets have as many frames a film, and a
second: the name does not say so.

The distance is biased upwards where films are few: `film_features` gives three times as many numbers as a picture has,
and of fewer films than that a covariance is not of full rank. Compare sets of one size alone, with true films against
true ones beside them.

Source: Unterthiner et al., "Towards Accurate Generative Models of Video", 2018, https://arxiv.org/abs/1812.01717.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from polymodal.core.errors import DataError
from polymodal.core.verbs import Embeds
from polymodal.evaluate.pictures import Distance, Features, frechet_distance


def film_features(
    model: Embeds, films: Sequence[UInt8[np.ndarray, "time height width 3"]], *, name: str, batch_size: int = 64
) -> Features:
    """What a model of pictures gives to films: the mean of the frames' vectors, the way from the first to the last, and
    how much two that follow each other differ, value by value. The first says what is seen, the others how it moves.

    Raises:
        DataError: a film has one frame, or none.
    """
    lengths = [len(film) for film in films]
    if min(lengths, default=0) < 2:
        raise DataError(
            f"{len(films)} films, of which the shortest has {min(lengths, default=0)} frames: two are needed"
        )
    frames = [Image.fromarray(frame) for film in films for frame in film]
    vectors = model.embed(frames, batch_size=batch_size).split(lengths)
    values = [
        torch.cat([v.mean(0), v[-1] - v[0], torch.stack([(b - a).abs() for a, b in pairwise(v)]).mean(0)])
        for v in vectors
    ]
    return Features(f"{name} {model.fingerprint} over time", torch.stack(values))


def fvd(made: Features, real: Features) -> Distance:
    """The Fréchet distance of films by their features; its ``pictures`` are the numbers of films.

    Raises:
        DataError: the features are of two extractors, or a set has fewer than two films.
    """
    return frechet_distance(made, real)
