"""What is to become polymodal/nano-draw: Parti at two million parameters for pictures of one or two shapes.

It paints eight shapes in twelve colours, alone or beside each other, on light or dark paper, at 48 x 48 pixels; it
knows the words of these texts and no others. A picture is 144 codes of four by four pixels.

command   polymodal train recipes/nano/draw.py --out runs/nano-draw
machine   1 CPU core
time      three hours are reckoned: not yet run to its end
expected  see `expect` below: pictures that show the objects, colours and relation asked for, in pairs of colour and
          shape never seen

A diffusion (`draw_unet`) was tried first: as far as it was trained it painted shapes, and did not heed the text. Its
error falls by a text only between the noise in which a place is known and that in which a colour is; a code says a
colour as soon as an object begins. Which words speak of the object that a code shows is known of every scene, and one
head is taught to look at them (docs/decisions.md 77).

Deviations from the paper: the tokenizer of pictures is not a ViT-VQGAN but the most frequent squares of pictures
(`palette`), and is not trained. Places begin as waves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Int
from torch import nn

from polymodal.backbones.decoder import Learned, Plain
from polymodal.backbones.encdec import Attention, Block, EncDecConfig, StackConfig
from polymodal.core.batch import Batch, Loss, padded, text_batch
from polymodal.core.drawing import Drawing
from polymodal.data.worlds import prompts, shapes
from polymodal.data.worlds.prompts import Prompt
from polymodal.data.worlds.shapes import Scene
from polymodal.heads.lm import IGNORE
from polymodal.nn.norm import Layer
from polymodal.systems.parti import DROPPED, Parti, PartiConfig
from polymodal.tokenizers.language import LanguageTokenizer
from polymodal.tokenizers.pyramid import PlainConfig
from polymodal.tokenizers.vq import LearnedCodes, VQConfig
from polymodal.train.run import Cosine, Header, Run, Stage
from recipes.nano.learners import Around
from recipes.nano.painted import EXPECT, SCENES, SIDE, as_pixels, asked_both
from recipes.nano.painted import evaluate as faithful
from recipes.nano.palette import VALUES, palette_

STEPS = 12_000
ROWS = 32
LOOKS, LOOKING = 1, 0.3  # the layer whose first head looks at the words of what it paints, and what that weighs
NONE = -2  # what a word names that names no object
ASKED = 120  # texts of each kind
DIM, CONTEXT = 128, 20
DRAWING = Drawing(guidance=3.0, seed=0)
VISION = VQConfig(
    net=PlainConfig(latent_dim=VALUES, num_blocks=0), codes=LearnedCodes(size=512, dim=VALUES),
    resolution=SIDE,
)  # fmt: skip
SEEN = 300  # pictures that the codes are made of


@lru_cache(maxsize=1)
def tokenizer() -> LanguageTokenizer:
    """The words of texts of training are one token each."""
    rng = np.random.default_rng(0)
    return LanguageTokenizer.of_words({word for _ in range(3000) for word in prompts.prompt(rng).text.split()})


def painter() -> Parti:
    stack = partial(StackConfig, num_heads=4, head_dim=DIM // 4, mlp=Plain(hidden_dim=4 * DIM), bias=True)
    codes = VISION.codes.size
    backbone = EncDecConfig(
        vocab_size=codes + 1, dim=DIM, encoder=stack(num_layers=2), decoder=stack(num_layers=4), norm=Layer(),
        position=Learned(count=VISION.num_codes), post_norm=False, start_id=codes, pad_id=codes, tied=False,
    )  # fmt: skip
    words = tokenizer()
    assert words.pad_id is not None
    made = Parti.build(
        PartiConfig(
            backbone=backbone, vision=VISION, text_vocab_size=words.vocab_size, text_context=CONTEXT,
            pad_id=words.pad_id,
        )
    )  # fmt: skip
    made.tokenizer = words
    placed_(made)
    rng = np.random.default_rng(0)
    palette_(made.vision, as_pixels([prompts.scene(prompts.prompt(rng), rng) for _ in range(SEEN)]))
    return made


@torch.no_grad()
def placed_(painter: Parti) -> None:
    """Places of codes begin as waves along rows and columns: what lies above is found the same way everywhere."""
    table = painter.backbone.decoder.position
    assert isinstance(table, nn.Embedding)
    squares, quarter = SIDE // VISION.net.factor, DIM // 4
    turns = torch.arange(squares)[:, None] * torch.logspace(0.3, -1.5, quarter)
    waves = torch.cat([turns.sin(), turns.cos()], 1)
    row, column = waves[:, None].expand(-1, squares, -1), waves[None].expand(squares, -1, -1)
    table.weight.copy_(0.1 * torch.cat([row, column], 2).flatten(0, 1))


class Learner(Around):
    """A painter whose first head of a layer is shown which words speak of what it paints."""

    inner = "painter"

    def __init__(self, painter: Parti) -> None:
        super().__init__()
        self.painter = painter

    def loss(self, batch: Batch) -> Loss:
        pixels, vision = batch["pixels"], self.painter.vision
        chance = torch.randint(100, (batch.size,), device=pixels.device)
        lesson = Batch(ids=batch["ids"], valid=batch["valid"], codes=vision.encode(pixels).flatten(1), chance=chance)
        block, read = self.painter.backbone.decoder.blocks[LOOKS], list[Any]()
        assert isinstance(block, Block)
        attn = block.cross_attn
        assert isinstance(attn, Attention)
        hook = attn.register_forward_pre_hook(lambda _, given: read.append(given))
        try:
            said = self.painter.loss(lesson)
        finally:
            hook.remove()
        x, k, *_ = read[0]
        q = rearrange(attn.q_proj(x), "b n (h d) -> b h n d", h=k.shape[1])[:, 0]
        scores = (q @ k[:, 0].mT).float() * q.shape[-1] ** -0.5
        looks = scores.masked_fill(~batch["valid"][:, None], float("-inf")).log_softmax(2)
        speaks = batch["speaks"][:, None] == batch["shows"][..., None]  # of what the code shows
        told = (batch["shows"] != IGNORE) & (chance >= DROPPED)[:, None]
        share = looks[told].masked_fill(~speaks[told], float("-inf")).logsumexp(1)
        total = said.total - LOOKING * share.sum() / max(len(share), 1) * said.weight
        return Loss(total=total, weight=said.weight, metrics={**said.metrics, "looks": share.detach().exp().mean()})


class Bound:
    """Texts and pictures, which words ``speaks`` of which object, and which codes show it.

    An object's first code is any object's: only those behind it are known to be of this one.
    """

    def __len__(self) -> int:
        return SCENES

    def batch(self, indices: Sequence[int], rng: np.random.Generator) -> Batch:
        wanted = [prompts.prompt(rng) for _ in indices]
        scenes = [prompts.scene(one, rng) for one in wanted]
        return Batch(
            text_batch([tokenizer().encode(one.text, special=True) for one in wanted]),
            speaks=padded([speaks(one) for one in wanted], fill=NONE),
            shows=torch.from_numpy(np.stack([shows(one) for one in scenes])),
            pixels=as_pixels(scenes),
        )


def speaks(wanted: Prompt) -> list[int]:
    """The object that each token names, or says the colour of."""
    said = wanted.text.split()
    of = [NONE] * len(said)
    for number, kind in enumerate(wanted.kinds):
        at = next(i for i in range(len(said)) if tuple(said[i : i + 2]) == kind)
        of[at : at + 2] = [number, number]
    return of


def shows(scene: Scene) -> Int[np.ndarray, " codes"]:
    """The object that covers most of each square that is a code, but for the first one of each."""
    squares = SIDE // VISION.net.factor
    out = np.full(squares * squares, IGNORE)
    for number, thing in enumerate(scene.things):
        alone = (shapes.render(replace(scene, things=(thing,)), SIDE) != scene.background).any(2)
        covered = alone.reshape(squares, VISION.net.factor, squares, -1).mean((1, 3)).flatten() >= 0.5
        out[np.flatnonzero(covered)[1:]] = number
    return out


def evaluate(model: nn.Module, count: int = ASKED) -> dict[str, float]:
    """What pictures show of held-out texts, of seen ones, and of texts that were not theirs."""
    return faithful(model.painter if isinstance(model, Learner) else model, asked_both(count), DRAWING)


def run(steps: int = STEPS, rows: int = ROWS, *, count: int = ASKED) -> Run:
    return Run(
        name="nano-draw",
        header=Header(
            command="polymodal train recipes/nano/draw.py --out runs/nano-draw",
            machine="1 CPU core", time="three hours", expected="the bars of `expect`",
        ),
        model=lambda: Learner(painter()),
        stages=[
            Stage(
                name="painter", steps=steps, batch_size=rows, source=Bound, lr=1.5e-3, betas=(0.9, 0.98),
                weight_decay=0.01, ema=0.999, precision="auto", schedule=Cosine(warmup=min(150, steps)),
                trainable={"painter.text": 1.0, "painter.backbone": 1.0}, workers=1,
            )
        ],
        evaluate=partial(evaluate, count=count),
        expect=EXPECT,
    )  # fmt: skip
