"""Statistics, normalisation, grippers, differences and rotations; and what policies share."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation as SciPy
from torch import Tensor

from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError, DataError, MediaError, PolymodalError
from polymodal.core.observation import Observation
from polymodal.core.verbs import Acts
from polymodal.modalities.action import (
    GRIPPERS,
    Gripper,
    Normaliser,
    Statistics,
    from_steps,
    to_absolute,
    to_relative,
    to_steps,
)  # fmt: skip
from polymodal.modalities.image import Exact, ImageProcessor
from polymodal.modalities.rotation import WIDTHS, Rotation, convert, from_matrix, to_matrix
from polymodal.systems.acting import STATISTICS, Policy, read_statistics

KINDS: Any = ("quantile", "zscore", "minmax", "identity")


def rows(count: int = 500, seed: int = 0) -> np.ndarray:
    """Of an arm: one dimension that never moves, one almost still, one that moves once in 200 rows, a large one."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, [0.02, 0.5, 0, 1e-9, 0, 40], (count, 6)) + np.array([0, 1, 0.3, -2, 0, 900])
    x[::200, 4] = 1.0
    return x.astype(np.float32)


def test_statistics_merge_exactly_but_for_quantiles() -> None:
    x = rows(900)
    parts = [Statistics.from_array(part) for part in (x[:100], x[100:400], x[400:])]
    whole, merged = Statistics.from_array(x), Statistics.merge(parts)
    assert merged.count == 900
    for name in ("min", "max", "mean", "std"):
        np.testing.assert_allclose(merged.known[name], whole.known[name], atol=1e-12)
    spread = whole.known["q99"] - whole.known["q01"]
    assert (np.abs(merged.known["q50"] - whole.known["q50"]) <= 0.05 * spread + 1e-12).all()


def test_statistics_round_trip_in_lerobots_names() -> None:
    s = Statistics.from_array(rows(), mask=(True,) * 5 + (False,))
    again = Statistics.from_json(json.loads(json.dumps(s.to_json())))
    assert again.to_json() == s.to_json()
    assert set(s.to_json()) == {"min", "max", "mean", "std", "q01", "q10", "q50", "q90", "q99", "mask", "count"}
    assert s.to_json()["count"] == [500]


@pytest.mark.parametrize(
    "raw",
    [
        None, [], {}, {"q1": [0.0]}, {"mean": 1.0}, {"mean": [[0.0]]}, {"mean": [0.0], "std": [1.0, 2.0]},
        {"mean": [float("nan")]}, {"std": [-1.0]}, {"min": [1.0], "max": [0.0]}, {"q01": [1.0], "q99": [0.0]},
        {"mean": ["a"]}, {"mean": [0.0], "count": []}, {"mean": [0.0], "mask": [True, False]},
        {"mean": [0.0], "mask": 3}, {"mean": [0.0], "count": "x"}, {"mean": [[0.0], [0.0, 1.0]]},
    ],
)  # fmt: skip
def test_malformed_statistics_are_refused(raw: Any) -> None:
    with pytest.raises(ConfigError):
        Statistics.from_json(raw)


def test_statistics_of_nothing_or_of_what_is_not_finite() -> None:
    broken = rows()
    broken[7, 2] = np.nan
    for bad in (broken, rows()[:0]):
        with pytest.raises(DataError):
            Statistics.from_array(bad)
    for parts in ([], [Statistics(mean=np.zeros(2))], [Statistics.from_array(rows()[:, :n]) for n in (2, 3)]):
        with pytest.raises(DataError):
            Statistics.merge(parts)


@pytest.mark.parametrize("kind", KINDS)
def test_normaliser_is_bounded_and_inverts(kind: Any) -> None:
    x = torch.from_numpy(rows())
    n = Normaliser(statistics=Statistics.from_array(x.numpy()), kind=kind)
    kept = [0, 1, 2, 3, 5] if kind == "zscore" else slice(None)  # one move in 200 is 13 deviations away: clipped
    torch.testing.assert_close(n.restore(n.normalise(x))[:, kept], x[:, kept], rtol=1e-6, atol=1e-6)
    assert torch.equal(n.restore(n.normalise(x))[:, 2], x[:, 2])  # the constant one to the bit
    if kind == "identity":
        return
    for wild in (x, x + 0.5, x * 1e6, torch.full_like(x, -torch.inf), torch.full_like(x, torch.inf)):
        assert n.normalise(wild).abs().max() <= 10
    assert n.restore(torch.randn(1000, 6))[:, 2].sub(0.3).abs().max() < 1e-3  # noise moves no joint that never moved


def test_what_moves_rarely_keeps_its_range() -> None:
    """Its quantiles agree: divided by their difference, the one move in 200 would be 10^4, or clipped away."""
    x = torch.from_numpy(rows())
    normal = Normaliser(statistics=Statistics.from_array(x.numpy())).normalise(x)[:, 4]
    assert set(normal.tolist()) == {-1.0, 1.0}


