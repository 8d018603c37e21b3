"""MMDiT: Transformers over noisy latents and text that attend jointly, each with weights of its own (adaLN-Zero).

Source: Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis" (Stable Diffusion 3),
2024, https://arxiv.org/abs/2403.03206; FLUX.1's code, black-forest-labs/flux. What the two differ in are configs:
where positions come from, norms of queries and keys, further self-attention, single streams behind the double ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from polymodal.backbones.dit import WAVES, basic_init_, zero_modulations_
from polymodal.core.errors import ConfigError, MediaError
from polymodal.nn.attention import attend
from polymodal.nn.mlp import MLP
from polymodal.nn.modulation import Modulation, modulated
from polymodal.nn.norm import RMS
from polymodal.nn.position import sincos_2d
from polymodal.nn.rope import AxialRope, rotate
from polymodal.nn.time import Embedder, step_waves

Angles: TypeAlias = tuple[Float[Tensor, "batch 1 tokens half"], Float[Tensor, "batch 1 tokens half"]]
STEPS = 1000  # what a time of one is, as a step


@dataclass(frozen=True, kw_only=True)
class CentreCrop:
    """A fixed sin-cos table of ``side`` x ``side`` places, of which a picture gets the middle.

    Places are a ``side / base`` th apart: ``base`` is the grid of the pictures in the first stage of training.
    """

    side: int = 192
    base: int = 64


Position: TypeAlias = CentreCrop | AxialRope


@dataclass(frozen=True, kw_only=True)
class MMDiTConfig:
    """Double streams, then single ones.

    Attributes:
        values: of a patch that comes in.
        out_values: of a patch that goes out.
        num_single_layers: blocks of one stream over all tokens, attention and feed-forward side by side. Where there
            are none, nobody reads the text behind the last double block, and its branch is cut there.
        context_dim: of the text's tokens.
        pooled_dim: of the text's one vector.
        position: a table that is added to the patches, or angles of a grid (0, row, column), the text's all zero.
        qk_norm: of each head's queries and keys.
        extra_attention: of the first so many double blocks, among the patches alone (Stable Diffusion 3.5 medium).
        guidance: whether the strength of guidance is a condition (distilled models).
    """

    values: int
    out_values: int
    dim: int
    num_layers: int
    num_heads: int
    hidden_dim: int
    context_dim: int
    pooled_dim: int
    position: Position
    num_single_layers: int = 0
    qk_norm: RMS | None = None
    extra_attention: int = 0
    guidance: bool = False

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or self.dim % 4:
            raise ConfigError(f"dim {self.dim} is not a multiple of num_heads {self.num_heads}, or of 4")
        if isinstance(self.position, AxialRope) and sum(self.position.dims) != self.dim // self.num_heads:
            raise ConfigError(f"axes of {self.position.dims} do not fill heads of {self.dim // self.num_heads}")
        if not 0 <= self.extra_attention <= self.num_layers:
            raise ConfigError(f"{self.extra_attention} of {self.num_layers} blocks cannot have further attention")


class Heads(nn.Module):
    """Queries, keys and values of one stream, and what joins the result to it again."""

    def __init__(self, config: MMDiTConfig, *, out: bool = True) -> None:
        super().__init__()
        c = config
        self.num_heads = c.num_heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(c.dim, c.dim) for _ in range(3))
        if out:
            self.o_proj = nn.Linear(c.dim, c.dim)
        width = c.dim // c.num_heads
        self.q_norm = nn.Identity() if c.qk_norm is None else c.qk_norm.build(width)
        self.k_norm = nn.Identity() if c.qk_norm is None else c.qk_norm.build(width)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> tuple[Tensor, Tensor, Tensor]:
        """Each as (batch heads tokens head_dim)."""
        q, k, v = (
            rearrange(t, "b n (h d) -> b h n d", h=self.num_heads)
            for t in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        return self.q_norm(q), self.k_norm(k), v


def attended(
    q: Float[Tensor, "batch heads tokens head_dim"],
    k: Float[Tensor, "batch heads tokens head_dim"],
    v: Float[Tensor, "batch heads tokens head_dim"],
    *,
    angles: Angles | None = None,
    mask: Bool[Tensor, "batch #heads #tokens tokens"] | None = None,
) -> Float[Tensor, "batch tokens dim"]:
    """Attention of tokens that were turned by their angles; heads joined."""
    if angles is not None:
        q, k = rotate(q, *angles), rotate(k, *angles)
    return rearrange(attend(q, k, v, mask=mask), "b h n d -> b n (h d)")


class Stream(nn.Module):
    """What one kind of tokens has of its own in a double block."""

    def __init__(self, config: MMDiTConfig, *, extra: bool = False) -> None:
        super().__init__()
        self.modulation = Modulation(config.dim, 9 if extra else 6)
        self.attn = Heads(config)
        self.extra = Heads(config) if extra else None
        self.mlp = MLP(config.dim, config.hidden_dim, "gelu_tanh")

    def finish(
        self, x: Float[Tensor, "batch tokens dim"], heard: Float[Tensor, "batch tokens dim"], parts: tuple[Tensor, ...]
    ) -> Float[Tensor, "batch tokens dim"]:
        """``x`` with what attention ``heard``, and the feed-forward layer."""
        _, _, gate, mlp_shift, mlp_scale, mlp_gate, *more = parts
        before = x
        x = x + gate * self.attn.o_proj(heard)
        if self.extra is not None:
            shift, scale, extra_gate = more
            alone = attended(*self.extra(modulated(before, shift, scale)))
            x = x + extra_gate * self.extra.o_proj(alone)
        return x + mlp_gate * self.mlp(modulated(x, mlp_shift, mlp_scale))


class CutStream(nn.Module):
    """The text's in a last double block: it is heard and goes nowhere; its queries are the files', and never train."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.modulation = Modulation(config.dim, 2)
        self.attn = Heads(config, out=False)
        self.attn.q_proj.requires_grad_(False)
        self.attn.q_norm.requires_grad_(False)


