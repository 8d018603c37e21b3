"""Two stacks that share attention: the trunk read once equals both computed together; no block sees a later one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from einops import rearrange
from torch import Tensor

from polymodal.backbones.decoder import DecoderBlock, DecoderConfig, Gated, Learned, Window
from polymodal.backbones.experts import ExpertBlock, ExpertConfig, Experts
from polymodal.core.errors import ConfigError
from polymodal.core.tokens import Modality, Tokens
from polymodal.nn.norm import AdaptiveRMS, OffsetRMS
from polymodal.nn.rope import rotate
from tests.nano import NANO, shaken

TRUNK = NANO["paligemma"].backbone
LAYOUTS = {"pi0": [0, 1, 1, 1, 1], "pi0.5": [0, 0, 0, 0]}
LENGTHS = [7, 4, 1]  # valid tokens of the prefix of each row


def backbone(name: str) -> Experts:
    torch.manual_seed(0)
    norm = OffsetRMS() if name == "pi0" else AdaptiveRMS()
    model = Experts(TRUNK, ExpertConfig(dim=16, mlp=Gated(hidden_dim=24, activation="gelu_tanh"), norm=norm))
    model.init_weights()
    return shaken(model).double()


def inputs(name: str, seed: int = 1) -> tuple[Tokens, Tokens, Tensor | None]:
    """A ragged prefix, what stands behind it, and what adaptive norms are told."""
    generator = torch.Generator().manual_seed(seed)
    rows, block = len(LENGTHS), torch.tensor(LAYOUTS[name])
    x = torch.randn(rows, max(LENGTHS), TRUNK.dim, generator=generator, dtype=torch.float64)
    y = torch.randn(rows, len(block), 16, generator=generator, dtype=torch.float64)
    valid = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    position = (valid.cumsum(1) - 1).unsqueeze(-1)
    prefix = Tokens.of(x, causal=False, modality=Modality.TEXT, valid=valid, position=position)
    behind = replace(Tokens.of(y, causal=False, modality=Modality.ACTION), block=block.expand(rows, -1))
    condition = torch.randn(rows, 16, generator=generator, dtype=torch.float64) if name == "pi0.5" else None
    return prefix, behind, condition


def openpi_mask(valid: Tensor, block: Tensor) -> Tensor:
    """Their rule: True where the blocks, counted up from the prefix, do not go down, and both tokens are there."""
    blocks = torch.cat([torch.zeros(valid.shape[1], dtype=torch.long), 1 + block])
    there = torch.cat([valid, torch.ones(len(valid), len(block), dtype=torch.bool)], 1)
    return (blocks[:, None] >= blocks[None]) & there[:, :, None] & there[:, None]


def together(model: Experts, prefix: Tokens, behind: Tokens, condition: Tensor | None) -> Tensor:
    """Both stacks in step, layer by layer, under one softmax over all tokens: as the papers draw it."""
    a, b, split = prefix.x, behind.x, prefix.shape[1]
    mask = openpi_mask(prefix.valid, behind.block[0])
    place = torch.cat([prefix.valid, torch.ones_like(behind.block, dtype=torch.bool)], 1).cumsum(1) - 1
    rotary = model.trunk.config.position.angles(place.unsqueeze(-1), 8)  # type: ignore[union-attr]
    rotary = tuple(each.double() for each in rotary)

    def norm(module: torch.nn.Module, x: Tensor) -> tuple[Tensor, Tensor | float]:
        return (module(x), 1.0) if condition is None else module(x, condition)

    for one, other in zip(model.trunk.blocks, model.expert.blocks, strict=True):
        assert isinstance(one, DecoderBlock)
        assert isinstance(other, ExpertBlock)
        normed, gate = norm(other.attn_norm, b)
        parts = zip(one.attn.project(one.attn_norm(a), None), other.attn.project(normed, None), strict=True)
        q, k, v = (torch.cat(part, 2) for part in parts)
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        scores = (q @ k.transpose(-1, -2) * 8**-0.5).masked_fill(~mask[:, None], -1e30)
        out = rearrange(scores.softmax(-1) @ v, "b h n d -> b n (h d)")
        a = a + one.attn.o_proj(out[:, :split])
        a = a + one.mlp(one.mlp_norm(a))
        b = b + gate * other.attn.o_proj(out[:, split:])
        normed, gate = norm(other.mlp_norm, b)
        b = b + gate * other.mlp(normed)
    return norm(model.expert.norm, b)[0]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.proves("pi0", "the cached prefix equals full recomputation")
@pytest.mark.proves("pi05", "the cached prefix equals full recomputation")
def test_a_prefix_that_is_kept_equals_both_computed_together(name: str) -> None:
    """Values to 1e-9 in fp64, and gradients of everything that trains."""
    model = backbone(name)
    prefix, behind, condition = inputs(name)
    kept = model(behind.x, model.read(prefix, behind), condition)
    whole = together(model, prefix, behind, condition)
    torch.testing.assert_close(kept, whole, atol=1e-9, rtol=1e-9)
    weight = torch.randn(kept.shape, generator=torch.Generator().manual_seed(2), dtype=kept.dtype)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and "embed_tokens" not in n}
    ours = torch.autograd.grad((kept * weight).sum(), list(trained.values()))
    theirs = torch.autograd.grad((whole * weight).sum(), list(trained.values()))
    for parameter, one, other in zip(trained, ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-8, rtol=1e-8, msg=parameter)
        assert bool(one.any()), parameter


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_prefix_is_read_again_and_again(name: str) -> None:
    """As a sampler does, in fp32: each step what both computed together give, to 1e-6."""
    model = backbone(name).float()
    prefix, behind, condition = inputs(name)
    prefix, x = prefix.with_x(prefix.x.float()), behind.x.float()
    condition = None if condition is None else condition.float()
    kept = model.read(prefix, behind)
    with torch.no_grad():
        for _ in range(10):
            out = model(x, kept, condition)
            whole = together(model, prefix, behind.with_x(x), condition)
            assert float((out - whole).norm() / whole.norm()) <= 1e-6
            x = x - 0.1 * out


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_mask_is_exactly_that_of_the_blocks(name: str) -> None:
    model = backbone(name)
    prefix, behind, _ = inputs(name)
    seen = model.read(prefix, behind).view.sight.mask
    assert seen is not None
    assert torch.equal(seen[:, 0], openpi_mask(prefix.valid, behind.block[0])[:, -behind.shape[1] :])


def test_no_block_sees_a_later_one() -> None:
    """What is changed changes nothing before it, and something in its own block."""
    model = backbone("pi0")
    prefix, behind, _ = inputs("pi0")
    kept = model.read(prefix, behind)
    before = model(behind.x, kept)
    x = behind.x.clone()
    x[:, 3] += 1.0  # an action
    after = model(x, kept)
    assert torch.equal(after[:, 0], before[:, 0]), "the state saw an action"
    assert all(bool((after[:, i] != before[:, i]).any()) for i in (1, 2, 3, 4)), "actions see one another"
    x = behind.x.clone()
    x[:, 0] += 1.0  # the state
    other = model.read(prefix, behind.with_x(x))
    assert all(
        torch.equal(a, b)
        for one, two in zip(kept.layers, other.layers, strict=True)
        for a, b in zip(one, two, strict=True)
    )
    assert bool((model(x, kept)[:, 1:] != before[:, 1:]).any(2).all()), "actions see the state"


def test_padding_is_seen_by_nothing() -> None:
    model = backbone("pi0")
    prefix, behind, _ = inputs("pi0")
    out = model(behind.x, model.read(prefix, behind))
    noisy = torch.where(prefix.valid.unsqueeze(-1), prefix.x, 100 * torch.randn_like(prefix.x))
    assert torch.equal(model(behind.x, model.read(prefix.with_x(noisy), behind)), out)
    for row, length in enumerate(LENGTHS):
        alone = Tokens.of(prefix.x[row : row + 1, :length], causal=False, modality=Modality.TEXT)
        here = Tokens(**{name: getattr(behind, name)[row : row + 1] for name in vars(behind)})
        torch.testing.assert_close(model(here.x, model.read(alone, here)), out[row : row + 1], atol=1e-9, rtol=1e-9)


def test_closed_gates_pass_what_comes_in() -> None:
    """adaRMS as it starts: the layers add nothing, the last norm only norms."""
    torch.manual_seed(0)
    model = Experts(TRUNK, ExpertConfig(dim=16, mlp=Gated(hidden_dim=24), norm=AdaptiveRMS()))
    model.init_weights()
    prefix, behind, condition = inputs("pi0.5")
    prefix, x = prefix.with_x(prefix.x.float()), behind.x.float()
    assert condition is not None
    out = model(x, model.read(prefix, behind), condition.float())
    torch.testing.assert_close(out, x / x.square().mean(-1, keepdim=True).add(1e-6).sqrt())
    weight = model.get_parameter("expert.blocks.0.attn.q_proj.weight")
    assert float(weight.detach().std()) == pytest.approx(16**-0.5, rel=0.1)


@pytest.mark.parametrize(
    "trunk", [replace(TRUNK, position=Learned(count=9)), replace(TRUNK, window=Window(size=4, layers=(0,)))]
)
def test_other_trunks_are_refused(trunk: DecoderConfig) -> None:
    with pytest.raises(ConfigError, match="plain rotary positions"):
        Experts(trunk, ExpertConfig(dim=16, mlp=Gated(hidden_dim=24)))
