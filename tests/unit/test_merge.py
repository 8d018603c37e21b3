"""Merging and pooling of tokens: what must stay the same whatever is merged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from polymodal.connectors.merge import Matching, match, most_merged, pool_space, pool_time, size_bias, strided
from polymodal.core.errors import ConfigError

shapes = st.tuples(st.integers(1, 3), st.integers(2, 24), st.integers(1, 6))


@st.composite
def matchings(draw: Any) -> tuple[torch.Tensor, torch.Tensor, int, int, Matching]:
    batch, tokens, dim = draw(shapes)
    protected = draw(st.integers(0, min(2, tokens)))
    r = draw(st.integers(0, most_merged(tokens, protected)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    x = torch.randn(batch, tokens, dim, generator=generator, dtype=torch.float64)
    sizes = torch.randint(1, 5, (batch, tokens), generator=generator).double()
    return x, sizes, r, protected, match(x, r, protected=protected)


@given(matchings())
def test_sizes_and_weighted_sums_are_kept(drawn: Any) -> None:
    x, sizes, r, protected, matching = drawn
    merged, total = matching.merge(x, sizes)
    assert merged.shape == (x.shape[0], x.shape[1] - r, x.shape[2])
    torch.testing.assert_close(total.sum(1), sizes.sum(1))
    torch.testing.assert_close((merged * total[..., None]).sum(1), (x * sizes[..., None]).sum(1))
    torch.testing.assert_close(merged[:, :protected], x[:, :protected])
    assert matching.merge(x)[1].sum(1).eq(x.shape[1]).all()
    # Every place is taken, by a token that was not merged, in the order that they had.
    for targets in matching.target.tolist():
        assert sorted(set(targets)) == list(range(x.shape[1] - r))


@given(matchings())
def test_unmerged_tokens_are_the_means_of_their_group(drawn: Any) -> None:
    x, sizes, _, _, matching = drawn
    merged, _ = matching.merge(x, sizes)
    back = matching.unmerge(merged)
    assert back.shape == x.shape
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):
            group = matching.target[b] == matching.target[b, i]
            mean = (x[b, group] * sizes[b, group, None]).sum(0) / sizes[b, group].sum()
            torch.testing.assert_close(back[b, i], mean)
    torch.testing.assert_close(matching.merge(back, sizes)[0], merged)


@given(matchings())
def test_a_merge_is_the_matching_by_hand(drawn: Any) -> None:
    x, _, r, protected, matching = drawn
    unit = F.normalize(x.float(), dim=-1)
    for b in range(x.shape[0]):
        pairs = []
        for i in range(protected, x.shape[1], 2):
            others = range(protected + 1, x.shape[1], 2)
            if others:
                scores = [float(unit[b, i] @ unit[b, j]) for j in others]
                pairs.append((max(scores), i, others[max(range(len(scores)), key=scores.__getitem__)]))
        worst = sorted((score for score, _, _ in pairs), reverse=True)[r - 1] if r else 2.0
        together = {
            (i, j)
            for i in range(x.shape[1])
            for j in range(x.shape[1])
            if i != j and matching.target[b, i] == matching.target[b, j]
        }
        for score, i, j in pairs:
            if score > worst + 1e-5:
                assert (i, j) in together or x.shape[2] == 1  # in one dimension, many are equally like
            elif score < worst - 1e-5:
                assert not any(i in pair for pair in together)


def test_no_merging_is_the_identity() -> None:
    x = torch.randn(2, 7, 3)
    matching = match(x, 0)
    sizes = torch.rand(2, 7) + 1
    merged, total = matching.merge(x, sizes)
    assert torch.equal(merged, x)
    assert torch.equal(total, sizes)
    assert torch.equal(matching.unmerge(merged), x)


def test_merging_equal_tokens_loses_nothing() -> None:
    first, second = torch.randn(2, 1, 5)
    x = torch.stack([first, second, first, second, first, second, second, first], dim=1)
    matching = match(x, 4)
    merged, sizes = matching.merge(x)
    torch.testing.assert_close(matching.unmerge(merged), x)
    assert sizes.sum() == 8
    # Attention over what is left, with the log of the sizes, is the attention over all.
    query = torch.randn(1, 2, 3, 5)
    full = F.scaled_dot_product_attention(query, x[:, None].expand(-1, 2, -1, -1), x[:, None].expand(-1, 2, -1, -1))
    few = merged[:, None].expand(-1, 2, -1, -1)
    torch.testing.assert_close(F.scaled_dot_product_attention(query, few, few, attn_mask=size_bias(sizes)), full)
    assert not torch.allclose(F.scaled_dot_product_attention(query, few, few), full, atol=1e-4)


def test_order_is_kept() -> None:
    keys = F.one_hot(torch.tensor([0, 1, 2, 1, 3, 4, 5, 6]), 7).float()[None]  # 1 and 3 are alike, at odd places
    keys[0, 2] = keys[0, 1]
    matching = match(keys, 1)
    assert matching.target.tolist() == [[0, 1, 1, 2, 3, 4, 5, 6]]


def test_gradients_reach_every_token() -> None:
    x = torch.randn(2, 9, 4, dtype=torch.float64, requires_grad=True)
    sizes = torch.rand(2, 9, dtype=torch.float64) + 1
    matching = match(x.detach(), 4, protected=1)
    assert torch.autograd.gradcheck(lambda t: matching.merge(t, sizes)[0], (x,))
    matching.unmerge(matching.merge(x, sizes)[0]).square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum(-1).gt(0).all()


def test_large_sizes_in_bf16() -> None:
    x = torch.ones(1, 4, 2, dtype=torch.bfloat16)
    merged, sizes = match(x, 2).merge(x, torch.tensor([[1000.0, 3.0, 1.0, 1.0]]))
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, torch.ones_like(merged))
    assert sizes.sum() == 1005


def test_what_cannot_be_merged_is_refused() -> None:
    assert [most_merged(n) for n in range(5)] == [0, 0, 1, 2, 2]
    assert most_merged(5, protected=1) == 2
    for tokens, r, protected in ((4, 3, 0), (5, 3, 1), (1, 1, 0), (4, -1, 0)):
        with pytest.raises(ConfigError, match="cannot be merged at once"):
            match(torch.randn(1, tokens, 2), r, protected=protected)


# ---- pooling ----


@pytest.mark.parametrize("how", ["bilinear", "average"])
def test_pooling_in_space(how: Any) -> None:
    assert strided((27, 27), 2) == (14, 14)
    assert strided((5, 8), 3) == (2, 3)
    x = torch.randn(2, 3, 27 * 27, 4)
    pooled = pool_space(x, (27, 27), strided((27, 27), 2), how)
    assert pooled.shape == (2, 3, 196, 4)
    torch.testing.assert_close(pool_space(x, (27, 27), (27, 27), how), x)
    torch.testing.assert_close(pool_space(torch.ones(1, 12, 2), (3, 4), (2, 3), how), torch.ones(1, 6, 2))
    # Rows and columns are not exchanged: a ramp along the columns stays one.
    ramp = torch.arange(6.0).repeat(4)[None, :, None]
    torch.testing.assert_close(
        pool_space(ramp, (4, 6), (2, 3), how), torch.tensor([0.5, 2.5, 4.5]).repeat(2)[None, :, None]
    )


def test_bilinear_is_that_of_the_reference() -> None:
    x = torch.randn(3, 27 * 27, 5)
    image = x.view(3, 27, 27, 5).permute(0, 3, 1, 2)
    expected = F.interpolate(image, size=[14, 14], mode="bilinear").permute(0, 2, 3, 1).reshape(3, 196, 5)
    assert torch.equal(pool_space(x, (27, 27), (14, 14)), expected)


def test_average_of_what_divides_is_the_mean() -> None:
    x = torch.randn(1, 24, 2, requires_grad=True)
    blocks = x.view(1, 2, 2, 2, 3, 2).mean((2, 4)).view(1, 4, 2)
    pooled = pool_space(x, (4, 6), (2, 2), "average")
    torch.testing.assert_close(pooled, blocks)
    pooled.sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 1 / 6))


def test_pooling_in_time() -> None:
    x = torch.randn(2, 6, 3, 4)
    torch.testing.assert_close(pool_time(x, 6), x)
    torch.testing.assert_close(pool_time(x, 1)[:, 0], x.mean(1))
    torch.testing.assert_close(pool_time(x, 3), x.view(2, 3, 2, 3, 4).mean(2))
    torch.testing.assert_close(pool_time(torch.ones(1, 7, 1, 2), 3), torch.ones(1, 3, 1, 2))


def test_impossible_pooling_is_refused() -> None:
    with pytest.raises(ConfigError, match="12 tokens are not a grid of 3 x 5"):
        pool_space(torch.ones(1, 12, 2), (3, 5), (1, 1))
    with pytest.raises(ConfigError, match="cannot be pooled to 0 x 1"):
        pool_space(torch.ones(1, 12, 2), (3, 4), (0, 1))
    for frames in (0, 4):
        with pytest.raises(ConfigError, match="3 frames cannot be pooled"):
            pool_time(torch.ones(1, 3, 1, 2), frames)
