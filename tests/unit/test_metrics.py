"""Retrieval and zero-shot numbers against hand-worked cases, brute force and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polymodal.core.errors import ConfigError, DataError
from polymodal.core.interval import wilson
from polymodal.core.sample import Image
from polymodal.evaluate.retrieval import class_vectors, ranks, recall_at_k, retrieval, zero_shot
from polymodal.retrieve.zeroshot import TEMPLATES, classify
from tests.histogram import Histogram


@st.composite
def judged(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores with many ties, and at least one positive a query."""
    queries, gallery = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    levels = st.sampled_from([-1.0, 0.0, 0.5, 1.0])
    scores = draw(st.lists(levels, min_size=queries * gallery, max_size=queries * gallery))
    positives = draw(st.lists(st.booleans(), min_size=queries * gallery, max_size=queries * gallery))
    mask = torch.tensor(positives).view(queries, gallery)
    mask[:, draw(st.integers(0, gallery - 1))] = True
    return torch.tensor(scores).view(queries, gallery), mask


@given(judged())
def test_rank_by_brute_force(case: tuple[torch.Tensor, torch.Tensor]) -> None:
    scores, positives = case
    for row, mask, got in zip(scores.tolist(), positives.tolist(), ranks(scores, positives), strict=True):
        best = max(s for s, p in zip(row, mask, strict=True) if p)
        others = [s for s, p in zip(row, mask, strict=True) if not p]
        assert got == sum(s > best for s in others) + 0.5 * sum(s == best for s in others)


@given(judged(), st.randoms(use_true_random=False))
def test_the_order_of_the_gallery_says_nothing(case: tuple[torch.Tensor, torch.Tensor], random) -> None:
    scores, positives = case
    order = list(range(scores.shape[1]))
    random.shuffle(order)
    torch.testing.assert_close(ranks(scores[:, order], positives[:, order]), ranks(scores, positives))


def test_by_hand() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.9, 0.1, 0.5], [0.3, 0.3, 0.3], [0.1, 0.9, 0.9]])
    positives = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 1]]).bool()
    assert ranks(scores, positives).tolist() == [0, 2, 1, 0]
    card = retrieval(scores, positives, at=(1, 2, 3))
    assert {k: v.k for k, v in card.recall.items()} == {1: 2, 2: 3, 3: 4}
    assert recall_at_k(scores, positives, 1) == 0.5
    assert card.median_rank == 1.5
    assert card.chance[1] == pytest.approx((1 / 3 * 3 + 2 / 3) / 4)
    assert card.chance[3] == 1
    assert (card.queries, card.gallery) == (4, 3)


def test_without_ties_it_is_the_place_in_the_sorted_list() -> None:
    scores = torch.rand(50, 200)
    positives = torch.eye(200)[:50].bool()
    order = scores.argsort(1, descending=True)
    place = (order == torch.arange(50)[:, None]).float().argmax(1)
    assert ranks(scores, positives).tolist() == place.tolist()
    assert recall_at_k(scores, positives, 10) == pytest.approx(float((place < 10).float().mean()))


def test_a_collapsed_model_is_no_better_than_chance() -> None:
    card = retrieval(torch.ones(100, 100), torch.eye(100).bool())
    assert card.recall[10].value == 0
    assert card.median_rank == 50.5


def test_chance_is_what_random_scores_reach() -> None:
    positives = torch.zeros(4000, 30, dtype=torch.bool)
    positives[:, :3] = True
    card = retrieval(torch.rand(4000, 30), positives, at=(1, 5))
    for k in (1, 5):
        assert card.recall[k].low - 0.01 < card.chance[k] < card.recall[k].high + 0.01
    assert card.chance[1] == pytest.approx(0.1)


def test_what_has_no_answer_is_refused() -> None:
    with pytest.raises(DataError, match="query 1 has no positive"):
        retrieval(torch.rand(2, 3), torch.tensor([[1, 0, 0], [0, 0, 0]]).bool())
    with pytest.raises(DataError, match="not a number"):
        retrieval(torch.tensor([[math.nan, 1.0]]), torch.tensor([[True, False]]))


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [
        (485, 500, 0.951, 0.982),
        (490, 500, 0.964, 0.989),
        (10, 10, 0.722, 1.0),
        (45, 50, 0.786, 0.957),
        (0, 10, 0.0, 0.278),
    ],
)
def test_wilson(k: int, n: int, low: float, high: float) -> None:
    interval = wilson(k, n)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=6e-4)


def test_wilson_covers() -> None:
    rng = np.random.default_rng(0)
    for p in (0.02, 0.3, 0.9):
        intervals = [wilson(int(k), 60) for k in rng.binomial(60, p, 3000)]
        assert 0.92 < np.mean([i.low <= p <= i.high for i in intervals]) < 0.99


