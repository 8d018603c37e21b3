"""Learning from rewards: the loss by hand, whose answers are judged, and that held-out rewards rise."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import polymodal
from polymodal.core.batch import IGNORE, Batch
from polymodal.core.errors import TrainError
from polymodal.samplers.autoregressive import Completion, Step
from polymodal.train import Constant, Run, Stage, add_lora, fit
from polymodal.train.grpo import GRPO, Prompts, advantages_of, divergence, surrogate
from polymodal.train.log import read_curve
from tests.nano import NANO
from tests.toy_vlm import HEADER, Kept, beginner, questions, tokenizer, vlm, weighed

ASKED = questions(200)
HELD_OUT = questions(80, seed=1, held_out=True)


def right(item: int, text: str) -> float:
    return float(text == ASKED[item][1])


def grpo(policy: Any = None, **more: Any) -> GRPO:
    kinds = {"rewards": {"right": right}, "group": 4, "max_new_tokens": 3} | more
    return GRPO(vlm() if policy is None else policy, tokenizer=tokenizer(), **kinds)


@cache
def prompts() -> Kept:
    return Kept(Prompts([chat for chat, _ in ASKED], vlm().prompt))


def batch(*items: int) -> Batch:
    return prompts().batch(items, np.random.default_rng(0))


def shaken(model: Any, std: float = 0.1) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * std)


# ---- the parts of the loss


def test_advantages_are_relative_to_the_group() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [3.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 10.0]])
    found = advantages_of(rewards)
    torch.testing.assert_close(found[0], torch.tensor([1.0, -1.0, -1.0, 1.0]) * 0.75**0.5, rtol=1e-3, atol=0)
    assert torch.equal(found[1], torch.zeros(4))
    torch.testing.assert_close(found[2], torch.tensor([-0.5, -0.5, -0.5, 1.5]), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),  # slope: of the loss in the log-probability
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.4, 0.0),  # good enough: no more
        (0.5, 2.0, -1.0, -1.0),
        (1.5, -2.0, 3.0, 3.0),
        (0.5, -2.0, 1.6, 0.0),  # bad answers are far enough
        (0.9, -2.0, 1.8, 1.8),
    ],
)
def test_a_ratio_counts_up_to_the_clip(ratio: float, advantage: float, loss: float, slope: float) -> None:
    old = torch.tensor([[-1.3]])
    now = (old + np.log(ratio)).requires_grad_()
    found = surrogate(now, old, torch.tensor([[advantage]]), 0.2)
    assert found.item() == pytest.approx(loss, rel=1e-5)
    found.sum().backward()
    assert now.grad is not None
    assert now.grad.item() == pytest.approx(slope, rel=1e-5, abs=1e-6)


def test_the_divergence_is_estimated_without_bias_and_never_negative() -> None:
    torch.manual_seed(0)
    p, r = (torch.randn(6).log_softmax(0) for _ in range(2))
    each = divergence(p[None], r[None])
    assert (each >= 0).all()
    exact = (p.exp() * (p - r)).sum()
    assert float((p.exp() * each).sum()) == pytest.approx(float(exact), rel=1e-5)  # its mean under p
    assert float(divergence(p[None], p[None]).abs().max()) == 0


@pytest.mark.parametrize("inner_steps", [1, 2])
def test_the_loss_is_the_formula(inner_steps: int) -> None:
    model = grpo(rewards={"length": lambda item, text: float(len(text))}, beta=0.3, inner_steps=inner_steps)
    policy, rows = model.policy, None
    shaken(policy, 0.05)  # away from the reference, and with inner steps from where the answers are written
    written: list[Completion] = []
    answer = model.write
    model.write = lambda asked: written.extend(answer(asked)) or written  # type: ignore[method-assign]
    torch.manual_seed(0)
    loss = model.loss(batch(0, 1, 2))
    rows = model.answered(batch(0, 1, 2), written)
    learned = rows["labels"] != IGNORE

    with torch.no_grad():
        r = model.reference.log_probs(rows)
        old = r if inner_steps > 1 else policy.log_probs(rows)  # where the last look was at the beginning
    p = policy.log_probs(rows)
    total = torch.zeros((), dtype=torch.float64)
    for group in range(3):
        mine = range(4 * group, 4 * group + 4)
        rewards = np.array([float(len(written[row].text)) for row in mine])
        for row in mine:
            advantage = (len(written[row].text) - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
            terms = []
            for place in learned[row].nonzero()[:, 0].tolist():
                ratio = (p[row, place] - old[row, place]).exp()
                far = ratio > 1.2 if advantage > 0 else ratio < 0.8
                gain = (1.2 if advantage > 0 else 0.8) * advantage if far else ratio * advantage
                d = r[row, place] - p[row, place]
                terms.append(-gain + 0.3 * (d.exp() - d - 1))
            total = total + torch.stack(terms).mean()
    assert loss.weight == 12
    torch.testing.assert_close(loss.total.double(), total, rtol=1e-4, atol=1e-4)
    assert (loss.metrics["clipped"] > 0) == (inner_steps > 1)
    names = ["vision.patch_embed.weight", "connector.layers.0.weight", "backbone.lm_head.weight"]
    weights = [policy.get_parameter(name) for name in names]
    ours, theirs = (torch.autograd.grad(t, weights) for t in (loss.total, total))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


# ---- answers


def test_a_placeholder_that_was_written_is_judged_and_not_read() -> None:
    model = grpo(group=2)
    place = model.policy.media_id

    def answer(row: int, ids: list[int]) -> Completion:
        return Completion(
            row=row, choice=0, text="", finished="length", steps=tuple(Step(row=row, choice=0, token=i) for i in ids)
        )

    rows = model.answered(batch(0, 1), [answer(0, [5, place, 7]), answer(1, [5, 6, 7])])
    assert rows["labels"][0][rows["labels"][0] != IGNORE].tolist() == [5, place]
    assert rows["labels"][1][rows["labels"][1] != IGNORE].tolist() == [5, 6, 7]
    assert int((rows["ids"] == place).sum()) == 2 * model.policy.config.num_features
    plain = model.answered(batch(0, 1), [answer(0, [5]), answer(1, [5, 6, 7])])
    first = (plain["labels"] != IGNORE)[0].nonzero()[0]
    a, b = (model.policy.log_probs(r)[0, first] for r in (rows, plain))
    torch.testing.assert_close(a, b)


def test_rewards_know_their_prompt_and_add_up() -> None:
    seen: list[tuple[int, str]] = []

    def noted(item: int, text: str) -> float:
        seen.append((item, text))
        return 1.0

    loss = grpo(rewards={"noted": noted, "half": lambda item, text: item / 2}).loss(batch(7, 2, 5))
    assert [item for item, _ in seen] == [7] * 4 + [2] * 4 + [5] * 4
    assert loss.metrics["reward/noted"] == 1.0
    assert loss.metrics["reward/half"] == pytest.approx(14 / 6)
    assert loss.total.item() == pytest.approx(0, abs=1e-6)  # all answers of a group are as good


def test_the_answers_are_those_of_the_last_look() -> None:
    model = grpo(inner_steps=3, group=2)
    start = [parameter.clone() for parameter in model.policy.parameters() if parameter.requires_grad]

    def written(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        with model._as_looked_at():
            return [answer.ids for answer in model.write(batch(*range(8)))]

    first = written(0)
    for step in (1, 2):
        shaken(model.policy, 0.5)
        model.after_step(step, 9)
        assert written(0) == first
    now = [parameter.clone() for parameter in model.policy.parameters() if parameter.requires_grad]
    model.after_step(3, 9)
    assert written(0) != first
    assert all(torch.equal(a, b) for a, b in zip(now, model.looked, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(now, start, strict=True))


def test_with_adapters_only_they_are_looked_at() -> None:
    model = grpo(add_lora(vlm(), rank=2), inner_steps=2)
    assert model.reference is None
    assert sum(p.numel() for p in model.looked) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    shaken(model.policy, 0.3)
    model.loss(batch(0, 1)).total.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, _ in model.policy.named_parameters(prefix="policy") if ".lora_" in n
    }


@pytest.mark.parametrize(
    "wrong", [{"group": 1}, {"epsilon": 0.0}, {"epsilon": 1.0}, {"beta": -0.1}, {"inner_steps": 0}, {"rewards": {}}]
)
def test_what_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(TrainError, match="GRPO needs"):
        grpo(**wrong)


def test_an_encoder_decoder_is_refused() -> None:
    model = polymodal.build(NANO["t5"])
    with pytest.raises(TrainError, match="T5 cannot learn from its answers"):
        grpo(model)


def test_sharding_is_refused() -> None:
    with pytest.raises(TrainError, match="GRPO trains with parallel='ddp', not 'fsdp'"):
        grpo().blocks()


# ---- learning


def run(start: dict[str, Tensor], steps: int, **more: Any) -> Run:
    def model() -> GRPO:
        policy = vlm()
        policy.load_state_dict(start)
        return grpo(policy, group=8, max_new_tokens=2, beta=0.0, **more)

    stage = Stage(
        name="rewards", steps=steps, batch_size=16, source=prompts, lr=1e-3, schedule=Constant(), workers=0
    )  # fmt: skip
    return Run(name="grpo", header=HEADER, model=model, stages=[stage])


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return beginner(ASKED, tmp_path_factory.mktemp("beginner"))


def test_held_out_rewards_rise(start: dict[str, Tensor], tmp_path: Path) -> None:
    result = fit(run(start, 30, inner_steps=2), tmp_path)
    model = result.model
    assert isinstance(model, GRPO)
    before, after = (weighed(m, HELD_OUT) for m in (model.reference, model.policy))
    assert before < 0.55
    assert after > before + 0.1
    curve = read_curve(tmp_path / "metrics.jsonl")
    assert all(r["clipped"] == 0 for r in curve[::2])  # at the first step after a look
    assert any(r["clipped"] > 0 for r in curve[1::2])


def test_the_seed_decides_and_a_resumed_run_gives_the_same(start: dict[str, Tensor], tmp_path: Path) -> None:
    for name, stops in {"one": [5], "again": [5], "in pieces": [3, 5]}.items():  # 3: in the middle of inner steps
        for stop in stops:
            fit(run(start, 5, inner_steps=2), tmp_path / name, until_step=stop)
    one, again, pieces = (
        [{k: v for k, v in r.items() if k not in ("items_per_s", "waiting")} for r in read_curve(path)]
        for path in (tmp_path / name / "metrics.jsonl" for name in ("one", "again", "in pieces"))
    )
    assert one == again == pieces
