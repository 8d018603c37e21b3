"""RT-1: pictures that a sentence steers become eight tokens each; a decoder names a bin for each number of an action.

Paper: Brohan et al., "RT-1: Robotics Transformer for Real-World Control at Scale", 2022,
https://arxiv.org/abs/2212.06817. Official code: google-research/robotics_transformer. Hub: nothing in safetensors (its
checkpoints are TensorFlow's); the tower may begin with ImageNet's weights (`encoders.efficientnet_files`).

    sentence -> 512 numbers --+ FiLM behind each block
    6 pictures -> EfficientNet-B3 -> 9 x 9 places -> TokenLearner -> 6 x 8 tokens --+
    11 empty places behind each picture's tokens -----------------------------------+-> decoder -> 256 bins each

Training details kept here: FiLM begins as the identity, so that ImageNet's features survive; layers that halve are
padded as if sizes were even, without which 300 pixels are 10 x 10 places; TokenLearner weighs features by their normed
selves; blocks end in one linear layer, and no norm follows the last; Keras' Glorot weights, which take the heads of an
attention for a receptive field; dropout of 0.1. The places of actions are empty, and none sees another. Every step of a
window is learned whose action is known, by cross-entropy (Adam at 1e-4). An action has 7 numbers of the arm, 3 of the
base and a mode (arm, base, stop), 3 times a second; numbers lie between their least and their greatest in the data.

Deviations: a sentence's vector is given (the paper's is of the Universal Sentence Encoder), or of a small Transformer
over words, trained along. No place sees another, so all numbers are decided in one pass; the official code runs one for
each, to the same end. It remembers the tokens of earlier pictures, which are made anew here. Its embedding of actions,
multiplied by zero, and a second bias of its positions are left out; its loss is ours divided by a constant. A number
takes the nearest bin, theirs the one below. A mode that is none cannot be chosen; theirs becomes the first. Pictures
are not shifted at random here: that is the data's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import final

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from polymodal.backbones.steps import StepDecoder, StepDecoderConfig, glorot_
from polymodal.connectors.token_learner import TokenLearner, TokenLearnerConfig
from polymodal.core.batch import IGNORE, Batch, Loss
from polymodal.core.errors import ConfigError, DataError, UnsupportedError
from polymodal.core.observation import Observation
from polymodal.core.sample import Sample
from polymodal.core.verbs import TensorSpec
from polymodal.encoders.efficientnet import EfficientNet, EfficientNetConfig
from polymodal.encoders.text import TextConfig, TextTower
from polymodal.modalities.action import Normaliser
from polymodal.modalities.image import IMAGENET_MEAN, IMAGENET_STD, Exact, ImageProcessor
from polymodal.nn.film import FiLM
from polymodal.nn.init import lecun_normal_
from polymodal.systems.acting import Policy
from polymodal.tokenizers.action_bins import UniformBins
from polymodal.tokenizers.words import PAD, Words
from polymodal.weights.native import native_format


@dataclass(frozen=True, kw_only=True)
class RT1Config:
    """A camera's pictures, a sentence, and the numbers of an action.

    Attributes:
        words: of instructions, for a Transformer that is trained along; None: a batch brings their vectors.
        context: the longest instruction in words.
        text_dim: of the vector of an instruction.
        history: pictures that are looked at.
        action_width: numbers of one action.
        modes: the last number is one of so many modes, 0, 1, ..., and no quantity; None: all are quantities.
        vocab_size: bins of each number.
    """

    vision: EfficientNetConfig = field(default_factory=lambda: EfficientNetConfig(padding="open"))
    connector: TokenLearnerConfig = field(default_factory=TokenLearnerConfig)
    backbone: StepDecoderConfig = field(default_factory=StepDecoderConfig)
    camera: str = "front"
    words: tuple[str, ...] | None = None
    context: int = 32
    text_dim: int = 512
    history: int = 6
    action_width: int = 11
    modes: int | None = None
    vocab_size: int = 256

    def __post_init__(self) -> None:
        if min(self.history, self.action_width) < 1 or self.text_dim % 32:
            raise ConfigError("RT-1 has pictures and actions, and a text of a width that 32 divides")
        if not 1 <= (self.modes or 1) <= self.vocab_size or self.vocab_size < 2:
            raise ConfigError(f"{self.modes} modes do not fit into {self.vocab_size} bins")


@final
class RT1(Policy):
    """A tower that a sentence steers, a TokenLearner, a decoder, and a class for each number of an action."""

    config: RT1Config
    normalisation = "minmax"
    horizon = 1

    def __init__(self, config: RT1Config) -> None:
        super().__init__(config)
        c = config
        self.history, self.action_width, self.cameras = c.history, c.action_width, (c.camera,)
        self.bins = UniformBins(low=(-1.0,) * c.action_width, high=(1.0,) * c.action_width, count=c.vocab_size)
        self.words = None if c.words is None else Words(words=c.words, context=c.context)
        self.text = None
        if self.words is not None:
            self.text = TextTower(
                TextConfig(
                    vocab_size=self.words.vocab_size, context=c.context, dim=c.text_dim, num_layers=2,
                    num_heads=c.text_dim // 32, hidden_dim=4 * c.text_dim, causal=False,
                )
            )  # fmt: skip
        self.vision = EfficientNet(c.vision, c.text_dim)
        self.proj = nn.Conv2d(c.vision.dim, c.backbone.dim, 1, bias=False)
        self.film = FiLM(c.text_dim, c.backbone.dim)
        self.connector = TokenLearner(c.connector, c.backbone.dim)
        self.backbone = StepDecoder(c.backbone, history=c.history, seen=c.connector.num_tokens, places=c.action_width)
        self.head = nn.Linear(c.backbone.dim, c.vocab_size)

    @torch.no_grad()
    def init_weights(self) -> None:
        if self.text is not None:
            nn.init.normal_(self.text.embed_tokens.weight)
            nn.init.normal_(self.text.position, std=0.1)
        lecun_normal_(self.proj)
        for part in (self.vision, self.film, self.connector, self.backbone):
            part.init_weights()
        glorot_(self.head, sum(self.head.weight.shape))

    def inputs_spec(self) -> dict[str, TensorSpec]:
        c = self.config
        spec = {
            "pixels": TensorSpec(shape=(c.history, 3, c.vision.resolution, c.vision.resolution)),
            "seen": TensorSpec(shape=(c.history,), dtype=torch.bool),
            "labels": TensorSpec(shape=(c.history, c.action_width), dtype=torch.int64, high=c.vocab_size),
        }
        if self.words is None:
            return spec | {"sentence": TensorSpec(shape=(c.text_dim,))}
        return spec | {"ids": TensorSpec(shape=(c.context,), dtype=torch.int64, low=1, high=self.words.vocab_size)}

    def default_images(self) -> ImageProcessor:
        side = Exact(height=self.config.vision.resolution, width=self.config.vision.resolution)
        return ImageProcessor(resize=side, resample="bilinear", mean=IMAGENET_MEAN, std=IMAGENET_STD)

    def count(self, sample: Sample) -> int:
        """Tokens that the decoder reads for the pictures of a sample, with the places of their actions."""
        return len(sample.images) * (self.config.connector.num_tokens + self.action_width)

    # -- observations and lessons

    def instruct(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The words of instructions.

        Raises:
            UnsupportedError: sentences are given as vectors.
        """
        if self.words is None:
            raise UnsupportedError(
                f"this RT-1 reads sentences as vectors of {self.config.text_dim} numbers: put them into the batch, as "
                "`sentence`, or build one that knows words"
            )
        return {"ids": self.words(texts)}

    def observe(self, observations: Sequence[Observation]) -> Batch:
        """Windows of pictures, beginning with the oldest; ``seen`` is False behind the last one."""
        windows = [o.window(self.history) for o in observations]
        seen = torch.arange(self.history) < torch.tensor([[len(window)] for window in windows])
        frames = self._pixels([o for window in windows for o in window])[:, 0]
        pixels = frames.new_zeros(*seen.shape, *frames.shape[1:])
        pixels[seen] = frames
        texts = [o.instruction for o in observations]
        return Batch(pixels=pixels, seen=seen, **({} if self.words is None else self.instruct(texts)))

    def lesson(
        self,
        observations: Sequence[Observation],
        actions: Float[Tensor, "batch 1 action_dim"],
        valid: Bool[Tensor, "batch 1"],
    ) -> Batch:
        """`observe`, and as ``labels`` the bins of the actions of each step of a window, where they are known."""
        batch = self.observe(observations)
        known = {(row, int(batch["seen"][row].sum()) - 1): actions[row, 0] for row in range(len(actions)) if valid[row]}
        for row, observation in enumerate(observations):
            for step, earlier in enumerate(observation.window(self.history)[:-1]):
                if earlier.action is not None:
                    known[row, step] = torch.from_numpy(earlier.action)
        labels = torch.full((*batch["seen"].shape, self.action_width), IGNORE)
        if known:
            rows, steps = torch.tensor(list(known)).unbind(1)
            labels[rows, steps] = self.to_labels(torch.stack(list(known.values())))
        return Batch(batch, labels=labels)

    def normaliser(self, what: str) -> Normaliser:
        """As of every policy, but a mode is no quantity."""
        plain = super().normaliser(what)
        if self.config.modes is None or what != "action":
            return plain
        others = plain.statistics.mask or (True,) * plain.statistics.dim
        return replace(plain, mask=(*others[:-1], False))

    def to_labels(self, actions: Float[Tensor, "actions action_dim"]) -> Int[Tensor, "actions action_width"]:
        """The bins of the numbers of actions; `IGNORE` for those that the robot does not have.

        Raises:
            DataError: there is no such mode.
        """
        c, dim = self.config, self.action_dim
        labels = self.bins.encode(self.to_network(actions))
        labels[:, dim:] = IGNORE
        if c.modes is not None:
            labels[:, -1] = actions[:, -1].round().long()
            if dim != c.action_width or not bool(((labels[:, -1] >= 0) & (labels[:, -1] < c.modes)).all()):
                raise DataError(
                    f"actions of {dim} numbers that end in {actions[:, -1].unique().tolist()}; those of this RT-1 have "
                    f"{c.action_width}, the last of which is a mode below {c.modes}"
                )
        return labels

    # -- the network

    def sentence(self, batch: Batch) -> Float[Tensor, "batch text_dim"]:
        """The vectors of the instructions: given, or the mean over the words."""
        if self.text is None:
            return batch["sentence"]
        valid = batch["ids"] != PAD
        x = self.text(batch["ids"], valid).x * valid[..., None]
        return x.sum(1) / valid.sum(1, keepdim=True)

    def tokens(
        self, pixels: Float[Tensor, "images 3 height width"], told: Float[Tensor, "images text_dim"]
    ) -> Float[Tensor, "images tokens dim"]:
        """What a picture becomes, for who was told so."""
        x = self.film(self.proj(self.vision(pixels, told)), told)
        return self.connector(rearrange(x, "b d h w -> b (h w) d"))

    def forward(self, batch: Batch) -> Float[Tensor, "batch steps numbers bins"]:
        """Scores of the bins of each number of each step's action."""
        seen = batch["seen"]
        told = self.sentence(batch)
        frames = self.tokens(batch["pixels"][seen], told[seen.nonzero()[:, 0]])
        x = frames.new_zeros(*seen.shape, *frames.shape[1:])
        x[seen] = frames
        return self.head(self.backbone(x))

    def loss(self, batch: Batch) -> Loss:
        """Cross-entropy, summed over the numbers that have a label; they are its weight."""
        keep = batch["labels"] != IGNORE
        scores, labels = self(batch)[keep].float(), batch["labels"][keep]
        right = (scores.detach().argmax(-1) == labels).sum()
        weight = len(labels)
        return Loss(
            total=F.cross_entropy(scores, labels, reduction="sum"),
            weight=weight,
            metrics={"accuracy": right / max(weight, 1)},
        )

    def chunk(self, batch: Batch, generator: torch.Generator | None = None) -> Float[Tensor, "batch 1 action_width"]:
        """The likeliest bin of each number, after the last picture."""
        last = batch["seen"].sum(1) - 1
        scores = self(batch)[torch.arange(len(last), device=last.device), last]
        actions = self.bins.values(scores.argmax(-1))
        if self.config.modes is not None:
            actions[:, -1] = scores[:, -1, : self.config.modes].argmax(-1).to(actions)
        return actions[:, None]


RT1.formats = {"hf": native_format("polymodal_rt1", RT1Config)}
PRESETS = {"google/rt-1": lambda: RT1Config(modes=3)}
