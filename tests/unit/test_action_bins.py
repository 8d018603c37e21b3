"""Actions as bins: every number comes back to within a bin, and nothing but a bin is ever decoded."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from polymodal.core.errors import ConfigError, MediaError
from polymodal.modalities.action import Normaliser, Statistics, round_trip
from polymodal.samplers.autoregressive import Constraint, Guide
from polymodal.tokenizers.action_bins import TextBins, UniformBins, VocabularyBins, state_text

LLAMA = VocabularyBins(vocab_size=32000)


def test_rt1_bins_lie_between_the_limits() -> None:
    bins = UniformBins(low=(-0.1, 0.0), high=(0.1, 3.0))
    x = torch.stack((torch.linspace(-0.1, 0.1, 9999), torch.linspace(0, 3, 9999)), -1)
    ids = bins.encode(x)
    assert [ids.min(), ids.max()] == [0, 255]
    assert (bins.decode(ids) - x).abs().amax(0).tolist() == pytest.approx([0.1 / 255, 1.5 / 255], rel=1e-2)
    wild = torch.tensor([[-torch.inf, 1e30], [torch.inf, -7.0]])
    assert bins.encode(wild).tolist() == [[0, 255], [255, 0]]
    torch.testing.assert_close(bins.decode(torch.tensor([[0, 255]])), torch.tensor([[-0.1, 3.0]]))


@pytest.mark.parametrize(
    ("low", "high", "count"), [((0.0,), (0.0,), 256), ((0.0,), (1.0, 2.0), 256), ((0.0,), (1.0,), 1)]
)
def test_rt1_bins_need_limits(low: tuple[float, ...], high: tuple[float, ...], count: int) -> None:
    with pytest.raises(ConfigError):
        UniformBins(low=low, high=high, count=count)


def test_openvla_ids_are_those_of_its_code() -> None:
    x = np.concatenate([np.linspace(-1.2, 1.2, 4001), np.linspace(-1, 1, 256), [-1.0, 1.0]]).astype(np.float32)
    edges = np.linspace(-1, 1, 256)
    theirs = 32000 - np.digitize(np.clip(x, -1, 1), edges)
    ids = LLAMA.encode(torch.from_numpy(x))
    assert np.array_equal(ids.numpy(), theirs)
    assert {int(ids.min()), int(ids.max())} == {31744, 31999}
    centres = (edges[1:] + edges[:-1]) / 2
    np.testing.assert_allclose(LLAMA.decode(ids), centres[np.clip(32000 - theirs - 1, 0, 254)], atol=1e-7)
    assert (LLAMA.decode(ids) - torch.from_numpy(x).clamp(-1, 1)).abs().max() <= 1 / 255 + 1e-6


@pytest.mark.parametrize("word", [1, 500, 15000, 31743, 32000, 0, -1])
def test_a_word_is_no_action(word: int) -> None:
    """The common code clips: each of these moves a joint to +0.996 or -0.996."""
    with pytest.raises(MediaError, match="no actions"):
        LLAMA.decode(torch.tensor([31800, word]))
    with pytest.raises(MediaError):
        UniformBins(low=(0.0, 0.0), high=(1.0, 1.0)).decode(torch.tensor([256, word % 256]))


def test_what_is_not_a_number_has_no_bin() -> None:
    nan = torch.tensor([[0.0, torch.nan]])
    encoders = (LLAMA.encode, TextBins(dim=2).encode, UniformBins(low=(0.0, 0.0), high=(1.0, 1.0)).encode, state_text)
    for encode in encoders:
        with pytest.raises(MediaError):
            encode(nan)


def test_sampling_under_the_constraint_gives_actions_only() -> None:
    generator = torch.Generator().manual_seed(0)
    constraint = LLAMA.constraint(7, size=32064, after=[2])
    assert isinstance(constraint, Constraint)
    for _ in range(50):
        guide, written = constraint.start(), []
        assert isinstance(guide, Guide)
        while not guide.ended:
            scores = torch.randn(32064, generator=generator)
            scores[17] = 1e9  # a word that the model is very sure of
            token = int(scores.masked_fill(~guide.allowed(), -torch.inf).argmax())
            branch = guide.copy()
            guide.take(token)
            assert not branch.ended
            written.append(token)
        assert len(written) == 8
        assert written[-1] == 2
        assert LLAMA.decode(torch.tensor(written[:7])).abs().max() <= 1


def test_rt2_texts_round_trip() -> None:
    bins = TextBins(dim=3)
    x = torch.rand(200, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    texts = bins.encode(x)
    assert bins.encode(torch.tensor([[-2.0, 0.01, 5.0]])) == ["0 129 255"]
    assert (bins.decode(texts) - x).abs().max() <= 1 / 255 + 1e-6
    assert all(re.fullmatch(bins.pattern, text) for text in texts)
    assert bins.decode([" 1 2 3\n"]).shape == (1, 3)


@pytest.mark.parametrize(
    "text", ["", "1 2", "1 2 3 4", "1 2 256", "1 2 -3", "1 2 three", "1 2 3.0", "1  2 3", "1 2 03", "1 2 ٣", "9" * 5000]
)
def test_a_text_that_is_no_action(text: str) -> None:
    with pytest.raises(MediaError):
        TextBins(dim=3).decode(["1 2 3", text])


def test_states_are_written_as_openpi_does() -> None:
    x = np.concatenate([np.random.default_rng(0).uniform(-1.3, 1.3, 500), np.linspace(-1, 1, 257), [-9, 9]])
    x = x.astype(np.float32)
    theirs = np.digitize(x, np.linspace(-1, 1, 257)[:-1]) - 1
    assert state_text(torch.from_numpy(x)[None]) == [" ".join(map(str, theirs))]
    assert state_text(torch.tensor([[-5.0, -1.0, 0.0, 1.0, 5.0]])) == ["-1 0 128 255 255"]


def test_round_trip_is_within_a_256th_of_the_range() -> None:
    """In the robot's units, for each dimension; the statistics' extremes are the range."""
    rng = np.random.default_rng(0)
    x = rng.uniform([-0.05, -3, 0, 100], [0.05, 3, 1, 900], (5000, 4)).astype(np.float32)
    n = Normaliser(statistics=Statistics.from_array(x), kind="minmax")
    rt1 = UniformBins(low=(-1.0,) * 4, high=(1.0,) * 4)
    for decode in (lambda y: LLAMA.decode(LLAMA.encode(y)), lambda y: rt1.decode(rt1.encode(y))):
        report = round_trip(torch.from_numpy(x), n, decode)
        assert (report.share <= 1 / 256).all()
        assert (report.mean < report.largest).all()
        assert report.largest[3] > 1  # of 800
