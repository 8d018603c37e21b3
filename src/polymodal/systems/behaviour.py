"""Behaviour cloning with one trunk and any head: the comparison that papers make, each with the head they propose.

Papers: one for each head: L1 of ACT, 2023, https://arxiv.org/abs/2304.13705, and OpenVLA-OFT, 2025,
https://arxiv.org/abs/2502.19645; bins of RT-1, 2022, https://arxiv.org/abs/2212.06817; FAST, 2025,
https://arxiv.org/abs/2501.09747; flow of pi0, 2024, https://arxiv.org/abs/2410.24164; diffusion of Diffusion Policy,
2023, https://arxiv.org/abs/2303.04137. There is no official code of the whole.

    instruction -> words -> Transformer, mean --+
    state ---------------------------------------+-> trunk -> one vector -> head -> chunk of actions
    pictures -> convolutions steered by words --+

Training details kept here: those of the heads (`heads`, `tokenizers.fast`); steps past an episode's end are not taught,
nor dimensions that a robot does not have, in which heads that sample learn zeros, as pi0 does; words are hidden now and
then, so that one never read is not a surprise.

Deviations: the trunk is ours, small enough to train in minutes. There is no file format of others: names are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from polymodal.core.batch import IGNORE, Batch, Loss, padded
from polymodal.core.errors import ConfigError, UnsupportedError
from polymodal.core.observation import Observation
from polymodal.core.verbs import TensorSpec
from polymodal.encoders.text import TextConfig, TextTower
from polymodal.encoders.trunk import PixelEncoder, PixelTrunk, StateEncoder, StateTrunk, TileTrunk
from polymodal.heads.denoiser import ChunkDenoiser
from polymodal.modalities.image import HALF, Exact, ImageProcessor
from polymodal.systems.acting import Policy
from polymodal.systems.chunk_heads import L1, Bins, Choice, Diffusion, Flow, FlowActions
from polymodal.systems.token_head import TokenActions, Tokens
from polymodal.tokenizers.fast import FAST
from polymodal.tokenizers.words import PAD, UNKNOWN, Words
from polymodal.weights.native import native_format

HIDDEN: Final = 0.05  # of the words of a lesson


@dataclass(frozen=True, kw_only=True)
class BehaviourConfig:
    """A trunk, a head, and the words that are understood.

    Attributes:
        words: of instructions; others are read as one unknown word.
        horizon: steps of a chunk.
        action_width: numbers of one action.
        text_dim: of the vector of an instruction.
        context: the longest instruction in words.
    """

    trunk: StateTrunk | PixelTrunk | TileTrunk
    head: L1 | Bins | Choice | Tokens | Flow | Diffusion = field(default_factory=L1)
    words: tuple[str, ...]
    horizon: int
    action_width: int
    text_dim: int = 64
    context: int = 32

    def __post_init__(self) -> None:
        if self.horizon < 1 or self.action_width < 1 or self.text_dim % 32:
            raise ConfigError("a policy has steps, numbers of an action, and a text of a width that 32 divides")
        if isinstance(self.trunk, StateTrunk) and not self.trunk.state_width:
            raise ConfigError("a trunk of the state needs its width (state_width)")


@final
class BehaviourCloning(Policy):
    """A trunk and a head."""

    config: BehaviourConfig

    def __init__(self, config: BehaviourConfig) -> None:
        super().__init__(config)
        c = config
        self.horizon, self.action_width, self.state_width = c.horizon, c.action_width, c.trunk.state_width
        self.cameras = () if isinstance(c.trunk, StateTrunk) else c.trunk.cameras
        self.words = Words(words=c.words, context=c.context)
        self.text = TextTower(
            TextConfig(
                vocab_size=self.words.vocab_size, context=c.context, dim=c.text_dim, num_layers=1,
                num_heads=c.text_dim // 32, hidden_dim=2 * c.text_dim, causal=False,
            )
        )  # fmt: skip
        self.trunk = c.trunk.build(c.text_dim)
        self.head = c.head.build(c.trunk.dim, c.horizon, c.action_width)
        self.fast: FAST | None = None  # of a head of tokens

    @torch.no_grad()
    def init_weights(self) -> None:
        """Torch's own for linear layers; words and places normal, so that an instruction begins with deviation one."""
        nn.init.normal_(self.text.embed_tokens.weight)
        nn.init.normal_(self.text.position, std=0.1)
        for part in (self.trunk, self.head):
            if isinstance(part, PixelEncoder | ChunkDenoiser | TokenActions):
                part.init_weights()

    def inputs_spec(self) -> dict[str, TensorSpec]:
        c = self.config
        spec = {
            "ids": TensorSpec(shape=(min(6, c.context),), dtype=torch.int64, low=1, high=self.words.vocab_size),
        }
        if isinstance(c.head, Tokens):
            spec["labels"] = TensorSpec(shape=(6,), dtype=torch.int64, high=c.head.vocab_size)
        else:
            spec["actions"] = TensorSpec(shape=(c.horizon, c.action_width))
            spec["actions_valid"] = TensorSpec(shape=(c.horizon,), dtype=torch.bool)
            spec["actions_dims"] = TensorSpec(shape=(c.action_width,), dtype=torch.bool)
        if c.trunk.state_width:
            spec["state"] = TensorSpec(shape=(c.trunk.state_width,))
        if not isinstance(c.trunk, StateTrunk):
            spec["pixels"] = TensorSpec(shape=(len(c.trunk.cameras), 3, c.trunk.image_size, c.trunk.image_size))
        return spec

    def default_images(self) -> ImageProcessor | None:
        trunk = self.config.trunk
        if isinstance(trunk, StateTrunk):
            return None
        side = Exact(height=trunk.image_size, width=trunk.image_size)
        return ImageProcessor(resize=side, resample="bilinear", mean=HALF, std=HALF)

    def instruct(self, texts: Sequence[str]) -> dict[str, Tensor]:
        return {"ids": self.words(texts)}

    def lesson(
        self,
        observations: Sequence[Observation],
        actions: Float[Tensor, "batch horizon action_dim"],
        valid: Bool[Tensor, "batch horizon"],
    ) -> Batch:
        """As of every policy, with ``actions_dims``: which numbers of an action a robot has; or ``labels``: tokens.

        Raises:
            ConfigError: a head of tokens has no tokenizer.
        """
        if isinstance(self.head, TokenActions):
            # A chunk is written whole: past the end of an episode its last action stays.
            last = torch.arange(self.horizon).where(valid, 0).amax(1)
            held = actions[torch.arange(len(actions))[:, None], torch.arange(self.horizon).minimum(last[:, None])]
            labels = padded(self._tokenizer().encode(self.to_network(held)), fill=IGNORE)
            return Batch(self.observe(observations), labels=labels)
        dims = (torch.arange(self.action_width) < self.action_dim).expand(len(actions), -1)
        return Batch(super().lesson(observations, actions, valid), actions_dims=dims)

    def forward(self, batch: Batch) -> Float[Tensor, "batch dim"]:
        """What the trunk makes of each observation, and the head reads."""
        text = self._text(batch["ids"])
        if isinstance(self.trunk, StateEncoder):
            return self.trunk(batch["state"], text)
        return self.trunk(batch["pixels"], text, batch.get("state"))

    def _text(self, ids: Int[Tensor, "batch words"]) -> Float[Tensor, "batch text_dim"]:
        """The mean over the words of each instruction; one that a batch has often is read once."""
        ids, row = ids.unique(dim=0, return_inverse=True)
        valid = ids != PAD
        x = self.text(ids, valid).x * valid[..., None]
        return (x.sum(1) / valid.sum(1, keepdim=True))[row]

    def loss(self, batch: Batch) -> Loss:
        """The head's, summed over the numbers of actions that are valid; they are its weight.

        ``done``, if it is there, is what the robot did where that is not what was wanted (`chunk_heads.Flow.given`).
        """
        ids = batch["ids"]
        if self.training:
            hidden = torch.rand(ids.shape, device=ids.device) < HIDDEN
            ids = ids.where(~hidden | (ids == PAD), UNKNOWN)
        condition = self(Batch(batch, ids=ids))
        if isinstance(self.head, TokenActions):
            return self.head.loss(condition, batch["labels"])
        mask = batch["actions_valid"][..., None] & batch["actions_dims"][:, None]
        if isinstance(self.head, ChunkDenoiser):  # reads what it wrote: what nobody taught it would lead it astray
            mask = batch["actions_valid"][..., None].expand_as(mask)
        if isinstance(self.head, FlowActions):
            return self.head.loss(condition, batch["actions"], mask, batch.get("done"))
        return self.head.loss(condition, batch["actions"], mask)

    def chunk(
        self, batch: Batch, generator: torch.Generator | None = None
    ) -> Float[Tensor, "batch horizon action_width"]:
        if isinstance(self.head, TokenActions):
            return self.head.predict(self(batch), self._tokenizer())
        return self.head.predict(self(batch), generator)

    def _tokenizer(self) -> FAST:
        c = self.config
        if self.fast is None:
            raise ConfigError(f"{self.source} has no tokenizer of actions: policy.fast = FAST.fit(normalised chunks)")
        shape, size = (self.fast.horizon, self.fast.dim), self.fast.vocab_size
        assert isinstance(c.head, Tokens)
        if shape != (c.horizon, c.action_width) or size > c.head.vocab_size:
            raise ConfigError(
                f"a tokenizer of {size} tokens for chunks of {shape}; the head has {c.head.vocab_size}, for chunks of "
                f"{(c.horizon, c.action_width)}"
            )
        return self.fast

    def load_processors(self, folder: Path) -> None:
        super().load_processors(folder)
        if (folder / "fast").is_dir():
            self.fast = FAST.from_folder(folder / "fast")

    def save_processors(self, folder: Path) -> None:
        super().save_processors(folder)
        if self.fast is not None:
            self.fast.save(folder / "fast")

    def continue_chunk(
        self,
        batch: Batch,
        previous: Float[Tensor, "batch steps action_dim"],
        frozen: int,
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "batch horizon action_dim"]:
        """See `core.verbs.Continues`.

        Raises:
            UnsupportedError: the head is not a flow.
        """
        if not isinstance(self.head, FlowActions):
            raise UnsupportedError(
                f"a head of type {type(self.config.head).__name__} cannot go on from a chunk; Flow can"
            )
        with self.acting():
            condition = self(batch.to(self.device))
            return self.to_robot(self.head.go_on(condition, self.to_network(previous), frozen, generator)).cpu()


BehaviourCloning.formats = {"hf": native_format("polymodal_behaviour_cloning", BehaviourConfig)}


def _preset(head: Any) -> BehaviourConfig:
    """As large as a policy for pictures of two cameras may well be; its words have to be those of its tasks."""
    trunk = PixelTrunk(
        cameras=("front", "wrist"), image_size=128, channels=128, num_convs=3, keypoints=128, state_width=8, dim=1024
    )
    return BehaviourConfig(trunk=trunk, head=head, words=(), horizon=16, action_width=7)


PRESETS = {
    "polymodal-behaviour-l1": lambda: _preset(L1()),
    "polymodal-behaviour-bins": lambda: _preset(Bins()),
    "polymodal-behaviour-tokens": lambda: _preset(Tokens(hidden_dim=512)),
    "polymodal-behaviour-flow": lambda: _preset(Flow(hidden_dim=1024)),
    "polymodal-behaviour-diffusion": lambda: _preset(Diffusion(hidden_dim=1024)),
}
