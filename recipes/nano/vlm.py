"""The shipped polymodal/nano-vlm: LLaVA's parts at 2 million parameters for shapes, small charts and short texts.

It answers in a word or a few, in English: what is there, how many, what colour, where; what a bar or slice of a small
chart stands at; what one to three printed words say. It reaches none of its bars: it reads short words well, finds
things in two of three pictures, counts them in half, and of relations and of wordings that it never read it understands
little. It does not know photographs. Pictures are read at 80 x 80 pixels.

command   polymodal train recipes/nano/vlm.py --out runs/nano-vlm
machine   1 CPU core
time      six hours are reckoned: the shipped weights come from earlier forms of these stages (docs/decisions.md 76)
expected  see `expect` below; a blind run stands beside each figure
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from polymodal.asking import answers
from polymodal.backbones.decoder import AttentionConfig, DecoderBlock, DecoderConfig, Gated, View
from polymodal.backbones.families import ControlIds
from polymodal.connectors.mlp import MLP
from polymodal.core.batch import Batch, Loss
from polymodal.encoders.stem import StemConfig
from polymodal.encoders.vit import ViTConfig
from polymodal.evaluate.card import evaluate as judged
from polymodal.heads.lm import IGNORE, next_token_loss
from polymodal.nn.norm import RMS
from polymodal.nn.rope import Rope
from polymodal.samplers.autoregressive import Settings
from polymodal.systems.base import System
from polymodal.systems.composed import Composed, ComposedConfig
from polymodal.train.run import Bar, Cosine, Header, Run, Stage
from recipes.nano.asked import (
    IMAGES,
    LIES,
    MAPS,
    MEETS,
    NAMED,
    NOTHING,
    PATCH,
    PATCHES,
    RELATED,
    SIZE,
    THINGS,
    Pictures,
    both,
    look,
    point,
    tasks,
    tokenizer,
    vocabulary,
)
from recipes.nano.learners import Around

STEPS = (3900, 1000, 4000)
# What each name of a patch, and of a thing in a question, weighs beside an answer; and where its word looks.
NAMING, POINTING, LOOKING = 0.2, 0.2, 0.4
ASKED = 300  # questions of each kind
# What the words of questions are taught after half of the layers, and after the next one: names, where to look, and
# what that is called.
TAUGHT = ((THINGS, LIES, "looks"), (tuple(RELATED), MEETS, "meets"))


def config() -> ComposedConfig:
    words = tokenizer()
    image = words.backend.token_to_id("<|image|>")
    assert image is not None
    return ComposedConfig(
        # Nearly all of the tower is its convolutions: with patches cut out at once (decisions 30) it needs ten times
        # the pictures.
        vision=ViTConfig(
            image_size=SIZE, patch_size=PATCH, dim=128, num_layers=4, num_heads=4, hidden_dim=384, class_token=False,
            stem=StemConfig(channels=(32, 64, 128), depth=2),
        ),
        connector=MLP(),
        backbone=DecoderConfig(
            vocab_size=words.vocab_size, context=512, dim=128, num_layers=4,
            attention=AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=32), mlp=Gated(hidden_dim=384),
            norm=RMS(), position=Rope(), tied=True,
        ),
        image_id=image, control=ControlIds(stop=words.eos_ids, pad=words.pad_id),
    )  # fmt: skip


class Learner(Around):
    """A system and, while it learns to see, what it takes to name its patches and what a question speaks of.

    The vector that the connector makes of a patch is compared with the language model's own embeddings of the words
    that a map knows (the ``names`` of a batch), so what it says of shape, colour and letter is said in words. The rest,
    such as where it lies, would clash with that; a matrix each turns it away. So is, after half of the layers, the
    vector of a word that names something (``things``: token, which, word): how many there are of it, and where; after
    one layer more, where the thing named before is, seen from it.
    """

    inner = "vlm"

    def __init__(self, vlm: Composed) -> None:
        super().__init__()
        self.vlm = vlm
        dim = vlm.config.backbone.dim
        plain = ("shape", "colour", "letter")
        self.turns = nn.ModuleDict({n: nn.Linear(dim, dim, bias=False) for n in MAPS if n not in plain})
        self.points = nn.ModuleDict({n: nn.Linear(dim, dim, bias=False) for n in NAMED})

    def loss(self, batch: Batch) -> Loss:
        """Of naming patches where there are no ``ids``, of pointing alone where there are no ``labels``."""
        if "ids" not in batch:
            return self.naming(self.vlm.connector(self.vlm.vision(batch["pixels"]).x), batch["names"])
        backbone, tokens = self.vlm.backbone, self.vlm.read(batch)
        x, pointed, metrics = backbone.enter(tokens), torch.zeros(()), dict[str, float | Tensor]()
        for layer, (block, view) in enumerate(zip(backbone.blocks, backbone.views(tokens), strict=True)):
            assert isinstance(block, DecoderBlock)
            before, x = x, block(x, view)
            level = layer + 1 - len(backbone.blocks) // 2
            if 0 <= level < len(TAUGHT):
                taught, found = self.pointing(block, before, x, view, batch["things"], level)
                pointed, metrics = pointed + taught, metrics | found
                if "labels" not in batch and level == len(TAUGHT) - 1:
                    return Loss(total=pointed * len(x), weight=len(x), metrics=metrics)
        said = next_token_loss(backbone.norm(x), batch["labels"], backbone.logits)
        total, metrics = said.total + pointed * said.weight, {**said.metrics, **metrics}
        if "names" in batch:
            named = self.naming(tokens.x[:, :PATCHES], batch["names"])  # a picture is what every row begins with
            total = total + NAMING * named.total / named.weight * said.weight
            metrics |= dict(named.metrics)
        return Loss(total=total, weight=said.weight, metrics=metrics)

    def pointing(
        self,
        block: DecoderBlock,
        before: Float[Tensor, "rows tokens dim"],
        after: Float[Tensor, "rows tokens dim"],
        view: View,
        things: Int[Tensor, "rows most 3"],
        level: int,
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """How well the words of questions know what they name, after a block, and look where it lies, in it: the mean
        loss, and metrics."""
        names, place, called = TAUGHT[level]
        row, number = (things[..., 0] != IGNORE).nonzero(as_tuple=True)
        token, which, word = things[row, number].unbind(1)
        vectors, total, metrics = after[row, token], after.sum() * 0.0, dict[str, float | Tensor]()
        for name in names:
            mine = which == NAMED.index(name)
            loss, metrics[name] = self.named(self.points[name](vectors[mine]), word[mine], name)
            total = total + POINTING * loss
        lies = which == place
        looks = self.looking(block, before, view, row[lies], token[lies]).gather(1, word[lies][:, None])
        total = total - LOOKING * looks.sum() / max(len(looks), 1)
        metrics[called] = looks.detach().exp().mean()
        return total, metrics

    def looking(
        self,
        block: DecoderBlock,
        x: Float[Tensor, "rows tokens dim"],
        view: View,
        row: Int[Tensor, " n"],
        token: Int[Tensor, " n"],
    ) -> Float[Tensor, "n tokens"]:
        """The logarithm of the share of each token in what the first head sees from some tokens."""
        q, k, _ = block.attn.project(block.attn_norm(x), view.rotary)
        scores = (k[row, 0] @ q[row, 0, token][..., None]).squeeze(-1).float() * q.shape[-1] ** -0.5
        later = torch.arange(scores.shape[1], device=x.device) > token[:, None]
        return scores.masked_fill(later, float("-inf")).log_softmax(1)

    def naming(
        self, patches: Float[Tensor, "pictures patches dim"], names: Int[Tensor, "pictures maps patches"]
    ) -> Loss:
        """How well the vectors of patches name them, each map's mean for each picture."""
        total, metrics = patches.sum() * 0.0, {}
        for name, wanted in zip(MAPS, names.unbind(1), strict=True):
            kept = wanted != IGNORE
            x = patches[kept]
            x = self.turns[name](x) if name in self.turns else x
            loss, metrics[f"patch {name}"] = self.named(x, wanted[kept], name)
            total = total + loss
        return Loss(total=total * len(patches), weight=len(patches), metrics=metrics)

    def named(self, x: Float[Tensor, "n dim"], wanted: Int[Tensor, " n"], name: str) -> tuple[Tensor, Tensor]:
        """The mean loss of naming each vector, and how many are named right, of those that are something."""
        known = vocabulary(name).to(x.device)
        scores = (x @ self.vlm.backbone.embed_tokens.weight[known].to(x.dtype).T).float()
        right = torch.searchsorted(known, wanted)
        loss = F.cross_entropy(scores, right, reduction="sum") / max(len(wanted), 1)
        something = wanted != tokenizer().encode(NOTHING, special=False)[0]
        good = (scores.detach().argmax(1) == right) & something
        return loss, good.sum() / something.sum().clamp_min(1)


