"""What the systems share that paint in the latents of an autoencoder, many with a U-Net. Not a system itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from polymodal.backbones.unet import UNet
from polymodal.core.batch import Batch
from polymodal.core.errors import MediaError, UnsupportedError
from polymodal.core.verbs import TensorSpec
from polymodal.encoders.clip_text import CLIPText, CLIPTextConfig
from polymodal.systems.painting import Condition, Painter
from polymodal.systems.stable_diffusion_files import StableDiffusionConfig
from polymodal.tokenizers.text import TextTokenizer
from polymodal.tokenizers.vae import VAE


def checked_length(tokenizer: TextTokenizer, texts: Sequence[str]) -> None:
    """Raises a `MediaError` where a text would be cut."""
    for text in texts:
        if (tokens := tokenizer.count(text)) > tokenizer.length:
            raise MediaError(f"a text of {tokens} tokens; this model reads at most {tokenizer.length}")


def ids_spec(c: CLIPTextConfig) -> TensorSpec:
    """What a tower of CLIP reads."""
    return TensorSpec(shape=(c.tower.context,), dtype=torch.int64, high=c.tower.vocab_size, last=c.eot_id)


def empty_ids(tokenizer: TextTokenizer | None, tower: CLIPText) -> Int[Tensor, " tokens"]:
    """The text that says nothing."""
    return tower.empty() if tokenizer is None else tokenizer([""])[0][0]


def read_tokenizer(folder: Path, c: CLIPTextConfig) -> TextTokenizer | None:
    """The tokenizer of a tower of CLIP, where there is one; it fills texts up."""
    return TextTokenizer.from_folder(folder, length=c.tower.context, pad="max") if folder.is_dir() else None


class LatentPainter(Painter):
    """Paints the latents of ``vae``."""

    vae: VAE

    def latents(self, size: tuple[int, int]) -> tuple[int, ...]:
        return self.vae.shape(size)

    @torch.no_grad()
    def encode_pixels(
        self, pixels: Float[Tensor, "batch 3 height width"], posterior: Float[Tensor, "batch *latents"] | None = None
    ) -> Float[Tensor, "batch *latents"]:
        return self.vae.encode(pixels, posterior)

    def decode_latents(self, latents: Float[Tensor, "batch *latents"]) -> Float[Tensor, "batch 3 height width"]:
        return self.vae.decode(latents)


class UNetPainter(LatentPainter):
    """A U-Net ``backbone``."""

    backbone: UNet

    @property
    def multiple(self) -> int:
        return self.vae.config.pyramid.factor

    @property
    def size(self) -> tuple[int, int]:
        side = self.backbone.config.side * self.multiple
        return side, side


class TextPainter(UNetPainter):
    """Told by the tokens of one CLIP text tower: Stable Diffusion 1 and 2, and what is built over them."""

    tokenizer: TextTokenizer | None = None

    def __init__(self, config: Any, base: StableDiffusionConfig) -> None:
        super().__init__(config)
        self.text = CLIPText(base.text).requires_grad_(False)
        self.backbone = UNet(base.backbone)
        self.vae = VAE(base.vae).requires_grad_(False)
        self.sampling = base.sampling

    def init_weights(self) -> None:
        """The official code's; what is frozen is drawn as for its own training."""
        for part_of in (self.text, self.backbone, self.vae):
            part_of.init_weights()

    def inputs_spec(self) -> dict[str, TensorSpec]:
        width, height = self.size
        return {
            "pixels": TensorSpec(shape=(self.vae.config.pyramid.channels, height, width)),
            "ids": ids_spec(self.text.config),
        }

    def prompt(self, texts: Sequence[str]) -> Batch:
        if self.tokenizer is None:
            name = type(self).__name__
            raise UnsupportedError(f"{name} ({self.source}) reads no text: there is no tokenizer beside its weights")
        checked_length(self.tokenizer, texts)
        return Batch(ids=self.tokenizer(texts)[0])

    def drop(self, batch: Batch, rows: Bool[Tensor, " batch"]) -> Batch:
        ids = batch["ids"]
        empty = empty_ids(self.tokenizer, self.text)
        return Batch(batch, ids=torch.where(rows[:, None], empty[: ids.shape[1]].to(ids.device), ids))

    def condition(self, batch: Batch) -> Condition:
        return Batch(context=self.text(batch["ids"]).last)

    def denoise(
        self, x: Float[Tensor, "batch *latents"], when: Float[Tensor, " batch"], condition: Condition
    ) -> Float[Tensor, "batch *latents"]:
        return self.backbone(x, when, condition["context"])

    def load_processors(self, folder: Path) -> None:
        self.tokenizer = read_tokenizer(folder / "tokenizer", self.text.config)

    def save_processors(self, folder: Path) -> None:
        if self.tokenizer is not None:
            self.tokenizer.save(folder / "tokenizer")
