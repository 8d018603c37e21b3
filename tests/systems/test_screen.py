"""The policy for screens: what a lesson says, what is typed, and that it learns to click on what it is told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import polymodal
from polymodal.act.envs.web.actions import KINDS, NAMES, ScreenAction, from_vector, to_vector
from polymodal.core.batch import IGNORE
from polymodal.core.errors import ConfigError, DataError, MediaError
from polymodal.core.observation import Observation
from polymodal.core.verbs import Acts
from polymodal.modalities.action import Statistics
from polymodal.systems.screen import ScreenConfig, spoken, words_of

SMALL = ScreenConfig(words=("click", "green", "red", "type"), height=48, width=64, channels=16, dim=32, num_layers=1)


def screen_policy(**fields: Any) -> Any:
    torch.manual_seed(0)
    model = polymodal.build(replace(SMALL, **fields))
    numbers = Statistics.from_array(np.zeros((2, len(NAMES))))
    model.use_statistics({"screen": {"action": numbers, "state": Statistics.from_array(np.zeros((2, 2)))}})
    return model


def seen(told: str, picture: np.ndarray | None = None, pointer: tuple[float, float] = (0, 0)) -> Observation:
    picture = np.full((48, 64, 3), 255, np.uint8) if picture is None else picture
    return Observation(images={"screen": picture}, state=np.array(pointer, np.float32), instruction=told)


def lesson(model: Any, observations: list[Observation], acts: list[ScreenAction]) -> Any:
    vectors = torch.from_numpy(np.stack([to_vector(act) for act in acts]))[:, None]
    return model.lesson(observations, vectors, torch.ones(len(acts), 1, dtype=torch.bool))


def test_kinds_are_those_of_screens() -> None:
    assert len(KINDS) == SMALL.kinds
    assert KINDS[SMALL.typed] == "type"
    assert [KINDS[kind] for kind in SMALL.placed] == ["click", "double_click", "right_click", "move"]
    with pytest.raises(ConfigError, match="kinds of acts"):
        replace(SMALL, typed=9)


def test_words_keep_signs_and_letters() -> None:
    assert words_of('Click on (-2,1), "Ab-c"') == ["Click", "on", "-2", "1", "Ab", "c"]
    assert spoken("at (-2,1)") == "at minus2 1"


def test_what_is_typed_is_a_word_of_what_is_told() -> None:
    model = screen_policy()
    told = 'Type "xY7" into it'
    batch = lesson(
        model, [seen(told), seen(told)], [ScreenAction("type", text="xY7"), ScreenAction("click", (1.0, 0.5))]
    )
    assert batch["actions_kind"].tolist() == [7, 1]
    assert batch["actions_word"].tolist() == [1, IGNORE]
    with pytest.raises(DataError, match="'xy7' is typed"):
        lesson(model, [seen(told)], [ScreenAction("type", text="xy7")])
    with pytest.raises(MediaError, match="33 letters"):
        model.observe([seen("a" * 33)])


def test_it_learns_where_to_click_and_what_to_type() -> None:
    """Told a colour, it clicks there, on places it was not shown; told to type, it types a word it does not know."""
    model, rng = screen_policy(words=("click", "green", "red", "type")), np.random.default_rng(0)
    assert isinstance(model, Acts)

    def one() -> tuple[Observation, ScreenAction]:
        picture, centres = np.full((48, 64, 3), 255, np.uint8), {}
        for colour, column in zip(("red", "green"), rng.permutation(2), strict=True):
            x, y = rng.integers(6, 26) + 32 * column, rng.integers(6, 42)
            picture[y - 5 : y + 5, x - 5 : x + 5] = (220, 0, 0) if colour == "red" else (0, 180, 0)
            centres[colour] = (x / 64, y / 48)
        if rng.random() < 0.3:
            word = "".join(rng.choice(list("abcXYZ123"), 4))
            return seen(f"type {word}", picture), ScreenAction("type", text=word)
        colour = str(rng.choice(list(centres)))
        return seen(f"click {colour}", picture), ScreenAction("click", centres[colour])

    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(60):
        model.train()
        optimizer.zero_grad()
        shown, acts = zip(*(one() for _ in range(32)), strict=True)
        model.loss(lesson(model, list(shown), list(acts))).mean.backward()
        optimizer.step()
    shown, wanted = zip(*(one() for _ in range(100)), strict=True)
    done = [from_vector(row.numpy()) for row in model.eval().act(model.observe(list(shown)))[:, 0]]
    assert [act.kind for act in done] == [act.kind for act in wanted]
    right = [
        act.text == want.text and all(abs(a - b) < 0.1 for a, b in zip(act.numbers, want.numbers, strict=True))
        for act, want in zip(done, wanted, strict=True)
    ]
    assert sum(right) >= 95, sum(right)


def test_it_knows_where_the_pointer_is() -> None:
    model = screen_policy().eval()
    here, there = (model(model.observe([seen("click", pointer=p)])).cell for p in ((0.1, 0.1), (0.9, 0.9)))
    assert not torch.allclose(here, there)
    near = model._near(torch.tensor([[0.5 / 8, 2.5 / 6]]))[0, 0]
    assert divmod(int(near.argmax()), near.shape[1]) == (2, 0)
    assert float(near.max()) == pytest.approx(1)
