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
from polymodal.train.rl import Exploring, Practice, Scenes
from tests.toy_vlm import HEADER

HORIZON = 3
TEXTS = ("go", "go on there")  # batches of them have different widths


def policy(head: Any = None) -> BehaviourCloning:
    torch.manual_seed(0)
    trunk = StateTrunk(state_width=1, dim=32, num_layers=1)
    config = BehaviourConfig(
        trunk=trunk, head=head or L1(), words=("go", "on"), horizon=HORIZON, action_width=1, text_dim=32
    )
    model = BehaviourCloning.build(config)
    rows = np.linspace(-1, 1, 101)[:, None]
    model.use_statistics({"toy": {"state": Statistics.from_array(rows), "action": Statistics.from_array(rows)}})
    return model


def place(scene: int) -> float:
    return float(np.random.default_rng(scene).uniform(-0.6, 0.6))


def follow(actor: Acts, scene: int) -> float:
    """One or two chunks: each is to be where the state says."""
    missed = []
    for step in range(1 + scene % 2):
        seen = Observation(state=np.array([place(scene)], np.float32), instruction=TEXTS[step])
        chunk = actor.act(actor.observe([seen]))
        missed.append(float((chunk - place(scene)).abs().mean()))
    return float(np.mean(missed) < 0.3)


def practice(model: Any = None, **more: Any) -> Practice:
    return Practice(model or policy(), follow, **({"execute": 2, "group": 4, "deviation": 0.3} | more))


def test_what_is_chosen_is_near_what_is_meant_and_noted() -> None:
    model = policy().eval()
    explorer = Exploring(model, 2, 0.05)
    batch = explorer.observe([Observation(state=np.zeros(1, np.float32), instruction="go")])
    done = explorer.act(batch)
    assert done.shape == (1, 2, 1)
    torch.testing.assert_close(done, model.to_robot(explorer.chosen[0]))
    torch.testing.assert_close(explorer.meant[0], model.chunk(batch)[:, :2])
    assert 0 < (explorer.chosen[0] - explorer.meant[0]).abs().max() < 0.3


def test_the_gradient_is_that_of_the_likelihood_by_the_advantage() -> None:
    tries: list[tuple[torch.Tensor, torch.Tensor, float]] = []  # what was meant (with gradient), chosen, its reward
    rewards = iter([1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    model = policy()

    def attempt(actor: Acts, scene: int) -> float:
        assert isinstance(actor, Exploring)
        batch = actor.observe([Observation(state=np.array([place(scene)], np.float32), instruction="go")])
        actor.act(batch)
        actor.act(batch)
        with torch.enable_grad():
            meant = model.chunk(batch)[:, :2].repeat(2, 1, 1)
        tries.append((meant, torch.cat(actor.chosen[-2:]), next(rewards)))
        return tries[-1][2]

    loss = Practice(model, attempt, execute=2, group=4, deviation=0.5).loss(Batch(scene=torch.tensor([7, 8])))
    assert loss.weight == 8
    assert loss.metrics["reward"] == pytest.approx(0.75)
    weight = model.get_parameter("head.proj.weight")
    found = torch.autograd.grad(loss.total, weight, retain_graph=True)[0]
    likelihoods = [torch.distributions.Normal(meant, 0.5).log_prob(chosen).sum() for meant, chosen, _ in tries]
    spread = torch.tensor([1.0, 0.0, 0.0, 1.0]).std() + 1e-4
    by_hand = sum(
        -(reward - 0.5) / spread * each for each, (*_, reward) in zip(likelihoods[:4], tries[:4], strict=True)
    )
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


@pytest.mark.parametrize("wrong", [{"execute": 0}, {"execute": HORIZON + 1}, {"group": 1}, {"deviation": 0.0}])
def test_what_cannot_be_practised(wrong: dict[str, Any]) -> None:
    with pytest.raises(TrainError, match="practice takes"):
        practice(**wrong)
    with pytest.raises(TrainError, match="cannot practise"):
        Practice(torch.nn.Linear(1, 1), follow, execute=1)


def test_a_policy_that_samples_is_refused() -> None:
    with pytest.raises(TrainError, match="samples its answers"):
        practice(policy(Flow(hidden_dim=16, num_layers=1, steps=2))).loss(Batch(scene=torch.tensor([1, 2])))


def run(steps: int = 40) -> Run:
    return Run(
        name="practice",
        header=HEADER,
        model=practice,
        stages=[
            Stage(
                name="practise", steps=steps, batch_size=8, source=lambda: Scenes(1000), lr=3e-3, schedule=Constant(),
                workers=0,
            )
        ],
    )  # fmt: skip


def test_it_comes_to_do_what_is_rewarded_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    def kept(model: Any) -> float:
        return float(np.mean([follow(model, scene) for scene in range(2000, 2060)]))

    before = kept(policy().eval())
    whole = fit(run(), tmp_path / "whole", device="cpu")
    assert isinstance(whole.model, Practice)
    assert before < 0.8
    assert kept(whole.model.policy) > before + 0.15
    fit(run(), tmp_path / "parts", device="cpu", until_step=17)
    parts = fit(run(), tmp_path / "parts", device="cpu")
    for mine, other in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, other)
    rewards = [line["reward"] for line in read_curve(tmp_path / "whole/metrics.jsonl") if "reward" in line]
    assert len(rewards) == 40
