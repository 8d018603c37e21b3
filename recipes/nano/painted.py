"""What the nano painters share: pictures of `prompts`, an autoencoder of these, how both learn, how all are judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from polymodal.core.batch import Batch, Loss
from polymodal.core.drawing import Drawing
from polymodal.core.verbs import Draws
from polymodal.data.worlds import prompts, shapes
from polymodal.data.worlds.prompts import Kind, Prompt
from polymodal.data.worlds.shapes import Scene
from polymodal.data.worlds.shapes_reader import read
from polymodal.encoders.clip_text import CLIPTextConfig
from polymodal.encoders.text import TextConfig
from polymodal.evaluate.faithfulness import Faithfulness, faithfulness
from polymodal.modalities.generated import to_uint8
from polymodal.systems.latent_painting import LatentPainter
from polymodal.tokenizers.pyramid import PyramidConfig
from polymodal.tokenizers.text import TextTokenizer
from polymodal.tokenizers.vae import VAEConfig, vae_loss
from polymodal.train.run import Bar, Cosine, Header, Run, Stage
from recipes.nano.averaging import averaging_
from recipes.nano.learners import Around

SIDE = 48  # of a picture, in pixels
CONTEXT = 20  # the longest text in tokens
DIM = 128  # of a token of a text
SCENES = 50_000  # an epoch; no scene comes twice
DIVERGENCE = 1e-3  # see `vae_loss`: latents have a deviation of about two then, before they are scaled
AUTOENCODER = VAEConfig(
    pyramid=PyramidConfig(widths=(16, 16, 32), num_blocks=1, middle_attention=False, latent_dim=4, groups=1),
    scale=0.5, mixed=False,
)  # fmt: skip

# What is to be reached, set before any run. The chance is that of a painter that hears of objects, not of relations: so
# many scenes of the texts of `asked`, drawn as if these said none (12 of each of 80), show theirs all the same.
EXPECT = {"unseen/objects": Bar(value=0.85), "unseen/relation": Bar(value=0.65, chance=0.44)}

# ---- what is painted

Told: TypeAlias = Callable[[Sequence[Prompt], Float[Tensor, "batch 3 side side"]], Batch]
"""What a painter is told of texts and their pictures."""


@lru_cache(maxsize=1)
def tokenizer() -> TextTokenizer:
    """Learned on texts of training; every word of them is one token."""
    rng = np.random.default_rng(0)
    texts = [prompts.prompt(rng).text for _ in range(3000)]
    return TextTokenizer.train_bpe(texts, 700, length=CONTEXT, pad="max")


def words(wanted: Sequence[Prompt], pixels: Float[Tensor, "batch 3 side side"]) -> Batch:
    """The ids of the texts."""
    return Batch(ids=tokenizer()([one.text for one in wanted])[0])


def as_pixels(scenes: Sequence[Scene]) -> Float[Tensor, "batch 3 side side"]:
    """Pictures of scenes, in [-1, 1]."""
    drawn = np.stack([shapes.render(scene, SIDE) for scene in scenes])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1


def pixels(wanted: Sequence[Prompt], rng: np.random.Generator) -> Float[Tensor, "batch 3 side side"]:
    """A scene of each, in [-1, 1]."""
    return as_pixels([prompts.scene(one, rng) for one in wanted])


@dataclass(frozen=True)
class Scenes:
    """Pictures, each drawn anew, with what is ``told`` of them; of one ``kind`` of text, or of all."""

    told: Told | None = None
    kind: Kind | None = None

    def __len__(self) -> int:
        return SCENES

    def batch(self, indices: Sequence[int], rng: np.random.Generator) -> Batch:
        wanted = [prompts.prompt(rng, kind=self.kind) for _ in indices]
        drawn = pixels(wanted, rng)
        return Batch(Batch() if self.told is None else self.told(wanted, drawn), pixels=drawn)


# ---- who learns to paint


def text_tower() -> CLIPTextConfig:
    """A tower of CLIP for these texts, which learns with the painter."""
    size = tokenizer().vocab_size
    tower = TextConfig(
        vocab_size=size, context=CONTEXT, dim=DIM, num_layers=3, num_heads=4, hidden_dim=4 * DIM,
        activation="quick_gelu",
    )  # fmt: skip
    return CLIPTextConfig(tower=tower, eot_id=size - 1)


class Learner(Around):
    """A painter and its autoencoder, which learns wherever there are pictures alone."""

    inner = "painter"

    def __init__(self, painter: LatentPainter) -> None:
        super().__init__()
        averaging_(painter.vae)
        painter.vae.requires_grad_(True)
        self.painter = painter

    def loss(self, batch: Batch) -> Loss:
        if batch.keys() != {"pixels"}:
            return self.painter.loss(batch)
        pixels, vae = batch["pixels"], self.painter.vae
        noise = torch.randn(len(pixels), *vae.shape((pixels.shape[3], pixels.shape[2])), device=pixels.device)
        return vae_loss(vae, pixels, noise, divergence=DIVERGENCE)


def stages(
    told: Told, steps: tuple[int, int, int], rows: tuple[int, int, int], *, kind: Kind | None = None,
    trainable: Sequence[str] = ("painter.text", "painter.backbone"),
) -> list[Stage]:  # fmt: skip
    """The autoencoder, the painter, and the autoencoder's decoder once more, which the painter does not notice."""
    stage = partial(Stage, weight_decay=0.01, ema=0.999, workers=1)
    return [
        stage(
            name="autoencoder", steps=steps[0], batch_size=rows[0], source=Scenes, lr=1.5e-3,
            schedule=Cosine(warmup=min(100, steps[0])), trainable={"painter.vae": 1.0},
        ),
        stage(
            name="painter", steps=steps[1], batch_size=rows[1], source=partial(Scenes, told, kind), lr=1e-3,
            precision="auto", schedule=Cosine(warmup=min(100, steps[1])), betas=(0.9, 0.99),
            trainable=dict.fromkeys(trainable, 1.0),
        ),
        stage(
            name="decoder", steps=steps[2], batch_size=rows[2], source=Scenes, lr=2e-3,
            schedule=Cosine(warmup=min(50, steps[2])), betas=(0.9, 0.99), trainable={"painter.vae.decoder": 1.0},
        ),
    ]  # fmt: skip


