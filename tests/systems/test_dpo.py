"""Learning from preferences: the loss by hand, its reference, and that held-out preferences follow."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from torch import Tensor

import polymodal
from polymodal.cli import main
from polymodal.core.batch import IGNORE, Batch
from polymodal.core.errors import TrainError
from polymodal.data.readers import BadRows, open_dataset
from polymodal.heads import lm
from polymodal.systems.llava import Llava
from polymodal.train import Constant, Run, Stage, add_lora, fit
from polymodal.train.dpo import CHOSEN, DPO, REJECTED, Preference, Preferences, branch, read_preference
from polymodal.train.log import read_curve
from tests.nano import NANO
from tests.toy_vlm import COLOURS, HEADER, Kept, beginner, questions, vlm

ASKED = questions(200)
HELD_OUT = questions(80, seed=1, held_out=True)


def pairs(asked: list[Any], seed: int = 0) -> list[Preference]:
    """The right colour is preferred to a wrong one."""
    rng = np.random.default_rng(seed)
    return [
        Preference(chat=chat, chosen=colour, rejected=str(rng.choice([c for c in COLOURS if c != colour])))
        for chat, colour in asked
    ]


def batch_of(model: Llava, chosen: list[Preference]) -> Batch:
    return Preferences(chosen, model.lesson).batch(range(len(chosen)), np.random.default_rng(0))


def moved(model: Any, seed: int = 7, std: float = 0.1) -> Any:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * std)
    return model


def by_hand(model: Llava, batch: Batch) -> Tensor:
    """The sum of the log-probabilities of each row's answer, one token at a time."""
    scores = model(batch).double().log_softmax(-1)
    sums = []
    for row, labels in enumerate(batch["labels"].tolist()):
        sums.append(sum(scores[row, place - 1, label] for place, label in enumerate(labels) if label != IGNORE))
    return torch.stack(sums)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_the_loss_is_the_formula(beta: float) -> None:
    model = vlm()
    answers = [("red blue", "green"), ("blue", "red red red"), ("no", "yellow")]  # of one token to many
    mine = [Preference(chat=chat, chosen=a, rejected=b) for (chat, _), (a, b) in zip(ASKED, answers, strict=False)]
    batch = batch_of(model, mine)
    dpo = DPO(model, beta=beta)
    moved(model)
    loss = dpo.loss(batch)
    p = [by_hand(model, branch(batch, prefix)) for prefix in (CHOSEN, REJECTED)]
    with torch.no_grad():
        r = [by_hand(dpo.reference, branch(batch, prefix)) for prefix in (CHOSEN, REJECTED)]
    margins = beta * ((p[0] - r[0]) - (p[1] - r[1]))
    expected = (1 + (-margins).exp()).log()
    assert loss.weight == 3
    torch.testing.assert_close(loss.total.double(), expected.sum(), rtol=1e-5, atol=1e-5)
    assert loss.metrics["margin"] == pytest.approx(margins.mean().item(), rel=1e-4)
    assert loss.metrics["preferred"] == pytest.approx((margins > 0).float().mean().item())
    names = ["vision.patch_embed.weight", "connector.layers.0.weight", "backbone.embed_tokens.weight"]
    weights = [model.get_parameter(name) for name in names]
    ours, theirs = (torch.autograd.grad(total, weights) for total in (loss.total, expected.sum()))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_before_the_first_step_nothing_is_preferred() -> None:
    loss = DPO(model := vlm()).loss(batch_of(model, pairs(ASKED[:6])))
    assert loss.mean.item() == pytest.approx(np.log(2), abs=1e-6)
    assert loss.metrics["margin"] == pytest.approx(0, abs=1e-6)


def test_both_branches_hold_the_picture_and_a_lost_one_is_noticed() -> None:
    batch = batch_of(model := vlm(), pairs(ASKED[:4]))
    assert torch.equal(batch["chosen_pixels"], batch["rejected_pixels"])
    assert not torch.equal(batch["chosen_ids"], batch["rejected_ids"])
    for lost in ("rejected_", "chosen_"):
        blind = Batch({k: v for k, v in batch.items() if k not in (f"{lost}pixels", f"{lost}pixels_row")})
        with pytest.raises(Exception, match="placeholder tokens for"):
            DPO(model).loss(blind)


def test_log_probabilities_come_in_chunks_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = branch(batch_of(model := vlm(), pairs(ASKED[:6])), CHOSEN)
    rows["weights"] = torch.rand(6)
    table = model.get_parameter("backbone.embed_tokens.weight")

    def found() -> list[Tensor]:
        totals = [model.log_probs(rows).square().sum(), model.loss(rows).total]
        return [t for total in totals for t in (total.detach(), *torch.autograd.grad(total, table))]

    whole = found()
    monkeypatch.setattr(lm, "_CHUNK", 5)
    torch.testing.assert_close(found(), whole)
    assert whole[2] == pytest.approx(float(-(model.log_probs(rows).detach().sum(1) * rows["weights"]).sum()), rel=1e-5)


def test_preferences_are_read_from_a_file(tmp_path: Path) -> None:
    PILImage.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    asked = [
        {"image": "red.png", "question": "colour", "chosen": "red", "rejected": "blue"},
        {
            "image": "red.png",
            "messages": [{"role": "user", "content": "<image>colour"}],
            "chosen": "a",
            "rejected": "b",
        },
    ]
    bad = [{"question": "colour", "chosen": "red"}, {"chosen": "red", "rejected": "blue"}]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, asked + bad)))
    with pytest.raises(BadRows) as caught:
        open_dataset(file, read=read_preference)
    assert len(caught.value.problems) == 2
    read = open_dataset(file, read=read_preference, skip_bad=True)
    assert [(p.chosen, p.rejected) for p in read] == [("red", "blue"), ("a", "b")]
    assert [[turn.role for turn in p.chat.turns] for p in read] == [["user"], ["user"]]
    batch = Preferences(read, vlm().lesson).batch([0, 1], np.random.default_rng(0))
    assert batch["rejected_pixels"].shape[0] == 2


