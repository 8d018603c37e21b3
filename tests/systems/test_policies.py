"""ACT, Diffusion Policy and behaviour cloning with every head, as policies: they act, learn and are kept."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import polymodal
from polymodal.core.errors import ConfigError, MediaError, UnsupportedError
from polymodal.core.observation import Observation, with_past
from polymodal.core.verbs import Acts, Continues
from polymodal.encoders.trunk import StateTrunk, TileTrunk
from polymodal.modalities.action import Statistics
from polymodal.nn.precision import cast
from polymodal.systems.behaviour import BehaviourCloning, BehaviourConfig
from polymodal.systems.chunk_heads import L1, Bins, Choice, Diffusion, Flow, Head
from polymodal.systems.token_head import Tokens
from polymodal.tokenizers.fast import FAST
from tests.nano import NANO, nano, nano_batch

NAMES = ("act", "diffusion_policy", "behaviour_cloning")
HEADS = (L1(), Bins(width=8), Tokens(vocab_size=400, hidden_dim=32, num_layers=1), Flow(), Diffusion(), Choice())


def test_crops_are_random_while_training_only() -> None:
    model: Any = nano("diffusion_policy")
    batch = nano_batch(model)
    with torch.no_grad():
        assert torch.equal(model.eval()(batch), model(batch))
        model.train()
        assert len({tuple(model(batch).flatten()[:50].tolist()) for _ in range(8)}) > 1


def statistics(state: int, action: int) -> dict[str, dict[str, Statistics]]:
    rng = np.random.default_rng(0)
    return {
        "robot": {
            "state": Statistics.from_array(rng.normal(2, 3, (500, state))),
            "action": Statistics.from_array(rng.normal(-1, 2, (500, action))),
        }
    }


def ready(name: str, head: Head | None = None) -> Any:
    config = NANO[name] if head is None else replace(NANO[name], head=head)
    torch.manual_seed(0)
    model: Any = polymodal.build(config).eval()
    model.use_statistics(statistics(3, 5))
    if isinstance(head, Tokens):
        chunks = model.to_network(torch.randn(100, model.horizon, 5) * 2 - 1)
        model.fast = FAST.fit(chunks, scale=10.0, vocab_size=head.vocab_size)
    return model


def seen(model: Any, number: int = 0, **more: Any) -> Observation:
    rng = np.random.default_rng(number)
    images = {camera: rng.integers(0, 256, (30, 40, 3), dtype=np.uint8) for camera in model.cameras}
    state = rng.normal(2, 3, 3).astype(np.float32)
    return Observation(images=images, state=state, instruction="put the red cup", **more)


def assert_acts(model: object) -> None:
    assert isinstance(model, Acts)


def assert_continues(model: object) -> None:
    assert isinstance(model, Continues)


_CLAIM = "acting: the same seed gives the same chunk; lessons are learned; what is saved acts the same"
_CASES = [("act", None), ("diffusion_policy", None), *(("behaviour_cloning", head) for head in HEADS)]
POLICIES = [
    pytest.param(name, head, id=name if head is None else type(head).__name__, marks=pytest.mark.proves(name, _CLAIM))
    for name, head in _CASES
]


@pytest.mark.parametrize(("name", "head"), POLICIES)
def test_every_policy_acts_learns_and_is_kept(name: str, head: Any, tmp_path: Path) -> None:
    model = ready(name, head)
    assert_acts(model)
    observations = [seen(model, n) for n in range(3)]
    batch = model.observe(observations)
    one, again, other = (model.act(batch, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert one.shape == (3, model.horizon, 5)
    assert bool(one.isfinite().all())
    assert torch.equal(one, again), "the same seed, the same actions"
    samples = isinstance(head, Flow | Diffusion | Choice) or name == "diffusion_policy"
    assert torch.equal(one, other) != samples, "only what samples depends on the seed"

    wanted = torch.rand(3, model.horizon, 5)
    valid = torch.ones(3, model.horizon, dtype=torch.bool)
    valid[1, 2:] = False
    lesson = model.lesson(observations, wanted, valid)
    model.train()
    losses, optimizer = [], torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(15):
        torch.manual_seed(0)
        loss = model.loss(lesson).mean
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]

    loaded: Any = polymodal.load(model.eval().save(tmp_path / "policy"))
    assert loaded.fingerprint == model.fingerprint
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    torch.testing.assert_close(
        loaded.act(loaded.observe(observations), generator=generators[0]), model.act(batch, generator=generators[1])
    )


@pytest.mark.parametrize("name", [*NAMES, "rt1", "octo", "pi0", "pi05", "openvla_oft"])
def test_in_bf16_it_acts_as_in_fp32(name: str) -> None:
    model: Any = nano(name).eval()
    numbers = np.random.default_rng(0).normal(size=(9, model.action_width))
    model.use_statistics({"robot": {"action": Statistics.from_array(numbers)}})
    batch = nano_batch(model)
    exact = model.act(batch, generator=torch.Generator().manual_seed(0))
    rough = cast(model, "bf16").act(batch, generator=torch.Generator().manual_seed(0))
    assert any(p.dtype == torch.bfloat16 for p in model.parameters())
    assert rough.dtype == torch.float32
    assert float((rough - exact).abs().median()) < 0.1 * float(exact.abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_what_is_missing_is_said(name: str) -> None:
    model: Any = nano(name).eval()
    with pytest.raises(ConfigError, match="has no statistics of its robot"):
        model.observe([seen(model)])
    model.use_statistics(statistics(3, 5))
    blind = seen(model)
    with pytest.raises(MediaError, match="looks through the camera"):
        model.observe([replace(blind, images={})])
    with pytest.raises(MediaError, match="state of 3 numbers"):
        model.observe([replace(blind, state=np.zeros(4, np.float32))])


@pytest.mark.parametrize(("head", "learned"), [(L1(), False), (Flow(), True), (Diffusion(), True)])
def test_numbers_that_a_robot_lacks_are_learned_where_the_head_reads_them_again(head: Head, learned: bool) -> None:
    model: Any = polymodal.build(replace(NANO["behaviour_cloning"], head=head))
    model.use_statistics(statistics(3, 4))
    lesson = model.lesson([seen(model)], torch.randn(1, 4, 4), torch.ones(1, 4, dtype=torch.bool))
    assert model.loss(lesson).weight == 4 * (5 if learned else 4)


def test_a_diffusion_policy_sees_the_moment_before_and_learns_what_was_done_then() -> None:
    model = ready("diffusion_policy")
    first, second = with_past([seen(model, 1), seen(model, 2)], 2, np.array([[1.0] * 5, [2.0] * 5], np.float32))
    both = model.observe([first, second])
    assert both["state"].shape == (2, 2, 3)
    torch.testing.assert_close(both["pixels"][0, 0], both["pixels"][0, 1])  # nothing was before: the same again
    torch.testing.assert_close(both["pixels"][1, 0], both["pixels"][0, 1])
    assert model.horizon == model.config.horizon - 1
    wanted = torch.full((2, model.horizon, 5), 3.0)
    lesson = model.lesson([first, second], wanted, torch.ones(2, model.horizon, dtype=torch.bool))
    done = model.to_robot(lesson["actions"])
    torch.testing.assert_close(done[:, 0], torch.tensor([[3.0] * 5, [1.0] * 5]))
    assert lesson["actions_valid"].shape == (2, model.config.horizon)


def test_a_robot_with_fewer_numbers_is_not_taught_those_it_has_not() -> None:
    model = ready("behaviour_cloning")
    model.use_statistics(
        {"small": {"state": statistics(3, 5)["robot"]["state"], "action": statistics(3, 2)["robot"]["action"]}}
    )
    lesson = model.lesson([seen(model)], torch.rand(1, 4, 2), torch.ones(1, 4, dtype=torch.bool))
    assert lesson["actions_dims"].tolist() == [[True, True, False, False, False]]
    assert model.loss(lesson).weight == 8
    assert model.act(model.observe([seen(model)])).shape == (1, 4, 2)


def test_words_decide_and_an_unknown_one_does_not_harm() -> None:
    config = BehaviourConfig(
        trunk=StateTrunk(state_width=2, dim=64, num_layers=1), words=("blue", "red", "take", "the"), horizon=2,
        action_width=1, text_dim=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = BehaviourCloning.build(config)
    model.use_statistics(statistics(2, 1))
    state = np.zeros(2, np.float32)
    told = [Observation(state=state, instruction=f"take the {colour}") for colour in ("red", "blue")]
    wanted = torch.tensor([[[-3.0]] * 2, [[2.0]] * 2])
    lesson, optimizer = (
        model.lesson(told, wanted, torch.ones(2, 2, dtype=torch.bool)),
        torch.optim.Adam(model.parameters(), lr=1e-2),
    )
    for _ in range(120):
        optimizer.zero_grad()
        model.loss(lesson).mean.backward()
        optimizer.step()
    asked = [Observation(state=state, instruction=text) for text in ("take the red", "take that blue")]
    done = model.eval().act(model.observe(asked))
    assert bool(((done - wanted).abs() < 0.5 * (done - wanted.flip(0)).abs()).all())
    alone = torch.cat([model.act(model.observe([one])) for one in asked])
    torch.testing.assert_close(alone, done, atol=1e-5, rtol=1e-5)


def test_tiles_are_seen_where_they_are_and_steered_by_words() -> None:
    """Eight tiles of one colour and one of another: where it lies, in the words' direction, is what is learned."""
    trunk = TileTrunk(cameras=("agent",), image_size=12, tile=4, channels=16, kept=4, dim=32, num_layers=1)
    config = BehaviourConfig(trunk=trunk, words=("blue", "red"), horizon=1, action_width=2, text_dim=32)
    torch.manual_seed(0)
    model: Any = BehaviourCloning.build(config)
    model.use_statistics({"robot": {"action": Statistics.from_array(np.array([[0.0, 0.0], [2.0, 2.0]]))}})
    seen, wanted = [], []
    for red, blue in permutations(range(9), 2):
        picture = np.full((12, 12, 3), 128, np.uint8)
        for tile, channel in ((red, 0), (blue, 2)):
            row, column = divmod(tile, 3)
            picture[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 255 * np.eye(3, dtype=np.uint8)[channel]
        seen += [Observation(images={"agent": picture}, instruction=text) for text in ("red", "blue")]
        wanted += [divmod(tile, 3) for tile in (red, blue)]
    lesson = model.lesson(seen, torch.tensor(wanted).float()[:, None], torch.ones(144, 1, dtype=torch.bool))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        model.loss(lesson).mean.backward()
        optimizer.step()
    done = model.eval().act(model.observe(seen))[:, 0]
    assert float((done - torch.tensor(wanted)).abs().max()) < 0.5


def test_a_flow_that_learned_given_beginnings_makes_up_for_them() -> None:
    """A robot on a line whose hand is pushed, and which wants to be at zero: half of the way a step."""
    torch.manual_seed(0)
    head = Flow(hidden_dim=64, num_layers=1, given=2).build(8, 4, 1)
    head.init_weights()
    optimizer = torch.optim.Adam(head.parameters(), lr=5e-3)
    for _ in range(400):
        place, wanted, done = torch.rand(128, 1) * 2 - 1, list[torch.Tensor](), list[torch.Tensor]()
        start = place
        for _ in range(4):
            wanted.append(-place / 2)
            done.append(wanted[-1] + 0.3 * torch.randn(128, 1))
            place = place + done[-1]
        mask = torch.ones(128, 4, 1, dtype=torch.bool)
        loss = head.loss(start.expand(-1, 8), torch.stack(wanted, 1), mask, torch.stack(done, 1))
        optimizer.zero_grad()
        loss.mean.backward()
        optimizer.step()
    starts, given = torch.rand(200, 1) * 2 - 1, 0.5 * torch.randn(200, 3, 1)
    with torch.no_grad():
        chunk = head.go_on(starts.expand(-1, 8), given, 2, torch.Generator().manual_seed(1))
    assert torch.equal(chunk[:, :2], given[:, :2])
    there = starts + given[:, :2].sum(1)
    assert (chunk[:, 2] + there / 2).abs().mean() < 0.5 * (there / 2).abs().mean()
    with pytest.raises(ConfigError, match=r"3 steps late, .* go on from 2: train it with Flow\(given=3\)"):
        head.go_on(starts.expand(-1, 8), given, 3)
    for wrong in (-1, 4):
        with pytest.raises(ConfigError, match=f"4 steps cannot learn to begin with {wrong} given"):
            Flow(given=wrong).build(8, 4, 1)


def test_a_flow_goes_on_from_a_chunk_and_other_heads_say_that_they_cannot() -> None:
    model = ready("behaviour_cloning", Flow(steps=20))
    assert_continues(model)
    batch = model.observe([seen(model)])
    previous = model.act(batch, generator=torch.Generator().manual_seed(7))[:, 1:]
    free = model.act(batch, generator=torch.Generator().manual_seed(8))
    held = model.continue_chunk(batch, previous, 2, generator=torch.Generator().manual_seed(8))
    assert held.shape == free.shape
    assert (held[:, :2] - previous[:, :2]).abs().mean() < 0.3 * (free[:, :2] - previous[:, :2]).abs().mean()
    with pytest.raises(UnsupportedError, match="L1 cannot go on"):
        ready("behaviour_cloning", L1()).continue_chunk(batch, previous, 2)


def test_a_head_of_tokens_needs_its_tokenizer() -> None:
    model = ready("behaviour_cloning", HEADS[2])
    model.fast = None
    with pytest.raises(ConfigError, match="no tokenizer of actions"):
        model.act(model.observe([seen(model)]))
    model.fast = FAST.fit(torch.rand(20, 8, 5), scale=5.0, vocab_size=400)
    with pytest.raises(ConfigError, match="chunks of"):
        model.act(model.observe([seen(model)]))
