"""Pictures into classes that are only named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from polymodal.core.errors import ConfigError
from polymodal.core.sample import Image, Text
from polymodal.core.verbs import Classifies, Embeds

# One name of a class says little; the mean over a few sentences around it is a better one.
TEMPLATES = (
    "{}",
    "a picture of {}",
    "a photo of {}",
    "an image of {}",
    "a drawing of {}",
    "an icon of {}",
)


@runtime_checkable
class Matches(Embeds, Classifies, Protocol):
    """Embeds pictures and texts, and scores one against the other."""


def class_vectors(model: Embeds, labels: Sequence[str], templates: Sequence[str]) -> Float[Tensor, "labels dim"]:
    """One unit vector a label: the mean of its unit vectors in all templates, normalised again.

    Raises:
        ConfigError: fewer than two labels, a label twice, or a template without exactly one ``{}``.
    """
    if len(labels) < 2 or len(set(labels)) != len(labels) or not all(label.strip() for label in labels):
        raise ConfigError(f"at least two different labels are needed, not {', '.join(map(repr, labels)) or 'none'}")
    for template in templates:
        if template.count("{}") != 1:
            raise ConfigError(f"a template holds {{}} once, where the label goes: {template!r} does not")
    texts = [Text(template.replace("{}", label)) for label in labels for template in templates]
    vectors = F.normalize(model.embed(texts), dim=-1)
    return F.normalize(vectors.view(len(labels), len(templates), -1).mean(1), dim=-1)


@torch.no_grad()
def classify(
    model: Matches,
    images: Any,
    labels: Sequence[str],
    *,
    templates: Sequence[str] = TEMPLATES,
    calibrate: bool = False,
) -> Float[Tensor, "images labels"]:
    """Zero-shot class probabilities: the softmax, over the labels, of the model's logits at its own temperature.

    Args:
        model: embeds pictures and texts and has logits.
        images: what `Embeds.embed` takes.
        labels: the names of the classes.
        templates: sentences with ``{}`` for the label.
        calibrate: divides each probability by what the model gives the label for pictures that show nothing (one grey,
            one black, one white, noise) and normalises again, which takes away a liking for some of the words
            (contextual calibration, Zhao et al. 2021, https://arxiv.org/abs/2102.09690).

    Raises:
        ConfigError: the labels or templates are unusable.
        MediaError: a picture cannot be read.
    """
    classes = class_vectors(model, labels, templates)
    logits = model.logits(model.embed(images), classes).float().cpu()
    if calibrate:
        empty = model.logits(model.embed(_pictures_of_nothing()), classes).float().cpu()
        logits = logits - empty.softmax(1).mean(0).clamp_min(1e-12).log()
    return logits.softmax(1)


def _pictures_of_nothing() -> list[Image]:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    flat = [np.full((64, 64, 3), level, np.uint8) for level in (0, 128, 255)]
    return [Image(pixels, name="a picture of nothing") for pixels in (*flat, noise)]
