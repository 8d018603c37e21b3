"""Generation of several codebooks at a time, each of them some steps behind the first (MusicGen's delay pattern).

With delays of 0, 1, 2 and 3, a step says the first code of one frame, the second of the frame before, and so on: each
code is chosen with all coarser ones of its frame in sight. Equal delays are codebooks in parallel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError
from polymodal.samplers.autoregressive import Settings, generator


def delay(
    codes: Int[Tensor, "batch books frames"], delays: Sequence[int], fill: int
) -> Int[Tensor, "batch books steps"]:
    """Each book moved back by its delay; ``fill`` stands where it has no frame yet, or none any more."""
    batch, books, frames = codes.shape
    assert len(delays) == books, "a delay for each book"
    out = codes.new_full((batch, books, frames + max(delays)), fill)
    for book, by in enumerate(delays):
        out[:, book, by : by + frames] = codes[:, book]
    return out


def undelay(steps: Int[Tensor, "batch books steps"], delays: Sequence[int]) -> Int[Tensor, "batch books frames"]:
    """The reverse of `delay`."""
    frames = steps.shape[2] - max(delays)
    return torch.stack([steps[:, book, by : by + frames] for book, by in enumerate(delays)], 1)


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How the codes of one row are drawn.

    Attributes:
        frames: how many are made; at most so many, where the model ends rows.
        temperature: 0 takes the best code.
        top_k: draw from the best ``k`` only.
        guidance: ``guided = free + guidance * (asked - free)`` of scores, ``free`` being those without the condition;
            1 is none.
        seed: of this row's random numbers; None draws one from torch's global generator.

    Raises:
        ConfigError: a value is out of its range.
    """

    frames: int
    temperature: float = 1.0
    top_k: int | None = None
    guidance: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise ConfigError(f"frames must be at least 1, not {self.frames}")
        self.settings  # noqa: B018 - the other ranges are those of text

    @property
    def settings(self) -> Settings:
        return Settings(temperature=self.temperature, top_k=self.top_k, guidance=self.guidance, seed=self.seed)


@runtime_checkable
class WritesCodes(Protocol):
    """What the loop needs of a model."""

    @property
    def delays(self) -> tuple[int, ...]:
        """Of each codebook, in steps."""
        ...

    @property
    def special_id(self) -> int:
        """What is read where a book has no code."""
        ...

    @property
    def end_id(self) -> int | None:
        """What the first book says behind the last frame; None: rows are as long as they are asked for."""
        ...

    def new_memory(self, batch: Batch, steps: int) -> Any:
        """For the rows of a batch and so many steps."""
        ...

    def begin(self, batch: Batch, memory: Any) -> Float[Tensor, "rows books codes"]:
        """Reads the conditions into an empty memory; scores of the first step.

        Rows that ``dropped`` marks are read without theirs.
        """
        ...

    def step(self, codes: Int[Tensor, "rows books"], memory: Any) -> Float[Tensor, "rows books codes"]:
        """Reads the codes of a step; scores of the next one."""
        ...


class _Row:
    """One row while it is written: its random numbers, and the steps whose frames are not complete."""

    def __init__(self, row: int, drawing: Drawing, model: WritesCodes) -> None:
        self.row, self._drawing, self._special, self._end = row, drawing, model.special_id, model.end_id
        self.lanes = 1 + (drawing.guidance != 1)
        self._generator = generator(drawing.settings, 0)
        self._delays, self._last, self._frames = torch.tensor(model.delays), max(model.delays), drawing.frames
        self._steps: list[Tensor] = []  # the last ones, as many as the largest delay and one more

    def advance(self, scores: Float[Tensor, "lanes books codes"], step: int) -> Tensor:
        """The codes of this step."""
        asked = scores[0].float()
        if self.lanes == 2:
            free = scores[1].float()
            asked = free + self._drawing.guidance * (asked - free)
        if self._end is not None and step == 0:
            asked[0, self._end] = asked[0].min() - 1e4  # a sound has a frame
        codes = draw(asked, self._drawing, self._generator).cpu()
        frame = step - self._delays
        if codes[0] == self._end and frame[0] < self._frames:
            self._frames = int(frame[0])
        codes = torch.where((frame >= 0) & (frame < self._frames), codes, self._special)
        self._steps = [*self._steps, codes][-self._last - 1 :]
        return codes

    def frame(self, step: int) -> Tensor | None:
        """The frame that this step completed."""
        if not self._last <= step < self._frames + self._last:
            return None
        return torch.stack([self._steps[by][book] for book, by in enumerate(self._delays.tolist())])

    def ended(self, step: int) -> bool:
        return step + 1 >= self._frames + self._last


