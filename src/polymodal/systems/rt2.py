"""RT-2: a vision-language model that is asked what to do and answers with integers, and goes on learning to answer.

Paper: Brohan et al., "RT-2: Vision-Language-Action Models Transfer Web Knowledge to Robotic Control", 2023,
https://arxiv.org/abs/2307.15818. There is no official code, and there are no weights.

    picture -> SigLIP -> linear --+
                                  [pictures, start, "Q: what action should the robot take to ...? A:"] -> Gemma
    question ---------------------+                                                         -> "1 128 91 241 5 101 127"

Training details kept here: numbers in 256 uniform bins are written as integers; an action is the answer to a question,
and questions about pictures are asked in the same words. It is fine-tuned on both at once, so that language is not
forgotten: ``Mixture([demonstrations, Lessons(chats, policy.lesson)], shares=ROBOT_SHARE)``.

Deviations: built of PaliGemma's parts, whose checkpoints it starts from (``RT2.from_folder(folder, "hf")``), where the
paper has PaLI-X and PaLM-E. Integers are spelled as the tokenizer spells them, digit by digit if need be; PaLI-X has
one token for each, PaLM-E gives 256 rare tokens a new meaning. Numbers are scaled by quantiles of the data set. The
number that ends an episode is one of the robot's, if it has one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

from jaxtyping import Float
from torch import Tensor

from polymodal.connectors.mlp import Linear
from polymodal.core.chat import Chat
from polymodal.core.errors import ConfigError, MediaError, UnsupportedError
from polymodal.core.observation import Observation
from polymodal.samplers.autoregressive import Completion
from polymodal.samplers.constraints import Constraint, Vocabulary
from polymodal.systems.prefix import (
    GEMMA,
    SO400M,
    TOWER,
    PrefixConfig,
    PrefixGenerator,
    read_parts,
    rules_hf,
    write_parts,
)
from polymodal.systems.speaking import SpeakingPolicy
from polymodal.tokenizers.action_bins import TextBins
from polymodal.tokenizers.language import LanguageTokenizer
from polymodal.weights.fields import Fields
from polymodal.weights.format import Format

MODEL_TYPE: Final = "polymodal_rt2"
ROBOT_SHARE: Final = (0.5, 0.5)  # demonstrations and other lessons, with PaLI-X; two thirds with PaLM-E


@dataclass(frozen=True, kw_only=True)
class RT2Config(PrefixConfig):
    """PaliGemma's parts and a robot."""

    action_dim: int = 7
    cameras: tuple[str, ...] = ("image",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.action_dim < 1 or not self.cameras:
            raise ConfigError("RT-2 looks through a camera, and its actions have numbers")


@final
class RT2(SpeakingPolicy, PrefixGenerator):
    """A vision-language model whose answers may be actions."""

    config: RT2Config

    def __init__(self, config: RT2Config) -> None:
        super().__init__(config)
        c = config
        self.action_width, self.cameras = c.action_dim, c.cameras
        self.bins = TextBins(dim=c.action_dim)
        self._constraint: Constraint | None = None

    def use_tokenizer(self, tokenizer: LanguageTokenizer) -> None:
        super().use_tokenizer(tokenizer)
        self._constraint = None

    def write_prompt(self, chat: Chat) -> list[int]:
        """``picture ... picture <bos> Q: text A:``."""
        if len(chat.turns) != 1 or chat.turns[0].role != "user":
            raise MediaError("RT-2 answers one question of a user: it was trained on no conversations")
        return [self.config.image_id] * len(chat.images) + self._asked_for(chat.turns[0].text)

    def _asked_for(self, question: str) -> list[int]:
        if self.tokenizer is None:
            raise UnsupportedError(f"{self.source} has no tokenizer.json (see use_tokenizer)")
        start = self.config.control.start
        text = self.tokenizer.encode(f"Q: {question} A:", special=False)
        return ([] if start is None else [start]) + text

    def ask(self, observation: Observation) -> list[int]:
        places = [self.config.image_id] * (self.config.num_features * len(self.cameras))
        return places + self._asked_for(f"what action should the robot take to {observation.instruction}?")

    def say(self, actions: Float[Tensor, "batch 1 action_width"]) -> list[list[int]]:
        assert self.tokenizer is not None
        return [self.tokenizer.encode(text, special=False) for text in self.bins.encode(actions[:, 0])]

    def hear(self, answers: Sequence[Completion]) -> Float[Tensor, "batch 1 action_width"]:
        return self.bins.decode([answer.text for answer in answers])[:, None]

    @property
    def constraint(self) -> Constraint:
        """Exactly so many integers; compiled once for a tokenizer.

        Raises:
            MissingDependency: llguidance is not installed.
        """
        if self._constraint is None:
            assert self.tokenizer is not None
            vocabulary = Vocabulary(self.tokenizer.backend.to_str(), self.vocab_size, self.stop_ids)
            self._constraint = Constraint.regex(self.bins.pattern, vocabulary)
        return self._constraint

    @property
    def longest(self) -> int:
        """A token for each character, at most."""
        return len("255 ") * self.action_width


def read_hf(raw: Mapping[str, Any]) -> tuple[RT2Config, dict[str, str]]:
    f = Fields({**raw, "model_type": "paligemma"} if raw.get("model_type") == MODEL_TYPE else raw)
    parts = read_parts(f)
    parts["action_dim"] = f.take("action_dim", int, 7)
    parts["cameras"] = f.numbers("cameras", str) if f.has("cameras") else RT2Config.cameras
    report = f.done()
    layers = parts["vision"].num_layers
    return RT2Config(vision_family=TOWER, layers=layers, connector=Linear(), **parts), report


def write_hf(c: RT2Config) -> dict[str, Any]:
    parts = write_parts(c.vision, c.family, c.backbone, c.image_id, c.control)
    robot = {"action_dim": c.action_dim, "cameras": list(c.cameras)}
    return {"architectures": ["Polymodal"], **parts, "model_type": MODEL_TYPE, **robot}


RT2.formats = {"hf": Format(read=read_hf, write=write_hf, rules=rules_hf)}


def _paligemma() -> RT2Config:
    return read_hf(
        {
            "model_type": "paligemma", "vision_config": dict(SO400M), "text_config": dict(GEMMA),
            "projection_dim": 2048, "image_token_index": 257152, "eos_token_id": 1, "bos_token_id": 2,
        }
    )[0]  # fmt: skip


PRESETS = {"rt2-paligemma-3b": _paligemma}
