"""Octo: what its paper and its code say, observations with a past, lessons, actions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import polymodal
from polymodal.act.chunks import Player, Receding
from polymodal.backbones.encdec import EncDec, t5_init_
from polymodal.backbones.readouts import sight
from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError, MediaError, UnsupportedError
from polymodal.core.observation import Observation, with_past
from polymodal.core.sample import Sample
from polymodal.encoders.small_stem import StandardConv
from polymodal.heads.score import ScoreConfig, ScoreNetwork
from polymodal.modalities.action import Statistics
from polymodal.nn.skeleton import skeleton
from polymodal.systems.octo import PRESETS, Octo
from polymodal.tokenizers.language import LanguageTokenizer
from tests.nano import NANO, nano_batch, shaken


@pytest.fixture(scope="module")
def tokenizer() -> LanguageTokenizer:
    return LanguageTokenizer.train_bpe(["put the red cup down"] * 3, 300)


def policy(tokenizer: LanguageTokenizer, dims: int = 4, **fields: Any) -> Octo:
    torch.manual_seed(0)
    model = polymodal.build(replace(NANO["octo"], vocab_size=320, context=24, **fields))
    assert isinstance(model, Octo)
    rows = np.random.default_rng(0).normal(3.0, 2.0, (100, dims))
    model.use_statistics({"toy": {"action": Statistics.from_array(rows)}})
    model.tokenizer = tokenizer
    return model


def episode(steps: int) -> list[Observation]:
    pictures = np.random.default_rng(0).integers(0, 256, (steps, 2, 20, 20, 3), dtype=np.uint8)
    return [Observation(images={"front": a, "wrist": b}, instruction="put the cup") for a, b in pictures]


# -------------------- as published


@pytest.mark.proves("octo", "published facts: sizes, tokens, head")
@pytest.mark.parametrize(("name", "millions"), [("octo-small", 27), ("octo-base", 93)])
def test_sizes_of_the_paper(name: str, millions: int) -> None:
    config = PRESETS[f"rail-berkeley/{name}"]()
    with skeleton():
        model = Octo(config)
    ours = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("text."))
    # Theirs have a table of places for ten moments, and a stem that reads goals.
    more = 8 * model.backbone.position[0].numel() + sum(3 * 9 * stem.convs[0].out_channels for stem in model.vision)
    assert round((ours + more) / 1e6) == millions
    assert round(sum(p.numel() for p in model.text.parameters()) / 1e6) == 110  # T5-base, its encoder
    assert config.camera_tokens == (256, 64)
    assert (config.history, config.horizon, config.context) == (2, 4, 16)
    head = config.head
    assert (head.num_layers, head.hidden_dim, head.steps, head.time_dim, head.largest) == (3, 256, 20, 32, 5.0)
    assert model.count(Sample.of([np.zeros((4, 4, 3), np.uint8)] * 4)) == 2 * (256 + 64)


@pytest.mark.proves("octo", "published facts: who sees whom")
def test_who_sees_whom() -> None:
    """The official rules, token by token: only readouts see readouts, and nothing sees a later step."""
    words, seen, steps = 2, 3, 2
    mask = sight(words, seen, steps)
    group = ["task"] * words + (["obs"] * seen + ["readout"]) * steps
    step = [-1] * words + [n for n in range(steps) for _ in range(seen + 1)]
    may = {"task": {"task"}, "obs": {"task", "obs"}, "readout": {"task", "obs", "readout"}}
    for i in range(len(mask)):
        for j in range(len(mask)):
            assert bool(mask[i, j]) == (group[j] in may[group[i]] and step[j] <= step[i]), (i, j)


@pytest.mark.proves("octo", "published facts: who sees whom")
def test_readouts_change_nothing_and_moments_see_no_future(tokenizer: LanguageTokenizer) -> None:
    model = shaken(policy(tokenizer, history=3)).eval()
    batch = nano_batch(model, size=2)
    with torch.no_grad():
        before = model(batch)
        later = Batch(batch, pixels=batch["pixels"].clone())
        later["pixels"][:, 2] += 1
        torch.testing.assert_close(model(later)[:, :2], before[:, :2])
        assert not torch.allclose(model(later)[:, 2], before[:, 2], atol=1e-3)
        place = model.backbone.position[0, -1]  # the first moment's readout: later readouts see it, pictures do not
        place.add_(torch.randn_like(place))
        after = model(batch)
        assert not torch.allclose(after[:, 0], before[:, 0], atol=1e-3)
        blocks = model.backbone.blocks
        seen: list[Tensor] = []
        hook = blocks[-1].register_forward_hook(lambda module, inputs, output: seen.append(output))
        model(batch)
        place.add_(torch.randn_like(place))
        model(batch)
        hook.remove()
    changed = (seen[0] - seen[1]).abs().amax((0, 2)) > 1e-6
    width = model.backbone.position.shape[1]
    readouts = [len(changed) - width * n - 1 for n in range(3)]
    assert changed.nonzero()[:, 0].tolist() == sorted(readouts)


def test_what_is_not_there_is_not_seen(tokenizer: LanguageTokenizer) -> None:
    model = shaken(policy(tokenizer)).eval()
    batch = nano_batch(model, size=2)
    batch["valid"][:, 5:] = False
    batch["seen"][:, 0] = False
    other = Batch(batch, pixels=batch["pixels"].clone(), ids=batch["ids"].clone())
    other["pixels"][:, 0] = 9.0
    other["ids"][:, 5:] = 1
    with torch.no_grad():
        torch.testing.assert_close(model(other)[:, 1], model(batch)[:, 1])


@pytest.mark.proves("octo", "published facts: the language model is frozen")
def test_the_language_model_does_not_learn(tokenizer: LanguageTokenizer) -> None:
    model = policy(tokenizer).train()
    model.loss(nano_batch(model)).mean.backward()
    assert all(p.grad is None and not p.requires_grad for p in model.text.parameters())
    assert model.text_proj.weight.grad is not None


def test_kernels_are_standardised() -> None:
    torch.manual_seed(0)
    conv = StandardConv(3, 8, 3, 2, 1)
    x = torch.randn(2, 3, 8, 8)
    before = conv(x)
    with torch.no_grad():
        conv.weight.mul_(7).add_(2)
    torch.testing.assert_close(conv(x), before, atol=1e-3, rtol=1e-3)


def test_the_head_knows_the_step() -> None:
    torch.manual_seed(0)
    head = ScoreNetwork(ScoreConfig(hidden_dim=16), 8, 2, 3)
    head.init_weights()
    x, condition = torch.randn(4, 2, 3), torch.randn(4, 8)
    out = head(x, torch.tensor([0, 0, 7, 7]), condition)
    assert not torch.allclose(out, head(x, torch.tensor([7, 7, 7, 7]), condition))
    torch.testing.assert_close(out[2:], head(x, torch.tensor([7, 7, 7, 7]), condition)[2:])
    assert 0.1 < float(head.frequency.detach().std()) < 0.3


# -------------------- observations, lessons, actions


@pytest.mark.proves("octo", "lessons: a chunk for each moment, masked numbers and steps are not learned")
def test_lessons_have_a_chunk_for_each_moment(tokenizer: LanguageTokenizer) -> None:
    model = policy(tokenizer, dims=2)  # of a robot with fewer numbers than the network
    actions = np.arange(12, dtype=np.float32).reshape(6, 2)
    shown = with_past(episode(4), 2, actions[:4])[0::2]  # the first and the third step
    chunks = torch.from_numpy(np.stack([actions[0:3], actions[2:5]]))
    batch = model.lesson(shown, chunks, torch.tensor([[True] * 3, [True, True, False]]))
    assert batch["seen"].tolist() == [[False, True], [True, True]]
    assert batch["actions"].shape == batch["actions_valid"].shape == (2, 2, 3, 4)
    assert not batch["actions_valid"][..., 2:].any()
    known = batch["actions_valid"][..., 0]
    assert known.tolist() == [[[False] * 3, [True] * 3], [[True] * 3, [True, True, False]]]
    restored = model.to_robot(batch["actions"])
    torch.testing.assert_close(restored[1, 0], torch.from_numpy(actions[1:4]))
    torch.testing.assert_close(restored[0, 1], torch.from_numpy(actions[0:3]))
    unknown = model.lesson(with_past(episode(4), 2)[2:3], chunks[1:], torch.ones(1, 3, dtype=torch.bool))
    assert unknown["actions_valid"][0, :, :, 0].tolist() == [[False, True, True], [True] * 3]
    assert model.train().loss(batch).weight == 2 * (3 + 3 + 2)


@pytest.mark.proves("octo", "lessons: a chunk for each moment, masked numbers and steps are not learned")
def test_masked_actions_are_not_learned(tokenizer: LanguageTokenizer) -> None:
    model = policy(tokenizer).train()
    batch = nano_batch(model)
    batch["actions_valid"][:, 0] = False
    batch["actions_valid"][..., 3] = False
    other = Batch(batch, actions=batch["actions"].clone())
    other["actions"][:, 0] = 3.0
    losses = []
    for each in (batch, other):
        torch.manual_seed(0)
        losses.append(model.loss(each).total)
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.proves("octo", "acting: one pass of the Transformer, twenty of the head")
def test_the_transformer_runs_once(tokenizer: LanguageTokenizer) -> None:
    model = policy(tokenizer, dims=3).eval()
    calls = {"backbone": 0, "head": 0}
    for name in calls:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    batch = model.observe(with_past(episode(2), 2))
    first = model.act(batch, generator=torch.Generator().manual_seed(0))
    assert calls == {"backbone": 1, "head": 20}
    assert first.shape == (2, 3, 3)
    assert torch.equal(model.act(batch, generator=torch.Generator().manual_seed(0)), first)
    assert not torch.equal(model.act(batch, generator=torch.Generator().manual_seed(1)), first)
    low, high = (model.to_robot(torch.full((4,), side)) for side in (-5.0, 5.0))
    assert bool(((first >= low - 1e-4) & (first <= high + 1e-4)).all())


@pytest.mark.slow
def test_it_learns_what_to_do_when(tokenizer: LanguageTokenizer) -> None:
    """Three pictures, three chunks: played back from memory, through the whole of `observe`, `lesson` and `act`."""
    model = policy(tokenizer, dims=2, head=ScoreConfig(hidden_dim=64, num_layers=2))
    actions = torch.tensor([[0.0, 6.0], [6.0, 0.0], [3.0, 3.0]])
    shown = with_past(episode(3), 2)
    chunks = actions[:, None].expand(3, 3, 2)
    batch = model.lesson(shown, chunks, torch.ones(3, 3, dtype=torch.bool))
    many = batch.take([0, 1, 2] * 8)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    model.train()
    for _ in range(150):
        loss = model.loss(many).mean
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    player = Player(model, Receding(execute=1), generator=torch.Generator().manual_seed(0))
    acted = torch.from_numpy(np.stack([player.action(o) for o in episode(3)]))
    assert torch.cdist(acted, actions).argmin(1).tolist() == [0, 1, 2], acted


def test_a_t5_is_taken_whole(tokenizer: LanguageTokenizer, tmp_path: Path) -> None:
    model = policy(tokenizer)
    t5 = EncDec(model.config.t5())
    t5_init_(t5)
    model.use_language(t5, tokenizer)
    ids, valid = torch.randint(0, 300, (2, 5)), torch.ones(2, 5, dtype=torch.bool)
    torch.testing.assert_close(model.text(ids, valid), t5.encode(t5.text(ids, valid)).x)
    with pytest.raises(ConfigError, match="other sizes"):
        model.use_language(EncDec(replace(model.config.t5(), vocab_size=50)), tokenizer)
    batch = model.eval().observe(with_past(episode(2), 2))
    loaded = polymodal.load(model.save(tmp_path / "model"))
    generators = (torch.Generator().manual_seed(0) for _ in range(2))
    again = loaded.act(loaded.observe(with_past(episode(2), 2)), generator=next(generators))
    assert torch.equal(again, model.act(batch, generator=next(generators)))


def test_what_it_cannot_read(tokenizer: LanguageTokenizer) -> None:
    model = policy(tokenizer)
    with pytest.raises(MediaError, match="at most 24"):
        model.instruct(["q " * 30])
    with pytest.raises(UnsupportedError, match="no tokenizer"):
        polymodal.build(NANO["octo"]).instruct(["put"])


@pytest.mark.parametrize("fields", [{"shrink": (1,)}, {"image_size": 20}, {"horizon": 0}, {"cameras": ()}])
def test_impossible_configs(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        replace(NANO["octo"], **fields)