class DoubleBlock(nn.Module):
    """Two streams, one attention over the tokens of both."""

    def __init__(self, config: MMDiTConfig, *, extra: bool, cut: bool) -> None:
        super().__init__()
        self.image = Stream(config, extra=extra)
        self.text = CutStream(config) if cut else Stream(config)

    def forward(
        self,
        x: Float[Tensor, "batch patches dim"],
        text: Float[Tensor, "batch words dim"],
        condition: Float[Tensor, "batch #patches dim"],
        told: Float[Tensor, "batch #words dim"],
        angles: Angles | None,
        mask: Bool[Tensor, "batch 1 tokens tokens"] | None = None,
    ) -> tuple[Float[Tensor, "batch patches dim"], Float[Tensor, "batch words dim"]]:
        """``told`` is the condition of the text's tokens; angles and mask are of these, then of the patches."""
        streams = ((self.text, text), (self.image, x))
        parts = [self.text.modulation(told), self.image.modulation(condition)]
        each = [s.attn(modulated(t, p[0], p[1])) for (s, t), p in zip(streams, parts, strict=True)]
        q, k, v = (torch.cat(both, 2) for both in zip(*each, strict=True))
        heard = attended(q, k, v, angles=angles, mask=mask)
        words = text.shape[1]
        if isinstance(self.text, Stream):
            text = self.text.finish(text, heard[:, :words], parts[0])
        return self.image.finish(x, heard[:, words:], parts[1]), text