# ---- how they are judged


def asked(count: int, *, held_out: bool) -> list[Prompt]:
    """Texts to be judged by, the same every time: two in three say a relation."""
    rng = np.random.default_rng(11 + held_out)
    kinds: list[Kind] = ["one", "related", "related"]
    return [prompts.prompt(rng, kind=kinds[i % 3], held_out=held_out) for i in range(count)]


def asked_both(count: int) -> dict[str, list[Prompt]]:
    """So many texts of pairs that training holds back, and of those that it shows."""
    return {"unseen": asked(count, held_out=True), "seen": asked(count, held_out=False)}


def paint(
    painter: Draws, wanted: Sequence[Prompt], drawing: Drawing, *, rows: int = 32
) -> Float[Tensor, "pictures 3 side side"]:
    """A picture of each text, in [0, 1]."""
    texts = [one.text for one in wanted]
    return torch.cat([painter.draw(texts[i : i + rows], drawing) for i in range(0, len(texts), rows)])


def judged(pictures: Float[Tensor, "pictures 3 side side"], wanted: Sequence[Prompt]) -> Faithfulness:
    """Whether pictures show what was asked for, by the exact reader."""
    seen = [read(one) for one in to_uint8(pictures)]
    return faithfulness(seen, wanted)


def evaluate(model: nn.Module, wanted: Mapping[str, Sequence[Prompt]], drawing: Drawing) -> dict[str, float]:
    """What pictures show of texts of each name; of the first, also what pictures of other texts show of them.

    Those hardly have the objects of a relation, and say nothing of it: its chance is in `EXPECT`.
    """
    painter = model.painter if isinstance(model, Learner) else model
    assert isinstance(painter, Draws)
    found: dict[str, float] = {}
    for name, texts in wanted.items():
        pictures = paint(painter, texts, drawing)
        scores = {name: judged(pictures, texts)}
        if name == next(iter(wanted)):
            assert len(texts) > 3, f"{len(texts)} texts: four are needed, so that none keeps its picture"
            scores["shuffled"] = judged(pictures.roll(3, 0), texts)  # of three kinds by turns: of the same one
        found |= {f"{of}/{what}": one.value for of, score in scores.items() for what, one in score.estimates().items()}
    return found


def drawing_run(
    name: str, painter: Callable[[], LatentPainter], stages: Sequence[Stage], wanted: Mapping[str, Sequence[Prompt]],
    drawing: Drawing, expect: Mapping[str, Bar] = EXPECT,
) -> Run:  # fmt: skip
    """The run of the recipe ``draw_<name>``."""
    return Run(
        name=f"nano-{name}",
        header=Header(
            command=f"polymodal train recipes/nano/draw_{name}.py --out runs/nano-{name}",
            machine="1 CPU core with AVX512-BF16", time="not yet run to its end",
            expected=f"the {'bars' if len(expect) > 1 else 'bar'} of `expect`",
        ),
        model=lambda: Learner(painter()),
        stages=stages,
        evaluate=lambda model: evaluate(model, wanted, drawing),
        expect=expect,
    )  # fmt: skip
