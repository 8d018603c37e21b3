"""A policy for screens: it sees a page, is told what to do there, and clicks or types.

Papers: Shi et al., "World of Bits: An Open-Domain Platform for Web-Based Agents", 2017,
https://proceedings.mlr.press/v70/shi17a.html: behaviour cloning of convolutions over the screen and the words, whose
answer is a kind of act and a place on a grid; Humphreys et al., "A data-driven approach for learning to control
computers", 2022, https://arxiv.org/abs/2202.08137: what is typed is copied from what is told. Neither has public code.

    instruction -> words -> Transformer ----------------+
    screen -> convolutions steered by words (1/8) -+-> 1/16 -> blocks over words and places -> kind, word to type
    pointer -> bump on the grid -------------------+-----------------+-> score and offset of each place

Deviations: the parts are ours, small enough to train in minutes, and there is no file format of others: names are ours.
A click is the likeliest cell of eight pixels and an offset in it; drags, scrolls and keys have no head yet.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from polymodal.core.batch import IGNORE, Batch, Loss
from polymodal.core.errors import ConfigError, DataError, MediaError
from polymodal.core.observation import Observation
from polymodal.core.verbs import TensorSpec
from polymodal.encoders.text import TextConfig, TextTower
from polymodal.encoders.trunk import Steered
from polymodal.modalities.image import HALF, Exact, ImageProcessor
from polymodal.nn.block import Block
from polymodal.systems.acting import Policy
from polymodal.tokenizers.words import PAD, UNKNOWN, Words
from polymodal.weights.native import native_format

CELL: Final = 8  # pixels along a side
HIDDEN: Final = 0.05  # of the words of a lesson
_CODES: Final = 5  # kind, x, y, and a second place, which is not used, come before the characters
_WORD: Final = re.compile(r"(?:-(?=\d))?\w+")


def words_of(text: str) -> list[str]:
    """The words of an instruction as they are written; a number keeps its sign."""
    return _WORD.findall(text)


def spoken(text: str) -> str:
    """An instruction in which a sign is part of a word that `Words` knows."""
    return " ".join(word.replace("-", "minus") for word in words_of(text))


@dataclass(frozen=True, kw_only=True)
class ScreenConfig:
    """The size of the screen in pixels, the words that are understood, and what the numbers of an action mean.

    An action is a kind, x and y in parts of the screen, two numbers of no use here, and the code points of a text.

    Attributes:
        words: of instructions, as `spoken`; others are read as one unknown word, which can be typed all the same.
        channels: of the convolutions.
        dim: of words and of places of sixteen pixels.
        context: the longest instruction in words.
        kinds: of acts.
        placed: numbers of those that are done at a place.
        typed: number of the one that types.
        characters: the longest text.
    """

    words: tuple[str, ...]
    height: int = 210
    width: int = 160
    channels: int = 48
    dim: int = 64
    num_layers: int = 2
    context: int = 32
    kinds: int = 9
    placed: tuple[int, ...] = (1, 2, 3, 4)
    typed: int = 7
    characters: int = 32

    def __post_init__(self) -> None:
        if self.channels % 8 or self.dim % 32 or min(self.height, self.width) < 2 * CELL:
            raise ConfigError("a screen of 16 pixels at least, channels that 8 divides and a width that 32 divides")
        if not all(0 <= kind < self.kinds for kind in (*self.placed, self.typed)):
            raise ConfigError(f"there are {self.kinds} kinds of acts, and no {self.placed}, {self.typed}")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of cells; a rest that is no pair of them is not clicked."""
        return 2 * (self.height // (2 * CELL)), 2 * (self.width // (2 * CELL))


class Answer(NamedTuple):
    """Scores of kinds, cells and words, and where in each cell the place is (x, y from -1/2 to 1/2 of its side)."""

    kind: Float[Tensor, "batch kinds"]
    cell: Float[Tensor, "batch cells"]
    offset: Float[Tensor, "batch cells 2"]
    word: Float[Tensor, "batch words"]


@final
class ScreenPolicy(Policy):
    """Convolutions, a small Transformer, and a score for each kind, cell and word."""

    config: ScreenConfig
    normalisation = "identity"
    horizon = 1
    cameras = ("screen",)
    state_width = 2  # where the pointer is, in parts of the screen

    def __init__(self, config: ScreenConfig) -> None:
        super().__init__(config)
        c = config
        self.action_width = _CODES + c.characters
        self.words = Words(words=c.words, context=c.context)
        self.text = TextTower(
            TextConfig(
                vocab_size=self.words.vocab_size, context=c.context, dim=c.dim, num_layers=1, num_heads=c.dim // 32,
                hidden_dim=2 * c.dim, causal=False,
            )
        )  # fmt: skip
        self.stem = nn.Sequential(
            nn.Conv2d(3, c.channels // 2, 6, 4, 1), nn.GroupNorm(4, c.channels // 2), nn.ReLU(),
            nn.Conv2d(c.channels // 2, c.channels, 3, 2, 1), nn.GroupNorm(8, c.channels), nn.ReLU(),
        )  # fmt: skip
        self.position = nn.Parameter(torch.zeros(c.channels, *c.grid))
        self.pointer = nn.Parameter(torch.empty(c.channels, 1, 1))
        self.steered = Steered(c.channels, c.dim)
        self.coarsen = nn.Conv2d(c.channels, c.dim, 2, 2)
        self.mix_blocks = nn.ModuleList(Block(c.dim, c.dim // 32, 2 * c.dim) for _ in range(c.num_layers))
        self.norm = nn.LayerNorm(c.dim)
        self.refine = nn.ConvTranspose2d(c.dim, c.channels, 2, 2)
        self.query = nn.Linear(c.dim, c.channels)
        self.offset = nn.Conv2d(c.channels, 2, 1)
        self.kind = nn.Linear(c.dim, c.kinds)
        self.word = nn.Linear(c.dim, 1)
        self.under = nn.Linear(2 * c.channels, c.kinds + c.dim)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Torch's own, FiLM that does nothing, and words normal."""
        nn.init.normal_(self.text.embed_tokens.weight)
        nn.init.normal_(self.text.position, std=0.1)
        nn.init.normal_(self.pointer)
        nn.init.zeros_(self.under.weight)
        self.steered.film.init_weights()

    def inputs_spec(self) -> dict[str, TensorSpec]:
        c, count = self.config, min(6, self.config.context)
        return {
            "pixels": TensorSpec(shape=(1, 3, c.height, c.width)),
            "state": TensorSpec(shape=(2,)),
            "ids": TensorSpec(shape=(count,), dtype=torch.int64, low=1, high=self.words.vocab_size),
            "letters": TensorSpec(shape=(count, c.characters), dtype=torch.int64, low=97, high=123),
            "actions_kind": TensorSpec(shape=(), dtype=torch.int64, high=c.kinds),
            "actions_place": TensorSpec(shape=(2,)),
            "actions_word": TensorSpec(shape=(), dtype=torch.int64, high=count),
        }

    def default_images(self) -> ImageProcessor:
        side = Exact(height=self.config.height, width=self.config.width)
        return ImageProcessor(resize=side, resample="bilinear", mean=HALF, std=HALF)

    def instruct(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The ``ids`` of words and their ``letters``: zeros are behind the last of a word.

        Raises:
            MediaError: an instruction or a word is too long: nothing is ever cut.
        """
        longest = self.config.characters
        ids = self.words([spoken(text) for text in texts])
        letters = torch.zeros(*ids.shape, longest, dtype=torch.int64)
        for row, text in enumerate(texts):
            for column, word in enumerate(words_of(text)):
                if len(word) > longest:
                    raise MediaError(f"a word of {len(word)} letters; the policy can type {longest}: {word[:80]}")
                letters[row, column, : len(word)] = torch.tensor([ord(letter) for letter in word])
        return {"ids": ids, "letters": letters}

    def lesson(
        self,
        observations: Sequence[Observation],
        actions: Float[Tensor, "batch horizon action_dim"],
        valid: Bool[Tensor, "batch horizon"],
    ) -> Batch:
        """Which kind of act, where, and which word.

        Raises:
            DataError: a text that was typed is no word of its instruction.
        """
        c, batch, wanted = self.config, self.observe(observations), actions[:, 0]
        kind = wanted[:, 0].round().long().where(valid[:, 0], IGNORE)
        said = (batch["letters"] == wanted[:, None, _CODES:].long()).all(-1)
        for row in ((kind == c.typed) & ~said.any(1)).nonzero()[:, 0].tolist():
            text = "".join(map(chr, wanted[row, _CODES:].int().tolist())).rstrip("\0")
            raise DataError(f"{text!r} is typed, and is no word of: {observations[row].instruction}")
        word = said.int().argmax(1).where(kind == c.typed, IGNORE)
        return Batch(batch, actions_kind=kind, actions_place=wanted[:, 1:3].contiguous(), actions_word=word)

    def forward(self, batch: Batch) -> Answer:
        c, ids, (rows, columns) = self.config, batch["ids"], self.config.grid
        valid = ids != PAD
        words = self.text(ids, valid).x
        told = (words * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)
        x = self.stem(batch["pixels"][:, 0])[..., :rows, :columns]
        near = self._near(batch["state"])
        x = self.steered(x + self.position + self.pointer * near, told)
        places = self.coarsen(x)
        tokens = torch.cat([words, places.flatten(2).transpose(1, 2)], 1)
        mask = F.pad(valid, (0, tokens.shape[1] - ids.shape[1]), value=True)[:, None, None]
        for block in self.mix_blocks:
            tokens = block(tokens, mask=mask)
        words, seen = self.norm(tokens).split([ids.shape[1], tokens.shape[1] - ids.shape[1]], 1)
        x = torch.relu(x + self.refine(seen.transpose(1, 2).unflatten(2, places.shape[2:])))
        mean = (words * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)
        cell = (self.query(mean)[:, None] @ x.flatten(2))[:, 0].float() / c.channels**0.5
        # What is next in a form, and which text belongs there, is seen where the pointer is, and in that line.
        under = [
            (x * at).sum((2, 3)) / at.sum((2, 3)).clamp(min=1e-6) for at in (near, near.sum(3, True).expand_as(near))
        ]
        kind, wanted = self.under(torch.cat(under, 1)).split([c.kinds, c.dim], 1)
        score = (
            (self.word(words)[..., 0] + (words * wanted[:, None]).sum(2) / c.dim**0.5)
            .float()
            .masked_fill(~valid, torch.finfo(torch.float32).min)
        )
        offset = self.offset(x).flatten(2).transpose(1, 2).float()
        return Answer((self.kind(mean) + kind).float(), cell, offset, score)

    def _near(self, pointer: Float[Tensor, "batch 2"]) -> Float[Tensor, "batch 1 rows columns"]:
        """A bump, a cell wide, where the pointer is."""
        c, (rows, columns) = self.config, self.config.grid
        size = pointer.new_tensor([c.width, c.height]) / CELL
        x, y = (pointer * size - 0.5).T[:, :, None]
        across, down = (torch.arange(n, device=pointer.device) for n in (columns, rows))
        near_x, near_y = torch.exp(-((x - across) ** 2) / 2), torch.exp(-((y - down) ** 2) / 2)
        return (near_y[:, :, None] * near_x[:, None])[:, None]

    def loss(self, batch: Batch) -> Loss:
        """Cross-entropy of the kind, the cell and the word, and the absolute error in the cell; rows are its weight."""
        c, (rows, columns), ids = self.config, self.config.grid, batch["ids"]
        if self.training:
            hidden = torch.rand(ids.shape, device=ids.device) < HIDDEN
            ids = ids.where(~hidden | (ids == PAD), UNKNOWN)
        answer, kind = self(Batch(batch, ids=ids)), batch["actions_kind"]
        total = F.cross_entropy(answer.kind, kind, ignore_index=IGNORE, reduction="sum")
        typed = batch["actions_word"].where(kind == c.typed, IGNORE)
        total = total + F.cross_entropy(answer.word, typed, ignore_index=IGNORE, reduction="sum")
        here = torch.isin(kind, kind.new_tensor(c.placed))
        size = batch["actions_place"].new_tensor([c.width, c.height]) / CELL
        place = (batch["actions_place"] * size)[here]
        cell = place.floor().clamp(torch.zeros_like(size), size.new_tensor([columns - 1, rows - 1]))
        number = (cell[:, 1] * columns + cell[:, 0]).long()
        total = total + F.cross_entropy(answer.cell[here], number, reduction="sum")
        offset = answer.offset[here][torch.arange(len(number), device=number.device), number]
        total = total + (offset - (place - cell - 0.5)).abs().sum()
        return Loss(total=total, weight=int((kind != IGNORE).sum()))

    def chunk(
        self, batch: Batch, generator: torch.Generator | None = None
    ) -> Float[Tensor, "batch horizon action_width"]:
        """The likeliest act: a kind, a place, and the letters of a word where the kind types."""
        c, answer = self.config, self(batch)
        every = torch.arange(len(answer.kind), device=answer.kind.device)
        kind, cell, word = (score.argmax(1) for score in (answer.kind, answer.cell, answer.word))
        columns = c.grid[1]
        corner = torch.stack([cell % columns, cell // columns], 1)
        size = answer.offset.new_tensor([c.width, c.height]) / CELL
        place = ((corner + 0.5 + answer.offset[every, cell]) / size).clamp(0, 1)
        letters = batch["letters"][every, word] * (kind == c.typed)[:, None]
        return torch.cat([kind[:, None], place, torch.zeros_like(place), letters], 1)[:, None]


ScreenPolicy.formats = {"hf": native_format("polymodal_screen", ScreenConfig)}

PRESETS = {"polymodal-screen": lambda: ScreenConfig(words=(), channels=256, dim=512, num_layers=6)}
