"""What pi0 and pi0.5 share: a PaliGemma that reads, and an expert that moves noise to actions. Not a system itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from polymodal.backbones.decoder import DecoderConfig
from polymodal.backbones.experts import ExpertConfig, Experts, Prefix
from polymodal.backbones.families import ControlIds
from polymodal.connectors.mlp import Linear
from polymodal.core.batch import Batch, Loss, text_batch
from polymodal.core.errors import ConfigError, MediaError, UnsupportedError
from polymodal.core.sample import Sample
from polymodal.core.tokens import Modality, Tokens
from polymodal.core.verbs import TensorSpec
from polymodal.encoders.vit import ViT, ViTConfig
from polymodal.heads.flow import Beta, Velocity, between, flow_loss
from polymodal.modalities.image import ImageProcessor
from polymodal.nn.init import lecun_normal_
from polymodal.nn.time import waves
from polymodal.samplers.flow import continued, euler
from polymodal.systems.acting import Policy
from polymodal.systems.prefix import PrefixGenerator, framed, init_sight
from polymodal.tokenizers.language import LanguageTokenizer

# openpi's robots have these; what is missing is left out, which is the same as their black and masked pictures.
CAMERAS: Final = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
SHORTEST, LONGEST = 4e-3, 4.0  # periods of the waves that tell the time


@dataclass(frozen=True, kw_only=True)
class ExpertPolicyConfig:
    """A SigLIP tower, a linear layer, a Gemma, and an expert that sees what it keeps.

    Attributes:
        image_id: stands for a patch in prompts; it may lie behind the vocabulary.
        cameras: names, in the order in which their pictures are read.
        horizon: steps of a chunk of actions.
        action_width: numbers of an action; those of robots with fewer are followed by zeros.
        state_width: likewise of a state.
        prompt: the most tokens of an instruction.
        steps: of the sampler.
        times: which points of the way from data to noise are learned.
    """

    vision: ViTConfig
    family: str
    backbone: DecoderConfig
    expert: ExpertConfig
    image_id: int
    control: ControlIds = field(default_factory=ControlIds)
    cameras: tuple[str, ...] = CAMERAS
    horizon: int = 50
    action_width: int = 32
    state_width: int = 32
    prompt: int = 48
    steps: int = 10
    times: Beta = field(default_factory=Beta)

    def __post_init__(self) -> None:
        if not 0 <= self.image_id <= self.backbone.vocab_size:
            raise ConfigError(f"the placeholder {self.image_id} is far from a vocabulary of {self.backbone.vocab_size}")

    @property
    def num_features(self) -> int:
        """Vectors that a picture becomes."""
        return self.vision.grid**2


class ExpertPolicy(Policy):
    """Base of pi0 and pi0.5.

    A batch has ``ids``: for each picture `num_features` times the placeholder, then the instruction; ``valid`` is
    False where rows are padded at the end; ``pixels`` (batch, cameras, ...), of which ``seen`` says which are there
    (without it: all). For training ``actions`` and ``actions_valid``; ``noise`` and ``time`` are drawn if they are not
    given.
    """

    config: ExpertPolicyConfig
    tokenizer: LanguageTokenizer | None = None  # type: ignore[assignment]
    blocks_behind: ClassVar[tuple[int, ...]]  # of the expert's tokens before the actions; theirs is the next

    def __init__(self, config: ExpertPolicyConfig) -> None:
        super().__init__(config)
        c, dim = config, config.expert.dim
        self.horizon, self.cameras = c.horizon, c.cameras
        self.action_width, self.state_width = c.action_width, c.state_width
        self.vision = ViT(c.vision)
        self.connector = Linear().build(c.vision.dim, c.backbone.dim)
        self.backbone = Experts(c.backbone, c.expert)
        self.action_in = nn.Linear(c.action_width, dim)
        self.action_out = nn.Linear(dim, c.action_width)

    @torch.no_grad()
    def init_weights(self) -> None:
        """As openpi's code: variances of one over the fan-in for all that is new; the trunk comes from a PaliGemma."""
        init_sight(self.vision, self.connector)
        self.backbone.init_weights()
        for layer in self.children():
            if isinstance(layer, nn.Linear):
                lecun_normal_(layer)

    @torch.no_grad()
    def start_from(self, model: PrefixGenerator) -> None:
        """Takes the weights of a PaliGemma, and its tokenizer; of its vocabulary the rows that this one has.

        Raises:
            ConfigError: its parts have other sizes.
        """
        theirs, ours = model.config, self.config
        trunk = replace(theirs.backbone, vocab_size=ours.backbone.vocab_size)
        if (theirs.vision, trunk) != (ours.vision, ours.backbone) or theirs.backbone.vocab_size < trunk.vocab_size:
            raise ConfigError(f"{model.source} is no trunk of this {type(self).__name__}: its sizes differ")
        state = model.backbone.state_dict()
        state["embed_tokens.weight"] = state["embed_tokens.weight"][: trunk.vocab_size]
        self.backbone.trunk.load_state_dict(state)
        self.vision.load_state_dict(model.vision.state_dict())
        self.connector.load_state_dict(model.connector.state_dict())
        self.tokenizer, self._fingerprint = model.tokenizer, None

    # -- what subclasses give

    def enter(self, batch: Batch, x: Tensor, t: Tensor) -> tuple[Float[Tensor, "batch tokens dim"], Tensor | None]:
        """The vectors that the expert reads of actions ``x`` at times ``t``, and what its norms are told."""
        raise NotImplementedError

    def waves(self, t: Float[Tensor, " batch"]) -> Float[Tensor, "batch dim"]:
        """Times as the expert is told them."""
        return waves(t, self.config.expert.dim, shortest=SHORTEST, longest=LONGEST)

    # -- reading

    def read(self, batch: Batch) -> Prefix:
        """Pictures and instruction, once for all steps of the sampler.

        Raises:
            MediaError: there are more or fewer placeholders than patches.
        """
        ids, valid, pixels = batch["ids"], batch["valid"], batch["pixels"]
        pictures = pixels[batch["seen"]] if "seen" in batch else pixels.flatten(0, 1)
        places = ids == self.config.image_id
        x = self.backbone.trunk.embed(ids.masked_fill(places, 0))
        # Padding takes no position: what stands behind the prefix goes on where its text ends.
        position = (valid.cumsum(1) - 1).clamp(min=0).unsqueeze(-1)
        tokens = Tokens.of(x, causal=False, modality=Modality.TEXT, valid=valid, position=position)
        tokens = tokens.scatter(places, self.connector(self.vision(pictures).x).flatten(0, 1))
        return self.backbone.read(tokens, self._behind(x))

    def _behind(self, x: Tensor) -> Tokens:
        first = self.blocks_behind
        block = torch.tensor([*first, *[len(first)] * self.horizon], device=x.device).expand(len(x), -1)
        tokens = Tokens.of(x.new_zeros(*block.shape, 0), causal=False, modality=Modality.ACTION)
        return replace(tokens, block=block)

    def velocity(self, batch: Batch) -> Velocity:
        """Where actions move at each time; what does not change on the way is computed here."""
        prefix = self.read(batch)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            x, condition = self.enter(batch, x, t)
            return self.action_out(self.backbone(x, prefix, condition)[:, -self.horizon :])

        return velocity

    def forward(self, batch: Batch) -> Float[Tensor, "batch horizon action_width"]:
        """The velocity at ``time`` between ``actions`` and ``noise``."""
        return self.velocity(batch)(between(batch["actions"], batch["noise"], batch["time"]), batch["time"])

    def loss(self, batch: Batch) -> Loss:
        """Squared error of the velocity, over all numbers of the valid steps (those that pad an action, too)."""
        valid = batch.get("actions_valid")
        return flow_loss(
            self.velocity(batch), batch["actions"], times=self.config.times,
            mask=None if valid is None else valid.unsqueeze(-1), noise=batch.get("noise"), t=batch.get("time"),
        )  # fmt: skip

    # -- acting

    def chunk(
        self, batch: Batch, generator: torch.Generator | None = None
    ) -> Float[Tensor, "batch horizon action_width"]:
        return euler(self.velocity(batch), self.noise(batch, generator), steps=self.config.steps)

    def continue_chunk(
        self,
        batch: Batch,
        previous: Float[Tensor, "batch steps action_dim"],
        frozen: int,
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "batch horizon action_dim"]:
        """`act`, drawn towards what is left of the chunk before, and held to its ``frozen`` first steps."""
        batch = batch.to(self.device)
        with self.acting():
            noise, velocity = self.noise(batch, generator), self.velocity(batch)
            chunk = continued(velocity, noise, self.to_network(previous), frozen, steps=self.config.steps)
            return self.to_robot(chunk).cpu()

    def noise(
        self, batch: Batch, generator: torch.Generator | None = None
    ) -> Float[Tensor, "batch horizon action_width"]:
        """Row after row from ``generator``: a batch gets what its rows would have got one by one."""
        device = self.device if generator is None else generator.device
        shape = (self.horizon, self.action_width)
        rows = [torch.randn(shape, generator=generator, device=device) for _ in range(batch.size)]
        return torch.stack(rows).to(self.device)

    def spell(self, text: str) -> list[int]:
        """The ids of an instruction as this system writes it, without the start token."""
        raise NotImplementedError

    def tokenize(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise UnsupportedError(f"{type(self).__name__} ({self.source}) has no tokenizer (set policy.tokenizer)")
        return self.tokenizer.encode(text, special=False)

    def write_prompt(self, text: str) -> list[int]:
        """The ids of an instruction.

        Raises:
            MediaError: it is longer than the network was trained on: nothing is cut.
        """
        c, start = self.config, self.config.control.start
        ids = ([] if start is None else [start]) + self.spell(text)
        if len(ids) > c.prompt:
            raise MediaError(f"an instruction of {len(ids)} tokens; {type(self).__name__} reads at most {c.prompt}")
        return ids

    def instruct(self, texts: Sequence[str]) -> dict[str, Tensor]:
        return self.prompts(texts)

    def prompts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Instructions behind the places of the pictures, padded at the end."""
        places = [self.config.image_id] * (len(self.cameras) * self.config.num_features)
        return text_batch([places + self.write_prompt(text) for text in texts])

    def count(self, sample: Sample) -> int:
        """Tokens that pictures and instructions become."""
        texts = sum(len(self.write_prompt(part.text)) for part in sample.texts)
        return texts + self.config.num_features * len(sample.images)

    # -- processors

    def default_images(self) -> ImageProcessor:
        return framed(self.config.vision.image_size)

    def load_processors(self, folder: Path) -> None:
        super().load_processors(folder)
        if (folder / "tokenizer.json").is_file():
            self.tokenizer = LanguageTokenizer.from_folder(folder)

    def inputs_spec(self) -> dict[str, TensorSpec]:
        c, n = self.config, self.config.num_features * len(self.cameras)
        side = c.vision.image_size
        text = TensorSpec(shape=(n + 6,), dtype=torch.int64, low=3, high=min(c.backbone.vocab_size, c.image_id))
        actions = TensorSpec(shape=(c.horizon, c.action_width))
        return {
            "ids": replace(text, head=(c.image_id,) * n), "valid": TensorSpec(shape=(n + 6,), dtype=torch.bool),
            "pixels": TensorSpec(shape=(len(self.cameras), c.vision.num_channels, side, side)),
            "seen": TensorSpec(shape=(len(self.cameras),), dtype=torch.bool),
            "actions": actions, "noise": actions, "time": TensorSpec(shape=()),
        }  # fmt: skip
