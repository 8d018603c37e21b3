"""Planning: with a perfect model the goal is reached, with one that knows nothing it is not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from polymodal.act.planning import InImagination, InSimulator, Planner, Rewinds, Search
from polymodal.core.errors import ConfigError, MediaError
from polymodal.core.observation import Observation
from polymodal.data.worlds import clips
from polymodal.systems.imagining import WorldModel
from recipes.nano import worlds
from tests.nano import nano, shaken

# ---- the search


def bowl(plans: np.ndarray) -> np.ndarray:
    """The cheapest plan goes to (0.5, -0.5) at each step."""
    return ((plans - np.array([0.5, -0.5])) ** 2).sum((1, 2))


def test_rounds_make_plans_better_and_never_worse() -> None:
    settings = {"low": (-1.0, -1.0), "high": (1.0, 1.0), "steps": 4, "plans": 40}
    once, often = (
        [Search(**settings, rounds=rounds)(bowl, np.random.default_rng(seed))[1] for seed in range(5)]
        for rounds in (1, 6)
    )
    assert all(more < one for one, more in zip(once, often, strict=True))
    assert max(often) < 0.2 < min(once)


def test_plans_are_held_and_stay_within_bounds() -> None:
    seen: list[np.ndarray] = []

    def watch(plans: np.ndarray) -> np.ndarray:
        seen.append(plans)
        return bowl(plans * 9)

    search = Search(low=(-1.0, 0.0), high=(0.2, 0.0), steps=5, plans=10, best=3, held=2)
    _, price = search(watch, np.random.default_rng(0))
    every = np.concatenate(seen)
    assert every.shape == (30, 5, 2)
    assert np.array_equal(every[:, 0], every[:, 1])
    assert np.array_equal(every[:, 2], every[:, 3])
    assert every.min() >= -1
    assert every[..., 0].max() <= np.float32(0.2)
    assert not every[..., 1].any()
    assert price == pytest.approx(min(bowl(every * 9)))
    start = np.tile(np.float32([0.1, 0]), (5, 1))
    assert np.array_equal(search(lambda plans: bowl(plans * 5), np.random.default_rng(0), start)[0], start)


def test_impossible_searches_are_refused() -> None:
    good = {"low": (0.0,), "high": (1.0,), "steps": 3}
    for fields in (
        {"low": (2.0,)},
        {"high": (1.0, 1.0)},
        {"steps": 0},
        {"best": 0},
        {"best": 9, "plans": 8},
        {"low": (), "high": ()},
        {"low": (np.nan,)},
        {"high": (np.inf,)},
    ):
        with pytest.raises(ConfigError):
            Search(**{**good, **fields})
    with pytest.raises(ConfigError, match="number"):
        Search(**good)(lambda plans: np.full(len(plans), np.nan), np.random.default_rng(0))


def test_no_plan_is_drawn_around_what_has_no_cost() -> None:
    seen: list[np.ndarray] = []

    def cost(plans: np.ndarray) -> np.ndarray:
        seen.append(plans)
        return np.where(np.arange(len(plans)) < 2, [0.0, *[np.nan] * 7], np.inf if len(seen) > 1 else np.nan)

    best, price = Search(low=(-1.0,), high=(1.0,), steps=1, plans=8, best=4, rounds=2)(cost, np.random.default_rng(0))
    assert price == 0
    assert np.array_equal(best, seen[0][0])
    assert abs(seen[1] - best).max() < 0.2  # with the others it would be anywhere


# ---- in the simulator


@pytest.mark.proves("diamond", "planning: with the true simulator as its model the robot reaches what it is told")
def test_planning_with_the_true_simulator_reaches() -> None:
    pytest.importorskip("mujoco")
    from polymodal.act.envs import make

    with make("tabletop/reach", cameras=()) as env:
        assert isinstance(env, Rewinds)
        env.reset(seed=3)

        def price() -> float:
            return float(np.linalg.norm(env.data.qpos[:3] - env._above(env.told)))  # type: ignore[attr-defined]

        space = env.action_space
        search = Search(
            low=tuple(space.low.tolist()), high=tuple(space.high.tolist()), steps=4, plans=16, rounds=2, best=4, held=4
        )  # type: ignore[attr-defined]
        planner, shown = Planner(InSimulator(env, price), search), Observation()
        begun, success, steps = price(), False, 0
        while not success and steps < 40:
            _, _, _, _, info = env.step(planner.action(shown))
            success, steps = info["success"], steps + 1
        assert success, f"from {begun:.3f} m to {price():.3f} in {steps} steps"


def test_a_simulator_is_put_back_to_the_bit() -> None:
    pytest.importorskip("mujoco")
    from polymodal.act.envs import make

    with make("tabletop/pick-place+randomised", cameras=()) as env:
        assert isinstance(env, Rewinds)
        env.reset(seed=1)
        rng = np.random.default_rng(0)
        actions = rng.uniform(env.action_space.low, env.action_space.high, (12, 4))  # type: ignore[attr-defined]
        for action in actions[:4]:
            env.advance(action)
        now = env.moment()
        states = []
        for _ in range(2):
            for action in actions[4:]:
                env.advance(action)
            states.append(env.data.qpos.copy())  # type: ignore[attr-defined]
            env.rewind(now)
        assert np.array_equal(*states)
        assert not np.array_equal(states[0], env.data.qpos)  # type: ignore[attr-defined]


# ---- in imagination


class TrueClips:
    """The world `clips` as a model of itself: it looks at the actions alone."""

    action_dim, history, size = 2, 20, (32, 32)

    def __init__(self, clip: clips.Clip) -> None:
        self.clip = clip

    def imagine(self, frames: Tensor, actions: Tensor, *, seed: int | Sequence[int] = 0) -> Tensor:
        context = frames.shape[1]
        films = np.stack([self.clip.under(plan.numpy())[context:] for plan in actions])
        return torch.from_numpy(films).permute(0, 1, 4, 2, 3).float() / 255


class Deaf(TrueClips):
    """Whatever is done, it stays as it is."""

    def imagine(self, frames: Tensor, actions: Tensor, *, seed: int | Sequence[int] = 0) -> Tensor:
        return frames[:, -1:].expand(-1, actions.shape[1] + 1 - frames.shape[1], -1, -1, -1)


@pytest.mark.proves("diamond", "planning: in the imagination of a perfect model the goal is reached, of a deaf one not")
def test_planning_in_a_perfect_imagination_reaches() -> None:
    clip = worlds.lone(0)
    start, end = worlds.driven(TrueClips(clip), 0)
    assert start > 0.2
    assert end < 0.06
    assert worlds.driven(Deaf(clip), 0)[1] > 0.1


def test_the_past_is_what_was_seen_and_done() -> None:
    told: list[tuple[Tensor, Tensor]] = []

    class Listens(Deaf):
        history = 2

        def imagine(self, frames: Tensor, actions: Tensor, *, seed: int | Sequence[int] = 0) -> Tensor:
            told.append((frames, actions))
            return super().imagine(frames, actions)

    weigh = InImagination(Listens(worlds.lone(0)), lambda films: np.zeros(len(films)), "front")
    plans = np.zeros((3, 4, 2), np.float32)
    for number in range(3):
        picture = np.full((32, 32, 3), number * 51, np.uint8)
        done = np.full(2, number, np.float32) if number else None
        weigh(Observation(images={"front": picture}), done)(plans)
    assert [tuple(actions.shape) for _, actions in told] == [(3, 4, 2), (3, 5, 2), (3, 5, 2)]
    frames, actions = told[-1]
    assert frames[:, :, 0, 0, 0].tolist() == [pytest.approx([0.2, 0.4])] * 3
    assert actions[:, 0].tolist() == [[2.0, 2.0]] * 3
    weigh.reset()
    weigh(Observation(images={"front": np.zeros((32, 32, 3), np.uint8)}), None)(plans)
    assert told[-1][0].shape[1] == 1
    for images in ({}, {"front": np.zeros((16, 32, 3), np.uint8)}):
        with pytest.raises(MediaError, match="32 x 32"):
            weigh(Observation(images=images), None)


@pytest.mark.parametrize("name", ["diamond", "iris"])
def test_the_same_plan_costs_the_same(name: str) -> None:
    torch.manual_seed(0)
    model = shaken(nano(name)).eval()
    assert isinstance(model, WorldModel)
    weigh = InImagination(model, lambda films: films.double().flatten(1).mean(1).numpy(), "front", seed=3)
    width, height = model.size
    picture = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    cost = weigh(Observation(images={"front": picture}), None)
    costs = cost(np.zeros((3, 2, model.action_dim), np.float32))
    assert costs == pytest.approx(costs[0], abs=1e-6)
    weigh.seed = 4
    assert cost(np.zeros((3, 2, model.action_dim), np.float32)) != pytest.approx(costs, abs=1e-4)
