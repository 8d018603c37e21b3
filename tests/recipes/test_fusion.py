"""Native against late fusion: both see the same, at the same compute, and the table says what they came to."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from benchmarks import bench_fusion as fusion
from polymodal.core.batch import IGNORE
from polymodal.systems.chameleon import Chameleon
from polymodal.systems.composed import Composed


@pytest.fixture(scope="module")
def models() -> tuple[Chameleon, Composed]:
    torch.manual_seed(0)
    return fusion.native(fusion.codec()), fusion.late(128)


def test_both_see_the_same(models: tuple[Chameleon, Composed]) -> None:
    rng = np.random.default_rng(0)
    native, late = (fusion.Lessons(3, fusion.standing(model)).batch([5, 9], rng) for model in models)
    assert torch.equal(native["pixels"], late["pixels"])
    assert torch.equal(native["pixels"], fusion.Scenes(3).batch([5, 9], rng)["pixels"])
    assert torch.equal(native["ids"][:, fusion.TOKENS + 2 :], late["ids"][:, fusion.TOKENS :])
    assert torch.equal(native["labels"][:, fusion.TOKENS + 2 :], late["labels"][:, fusion.TOKENS :])
    assert not torch.equal(native["pixels"], fusion.Scenes(4).batch([5, 9], rng)["pixels"]), "a seed of its own"
    for row, index in enumerate([5, 9]):
        said = [answer for _, answer in fusion.Scenes(3).draw(index)[1]]
        learned = late["labels"][row][late["labels"][row] != IGNORE].tolist()
        assert fusion.tokenizer().decode(learned) == "".join(f"{answer}" for answer in said)
        assert learned.count(fusion.mark("<|im_end|>")) == len(said)
    assert fusion.Scenes(3).draw(5)[1] == fusion.Scenes(3).draw(5)[1] != fusion.Scenes(3).draw(9)[1]


def test_both_cost_the_same(models: tuple[Chameleon, Composed]) -> None:
    width, spent = fusion.matched(steps=40, codec_steps=12)
    assert abs(spent["native"] / spent["late"] - 1) < 0.02
    assert 0 < spent["VQGAN of it"] < spent["native"] / 2
    assert width % 16 == 0
    native, late = models
    assert native.config.backbone == fusion.decoder(native.vocab_size)
    assert late.config.backbone == fusion.decoder(late.vocab_size)


@pytest.mark.parametrize("seeds", ["0", "6"])
def test_seeds_that_have_no_interval_are_refused_first(seeds: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_fusion", "--seeds", seeds])
    monkeypatch.setattr(fusion, "compare", lambda *_: pytest.fail("it trains"))
    with pytest.raises(SystemExit):
        fusion.main()


def test_what_cannot_be_matched_is_not_compared() -> None:
    with pytest.raises(AssertionError, match="not at the same compute"):
        fusion.matched(steps=1000, codec_steps=0)


def test_a_short_comparison() -> None:
    figures = fusion.compare(steps=2, seeds=1, count=2)
    (trial,) = figures["trials"]
    for name in ("native", "late"):
        for asked in ("right", "shuffled"):
            shares = trial[name][asked]
            assert set(shares) == {*fusion.KINDS, "all"}
            assert all(0 <= share <= 1 for share in shares.values())
    assert len(figures["table"]) == 2 + len(fusion.KINDS) + 1


def test_the_table_by_hand() -> None:
    def trial(right: float) -> dict[str, dict[str, dict[str, float]]]:
        shares = dict.fromkeys([*fusion.KINDS, "all"], right)
        other = dict.fromkeys([*fusion.KINDS, "all"], 0.1)
        return {"native": {"right": shares, "shuffled": other}, "late": {"right": other, "shuffled": other}}

    assert fusion.interval([0.5, 0.6, 0.7]) == "60.0 ± 24.8"  # 4.303 * 0.1 / sqrt(3)
    assert fusion.interval([0.5]) == "50.0"
    *_, last = fusion.table([trial(0.5), trial(0.6), trial(0.7)]).splitlines()
    assert last == "| all | 60.0 ± 24.8 | 10.0 ± 0.0 | 50.0 ± 24.8 | 10.0 ± 0.0 | 10.0 ± 0.0 |"
