"""What the nano recipes without words share: scenes of shapes to learn from, and what the vectors are asked about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from polymodal.core.batch import Batch
from polymodal.core.verbs import Embeds
from polymodal.data.worlds import shapes
from polymodal.evaluate.probe import linear_probe, nearest_neighbours
from polymodal.modalities.image import ImageProcessor

KNOWN, ASKED = 2000, 1000
# The best that one constant answer scores on the held-out pairs.
CHANCE = {
    name: max(Counter(pair[i] for pair in shapes.HELD_OUT).values()) / len(shapes.HELD_OUT)
    for i, name in enumerate(("colour", "shape"))
}


def render(scenes: Sequence[shapes.Scene], size: int) -> UInt8[Tensor, "scenes 3 size size"]:
    return torch.from_numpy(np.stack([shapes.render(scene, size) for scene in scenes])).permute(0, 3, 1, 2)


def close_up(rng: np.random.Generator, *, held_out: bool = False) -> shapes.Scene:
    """A lone object that fills much of the picture; the pair of its colour and shape is a held-out one, or never."""
    scene = shapes.scene(rng, objects=1, held_out=held_out)
    thing = scene.things[0]
    width = rng.uniform(0.5, 0.9) * min(1.0, thing.width / thing.height)
    height = width * thing.height / thing.width
    x, y = (side / 2 + (1 - side) * rng.random() for side in (width, height))
    return replace(scene, things=(replace(thing, width=width, x=x, y=y),))


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Which shape a lone object has, in pairs of colour and shape that nobody has seen; and its colour.

    The probes are fitted to scenes of known pairs: having learned which colour goes with which shape does not help.
    """

    known: list[shapes.Scene]
    asked: list[shapes.Scene]

    @classmethod
    def draw(cls, *, held_out: bool = True, seed: int = 1) -> Questions:
        """``held_out=False`` asks about other scenes of the known pairs: for choosing settings and bars."""
        rng = np.random.default_rng(seed)
        known = [close_up(rng) for _ in range(KNOWN)]
        return cls(known=known, asked=[close_up(rng, held_out=held_out) for _ in range(ASKED)])

    def ask(self, model: Embeds, images: ImageProcessor, size: int) -> dict[str, float]:
        """Accuracies of a linear probe and of 20 nearest neighbours."""
        known, asked = (self._vectors(model, images, size, part) for part in (self.known, self.asked))
        found = {}
        for name, classes in (("shape", shapes.SHAPES), ("colour", tuple(shapes.COLOURS))):
            labels, answers = (
                torch.tensor([classes.index(getattr(scene.things[0], name)) for scene in part])
                for part in (self.known, self.asked)
            )
            found[f"{name}/probe"] = linear_probe(known, labels, asked, answers).value
            found[f"{name}/neighbours"] = nearest_neighbours(known, labels, asked, answers).value
        return found

    def compare(self, model: Embeds, untrained: Embeds, images: ImageProcessor, size: int) -> dict[str, float]:
        """What `ask` gives, beside the same of an untrained network: random features know colours, too."""
        without = self.ask(untrained, images, size)
        return self.ask(model, images, size) | {f"untrained/{name}": value for name, value in without.items()}

    @torch.no_grad()
    def _vectors(
        self, model: Embeds, images: ImageProcessor, size: int, part: list[shapes.Scene]
    ) -> Float[Tensor, "scenes dim"]:
        pixels = images.normalise(render(part, size))
        return torch.cat([model.encode(Batch(pixels=chunk)) for chunk in pixels.split(250)]).cpu()
