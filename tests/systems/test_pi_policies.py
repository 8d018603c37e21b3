"""pi0, pi0.5 and pi0-FAST as policies: prompts, chunks, real-time chunking, errors, LeRobot's files."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import polymodal
from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError, MediaError, UnsupportedError, WeightsError
from polymodal.core.observation import Observation
from polymodal.core.verbs import Acts, Continues
from polymodal.modalities.action import Statistics
from polymodal.nn.skeleton import skeleton
from polymodal.systems import TABLE
from polymodal.systems.acting import Policy
from polymodal.systems.expert_policy import ExpertPolicy
from polymodal.systems.paligemma import PaliGemma
from polymodal.systems.pi0_fast import FOLDER, PI0Fast
from polymodal.tokenizers.fast import FAST
from polymodal.tokenizers.language import LanguageTokenizer
from polymodal.weights.rules import to_theirs
from tests.nano import NANO, shaken

FLOWS = ("pi0", "pi05")
STEPS, STATE, ACTION = 4, 2, 3  # the robot has fewer numbers than the flow policies have room for
WORDS = LanguageTokenizer.of_words(["task", "state", "action", "put", "the", "cup", "down", "red"])


def statistics() -> dict[str, dict[str, Statistics]]:
    rng = np.random.default_rng(0)
    of = {"action": rng.normal([0.1, -2, 30], [0.02, 1, 10], (400, ACTION)), "state": rng.normal(1, 2, (400, STATE))}
    return {"robot": {name: Statistics.from_array(rows) for name, rows in of.items()}}


def policy(name: str) -> Policy:
    """At nano size, with a tokenizer, statistics, and weights that say something."""
    config = NANO[name]
    backbone = replace(config.backbone, vocab_size=WORDS.vocab_size + 130, context=4096)
    more = {"action_id": WORDS.vocab_size + 128} if name == "pi0_fast" else {"prompt": 64}
    torch.manual_seed(0)
    model = polymodal.build(replace(config, backbone=backbone, image_id=WORDS.vocab_size + 129, **more))
    assert isinstance(model, Policy)
    shaken(model)
    if isinstance(model, PI0Fast):
        model.use_tokenizer(WORDS)
        rows = torch.randn(200, STEPS, ACTION, generator=torch.Generator().manual_seed(0)) / 3
        model.use_fast(FAST.fit(rows, scale=1.0, vocab_size=120))
    else:
        model.tokenizer = WORDS  # type: ignore[assignment]
    model.use_statistics(statistics())
    return model.eval()


def observations(count: int, seed: int = 0) -> list[Observation]:
    rng = np.random.default_rng(seed)
    texts = ["put the cup down", "Put_the red cup\ndown ", "the cup"]
    return [
        Observation(
            images={name: rng.integers(0, 256, (20, 24, 3), np.uint8) for name in ("wrist", "front", "other")},
            state=rng.normal(1, 2, STATE).astype(np.float32), instruction=texts[n % len(texts)],
        )
        for n in range(count)
    ]  # fmt: skip


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def text_of(model: Any, batch: Batch, row: int) -> str:
    ids = batch["ids"][row][batch["valid"][row]]
    return WORDS.decode(ids[ids != model.config.image_id].tolist()[1:])


PROMPTS: dict[str, Callable[[str], str]] = {
    "pi0": lambda _: "put the red cup down\n",
    "pi05": lambda state: f"task: put the red cup down, state: {state};\naction: ",
    "pi0_fast": lambda state: f"task: put the red cup\ndown, state: {state};\n",
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(name: str) -> None:
    """As openpi writes them; the state of pi0 is a vector, of the others text."""
    model, shown = policy(name), observations(2)
    assert isinstance(model, Acts)
    batch = model.observe(shown)
    normaliser = model.state_normaliser
    state = normaliser.normalise(torch.from_numpy(shown[1].state))
    bins = np.digitize(state.numpy(), np.linspace(-1, 1, 257)[:-1]) - 1
    assert text_of(model, batch, 1) == PROMPTS[name](" ".join(map(str, bins)))
    assert ("state" in batch) == (name == "pi0")
    if name == "pi0":
        torch.testing.assert_close(batch["state"][1], torch.cat([state, torch.zeros(1)]))
    places = (batch["ids"] == model.config.image_id).sum(1)
    assert places.tolist() == [2 * model.config.num_features] * 2


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.proves("pi0", "acting: the same chunk alone and in a batch")
def test_the_same_chunk_alone_and_in_a_batch(name: str) -> None:
    """From one generator the rows of a batch get what they get one by one; in the robot's units."""
    model, shown = policy(name), observations(3)
    if isinstance(model, PI0Fast):
        model.temperature = 1.0
    whole = model.act(model.observe(shown), generator=seeded())
    assert whole.shape == (3, STEPS, ACTION)
    assert bool(whole.isfinite().all())
    first = model.act(model.observe(shown[:1]), generator=seeded())
    torch.testing.assert_close(whole[:1], first, atol=1e-4, rtol=1e-4)
    if isinstance(model, ExpertPolicy):
        generator = seeded()
        alone = torch.cat([model.act(model.observe([each]), generator=generator) for each in shown])
        torch.testing.assert_close(whole, alone, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(whole, model.act(model.observe(shown), generator=seeded(1)))


@pytest.mark.parametrize("name", FLOWS)
def test_a_lesson_is_learned(name: str) -> None:
    """Steps that are not there are not learned; numbers that the robot lacks are zeros, and are."""
    model = policy(name)
    assert isinstance(model, ExpertPolicy)
    actions = torch.randn(3, STEPS, ACTION, generator=seeded(2)) * torch.tensor([0.02, 1, 10]) + torch.tensor(
        [0.1, -2, 30]
    )
    valid = torch.tensor([[True] * 4, [True, True, False, False], [True, False, False, False]])
    batch = model.lesson(observations(3), actions, valid)
    assert not bool(batch["actions"][..., ACTION:].any())
    torch.testing.assert_close(model.to_robot(batch["actions"]), actions, atol=1e-4, rtol=1e-4)
    batch |= {"noise": torch.randn(batch["actions"].shape, generator=seeded(3)), "time": torch.tensor([0.2, 0.5, 0.9])}
    loss = model.loss(batch)
    error = (model(batch) - (batch["noise"] - batch["actions"])).square()
    torch.testing.assert_close(loss.total, error[valid].sum())
    assert loss.weight == int(valid.sum()) * model.action_width


@pytest.mark.parametrize("name", FLOWS)
def test_real_time_chunking(name: str) -> None:
    """A chunk that is continued keeps to what is frozen, and is drawn towards the rest ever less."""
    model, shown = policy(name), observations(2)
    assert isinstance(model, Continues)
    batch = model.observe(shown)
    previous = model.act(batch, generator=seeded())
    fresh = model.act(batch, generator=seeded(1))
    near = model.continue_chunk(batch, previous, 3, generator=seeded(1))
    assert near.shape == fresh.shape
    scale = torch.from_numpy(model.action_normaliser.statistics.known["std"]).float()

    def off(chunk: Tensor) -> Tensor:
        return ((chunk - previous) / scale).square().mean((0, 2)).sqrt()

    assert bool((off(near)[:3] < 0.5 * off(fresh)[:3]).all()), (off(near), off(fresh))
    short = model.continue_chunk(batch, previous[:, 2:], 1, generator=seeded(1))
    assert short.shape == fresh.shape
    untouched = model.continue_chunk(batch, previous[:, :0], 0, generator=seeded(1))
    torch.testing.assert_close(untouched, fresh, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", PROMPTS)
def test_bad_observations(name: str) -> None:
    model, (shown,) = policy(name), observations(1)
    with pytest.raises(MediaError, match="front"):
        model.observe([replace(shown, images={})])
    with pytest.raises(MediaError, match="state of 2 numbers"):
        model.observe([replace(shown, state=np.zeros(3, np.float32))])
    with pytest.raises(MediaError, match="reads at most"):
        model.observe([replace(shown, instruction="put the cup down " * 200)])
    model.tokenizer = None
    with pytest.raises(UnsupportedError, match="tokenizer"):
        model.observe([shown])
    model.use_statistics({})
    with pytest.raises(ConfigError, match="statistics"):
        model.observe([shown])


def test_pictures_and_places_must_agree() -> None:
    model = policy("pi0")
    batch = model.observe(observations(2))
    batch["seen"] = torch.tensor([[True, True], [True, False]])
    with pytest.raises(MediaError, match="placeholder"):
        model.act(batch)


def test_it_starts_from_a_paligemma() -> None:
    """All of its weights, and of a longer table the rows that are read."""
    policies = [model for name in FLOWS if isinstance(model := policy(name), ExpertPolicy)]
    for model in policies:
        c = model.config
        backbone = replace(c.backbone, vocab_size=c.backbone.vocab_size + 7)
        torch.manual_seed(3)
        vlm = polymodal.build(replace(NANO["paligemma"], backbone=backbone))
        assert isinstance(vlm, PaliGemma)
        vlm.tokenizer = WORDS
        model.start_from(vlm)
        ours = dict(model.named_parameters())
        for name, tensor in vlm.named_parameters():
            mine = ours[name.replace("backbone.", "backbone.trunk.")]
            assert torch.equal(mine, tensor[: len(mine)]), name
        with pytest.raises(ConfigError, match="sizes differ"):
            model.start_from(polymodal.build(NANO["paligemma"]))  # type: ignore[arg-type]


# ---- pi0-FAST


def test_fast_answers_are_always_chunks() -> None:
    """Whatever a random model wants to write; and what was said is heard."""
    model = policy("pi0_fast")
    assert isinstance(model, PI0Fast)
    actions = torch.randn(5, STEPS, ACTION, generator=seeded(1)) / 3
    before, after = WORDS.encode("Action: ", special=False), WORDS.encode("|", special=False)
    (said, *_) = model.say(actions)
    assert (said[: len(before)], said[-len(after) :]) == (before, after)
    fast = said[len(before) : -len(after)]
    assert max(fast) <= model.config.action_id
    assert fast == [model.config.action_id - token for token in model.fast.encode(actions)[0]]  # type: ignore[union-attr]
    model.temperature = 5.0
    for seed in range(3):
        chunk = model.act(model.observe(observations(2, seed)), generator=seeded(seed))
        assert chunk.shape == (2, STEPS, ACTION)


def test_fast_learns_its_answers_only() -> None:
    model = policy("pi0_fast")
    assert isinstance(model, PI0Fast)
    actions = model.to_robot(torch.randn(2, STEPS, ACTION, generator=seeded(1)) / 3)
    batch = model.lesson(observations(2), actions, torch.ones(2, STEPS, dtype=torch.bool))
    said = model.say(model.to_network(actions))
    for row in range(2):
        labels = batch["labels"][row]
        assert labels[labels != -100].tolist() == [*said[row], model.stop_ids[0]]
    blocks = model.read(batch).block
    assert all(int(blocks[row, batch["labels"][row] == -100][:20].max()) == 0 for row in range(2)), (
        "the prefix is one block"
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    model.train()
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(batch).mean.backward()
        optimizer.step()
    heard = model.eval().act(model.observe(observations(2)))
    torch.testing.assert_close(heard, model.to_robot(model.fast.decode(model.fast.encode(model.to_network(actions)))))  # type: ignore[union-attr]


def test_fast_files(tmp_path: Path) -> None:
    """The tokenizer of actions and the statistics lie beside the weights."""
    model = policy("pi0_fast")
    assert isinstance(model, PI0Fast)
    loaded = polymodal.load(model.save(tmp_path / "model"))
    assert isinstance(loaded, PI0Fast)
    batch = model.observe(observations(2))
    assert torch.equal(loaded.act(loaded.observe(observations(2))), model.act(batch))
    with pytest.raises(ConfigError, match="steps of"):
        model.use_fast(FAST.fit(torch.randn(50, STEPS + 1, ACTION), scale=1.0, vocab_size=120))
    (tmp_path / "model" / FOLDER / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="tokenizer"):
        polymodal.load(tmp_path / "model")
    model.fast = None
    with pytest.raises(UnsupportedError, match="use_fast"):
        model.act(batch)


# ---- files


@pytest.mark.parametrize("name", FLOWS)
def test_files_keep_the_policy(name: str, tmp_path: Path) -> None:
    model = policy(name)
    loaded = polymodal.load(model.save(tmp_path))
    assert isinstance(loaded, Policy)
    assert loaded.config == model.config
    assert loaded.fingerprint == model.fingerprint
    shown = observations(2)
    expected = model.act(model.observe(shown), generator=seeded())
    assert torch.equal(loaded.act(loaded.observe(shown), generator=seeded()), expected)


def lerobot(name: str) -> dict[str, Any]:
    """What their code writes of a published policy."""
    mode = {"pi0": "MEAN_STD", "pi05": "QUANTILES"}[name]
    picture = {"type": "VISUAL", "shape": [3, 224, 224]}
    return {
        "type": name, "n_obs_steps": 1, "device": "cpu", "use_amp": False, "push_to_hub": False, "repo_id": None,
        "private": None, "tags": None, "license": None, "paligemma_variant": "gemma_2b", "dtype": "float32",
        "input_features": {
            "observation.images.base_0_rgb": picture, "observation.images.left_wrist_0_rgb": picture,
            "observation.images.right_wrist_0_rgb": picture, "observation.images.empty_camera_0": picture,
            "observation.state": {"type": "STATE", "shape": [32]},
        },
        "output_features": {"action": {"type": "ACTION", "shape": [32]}}, "action_expert_variant": "gemma_300m",
        "chunk_size": 50, "n_action_steps": 50, "max_state_dim": 32, "max_action_dim": 32, "num_inference_steps": 10,
        "time_sampling_beta_alpha": 1.5, "time_sampling_beta_beta": 1.0, "min_period": 0.004, "max_period": 4.0,
        "image_resolution": [224, 224], "gradient_checkpointing": False, "compile_model": False,
        "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode}, "rtc_config": None,
        "compile_mode": "max-autotune", "optimizer_lr": 2.5e-5, "optimizer_betas": [0.9, 0.95], "empty_cameras": 1,
        "tokenizer_max_length": {"pi0": 48, "pi05": 200}[name],
    }  # fmt: skip


@pytest.mark.parametrize("name", FLOWS)
def test_lerobots_config_is_the_published_model(name: str) -> None:
    cls = TABLE[name].resolve()
    (preset,) = importlib.import_module(TABLE[name].module).PRESETS.values()
    config, report = cls.formats["lerobot"].read(lerobot(name))
    assert config == preset()
    assert cls.formats["lerobot"].read(cls.formats["lerobot"].write(config))[0] == config
    assert any("optimizer_lr: ignored" in f"{field}: {what}" for field, what in report.items())
    for field, value in (("use_relative_actions", True), ("chunk_sise", 3), ("paligemma_variant", "gemma_7b")):
        with pytest.raises(ConfigError, match=field):
            cls.formats["lerobot"].read(lerobot(name) | {field: value})


@pytest.mark.parametrize(("name", "count"), [("pi0", 3_238_048_528), ("pi05", 3_353_433_872)])
def test_published_names_at_full_size(name: str, count: int) -> None:
    """Every tensor of LeRobot's file is taken and every parameter filled, on the meta device."""
    (preset,) = importlib.import_module(TABLE[name].module).PRESETS.values()
    with skeleton():
        model = TABLE[name].resolve()(preset())
    assert sum(p.numel() for p in model.parameters()) == count
    for layout in ("hf", "lerobot"):
        names = model.to_hub(model.state_dict(), layout)
        (embedded,) = [n for n in names if n.endswith(("lm_head.weight", "embed_tokens.weight"))]
        base = embedded[: embedded.index("paligemma_with_expert")]
        unread = f"{base}paligemma_with_expert.gemma_expert.lm_head.weight"
        plan = model.plan(model.formats[layout], names | {unread: torch.empty(257152, 1024, device="meta")})
        assert (plan.problems, list(plan.dropped)) == ([], [unread])
    assert embedded == "model.paligemma_with_expert.paligemma.lm_head.weight"
    norm = "dense.bias" if name == "pi05" else "weight"
    assert any(n.endswith(f"gemma_expert.model.layers.17.input_layernorm.{norm}") for n in names)


@pytest.mark.parametrize("name", FLOWS)
def test_files_of_openpi(name: str, tmp_path: Path) -> None:
    """The published names without their first word, as openpi's conversion leaves them."""
    model = policy(name)
    folder = model.save(tmp_path / "model")
    rules = type(model).formats["lerobot"].rules(model.config)
    tensors = {n.removeprefix("model."): t.clone() for n, t in to_theirs(rules, model.state_dict()).items()}
    assert model.plan(model.formats["lerobot"], tensors).problems == []
    missing = dict(list(tensors.items())[1:])
    assert len(model.plan(model.formats["lerobot"], missing).problems) == 1
    save_file(missing, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError):
        polymodal.load(folder)
