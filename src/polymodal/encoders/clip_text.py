"""CLIP's text tower on its own, as models that paint read prompts with it, and as the Hub writes it.

Source: Radford et al. 2021, https://arxiv.org/abs/2103.00020. Stable Diffusion 1 reads the tokens after the last norm,
and so does 2, whose files lack the last layer of OpenCLIP's; SDXL and SD3 read them before the last layer, and the
projected vector of the text; FLUX reads the vector alone, not projected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from polymodal.core.errors import ConfigError
from polymodal.encoders.text import TextConfig, TextTower
from polymodal.nn.init import openai_text_
from polymodal.weights.fields import Fields, FieldTable, read_fields, write_fields
from polymodal.weights.layouts import clip_blocks
from polymodal.weights.rules import Rule, drop, read_only, rule

PLAIN: Final = "CLIPTextModel"
PROJECTED: Final = "CLIPTextModelWithProjection"
TEXT: FieldTable = (
    ("hidden_size", "dim", 512), ("num_hidden_layers", "num_layers", 12), ("num_attention_heads", "num_heads", 8),
    ("intermediate_size", "hidden_dim", 2048), ("hidden_act", "activation", "quick_gelu"),
    ("layer_norm_eps", "norm_eps", 1e-5), ("vocab_size", "vocab_size", 49408),
    ("max_position_embeddings", "context", 77),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CLIPTextConfig:
    """Attributes:
    eot_id: the token whose first place is the text's vector.
    embed_dim: of the projected vector, where there is a projection.
    """

    tower: TextConfig
    eot_id: int
    embed_dim: int | None = None

    def __post_init__(self) -> None:
        if not self.tower.causal or not 0 < self.eot_id < self.tower.vocab_size:
            raise ConfigError(f"CLIP's text tower is causal, and its end of text {self.eot_id} is one of its tokens")

    @property
    def pooled_dim(self) -> int:
        return self.tower.dim if self.embed_dim is None else self.embed_dim


CLIP_L: Final = CLIPTextConfig(
    tower=TextConfig(
        vocab_size=49408, context=77, dim=768, num_layers=12, num_heads=12, hidden_dim=3072, activation="quick_gelu"
    ),
    eot_id=49407,
)
"""openai/clip-vit-large-patch14."""
CLIP_G: Final = CLIPTextConfig(
    tower=TextConfig(
        vocab_size=49408, context=77, dim=1280, num_layers=32, num_heads=20, hidden_dim=5120, activation="gelu"
    ),
    eot_id=49407,
    embed_dim=1280,
)
"""laion/CLIP-ViT-bigG-14-laion2B-39B-b160k."""


class ReadText(NamedTuple):
    """What a tower makes of texts."""

    last: Float[Tensor, "batch tokens dim"]  # after the last norm
    before: Float[Tensor, "batch tokens dim"]  # before the last block
    pooled: Float[Tensor, "batch pooled_dim"]  # of the end of text, after the last norm, projected where it is


class CLIPText(nn.Module):
    """See the module."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        c = self.config = config
        self.tower = TextTower(c.tower)
        self.projection = None if c.embed_dim is None else nn.Linear(c.tower.dim, c.embed_dim, bias=False)

    @torch.no_grad()
    def init_weights(self) -> None:
        """OpenAI's."""
        nn.init.normal_(self.tower.embed_tokens.weight, std=0.02)
        nn.init.normal_(self.tower.position, std=0.01)
        openai_text_(self.tower.blocks)
        self.tower.norm.reset_parameters()
        if self.projection is not None:
            nn.init.normal_(self.projection.weight, std=self.config.tower.dim**-0.5)

    def empty(self) -> Int[Tensor, " tokens"]:
        """The ids of the text that says nothing, filled up with its end as OpenAI's tokenizer does."""
        ids = torch.full((self.config.tower.context,), self.config.eot_id)
        ids[0] = self.config.eot_id - 1
        return ids

    def forward(self, ids: Int[Tensor, "batch tokens"]) -> ReadText:
        before, tokens = self.tower.last_two(ids)
        pooled = self.tower.at(tokens, (ids == self.config.eot_id).int().argmax(1))
        return ReadText(tokens.x, before, pooled if self.projection is None else self.projection(pooled))


def read_clip_text(f: Fields, *, projected: bool = False) -> CLIPTextConfig:
    """The config of a tower; what is wrong is added to the problems of ``f``."""
    f.require("model_type", "clip_text_model")
    f.require("attention_dropout", 0.0)
    f.require("dropout", 0.0)
    shape = read_fields(f, TEXT)
    embed_dim = f.take("projection_dim", int, 512) if projected else None
    if not projected:
        f.ignore("there is no projection", "projection_dim")
    # Configs written before 2023 say 2 and mean "the largest id", which is OpenAI's end of text.
    eot, size = f.take("eos_token_id", int, 49407, least=0), shape["vocab_size"]
    eot = size - 1 if eot == 2 else eot
    if shape["dim"] % max(1, shape["num_heads"]) or not 0 < eot < size:
        f.problems.append(f"text: {shape['dim']} dimensions for {shape['num_heads']} heads, end {eot} of {size} tokens")
        shape, eot = shape | {"num_heads": 1, "vocab_size": 2}, 1
    return CLIPTextConfig(tower=TextConfig(**shape), eot_id=eot, embed_dim=embed_dim)


def write_clip_text(c: CLIPTextConfig) -> dict[str, Any]:
    """The fields that `read_clip_text` reads."""
    control = {"bos_token_id": c.eot_id - 1, "eos_token_id": c.eot_id, "pad_token_id": 1}
    architecture = PLAIN if c.embed_dim is None else PROJECTED
    return {
        "architectures": [architecture], "model_type": "clip_text_model", "projection_dim": c.pooled_dim, **control,
        **write_fields(c.tower, TEXT),
    }  # fmt: skip


def clip_text_rules(theirs: str, ours: str, c: CLIPTextConfig) -> list[Rule]:
    """The tensors of a tower; both prefixes end in a dot, or are empty."""

    def tower(their: str) -> list[Rule]:
        return [
            rule(f"{their}embeddings.token_embedding.weight", f"{ours}tower.embed_tokens.weight"),
            rule(f"{their}embeddings.position_embedding.weight", f"{ours}tower.position"),
            rule(f"{their}final_layer_norm.{{p}}", f"{ours}tower.norm.{{p}}"),
            *clip_blocks(f"{their}encoder", f"{ours}tower.blocks"),
            drop(f"{their}embeddings.position_ids", "0, 1, 2, ...: a buffer of older transformers"),
        ]

    rules = tower(f"{theirs}text_model.")
    if c.embed_dim is None:  # transformers 5 leaves the first word out where there is no projection
        return rules + read_only(tower(theirs))
    return [*rules, rule(f"{theirs}text_projection.weight", f"{ours}projection.weight")]