def test_quantiles_land_on_one() -> None:
    s = Statistics.from_array(rows())
    n = Normaliser(statistics=s)
    for name, value in (("q01", -1.0), ("q99", 1.0)):
        landed = n.normalise(torch.from_numpy(s.known[name]).float())
        torch.testing.assert_close(landed[[0, 1, 5]], torch.full((3,), value), rtol=1e-4, atol=1e-4)


def test_mask_leaves_dimensions_alone() -> None:
    x = torch.from_numpy(rows()) * 100
    mask = (True, True, True, True, True, False)
    for n in (
        Normaliser(statistics=Statistics.from_array(rows(), mask=mask)),
        Normaliser(statistics=Statistics.from_array(rows()), mask=mask),
    ):
        assert torch.equal(n.normalise(x)[:, 5], x[:, 5])
        assert torch.equal(n.restore(x)[:, 5], x[:, 5])
    with pytest.raises(ConfigError):
        Normaliser(statistics=Statistics.from_array(rows()), mask=(True,))


@pytest.mark.parametrize("kind", ["quantile", "zscore", "minmax"])
def test_lacking_statistics_raise(kind: Any) -> None:
    with pytest.raises(PolymodalError, match="needs"):
        Normaliser(statistics=Statistics(q50=np.zeros(3)), kind=kind)


def test_grippers() -> None:
    opening = torch.tensor([0.0, 0.25, 1.0])
    theirs = GRIPPERS["openvla"].to(GRIPPERS["robosuite"], opening)
    assert theirs.tolist() == [1.0, 0.5, -1.0]
    assert GRIPPERS["robosuite"].to(GRIPPERS["openvla"], theirs).tolist() == opening.tolist()
    assert Gripper(open=0.08, closed=0.0).snap(torch.tensor([0.01, 0.05])).tolist() == pytest.approx([0.0, 0.08])


def test_differences_invert() -> None:
    generator = torch.Generator().manual_seed(0)
    actions, state = torch.randn(3, 8, 4, generator=generator), torch.randn(3, 4, generator=generator)
    dims = (True, True, False, True)
    relative = to_relative(actions, state, dims)
    assert torch.equal(relative[..., 2], actions[..., 2])
    torch.testing.assert_close(relative[:, 5, 0], actions[:, 5, 0] - state[:, 0])
    torch.testing.assert_close(to_absolute(relative, state, dims), actions)
    torch.testing.assert_close(to_steps(actions, state)[:, 0], actions[:, 0] - state)
    torch.testing.assert_close(from_steps(to_steps(actions, state), state), actions)


def theirs(name: Rotation, r: SciPy) -> np.ndarray:
    matrix, quaternion = r.as_matrix(), r.as_quat(canonical=True)
    return {
        "matrix": matrix.reshape(-1, 9), "6d": matrix[:, :, :2].swapaxes(1, 2).reshape(-1, 6),
        "quaternion": np.roll(quaternion, 1, -1), "quaternion_xyzw": quaternion,
        "euler": r.as_euler("xyz"), "axis_angle": r.as_rotvec(),
    }[name]  # fmt: skip


@pytest.mark.parametrize(("source", "target"), list(itertools.product(WIDTHS, WIDTHS)))
def test_rotations_agree_with_scipy(source: Rotation, target: Rotation) -> None:
    turns = SciPy.random(200, np.random.default_rng(0))
    # Half turns about each axis, none, and tiny ones: where formulas divide by nothing.
    special = SciPy.from_rotvec([*np.eye(3) * np.pi, *np.eye(3) * (np.pi - 1e-4), [0, 0, 0], [1e-7, 0, 0]])
    for r in (turns, special):
        ours = convert(torch.from_numpy(theirs(source, r)), source, target)
        difference = to_matrix(ours, target) - torch.from_numpy(r.as_matrix())
        assert difference.abs().max() < 2e-6
    np.testing.assert_allclose(
        convert(torch.from_numpy(theirs(source, turns)), source, target), theirs(target, turns), atol=1e-6
    )


def test_gimbal_lock_keeps_the_rotation() -> None:
    for pitch in (np.pi / 2, -np.pi / 2):
        r = torch.from_numpy(SciPy.from_euler("xyz", [0.4, pitch, -0.9]).as_matrix())
        torch.testing.assert_close(to_matrix(from_matrix(r, "euler"), "euler"), r, rtol=0, atol=1e-6)


def test_what_a_network_writes_is_a_rotation() -> None:
    for kind in ("6d", "quaternion"):
        m = to_matrix(torch.randn(100, WIDTHS[kind], generator=torch.Generator().manual_seed(1)) * 5, kind)  # type: ignore[arg-type]
        torch.testing.assert_close(m @ m.mT, torch.eye(3).expand(100, 3, 3), rtol=0, atol=1e-5)
        torch.testing.assert_close(torch.linalg.det(m), torch.ones(100))


class Still(Policy):
    """Writes zeros: every action is the middle of its range."""

    horizon, action_width, state_width, cameras = 4, 8, 8, ("front", "wrist")

    def chunk(self, batch: Batch, generator: torch.Generator | None = None) -> Tensor:
        return torch.zeros(batch.size, self.horizon, self.action_width)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")


