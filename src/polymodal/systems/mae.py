"""MAE: a ViT that learns by reconstructing the three quarters of a picture that it was not shown.

Paper: He et al., "Masked Autoencoders Are Scalable Vision Learners", 2021, https://arxiv.org/abs/2111.06377.
Official code: facebookresearch/mae.
Hub: facebook/vit-mae-base, facebook/vit-mae-large, facebook/vit-mae-huge.

    picture -> patches -> the 25 % that a shuffle keeps -> ViT -> + mask tokens, unshuffled -> decoder -> pixels
                                                                    squared error of the masked patches only

Training details kept here: a shuffle per sample; the encoder sees no mask tokens; fixed sin-cos positions in both
Transformers; targets normalised patch by patch (``norm_targets``); Xavier-uniform matrices (queries, keys and values as
one fused matrix, the patch convolution as a linear layer), class and mask token of standard deviation 0.02.

The vector of a picture is the mean of the patch tokens after the last norm, without masking (the paper's global
pooling; the class token was never trained to hold anything).

Deviations: class and mask tokens take no weight decay (they are vectors here). Training takes pictures of the native
size only, as the official code does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from polymodal.core.batch import Batch, Loss
from polymodal.core.errors import ConfigError, MediaError
from polymodal.core.sample import Sample
from polymodal.core.verbs import TensorSpec
from polymodal.encoders.vit import ViT, ViTConfig
from polymodal.heads.reconstruction import PatchDecoder, PatchDecoderConfig, patch_norm, patchify, reconstruction_loss
from polymodal.modalities.image import IMAGENET_MEAN, IMAGENET_STD, Exact, ImageProcessor
from polymodal.nn.block import Block
from polymodal.nn.position import sincos_2d
from polymodal.systems.base import Embedder, Format, Reference
from polymodal.weights.fields import IMAGE_FIELDS, TRANSFORMER_FIELDS, Fields, FieldTable, read_fields, write_fields
from polymodal.weights.layouts import vit_blocks, vit_embeddings
from polymodal.weights.rules import Rule, Squeeze, read_only, rule


@dataclass(frozen=True, kw_only=True)
class MAEConfig:
    """A tower, a decoder, and what is hidden from the one and asked of the other."""

    vision: ViTConfig
    decoder: PatchDecoderConfig
    mask_ratio: float = 0.75
    norm_targets: bool = True

    def __post_init__(self) -> None:
        if not self.vision.class_token or self.vision.num_registers or self.vision.image_size % self.vision.patch_size:
            raise ConfigError("MAE's tower has a class token, no registers, and a whole number of patches")
        if not 1 <= self.visible < self.vision.grid**2:
            raise ConfigError(
                f"mask_ratio {self.mask_ratio} of {self.vision.grid**2} patches leaves nothing to see or to mask"
            )

    @property
    def visible(self) -> int:
        """Patches that the encoder sees in training."""
        return int(self.vision.grid**2 * (1 - self.mask_ratio))


def preset(dim: int, layers: int, heads: int, patch: int = 16) -> MAEConfig:
    return MAEConfig(
        vision=ViTConfig(
            image_size=224, patch_size=patch, dim=dim, num_layers=layers, num_heads=heads, hidden_dim=4 * dim,
            norm_eps=1e-12,
        ),
        decoder=PatchDecoderConfig(norm_eps=1e-12),
        norm_targets=False,  # so the published configs, whatever the weights were trained with
    )  # fmt: skip


PRESETS = {
    "facebook/vit-mae-base": lambda: preset(768, 12, 12),
    "facebook/vit-mae-large": lambda: preset(1024, 24, 16),
    "facebook/vit-mae-huge": lambda: preset(1280, 32, 16, patch=14),
}


class Shuffle(NamedTuple):
    """Which patches are seen, and how to find each patch again."""

    keep: Int[Tensor, "batch visible"]
    restore: Int[Tensor, "batch patches"]  # place of each patch among the kept, then the masked ones
    masked: Bool[Tensor, "batch patches"]


@final
class MAE(Embedder):
    """Masked autoencoder."""

    config: MAEConfig

    def __init__(self, config: MAEConfig) -> None:
        super().__init__(config)
        v = config.vision
        self.vision = ViT(v)
        self.vision.position.requires_grad_(False)
        self.decoder = PatchDecoder(
            config.decoder, encoder_dim=v.dim, num_patches=v.grid**2, patch_values=v.patch_size**2 * v.num_channels
        )

    @torch.no_grad()
    def init_weights(self) -> None:
        """The official scheme."""
        grid = self.config.vision.grid
        assert self.vision.class_token is not None
        for position in (self.vision.position, self.decoder.position):
            position[0] = 0.0
            position[1:] = sincos_2d(position.shape[1], grid, grid)
        for token in (self.vision.class_token, self.decoder.mask_token):
            nn.init.normal_(token, std=0.02)
        nn.init.xavier_uniform_(self.vision.patch_embed.weight.flatten(1))
        for layer in (self.decoder.embed, self.decoder.predict):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        for block in (*self.vision.blocks, *self.decoder.blocks):
            assert isinstance(block, Block)
            for name, layer in block.named_modules():
                if not isinstance(layer, nn.Linear):
                    continue
                if name in ("attn.q_proj", "attn.k_proj", "attn.v_proj"):
                    bound = math.sqrt(6 / (4 * layer.in_features))  # Xavier over the fused (3 dim, dim) matrix
                    nn.init.uniform_(layer.weight, -bound, bound)
                else:
                    nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def inputs_spec(self) -> dict[str, TensorSpec]:
        """``noise``, whose order is the shuffle, may be left out: it is drawn then."""
        v = self.config.vision
        return {
            "pixels": TensorSpec(shape=(v.num_channels, v.image_size, v.image_size)),
            "noise": TensorSpec(shape=(v.grid**2,)),
        }

    @property
    def embedding_dim(self) -> int:
        return self.config.vision.dim

    def encode(self, batch: Batch) -> Float[Tensor, "samples dim"]:
        """The mean of the patch tokens of the whole picture, at unit length."""
        return F.normalize(self.vision(batch["pixels"].to(self.device)).x[:, 1:].float().mean(1), dim=-1)

    def shuffle(self, noise: Float[Tensor, "batch patches"]) -> Shuffle:
        """The patches with the smallest noise are kept."""
        order = noise.argsort(1)
        restore = order.argsort(1)
        return Shuffle(order[:, : self.config.visible], restore, restore >= self.config.visible)

    def reconstruct(
        self, pixels: Float[Tensor, "batch channels height width"], shuffle: Shuffle
    ) -> Float[Tensor, "batch patches values"]:
        """The values of every patch, from the kept ones; in the scale of the targets.

        Raises:
            MediaError: the pictures do not have the native size.
        """
        v = self.config.vision
        if pixels.shape[-2:] != (v.image_size, v.image_size):
            raise MediaError(f"MAE reconstructs {v.image_size} x {v.image_size} pixels, not {tuple(pixels.shape[-2:])}")
        patches = self.vision.embed_patches(pixels)
        visible = patches.gather(1, shuffle.keep.unsqueeze(-1).expand(-1, -1, v.dim))
        return self.decoder(self.vision.encode_patches(visible), shuffle.restore)

    def noise(self, batch: Batch) -> Float[Tensor, "batch patches"]:
        if "noise" in batch:
            return batch["noise"]
        return torch.rand(batch.size, self.config.vision.grid**2, device=batch["pixels"].device)

    def forward(self, batch: Batch) -> Float[Tensor, "batch patches values"]:
        return self.reconstruct(batch["pixels"], self.shuffle(self.noise(batch)))

    def loss(self, batch: Batch) -> Loss:
        shuffle = self.shuffle(self.noise(batch))
        target = patchify(batch["pixels"].float(), self.config.vision.patch_size)
        if self.config.norm_targets:
            target = patch_norm(target)
        return reconstruction_loss(self.reconstruct(batch["pixels"], shuffle), target, shuffle.masked)

    def count(self, sample: Sample) -> int:
        """Tokens that the tower computes for the whole pictures of a sample (training computes a quarter)."""
        side = self.config.vision.image_size
        return len(sample.images) * self.config.vision.count(side, side)

    def default_images(self) -> ImageProcessor:
        side = self.config.vision.image_size
        return ImageProcessor(
            resize=Exact(height=side, width=side), resample="bilinear", mean=IMAGENET_MEAN, std=IMAGENET_STD
        )

    reference = Reference(
        package="transformers", cls="ViTMAEForPreTraining", inputs={"pixels": "pixel_values", "noise": "noise"},
        output="logits",
    )  # fmt: skip


SHARED: FieldTable = (
    ("hidden_act", "activation", "gelu"), ("layer_norm_eps", "norm_eps", 1e-12), ("qkv_bias", "qkv_bias", True),
)  # fmt: skip
VISION: FieldTable = (*TRANSFORMER_FIELDS, *IMAGE_FIELDS, *SHARED)
DECODER: FieldTable = (
    ("decoder_hidden_size", "dim", 512), ("decoder_num_hidden_layers", "num_layers", 8),
    ("decoder_num_attention_heads", "num_heads", 16), ("decoder_intermediate_size", "hidden_dim", 2048), *SHARED,
)  # fmt: skip
MASKING: FieldTable = (("mask_ratio", "mask_ratio", 0.75), ("norm_pix_loss", "norm_targets", False))


def read_hf(raw: Mapping[str, Any]) -> tuple[MAEConfig, dict[str, str]]:
    f = Fields(raw)
    f.require("model_type", "vit_mae")
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        f.require(name, 0.0)
    vision, decoder, masking = (read_fields(f, table) for table in (VISION, DECODER, MASKING))
    report = f.done()
    return MAEConfig(vision=ViTConfig(**vision), decoder=PatchDecoderConfig(**decoder), **masking), report


def write_hf(c: MAEConfig) -> dict[str, Any]:
    fields = write_fields(c.vision, VISION) | write_fields(c.decoder, DECODER) | write_fields(c, MASKING)
    raw = {"architectures": ["ViTMAEForPreTraining"], "model_type": "vit_mae"} | fields
    if read_hf(raw)[0] != replace(c, vision=replace(c.vision, drop_path=0.0)):
        shared = ", ".join(ours for _, ours, _ in SHARED)
        raise ConfigError(f"the Hub's format has no field for something here (tower and decoder share {shared}): {c}")
    return raw


def rules_hf(config: MAEConfig) -> list[Rule]:
    return [
        *vit_embeddings("vit.", "vision"),
        *vit_blocks("vit.encoder.layer", "vision.blocks"),
        rule("vit.layernorm.{p}", "vision.norm.{p}"),
        rule("decoder.mask_token", "decoder.mask_token", Squeeze((0, 1))),
        rule("decoder.decoder_pos_embed", "decoder.position", Squeeze((0,))),
        rule("decoder.decoder_embed.{p}", "decoder.embed.{p}"),
        *vit_blocks("decoder.decoder_layers", "decoder.blocks"),
        # What transformers 5 makes of the name above when it saves.
        *read_only(vit_blocks("decoder.decoder_encoder.layer", "decoder.blocks")),
        rule("decoder.decoder_norm.{p}", "decoder.norm.{p}"),
        rule("decoder.decoder_pred.{p}", "decoder.predict.{p}"),
    ]


MAE.formats = {"hf": Format(read=read_hf, write=write_hf, rules=rules_hf)}
