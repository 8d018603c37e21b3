"""A spacetime diffusion Transformer in the style of Sora: clips of any length and shape, packed, out of noise.

Paper: Brooks et al., "Video generation models as world simulators", OpenAI 2024,
https://openai.com/research/video-generation-models-as-world-simulators: a report, without sizes, weights or code. Built
from what it says, with the parts of Stable Diffusion 3 and FLUX.

    clip -> latents of a causal autoencoder: the first frame alone, then one latent for every four frames
    -> patches of 1 x 2 x 2 latents, turned by (time, row, column) --+
    text -> T5 (frozen) -> tokens ----------------------------------joint attention, within a clip alone
                        -> their mean --+                             |
    time of each clip -> waves ---------+-> scales, shifts, gates -> the velocity towards noise of each patch

What the report says and is kept: a Transformer over spacetime patches of latents compressed in time and in space;
clips have their own length, size and shape, and a picture is a clip of one frame, so that one model is trained on both;
what is drawn gets its size from the grid of noise that it begins with; denoising is told by a text. Clips and pictures
of several sizes share a row, and each gets the same numbers as alone.

Deviations: everything that the report leaves open. The loss is that of a rectified flow, each clip with a time of its
own; positions are rotary, so that no table limits them; the text is read by T5. It starts from latents: the causal
autoencoder is not part of it. Re-captioning is the data's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from polymodal.backbones.encdec import EncDecConfig, TextEncoder, t5_init_
from polymodal.backbones.mmdit import MMDiT, MMDiTConfig
from polymodal.core.batch import Batch, Loss
from polymodal.core.errors import ConfigError, MediaError
from polymodal.core.packing import first_fit
from polymodal.core.verbs import TensorSpec
from polymodal.heads.action import masked
from polymodal.heads.flow import LogitNormal
from polymodal.nn.norm import RMS
from polymodal.nn.rope import AxialRope
from polymodal.samplers.flow import Flow
from polymodal.systems.base import System
from polymodal.systems.flow_files import t5_xxl
from polymodal.weights.native import native_format

NOBODY = -1  # whose padding is


@dataclass(frozen=True, kw_only=True)
class SoraConfig:
    """A Transformer over patches of ``size`` x ``size`` latents of one moment.

    Attributes:
        text: a T5, of which the encoder is used.
        latent_dim: channels of a latent.
        every: frames that share a latent, but for the first one, which has its own.
    """

    text: EncDecConfig
    backbone: MMDiTConfig
    latent_dim: int = 16
    size: int = 2
    every: int = 4

    def __post_init__(self) -> None:
        c = self.backbone
        if not c.values == c.out_values == self.latent_dim * self.size**2:
            raise ConfigError(f"patches of {c.values} values, not of {self.latent_dim} x {self.size} x {self.size}")
        if not isinstance(c.position, AxialRope) or len(c.position.dims) != 3 or c.guidance or c.extra_attention:
            raise ConfigError("places are turned by time, row and column; and all attention is joint")
        if not c.context_dim == c.pooled_dim == self.text.dim:
            raise ConfigError(f"a T5 of {self.text.dim} dimensions for a context of {c.context_dim}")


@final
class Sora(System):
    """A flow over spacetime patches, told by a text."""

    config: SoraConfig

    def __init__(self, config: SoraConfig) -> None:
        super().__init__(config)
        self.text = TextEncoder(config.text).requires_grad_(False)
        self.backbone = MMDiT(config.backbone)

    def init_weights(self) -> None:
        """DiT's; the text encoder as its own paper draws it."""
        t5_init_(self.text)
        self.backbone.init_weights()

    def inputs_spec(self) -> dict[str, TensorSpec]:
        """Rows of two clips, as `pack` makes them."""
        c, tokens, clips = self.config, 6, 2
        return {
            "ids": TensorSpec(shape=(clips, 5), dtype=torch.int64, high=c.text.vocab_size),
            "valid": TensorSpec(shape=(clips, 5), dtype=torch.bool),
            "position": TensorSpec(shape=(tokens, 3), dtype=torch.int64, high=4),
            "clip": TensorSpec(shape=(tokens,), dtype=torch.int64, high=clips),
            "patches": TensorSpec(shape=(tokens, c.backbone.values)),
        }

    # -- clips as tokens

    def latent_frames(self, frames: int) -> int:
        """Latents of so many frames.

        Raises:
            MediaError: the last latent would not be whole.
        """
        if frames < 1 or (frames - 1) % self.config.every:
            every = self.config.every
            raise MediaError(
                f"{frames} frames; a causal autoencoder makes latents of 1, {1 + every}, {1 + 2 * every}, ..."
            )
        return 1 + (frames - 1) // self.config.every

    def tokens(self, latents: Float[Tensor, "channels time height width"]) -> tuple[Tensor, Tensor]:
        """Spacetime patches (tokens values) of a clip, and the time, row and column (tokens 3) of each.

        Raises:
            MediaError: the sides are no multiples of a patch.
        """
        size, (time, height, width) = self.config.size, latents.shape[1:]
        if height % size or width % size or not latents.numel():
            raise MediaError(f"latents of {time} x {height} x {width} do not divide into patches of {size} x {size}")
        patches = rearrange(latents, "c t (h p) (w q) -> (t h w) (c p q)", p=size, q=size)
        axes = [torch.arange(n, device=latents.device) for n in (time, height // size, width // size)]
        return patches, torch.cartesian_prod(*axes).view(-1, 3)

    def clip(
        self, patches: Float[Tensor, "tokens values"], shape: tuple[int, int, int]
    ) -> Float[Tensor, "channels time height width"]:
        """The latents of these ``tokens``, of this time, height and width."""
        size, (time, height, width) = self.config.size, shape
        rows, columns = height // size, width // size
        return rearrange(
            patches, "(t h w) (c p q) -> c t (h p) (w q)", t=time, h=rows, w=columns, p=size, q=size
        )  # fmt: skip

    def pack(
        self, clips: Sequence[Float[Tensor, "..."]], texts: Sequence[Sequence[int]],
        capacity: int | None = None,
    ) -> Batch:  # fmt: skip
        """What `loss` reads of clips of any sizes and the ids of their texts, several in a row where there is room.

        Args:
            clips: latents (channels time height width).
            texts: of each, with T5's end; one that says nothing has that alone.
            capacity: patches of a row; those of the longest clip if not given. What is longer has a row of its own.
        """
        assert len(clips) == len(texts) > 0, "each clip has a text"
        each = [self.tokens(latents) for latents in clips]
        lengths = [len(patches) for patches, _ in each]
        rows = first_fit(lengths, capacity or max(lengths))
        width, most, words = (
            max(sum(lengths[i] for i in row) for row in rows), max(map(len, rows)), max(map(len, texts)),
        )  # fmt: skip
        patches = clips[0].new_zeros(len(rows), width, self.config.backbone.values)
        position = torch.zeros(len(rows), width, 3, dtype=torch.int64)
        owner = torch.full((len(rows), width), NOBODY)
        ids = torch.full((len(rows), most, words), self.config.text.pad_id)
        valid = torch.zeros(len(rows), most, words, dtype=torch.bool)
        for row, numbers in enumerate(rows):
            start = 0
            for place, number in enumerate(numbers):
                here = slice(start, start + lengths[number])
                patches[row, here], position[row, here], owner[row, here] = *each[number], place
                ids[row, place, : len(texts[number])] = torch.tensor(texts[number])
                valid[row, place, : len(texts[number])] = True
                start += lengths[number]
        return Batch(patches=patches, position=position, clip=owner, ids=ids, valid=valid)

    # -- the flow

    def told(
        self, batch: Batch
    ) -> tuple[Float[Tensor, "rows words dim"], Int[Tensor, "rows words"], Float[Tensor, "rows clips dim"]]:
        """The texts' tokens, whose each is, and their means (zero for a place without a clip)."""
        ids, valid = batch["ids"], batch["valid"]
        rows, clips, words = ids.shape
        alone = valid.flatten(0, 1).clone()
        alone[:, 0] = True  # nothing is a text, too, or attention would be over nothing
        with torch.no_grad():
            context = self.text(ids.flatten(0, 1), alone)
        pooled = (context * alone[..., None]).sum(1) / alone.sum(1, keepdim=True)
        owner = torch.arange(clips, device=ids.device).view(1, -1, 1).expand_as(ids).masked_fill(~valid, NOBODY)
        return context.view(rows, clips * words, -1), owner.flatten(1), pooled.view(rows, clips, -1)

    def velocity(
        self, x: Float[Tensor, "rows tokens values"], t: Float[Tensor, "rows clips"], batch: Batch
    ) -> Float[Tensor, "rows tokens values"]:
        """Towards noise, of noisy patches, where each clip has a time of its own."""
        context, owner, pooled = self.told(batch)
        return self.backbone.packed(x, batch["position"], batch["clip"], context, owner, pooled, t)

    def forward(self, batch: Batch) -> Float[Tensor, "rows tokens values"]:
        """The velocity with ``noise`` at ``when`` (rows clips)."""
        return self._answer(batch, batch["noise"], batch["when"])

    def _answer(self, batch: Batch, noise: Tensor, when: Tensor) -> Tensor:
        t = when.gather(1, batch["clip"].clamp(min=0)).unsqueeze(-1)
        return self.velocity(t * noise + (1 - t) * batch["patches"], when, batch)

    def loss(self, batch: Batch) -> Loss:
        """Squared error of the velocity; every value of a patch counts as much, padding nothing."""
        x, clips = batch["patches"], batch["ids"].shape[:2]
        noise = batch["noise"] if "noise" in batch else torch.randn_like(x)
        when = batch["when"] if "when" in batch else LogitNormal().draw(clips.numel(), x.device).view(clips)
        error = (self._answer(batch, noise, when).float() - (noise - x)).square()
        kept: Bool[Tensor, "rows tokens 1"] = (batch["clip"] != NOBODY).unsqueeze(-1)
        return masked(error, kept)

    @torch.no_grad()
    def imagine(
        self,
        text: Sequence[int],
        shape: tuple[int, int, int],
        *,
        steps: int = 50,
        seed: int = 0,
        sampling: Flow | None = None,
    ) -> Float[Tensor, "channels time height width"]:
        """Latents of a clip of any time, height and width (of latents): the size is that of the noise.

        Args:
            text: its ids, with T5's end.
            shape: one moment is a picture.
            steps: of the solver.
            seed: of the noise.
            sampling: how times are spaced.
        """
        noise = torch.randn(self.config.latent_dim, *shape, generator=torch.Generator().manual_seed(seed))
        batch = self.pack([noise], [text]).to(next(self.parameters()).device)
        flow = sampling or Flow(spacing="even")

        def model(x: Tensor, when: Tensor) -> Tensor:
            return self.velocity(x, when.view(-1, 1), batch)

        x = batch["patches"]
        return self.clip(flow.sample(model, x, flow.points(steps, x.shape[1]))[0], shape)


Sora.formats = {"hf": native_format("sora", SoraConfig)}


def preset(dim: int, layers: int) -> SoraConfig:
    """Sizes of ours: the report gives none."""
    t5 = t5_xxl()
    backbone = MMDiTConfig(
        values=64, out_values=64, dim=dim, num_layers=layers, num_single_layers=layers, num_heads=dim // 128,
        hidden_dim=4 * dim, context_dim=t5.dim, pooled_dim=t5.dim, position=AxialRope(dims=(32, 48, 48)),
        qk_norm=RMS(),
    )  # fmt: skip
    return SoraConfig(text=t5, backbone=backbone)


PRESETS = {"sora-style-1b": partial(preset, 1536, 14)}
