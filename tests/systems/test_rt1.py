"""RT-1: what its paper and its code say, observations with a past, lessons, actions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import polymodal
from polymodal.act.chunks import Player, Receding
from polymodal.backbones.steps import StepDecoder, StepDecoderConfig
from polymodal.connectors.token_learner import TokenLearner, TokenLearnerConfig
from polymodal.core.batch import IGNORE, Batch
from polymodal.core.errors import ConfigError, DataError, MediaError, UnsupportedError
from polymodal.core.observation import Observation, with_past
from polymodal.core.sample import Sample
from polymodal.core.verbs import Acts
from polymodal.encoders.efficientnet import EfficientNet, EfficientNetConfig
from polymodal.modalities.action import Statistics
from polymodal.nn.film import FiLM
from polymodal.nn.skeleton import skeleton
from polymodal.systems.rt1 import PRESETS, RT1, RT1Config
from tests.nano import NANO, nano_batch, shaken

LOW, HIGH = np.array([-2.0, 0.0, 5.0]), np.array([2.0, 1.0, 5.5])


def policy(seed: int = 0, dims: int = 3, **fields: Any) -> RT1:
    torch.manual_seed(seed)
    model = polymodal.build(replace(NANO["rt1"], **fields))
    assert isinstance(model, RT1)
    rows = np.stack([LOW[:dims], HIGH[:dims]])
    model.use_statistics({"toy": {"action": Statistics.from_array(rows)}})
    return model


def episode(steps: int, seed: int = 0) -> list[Observation]:
    generator = np.random.default_rng(seed)
    pictures = generator.integers(0, 256, (steps, 40, 50, 3), dtype=np.uint8)
    return [Observation(images={"front": picture}, instruction="put the red cup") for picture in pictures]


# -------------------- as published


@pytest.mark.proves("rt1", "published facts: sizes, tokens, bins")
def test_sizes_of_the_paper() -> None:
    config = PRESETS["google/rt-1"]()
    with skeleton():
        model = RT1(config)

    def millions(*parts: nn.Module) -> int:
        return round(sum(p.numel() for part in parts for p in part.parameters()) / 1e6)

    assert (config.history, config.action_width, config.modes, config.vocab_size, config.text_dim) == (
        6,
        11,
        3,
        256,
        512,
    )
    assert millions(model.vision, model.proj, model.film) == 16
    assert millions(model.backbone, model.head) == 19
    assert millions(model) == 35
    assert len(model.vision.blocks) == 26
    assert config.vision.grid(config.vision.resolution) ** 2 == 81
    assert config.connector.num_tokens * config.history == 48
    assert len(model.backbone.blocks) == 8
    assert model.count(Sample.of([np.zeros((4, 4, 3), np.uint8)] * 6)) == len(model.backbone.position) == 6 * (8 + 11)


@pytest.mark.proves("rt1", "published facts: first weights (FiLM, Glorot of Keras)")
def test_film_begins_as_the_identity() -> None:
    torch.manual_seed(0)
    config = EfficientNetConfig(width=0.25, depth=0.25, padding="open")
    plain, steered = EfficientNet(config).eval(), EfficientNet(config, condition_dim=8).eval()
    steered.init_weights()
    plain.load_state_dict({n: t for n, t in steered.state_dict().items() if not n.startswith("films.")})
    pixels, told = torch.randn(2, 3, 64, 64), torch.randn(2, 8)
    with torch.no_grad():
        assert torch.equal(steered(pixels, told), plain(pixels))
        assert steered.films is not None
        for film in steered.films:
            assert isinstance(film, FiLM)
            film.gamma.bias.fill_(-1.0)
            film.beta.bias.fill_(0.5)
        assert not torch.allclose(steered(pixels, told), plain(pixels))
        x = torch.randn(2, film.beta.out_features, 2, 3)
        torch.testing.assert_close(film(x, told), torch.full_like(x, 0.5))


def test_fresh_it_does_not_hear_and_shaken_it_does() -> None:
    model = policy().eval()
    batch = nano_batch(model)
    other = Batch(batch, ids=torch.full_like(batch["ids"], 2))
    with torch.no_grad():
        assert torch.equal(model(batch), model(other))
        shaken(model).eval()
        assert not torch.allclose(model(batch), model(other), atol=1e-3)


def test_token_learner_weighs_the_features_themselves() -> None:
    torch.manual_seed(0)
    learner = TokenLearner(TokenLearnerConfig(num_tokens=3, hidden_dim=5), 7)
    learner.init_weights()
    x = torch.randn(2, 9, 7) + 3
    tokens = learner(x)
    hidden = torch.nn.functional.gelu(learner.up_proj(learner.norm(x)), approximate="tanh")
    weights = learner.down_proj(hidden).exp()
    expected = torch.einsum("bpt,bpd->btd", weights / weights.sum(1, keepdim=True), x)
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=0)
    assert bool((tokens <= x.amax(1, keepdim=True)).all() and (tokens >= x.amin(1, keepdim=True)).all())
    nn.init.zeros_(learner.down_proj.weight)
    torch.testing.assert_close(learner(x), x.mean(1, keepdim=True).expand(2, 3, 7))


@pytest.mark.proves("rt1", "published facts: who sees whom")
def test_no_place_of_an_action_sees_another() -> None:
    """The official code's own loops: causal, minus what ``_generate_masks`` takes away."""
    seen, places, steps = 2, 3, 3
    mask = StepDecoder(StepDecoderConfig(dim=8, num_layers=0), history=steps, seen=seen, places=places).mask(steps)

    def action_of(k: int) -> int:
        return -1 if k % (seen + places) < seen else k // (seen + places)

    for i in range(len(mask)):
        for j in range(len(mask)):
            a, b = action_of(i), action_of(j)
            hidden = a != -1 and b != -1 and (b < a or (b == a and j <= i))
            assert bool(mask[i, j]) == (j <= i and not hidden), (i, j)
    assert bool(mask.any(1).all())


