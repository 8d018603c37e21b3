"""Whisper's encoder of log-mel frames: two convolutions, fixed sinusoids, pre-norm blocks. Qwen2-Audio has it, too.

Source: openai/whisper, model.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from polymodal.core.errors import ConfigError, MediaError
from polymodal.nn.block import Block
from polymodal.nn.mlp import ActivationName
from polymodal.weights.fields import ACTIVATION_NAMES, ACTIVATIONS, MOST_LAYERS, Fields
from polymodal.weights.layouts import FAIRSEQ_FEED_FORWARD, PROJECTIONS
from polymodal.weights.rules import Rule, renames, rule


@dataclass(frozen=True, kw_only=True)
class WhisperEncoderConfig:
    """A tower of sound.

    Attributes:
        positions: vectors of a window, each of two frames.
    """

    dim: int = 384
    num_layers: int = 4
    num_heads: int = 6
    hidden_dim: int = 1536
    num_mels: int = 80
    positions: int = 1500
    activation: ActivationName = "gelu"

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or self.dim % 2 or self.dim < 4:
            raise ConfigError(f"a width of {self.dim} does not divide into {self.num_heads} heads and pairs of waves")


def sinusoids(length: int, dim: int) -> Float[Tensor, "{length} {dim}"]:
    """Sines and then cosines of the place; the longest wave is 20,000 pi."""
    rates = torch.exp(-math.log(10_000) / (dim // 2 - 1) * torch.arange(dim // 2))
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


class WhisperEncoder(nn.Module):
    """Log-mel frames to half as many vectors."""

    def __init__(self, config: WhisperEncoderConfig) -> None:
        super().__init__()
        c = self.config = config
        self.conv1 = nn.Conv1d(c.num_mels, c.dim, 3, padding=1)
        self.conv2 = nn.Conv1d(c.dim, c.dim, 3, stride=2, padding=1)
        self.position = nn.Parameter(torch.empty(c.positions, c.dim), requires_grad=False)  # in files, never trained
        self.blocks = nn.ModuleList(
            Block(c.dim, c.num_heads, c.hidden_dim, activation=c.activation, norm_eps=1e-5, key_bias=False)
            for _ in range(c.num_layers)
        )
        self.norm = nn.LayerNorm(c.dim, eps=1e-5)

    @torch.no_grad()
    def init_weights(self) -> None:
        """The sinusoids; normals by fan-in, as the paper says, and no biases."""
        self.position.copy_(sinusoids(*self.position.shape))
        fan_in_(self)

    def trunk(
        self, features: Float[Tensor, "batch mels frames"], mask: Bool[Tensor, "batch 1 1 positions"] | None = None
    ) -> Float[Tensor, "batch positions dim"]:
        """Vectors before the last norm; a window that is shorter than the table has the first of its places.

        Args:
            features: log-mels.
            mask: True where a vector is looked at; everywhere if None.

        Raises:
            MediaError: there are more frames than places.
        """
        frames, most = features.shape[2], 2 * self.config.positions
        if frames > most:
            raise MediaError(f"{frames} frames of sound; a window of this model holds {most}")
        x = F.gelu(self.conv2(F.gelu(self.conv1(features)))).transpose(1, 2)
        x = x + self.position[: x.shape[1]]
        for block in self.blocks:
            x = block(x, mask=mask)
        return x

    def forward(self, features: Float[Tensor, "batch mels frames"]) -> Float[Tensor, "batch positions dim"]:
        return self.norm(self.trunk(features))


@torch.no_grad()
def fan_in_(module: nn.Module) -> None:
    """Normal matrices of variance 1 / fan-in, no biases; torch's own norms."""
    for layer in _layers(module):
        nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def _layers(module: nn.Module) -> Iterator[nn.Linear | nn.Conv1d]:
    yield from (each for each in module.modules() if isinstance(each, nn.Linear | nn.Conv1d))


# ---- the Hub: the fields of Whisper's own config, and of Qwen2-Audio's ``audio_config``


def read_whisper_encoder(f: Fields) -> WhisperEncoderConfig:
    """The tower's fields; problems go to ``f``."""
    f.ignore("dropout of training, which these models are built without", "dropout", "attention_dropout",
             "activation_dropout", "encoder_layerdrop")  # fmt: skip
    f.ignore("of fresh weights; the paper draws them by fan-in", "init_std")
    f.ignore("encoder_layers says it", "num_hidden_layers")
    f.require("scale_embedding", False)
    dim, heads = f.take("d_model", int, 384), f.take("encoder_attention_heads", int, 6)
    if dim % heads or dim % 2 or dim < 4:
        f.problems.append(f"config.json: d_model {dim} does not divide into {heads} encoder_attention_heads")
        dim, heads = 384, 6
    return WhisperEncoderConfig(
        dim=dim,
        num_layers=f.take("encoder_layers", int, 4, most=MOST_LAYERS),
        num_heads=heads,
        hidden_dim=f.take("encoder_ffn_dim", int, 1536),
        num_mels=f.take("num_mel_bins", int, 80),
        positions=f.take("max_source_positions", int, 1500),
        activation=f.choose("activation_function", ACTIVATIONS, "gelu"),
    )


def write_whisper_encoder(c: WhisperEncoderConfig) -> dict[str, object]:
    """The reverse of `read_whisper_encoder`."""
    return {
        "d_model": c.dim, "encoder_layers": c.num_layers, "encoder_attention_heads": c.num_heads,
        "encoder_ffn_dim": c.hidden_dim, "num_mel_bins": c.num_mels, "max_source_positions": c.positions,
        "activation_function": ACTIVATION_NAMES[c.activation], "scale_embedding": False,
    }  # fmt: skip


def whisper_encoder_rules(theirs: str, ours: str) -> list[Rule]:
    """Both prefixes end in a dot."""
    names = {
        **{f"self_attn.{t}": f"attn.{o}" for t, o in PROJECTIONS.items()}, "self_attn_layer_norm": "attn_norm",
        **FAIRSEQ_FEED_FORWARD,
    }  # fmt: skip
    return [
        rule(f"{theirs}conv1.{{p}}", f"{ours}conv1.{{p}}"),
        rule(f"{theirs}conv2.{{p}}", f"{ours}conv2.{{p}}"),
        rule(f"{theirs}embed_positions.weight", f"{ours}position"),
        *renames(f"{theirs}layers.{{i}}", f"{ours}blocks.{{i}}", names),
        rule(f"{theirs}layer_norm.{{p}}", f"{ours}norm.{{p}}"),
    ]
