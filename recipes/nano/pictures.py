"""What the nano dual encoders share: pictures with captions to train on, and held-out questions to answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image as PILImage
from torch import Tensor

from polymodal.core.batch import Batch
from polymodal.core.sample import Sample
from polymodal.data.worlds import pictograms, shapes
from polymodal.data.worlds.pictograms import Pictograms
from polymodal.data.worlds.redraw import redraw
from polymodal.evaluate.retrieval import ranks
from polymodal.modalities.image import ImageProcessor, PatchProcessor
from polymodal.tokenizers.text import Pad, TextTokenizer
from recipes.nano.scenes import close_up

SIZE = 56
CONTEXT = 32
VOCAB = 5000
# How often a picture of an artist is shown an epoch: emoji have the best names, in seven languages.
REPEATS = {"noto": 4}
SCENES = 6000  # new scenes of shapes an epoch
# The same emoji in black, by other hands than the held-out artist's: in `Forms` alone.
BLACK = {"unifont": 2, "dejavu": 3, "freeserif": 2}
BARE = 0.3  # of the objects in the captions of `Forms`: their shape alone is named
LONE = 0.4  # of the batches of `Shapes`: lone objects only


@lru_cache(maxsize=1)
def world() -> Pictograms:
    return Pictograms.load()


@lru_cache(maxsize=1)
def _learned() -> TextTokenizer:
    rng = np.random.default_rng(0)
    records = [world().records[i] for i in world().split("train")]
    records = [r for r in records if r.artist not in BLACK]  # they have the names of the emoji
    texts = [pictograms.caption(r, rng) for r in records for _ in range(4)]
    texts += [shapes.describe(shapes.scene(rng), rng) for _ in range(500)]
    return TextTokenizer.train_bpe(texts, VOCAB)


def tokenizer(length: int = CONTEXT, pad: Pad = "longest") -> TextTokenizer:
    """Byte-level BPE learned on training captions only; the same on every machine."""
    return replace(_learned(), length=length, pad=pad)


def as_batch(images: ImageProcessor | PatchProcessor, pixels: UInt8[Tensor, "batch 3 height width"]) -> Batch:
    """Pictures that are already as large as a system reads them, in the form in which it reads them."""
    if isinstance(images, ImageProcessor):
        return Batch(pixels=images.normalise(pixels))
    patches, mask, shapes = images.from_pil([PILImage.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels])
    return Batch(patches=patches, mask=mask, shapes=shapes)


@dataclass(frozen=True)
class Captions:
    """Pictograms on random backgrounds and scenes of shapes, each with a caption drawn anew."""

    images: ImageProcessor | PatchProcessor
    tokenizer: TextTokenizer

    @cached_property
    def _rows(self) -> np.ndarray:
        return np.concatenate([np.repeat(i, self.repeats(world().records[i].artist)) for i in world().split("train")])

    def repeats(self, artist: str) -> int:
        """How often each picture of an artist is shown an epoch."""
        return 0 if artist in BLACK else REPEATS.get(artist, 1)

    def drawings(self, rows: np.ndarray, rng: np.random.Generator) -> UInt8[np.ndarray, "batch height width 4"]:
        """The pictures of some rows, as their artists drew them."""
        return world().rgba(rows)

    def scene(self, rng: np.random.Generator) -> tuple[shapes.Scene, str]:
        """A scene of shapes and its caption."""
        scene = shapes.scene(rng)
        return scene, shapes.describe(scene, rng)

    def __len__(self) -> int:
        return len(self._rows) + SCENES

    def raw(
        self, indices: Sequence[int], rng: np.random.Generator
    ) -> tuple[UInt8[Tensor, "batch 3 size size"], Int[Tensor, "batch tokens"]]:
        """Pictures of `SIZE` pixels and the ids of their captions."""
        index = np.asarray(indices)
        drawn = self._rows[index[index < len(self._rows)]]
        return self._composed(drawn, [self.scene(rng) for _ in range(len(index) - len(drawn))], rng)

    def _composed(
        self, drawn: np.ndarray, scenes: list[tuple[shapes.Scene, str]], rng: np.random.Generator
    ) -> tuple[UInt8[Tensor, "batch 3 size size"], Int[Tensor, "batch tokens"]]:
        """Drawings on new backgrounds, then scenes as they are."""
        pixels = [pictograms.compose(self.drawings(drawn, rng), rng, SIZE)] if len(drawn) else []
        texts = [pictograms.caption(world().records[i], rng) for i in drawn]
        if scenes:
            rendered = np.stack([shapes.render(scene, SIZE) for scene, _ in scenes])
            pixels.append(torch.from_numpy(rendered).permute(0, 3, 1, 2))
            texts += [text for _, text in scenes]
        ids, _ = self.tokenizer(texts)
        return torch.cat(pixels), ids

    def batch(self, indices: Sequence[int], rng: np.random.Generator) -> Batch:
        pixels, ids = self.raw(indices, rng)
        return Batch(as_batch(self.images, pixels) | {"ids": ids})


@dataclass(frozen=True)
class Forms(Captions):
    """The same where the form has to do: black drawings of the emoji, pictures redrawn in one colour, lone shapes.

    What only colour tells (a red apple from a green one) is learned from `Captions` first.
    """

    def repeats(self, artist: str) -> int:
        return BLACK.get(artist) or REPEATS.get(artist, 1)

    def drawings(self, rows: np.ndarray, rng: np.random.Generator) -> UInt8[np.ndarray, "batch height width 4"]:
        """Two in five are redrawn; skin tones and what is black stay as they are."""
        rgba = world().rgba(rows)
        records = [world().records[i] for i in rows]
        coloured = np.array([r.tone is None and r.artist not in BLACK for r in records])
        rgba[coloured] = redraw(rgba[coloured], rng)
        return rgba

    def scene(self, rng: np.random.Generator) -> tuple[shapes.Scene, str]:
        """Mostly one object, large in half of the scenes: what a shape is, is learned there."""
        kind = rng.random()
        objects = 1 if kind < 0.85 else int(rng.integers(2, 4))
        scene = close_up(rng) if kind < 0.5 else shapes.scene(rng, objects=objects)
        return scene, shapes.describe(scene, rng, bare=BARE)


@dataclass(frozen=True)
class Shapes(Forms):
    """The same, where some batches are of lone objects only: then nothing but colour, size and shape tells them apart.

    In a mixed batch few pictures are left that a shape has to tell from the right one, and it is hardly learned.
    """

    def raw(
        self, indices: Sequence[int], rng: np.random.Generator
    ) -> tuple[UInt8[Tensor, "batch 3 size size"], Int[Tensor, "batch tokens"]]:
        if rng.random() > LONE:
            return super().raw(indices, rng)
        scenes = [close_up(rng) if rng.random() < 0.4 else shapes.scene(rng, objects=1) for _ in indices]
        return self._composed(np.array([], int), [(s, shapes.describe(s, rng, bare=BARE)) for s in scenes], rng)


class Questions:
    """Held-out retrieval and zero-shot questions, asked of any system that embeds pictures and texts."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def _texts(self, texts: Sequence[str]) -> Tensor:
        chunks = [texts[i : i + 256] for i in range(0, len(texts), 256)]
        return torch.cat(
            [self.model.encode(self.model.prepare([Sample.of(t) for t in chunk])) for chunk in chunks]
        ).cpu()

    def _pictures(self, rows: Sequence[int] | np.ndarray) -> Tensor:
        chunks = [world().rgba(rows[i : i + 256]) for i in range(0, len(rows), 256)]
        return self._pixels([pictograms.plain(c, SIZE) for c in chunks])

    def _pixels(self, chunks: Sequence[Tensor]) -> Tensor:
        return torch.cat([self.model.encode(as_batch(self.model.images, chunk)) for chunk in chunks]).cpu()

    def _by_name(self, rows: np.ndarray, language: str = "en") -> dict[str, float]:
        """Text to picture among ``rows``; every picture of the same name counts."""
        records = [world().records[i] for i in rows]
        names = sorted({r.names[language][0].lower() for r in records if language in r.names})
        positive = torch.tensor(
            [[language in r.names and r.names[language][0].lower() == n for r in records] for n in names]
        )
        rank = ranks(self._texts(names) @ self._pictures(rows).T, positive)
        return {"r1": float((rank < 1).float().mean()), "r10": float((rank < 10).float().mean())}

    def ask(self) -> dict[str, float]:
        records = world().records
        emoji = np.array(
            [i for i, r in enumerate(records) if r.artist == "noto" and r.tone is None and len(r.concept) < 6]
        )
        split = {name: world().split(name) for name in pictograms.SPLITS}
        out: dict[str, float] = {}

        def note(name: str, values: dict[str, float]) -> None:
            out.update({f"{name}/{k}": v for k, v in values.items()})

        note("concepts", self._by_name(np.intersect1d(emoji, split["concepts"])))
        for artist in pictograms.HELD_OUT_ARTISTS:
            rows = np.array([i for i in split["artists"] if records[i].artist == artist and records[i].tone is None])
            note(artist, self._by_name(rows))
        known = np.intersect1d(emoji, split["train"])
        note("seen", self._by_name(known))
        for language in ("ca", "da", "pl"):
            note(f"language {language}", self._by_name(known, language))
        note("combinations", self._tones(split["combinations"]))
        note("shapes", self._shapes())
        return out

    def _tones(self, rows: np.ndarray) -> dict[str, float]:
        """For each held-out cell of the skin-tone grid: which of the five tones of its concept is it?"""
        records = world().records
        tones: dict[str, dict[int, str]] = {}
        for r in records:
            if r.artist == "noto" and r.tone is not None:
                tones.setdefault(r.concept, {})[r.tone] = r.name.lower()
        rows = np.array([i for i in rows if len(tones[records[i].concept]) == 5])
        pictures = self._pictures(rows)
        texts = self._texts([tones[records[i].concept][t] for i in rows for t in range(1, 6)]).view(len(rows), 5, -1)
        choice = torch.einsum("nd,ntd->nt", pictures, texts).argmax(1) + 1
        return {"tone": float((choice == torch.tensor([records[i].tone for i in rows])).float().mean())}

    def _shapes(self, scenes: int = 400) -> dict[str, float]:
        """One object of a colour and shape never seen together: its colour among 12, its shape among all."""
        rng = np.random.default_rng(7)
        drawn = [shapes.scene(rng, objects=1, held_out=True) for _ in range(scenes)]
        rendered = torch.from_numpy(np.stack([shapes.render(s, SIZE) for s in drawn])).permute(0, 3, 1, 2)
        pictures = self._pixels(rendered.split(200))
        kinds = sorted({s.things[0].shape for s in drawn} | {shape for _, shape in shapes.HELD_OUT})
        colours = sorted(shapes.COLOURS)
        vectors = self._texts([f"a {c} {k}" for c in colours for k in kinds]).view(len(colours), len(kinds), -1)
        scores = torch.einsum("nd,ckd->nck", pictures, vectors)
        colour = torch.tensor([colours.index(s.things[0].colour) for s in drawn])
        kind = torch.tensor([kinds.index(s.things[0].shape) for s in drawn])
        row = torch.arange(scenes)
        both = scores.flatten(1).argmax(1) == colour * len(kinds) + kind
        return {
            "colour": float((scores[row, :, kind].argmax(1) == colour).float().mean()),
            "shape": float((scores[row, colour].argmax(1) == kind).float().mean()),
            "both": float(both.float().mean()),
        }
