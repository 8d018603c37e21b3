"""IRIS: a world model that writes the next frame as whole numbers, one after another, as a language model writes words.

Paper: Micheli, Alonso & Fleuret, "Transformers are Sample-Efficient World Models", 2022,
https://arxiv.org/abs/2209.00588. Official code: eloialonso/iris. Hub: eloialonso/iris (pickled, which is never read
here). With rotary positions of time, row and column it is the autoregressive world model of Cosmos (NVIDIA 2025,
https://arxiv.org/abs/2501.03575), told by actions and not by a text.

    frame -> discrete autoencoder (frozen) -> 16 codes, row by row
    codes, action, codes, action, ... -> decoder-only Transformer -> scores of the next code
    codes of a frame -> the autoencoder's decoder -> pixels

Training details kept here: the autoencoder learns nothing from the Transformer; every code but the first of all is
learned, the first of a frame from the action before it; pre-norm layers with normals of 0.02, zero biases, and 20
frames, with their actions, of learned positions. A frame is sampled at temperature one. The paper trains with AdamW at
1e-4, weight decay 0.01, clipping at 10, dropout of 0.1, 64 rows a step; its autoencoder is a VQGAN's of width 64, whose
two losses of the codebook weigh as much as each other, beside L1 and a perceptual distance.

Deviations: an action is some numbers, which go through a linear layer without a bias: for a choice, as one-hot, that is
the official table. Scores come from one linear layer, and not from two with a ReLU. A film that outgrows the positions
goes on from the second half of what it has, where the official code keeps one frame. No dropout; rewards and ends of
episodes, which have heads of their own, are left out, and so is the agent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from polymodal.backbones.decoder import AttentionConfig, Decoder, DecoderConfig, Learned, Plain
from polymodal.core.batch import IGNORE, Batch, Loss
from polymodal.core.chat import Chat
from polymodal.core.errors import ConfigError, UnsupportedError
from polymodal.core.tokens import Modality, Tokens
from polymodal.core.verbs import TensorSpec
from polymodal.heads.lm import next_token_loss
from polymodal.nn.cache import KVCache
from polymodal.nn.norm import Layer
from polymodal.nn.rope import Rope
from polymodal.samplers.autoregressive import Settings, sample
from polymodal.samplers.modes import Wordless
from polymodal.systems.imagining import WorldModel, check_scale
from polymodal.tokenizers.pyramid import PyramidConfig
from polymodal.tokenizers.vq import LearnedCodes, VQConfig, VQModel
from polymodal.weights.native import native_format


@dataclass(frozen=True, kw_only=True)
class IrisConfig:
    """A tokenizer of frames and a decoder of their codes.

    Attributes:
        vision: the tokenizer.
        backbone: its vocabulary is that of the codes.
        action_scale: what each number of an action is divided by.
        moments: frames, with the actions behind them, that the decoder reads at most.
    """

    vision: VQConfig
    backbone: DecoderConfig
    action_scale: tuple[float, ...]
    moments: int = 20

    def __post_init__(self) -> None:
        b, places = self.backbone, self.moments * self.each
        if b.vocab_size != self.vision.codes.size or b.context != places or self.moments < 2:
            raise ConfigError(
                f"a vocabulary of {b.vocab_size} and a context of {b.context} for {self.vision.codes.size} codes and "
                f"{self.moments} frames of {self.vision.num_codes} codes and an action"
            )
        axes = b.position.count == places if isinstance(b.position, Learned) else len(b.position.sections or ()) == 3
        if not axes:
            raise ConfigError(f"positions are a table of {places} or turn by time, row and column")
        check_scale(self.action_scale)

    @property
    def each(self) -> int:
        """Tokens of a frame and the action behind it."""
        return self.vision.num_codes + 1


@final
class Iris(WorldModel):
    """Codes of frames, and actions, to the next code."""

    config: IrisConfig
    writing: ClassVar[Settings] = Settings(temperature=1.0)

    def __init__(self, config: IrisConfig) -> None:
        super().__init__(config)
        c, side = config, config.vision.resolution
        self.history, self.size, self.action_scale = c.moments - 1, (side, side), c.action_scale
        self.vision = VQModel(c.vision).requires_grad_(False)
        self.act = nn.Linear(self.action_dim, c.backbone.dim, bias=False)
        self.backbone = Decoder(c.backbone)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Small normals, zero biases; the tokenizer as its own paper draws it."""
        nn.init.normal_(self.act.weight, std=self.config.backbone.std)
        self.backbone.init_weights()
        self.vision.init_weights()

    def inputs_spec(self) -> dict[str, TensorSpec]:
        side, count = self.config.vision.resolution, min(3, self.config.moments)
        return {
            "frames": TensorSpec(shape=(count, 3, side, side)),
            "actions": TensorSpec(shape=(count - 1, self.action_dim)),
        }

    # -- frames as codes

    def codes(self, frames: Float[Tensor, "batch time 3 height width"]) -> Int[Tensor, "batch time codes"]:
        """Row by row."""
        return rearrange(self.vision.encode(frames.flatten(0, 1)), "(b t) h w -> b t (h w)", b=len(frames))

    def paint(self, codes: Int[Tensor, "batch time codes"]) -> Float[Tensor, "batch time 3 height width"]:
        grid = self.config.vision.grid
        return self.vision.decode(rearrange(codes, "b t (h w) -> (b t) h w", h=grid)).unflatten(0, codes.shape[:2])

    # -- training

    def read(
        self, codes: Int[Tensor, "batch time codes"], actions: Float[Tensor, "batch done action"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """Frame, action, frame, ...: as many actions as frames, or one fewer."""
        x, done = self.backbone.embed(codes.flatten(1)), self.embed_actions(actions)
        moments = x.unflatten(1, codes.shape[1:])
        whole = torch.cat([moments[:, : done.shape[1]], done[:, :, None]], 2)
        return torch.cat([whole.flatten(1, 2), moments[:, done.shape[1] :].flatten(1, 2)], 1)

    def embed_actions(self, actions: Float[Tensor, "batch done action"]) -> Float[Tensor, "batch done dim"]:
        return self.act(actions.to(self.backbone.embed_tokens.weight.dtype))

    def tokens(self, x: Float[Tensor, "batch tokens dim"], before: int = 0) -> Tokens:
        """Vectors with their places: ``before`` tokens stand before them."""
        place = torch.arange(before, before + x.shape[1], device=x.device)
        position = place[:, None]
        if isinstance(self.config.backbone.position, Rope):
            within, grid = place % self.config.each, self.config.vision.grid
            position = torch.stack([place // self.config.each, within // grid, within % grid], 1)
        flat = Tokens.of(x, causal=True, modality=Modality.VIDEO, position=position.expand(len(x), -1, -1))
        return replace(flat, block=flat.block + before)

    def _coded(self, batch: Batch) -> Int[Tensor, "batch time codes"]:
        with torch.no_grad():
            return self.codes(batch["frames"])

    def forward(self, batch: Batch) -> Float[Tensor, "batch tokens vocab"]:
        """Scores of the token behind each code and each action."""
        x = self.read(self._coded(batch), batch["actions"])
        return self.backbone.logits(self.backbone(self.tokens(x)).x)

    def loss(self, batch: Batch) -> Loss:
        """Cross-entropy of the codes."""
        codes, actions = self._coded(batch), batch["actions"]
        labels = torch.cat([codes, codes.new_full((*codes.shape[:2], 1), IGNORE)], 2).flatten(1)[:, :-1]
        x = self.backbone(self.tokens(self.read(codes, actions))).x
        return next_token_loss(x, labels, self.backbone.logits)

    # -- imagining

    def rolled(
        self,
        frames: Float[Tensor, "batch context 3 height width"],
        actions: Float[Tensor, "batch steps action"],
        seeds: Sequence[int],
    ) -> Float[Tensor, "batch future 3 height width"]:
        most, known, made = self.config.moments, frames.shape[1], list[Tensor]()
        codes = self.codes(frames[:, -(most - 1) :])  # of the frames up to now, but for the first ones
        while known <= actions.shape[1]:
            if codes.shape[1] == most:
                codes = codes[:, -(most // 2) :]
            new = min(most - codes.shape[1], actions.shape[1] + 1 - known)
            done = actions[:, known - codes.shape[1] : known + new - 1]
            made.append(self._written(codes, done, [seed + (len(made) << 40) for seed in seeds]))
            codes, known = torch.cat([codes, made[-1]], 1), known + new
        return self.paint(torch.cat(made, 1))

    def _written(
        self, codes: Int[Tensor, "batch time codes"], actions: Float[Tensor, "batch steps action"], seeds: Sequence[int]
    ) -> Int[Tensor, "batch new codes"]:
        new = actions.shape[1] + 1 - codes.shape[1]
        count = new * codes.shape[2]
        rules = [replace(self.writing, max_new_tokens=count, seed=seed) for seed in seeds]
        ids = codes.flatten(1)
        written: list[list[int]] = [[] for _ in seeds]
        for step in sample(
            _Writer(self, actions), Batch(ids=ids, valid=torch.ones_like(ids).bool()), rules, Wordless()
        ):
            assert step.token is not None, "nobody cancels"
            written[step.row].append(step.token)
        return torch.tensor(written, device=codes.device).unflatten(1, (new, -1))


class _Writer:
    """What the loop of generation needs: codes after codes; behind the last one of a frame the next action is read."""

    stop_ids = ()

    def __init__(self, world: Iris, actions: Float[Tensor, "batch steps action"]) -> None:
        self.world, self.actions = world, world.embed_actions(actions)
        self.vocab_size, self.each = world.config.backbone.vocab_size, world.config.each

    def prompt(self, chats: Sequence[Chat]) -> Batch:
        raise UnsupportedError("a world model answers nobody: it says what will be seen")

    def new_memory(self, rows: int, capacity: int) -> KVCache:
        return self.world.backbone.new_cache(rows, self.world.config.backbone.context)

    def prefill(self, batch: Batch, memory: KVCache) -> Float[Tensor, "rows vocab"]:
        moments = self.world.backbone.embed(batch["ids"]).unflatten(1, (-1, self.each - 1))
        done = self.actions[:, : moments.shape[1], None]
        return self._scores(torch.cat([moments, done], 2).flatten(1, 2), memory)

    def step(self, ids: Int[Tensor, " rows"], memory: KVCache) -> Float[Tensor, "rows vocab"]:
        x, moment = self.world.backbone.embed(ids[:, None]), memory.lengths[0] // self.each
        if memory.lengths[0] % self.each == self.each - 2:  # this code is the last one of its frame
            x = torch.cat([x, self.actions[:, moment, None]], 1)
        return self._scores(x, memory)

    def _scores(self, x: Float[Tensor, "rows new dim"], memory: KVCache) -> Float[Tensor, "rows vocab"]:
        tokens = self.world.tokens(x, memory.lengths[0])
        return self.world.backbone.logits(self.world.backbone(tokens, memory).x[:, -1]).float()


Iris.formats = {"hf": native_format("polymodal_iris", IrisConfig)}


def paper(choices: int = 18) -> IrisConfig:
    """The published sizes, for a game of so many choices (as one-hot): Atari has 18."""
    net = PyramidConfig(widths=(64,) * 5, attention=(2, 3), latent_dim=512)
    vision = VQConfig(net=net, codes=LearnedCodes(size=512, dim=512, commitment=1.0, codebook=1.0), resolution=64)
    context = 20 * (vision.num_codes + 1)
    backbone = DecoderConfig(
        vocab_size=512, context=context, dim=256, num_layers=10, norm=Layer(),
        attention=AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=64, qkv_bias=True, out_bias=True),
        mlp=Plain(hidden_dim=1024), position=Learned(count=context),
    )  # fmt: skip
    return IrisConfig(vision=vision, backbone=backbone, action_scale=(1.0,) * choices)


PRESETS = {"eloialonso/iris": paper}
