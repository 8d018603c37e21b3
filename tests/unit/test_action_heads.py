"""Heads of actions: what is masked, bins, words, and that each learns what it should."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from polymodal.core.errors import ConfigError, MediaError
from polymodal.encoders.keypoints import SpatialSoftmax
from polymodal.heads.action import NUM_BINS, BinsHead, L1Head, bins, centres, masked
from polymodal.nn.time import waves
from polymodal.systems.chunk_heads import L1, Bins, Choice, Diffusion, Flow, Head
from polymodal.systems.token_head import Tokens
from polymodal.tokenizers.fast import FAST
from polymodal.tokenizers.words import PAD, UNKNOWN, Words

HEADS = [L1(), Bins(), Flow(hidden_dim=64, num_layers=2), Diffusion(hidden_dim=64, num_layers=2)]


@pytest.mark.parametrize("head", HEADS, ids=lambda head: type(head).__name__)
def test_what_is_masked_is_not_learned_whatever_it_is(head: Head) -> None:
    module: Any = head.build(8, 4, 3)
    condition, actions = torch.randn(5, 8), torch.rand(5, 4, 3) * 2 - 1
    mask = torch.ones(5, 4, 3, dtype=torch.bool)
    mask[1, 2:] = False  # past the end of an episode
    mask[3, :, 2] = False  # a number that this robot has not

    def outcome(actions: Tensor) -> tuple[Tensor, float]:
        torch.manual_seed(0)
        loss = module.loss(condition, actions, mask)
        return loss.total, loss.weight

    total, weight = outcome(actions)
    assert weight == 60 - 6 - 4
    if isinstance(head, L1 | Bins):  # a denoiser reads what is noised, and so may depend on it
        other = actions.clone()
        other[~mask] = torch.nan if isinstance(head, L1) else 1e9
        torch.testing.assert_close(outcome(other)[0], total)
    assert outcome(actions)[0] == total
    nothing = module.loss(condition, actions, torch.zeros_like(mask))
    assert (float(nothing.total.detach()), nothing.weight) == (0, 0)


def test_masks_broadcast() -> None:
    error = torch.ones(2, 3, 4)
    valid = torch.tensor([[True, True, False], [True, False, False]])
    assert masked(error, valid[..., None]).weight == 12
    assert masked(error, None).weight == 24


def test_bins_are_equal_and_their_middles_are_near() -> None:
    x = torch.linspace(-1, 1, 100_001)
    numbers = bins(x)
    assert (int(numbers.min()), int(numbers.max())) == (0, NUM_BINS - 1)
    assert numbers.bincount().diff().abs().max() <= 2
    assert (centres(numbers) - x).abs().max() <= 1 / NUM_BINS + 1e-6
    assert bins(torch.tensor([-7.0, 7.0])).tolist() == [0, NUM_BINS - 1]
    torch.testing.assert_close(bins(centres(torch.arange(NUM_BINS))), torch.arange(NUM_BINS))


def test_two_digits_are_one_distribution_over_all_bins() -> None:
    head = BinsHead(8, 2, 3)
    x = torch.randn(4, 8)
    log_probs = head.log_probs(x)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(4, 2, 3))
    actions = torch.rand(4, 2, 3) * 2 - 1
    expected = -log_probs.gather(-1, bins(actions)[..., None])[..., 0]
    torch.testing.assert_close(head.loss(x, actions).total, expected.sum())
    assert torch.equal(bins(head.likeliest(x)), log_probs.argmax(-1))


def test_a_choice_is_drawn_as_often_as_it_was_shown() -> None:
    torch.manual_seed(0)
    head = Choice().build(1, 2, 4)
    x, shown = torch.ones(40, 1), torch.full((40, 2, 4), -1.0)
    shown[:, 0, 3] = 1.0
    shown[:30, 1, 0], shown[30:, 1, 2] = 1.0, 1.0
    mask = torch.ones(40, 2, 4, dtype=torch.bool)
    mask[:, :, 1] = False  # a number that this robot has not: never drawn
    mask[35:, 1] = False  # past the end
    assert head.loss(x, shown, mask).weight == 75
    optimizer = torch.optim.Adam(head.parameters(), lr=5e-2)
    for _ in range(200):
        optimizer.zero_grad()
        head.loss(x, shown, mask).mean.backward()
        optimizer.step()
    drawn = head.predict(torch.ones(4000, 1), torch.Generator().manual_seed(0))
    assert torch.equal(drawn.sum(-1), torch.full((4000, 2), -2.0)), "one of four"
    often = (drawn > 0).float().mean(0)
    torch.testing.assert_close(often, torch.tensor([[0, 0, 0, 1], [30 / 35, 0, 5 / 35, 0]]), atol=0.03, rtol=0)


def test_bins_fit_a_distribution_of_two_peaks() -> None:
    """Where demonstrators differ, the mean (what L1 and squares learn) is what nobody did; a bin is not."""
    torch.manual_seed(0)
    head, plain = BinsHead(1, 1, 1), L1Head(1, 1, 1)
    x, actions = torch.ones(64, 1), torch.where(torch.arange(64) < 38, -0.7, 0.45).view(-1, 1, 1)
    for module in (head, plain):
        optimizer = torch.optim.Adam(module.parameters(), lr=3e-2)
        for _ in range(150):
            optimizer.zero_grad()
            module.loss(x, actions).mean.backward()
            optimizer.step()
    probs = head.log_probs(x[:1]).exp().flatten()
    at = bins(torch.tensor([-0.7, 0.45]))
    assert probs[at].tolist() == pytest.approx([38 / 64, 26 / 64], abs=0.05)
    assert float(head.likeliest(x[:1])) == pytest.approx(-0.7, abs=1 / NUM_BINS)


@pytest.mark.parametrize("head", HEADS, ids=lambda head: type(head).__name__)
def test_each_head_learns_a_chunk_that_depends_on_what_it_is_told(head: Head) -> None:
    torch.manual_seed(0)
    module: Any = head.build(4, 4, 2)
    if hasattr(module, "init_weights"):
        module.init_weights()
    told = torch.randn(256, 4)
    steps = torch.arange(4)[None, :, None]
    actions = (told[:, None, :2] + 0.3 * steps * told[:, None, 2:]).tanh() * 0.9
    mask = torch.ones_like(actions, dtype=torch.bool)
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    for _ in range(250):
        optimizer.zero_grad()
        module.loss(told, actions, mask).mean.backward()
        optimizer.step()
    with torch.no_grad():
        error = (module.predict(told, torch.Generator().manual_seed(1)) - actions).abs().mean()
    assert error < {"L1": 0.2, "Bins": 0.25}.get(type(head).__name__, 0.2), error
    assert error < 0.5 * (actions - actions.mean(0)).abs().mean()


def test_a_head_of_tokens_learns_and_writes_nothing_but_chunks() -> None:
    torch.manual_seed(0)
    told = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    actions = torch.stack([torch.linspace(-0.8, 0.6, 8)[:, None], torch.linspace(0.7, -0.2, 8)[:, None]])
    fast = FAST.fit(torch.rand(50, 8, 1) * 2 - 1, scale=10.0, vocab_size=300)
    head = Tokens(vocab_size=300, hidden_dim=32, num_layers=1, num_heads=2).build(2, 8, 1)
    head.init_weights()
    written = fast.encode(actions)
    labels = torch.full((2, max(map(len, written))), -100)
    for row, ids in enumerate(written):
        labels[row, : len(ids)] = torch.tensor(ids)
    fresh = head.predict(torch.randn(2, 2), fast)  # untrained, and yet a chunk
    assert fresh.shape == actions.shape
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        loss = head.loss(told, labels)
        loss.mean.backward()
        optimizer.step()
    assert loss.weight == sum(map(len, written))
    torch.testing.assert_close(head.predict(told, fast), fast.decode(written))


def test_words_are_numbers_and_unknown_ones_are_one_word() -> None:
    words = Words(words=Words.of(["Put the red cup on the blue plate!"]), context=8)
    assert words.words == ("blue", "cup", "on", "plate", "put", "red", "the")
    ids = words(["put the RED cup", "please put it on the plate.", ""])
    assert ids.shape == (3, 6)
    assert ids[0].tolist() == [6, 8, 7, 3, PAD, PAD]
    assert ids[1].tolist() == [UNKNOWN, 6, UNKNOWN, 4, 8, 5]
    assert ids[2, 0] == UNKNOWN
    with pytest.raises(MediaError, match="9 words; the policy reads at most 8"):
        words(["a b c d e f g h i"])
    for bad in (("two words",), ("Put",), ("cup", "cup"), ("",)):
        with pytest.raises(ConfigError):
            Words(words=bad, context=8)


def test_a_spatial_softmax_says_where() -> None:
    layer = SpatialSoftmax(1, 1, (5, 9))
    with torch.no_grad():
        layer.nets.weight.fill_(1)
        layer.nets.bias = None
    x = torch.zeros(3, 1, 5, 9)
    x[0, 0, 0, 8], x[1, 0, 4, 4] = 100, 100
    torch.testing.assert_close(layer(x)[:, 0], torch.tensor([[1.0, -1.0], [0.0, 1.0], [0.0, 0.0]]), atol=1e-5, rtol=0)


def test_waves_have_the_periods_that_they_are_told() -> None:
    """openpi's sines and cosines of a time: periods from 4e-3 to 4."""
    t = torch.tensor([0.0, 0.25, 1.0])
    out = waves(t, 6, shortest=4e-3, longest=4.0)
    for row, time in enumerate(t.tolist()):
        angles = torch.tensor([2 * torch.pi * time / period for period in (4e-3, 4e-3 * 1000**0.5, 4.0)])
        torch.testing.assert_close(out[row], torch.cat([angles.sin(), angles.cos()]), atol=1e-3, rtol=0)
    # the table of "Attention is all you need" that has its last frequency at 1 / 10,000
    steps = torch.tensor([0, 7, 99])
    frequency = 10_000 ** -(torch.arange(4) / 3)
    expected = torch.cat([(steps[:, None] * frequency).sin(), (steps[:, None] * frequency).cos()], 1)
    torch.testing.assert_close(waves(steps, 8, shortest=2 * torch.pi, longest=2e4 * torch.pi), expected)
