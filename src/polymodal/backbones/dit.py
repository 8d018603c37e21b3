"""DiT: a Transformer over the patches of noisy latents, modulated by the step and by a class (adaLN-Zero).

Source: Peebles & Xie, "Scalable Diffusion Models with Transformers", 2022, https://arxiv.org/abs/2212.09748. Official
code: facebookresearch/DiT.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from polymodal.core.errors import ConfigError, MediaError
from polymodal.nn.attention import Attention
from polymodal.nn.mlp import MLP
from polymodal.nn.modulation import EPS, Modulation, modulated
from polymodal.nn.patches import pack
from polymodal.nn.position import sincos_2d
from polymodal.nn.time import Embedder, step_waves
from polymodal.weights.fields import LARGEST, MOST_LAYERS, Fields
from polymodal.weights.layouts import TO_PROJECTIONS
from polymodal.weights.rules import Flatten, Rule, Same, renames, rule

WAVES = 256
MOST_PLACED = 2**26  # numbers of the table of positions, which is computed before any weight is read


@dataclass(frozen=True, kw_only=True)
class DiTBackboneConfig:
    """A Transformer over square latents.

    Attributes:
        latent_size: their side.
        out_channels: twice ``channels`` where variances are learned, too.
        num_classes: without the one that stands for no class.
        mlp_norm_eps: of the norms before the feed-forward layers (diffusers' files say 1e-5).
        wave_gap: see `nn.time.step_waves` (diffusers: 1).
    """

    latent_size: int = 32
    patch_size: int = 2
    channels: int = 4
    out_channels: int = 8
    dim: int = 1152
    num_layers: int = 28
    num_heads: int = 16
    hidden_dim: int = 4608
    num_classes: int = 1000
    mlp_norm_eps: float = EPS
    wave_gap: int = 0

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or self.dim % 4:
            raise ConfigError(f"dim {self.dim} is not a multiple of num_heads {self.num_heads}, or of 4")
        if self.latent_size % self.patch_size:
            raise ConfigError(f"latents of {self.latent_size} do not divide into patches of {self.patch_size}")
        if self.out_channels not in (self.channels, 2 * self.channels):
            raise ConfigError(f"{self.out_channels} outputs for {self.channels} channels; as many, or twice as many")


class DiTBlock(nn.Module):
    """Attention and a feed-forward layer, both scaled, shifted and gated by the condition; the identity at first."""

    def __init__(self, config: DiTBackboneConfig) -> None:
        super().__init__()
        c = config
        self.mlp_norm_eps = c.mlp_norm_eps
        self.modulation = Modulation(c.dim, 6)
        self.attn = Attention(c.dim, c.num_heads)
        self.mlp = MLP(c.dim, c.hidden_dim, "gelu_tanh")

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], condition: Float[Tensor, "batch 1 dim"]
    ) -> Float[Tensor, "batch tokens dim"]:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(condition)
        x = x + gate * self.attn(modulated(x, shift, scale))
        return x + mlp_gate * self.mlp(modulated(x, mlp_shift, mlp_scale, eps=self.mlp_norm_eps))


class DiTBackbone(nn.Module):
    """Patches of noisy latents to as many values again."""

    def __init__(self, config: DiTBackboneConfig) -> None:
        super().__init__()
        c = self.config = config
        self.patch_embed = nn.Linear(c.channels * c.patch_size**2, c.dim)
        self.time = Embedder(WAVES, c.dim)
        self.labels = nn.Embedding(c.num_classes + 1, c.dim)  # the last one stands for no class
        self.blocks = nn.ModuleList(DiTBlock(c) for _ in range(c.num_layers))
        self.modulation = Modulation(c.dim, 2)
        self.out = nn.Linear(c.dim, c.out_channels * c.patch_size**2)
        side = c.latent_size // c.patch_size
        self.register_buffer("position", sincos_2d(c.dim, side, side), persistent=False)
        self.position: Tensor

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        step: Float[Tensor, " batch"],
        label: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch patches values"]:
        """The values of each patch: rows, then columns, then channels.

        Raises:
            MediaError: the latents have another size: positions are of this one alone.
        """
        c = self.config
        if x.shape[1:] != (c.channels, c.latent_size, c.latent_size):
            raise MediaError(
                f"latents of {tuple(x.shape[1:])}; this model was made for {c.latent_size} x {c.latent_size}"
            )
        tokens = self.patch_embed(pack(x, c.patch_size))
        tokens = tokens + self.position.to(tokens.dtype)
        waves = step_waves(step, WAVES, gap=c.wave_gap).to(tokens.dtype)
        condition = (self.time(waves) + self.labels(label)).unsqueeze(1)
        for block in self.blocks:
            tokens = block(tokens, condition)
        return self.out(modulated(tokens, *self.modulation(condition)))

    @torch.no_grad()
    def init_weights(self) -> None:
        """The official code's: Xavier, and zero wherever a gate or an output would let something through."""
        basic_init_(self)
        for projection in [*self.time.children(), self.labels]:
            assert isinstance(projection, nn.Linear | nn.Embedding)
            nn.init.normal_(projection.weight, std=0.02)
        nn.init.zeros_(self.out.weight)
        zero_modulations_(self)


@torch.no_grad()
def basic_init_(model: nn.Module) -> None:
    """DiT's for all linear layers: Xavier-uniform weights, zero biases; q, k and v are one matrix there."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            if name.endswith(("q_proj", "k_proj", "v_proj")):
                bound = math.sqrt(6 / (module.in_features + 3 * module.out_features))
                nn.init.uniform_(module.weight, -bound, bound)
            else:
                nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)


def zero_modulations_(model: nn.Module) -> None:
    """Every gate closed, every scale one, every shift zero."""
    for module in model.modules():
        if isinstance(module, Modulation):
            module.init_weights()


# -- files of diffusers


def read_heads(f: Fields, heads: int, width: int) -> dict[str, int]:
    """The width of a Transformer of diffusers, whose defaults these are."""
    heads, width = f.take("num_attention_heads", int, heads), f.take("attention_head_dim", int, width)
    if heads * width > LARGEST:
        f.problems.append(f"config.json: {heads} heads of {width} are more than {LARGEST:,} numbers")
    return {"dim": heads * width, "num_heads": heads, "hidden_dim": 4 * heads * width}


def read_dit(f: Fields) -> DiTBackboneConfig | None:
    """The config of a DiTTransformer2DModel; None where there are problems."""
    for name, value in _PLAIN.items():
        f.require(name, value)
    f.ignore("of layers that a DiT does not have, or dropout", "norm_num_groups", "dropout", "upcast_attention")
    shape = read_heads(f, 16, 72)
    channels, size, patch = f.take("in_channels", int, 4), f.take("sample_size", int, 32), f.take("patch_size", int, 2)
    if (size // patch) ** 2 * shape["dim"] > MOST_PLACED:
        f.problems.append(f"config.json: sample_size {size} has too many patches of {patch} for {shape['dim']} numbers")
    values: dict[str, Any] = {
        **shape, "latent_size": size, "patch_size": patch, "channels": channels,
        "out_channels": f.optional("out_channels", int) or channels,
        "num_layers": f.take("num_layers", int, 28, most=MOST_LAYERS),
        "num_classes": f.take("num_embeds_ada_norm", int, 1000),
        "mlp_norm_eps": f.take("norm_eps", float, 1e-5), "wave_gap": f.take("freq_shift", int, 1, least=0, most=1),
    }  # fmt: skip
    return None if f.problems else DiTBackboneConfig(**values)


def write_dit(c: DiTBackboneConfig) -> dict[str, Any]:
    """The fields of `read_dit`."""
    # diffusers has no field for the waves' spacing: it knows but its own.
    return ({} if c.wave_gap == 1 else {"freq_shift": c.wave_gap}) | {
        "num_attention_heads": c.num_heads, "attention_head_dim": c.dim // c.num_heads, "in_channels": c.channels,
        "out_channels": c.out_channels, "num_layers": c.num_layers, "sample_size": c.latent_size,
        "patch_size": c.patch_size, "num_embeds_ada_norm": c.num_classes, "norm_eps": c.mlp_norm_eps, **_PLAIN,
    }  # fmt: skip


_PLAIN = {
    "attention_bias": True, "activation_fn": "gelu-approximate", "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}  # fmt: skip


def feed_forward(theirs: str, ours: str) -> list[Rule]:
    """Two linear layers as diffusers names them."""
    return renames(theirs, ours, {"net.0.proj": "up_proj", "net.2": "down_proj"})


def projections(theirs: str, ours: str) -> list[Rule]:
    """The four of attention as diffusers names them."""
    return renames(theirs, ours, TO_PROJECTIONS)


def embedder(theirs: str, ours: str) -> list[Rule]:
    """What makes a vector of a step, a class or a text, as diffusers names it."""
    return renames(theirs, ours, {"linear_1": "up_proj", "linear_2": "down_proj"})


def dit_rules(c: DiTBackboneConfig, theirs: str = "", ours: str = "") -> list[Rule]:
    """The names of a DiTTransformer2DModel, in which each block has copies of the step's and the class's embedders."""
    block = f"{theirs}transformer_blocks.{{i}}"

    def copies(their_name: str, our_name: str) -> Rule:
        names = [f"{theirs}transformer_blocks.{i}.norm1.emb.{their_name}" for i in range(c.num_layers)]
        return rule(names, f"{ours}{our_name}", Same(c.num_layers))

    patch = (c.channels, c.patch_size, c.patch_size)
    return [
        rule(f"{theirs}pos_embed.proj.weight", f"{ours}patch_embed.weight", Flatten(patch)),
        rule(f"{theirs}pos_embed.proj.bias", f"{ours}patch_embed.bias"),
        copies("timestep_embedder.linear_1.{p}", "time.up_proj.{p}"),
        copies("timestep_embedder.linear_2.{p}", "time.down_proj.{p}"),
        copies("class_embedder.embedding_table.weight", "labels.weight"),
        rule(f"{block}.norm1.linear.{{p}}", f"{ours}blocks.{{i}}.modulation.proj.{{p}}"),
        *projections(f"{block}.attn1", f"{ours}blocks.{{i}}.attn"),
        *feed_forward(f"{block}.ff", f"{ours}blocks.{{i}}.mlp"),
        rule(f"{theirs}proj_out_1.{{p}}", f"{ours}modulation.proj.{{p}}"),
        rule(f"{theirs}proj_out_2.{{p}}", f"{ours}out.{{p}}"),
    ]