@pytest.fixture
def policy() -> Still:
    made = Still(config=None)
    made.images = ImageProcessor(resize=Exact(height=8, width=8), crop=None, mean=(0.5,) * 3, std=(0.5,) * 3)
    s = Statistics.from_array(rows())
    made.use_statistics({"arm": {"action": s, "state": s}})
    return made


def shown(**changes: Any) -> Observation:
    picture = np.full((10, 12, 3), 255, np.uint8)
    whole: dict[str, Any] = {
        "images": {"front": picture, "wrist": picture // 2},
        "state": rows()[0],
        "instruction": "go",
    }
    return Observation(**whole | changes)


def test_policy_observes_and_acts(policy: Still) -> None:
    assert isinstance(policy, Acts)
    batch = policy.observe([shown(), shown()])
    assert batch["pixels"].shape == (2, 2, 3, 8, 8)
    assert batch["pixels"][0, 0].mean() > 0.9
    assert batch["pixels"][0, 1].mean().abs() < 0.1
    assert batch["state"].shape == (2, 8)
    assert not batch["state"][:, 6:].any()
    actions = policy.act(batch)
    assert actions.shape == (2, 4, 6)
    s = policy.statistics["arm"]["action"]
    torch.testing.assert_close(
        actions[0, 0, 0].item(), float(s.known["q01"][0] + s.known["q99"][0]) / 2, rtol=0, atol=1e-6
    )
    given = torch.from_numpy(rows()[:8].reshape(2, 4, 6))
    lesson = policy.lesson([shown(), shown()], given, torch.ones(2, 4, dtype=torch.bool))
    assert lesson["actions"].shape == (2, 4, 8)
    torch.testing.assert_close(policy.to_robot(lesson["actions"]), given)


@pytest.mark.parametrize(
    "changes",
    [
        {"images": {}}, {"images": {"front": np.zeros((4, 4, 3), np.uint8)}}, {"state": None},
        {"state": np.zeros(5, np.float32)}, {"state": np.full(6, np.nan, np.float32)},
    ],
)  # fmt: skip
def test_bad_observations_are_refused(policy: Still, changes: dict[str, Any]) -> None:
    with pytest.raises(MediaError, match="observation 1"):
        policy.observe([shown(), shown(**changes)])


def test_missing_statistics_raise_and_say_what_to_do(policy: Still) -> None:
    bare, s = Still(config=None), policy.statistics["arm"]
    bare.images = policy.images
    for call in (lambda: bare.act(Batch(x=torch.zeros(1))), lambda: bare.observe([shown()]), lambda: bare.action_dim):
        with pytest.raises(PolymodalError, match="use_statistics"):
            call()
    bare.use_statistics({"a": s, "b": s})
    with pytest.raises(PolymodalError, match=r"policy\.dataset"):
        bare.observe([shown()])
    bare.dataset = "b"
    bare.observe([shown()])
    for name, given in (("c", {"a": s}), (None, {"wide": {"action": Statistics(mean=np.zeros(9))}})):
        with pytest.raises(ConfigError):
            bare.use_statistics(given, name)


def test_statistics_are_saved_beside_the_weights(policy: Still, tmp_path: Path) -> None:
    policy.save_processors(tmp_path)
    again = Still(config=None)
    again.load_processors(tmp_path)
    assert again._statistics_json() == policy._statistics_json()
    assert again.dataset == "arm"


def test_published_statistics_load(tmp_path: Path) -> None:
    entry = {
        "mean": [0.0, 0.5],
        "std": [1.0, 0.5],
        "q01": [-1.0, 0.0],
        "q99": [1.0, 0.0],
        "min": [-9.0, 0.0],
        "max": [9.0, 1.0],
    }
    openvla = {
        "bridge_orig": {
            "action": entry | {"mask": [True, False]},
            "proprio": entry,
            "num_transitions": 7,
            "num_trajectories": 2,
        }
    }
    (tmp_path / STATISTICS).write_text(json.dumps(openvla))
    s = read_statistics(tmp_path / STATISTICS)["bridge_orig"]
    assert (s["action"].mask, s["action"].count, s["state"].dim) == ((True, False), 7, 2)
    # OpenVLA clips at the quantiles: where they agree its network has never seen the extremes.
    assert Normaliser(statistics=s["state"]).restore(torch.ones(2))[1] < 1e-3
    small = {name: entry[name] for name in ("mean", "std", "q01", "q99")}
    openpi = tmp_path / "trossen" / "norm_stats.json"
    openpi.parent.mkdir()
    openpi.write_text(json.dumps({"norm_stats": {"state": small, "actions": small}}))
    assert read_statistics(openpi).keys() == {"trossen"}
    for broken in ("[]", '{"a": 1}', '{"a": {"reward": {}}}', '{"a": {"action": {"mean": "x"}}}'):
        (tmp_path / STATISTICS).write_text(broken)
        with pytest.raises(ConfigError):
            read_statistics(tmp_path / STATISTICS)