@pytest.mark.proves("rt1", "published facts: who sees whom")
def test_a_number_is_read_one_token_before_its_place() -> None:
    torch.manual_seed(0)
    decoder = StepDecoder(StepDecoderConfig(dim=8, num_layers=0), history=2, seen=3, places=2)
    decoder.init_weights()
    x = torch.randn(1, 2, 3, 8)
    out = decoder(x)
    torch.testing.assert_close(out[0, 1, 0], decoder.embed(x[0, 1, 2]) + decoder.position[5 + 2])
    torch.testing.assert_close(out[0, 1, 1], decoder.embed(torch.zeros(8)) + decoder.position[5 + 3])


@pytest.mark.proves("rt1", "published facts: who sees whom")
def test_steps_do_not_see_the_future_and_a_short_past_is_a_prefix() -> None:
    model = shaken(policy(history=3)).eval()
    batch = nano_batch(model, size=2)
    later = Batch(batch, pixels=batch["pixels"].clone())
    later["pixels"][:, 2] += 1
    short = Batch(batch, seen=torch.tensor([[True, True, False]]).expand(2, 3))
    with torch.no_grad():
        whole, changed, cut = model(batch), model(later), model(short)
    torch.testing.assert_close(changed[:, :2], whole[:, :2])
    assert not torch.allclose(changed[:, 2], whole[:, 2], atol=1e-3)
    torch.testing.assert_close(cut[:, :2], whole[:, :2], atol=1e-5, rtol=1e-5)


