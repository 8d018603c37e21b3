"""RT-2: actions are answers like others, nothing else can be said for one, and language survives them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from torch import Tensor

import polymodal
from polymodal.core.batch import IGNORE, Batch
from polymodal.core.chat import Chat, Turn
from polymodal.core.errors import MediaError
from polymodal.core.observation import Observation
from polymodal.core.sample import Image, Text
from polymodal.data.lessons import Lessons, Mixture
from polymodal.modalities.action import Statistics
from polymodal.samplers.autoregressive import Settings, complete
from polymodal.systems.rt2 import ROBOT_SHARE, RT2
from tests.nano import nano, nano_batch
from tests.talking import talking

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (250, 250, 250)}
LOW, HIGH = np.array([-1.0, 0.0, 10.0]), np.array([1.0, 4.0, 20.0])


def policy() -> RT2:
    model = talking("rt2")
    assert isinstance(model, RT2)
    rows = np.linspace(LOW, HIGH, 101)
    model.use_statistics({"arm": {"action": Statistics.from_array(rows)}})
    return model


def picture(name: str) -> np.ndarray:
    return np.full((16, 16, 3), COLOURS[name], np.uint8)


def observations(count: int) -> list[Observation]:
    names = list(COLOURS)
    return [Observation(images={"image": picture(names[i % 4])}, instruction=names[i % 3]) for i in range(count)]


def question(name: str) -> Chat:
    asked = Turn("user", (Image(PILImage.fromarray(picture(name))), Text("what is it?")))
    return Chat((asked, Turn("assistant", (Text(f"a {name} plate"),))))


def actions(count: int) -> Tensor:
    unit = torch.rand(count, 1, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.9 + 0.05
    return (torch.from_numpy(LOW) + unit * torch.from_numpy(HIGH - LOW)).float()


@pytest.mark.proves("rt2", "actions are integers in an answer, and questions are answers, too")
def test_lessons() -> None:
    model = policy()
    done = actions(4)
    batch = model.lesson(observations(4), done, torch.tensor([[True], [True], [True], [False]]))
    assert model.tokenizer is not None
    for row in range(3):
        labels = batch["labels"][row]
        said = labels[labels != IGNORE].tolist()
        assert said.pop() == model.stop_ids[0]
        text = model.tokenizer.decode(said)
        unit = model.action_normaliser.normalise(done[row, 0])
        assert text == " ".join(str(round(float((x + 1) * 127.5))) for x in unit)
        back = model.to_robot(model.bins.decode([text]))[0]
        scale = model.action_normaliser.restore(torch.ones(3)) - model.action_normaliser.restore(-torch.ones(3))
        assert float(((back - done[row, 0]).abs() / scale).max()) <= 1 / 256
    assert (batch["labels"][3] == IGNORE).all()
    prompt = model.observe(observations(1))["ids"][0]
    assert prompt[16] == model.config.control.start
    asked = model.tokenizer.decode(prompt[17:].tolist())
    assert asked == "Q: what action should the robot take to red? A:"
    both = Batch.join([batch, model.lesson([question("red")])])
    assert model.loss(both).weight == (both["labels"] != IGNORE).sum()
    with pytest.raises(MediaError, match="conversations"):
        model.write_prompt(Chat((*question("red").turns, Turn("user", (Text("and now?"),)))))


@pytest.mark.proves("rt2", "an answer that is no action cannot be drawn")
def test_only_actions_are_said() -> None:
    pytest.importorskip("llguidance")
    model = policy()
    batch = model.observe(observations(6))
    free = complete(model, batch, Settings(max_new_tokens=model.longest, temperature=1.0, seed=0), model.tokenizer)
    with pytest.raises(MediaError, match="no action"):
        model.hear(free)
    model.temperature = 3.0
    drawn = [model.act(batch, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1, 2)]
    assert drawn[0].shape == (6, 1, 3)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    scale = torch.from_numpy(HIGH - LOW).float()
    for each in drawn:  # within the quantiles, give or take rounding
        assert bool((each >= torch.from_numpy(LOW).float() - 1e-3 * scale).all())
        assert bool((each <= torch.from_numpy(HIGH).float() + 1e-3 * scale).all())
    model.temperature = 0.0
    assert torch.equal(model.act(batch), model.act(batch))


@pytest.mark.proves("rt2", "weights: starts from a PaliGemma, and is one no more")
def test_starts_from_paligemma(tmp_path: Path) -> None:
    whole = nano("paligemma").eval()
    model = RT2.from_folder(whole.save(tmp_path / "paligemma"), "hf")
    batch = nano_batch(whole)
    assert model.config.action_dim == 7
    torch.testing.assert_close(model(batch), whole(batch), rtol=0, atol=0)
    assert isinstance(polymodal.load(model.save(tmp_path / "rt2")), RT2)
    assert type(polymodal.load(tmp_path / "paligemma")) is type(whole)


class Demonstrations:
    """What was done in front of each colour."""

    def __init__(self, model: RT2) -> None:
        self.model, self.seen, self.done = model, observations(12), actions(12)

    def __len__(self) -> int:
        return len(self.seen)

    def batch(self, indices: Sequence[int], rng: np.random.Generator) -> Batch:
        chosen = list(indices)
        return self.model.lesson(
            [self.seen[i] for i in chosen], self.done[chosen], torch.ones(len(chosen), 1, dtype=torch.bool)
        )


@pytest.mark.proves("rt2", "co-training: actions are learned and language is kept, which actions alone forget")
def test_co_training_keeps_language() -> None:
    torch.manual_seed(0)
    model = policy()
    model.init_weights()
    questions = Lessons([question(name) for name in COLOURS] * 3, model.lesson)
    demonstrations = Demonstrations(model)
    every, rng = list(range(12)), np.random.default_rng(0)
    talk, act = questions.batch(every, rng), demonstrations.batch(every, rng)

    def train(source: Lessons | Demonstrations | Mixture, steps: int) -> tuple[float, float]:
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        for step in range(steps):
            places = [(8 * step + i) % len(source) for i in range(8)]
            loss = model.loss(source.batch(places, rng)).mean
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.inference_mode():
            return float(model.loss(talk).mean), float(model.loss(act).mean)

    known, _ = train(questions, 40)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    forgotten, alone = train(demonstrations, 60)
    model.load_state_dict(state)
    kept, together = train(Mixture([demonstrations, questions], ROBOT_SHARE), 60)
    assert known < 0.5
    assert forgotten > 2 * known + 1
    assert kept < known + 0.1
    assert together < alone + 1