class SingleBlock(nn.Module):
    """One stream whose attention and feed-forward layer stand side by side and share their way out."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        c = config
        self.modulation = Modulation(c.dim, 3)
        self.attn = Heads(c, out=False)
        self.up_proj = nn.Linear(c.dim, c.hidden_dim)
        self.out_proj = nn.Linear(c.dim + c.hidden_dim, c.dim)

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        condition: Float[Tensor, "batch #tokens dim"],
        angles: Angles | None,
        mask: Bool[Tensor, "batch 1 tokens tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        shift, scale, gate = self.modulation(condition)
        y = modulated(x, shift, scale)
        wide = nn.functional.gelu(self.up_proj(y), approximate="tanh")
        return x + gate * self.out_proj(torch.cat([attended(*self.attn(y), angles=angles, mask=mask), wide], -1))


class MMDiT(nn.Module):
    """Patches of noisy latents, and text, to as many patches."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        c = self.config = config
        self.patch_embed = nn.Linear(c.values, c.dim)
        self.text_embed = nn.Linear(c.context_dim, c.dim)
        self.time = Embedder(WAVES, c.dim)
        self.pooled = Embedder(c.pooled_dim, c.dim)
        self.guidance = Embedder(WAVES, c.dim) if c.guidance else None
        last = c.num_layers - 1 if not c.num_single_layers else None
        self.blocks = nn.ModuleList(
            DoubleBlock(c, extra=i < c.extra_attention, cut=i == last) for i in range(c.num_layers)
        )
        self.single_blocks = nn.ModuleList(SingleBlock(c) for _ in range(c.num_single_layers))
        self.modulation = Modulation(c.dim, 2)
        self.out = nn.Linear(c.dim, c.out_values)
        if isinstance(c.position, CentreCrop):  # in the files, too: rounded as the weights are
            self.register_buffer("position", torch.empty(c.position.side**2, c.dim))
        self.position: Tensor | None

    def places(self, height: int, width: int) -> Float[Tensor, "patches dim"]:
        """The middle of the table.

        Raises:
            MediaError: the table is smaller.
        """
        p = self.config.position
        assert isinstance(p, CentreCrop)
        assert self.position is not None
        if max(height, width) > p.side:
            raise MediaError(f"a grid of {width} x {height} patches; this model has positions for {p.side} x {p.side}")
        top, left = (p.side - height) // 2, (p.side - width) // 2
        table = self.position.view(p.side, p.side, -1)
        return table[top : top + height, left : left + width].flatten(0, 1)

    def forward(
        self,
        patches: Float[Tensor, "batch patches values"],
        grid: tuple[int, int],
        text: Float[Tensor, "batch words context_dim"],
        pooled: Float[Tensor, "batch pooled_dim"],
        t: Float[Tensor, " batch"],
        guidance: Float[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch patches out_values"]:
        """What leads from data to noise.

        Args:
            patches: row by row.
            grid: how many rows and columns of patches.
            text: its tokens.
            pooled: its one vector.
            t: 0 is data, 1 is noise.
            guidance: its strength; of models that have it as a condition, and needed there.

        Raises:
            MediaError: the grid is larger than the table of positions.
        """
        assert patches.shape[1] == grid[0] * grid[1], "a grid has as many patches as there are"
        x, words = self.patch_embed(patches), self.text_embed(text)
        condition = self.condition(pooled, t, guidance).unsqueeze(1)
        angles = None
        if isinstance(self.config.position, AxialRope):
            positions = grid_positions(words.shape[1], *grid, device=x.device)
            cos, sin = (a.expand(len(x), -1, -1, -1) for a in self.config.position.angles(positions))
            angles = cos, sin
        else:
            x = x + self.places(*grid).to(x.dtype)
        return self._through(x, words, condition, condition, angles)

    def packed(
        self,
        patches: Float[Tensor, "batch patches values"],
        position: Int[Tensor, "batch patches 3"],
        owner: Int[Tensor, "batch patches"],
        text: Float[Tensor, "batch words context_dim"],
        text_owner: Int[Tensor, "batch words"],
        pooled: Float[Tensor, "batch clips pooled_dim"],
        t: Float[Tensor, "batch clips"],
    ) -> Float[Tensor, "batch patches out_values"]:
        """Several clips (or pictures) in a row, each with its text and time, which see nothing of one another.

        Args:
            patches: of all clips of a row.
            position: time, row and column of each patch in its clip.
            owner: which clip of the row a patch is of; -1 for padding.
            text: tokens of all clips of a row.
            text_owner: which clip a token is of; -1 for padding.
            pooled: a vector for each clip.
            t: a time for each clip.
        """
        assert isinstance(self.config.position, AxialRope), "places in a table are of one picture"
        x, words = self.patch_embed(patches), self.text_embed(text)
        each = self.condition(pooled, t)

        def of(owners: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens dim"]:
            return each.gather(1, owners.clamp(min=0).unsqueeze(-1).expand(-1, -1, each.shape[-1]))

        everyone = torch.cat([text_owner, owner], 1)
        mask = (everyone[:, :, None] == everyone[:, None, :]).unsqueeze(1)
        places = torch.cat([position.new_zeros(*text_owner.shape, 3), position], 1)
        return self._through(x, words, of(owner), of(text_owner), self.config.position.angles(places), mask)

    def condition(
        self,
        pooled: Float[Tensor, "*batch pooled_dim"],
        t: Float[Tensor, "*batch"],
        guidance: Float[Tensor, "*batch"] | None = None,
    ) -> Float[Tensor, "*batch dim"]:
        """What modulates all layers."""
        assert (guidance is None) == (self.guidance is None), "guidance is for models with a condition for it"

        def waves(value: Tensor) -> Tensor:
            made = step_waves(value.flatten().float() * STEPS, WAVES)
            return made.to(pooled.dtype).unflatten(0, value.shape)

        out = self.time(waves(t)) + self.pooled(pooled)
        if self.guidance is None or guidance is None:
            return out
        return out + self.guidance(waves(guidance))

    def _through(
        self, x: Tensor, words: Tensor, condition: Tensor, told: Tensor, angles: Angles | None,
        mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        for block in self.blocks:
            x, words = block(x, words, condition, told, angles, mask)
        if self.single_blocks:
            joined = torch.cat([words, x], 1)
            both = condition if condition is told else torch.cat([told, condition], 1)
            for block in self.single_blocks:
                joined = block(joined, both, angles, mask)
            x = joined[:, words.shape[1] :]
        return self.out(modulated(x, *self.modulation(condition)))

    @torch.no_grad()
    def init_weights(self) -> None:
        """DiT's, which both papers build on; neither has published what it trained with."""
        basic_init_(self)
        for layer in [*self.time.children(), *(self.guidance.children() if self.guidance is not None else ())]:
            assert isinstance(layer, nn.Linear)
            nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.out.weight)
        zero_modulations_(self)
        if isinstance(p := self.config.position, CentreCrop):
            assert self.position is not None
            self.position.copy_(sincos_2d(self.config.dim, p.side, p.side, apart=p.base / p.side))


def grid_positions(words: int, height: int, width: int, *, device: torch.device) -> Int[Tensor, "1 tokens 3"]:
    """(0, 0, 0) for each word, then (0, row, column) of each patch."""
    rows = torch.arange(height, device=device).repeat_interleave(width)
    columns = torch.arange(width, device=device).repeat(height)
    places = torch.stack([torch.zeros_like(rows), rows, columns], 1)
    return torch.cat([places.new_zeros(words, 3), places]).unsqueeze(0)
