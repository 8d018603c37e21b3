"""The shipped polymodal/nano-vlm: LLaVA's parts at 2 million parameters for shapes, small charts and short texts.

It answers in a word or a few, in English: what is there, how many, what colour, where; what a bar or slice of a small
chart stands at; what one to three printed words say. It reaches none of its bars: it reads short words well, finds
things in two of three pictures, counts them in half, and of relations and of wordings that it never read it understands
little. It does not know photographs. Pictures are read at 80 x 80 pixels.

command   polymodal train recipes/nano/vlm.py --out runs/nano-vlm
machine   1 CPU core with AVX512-BF16
time      four hours, beside other work
expected  see `expect` below: none is reached (docs/decisions.md 30); a blind run stands beside each figure
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from polymodal.asking import answers
from polymodal.backbones.decoder import AttentionConfig, DecoderConfig, Gated
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
    MAPS,
    NOTHING,
    PATCH,
    PATCHES,
    SIZE,
    Pictures,
    both,
    collate,
    look,
    tasks,
    tokenizer,
    vocabulary,
)
from recipes.nano.learners import Around

STEPS = (3200, 6000, 2000)
NAMING = 0.3  # what six names of a patch weigh beside an answer
ASKED = 300  # questions of each kind


def config() -> ComposedConfig:
    words = tokenizer()
    image = words.backend.token_to_id("<|image|>")
    assert image is not None
    return ComposedConfig(
        # Nearly all of the tower is its convolutions: with patches cut out at once (decisions 30) it needs ten times
        # the pictures.
        vision=ViTConfig(
            image_size=SIZE, patch_size=PATCH, dim=128, num_layers=1, num_heads=4, hidden_dim=384, class_token=False,
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
    """A system and, while it learns to see, what it takes to name its patches: the ``names`` of a batch.

    The vector that the connector makes of a patch is compared with the language model's own embeddings of the words
    that a map knows, so what it says of shape, colour and letter is said in words. What comes second or next and where
    a middle is would clash with that; a matrix each turns them away.
    """

    inner = "vlm"

    def __init__(self, vlm: Composed) -> None:
        super().__init__()
        self.vlm = vlm
        dim = vlm.config.backbone.dim
        self.turns = nn.ModuleDict({name: nn.Linear(dim, dim, bias=False) for name in ("middle", "second", "next")})

    def loss(self, batch: Batch) -> Loss:
        if "ids" not in batch:
            return self.naming(self.vlm.connector(self.vlm.vision(batch["pixels"]).x), batch["names"])
        tokens = self.vlm.read(batch)
        said = next_token_loss(self.vlm.backbone(tokens).x, batch["labels"], self.vlm.backbone.logits)
        if "names" not in batch:
            return said
        named = self.naming(tokens.x[:, :PATCHES], batch["names"])  # a picture is what every row begins with
        total = said.total + NAMING * named.total / named.weight * said.weight
        return Loss(total=total, weight=said.weight, metrics={**said.metrics, **named.metrics})

    def naming(
        self, patches: Float[Tensor, "pictures patches dim"], names: Int[Tensor, "pictures maps patches"]
    ) -> Loss:
        """How well the vectors of patches name them, each map's mean for each picture."""
        table = self.vlm.backbone.embed_tokens.weight
        empty = tokenizer().encode(NOTHING, special=False)[0]
        total, metrics = patches.sum() * 0.0, {}
        for name, wanted in zip(MAPS, names.unbind(1), strict=True):
            kept = wanted != IGNORE
            x = patches[kept]
            x = self.turns[name](x) if name in self.turns else x
            known = vocabulary(name).to(x.device)
            scores = (x @ table[known].to(x.dtype).T).float()
            right = torch.searchsorted(known, wanted[kept])
            total = total + F.cross_entropy(scores, right, reduction="sum") / kept.sum().clamp_min(1)
            named = known[right] != empty
            metrics[name] = ((scores.detach().argmax(1) == right) & named).sum() / named.sum().clamp_min(1)
        return Loss(total=total * len(patches), weight=len(patches), metrics=metrics)


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
            machine="1 CPU core with AVX512-BF16", time="four hours", expected="the bars of `expect`; none is reached",
        ),
        model=model,
        stages=[
            stage(
                name="look", steps=steps[0], batch_size=64, lr=3e-3, schedule=Cosine(warmup=min(100, steps[0] // 10)),
                source=partial(Pictures, scenes=0.45, charts=0.1, collate=look),
                trainable={"vlm.vision": 1, "vlm.connector": 1, "vlm.backbone.embed_tokens": 1, "turns": 1},
            ),
            stage(
                name="instruct", steps=steps[1], batch_size=32, lr=2e-3,
                schedule=Cosine(warmup=min(100, steps[1] // 10)),
                source=partial(Pictures, scenes=0.45, charts=0.2, collate=collate),
                trainable={"vlm.connector": 1, "vlm.backbone": 1},
            ),
            stage(
                name="together", steps=steps[2], batch_size=32, lr=2e-3,
                schedule=Cosine(warmup=min(100, steps[2] // 10)),
                source=partial(Pictures, scenes=0.4, charts=0.3, turns=10, collate=both),
                trainable={"vlm.vision": 0.5, "vlm.connector": 1, "vlm.backbone": 1, "turns": 1},
            ),
        ],
        evaluate=evaluate,
        evaluate_every=1500,
        # Set before any run, and not reached: docs/decisions.md 30.
        expect={
            "existence": Bar(value=0.85, chance=0.5),
            "reading": Bar(value=0.90, chance=0.0),
            "chart value": Bar(value=0.70, chance=0.0),
            "count": Bar(value=0.75, chance=0.17),
            "relation": Bar(value=0.70, chance=0.5),
        },
    )  # fmt: skip
