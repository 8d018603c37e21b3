"""Environments: the experts succeed, a seed says everything, and words decide what success is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gymnasium")
pytest.importorskip("mujoco")

from polymodal.act.envs import FAMILIES, make, tasks
from polymodal.act.envs.base import RobotEnv
from polymodal.act.envs.tabletop import Tabletop
from polymodal.act.envs.tabletop_model import MUCH, Randomisation
from polymodal.act.envs.tabletop_words import COLOURS, KINDS, PLACES, WORDINGS, Told, held_out
from polymodal.act.guard import Guard
from polymodal.act.runner import Expert, run
from polymodal.core.errors import ConfigError, UnsupportedError
from polymodal.core.interval import wilson

SMALL = ["tabletop/reach", "tabletop/pick-place", "babyai/PutNextLocal", "metaworld/drawer-open-v3"]


def environment(name: str, **options: Any) -> Any:
    if name.startswith("metaworld"):
        pytest.importorskip("metaworld")
    if name.startswith("babyai"):
        pytest.importorskip("minigrid")
    env = make(name, **options)
    try:
        env.reset(seed=0)
    except UnsupportedError as error:
        pytest.skip(str(error))
    return env


def play(env: Any, act: Callable[[], np.ndarray]) -> dict[str, Any]:
    while True:
        _, _, ended, cut, info = env.step(act())
        assert not (ended and cut)
        if ended or cut:
            return info


@pytest.mark.parametrize(
    ("name", "episodes"),
    [
        ("tabletop/reach", 60), ("tabletop/pick-place", 40), ("tabletop/pick-place+unseen+reworded+randomised", 40),
        ("babyai/GoToLocal", 60), ("babyai/PutNextLocal", 40), ("metaworld/push-v3", 12),
        pytest.param("metaworld/mt10", 100, marks=pytest.mark.slow),
        pytest.param("metaworld/mt50", 250, marks=pytest.mark.slow),
        pytest.param("babyai/BossLevel", 60, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_the_expert_succeeds(name: str, episodes: int) -> None:
    env = environment(name, cameras=[])
    done = 0
    for seed in range(episodes):
        env.reset(seed=seed)
        done += play(env, env.expert())["success"]
    env.close()
    if name.startswith("metaworld"):
        assert wilson(done, episodes).high >= 0.976 > 0.9 < done / episodes  # what the package's own experts reach
    else:
        assert done == episodes


@pytest.mark.parametrize("name", SMALL)
def test_observations_are_of_their_space(name: str) -> None:
    env = environment(name)
    seen, info = env.reset(seed=1)
    assert isinstance(env, RobotEnv)
    assert env.observation_space.contains(seen)
    assert set(seen["images"]) == set(env.cameras) == set(env.known_cameras)
    assert seen["state"].shape == (len(env.state_names),)
    assert env.action_space.shape == (len(env.action_names),)
    assert info["instruction"]
    assert info["success"] is False
    after, *_ = env.step(env.expert()())
    assert env.observation_space.contains(after)
    for camera in env.cameras:
        assert seen["images"][camera].std() > 5  # something is drawn
    assert (env.render() == after["images"][env.cameras[0]]).all()
    env.close()


@pytest.mark.parametrize("name", [*SMALL, "tabletop/pick-place+randomised"])
def test_a_seed_says_everything(name: str) -> None:
    env, other = environment(name), environment(name)

    def film(env: Any) -> list[np.ndarray]:
        seen, info = env.reset(seed=7)
        act, out = env.expert(), [np.frombuffer(info["instruction"].encode(), np.uint8)]
        for _ in range(4):
            out += [*seen["images"].values(), seen["state"]]
            seen, *_ = env.step(act())
        return out

    first = film(env)
    env.reset(seed=8)
    play(env, env.expert())
    for again in (film(env), film(other)):
        assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first[1:], film_of(env, 9), strict=False))
    env.close()
    other.close()


def film_of(env: Any, seed: int) -> list[np.ndarray]:
    seen, _ = env.reset(seed=seed)
    return [*seen["images"].values(), seen["state"]]


@pytest.mark.parametrize("name", ["tabletop/reach", "tabletop/pick-place", "babyai/GoToLocal"])
def test_a_swapped_instruction_decides_what_success_is(name: str) -> None:
    env = environment(name, cameras=[])
    for seed in range(15):
        _, info = env.reset(seed=seed, options={"swapped": True})
        assert (info["success"], info["success_shown"]) == (False, False)
        info = play(env, env.expert())
        assert (info["success"], info["success_shown"]) == (True, False)
    if isinstance(env, Tabletop):  # who does what is shown ends the episode without success
        _, info = env.reset(seed=0, options={"swapped": True})
        env.told, env.shown = info["shown"], info["told"]
        act = env.expert()
        env.told, env.shown = info["told"], info["shown"]
        if env.task == "pick-place":
            info = play(env, act)
            assert (info["success"], info["success_shown"]) == (False, True)
    _, info = env.reset(seed=0)
    assert "success_shown" not in info
    env.close()


@pytest.mark.parametrize("name", ["metaworld/reach-v3", "babyai/OpenDoor"])
def test_a_scene_of_one_target_cannot_be_swapped(name: str) -> None:
    env = environment(name, cameras=[])
    with pytest.raises(UnsupportedError, match="tabletop"):
        env.reset(seed=0, options={"swapped": True})


@pytest.mark.parametrize("task", ["push-v3", "door-open-v3"])
def test_an_expert_that_leans_against_its_box_is_not_limited(task: str) -> None:
    env = environment(f"metaworld/{task}", cameras=[])
    guard = Guard(env.limits(), fps=env.fps)
    assert run(env, Expert(env), guard, episodes=1).success.value == 1
    assert not guard.counts
    env.close()


def test_the_box_of_a_set_is_around_those_of_its_tasks() -> None:
    deep, usual = (environment(f"metaworld/{task}", cameras=[]) for task in ("hand-insert-v3", "reach-v3"))
    assert deep.limits().workspace.low[2] < -0.1 < 0 < usual.limits().workspace.low[2]
    usual.names = ("reach-v3", "hand-insert-v3")
    assert usual.limits().workspace == deep.limits().workspace


# ---- the table-top's words


def test_held_out_combinations_are_a_fixed_part_of_all() -> None:
    every = [Told(c, k, p) for c in COLOURS for k in KINDS for p in PLACES]
    out = [told for told in every if held_out(told)]
    assert len(out) == len(every) / 4
    seen = [told for told in every if not held_out(told)]
    for pair in ((0, 1), (0, 2), (1, 2)):  # each two words are told together in training
        assert {(t[pair[0]], t[pair[1]]) for t in seen} == {(t[pair[0]], t[pair[1]]) for t in every}
    reach = {Told(c, k, None) for c in COLOURS for k in KINDS if held_out(Told(c, k, None))}
    assert reach == {Told("yellow", "cube", None), Told("blue", "cup", None), Told("green", "ball", None)}


@pytest.mark.parametrize("task", ["reach", "pick-place"])
def test_what_is_held_out_is_never_told_in_training(task: str) -> None:
    usual, others = WORDINGS[task]
    assert not set(usual) & set(others)
    for variants, unseen, wordings in (("", False, usual), ("+unseen+reworded", True, others)):
        env = environment(f"tabletop/{task}{variants}", cameras=[])
        said, told = set(), set()
        for seed in range(150):
            _, info = env.reset(seed=seed, options={"swapped": bool(seed % 2)})
            for asked in (info["told"], info.get("shown", info["told"])):
                assert held_out(asked) == unseen
                told.add(asked)
            one = info["told"]
            fits = [w for w in wordings if w.format(thing=f"{one.colour} {one.kind}", place=one.place)
                    == info["instruction"]]  # fmt: skip
            assert len(fits) == 1
            said.update(fits)
        assert said == set(wordings)
        assert {t.colour for t in told} == set(COLOURS) or (unseen and task == "reach")


def test_the_scene_does_not_tell_what_is_meant() -> None:
    """Two colours meet two kinds; each thing is as often the one that is told, wherever it stands in the state."""
    env = environment("tabletop/pick-place", cameras=[], privileged=True)
    slots = np.zeros(4)
    for seed in range(200):
        seen, info = env.reset(seed=seed)
        pairs = list(env.things)
        assert len({c for c, _ in pairs}) == len({k for _, k in pairs}) == 2
        slots[pairs.index(info["told"][:2])] += 1
        colour = seen["state"][4:].reshape(-1)[: 4 * 10].reshape(4, 10)[:, 3:7]
        assert [list(COLOURS)[n] for n in colour.argmax(1)] == [c for c, _ in pairs]
    assert slots.min() > 30
    plain = environment("tabletop/reach", cameras=[], kinds=["cube"])
    assert sorted(c for c, _ in plain.things) == sorted(COLOURS)


def test_randomisation_changes_the_look_and_not_the_task() -> None:
    plain, varied = environment("tabletop"), environment("tabletop", randomisation=MUCH)
    dark = environment("tabletop", randomisation=Randomisation(light=1.0))
    for seed in (3, 4):
        a, b, c = (env.reset(seed=seed) for env in (plain, varied, dark))
        assert a[1]["instruction"] == b[1]["instruction"] == c[1]["instruction"]
        np.testing.assert_allclose(plain.data.qpos, varied.data.qpos)
        assert (a[0]["images"]["front"] != b[0]["images"]["front"]).mean() > 0.3
    assert (varied.model.body_mass != plain.model.body_mass).any()
    plain.model.geom_rgba[:] = 0
    plain.reset(seed=3)
    assert plain.model.geom_rgba.any()  # each reset starts from what is usual


def test_things_can_be_told_apart_at_64_pixels() -> None:
    env = environment("tabletop", size=64)
    for seed in range(5):
        picture = env.reset(seed=seed)[0]["images"]["front"].astype(int)
        for colour, _ in env.things:
            near = np.abs(picture - 255 * np.array(COLOURS[colour])).sum(2) < 150
            assert near.sum() >= 12  # two things, each of a dozen pixels, some of them in the shade


# ---- names and errors


def test_names() -> None:
    assert set(tasks("tabletop")) == {"reach", "pick-place"}
    assert environment("tabletop", cameras=[]).task == "pick-place"
    pytest.importorskip("metaworld")
    assert len(tasks("metaworld")) == 52
    from polymodal.act.envs.metaworld_words import WORDS

    assert len(WORDS) == len(set(WORDS.values())) == 50
    pytest.importorskip("minigrid")
    assert {"GoToLocal", "PutNextLocal", "BossLevel"} <= set(tasks("babyai"))
    assert set(FAMILIES) == {"tabletop", "metaworld", "babyai", "miniwob"}


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("tabeltop", {}, "Did you mean 'tabletop'"),
        ("tabletop/raech", {}, "Did you mean 'reach'"),
        ("tabletop/reach+unsene", {}, "Did you mean 'unseen'"),
        ("tabletop", {"cameras": ["frnt"]}, "Did you mean 'front'"),
        ("tabletop", {"colour": 3}, "no option 'colour'"),
        ("tabletop", {"kinds": ["spoon"]}, "cube, cup, ball"),
        ("babyai", {"size": 60}, "multiple of 7"),
        ("metaworld/push", {}, "push-v3"),
        ("", {}, "tabletop"),
    ],
)
def test_a_wrong_name_says_what_there_is(name: str, options: dict[str, Any], said: str) -> None:
    for package in ("metaworld", "minigrid"):
        pytest.importorskip(package)
    with pytest.raises(ConfigError, match=said):
        make(name, **options)


@pytest.mark.parametrize("action", [[0, 0, 0], [0, 0, np.nan, 1], [[0, 0, 0, 0]]])
def test_a_bad_action_is_refused(action: list[Any]) -> None:
    env = environment("tabletop", cameras=[])
    with pytest.raises(ConfigError, match="4 finite numbers"):
        env.step(action)


def test_an_action_is_held_to_what_the_robot_can_do() -> None:
    env = environment("tabletop", cameras=[])
    for action in ([9, 9, 9, 9], [-9, -9, -9, -9]):
        env.reset(seed=0)
        before = env.data.qpos[:3].copy()
        env.step(np.array(action, np.float32))
        assert np.abs(env.data.qpos[:3] - before).max() < 0.03
        for _ in range(60):
            env.step(np.array(action, np.float32))
        assert (np.abs(env.data.qpos[:2]) < [0.27, 0.23]).all()
        assert 0.01 < env.data.qpos[2] < 0.26