# ---- the reference


def test_with_adapters_the_reference_is_the_system_without_them() -> None:
    base = vlm()
    batch = branch(batch_of(base, pairs(ASKED[:4])), CHOSEN)
    expected = base.log_probs(batch).detach()
    dpo = DPO(add_lora(copy.deepcopy(base), ["q_proj", "v_proj", "connector.layers.0"], rank=4, dropout=0.5))
    assert dpo.reference is None
    moved(dpo.policy, std=0.5).train()
    for _ in range(2):
        torch.testing.assert_close(dpo.reference_log_probs(batch), expected)
        assert dpo.policy.training
        assert not torch.allclose(dpo.policy.log_probs(batch), expected, atol=1e-2)
    loss = dpo.loss(batch_of(base, pairs(ASKED[:4])))
    loss.total.backward()
    with_gradient = {name for name, parameter in dpo.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, _ in dpo.named_parameters() if ".lora_" in name}


def test_adapters_that_have_learned_are_part_of_the_reference() -> None:
    """Of supervised training on such answers, for example: without them it would be another system."""
    model = moved(add_lora(vlm(), ["q_proj", "v_proj"], rank=4), std=0.5)
    batch = batch_of(model, pairs(ASKED[:6]))
    expected = model.log_probs(branch(batch, CHOSEN)).detach()
    loss = (dpo := DPO(model)).loss(batch)
    assert loss.metrics["margin"] == pytest.approx(0, abs=1e-6)
    moved(dpo.policy)
    torch.testing.assert_close(dpo.reference_log_probs(branch(batch, CHOSEN)), expected)
    assert {n for n, p in dpo.named_parameters() if p.requires_grad} == {
        n for n, _ in dpo.policy.named_parameters(prefix="policy") if ".lora_" in n
    }


def test_where_more_than_adapters_learns_the_reference_is_a_copy() -> None:
    model = add_lora(vlm(), rank=2)
    model.connector.requires_grad_(True)
    dpo = DPO(model)
    assert dpo.reference is not None
    assert not any(parameter.requires_grad for parameter in dpo.reference.parameters())
    dpo.train()
    assert dpo.policy.training
    assert not dpo.reference.training


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPO(polymodal.build(NANO["clip"])), "CLIP cannot learn from its answers: it lacks loss or log_probs"),
        (lambda: DPO(vlm().requires_grad_(False)), "nothing of this Llava learns"),
        (lambda: DPO(vlm(), beta=0.0), "beta is 0.0"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises(TrainError, match=message):
        make()


# ---- learning


def run(start: dict[str, Tensor], steps: int, **more: Any) -> Run:
    def model() -> DPO:
        policy = vlm()
        policy.load_state_dict(start)
        return DPO(policy)

    stage = {"batch_size": 32, "lr": 3e-3, "schedule": Constant(), "workers": 0} | more
    return Run(
        name="dpo", header=HEADER, model=model, stages=[Stage(name="prefer", steps=steps, source=preferences, **stage)]
    )


@cache
def preferences() -> Kept:
    return Kept(Preferences(pairs(ASKED), vlm().lesson))


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return beginner(ASKED, tmp_path_factory.mktemp("beginner"))


def test_held_out_preferences_follow(start: dict[str, Tensor], tmp_path: Path) -> None:
    result = fit(run(start, 40), tmp_path)
    model = result.model
    assert isinstance(model, DPO)
    for name, tensor in model.reference.state_dict().items():
        assert torch.equal(tensor, start[name]), name
    asked = batch_of(model.policy, pairs(HELD_OUT, seed=5))
    with torch.no_grad():
        metrics = model.loss(asked).metrics
        gray = {name: tensor * 0 for name, tensor in asked.items() if name.endswith("_pixels")}
        blind = model.loss(Batch(asked | gray)).metrics
    assert metrics["margin"] > 0.5
    assert metrics["preferred"] > 0.7
    assert blind["preferred"] < 0.65


def test_micro_batches_and_a_resumed_run_give_the_same(start: dict[str, Tensor], tmp_path: Path) -> None:
    fit(run(start, 4), tmp_path / "one")
    fit(run(start, 4, accumulate=4), tmp_path / "four")
    fit(run(start, 4), tmp_path / "two", until_step=2)
    fit(run(start, 4), tmp_path / "two")
    one, four, two = (
        [r["loss"] for r in read_curve(tmp_path / name / "metrics.jsonl")] for name in ("one", "four", "two")
    )
    assert one == two
    assert one == pytest.approx(four, rel=1e-4)


def test_a_finished_run_leaves_the_system_that_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from dataclasses import replace\nfrom polymodal.train import add_lora\nfrom polymodal.train.dpo import DPO\n"
        "from tests.toy_vlm import vlm\nfrom tests.systems import test_dpo\n"
        "def run():\n"
        "    whole = test_dpo.run({}, 2)\n"
        "    return replace(whole, model=lambda: DPO(add_lora(vlm(), rank=2)))\n"
    )
    monkeypatch.syspath_prepend(str(Path.cwd()))
    assert main(["train", str(recipe), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    saved = polymodal.load(tmp_path / "out" / "model")
    assert isinstance(saved, Llava)
    same = {n: torch.equal(p, vlm().get_parameter(n)) for n, p in saved.named_parameters()}
    assert {name for name, equal in same.items() if not equal} == {
        n for n in same if n.endswith(("q_proj.weight", "v_proj.weight"))
    }
