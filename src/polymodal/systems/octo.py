"""Octo: pictures and words in one Transformer, whose readouts a small diffusion turns into chunks of actions.

Paper: Octo Model Team, "Octo: An Open-Source Generalist Robot Policy", 2024, https://arxiv.org/abs/2405.12213.
Official code: octo-models/octo. Hub: rail-berkeley/octo-small, octo-base (Orbax, not safetensors).

    instruction -> T5 encoder (frozen) -> linear --------+
    each camera, 2 moments -> convolutions -> linear ----+-> Transformer -> a readout of each moment --+
    a readout for each moment: nothing but its place ----+                                             |
    noise -> 3 residual blocks, 20 times -> the actions of 4 steps <-----------------------------------+

Training details kept here: words see words; a moment sees the words and the moments up to its own; readouts see that
and readouts, and nothing else sees them. Each moment learns the chunk that begins at it; numbers that a robot does not
have, moments before an episode and steps behind it are not learned. The Transformer runs once, only the head is run
again. Actions are scaled by mean and deviation and kept within 5; in the place of numbers that a robot does not have,
the head reads noise, as in training. The paper trains with AdamW at 3e-4 (2000 steps of warm-up, then the reciprocal
square root), weight decay 0.1.

Deviations: no pictures of goals, which are three more channels of the official stem. Words end where the instruction
ends (theirs are always 16), and one that is longer is refused. Pictures of the wrist have the size of the others and
are averaged down to theirs. Steps back draw the posterior's variance and keep the estimated actions within 5; the
official code draws all that the step adds, and keeps noisy ones there. Pictures are not altered here: that is the
data's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from polymodal.backbones.encdec import EncDec, EncDecConfig, RelativeBias, StackConfig, TextEncoder, Unbiased, t5_init_
from polymodal.backbones.readouts import ReadoutConfig, ReadoutTransformer
from polymodal.core.batch import Batch, Loss, text_batch
from polymodal.core.errors import ConfigError, MediaError, UnsupportedError
from polymodal.core.observation import Observation
from polymodal.core.sample import Sample
from polymodal.core.verbs import TensorSpec
from polymodal.encoders.small_stem import SmallStem, SmallStemConfig
from polymodal.heads.diffusion import diffusion_loss
from polymodal.heads.score import ScoreConfig, ScoreNetwork
from polymodal.modalities.image import HALF, Exact, ImageProcessor
from polymodal.nn.init import lecun_normal_
from polymodal.nn.noise import squared_cosine
from polymodal.nn.norm import RMS
from polymodal.samplers.diffusion import ddpm
from polymodal.systems.acting import Policy
from polymodal.tokenizers.language import LanguageTokenizer
from polymodal.weights.native import native_format

_T5_BASE: Final = StackConfig(num_layers=12, num_heads=12, head_dim=64, mlp=Unbiased(hidden_dim=3072), scale=1.0)


@dataclass(frozen=True, kw_only=True)
class OctoConfig:
    """Words, cameras, a Transformer and a head.

    Attributes:
        shrink: what the sides of each camera's pictures are divided by before they are seen.
        text: the encoder of a T5 of ``vocab_size`` tokens and ``text_dim``.
        context: the longest instruction in tokens.
        history: moments that are looked at.
        horizon: steps of a chunk.
    """

    cameras: tuple[str, ...] = ("primary", "wrist")
    shrink: tuple[int, ...] = (1, 2)
    image_size: int = 256
    vision: SmallStemConfig = field(default_factory=SmallStemConfig)
    text: StackConfig = _T5_BASE
    vocab_size: int = 32128
    text_dim: int = 768
    context: int = 16
    history: int = 2
    horizon: int = 4
    action_width: int = 7
    backbone: ReadoutConfig = field(default_factory=ReadoutConfig)
    head: ScoreConfig = field(default_factory=ScoreConfig)

    def __post_init__(self) -> None:
        if not self.cameras or len(self.shrink) != len(self.cameras) or min(self.shrink) < 1:
            raise ConfigError(f"Octo has cameras, and divides the pictures of each: {self.cameras}, {self.shrink}")
        if any(self.image_size % (n * self.vision.patch_size) for n in self.shrink):
            raise ConfigError(f"pictures of {self.image_size} pixels, divided by {self.shrink}, are not whole patches")
        if min(self.history, self.horizon, self.action_width) < 1:
            raise ConfigError("Octo looks at a moment or more, and answers with a step or more")

    @property
    def camera_tokens(self) -> tuple[int, ...]:
        """Of one picture of each camera."""
        return tuple((self.image_size // n // self.vision.patch_size) ** 2 for n in self.shrink)

    def t5(self) -> EncDecConfig:
        """The language model whose encoder reads instructions."""
        return EncDecConfig(
            vocab_size=self.vocab_size, dim=self.text_dim, encoder=self.text, decoder=self.text, norm=RMS(),
            position=RelativeBias(), post_norm=False, start_id=0, pad_id=0,
        )  # fmt: skip


@final
class Octo(Policy):
    """A frozen T5 encoder, a stem for each camera, a Transformer, and a diffusion over chunks of actions."""

    config: OctoConfig
    normalisation = "zscore"
    tokenizer: LanguageTokenizer | None = None  # type: ignore[assignment]

    def __init__(self, config: OctoConfig) -> None:
        super().__init__(config)
        c = config
        self.history, self.horizon, self.action_width, self.cameras = c.history, c.horizon, c.action_width, c.cameras
        self.text = TextEncoder(c.t5()).requires_grad_(False)
        self.text_proj = nn.Linear(c.text_dim, c.backbone.dim)
        self.vision = nn.ModuleList(SmallStem(c.vision) for _ in c.cameras)
        self.vision_proj = nn.ModuleList(nn.Linear(c.vision.dim, c.backbone.dim) for _ in c.cameras)
        self.backbone = ReadoutTransformer(c.backbone, words=c.context, steps=c.history, seen=sum(c.camera_tokens))
        self.head = ScoreNetwork(c.head, c.backbone.dim, c.horizon, c.action_width)

    @torch.no_grad()
    def init_weights(self) -> None:
        """As the official code draws it; the T5 as its own paper does, until there is a trained one."""
        t5_init_(self.text)
        for part in (*self.vision, self.backbone, self.head):
            assert isinstance(part, SmallStem | ReadoutTransformer | ScoreNetwork)
            part.init_weights()
        for layer in (self.text_proj, *self.vision_proj):
            assert isinstance(layer, nn.Linear)
            lecun_normal_(layer)

    def use_language(self, t5: EncDec, tokenizer: LanguageTokenizer) -> None:
        """Takes the encoder of a T5 and its tokenizer.

        Raises:
            ConfigError: it has other sizes.
        """
        if (t5.config.vocab_size, t5.config.dim, t5.config.encoder) != (
            self.config.vocab_size, self.config.text_dim, self.config.text
        ):  # fmt: skip
            raise ConfigError("this Octo reads the words of a T5 of other sizes: build it with those of this one")
        state = t5.state_dict()
        self.text.load_state_dict({name: state[name] for name in self.text.state_dict()})
        self.tokenizer = tokenizer

    def inputs_spec(self) -> dict[str, TensorSpec]:
        c, side = self.config, self.config.image_size
        chunks = (c.history, c.horizon, c.action_width)
        return {
            "pixels": TensorSpec(shape=(c.history, len(c.cameras), 3, side, side)),
            "seen": TensorSpec(shape=(c.history,), dtype=torch.bool),
            "ids": TensorSpec(shape=(c.context,), dtype=torch.int64, high=c.vocab_size),
            "valid": TensorSpec(shape=(c.context,), dtype=torch.bool),
            "actions": TensorSpec(shape=chunks),
            "actions_valid": TensorSpec(shape=chunks, dtype=torch.bool),
        }

    def default_images(self) -> ImageProcessor:
        side = Exact(height=self.config.image_size, width=self.config.image_size)
        return ImageProcessor(resize=side, resample="lanczos", mean=HALF, std=HALF)

    def load_processors(self, folder: Path) -> None:
        super().load_processors(folder)
        if (folder / "tokenizer.json").is_file():
            self.tokenizer = LanguageTokenizer.from_folder(folder)

    def count(self, sample: Sample) -> int:
        """Tokens of a sample's pictures: one of each camera, then again."""
        tokens = self.config.camera_tokens
        return sum(tokens[number % len(tokens)] for number in range(len(sample.images)))

    # -- observations and lessons

    def instruct(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The tokens of instructions.

        Raises:
            UnsupportedError: there is no tokenizer.
            MediaError: an instruction is longer than the context: nothing is ever cut.
        """
        if self.tokenizer is None:
            raise UnsupportedError(f"Octo ({self.source}) reads no text: it has no tokenizer (use_language)")
        rows = [self.tokenizer.encode(text, special=True) or [0] for text in texts]
        for text, row in zip(texts, rows, strict=True):
            if len(row) > self.config.context:
                raise MediaError(f"{len(row)} tokens; Octo reads at most {self.config.context}: {text}")
        return text_batch(rows)

    def _window(self, observation: Observation) -> list[Observation]:
        window = observation.window(self.history)
        return [window[0]] * (self.history - len(window)) + window

    def observe(self, observations: Sequence[Observation]) -> Batch:
        """As of every policy, with an axis of moments; those before an episode are not ``seen``."""
        pixels = self._pixels([o for each in observations for o in self._window(each)])
        missing = torch.tensor([[self.history - len(o.window(self.history))] for o in observations])
        seen = torch.arange(self.history) >= missing
        texts = [o.instruction for o in observations]
        return Batch(pixels=pixels.unflatten(0, seen.shape), seen=seen, **self.instruct(texts))

    def lesson(
        self,
        observations: Sequence[Observation],
        actions: Float[Tensor, "batch horizon action_dim"],
        valid: Bool[Tensor, "batch horizon"],
    ) -> Batch:
        """As of every policy; each moment has the chunk that begins at it, as far as its actions are known."""
        batch, dim = self.observe(observations), self.action_dim
        whole, known = F.pad(actions, (0, 0, self.history - 1, 0)), F.pad(valid, (self.history - 1, 0))
        for row, observation in enumerate(observations):
            past = observation.window(self.history)[:-1]
            for place, earlier in enumerate(past, self.history - 1 - len(past)):
                if earlier.action is not None:
                    whole[row, place], known[row, place] = torch.from_numpy(earlier.action), True
        chunks = self.to_network(whole).unfold(1, self.horizon, 1).transpose(2, 3)
        learned = known.unfold(1, self.horizon, 1) & batch["seen"][..., None]
        has = torch.arange(self.action_width) < dim
        return Batch(batch, actions=chunks.contiguous(), actions_valid=learned[..., None] & has)

    # -- the network

    def forward(self, batch: Batch) -> Float[Tensor, "batch history dim"]:
        """The readout of each moment."""
        seen, groups = batch["seen"], []
        for number, shrink in enumerate(self.config.shrink):
            pictures = F.avg_pool2d(batch["pixels"][:, :, number].flatten(0, 1), shrink)
            groups.append(self.vision_proj[number](self.vision[number](pictures)).unflatten(0, seen.shape))
        with torch.no_grad():
            words = self.text(batch["ids"], batch["valid"])
        return self.backbone(self.text_proj(words), batch["valid"], torch.cat(groups, 2), seen)

    def loss(self, batch: Batch) -> Loss:
        """Squared error of the noise, summed over the numbers that are learned; they are its weight."""
        largest = self.config.head.largest
        return diffusion_loss(
            partial(self.head, condition=self(batch).flatten(0, 1)),
            batch["actions"].flatten(0, 1).clamp(-largest, largest),
            left=squared_cosine(self.config.head.steps),
            mask=batch["actions_valid"].flatten(0, 1),
        )

    def chunk(
        self, batch: Batch, generator: torch.Generator | None = None
    ) -> Float[Tensor, "batch horizon action_width"]:
        c, readout = self.config, self(batch)[:, -1]
        dim = self.action_dim if self.statistics else self.action_width  # what it costs is known without a robot
        left = squared_cosine(c.head.steps)

        def drawn() -> Tensor:
            where = readout.device if generator is None else generator.device
            shape = (len(readout), c.horizon, c.action_width)
            return torch.randn(shape, device=where, generator=generator).to(readout.device)

        def denoise(x: Tensor, step: Tensor) -> Tensor:
            noise = drawn() * (1 - left.to(x)[step])[:, None, None].sqrt() if dim < c.action_width else x
            return self.head(torch.cat([x[..., :dim], noise[..., dim:]], -1), step, readout)

        return ddpm(denoise, drawn(), left=left, steps=c.head.steps, clip=c.head.largest, generator=generator)


Octo.formats = {"hf": native_format("polymodal_octo", OctoConfig)}
PRESETS = {
    "rail-berkeley/octo-small": OctoConfig,
    "rail-berkeley/octo-base": lambda: OctoConfig(backbone=ReadoutConfig(dim=768, num_heads=12, hidden_dim=3072)),
}
