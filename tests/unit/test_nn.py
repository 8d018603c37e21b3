"""Leaves and towers: kernels agree, rows agree, positions, precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from polymodal.core.errors import ConfigError, MediaError
from polymodal.core.sample import Sample
from polymodal.encoders.text import TextConfig, TextTower
from polymodal.encoders.vit import ViT, ViTConfig
from polymodal.nn.attention import Attention, attend
from polymodal.nn.block import Block, DropPath
from polymodal.nn.mlp import quick_gelu
from polymodal.nn.position import resize_grid, sincos_2d
from polymodal.nn.precision import cast
from tests.nano import nano


@given(st.integers(1, 5), st.integers(1, 7), st.booleans(), st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_training_kernel_equals_the_fused_one(queries: int, keys: int, masked: bool, causal: bool) -> None:
    generator = torch.Generator().manual_seed(queries * 100 + keys)
    q, k, v = (torch.randn(2, 3, n, 4, generator=generator) for n in (queries, keys, keys))
    mask = None
    if masked and not causal:
        mask = torch.rand(2, 1, queries, keys, generator=generator) < 0.7
        mask[..., 0] = True
    assert torch.is_grad_enabled()
    ours = attend(q, k, v, mask=mask, causal=causal)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal))


def test_attention_by_hand() -> None:
    torch.manual_seed(0)
    attention, x = Attention(8, 2), torch.randn(1, 5, 8)
    q, k, v = (p(x)[0].view(5, 2, 4).detach().numpy() for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    heads = []
    for h in range(2):
        scores = q[:, h] @ k[:, h].T / 2
        weights = np.exp(scores - scores.max(1, keepdims=True))
        heads.append(weights / weights.sum(1, keepdims=True) @ v[:, h])
    expected = attention.o_proj(torch.from_numpy(np.concatenate(heads, 1)))
    torch.testing.assert_close(attention(x)[0], expected)


def test_a_block_computes_single_rows_as_it_computes_all() -> None:
    block, x = Block(8, 2, 16), torch.randn(3, 6, 8)
    torch.testing.assert_close(block.forward_rows(x, x[:, 2:4]), block(x)[:, 2:4])


def test_class_vector_is_the_first_row_of_forward() -> None:
    tower = tiny_vit()
    pixels = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(tower.class_vector(pixels), tower(pixels).x[:, 0])


def tiny_vit(**more: object) -> ViT:
    config = ViTConfig(image_size=16, patch_size=4, dim=16, num_layers=2, num_heads=2, hidden_dim=32, **more)  # type: ignore[arg-type]
    tower = ViT(config)
    for p in tower.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return tower


@pytest.mark.parametrize("size", [(16, 16), (8, 24), (4, 4), (20, 12)])
def test_a_tower_gives_the_tokens_that_its_config_counts(size: tuple[int, int]) -> None:
    tower = tiny_vit(num_registers=2)
    tokens = tower(torch.randn(1, 3, *size))
    assert tokens.shape[1] == tower.config.count(*size)
    assert tokens.position[0, -1].tolist() == [size[0] // 4 - 1, size[1] // 4 - 1]


def test_a_picture_that_is_no_whole_number_of_patches_is_refused() -> None:
    with pytest.raises(MediaError, match="18 x 16"):
        tiny_vit()(torch.randn(1, 3, 18, 16))
    with pytest.raises(ConfigError, match="multiple of num_heads"):
        tiny_vit(num_channels=3).config.__class__(
            image_size=16, patch_size=4, dim=10, num_layers=1, num_heads=3, hidden_dim=8
        )


def test_a_causal_tower_does_not_see_what_comes_later_and_a_full_one_does() -> None:
    shape = {"vocab_size": 20, "context": 8, "dim": 16, "num_layers": 2, "num_heads": 2, "hidden_dim": 32}
    ids = torch.randint(0, 20, (2, 8))
    changed = ids.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 20
    for causal in (True, False):
        tower = TextTower(TextConfig(**shape, causal=causal))  # type: ignore[arg-type]
        for p in tower.parameters():
            torch.nn.init.normal_(p, std=0.3)
        same = torch.allclose(tower(ids).x[:, :5], tower(changed).x[:, :5], atol=1e-5)
        assert same == causal
    with pytest.raises(MediaError, match="at most 8"):
        tower(torch.zeros(1, 9, dtype=torch.int64))


def test_quick_gelu_is_not_gelu_but_near() -> None:
    x = torch.linspace(-6, 6, 200)
    gap = (quick_gelu(x) - F.gelu(x)).abs().max()
    assert 0.01 < gap < 0.03


def test_positions_keep_their_corners_when_resized_and_are_untouched_at_their_size() -> None:
    table = torch.randn(16, 5)
    assert resize_grid(table, 4, 4) is table
    ramp = torch.arange(4.0)[:, None, None].expand(4, 4, 1).reshape(16, 1)
    resized = resize_grid(ramp, 8, 8).view(8, 8)
    assert (resized.diff(dim=0) > -1e-4).all()
    torch.testing.assert_close(resized[:, 0], resized[:, 5])


def test_sincos_table_has_unit_pairs_and_tells_rows_from_columns() -> None:
    table = sincos_2d(16, 3, 5).view(3, 5, 16)
    torch.testing.assert_close(table[..., :4] ** 2 + table[..., 4:8] ** 2, torch.ones(3, 5, 4))
    assert torch.equal(table[0, :, :8], table[2, :, :8])
    assert torch.equal(table[:, 0, 8:], table[:, 4, 8:])
    assert not torch.equal(table[0, 1, :8], table[0, 2, :8])


def test_drop_path_keeps_the_mean_and_drops_whole_samples() -> None:
    torch.manual_seed(0)
    out = DropPath(0.25).train()(torch.ones(4000, 3))
    torch.testing.assert_close(out.unique(), torch.tensor([0.0, 4 / 3]))
    assert abs(float(out.mean()) - 1) < 0.05
    assert torch.equal(out, out[:, :1].expand(-1, 3))
    assert torch.equal(DropPath(0.25).eval()(out), out)


@pytest.mark.parametrize("name", ["clip", "siglip", "siglip2", "vit", "dinov2", "mae"])
def test_bf16_keeps_the_direction_of_vectors_and_the_fp32_islands(name: str) -> None:
    model = nano(name).eval()
    noise = np.random.default_rng(0).integers(0, 256, (4, 20, 20, 3), np.uint8)
    batch = model.prepare([Sample.of(picture) for picture in noise])
    with torch.inference_mode():
        exact = model.encode(batch)
        close = cast(model, "bf16").encode(batch)
    assert close.dtype == torch.float32
    assert F.cosine_similarity(exact, close).min() > 0.999
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if n.startswith("head.logit"))
