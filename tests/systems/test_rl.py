"""Practice: what is tried and noted, the loss by hand, and that a policy comes to do what is rewarded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polymodal.core.batch import Batch
from polymodal.core.errors import TrainError
from polymodal.core.observation import Observation
from polymodal.core.verbs import Acts
from polymodal.encoders.trunk import StateTrunk
from polymodal.modalities.action import Statistics
from polymodal.systems.behaviour import BehaviourCloning, BehaviourConfig
from polymodal.systems.chunk_heads import L1, Flow
from polymodal.train import Constant, Run, Stage, fit
from polymodal.train.log import read_curve
from polymodal.train.rl import Attempt, Exploring, Practice, Scenes
from tests.toy_vlm import HEADER

HORIZON = 3
TEXTS = ("go", "go on there")  # batches of them have different widths


def policy(head: Any = None, width: int = 1) -> BehaviourCloning:
    torch.manual_seed(0)
    trunk = StateTrunk(state_width=1, dim=32, num_layers=1)
    config = BehaviourConfig(
        trunk=trunk, head=head or L1(), words=("go", "on"), horizon=HORIZON, action_width=width, text_dim=32
    )
    model = BehaviourCloning.build(config)
    rows = np.linspace(-1, 1, 101)[:, None]
    action = Statistics.from_array(np.repeat(rows, width, 1))
    model.use_statistics({"toy": {"state": Statistics.from_array(rows), "action": action}})
    return model


def place(scene: int) -> float:
    return float(np.random.default_rng(scene).uniform(-0.6, 0.6))


def follow(actor: Acts, scene: int) -> float:
    """One or two answers: each is to lead where the state says."""
    missed = []
    for step in range(1 + scene % 2):
        seen = Observation(state=np.array([place(scene)], np.float32), instruction=TEXTS[step])
        led = float(actor.act(actor.observe([seen]))[:, :2].mean())
        missed.append(abs(led - place(scene)))
    return -float(np.mean(missed))


def practice(model: Any = None, attempt: Attempt = follow, **more: Any) -> Practice:
    return Practice(model or policy(), attempt, **({"execute": 2, "group": 4, "deviation": (0.3,)} | more))


def test_what_is_chosen_is_what_is_meant_and_a_shift_and_noted() -> None:
    model = policy(width=2).eval()
    explorer = Exploring(model, 2, torch.tensor([0.05, 0.0]))
    batch = explorer.observe([Observation(state=np.zeros(1, np.float32), instruction="go")])
    done = explorer.act(batch)
    assert done.shape == (1, 2, 2)
    torch.testing.assert_close(done, model.to_robot(explorer.chosen[0]))
    torch.testing.assert_close(explorer.meant[0], model.chunk(batch)[:, :2])
    shift = (explorer.chosen[0] - explorer.meant[0])[0]
    assert 0 < shift[0, 0].abs() < 0.3
    torch.testing.assert_close(shift[0], shift[1])
    assert not shift[:, 1].any()


def test_the_gradient_is_that_of_the_likelihood_by_the_discounted_advantage() -> None:
    tries: list[tuple[torch.Tensor, torch.Tensor, float]] = []  # what was meant (with gradient), chosen, its reward
    rewards = iter([1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    model = policy(width=2)

    def attempt(actor: Acts, scene: int) -> float:
        assert isinstance(actor, Exploring)
        batch = actor.observe([Observation(state=np.array([place(scene)], np.float32), instruction="go")])
        actor.act(batch)
        actor.act(batch)
        with torch.enable_grad():
            meant = model.chunk(batch)[:, :2].repeat(2, 1, 1)
        tries.append((meant, torch.cat(actor.chosen[-2:]), next(rewards)))
        return tries[-1][2]

    learner = practice(model, attempt, deviation=(0.5, 0.0), discount=0.6)
    loss = learner.loss(Batch(scene=torch.tensor([7, 8])))
    assert loss.weight == 8
    assert loss.metrics["reward"] == pytest.approx(0.75)
    weight = model.get_parameter("head.proj.weight")
    found = torch.autograd.grad(loss.total, weight, retain_graph=True)[0]
    spread = torch.tensor([1.0, 0.0, 0.0, 1.0]).std() + 1e-4
    by_hand = torch.zeros(())
    for meant, chosen, reward in tries[:4]:  # of the others, none went better than the rest
        likelihood = torch.distributions.Normal(meant.mean(1)[:, 0], 0.5).log_prob(chosen.mean(1)[:, 0])
        by_hand = by_hand - (reward - 0.5) / spread * (0.6 * likelihood[0] + likelihood[1])
    torch.testing.assert_close(found, torch.autograd.grad(by_hand, weight)[0], rtol=1e-4, atol=1e-5)


def test_lessons_are_learned_as_before_and_states_stay_as_they_were() -> None:
    model = policy()
    seen = [Observation(state=np.zeros(1, np.float32), instruction="go")]
    lesson = model.lesson(seen, torch.zeros(1, HORIZON, 1), torch.ones(1, HORIZON, dtype=torch.bool))
    model.eval()
    torch.testing.assert_close(practice(model).loss(lesson).total, model.loss(lesson).total)
    model.train()
    practice(model).loss(Batch(scene=torch.tensor([0])))
    assert model.training


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"execute": 0}, "1 to 3 steps"), ({"execute": HORIZON + 1}, "1 to 3 steps"), ({"group": 1}, "groups"),
        ({"discount": 0.0}, "discount"), ({"deviation": (0.0,)}, "deviations"), ({"deviation": (-0.1,)}, "deviations"),
        ({"deviation": (0.1, 0.1)}, "1 deviations"),
    ],
)  # fmt: skip
def test_what_cannot_be_practised(wrong: dict[str, Any], why: str) -> None:
    with pytest.raises(TrainError, match=why):
        practice(**wrong)
    with pytest.raises(TrainError, match="cannot practise"):
        Practice(torch.nn.Linear(1, 1), follow, execute=1, deviation=(0.1,))


def test_a_policy_that_samples_is_refused() -> None:
    with pytest.raises(TrainError, match="answers differently"):
        practice(policy(Flow(hidden_dim=16, num_layers=1, steps=2))).loss(Batch(scene=torch.tensor([1, 2])))


def run(attempt: Attempt = follow, lr: float = 3e-3) -> Run:
    return Run(
        name="practice",
        header=HEADER,
        model=lambda: practice(attempt=attempt),
        stages=[
            Stage(
                name="practise", steps=20, batch_size=8, source=lambda: Scenes(1000), lr=lr, schedule=Constant(),
                workers=0,
            )
        ],
    )  # fmt: skip


BEST = 0.4


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_known_optimum_of_a_bandit_is_found_and_fled_where_it_costs(sign: float, tmp_path: Path) -> None:
    def answer(actor: Acts, scene: int) -> float:
        seen = Observation(state=np.array([place(scene)], np.float32), instruction="go")
        return float(actor.act(actor.observe([seen]))[:, :2].mean())

    def attempt(actor: Acts, scene: int) -> float:
        return -sign * (answer(actor, scene) - BEST) ** 2

    def missed(model: Any) -> float:
        return max(abs(answer(model, scene) - BEST) for scene in range(2000, 2020))

    before = missed(policy().eval())
    after = missed(fit(run(attempt, 1e-3), tmp_path, device="cpu").model.policy.eval())
    assert before > 0.25
    if sign > 0:
        assert after < 0.15
    else:
        assert after > before + 0.1


def test_it_comes_to_do_what_is_rewarded_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    def kept(model: Any) -> float:
        return float(np.mean([follow(model, scene) for scene in range(2000, 2040)]))

    before = kept(policy().eval())
    whole = fit(run(), tmp_path / "whole", device="cpu")
    assert isinstance(whole.model, Practice)
    assert kept(whole.model.policy) > before + 0.15
    fit(run(), tmp_path / "parts", device="cpu", until_step=8)
    parts = fit(run(), tmp_path / "parts", device="cpu")
    for mine, other in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, other)
    rewards = [line["reward"] for line in read_curve(tmp_path / "whole/metrics.jsonl") if "reward" in line]
    assert len(rewards) == 20
