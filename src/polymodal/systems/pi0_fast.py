"""pi0-FAST: a PaliGemma that writes a chunk of actions as FAST tokens.

Paper: Pertsch et al., "FAST: Efficient Action Tokenization for Vision-Language-Action Models", 2025,
https://arxiv.org/abs/2501.09747. Official code: Physical-Intelligence/openpi (``pi0_fast``).

    pictures -> SigLIP -> linear ----------------------+
    "Task: ..., State: 12 201 ...;\\n" -> embedding -----+-> Gemma 2B -> "Action: " <FAST tokens> "|"

Training details kept here: the prefix sees itself whole, the answer is causal and learned, its end token too; FAST's
tokens are the top of the vocabulary, downwards, below its last 128; quantiles of states and actions on [-1, 1]; the
state in 256 bins, written as integers. openpi trains everything as pi0, at 2.5e-5.

Deviations: an answer is drawn under a constraint and always is a chunk (openpi's code reads what is none as zeros). Its
sampler leaves one position free before the answer, where training does not: ours does as in training. The loss is the
mean over all tokens of a batch, theirs the mean over rows of means. Steps behind the end of an episode are learned as
they are given; a row whose first step is not valid is not learned. It starts from files of PaliGemma
(``PI0Fast.from_folder(folder, "hf")``); those of openpi's own checkpoints are not read. Further those of PaliGemma.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, final

from jaxtyping import Float
from torch import Tensor

from polymodal.connectors.mlp import Linear
from polymodal.core.chat import Chat
from polymodal.core.errors import ConfigError, MediaError, UnsupportedError
from polymodal.core.observation import Observation
from polymodal.modalities.action import Kind
from polymodal.modalities.image import ImageProcessor
from polymodal.samplers.autoregressive import Completion, Constraint
from polymodal.systems.prefix import (
    GEMMA,
    SO400M,
    TOWER,
    PrefixConfig,
    PrefixGenerator,
    framed,
    read_parts,
    rules_hf,
    write_parts,
)
from polymodal.systems.speaking import SpeakingPolicy
from polymodal.tokenizers.action_bins import state_text
from polymodal.tokenizers.fast import FAST
from polymodal.weights.fields import Fields
from polymodal.weights.format import Format

MODEL_TYPE: Final = "polymodal_pi0_fast"
FOLDER: Final = "action_tokenizer"  # beside the weights
CAMERAS: Final = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")


@dataclass(frozen=True, kw_only=True)
class PI0FastConfig(PrefixConfig):
    """PaliGemma's parts and a robot.

    Attributes:
        action_id: the token of FAST's first; its others go down from there.
        action_width: numbers of an action; those of robots with fewer are followed by zeros.
        prompt: the most tokens of an instruction with its state.
    """

    action_id: int = 257152 - 128 - 1
    cameras: tuple[str, ...] = CAMERAS
    horizon: int = 32
    action_width: int = 32
    state_width: int = 32
    prompt: int = 250

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.action_id < self.backbone.vocab_size:
            raise ConfigError(
                f"action tokens from {self.action_id} down, in a vocabulary of {self.backbone.vocab_size}"
            )


@final
class PI0Fast(SpeakingPolicy, PrefixGenerator):
    """A vision-language model whose answers are chunks of actions."""

    config: PI0FastConfig
    normalisation: Kind = "quantile"

    def __init__(self, config: PI0FastConfig) -> None:
        super().__init__(config)
        c = config
        self.horizon, self.cameras = c.horizon, c.cameras
        self.action_width, self.state_width = c.action_width, c.state_width
        self.fast: FAST | None = None

    # -- processors

    def default_images(self) -> ImageProcessor:
        return framed(self.config.vision.image_size)

    def use_fast(self, fast: FAST) -> None:
        """Takes the tokenizer of actions.

        Raises:
            ConfigError: it is for chunks of another shape, or has more tokens than there is room for.
        """
        c = self.config
        if (fast.horizon, fast.dim) != (c.horizon, c.action_width) or fast.vocab_size > c.action_id + 1:
            raise ConfigError(
                f"FAST with {fast.vocab_size} tokens for {fast.horizon} steps of {fast.dim} numbers; this policy has "
                f"{c.action_id + 1} tokens for {c.horizon} of {c.action_width}"
            )
        self.fast = fast

    def load_processors(self, folder: Path) -> None:
        super().load_processors(folder)
        if (folder / FOLDER).is_dir():
            c = self.config
            self.use_fast(FAST.from_folder(folder / FOLDER, horizon=c.horizon, dim=c.action_width))

    def save_processors(self, folder: Path) -> None:
        super().save_processors(folder)
        if self.fast is not None:
            (folder / FOLDER).mkdir(exist_ok=True)
            self.fast.save(folder / FOLDER)

    def _spell(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise UnsupportedError(f"{self.source} has no tokenizer.json (see use_tokenizer)")
        return self.tokenizer.encode(text, special=False)

    @property
    def _actions(self) -> FAST:
        if self.fast is None:
            raise UnsupportedError(f"{self.source} has no tokenizer of actions in {FOLDER}/ (see use_fast)")
        return self.fast

    # -- prompts and answers

    def write_prompt(self, chat: Chat) -> list[int]:
        """``picture ... picture <bos> text newline``, as PaliGemma."""
        if len(chat.turns) != 1 or chat.turns[0].role != "user":
            raise MediaError("pi0-FAST answers one prompt of a user: it was trained on no conversations")
        return [self.config.image_id] * len(chat.images) + self._behind_pictures(chat.turns[0].text + "\n")

    def _behind_pictures(self, text: str) -> list[int]:
        start = self.config.control.start
        return ([] if start is None else [start]) + self._spell(text)

    def ask(self, observation: Observation) -> list[int]:
        """``patches <bos> Task: ..., State: ...;`` and a newline.

        Raises:
            MediaError: it is longer than the network was trained on: nothing is cut.
        """
        c, (state,) = self.config, state_text(self.states([observation]))
        task = observation.instruction.lower().strip().replace("_", " ")
        ids = self._behind_pictures(f"Task: {task}, State: {state};\n")
        if len(ids) > c.prompt:
            raise MediaError(f"an instruction with its state of {len(ids)} tokens; pi0-FAST reads at most {c.prompt}")
        return [c.image_id] * (c.num_features * len(self.cameras)) + ids

    def say(self, actions: Float[Tensor, "batch horizon action_width"]) -> list[list[int]]:
        before, after = self._around
        return [[*before, *(self.config.action_id - t for t in row), *after] for row in self._actions.encode(actions)]

    def hear(self, answers: Sequence[Completion]) -> Float[Tensor, "batch horizon action_width"]:
        before, after = self._around
        said = [answer.ids[len(before) :] for answer in answers]
        return self._actions.decode([[self.config.action_id - i for i in row[: row.index(after[0])]] for row in said])

    @property
    def _around(self) -> tuple[list[int], list[int]]:
        return self._spell("Action: "), self._spell("|")

    @property
    def constraint(self) -> Constraint:
        ids = [self.config.action_id - token for token in range(self._actions.vocab_size)]
        before, after = self._around
        return self._actions.constraint(ids, self.vocab_size, before, after)

    @property
    def longest(self) -> int:
        """No character has more than three bytes, and no token less than one."""
        before, after = self._around
        return len(before) + 3 * self.horizon * self.action_width + len(after) + 1


_ROBOT = ("action_id", "horizon", "action_width", "state_width", "prompt")


def read_hf(raw: Mapping[str, Any]) -> tuple[PI0FastConfig, dict[str, str]]:
    f = Fields(raw)
    parts = read_parts(f, MODEL_TYPE)
    parts |= {name: f.take(name, int, getattr(PI0FastConfig, name)) for name in _ROBOT}
    parts["cameras"] = f.numbers("cameras", str) if f.has("cameras") else CAMERAS
    report = f.done()
    layers = parts["vision"].num_layers
    return PI0FastConfig(vision_family=TOWER, layers=layers, connector=Linear(), **parts), report


def write_hf(c: PI0FastConfig) -> dict[str, Any]:
    parts = write_parts(c.vision, c.family, c.backbone, c.image_id, c.control)
    robot = {name: getattr(c, name) for name in _ROBOT} | {"cameras": list(c.cameras)}
    return {"architectures": ["Polymodal"], **parts, "model_type": MODEL_TYPE, **robot}


PI0Fast.formats = {"hf": Format(read=read_hf, write=write_hf, rules=rules_hf)}


def _base(horizon: int, action_width: int) -> PI0FastConfig:
    config = {
        "model_type": "paligemma", "vision_config": dict(SO400M), "text_config": dict(GEMMA), "projection_dim": 2048,
        "image_token_index": 257152, "eos_token_id": 1, "bos_token_id": 2, "horizon": horizon,
        "action_width": action_width,
    }  # fmt: skip
    return read_hf(config)[0]


PRESETS = {"pi0_fast_base": partial(_base, 32, 32), "pi0_fast_libero": partial(_base, 10, 7)}