def model() -> nn.Module:
    vlm = Composed.build(config())
    vlm.images = IMAGES
    vlm.use_tokenizer(tokenizer())
    return Learner(vlm)


def evaluate(vlm: nn.Module, count: int = ASKED) -> dict[str, float]:
    system = vlm.vlm if isinstance(vlm, Learner) else vlm
    assert isinstance(system, System)
    found = {}
    for task in tasks(count):
        card = judged(
            partial(answers, system, settings=Settings(max_new_tokens=32)), task, model="nano-vlm", batch_size=50
        )
        found[task.name] = card.true.score.value
        found[f"{task.name}/blind"] = card.blind.score.value
    return found


def run(steps: tuple[int, int, int] = STEPS) -> Run:
    stage = partial(Stage, weight_decay=0.05, betas=(0.9, 0.95), precision="auto", ema=0.998, workers=1)
    return Run(
        name="nano-vlm",
        header=Header(
            command="polymodal train recipes/nano/vlm.py --out runs/nano-vlm",
            machine="1 CPU core", time="six hours", expected="the bars of `expect`",
        ),
        model=model,
        stages=[
            stage(
                name="look", steps=steps[0], batch_size=64, lr=3e-3, schedule=Cosine(warmup=min(100, steps[0] // 10)),
                source=partial(Pictures, scenes=0.35, charts=0.4, collate=look),
                trainable={"vlm.vision": 1.0, "vlm.connector": 1.0, "vlm.backbone.embed_tokens": 1.0, "turns": 1.0},
            ),
            # A word finds what it names before anything is answered: learned together with answers, it looks for
            # colours alone (docs/decisions.md 76).
            stage(
                name="point", steps=steps[1], batch_size=32, lr=2e-3,
                schedule=Cosine(warmup=min(100, steps[1] // 10), final=0.1),
                source=partial(Pictures, scenes=0.6, charts=0.2, turns=7, collate=point),
                trainable={**{f"vlm.backbone.blocks.{i}": 1.0 for i in range(3)}, "points": 1.0},
            ),
            stage(
                name="instruct", steps=steps[2], batch_size=32, lr=2e-3,
                schedule=Cosine(warmup=min(100, steps[2] // 10)),
                source=partial(Pictures, scenes=0.45, charts=0.25, turns=7, collate=both),
                trainable={"vlm.vision": 0.5, "vlm.connector": 1.0, "vlm.backbone": 1.0, "turns": 1.0, "points": 1.0},
            ),
        ],
        evaluate=evaluate,
        evaluate_every=1500,
        # Set before any run.
        expect={
            "existence": Bar(value=0.85, chance=0.5),
            "reading": Bar(value=0.90, chance=0.0),
            "chart value": Bar(value=0.70, chance=0.0),
            "count": Bar(value=0.75, chance=0.17),
            "relation": Bar(value=0.70, chance=0.5),
        },
    )  # fmt: skip
