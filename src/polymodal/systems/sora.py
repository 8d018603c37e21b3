"""A spacetime diffusion Transformer in the style of Sora: clips of any length and shape, packed, out of noise.

Paper: Brooks et al., "Video generation models as world simulators", OpenAI 2024,
https://openai.com/research/video-generation-models-as-world-simulators: a report, without sizes, weights or code. Built
from what it says, with the parts of Stable Diffusion 3 and FLUX.

    clip -> a causal autoencoder (frozen): latents of the first frame alone, then of every four frames -> scaled
    -> patches of 1 x 2 x 2 latents, turned by (time, row, column) --+
    text -> T5 (frozen) -> tokens ----------------------------------joint attention, within a clip alone
                        -> their mean --+                             |
    time of each clip -> waves ---------+-> scales, shifts, gates -> the velocity towards noise of each patch
    latents -> the autoencoder's decoder -> clip

What the report says and is kept: a Transformer over spacetime patches of latents compressed in time and in space;
clips have their own length, size and shape, and a picture is a clip of one frame, so that one model is trained on both;
what is drawn gets its size from the grid of noise that it begins with; denoising is told by a text. Clips and pictures
of several sizes share a row, and each gets the same numbers as alone.

Deviations: everything that the report leaves open. The loss is that of a rectified flow, each clip with a time of its
own, one text in ten says nothing, so that there is guidance; positions are rotary, so that no table limits them; the
text is read by T5. The autoencoder is that of the Cosmos tokenizer, which is trained alone (`systems.cosmos_tokenizer`)
and put in by `adopt`. Re-captioning is the data's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import final

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from polymodal.backbones.encdec import EncDecConfig, TextEncoder, t5_init_
from polymodal.backbones.mmdit import MMDiT, MMDiTConfig
from polymodal.core.batch import Batch, Loss
from polymodal.core.errors import ConfigError, MediaError, UnsupportedError
from polymodal.core.filming import SettledFilm
from polymodal.core.verbs import TensorSpec
from polymodal.heads.action import masked
from polymodal.heads.flow import LogitNormal
from polymodal.nn.norm import RMS
from polymodal.nn.rope import AxialRope
from polymodal.nn.spacetime import NOBODY, pack_clips, patched, unpatched
from polymodal.samplers.flow import Flow
from polymodal.samplers.guidance import Dice
from polymodal.systems.filming import FilmMaker
from polymodal.systems.flow_files import t5_xxl
from polymodal.systems.flow_painter import T5_END
from polymodal.tokenizers.cosmos import CosmosNetConfig, FilmAutoencoder
from polymodal.tokenizers.language import LanguageTokenizer
from polymodal.tokenizers.pyramid import init_convolutions_
from polymodal.weights.native import native_format

DROPPED = 0.1  # of the texts in training


@dataclass(frozen=True, kw_only=True)
class SoraConfig:
    """A Transformer over patches of ``size`` x ``size`` latents of one moment.

    Attributes:
        text: a T5, of which the encoder is used.
        vae: the autoencoder of clips.
        scale: what its latents are multiplied by, so that they have a deviation of about one.
        text_tokens: no text has more.
        side: of a clip's square, in pixels, and
        frames: of a clip, where nothing else is asked for.
    """

    text: EncDecConfig
    backbone: MMDiTConfig
    vae: CosmosNetConfig
    scale: float = 1.0
    size: int = 2
    text_tokens: int = 256
    side: int = 256
    frames: int = 17

    def __post_init__(self) -> None:
        c = self.backbone
        if not c.values == c.out_values == self.vae.latent_dim * self.size**2:
            raise ConfigError(f"patches of {c.values} values, not of {self.vae.latent_dim} x {self.size} x {self.size}")
        if not isinstance(c.position, AxialRope) or len(c.position.dims) != 3 or c.guidance or c.extra_attention:
            raise ConfigError("places are turned by time, row and column; and all attention is joint")
        if not c.context_dim == c.pooled_dim == self.text.dim:
            raise ConfigError(f"a T5 of {self.text.dim} dimensions for a context of {c.context_dim}")
        if self.scale <= 0:
            raise ConfigError(f"latents are multiplied by a positive number, not {self.scale}")


@final
class Sora(FilmMaker):
    """A flow over spacetime patches, told by a text."""

    config: SoraConfig
    steps, guidance = 50, 5.0
    tokenizer: LanguageTokenizer | None = None  # type: ignore[assignment]
    sampling = Flow(spacing="even")

    def __init__(self, config: SoraConfig) -> None:
        super().__init__(config)
        self.text = TextEncoder(config.text).requires_grad_(False)
        self.backbone = MMDiT(config.backbone)
        self.vae = FilmAutoencoder(config.vae).requires_grad_(False)
        self.size, self.frames = (config.side, config.side), config.frames
        self.multiple = config.vae.space * config.size

    def init_weights(self) -> None:
        """DiT's; the text encoder as its own paper draws it, the autoencoder by torch's own scheme."""
        t5_init_(self.text)
        self.backbone.init_weights()
        init_convolutions_(self.vae)

    def adopt(self, trained: FilmAutoencoder) -> None:
        """Takes over the weights of an autoencoder (`CosmosTokenizer.net`) of the same config."""
        self.vae.load_state_dict(trained.state_dict())

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

    def check_frames(self, frames: int) -> None:
        try:
            self.vae.grid(frames, *self.size)
        except MediaError as error:  # of a film that there is; here it is a setting
            raise ConfigError(str(error)) from None

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The texts' tokens, with T5's end.

        Raises:
            UnsupportedError: there is no tokenizer.
            MediaError: a text is longer than the model reads: nothing is cut.
        """
        if self.tokenizer is None:
            raise UnsupportedError(f"{type(self).__name__} ({self.source}) reads no text: there is no tokenizer")
        rows = [self.tokenizer.encode(text, special=True) for text in texts]
        rows = [row if row[-1:] == [T5_END] else [*row, T5_END] for row in rows]
        if (longest := max(map(len, rows))) > self.config.text_tokens:
            raise MediaError(f"a text of {longest} tokens; this model reads at most {self.config.text_tokens}")
        return rows

    def encode_clip(self, pixels: Float[Tensor, "frames 3 height width"]) -> Float[Tensor, "channels time h w"]:
        """Scaled latents of a clip in [-1, 1]."""
        return self.vae.encode(rearrange(pixels, "t c h w -> 1 c t h w"))[0] * self.config.scale

    def decode_clip(self, latents: Float[Tensor, "channels time h w"]) -> Float[Tensor, "frames 3 height width"]:
        """A clip of scaled latents."""
        return rearrange(self.vae.decode(latents[None] / self.config.scale)[0], "c t h w -> t c h w")

    def pack(
        self, clips: Sequence[Float[Tensor, "..."]], texts: Sequence[Sequence[int]], capacity: int | None = None
    ) -> Batch:
        """What `loss` reads of scaled latents (channels time height width) of any sizes and the ids of their texts.

        Args:
            clips: several share a row where there is room.
            texts: of each, with T5's end; one that says nothing has that alone.
            capacity: patches of a row; those of the longest clip if not given. What is longer has a row of its own.
        """
        c = self.config
        return pack_clips([patched(x, c.size) for x in clips], texts, capacity=capacity, pad_id=c.text.pad_id)

    def drop(self, batch: Batch, clips: Bool[Tensor, "rows clips"]) -> Batch:
        """The batch with texts of these clips that say nothing."""
        ids, valid = batch["ids"].clone(), batch["valid"].clone()
        ids[clips], valid[clips] = self.config.text.pad_id, False
        ids[..., 0][clips], valid[..., 0][clips] = T5_END, batch["valid"][..., 0][clips]
        return Batch(batch, ids=ids, valid=valid)

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
        if self.training:
            batch = self.drop(batch, torch.rand(batch["ids"].shape[:2], device=batch["ids"].device) < DROPPED)
        x, clips = batch["patches"], batch["ids"].shape[:2]
        noise = batch["noise"] if "noise" in batch else torch.randn_like(x)
        when = batch["when"] if "when" in batch else LogitNormal().draw(clips.numel(), x.device).view(clips)
        error = (self._answer(batch, noise, when).float() - (noise - x)).square()
        kept: Bool[Tensor, "rows tokens 1"] = (batch["clip"] != NOBODY).unsqueeze(-1)
        return masked(error, kept)

    @torch.no_grad()
    def sample(
        self,
        text: Sequence[int],
        shape: tuple[int, int, int],
        *,
        steps: int = 50,
        seed: int = 0,
        guidance: float = 1.0,
        watch: Callable[[int, Tensor], None] | None = None,
    ) -> Float[Tensor, "channels time height width"]:
        """Latents of a clip of any time, height and width (of latents), told by a text's ids: one moment is a picture.

        ``watch`` is given the number of steps done and the latents to expect.
        """
        noise = Dice([seed])((self.config.vae.latent_dim, *shape), self.device)[0]
        texts = [text] if guidance == 1 else [text, [T5_END]]
        batch = self.pack([noise] * len(texts), texts, capacity=1).to(self.device)

        def model(x: Tensor, when: Tensor) -> Tensor:
            if guidance == 1:
                return self.velocity(x.to(self.dtype), when.view(-1, 1), batch).float()
            both = torch.cat([x, x]).to(self.dtype)
            wanted, against = self.velocity(both, when.expand(2).view(-1, 1), batch).float().chunk(2)
            return against + guidance * (wanted - against)

        def tell(step: int, x: Tensor) -> None:
            if watch is not None:
                watch(step, unpatched(x[0], shape, self.config.size))

        x = batch["patches"][:1]
        made = self.sampling.sample(model, x, self.sampling.points(steps, x.shape[1]), watch=tell)
        return unpatched(made[0], shape, self.config.size)

    def made(
        self,
        prompt: str,
        settled: SettledFilm,
        image: Float[Tensor, "1 3 height width"] | None,
        watch: Callable[[int, Callable[[], Tensor]], None],
    ) -> Float[Tensor, "frames 3 height width"]:
        s = settled
        if image is not None:
            raise UnsupportedError(f"{type(self).__name__} ({self.source}) begins with no picture: give it a text")
        latents = self.sample(
            self.ids([prompt])[0], self.vae.grid(s.frames, s.size[1], s.size[0]), steps=s.steps, seed=s.seed,
            guidance=float(s.guidance), watch=lambda step, x: watch(step, lambda: self.decode_clip(x)),
        )  # fmt: skip
        return self.decode_clip(latents)

    def load_processors(self, folder: Path) -> None:
        if (folder / "tokenizer.json").is_file():
            self.tokenizer = LanguageTokenizer.from_folder(folder)

    def save_processors(self, folder: Path) -> None:
        if self.tokenizer is not None:
            self.tokenizer.save(folder)


Sora.formats = {"hf": native_format("sora", SoraConfig)}


def preset(dim: int, layers: int) -> SoraConfig:
    """Sizes of ours: the report gives none."""
    t5 = t5_xxl()
    backbone = MMDiTConfig(
        values=64, out_values=64, dim=dim, num_layers=layers, num_single_layers=layers, num_heads=dim // 128,
        hidden_dim=4 * dim, context_dim=t5.dim, pooled_dim=t5.dim, position=AxialRope(dims=(32, 48, 48)),
        qk_norm=RMS(),
    )  # fmt: skip
    return SoraConfig(text=t5, backbone=backbone, vae=CosmosNetConfig(time=4))


PRESETS = {"sora-style-1b": partial(preset, 1536, 14)}
