"""The smallest painter: a network a place over latents that are means of 4 x 4 pixels. It knows a few colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polymodal.core.batch import Batch
from polymodal.core.errors import MediaError
from polymodal.core.verbs import TensorSpec
from polymodal.nn.noise import Schedule
from polymodal.samplers.diffusion import Diffusion
from polymodal.samplers.flow import Flow, Sampling
from polymodal.systems.painting import Condition, Painter

WORDS = ("", "red", "green", "blue", "white")
COLOURS = torch.tensor([[0.5, 0.5, 0.5], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]])


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    dim: int = 32
    sampling: Sampling = field(default_factory=lambda: Diffusion(schedule=Schedule(steps=100, last=0.1), clip=1.5))


class ToyPainter(Painter):
    """A word is a colour."""

    config: ToyConfig
    steps, guidance = 10, 2.0
    size, multiple = (16, 8), 4  # type: ignore[assignment]

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.sampling = config.sampling
        self.words = nn.Embedding(len(WORDS), config.dim)
        self.first, self.last = nn.Linear(3 + 2, config.dim), nn.Linear(config.dim, 3)
        self.looked = nn.Linear(3, config.dim)

    def init_weights(self) -> None:
        for layer in (self.words, self.first, self.last, self.looked):
            nn.init.normal_(layer.weight, std=0.3)

    def prompt(self, texts: Sequence[str]) -> Batch:
        rows = [text.split()[:1] or [""] for text in texts]
        if unknown := [word for (word,) in rows if word not in WORDS]:
            raise MediaError(f"no word {unknown[0]!r}")
        return Batch(ids=torch.tensor([[WORDS.index(word)] for (word,) in rows]))

    def condition(self, batch: Batch) -> Condition:
        return Batch(words=self.words(batch["ids"]))

    def drop(self, batch: Batch, rows: Tensor) -> Batch:
        return Batch(batch, ids=batch["ids"].masked_fill(rows[:, None], 0))

    def latents(self, size: tuple[int, int]) -> tuple[int, ...]:
        return 3, size[1] // 4, size[0] // 4

    def denoise(self, x: Tensor, when: Tensor, condition: Condition) -> Tensor:
        total = 1 if isinstance(self.sampling, Flow) else self.sampling.schedule.steps
        t = (when / total).view(-1, 1, 1, 1).expand(-1, *x.shape[2:], 1)
        hidden = self.first(torch.cat([x.movedim(1, -1), t, (3.14 * t).cos()], -1)) + condition["words"][:, None]
        if "control" in condition:
            hidden = hidden + self.looked(condition["control"].movedim(1, -1))
        return self.last(F.silu(hidden) * hidden.sin()).movedim(-1, 1)

    def encode_pixels(self, pixels: Tensor, posterior: Tensor | None = None) -> Tensor:
        means = F.avg_pool2d(pixels, 4)
        return means if posterior is None else means + 0.01 * posterior

    def decode_latents(self, latents: Tensor) -> Tensor:
        return F.interpolate(latents, scale_factor=4)

    def look_at(self, condition: Condition, control: Tensor, *, against: bool = False) -> Condition:
        return Batch(condition, control=F.avg_pool2d(control, 4))

    def inputs_spec(self) -> dict[str, TensorSpec]:
        return {
            "ids": TensorSpec(shape=(1,), dtype=torch.int64, high=len(WORDS)),
            "pixels": TensorSpec(shape=(3, 8, 16)), "chance": TensorSpec(shape=(), dtype=torch.int64, high=100),
        }  # fmt: skip


def toy(sampling: Sampling | None = None, *, steps: int = 0) -> ToyPainter:
    """A painter, trained for so many steps to paint the colour that it is told."""
    torch.manual_seed(0)
    model = ToyPainter.build(ToyConfig() if sampling is None else ToyConfig(sampling=sampling)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        ids = torch.randint(1, len(WORDS), (32, 1))
        pixels = (COLOURS[ids[:, 0]] * 2 - 1)[:, :, None, None].expand(-1, -1, 8, 8)
        loss = model.loss(Batch(ids=ids, pixels=pixels)).mean
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()
