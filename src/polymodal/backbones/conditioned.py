"""A causal decoder of vectors, which may read a condition by cross-attention: MusicGen, VALL-E."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from polymodal.backbones.encdec import Block, EncDecMemory, Scores, Source, StackConfig, Unbiased
from polymodal.core.errors import ConfigError, MediaError
from polymodal.core.tokens import Modality, Tokens
from polymodal.nn.cache import sight
from polymodal.nn.init import cut_normal_
from polymodal.nn.norm import Layer, Norm
from polymodal.nn.time import waves
from polymodal.weights.fields import ACTIVATION_NAMES, ACTIVATIONS, MOST_LAYERS, Fields
from polymodal.weights.layouts import FAIRSEQ_FEED_FORWARD, PROJECTIONS
from polymodal.weights.rules import Rule, drop, renames, rule


@dataclass(frozen=True, kw_only=True)
class ConditionedConfig:
    """A decoder whose positions are waves, whose tables and output layers are somebody else's.

    Attributes:
        context: the most steps.
    """

    dim: int
    stack: StackConfig
    norm: Norm = field(default_factory=Layer)
    context: int = 2048

    def __post_init__(self) -> None:
        if self.dim % 2 or self.dim < 4:
            raise ConfigError(f"waves come in pairs, of at least two periods: a width of {self.dim} has none")


class ConditionedDecoder(nn.Module):
    """Pre-norm blocks of causal self-attention, attention to a source, and feed-forward.

    ``context_dim`` is the width of the source; None: there is none to read.
    """

    def __init__(self, config: ConditionedConfig, context_dim: int | None) -> None:
        super().__init__()
        c = self.config = config
        self.blocks = nn.ModuleList(
            Block(c.dim, c.stack, c.norm, layer, post_norm=False, context_dim=context_dim)
            for layer in range(c.stack.num_layers)
        )
        self.norm = c.norm.build(c.dim)

    @torch.no_grad()
    def init_weights(self) -> None:
        """audiocraft's: normals by fan-in, smaller with depth; queries, keys and values as torch draws them."""
        for depth, block in enumerate(self.blocks, 1):
            for name, layer in block.named_modules():
                if isinstance(layer, nn.Linear) and name.split(".")[-1] in {"q_proj", "k_proj", "v_proj"}:
                    nn.init.uniform_(layer.weight, -(layer.in_features**-0.5), layer.in_features**-0.5)
                elif isinstance(layer, nn.Linear):
                    cut_normal_(layer.weight, (2 * depth * layer.in_features) ** -0.5)

    def source(self, x: Float[Tensor, "batch source dim"], valid: Bool[Tensor, "batch source"]) -> Source:
        """What the layers need of a condition, computed once for all steps."""
        layers = []
        for block in self.blocks:
            assert isinstance(block, Block)
            layers.append(block.forward_source(x))
        return Source(layers=tuple(layers), valid=valid)

    def new_memory(self, rows: int, capacity: int) -> EncDecMemory:
        """An empty memory of so many steps.

        Raises:
            MediaError: these are more than the context.
        """
        c, weight = self.config, next(self.parameters())
        if capacity > c.context:
            raise MediaError(f"{capacity} steps; this backbone was made for at most {c.context}")
        return EncDecMemory(
            num_layers=c.stack.num_layers, rows=rows, capacity=capacity, num_kv_heads=c.stack.num_heads,
            head_dim=c.stack.head_dim, dtype=weight.dtype, device=weight.device,
        )  # fmt: skip

    def forward(
        self,
        x: Float[Tensor, "batch steps dim"],
        source: Source | None = None,
        memory: EncDecMemory | None = None,
        *,
        place: Int[Tensor, "batch steps"] | None = None,
        valid: Bool[Tensor, "batch steps"] | None = None,
    ) -> Float[Tensor, "batch steps dim"]:
        """Vectors after the last norm; with a memory, the new steps are added to it and see what it holds.

        Args:
            x: what is read at each step.
            source: see `source`.
            memory: see `new_memory`.
            place: the positions of the steps, where they do not simply follow each other.
            valid: False for padding, at the end of rows.
        """
        tokens = Tokens.of(x, causal=True, modality=Modality.AUDIO, valid=valid)
        tokens = tokens if memory is None else memory.after(tokens)
        see = sight(tokens) if memory is None else memory.sight(tokens)
        x = x + cosines(tokens.position[..., 0] if place is None else place, self.config.dim).to(x.dtype)
        scores, cross = Scores(mask=see.mask, causal=see.causal), None if source is None else source.scores
        layers = [None] * len(self.blocks) if source is None else source.layers
        for block, keys_values in zip(self.blocks, layers, strict=True):
            x = block(x, scores, source=keys_values, source_scores=cross, cache=memory)
        if memory is not None:
            memory.advance(tokens)
        return self.norm(x)


