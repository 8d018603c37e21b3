"""Co-training: who answers questions about pictures and then learns to act goes on answering if it goes on being asked.

command   polymodal train recipes/nano/cotrain.py --out runs/nano-cotrain
machine   1 CPU core
time      50 seconds
expected  see `BARS`; in pictures that were never shown

RT-2 at nano size learns first to say which colour a thing has, then to put it away where things of its colour go: its
action is that place, written as two integers. The second stage reads half demonstrations and half questions. What stood
in the curve (``metrics.jsonl``) after the first stage are the answers before. ``run(alone=True)`` learns from
demonstrations alone: beside it the bars say what co-training keeps.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Final

import numpy as np
import torch
from jaxtyping import Float32
from PIL import Image as PILImage
from torch import nn

from polymodal.asking import answers
from polymodal.backbones.decoder import AttentionConfig, DecoderConfig, Gated
from polymodal.backbones.families import ControlIds
from polymodal.connectors.mlp import Linear
from polymodal.core.chat import Chat, Turn
from polymodal.core.observation import Observation
from polymodal.core.sample import Image, Text
from polymodal.data.lessons import Mixture
from polymodal.data.worlds import questions, shapes
from polymodal.encoders.vit import ViTConfig
from polymodal.modalities.action import Statistics
from polymodal.nn.norm import OffsetRMS
from polymodal.nn.rope import Rope
from polymodal.samplers.autoregressive import Settings
from polymodal.systems.prefix import TOWER
from polymodal.systems.rt2 import ROBOT_SHARE, RT2, RT2Config
from polymodal.tokenizers.language import LanguageTokenizer
from polymodal.train.run import Bar, Cosine, Header, Run, Stage
from recipes.nano.acting import Ready
from recipes.nano.scenes import close_up

SIZE: Final = 32
LEARNED, ASKED = 1000, 150  # scenes
TURNS: Final = 2 * np.pi * np.arange(len(shapes.COLOURS)) / len(shapes.COLOURS)
# Places go around a table of side one: where things of each colour are put away.
PLACES: Final = dict(zip(shapes.COLOURS, 0.5 + 0.4 * np.stack([np.cos(TURNS), np.sin(TURNS)], 1), strict=True))
NEAR: Final = 0.1  # half of the way to the next place
CHANCE: Final = 1 / len(PLACES)
# Set before the first run.
BARS: Final = {"answers": Bar(value=0.7, chance=CHANCE), "actions": Bar(value=0.7, chance=CHANCE)}


@dataclass(frozen=True)
class Shown:
    """Scenes of one thing each: what is asked about them, and what is done there."""

    count: int
    seed: int

    @cached_property
    def scenes(self) -> list[shapes.Scene]:
        rng = np.random.default_rng(self.seed)
        return [close_up(rng) for _ in range(self.count)]

    @cached_property
    def things(self) -> list[shapes.Thing]:
        return [scene.things[0] for scene in self.scenes]

    @cached_property
    def pictures(self) -> list[np.ndarray]:
        return [shapes.render(scene, SIZE) for scene in self.scenes]

    @cached_property
    def asked(self) -> list[Chat]:
        """The colour of each thing in a picture."""
        rng = np.random.default_rng(self.seed)
        chats = []
        for scene, picture in zip(self.scenes, self.pictures, strict=True):
            asked = questions.ask(scene, rng, kind="colour")
            assert asked is not None
            user = Turn("user", (Image(PILImage.fromarray(picture)), Text(asked.question)))
            chats.append(Chat((user, Turn("assistant", (Text(asked.answer),)))))
        return chats

    @property
    def observations(self) -> list[Observation]:
        return [
            Observation(images={"image": picture}, instruction=f"put away the {thing.shape}")
            for picture, thing in zip(self.pictures, self.things, strict=True)
        ]

    @property
    def places(self) -> Float32[np.ndarray, "count 1 2"]:
        return np.array([[PLACES[thing.colour]] for thing in self.things], np.float32)


def tokenizer() -> LanguageTokenizer:
    """Words of the questions, of the answers and of what is to be done; numbers are spelled."""
    said = [*questions.WORDINGS["colour"], *shapes.COLOURS, *shapes.SHAPES]
    said += ["q a what action should the robot take to put away the"]
    return LanguageTokenizer.of_words(word for text in said for word in re.findall("[a-z]+", text))


def policy() -> RT2:
    words, dim = tokenizer(), 64
    image = words.backend.token_to_id("<|image|>")
    assert image is not None
    model = RT2.build(
        RT2Config(
            vision_family=TOWER, layers=2, connector=Linear(), family="gemma",
            vision=ViTConfig(
                image_size=SIZE, patch_size=8, dim=dim, num_layers=2, num_heads=4, hidden_dim=128, class_token=False,
                activation="gelu_tanh",
            ),
            backbone=DecoderConfig(
                vocab_size=words.vocab_size, context=128, dim=dim, num_layers=2,
                attention=AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=16),
                mlp=Gated(hidden_dim=128, activation="gelu_tanh"), norm=OffsetRMS(), position=Rope(), tied=True,
                embed_scale=dim**0.5,
            ),
            image_id=image, control=ControlIds(stop=words.eos_ids, pad=words.pad_id), action_dim=2,
        )
    )  # fmt: skip
    model.use_tokenizer(words)
    model.use_statistics({"table": {"action": Statistics.from_array(np.linspace([0, 0], [1, 1], 101))}})
    return model


def run(*, alone: bool = False, learned: int = LEARNED, asked: int = ASKED, steps: tuple[int, int] = (600, 600)) -> Run:
    """``alone``: the second stage has no questions."""
    known, new = Shown(learned, 0), Shown(asked, 1)

    def talk() -> Ready:
        return Ready(policy().lesson(known.asked))

    def act() -> Ready:
        done = torch.from_numpy(known.places)
        return Ready(policy().lesson(known.observations, done, torch.ones(learned, 1, dtype=torch.bool)))

    def evaluate(model: nn.Module) -> dict[str, float]:
        assert isinstance(model, RT2)
        said = answers(model, [Chat(chat.turns[:1]) for chat in new.asked], Settings(max_new_tokens=8))
        right = [text == chat.turns[1].text for text, chat in zip(said, new.asked, strict=True)]
        missed = np.abs(model.act(model.observe(new.observations)).numpy() - new.places).max((1, 2))
        return {"answers": float(np.mean(right)), "actions": float((missed < NEAR).mean())}

    stage = partial(Stage, batch_size=32, lr=3e-3, weight_decay=0.01, betas=(0.9, 0.95), ema=0.99, workers=0)
    return Run(
        name="nano-cotrain",
        header=Header(
            command="polymodal train recipes/nano/cotrain.py --out runs/nano-cotrain",
            machine="1 CPU core", time="50 seconds", expected="answers 0.70, actions 0.70",
        ),
        model=policy,
        stages=[
            stage(name="ask", steps=steps[0], source=talk, schedule=Cosine(warmup=min(50, steps[0] // 10))),
            stage(
                name="act", steps=steps[1], source=act if alone else lambda: Mixture([act(), talk()], ROBOT_SHARE),
                schedule=Cosine(warmup=min(50, steps[1] // 10)),
            ),
        ],
        evaluate=evaluate,
        expect=BARS,
    )  # fmt: skip