@pytest.mark.proves("rt1", "published facts: first weights (FiLM, Glorot of Keras)")
def test_weights_begin_as_in_keras() -> None:
    torch.manual_seed(0)
    decoder = StepDecoder(
        StepDecoderConfig(dim=48, num_layers=1, num_heads=4, head_dim=32), history=2, seen=2, places=2
    )
    decoder.init_weights()
    block = decoder.blocks[0]
    for layer, fans in ((block.q_proj, 48 * (4 + 32)), (block.o_proj, 4 * (32 + 48)), (block.mlp, 96)):
        bound = (6 / fans) ** 0.5
        assert 0.97 * bound < float(layer.weight.detach().abs().max()) <= bound
        assert not layer.bias.any()


def test_dropout_is_of_training_alone() -> None:
    model = shaken(policy()).eval()
    batch = nano_batch(model)
    with torch.no_grad():
        assert torch.equal(model(batch), model(batch))
        model.backbone.train()
        assert not torch.equal(model(batch), model(batch))


# -------------------- bins


@pytest.mark.parametrize("bins", [2, 16, 256])
def test_bins_are_uniform_over_the_range_of_the_data(bins: int) -> None:
    model = policy(vocab_size=bins)
    rows = torch.from_numpy(np.random.default_rng(0).uniform(LOW, HIGH, (5000, 3))).float()
    rows[0], rows[1] = torch.from_numpy(LOW), torch.from_numpy(HIGH)
    labels = model.to_labels(rows)
    assert (labels.min(0).values.tolist(), labels.max(0).values.tolist()) == ([0] * 3, [bins - 1] * 3)
    assert labels[0].tolist() == [0, 0, 0]
    again = model.to_robot(model.bins.decode(labels))
    error = (again - rows).abs() / torch.from_numpy(HIGH - LOW)
    assert float(error.max()) <= 0.5 / (bins - 1) + 1e-5
    assert model.to_labels(rows * 100)[2].unique().numel() <= 2  # beyond the range: its ends


@pytest.mark.proves("rt1", "an action that does not exist cannot be chosen")
def test_a_mode_is_a_class_and_one_that_is_none_cannot_be_chosen() -> None:
    model = policy(modes=3)
    mask = Statistics.from_array(np.stack([LOW, HIGH]), mask=(True, True, False))
    model.use_statistics({"toy": {"action": mask}})
    assert model.to_labels(torch.tensor([[0.0, 0.5, 2.0], [0.0, 0.5, 0.0]]))[:, 2].tolist() == [2, 0]
    with pytest.raises(DataError, match="a mode below 3"):
        model.to_labels(torch.tensor([[0.0, 0.5, 3.0]]))
    with torch.no_grad():
        model.head.bias[9] = 1e4
    action = model.eval().act(model.observe(episode(1)))
    assert float(action[0, 0, 2]) in (0.0, 1.0, 2.0)
    assert float(action[0, 0, 0]) == pytest.approx(-2 + 4 * 9 / 15)


def test_a_mode_is_no_quantity_whatever_statistics_say_of_it() -> None:
    model = policy(modes=3).eval()
    with torch.no_grad():
        model.head.bias[2] = 1e4
    assert float(model.act(model.observe(episode(1)))[0, 0, 2]) == 2.0


# -------------------- observations, lessons, actions


def test_windows_of_observations() -> None:
    model = policy(history=3)
    assert isinstance(model, Acts)
    shown = with_past(episode(5), model.history)
    assert [len(o.past) for o in shown] == [0, 1, 2, 2, 2]
    batch = model.observe(shown)
    assert batch["seen"].tolist() == [[True, False, False], [True, True, False], *[[True] * 3] * 3]
    assert torch.equal(batch["pixels"][4, 0], batch["pixels"][2, 2])
    assert torch.equal(batch["pixels"][1, 1], batch["pixels"][2, 1])
    assert not batch["pixels"][0, 1:].any()
    longer = with_past(episode(5), 9)
    assert torch.equal(model.observe(longer)["pixels"], batch["pixels"])
    with pytest.raises(MediaError, match="front"):
        model.observe([Observation(images={"wrist": shown[0].images["front"]})])