def test_an_interval_prints_no_digit_that_it_does_not_know() -> None:
    assert str(wilson(45, 50)) == "90 % [79, 96] (45/50)"
    assert str(wilson(4850, 5000)) == "97.0 % [96.5, 97.4] (4850/5000)"
    for k, n in ((1, 0), (-1, 5), (6, 5)):
        with pytest.raises(DataError):
            wilson(k, n)


# ---- zero-shot ----


def test_class_vectors_are_means_of_unit_vectors() -> None:
    prompts = torch.tensor([[[10.0, 0.0], [0.0, 1.0]], [[0.0, -3.0], [0.0, -1.0]]])
    torch.testing.assert_close(class_vectors(prompts), torch.tensor([[0.5**0.5, 0.5**0.5], [0.0, -1.0]]))


def test_zero_shot_by_hand() -> None:
    prompts = torch.eye(6)[:, None]
    images = torch.eye(6)[[0, 0, 0, 1]] * 7
    images[2] = torch.tensor([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])  # its class comes last of six
    card = zero_shot(images, prompts, torch.tensor([0, 0, 0, 1]))
    assert (card.top1.k, card.top5.k) == (3, 3)
    assert card.balanced == pytest.approx((2 / 3 + 1) / 2), "classes without pictures do not count"
    assert card.chance == pytest.approx(1 / 6)
    wrong = zero_shot(images, prompts, torch.tensor([1, 0, 0, 1]))
    assert wrong.top1.k == 2
    assert wrong.top5.k == 3, "one before the right class and four beside it: the place is 1 + 4/2, within five"


def test_zero_shot_against_brute_force() -> None:
    images, prompts, targets = torch.randn(80, 16), torch.randn(7, 3, 16), torch.randint(7, (80,))
    card = zero_shot(images, prompts, targets)
    right = []
    for image, target in zip(images, targets.tolist(), strict=True):
        means = [torch.stack([p / p.norm() for p in ps]).mean(0) for ps in prompts]
        scores = [float(image @ m / m.norm() / image.norm()) for m in means]
        right.append(scores.index(max(scores)) == target)
    assert card.top1.k == sum(right)
    recalls = [np.mean([r for r, t in zip(right, targets.tolist(), strict=True) if t == c]) for c in range(7)]
    assert card.balanced == pytest.approx(np.mean(recalls))


def test_zero_shot_refuses_targets_that_are_no_classes() -> None:
    for targets in (torch.tensor([2]), torch.tensor([-1]), torch.tensor([], dtype=torch.long)):
        with pytest.raises(DataError, match="0 to 1"):
            zero_shot(torch.randn(len(targets), 4), torch.randn(2, 1, 4), targets)


def colour(name: str) -> Image:
    from PIL import Image as PILImage

    return Image(PILImage.new("RGB", (8, 8), name))


def test_classify_names_the_colour() -> None:
    labels = ["red", "lime", "blue"]
    probabilities = classify(Histogram(), [colour(c) for c in labels], labels)
    assert probabilities.argmax(1).tolist() == [0, 1, 2]
    torch.testing.assert_close(probabilities.sum(1), torch.ones(3))
    # cosine 1 to its own label and 0 to the others, at the model's scale of 10
    expected = math.exp(10) / (math.exp(10) + 2)
    torch.testing.assert_close(probabilities.diagonal(), torch.full((3,), expected))


class Partial(Histogram):
    """Likes the first label whatever it sees."""

    def logits(self, images, texts):
        return super().logits(images, texts) + torch.tensor([3.0, 0.0, 0.0])[: len(texts)]


def test_calibration_takes_a_liking_away() -> None:
    nothing = [colour("teal")]  # none of the labels
    biased = classify(Partial(), nothing, ["red", "lime", "blue"])
    assert biased[0, 0] > 0.8
    calibrated = classify(Partial(), nothing, ["red", "lime", "blue"], calibrate=True)
    torch.testing.assert_close(calibrated, torch.full((1, 3), 1 / 3), atol=0.02, rtol=0)
    assert classify(Partial(), [colour("blue")], ["red", "lime", "blue"], calibrate=True).argmax() == 2


def test_a_template_frames_the_label_and_braces_in_labels_are_text() -> None:
    seen: list[str] = []

    class Hears(Histogram):
        def embed(self, items, *, batch_size=64, progress=None):
            seen.extend(getattr(i, "text", "") for i in items)
            return super().embed(items)

    classify(Hears(), [colour("red")], ["{x}", "blue"], templates=["<{}>", "{}"])
    assert seen[:4] == ["<{x}>", "{x}", "<blue>", "blue"]
    assert all(t.count("{}") == 1 for t in TEMPLATES)


@pytest.mark.parametrize(
    ("labels", "templates"),
    [
        (["a"], ["{}"]),
        ([], ["{}"]),
        (["a", "a"], ["{}"]),
        (["a", " "], ["{}"]),
        (["a", "b"], ["x"]),
        (["a", "b"], ["{}{}"]),
    ],
)
def test_unusable_labels(labels: list[str], templates: list[str]) -> None:
    with pytest.raises(ConfigError):
        classify(Histogram(), [colour("red")], labels, templates=templates)