def draw(scores: Float[Tensor, "books codes"], drawing: Drawing, random: torch.Generator) -> Int[Tensor, " books"]:
    """A code of each book by its probability, from one random number each."""
    if not bool(scores.isfinite().all()):
        raise ConfigError("the model's scores are no numbers; run it in a higher precision")
    if drawing.temperature == 0:
        return scores.argmax(1)
    scores = scores / drawing.temperature
    if drawing.top_k is not None and drawing.top_k < scores.shape[1]:
        scores = scores.masked_fill(scores < scores.topk(drawing.top_k).values[:, -1:], -torch.inf)
    chances = scores.double().softmax(1).cumsum(1)
    place = torch.rand(len(scores), 1, dtype=torch.float64, generator=random).to(chances.device) * chances[:, -1:]
    place = torch.minimum(place, chances[:, -1:].nextafter(torch.zeros_like(place)))
    return torch.searchsorted(chances, place, right=True)[:, 0]


@torch.no_grad()
def generate(
    model: WritesCodes, batch: Batch, drawings: Drawing | Sequence[Drawing]
) -> Iterator[tuple[int, Int[Tensor, " books"]]]:
    """Writes frames of codes for each row; a row's are the same alone and in a batch.

    Args:
        model: writes.
        batch: the conditions of the rows.
        drawings: of all rows, or one for each.

    Yields:
        A row and its next frame, as soon as all its codes are chosen.

    Raises:
        ConfigError: as many drawings as rows are needed.
        MediaError: the memory of the model cannot hold so many steps.
    """
    ways = [drawings] * batch.size if isinstance(drawings, Drawing) else list(drawings)
    if len(ways) != batch.size:
        raise ConfigError(f"{len(ways)} drawings for {batch.size} rows")
    rows = [_Row(number, way, model) for number, way in enumerate(ways)]
    order = [row.row for row in rows for _ in range(row.lanes)]
    lanes = batch.take(order)
    lanes["dropped"] = torch.tensor([place > 0 and order[place - 1] == row for place, row in enumerate(order)])
    memory = model.new_memory(lanes, max(way.frames for way in ways) + max(model.delays))
    scores, step = model.begin(lanes, memory), 0
    while rows:
        start, running = 0, []
        kept: list[int] = []
        codes: list[Tensor] = []
        for row in rows:
            said = row.advance(scores[start : start + row.lanes], step)
            frame = row.frame(step)
            if frame is not None:
                yield row.row, frame
            if not row.ended(step):
                running.append(row)
                kept += range(start, start + row.lanes)
                codes += [said] * row.lanes
            start += row.lanes
        if len(kept) < start:
            memory.select(torch.tensor(kept, dtype=torch.int64, device=scores.device))
        rows, step = running, step + 1
        if rows:
            scores = model.step(torch.stack(codes).to(scores.device), memory)


def whole(model: WritesCodes, batch: Batch, drawings: Drawing | Sequence[Drawing]) -> list[Int[Tensor, "books frames"]]:
    """All frames of each row; see `generate`."""
    made: list[list[Tensor]] = [[] for _ in range(batch.size)]
    for row, frame in generate(model, batch, drawings):
        made[row].append(frame)
    return [torch.stack(frames, 1) for frames in made]


def sounded(
    frames: Iterator[Int[Tensor, " books"]],
    decode: Callable[[Int[Tensor, "1 books frames"]], Float[Tensor, "1 channels samples"]],
    *,
    first: int,
    ahead: int,
) -> Iterator[Float[Tensor, "channels samples"]]:
    """Sound while its frames are still being written; the blocks together are what ``decode`` gives for all of them.

    A decoder remembers from the first frame on, so all of them are decoded again for each block. Each block is as long
    as everything before it: that costs at most two more times what decoding at the end would.

    Args:
        frames: of one row.
        decode: codes to waveforms, equally many samples for each frame.
        first: frames of the first block.
        ahead: so many later frames may still change the sound of a frame.
    """
    held: list[Tensor] = []
    done = 0  # frames whose sound was given

    def sound(until: int) -> Float[Tensor, "channels samples"]:
        wave = decode(torch.stack(held, 1)[None])[0]
        hop = wave.shape[1] // len(held)
        return wave[:, done * hop : until * hop]

    for frame in frames:
        held.append(frame)
        if len(held) - ahead >= max(first, 2 * done):
            yield sound(len(held) - ahead)
            done = len(held) - ahead
    if done < len(held):
        yield sound(len(held))