@pytest.mark.proves("rt1", "lessons: every step of a window, and no number that a robot does not have")
def test_lessons_teach_every_step_whose_action_is_known() -> None:
    model = policy(history=3, dims=2)  # of a robot with fewer numbers than the network
    actions = np.array([[-2, 0], [2, 1], [0.4, 0.6], [1, 0.25]], np.float32)
    shown = with_past(episode(4), 3, actions)
    valid = torch.tensor([[True], [True], [True], [False]])
    batch = model.lesson(shown, torch.from_numpy(actions)[:, None], valid)
    none = [IGNORE] * 3
    first, second, third = [0, 0, IGNORE], [15, 15, IGNORE], [9, 9, IGNORE]
    assert batch["labels"].tolist() == [
        [first, none, none],
        [first, second, none],
        [first, second, third],
        [second, third, none],
    ]
    alone = model.lesson(with_past(episode(4), 3), torch.from_numpy(actions)[:, None], valid)
    assert [(row != IGNORE).any(1).tolist() for row in alone["labels"]][2:] == [[False, False, True], [False] * 3]
    loss = model.train().loss(batch)
    assert loss.weight == 2 * 8
    assert model.loss(Batch(batch, labels=torch.full_like(batch["labels"], IGNORE))).weight == 0


@pytest.mark.proves("rt1", "acting: what was taught is done, in its windows")
def test_it_learns_what_to_do_when() -> None:
    """Four pictures, four actions: played back from memory, through the whole of `observe`, `lesson` and `act`."""
    model = policy(backbone=StepDecoderConfig(dim=32, num_layers=2, num_heads=2, head_dim=24, dropout=0.0))
    actions = torch.tensor([[-1.9, 0.1, 5.1], [1.9, 0.9, 5.4], [0.1, 0.4, 5.2], [-0.9, 0.6, 5.3]])
    shown = with_past(episode(4), model.history, actions.numpy())
    batch = model.lesson(shown, actions[:, None], torch.ones(4, 1, dtype=torch.bool))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    for module in model.vision.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.3  # of a run this short, the averages of a long one are still those that it began with
    for _ in range(45):
        loss = model.loss(batch).mean
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    acted = model.act(model.observe(shown))
    assert acted.shape == (4, 1, 3)
    error = (acted[:, 0] - actions).abs() / torch.from_numpy(HIGH - LOW)
    assert float(error.max()) <= 0.5 / 15 + 1e-5, error


def test_sentences_may_be_given_as_vectors() -> None:
    model = policy(words=None)
    with pytest.raises(UnsupportedError, match="vectors of 32 numbers"):
        model.instruct(["put the cup"])
    batch = model.observe(episode(2))
    batch["sentence"] = torch.randn(2, 32)
    assert model.eval().act(batch).shape == (2, 1, 3)


def test_without_statistics_nothing_is_done(tmp_path: Path) -> None:
    model = policy().eval()
    loaded = polymodal.load(model.save(tmp_path / "with"))
    batch = model.observe(with_past(episode(3), 2))
    assert torch.equal(loaded.act(batch), model.act(batch))
    with pytest.raises(ConfigError, match="no statistics"):
        polymodal.build(NANO["rt1"]).act(batch)


@pytest.mark.parametrize("fields", [{"modes": 17}, {"history": 0}, {"text_dim": 33}, {"vocab_size": 1}])
def test_impossible_configs(fields: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        RT1Config(**fields) if "modes" not in fields else RT1Config(vocab_size=16, **fields)


def test_a_player_shows_what_came_before() -> None:
    """Step by step, an episode gives the actions that its windows give; a new one begins without a past."""
    model = shaken(policy(history=3)).eval()
    seen = episode(5)
    player = Player(model, Receding())
    for _ in range(2):
        player.reset()
        actions = np.stack([player.action(observation) for observation in seen])
        expected = model.act(model.observe(with_past(seen, 3)))[:, 0].numpy()
        np.testing.assert_allclose(actions, expected, atol=1e-5)