def cosines(place: Int[Tensor, "batch steps"], dim: int) -> Float[Tensor, "batch steps {dim}"]:
    """Positions as waves: cosines, then sines, the longest one of 20,000 pi."""
    table = waves(place.flatten(), dim, shortest=2 * math.pi, longest=20_000 * math.pi)
    sine, cosine = table.chunk(2, 1)
    return torch.cat([cosine, sine], 1).unflatten(0, place.shape)


# ---- the format of the Hub


def read_musicgen(f: Fields) -> ConditionedConfig:
    """The decoder of MusicGen."""
    f.ignore("dropout of training, which these models are built without", *(
        "dropout", "attention_dropout", "activation_dropout", "layerdrop", "classifier_dropout"
    ))  # fmt: skip
    f.ignore("a cache is asked for where it is needed", "use_cache")
    f.require("scale_embedding", False)
    dim, heads = f.take("hidden_size", int, 1024), f.take("num_attention_heads", int, 16)
    if dim % heads or dim % 2 or dim < 4:
        f.problems.append(f"config.json: decoder: hidden_size {dim} is odd or no multiple of {heads} attention heads")
        dim, heads = 4, 1
    mlp = Unbiased(
        hidden_dim=f.take("ffn_dim", int, 4096), activation=f.choose("activation_function", ACTIVATIONS, "gelu")
    )
    layers = f.take("num_hidden_layers", int, 24, most=MOST_LAYERS)
    stack = StackConfig(num_layers=layers, num_heads=heads, mlp=mlp, head_dim=dim // heads)
    return ConditionedConfig(dim=dim, stack=stack, context=f.take("max_position_embeddings", int, 2048))


def write_musicgen(c: ConditionedConfig) -> dict[str, Any]:
    """The reverse of `read_musicgen`."""
    stack = c.stack
    return {
        "hidden_size": c.dim, "num_hidden_layers": stack.num_layers, "num_attention_heads": stack.num_heads,
        "ffn_dim": stack.mlp.hidden_dim, "activation_function": ACTIVATION_NAMES[stack.mlp.activation],
        "max_position_embeddings": c.context,
    }  # fmt: skip


def musicgen_rules(theirs: str, ours: str) -> list[Rule]:
    """Its layers; both prefixes end in a dot."""
    t, o, rules = f"{theirs}layers.{{i}}", f"{ours}blocks.{{i}}", []
    for module, (mine, norm) in {
        "self_attn": ("attn", "attn_norm"),
        "encoder_attn": ("cross_attn", "cross_norm"),
    }.items():
        rules += renames(f"{t}.{module}", f"{o}.{mine}", PROJECTIONS)
        rules.append(rule(f"{t}.{module}_layer_norm.{{p}}", f"{o}.{norm}.{{p}}"))
    return [
        *rules,
        *renames(t, o, FAIRSEQ_FEED_FORWARD),
        rule(f"{theirs}layer_norm.{{p}}", f"{ours}norm.{{p}}"),
        drop(f"{theirs}embed_positions.weights", "waves, which are computed"),
    ]
