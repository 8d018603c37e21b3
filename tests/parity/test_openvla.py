"""OpenVLA and OpenVLA-OFT: their published facts, and transformers' towers and Llama put together as they say.

Their own code asks for a timm and a transformers of 2024 and cannot be installed beside today's torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import polymodal
from polymodal.core.batch import IGNORE, Batch
from polymodal.core.chat import Chat
from polymodal.core.errors import ConfigError, MediaError, UnsupportedError, WeightsError
from polymodal.core.observation import Observation
from polymodal.core.verbs import Acts, Generates
from polymodal.modalities.action import Statistics
from polymodal.nn.skeleton import skeleton
from polymodal.samplers.autoregressive import Settings, complete
from polymodal.systems import openvla, openvla_oft
from polymodal.systems.openvla import LORA, OpenVLA
from polymodal.systems.openvla_oft import OpenVLAOFT
from polymodal.tokenizers.language import LanguageTokenizer
from polymodal.train.lora import add_lora
from tests.nano import NANO
from tests.parity.harness import compare_gradients, randomise
from tests.parity.test_prismatic import HUB, SHARED, SIZES, TEXT, WIDE, Together, file_of, openvla_7b

WORDS = ["in: what action should the robot take to pick up the red cup?\nout:", "put the blue bowl left", "USER: A:"]
LLAMA = TEXT | {"vocab_size": 384, "max_position_embeddings": 512}
PADDING, BINS = 32, 24  # rows behind the vocabulary, and edges of bins
LAST = 384 - PADDING  # one more than the largest id of an action
TRUNK: dict[str, Any] = {
    "vision_backbone_id": "dinosiglip-vit-so-224px", "llm_backbone_id": "llama2-7b-pure", "image_sizes": [28, 28],
    "image_resize_strategy": "resize-naive", "text_config": LLAMA,
    "vision_config": {
        "featurizer_config": SIZES | {"patch_size": 7}, "fused_featurizer_config": WIDE | {"patch_size": 7},
    },
}  # fmt: skip


def published(dim: int, low: float, high: float) -> dict[str, Any]:
    """One data set of ``norm_stats``; the gripper, which is last, is not scaled."""
    shape = {"mean": 0.5 * (low + high), "std": 1.0, "min": 2 * low, "max": 2 * high, "q01": low, "q99": high}
    vectors = {name: [value * (1 + 0.1 * i) for i in range(dim)] for name, value in shape.items()}
    proprio = {name: value[:4] for name, value in vectors.items()}
    mask = [True] * (dim - 1) + [False]
    return {
        "action": vectors | {"mask": mask}, "proprio": proprio, "num_transitions": 9, "num_trajectories": 1,
    }  # fmt: skip


NORM_STATS = {"bridge_orig": published(7, -0.02, 0.04), "fractal20220817_data": published(7, -1.0, 3.0)}


def tokenizer() -> LanguageTokenizer:
    return LanguageTokenizer.train_bpe(WORDS * 20, 320)


def observation(seed: int, instruction: str, cameras: tuple[str, ...] = ("image",), state: int = 0) -> Observation:
    rng = np.random.default_rng(seed)
    return Observation(
        images={camera: rng.integers(0, 256, (40, 52, 3), dtype=np.uint8) for camera in cameras},
        state=rng.normal(0, 0.01, state).astype(np.float32) if state else None,
        instruction=instruction,
    )


def reference_of(kind: type[Together]) -> Together:
    torch.manual_seed(0)
    reference = kind(True, LLAMA).eval()
    randomise(reference, 0.2)
    with torch.no_grad():  # theirs has a position for the class token, timm's has not
        reference.dino.embeddings.position_embeddings[:, 0] = 0
    return reference


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OpenVLA as it is published, with statistics in its config."""
    folder = tmp_path_factory.mktemp("openvla")
    more = {"norm_stats": NORM_STATS, "n_action_bins": BINS, "pad_to_multiple_of": PADDING, "empty_id": 7}
    (folder / "config.json").write_text(json.dumps(TRUNK | more | {"model_type": "openvla"}))
    save_file(file_of(reference_of(Together)), folder / "model.safetensors")
    tokenizer().save(folder)
    return folder


@pytest.fixture
def policy(folder: Path) -> OpenVLA:
    model = polymodal.load(folder)
    assert isinstance(model, OpenVLA)
    model.dataset = "bridge_orig"
    assert isinstance(model, Acts)
    assert isinstance(model, Generates)
    return model


ASKED = [observation(1, "Pick up the RED cup"), observation(2, "put the bowl left"), observation(3, "in")]


def robot_actions(model: OpenVLA | OpenVLAOFT, rows: int) -> Tensor:
    """Actions in the robot's units, some of which lie outside the quantiles."""
    s = model.action_normaliser.statistics
    assert s.q01 is not None
    assert s.q99 is not None
    low, high = torch.tensor(s.q01).float(), torch.tensor(s.q99).float()
    unit = torch.rand(rows, model.horizon, len(low), generator=torch.Generator().manual_seed(4)) * 1.4 - 0.2
    return low + unit * (high - low)


# ---- OpenVLA


@pytest.mark.proves("openvla", "published facts: outputs, loss and first gradients, of transformers' parts")
def test_outputs_loss_and_gradients(policy: OpenVLA) -> None:
    reference = reference_of(Together)
    batch = policy.lesson(ASKED, robot_actions(policy, 3), torch.ones(3, 1, dtype=torch.bool))
    places = batch["ids"] == policy.config.image_id
    assert places.sum(1).tolist() == [16] * 3  # of 28 pixels at 7 a patch

    def theirs(x: Tensor) -> Tensor:
        return x[~places].view(3, -1)

    result = reference(batch["pixels"], theirs(batch["ids"]), theirs(batch["labels"]), theirs(batch["valid"]))
    valid = batch["valid"]
    torch.testing.assert_close(policy(batch)[valid], result.logits[valid], rtol=1e-5, atol=1e-5)
    loss = policy.loss(batch)
    assert loss.weight == 3 * 8  # seven numbers and the end token
    torch.testing.assert_close(loss.mean, result.loss, rtol=1e-5, atol=1e-5)
    loss.mean.backward()
    result.loss.backward()
    compare_gradients(policy, file_of(reference, gradients=True))


@pytest.mark.proves("openvla", "published facts: prompts, tokens and labels of a lesson")
def test_lesson(policy: OpenVLA) -> None:
    actions = robot_actions(policy, 3)
    batch = policy.lesson(ASKED, actions, torch.tensor([[True], [True], [False]]))
    words = tokenizer()
    for row, o in enumerate(ASKED):
        ids = batch["ids"][row][batch["valid"][row]].tolist()
        assert ids[:17] == [1] + [policy.config.image_id] * 16
        end = ids.index(7)  # the empty token
        asked = f"In: What action should the robot take to {o.instruction.lower()}?\nOut:"
        assert words.decode(ids[17:end]) == asked
        entry = NORM_STATS["bridge_orig"]["action"]
        low, high = np.array(entry["q01"]), np.array(entry["q99"])
        x = actions[row, 0].numpy().astype(np.float64)
        x = np.clip(np.where(entry["mask"], 2 * (x - low) / (high - low) - 1, x), -1, 1)
        tokens = LAST - np.digitize(x, np.linspace(-1, 1, BINS))
        assert ids[end + 1 :] == [*tokens.tolist(), policy.stop_ids[0]]
        labels = batch["labels"][row][batch["valid"][row]].tolist()
        assert labels == [IGNORE] * (end + 1) + (ids[end + 1 :] if row < 2 else [IGNORE] * 8)
    talk = policy.lesson(
        [Chat.of("in"), Chat.of("in")][:0] or [spoken("what is it?", "a cup")]
    )  # chats are learned, too
    assert (talk["labels"] != IGNORE).sum() == len(words.encode("a cup", special=False)) + 1


def spoken(question: str, answer: str) -> Chat:
    return Chat.of([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


@pytest.mark.parametrize("dataset", NORM_STATS)
@pytest.mark.proves("openvla", "published facts: actions in the units of the data set that was chosen")
def test_actions(policy: OpenVLA, dataset: str) -> None:
    """The likeliest action tokens of the reference, read as the official code reads them."""
    policy.use_statistics(policy.statistics, dataset)
    reference = reference_of(Together)
    batch = policy.observe(ASKED)
    got = policy.act(batch)
    assert got.shape == (3, 1, 7)
    for row in range(3):
        ids = batch["ids"][row][batch["valid"][row]]
        ids = ids[ids != policy.config.image_id][None]
        for _ in range(7):
            scores = reference(batch["pixels"][row : row + 1], ids, ids, ids >= 0).logits[0, -1]
            ids = torch.cat([ids, scores[LAST - BINS : LAST].argmax().view(1, 1) + LAST - BINS], 1)
        edges = np.linspace(-1, 1, BINS)
        numbers = np.clip(LAST - ids[0, -7:].numpy() - 1, 0, BINS - 2)
        x = ((edges[:-1] + edges[1:]) / 2)[numbers]
        entry = NORM_STATS[dataset]["action"]
        low, high = np.array(entry["q01"]), np.array(entry["q99"])
        expected = np.where(entry["mask"], 0.5 * (x + 1) * (high - low) + low, x)
        np.testing.assert_allclose(got[row, 0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.proves("openvla", "an invalid action token cannot be drawn")
def test_no_word_is_an_action(policy: OpenVLA) -> None:
    with torch.no_grad():
        assert policy.backbone.lm_head is not None
        policy.backbone.lm_head.weight[: LAST - BINS] += 3  # words are likelier than any action
        policy.backbone.lm_head.weight[LAST:] += 3
    batch = policy.observe(ASKED * 4)
    free = complete(policy, batch, Settings(max_new_tokens=7, temperature=1.0, seed=0), policy.tokenizer)
    assert any(not LAST - BINS <= i < LAST for answer in free for i in answer.ids)
    policy.temperature = 5.0
    seen: set[int] = set()
    for seed in range(3):
        rules = Settings(constraint=policy.constraint, max_new_tokens=8, temperature=5.0, seed=seed)
        for answer in complete(policy, batch, rules, policy.tokenizer):
            assert len(answer.ids) == 7
            seen |= set(answer.ids)
        first, again = (policy.act(batch, generator=torch.Generator().manual_seed(seed)) for _ in range(2))
        assert torch.equal(first, again)
    assert seen <= set(range(LAST - BINS, LAST))
    assert len(seen) > BINS // 2
    with pytest.raises(MediaError, match="no actions"):
        policy.bins.decode(torch.tensor([5]))


@pytest.mark.proves("openvla", "statistics: those of the data set that is named, or an error")
def test_statistics(policy: OpenVLA, folder: Path, tmp_path: Path) -> None:
    policy.dataset = None
    with pytest.raises(ConfigError, match="bridge_orig"):
        policy.act(policy.observe(ASKED))
    policy.dataset = "bridge_og"
    with pytest.raises(ConfigError, match="Did you mean 'bridge_orig'"):
        policy.act(policy.observe(ASKED))
    with pytest.raises(ConfigError, match="Did you mean 'bridge_orig'"):
        policy.use_statistics(policy.statistics, "bridge_org")
    nine = Statistics.from_array(np.random.default_rng(0).normal(size=(20, 9)))
    with pytest.raises(ConfigError, match="9 numbers of action"):
        policy.use_statistics({"wide": {"action": nine}})
    policy.dataset = "bridge_orig"
    again = polymodal.load(policy.save(tmp_path))
    assert isinstance(again, OpenVLA)
    assert again.config == policy.config
    again.dataset = "bridge_orig"
    torch.testing.assert_close(again.act(again.observe(ASKED)), policy.act(policy.observe(ASKED)), rtol=0, atol=0)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # What fine-tuning writes beside the weights is newer than what the config was published with.
    statistics = tmp_path / "dataset_statistics.json"
    statistics.write_text(json.dumps({"mine": published(7, -3, 3)}))
    config = json.loads((tmp_path / "config.json").read_text()) | {"norm_stats": NORM_STATS}
    (tmp_path / "config.json").write_text(json.dumps(config))
    newer = polymodal.load(tmp_path)
    assert isinstance(newer, OpenVLA)
    assert newer.dataset == "mine"
    (tmp_path / "action_head--150000_checkpoint.pt").touch()
    with pytest.raises(ConfigError, match="OFT"):  # it would say words where it has a head
        polymodal.load(tmp_path)


def head_shapes(dim: int, action_dim: int, state_dim: int) -> dict[str, tuple[int, ...]]:
    """What OFT adds: the head and the projector of states."""
    wide, head = dim * action_dim, "action_head.model"
    shapes: dict[str, tuple[int, ...]] = {f"{head}.layer_norm1": (wide,), f"{head}.fc1": (dim, wide)}
    for i in range(2):
        shapes |= {f"{head}.mlp_resnet_blocks.{i}.ffn.0": (dim,), f"{head}.mlp_resnet_blocks.{i}.ffn.1": (dim, dim)}
    shapes |= {f"{head}.layer_norm2": (dim,), f"{head}.fc2": (action_dim, dim)}
    shapes |= {"proprio_projector.fc1": (dim, state_dim), "proprio_projector.fc2": (dim, dim)}
    return {f"{n}.{part}": s if part == "weight" else s[:1] for n, s in shapes.items() for part in ("weight", "bias")}


@pytest.mark.parametrize(
    ("cls", "preset", "count"),
    [
        pytest.param(
            OpenVLA, openvla.PRESETS["openvla/openvla-7b"], 7_541_237_184, id="openvla",
            marks=pytest.mark.proves("openvla", "weights: total on names and shapes of full-size checkpoints"),
        ),
        pytest.param(
            OpenVLAOFT, openvla_oft.PRESETS["moojink/openvla-7b-oft-finetuned-libero-spatial"], 7_709_173_191, id="oft",
            marks=pytest.mark.proves("openvla_oft", "weights: total on names and shapes of full-size checkpoints"),
        ),
    ],
)  # fmt: skip
def test_names_of_full_size(cls: type[OpenVLA] | type[OpenVLAOFT], preset: Callable[[], Any], count: int) -> None:
    shapes = openvla_7b() | (head_shapes(4096, 7, 8) if cls is OpenVLAOFT else {})
    with skeleton():
        model = cls(preset())
    todo = model.plan(cls.formats["hf"], {n: torch.empty(s, device="meta") for n, s in shapes.items()})
    assert todo.problems == []
    assert todo.dropped == {}
    assert sum(p.numel() for p in model.parameters()) == count
    assert {n: tuple(t.shape) for n, t in model.to_hub(model.state_dict()).items()} == shapes


@pytest.mark.proves("openvla", "LoRA: 1.4 % of the parameters of the full-size model")
def test_lora() -> None:
    with skeleton():
        model = OpenVLA(openvla.PRESETS["openvla/openvla-7b"]())
    every = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    total = sum(p.numel() for p in model.parameters())
    add_lora(model, **LORA)
    assert every == {name.partition(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    new, rank = sum(p.numel() for p in model.parameters() if p.requires_grad), 32
    # The official recipe prints 110,828,288 (1.4483 %). Its towers have one adapter for queries, keys and values, ours
    # three; and their convolutions of patches, which are called ``proj`` like a linear layer, have one, too.
    apart = rank * (2 * 24 * 1024 + 2 * 27 * 1152 + 1152)
    patches = rank * (2 * 3 * 14 * 14 + 1024 + 1152)
    assert new == 110_828_288 + apart - patches
    assert round((new - apart + patches) / (total + new - apart + patches), 4) == 0.0145
    assert new / (total + new) < 0.015


@pytest.mark.proves("openvla", "published facts: config")
def test_published_config() -> None:
    raw = SHARED | HUB["prism-dinosiglip-224px+7b"] | {
        "model_type": "openvla", "architectures": ["OpenVLAForActionPrediction"], "n_action_bins": 256,
        "norm_stats": NORM_STATS,
    }  # fmt: skip
    fmt, preset = OpenVLA.formats["hf"], openvla.PRESETS["openvla/openvla-7b"]()
    assert fmt.read(raw)[0] == preset
    written = fmt.write(preset)
    assert all(written[name] == raw[name] for name in HUB["prism-dinosiglip-224px+7b"])
    assert (preset.backbone.vocab_size - preset.padding, preset.num_bins, preset.empty_id) == (32000, 256, 29871)
    with skeleton():
        bins = OpenVLA(preset).bins
    assert (bins.first_id, bins.vocab_size - 1) == (31744, 31999)
    with pytest.raises(ConfigError, match="n_action_bins"):
        fmt.read(raw | {"n_action_bins": "many"})
    with pytest.raises(ConfigError, match="bins"):
        replace(preset, num_bins=40000)


# ---- OpenVLA-OFT


class Steered(nn.Module):
    """Scale and shift of the official FiLM, by the mean of the embeddings of what is said."""

    def __init__(self, source: int, dim: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Linear(source, dim), nn.Linear(source, dim)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return x * (1 + self.scale(condition)[:, None]) + self.shift(condition)[:, None]


class Regressor(nn.Module):
    """The published head: vectors of one step's values -> these values."""

    def __init__(self, dim: int, action_dim: int) -> None:
        super().__init__()
        self.layer_norm1, self.fc1 = nn.LayerNorm(dim * action_dim), nn.Linear(dim * action_dim, dim)
        blocks = [nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.ReLU()) for _ in range(2)]
        self.blocks = nn.ModuleList(blocks)
        self.layer_norm2, self.fc2 = nn.LayerNorm(dim), nn.Linear(dim, action_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(self.layer_norm1(x)).relu()
        for block in self.blocks:
            x = x + block(x)
        return self.fc2(self.layer_norm2(x))


HORIZON, ACTION, STATE = 4, 3, 5


class TogetherOFT(Together):
    """The published description: one pass over empty places, everything seeing everything."""

    def __init__(self, fused: bool, text: dict[str, Any]) -> None:
        super().__init__(fused, text)
        self.state = nn.Sequential(nn.Linear(STATE, 32), nn.GELU(), nn.Linear(32, 32))
        self.head = Regressor(32, ACTION)
        self.films = nn.ModuleList(nn.ModuleList(Steered(32, dim) for _ in range(n)) for dim, n in ((24, 2), (32, 1)))

    def see(self, pixels: Tensor, condition: Tensor, film: bool) -> Tensor:
        x, y = self.dino.embeddings(pixels[:, :3]), self.siglip.embeddings(pixels[:, 3:])
        for layer, steer in zip(self.dino.encoder.layer, self.films[0], strict=False):
            x = x + layer.layer_scale1(layer.attention(layer.norm1(x))[0])
            x = steer(x, condition) if film else x
            x = x + layer.layer_scale2(layer.mlp(layer.norm2(x)))
        for layer, steer in zip(self.siglip.encoder.layers, self.films[1], strict=False):
            y = y + layer.self_attn(layer.layer_norm1(y), attention_mask=None)[0]
            y = steer(y, condition) if film else y
            y = y + layer.mlp(layer.layer_norm2(y))
        return self.projector(torch.cat([x[:, 5:], y], 2))

    def act(self, pixels: Tensor, state: Tensor, prompt: Tensor, end: int, film: bool) -> Tensor:
        """Of one observation, whose pictures are stacked as channels."""
        table = self.llm.get_input_embeddings()
        said, last = table(prompt), table(torch.full((1, 1), end))
        mean = torch.cat([said, last], 1).mean(1)
        seen = torch.cat([self.see(each, mean, film) for each in pixels.split(6, 1)], 1)
        slots = said.new_zeros(1, HORIZON * ACTION, 32)
        x = torch.cat([said[:, :1], seen, self.state(state)[:, None], said[:, 1:], slots, last], 1)
        everything = x.new_zeros(1, 1, x.shape[1], x.shape[1])  # what is added to scores: nothing is hidden
        out = self.llm.model(inputs_embeds=x, attention_mask=everything).last_hidden_state
        first = x.shape[1] - 1 - slots.shape[1]
        return self.head(out[:, first - 1 : first - 1 + slots.shape[1]].reshape(1, HORIZON, ACTION * 32))


def oft_file(model: TogetherOFT, film: bool, *, gradients: bool = False) -> dict[str, Tensor]:
    """Weights, or gradients, under the names of the published parts."""
    file = file_of(model, gradients=gradients)
    for name, p in model.named_parameters():
        tensor = (torch.zeros_like(p) if p.grad is None else p.grad) if gradients else p.detach()
        part, _, rest = name.partition(".")
        if part == "state":
            file["proprio_projector." + rest.replace("0.", "fc1.").replace("2.", "fc2.")] = tensor.clone()
        elif part == "head":
            for number in range(2):
                theirs = f"mlp_resnet_blocks.{number}.ffn."
                rest = rest.replace(f"blocks.{number}.", theirs) if rest.startswith(f"blocks.{number}.") else rest
            file[f"action_head.model.{rest}"] = tensor.clone()
        elif part == "films" and film:
            tower, layer, leaf = rest.split(".", 2)
            prefix = ("featurizer", "fused_featurizer")[int(tower)]
            file[f"vision_backbone.{prefix}.blocks.{layer}.{leaf}"] = tensor.clone()
    return file


CAMERAS = ("image", "wrist_image")
SEEN = [observation(n, text, CAMERAS, STATE) for n, text in enumerate(("pick up the red cup", "put", "in: what left"))]


@pytest.fixture(params=[False, True], ids=["plain", "FiLM"], scope="module")
def oft_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bool]:
    folder, film = tmp_path_factory.mktemp("oft"), request.param
    more = {"action_dim": ACTION, "state_dim": STATE, "horizon": HORIZON, "film": film, "empty_id": 7}
    (folder / "config.json").write_text(json.dumps(TRUNK | more | {"model_type": "openvla_oft"}))
    reference = reference_of(TogetherOFT)
    assert isinstance(reference, TogetherOFT)
    save_file(oft_file(reference, film), folder / "model.safetensors")
    tokenizer().save(folder)
    entry = published(ACTION, -0.1, 0.3)
    entry["proprio"] = {name: [value[0]] * STATE for name, value in entry["action"].items() if name != "mask"}
    (folder / "dataset_statistics.json").write_text(json.dumps({"libero_spatial": entry}))
    return folder, film


def oft(folder: Path) -> OpenVLAOFT:
    model = polymodal.load(folder)
    assert isinstance(model, OpenVLAOFT)
    assert isinstance(model, Acts)
    return model


@pytest.mark.proves("openvla_oft", "published facts: actions, loss and first gradients, of transformers' parts")
def test_oft_outputs_loss_and_gradients(oft_folder: tuple[Path, bool]) -> None:
    model, reference = oft(oft_folder[0]), reference_of(TogetherOFT)
    assert isinstance(reference, TogetherOFT)
    batch = model.lesson(SEEN, robot_actions(model, 3), torch.ones(3, HORIZON, dtype=torch.bool))
    assert float(batch["state"].abs().max()) <= 1
    assert float(batch["actions"][..., :-1].abs().max()) == 1  # clipped, but for the gripper
    rows = []
    for row in range(3):
        ids = batch["ids"][row][batch["valid"][row]]
        prompt = ids[: -HORIZON * ACTION - 1]
        assert prompt[-1] == 7
        stacked = batch["pixels"][row].flatten(0, 1)[None]
        rows.append(reference.act(stacked, batch["state"][row : row + 1], prompt[None], int(ids[-1]), oft_folder[1]))
    expected = torch.cat(rows)
    torch.testing.assert_close(model(batch), expected, rtol=1e-5, atol=1e-5)
    loss, wanted = model.loss(batch).mean, nn.functional.l1_loss(expected, batch["actions"])
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
    loss.backward()
    wanted.backward()
    compare_gradients(model, oft_file(reference, oft_folder[1], gradients=True))


@pytest.mark.proves("openvla_oft", "weights: the names of the published files, both ways")
def test_oft_files(oft_folder: tuple[Path, bool], tmp_path: Path) -> None:
    folder, model = oft_folder[0], oft(oft_folder[0])
    before, after = load_file(folder / "model.safetensors"), load_file(model.save(tmp_path) / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = oft(tmp_path)
    torch.testing.assert_close(again.act(again.observe(SEEN)), model.act(model.observe(SEEN)), rtol=0, atol=0)
    del after["action_head.model.fc2.bias"]
    save_file(after, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"head\.fc_out\.bias"):
        polymodal.load(tmp_path)


@pytest.mark.proves("openvla_oft", "one pass, in which every place sees every other, and all that is given matters")
def test_oft_is_one_pass_both_ways(oft_folder: tuple[Path, bool]) -> None:
    model = oft(oft_folder[0])
    batch = model.observe(SEEN)
    passes: list[int] = []
    hook = model.backbone.blocks[0].register_forward_pre_hook(lambda _, inputs: passes.append(inputs[0].shape[1]))
    actions = model.act(batch)
    hook.remove()
    assert passes == [batch["ids"].shape[1] + 2 * 16 + 1]  # two pictures and the state
    assert actions.shape == (3, HORIZON, ACTION)
    alone = torch.cat([model.act(model.observe([o])) for o in SEEN])  # without padding
    torch.testing.assert_close(alone, actions, rtol=1e-5, atol=1e-6)
    x = batch["ids"].clone()
    ends = batch["valid"].sum(1) - 1
    x[torch.arange(3), ends] = 9  # what stands behind all places
    changed = (model.act(Batch(batch, ids=x)) - actions).abs()
    assert float(changed[:, 0].amax(1).amin()) > 0, "the first action sees what stands behind it"
    for part in ("state", "pixels"):
        other = batch[part].clone()
        other[..., 0] += 1
        assert float((model.act(Batch(batch, **{part: other})) - actions).abs().amax((1, 2)).amin()) > 0, part
    wrist = batch["pixels"].clone()
    wrist[:, 1] = 0
    assert not torch.allclose(model.act(Batch(batch, pixels=wrist)), actions)


@pytest.mark.proves("openvla_oft", "training: steps past the end of an episode are not learned")
def test_oft_lessons(oft_folder: tuple[Path, bool]) -> None:
    model = oft(oft_folder[0])
    actions, valid = robot_actions(model, 3), torch.arange(HORIZON) < torch.tensor([[4], [1], [2]])
    loss = model.loss(model.lesson(SEEN, actions, valid))
    assert loss.weight == 7 * ACTION
    other = actions.clone()
    other[~valid] += 0.1
    assert torch.equal(model.loss(model.lesson(SEEN, other, valid)).total, loss.total)
    with pytest.raises(MediaError, match="wrist_image"):
        model.observe([observation(1, "in", ("image",), STATE)])
    with pytest.raises(MediaError, match="at most"):
        model.observe([observation(1, "cup " * 2000, CAMERAS, STATE)])


def test_without_a_tokenizer_it_says_so() -> None:
    for name in ("openvla", "openvla_oft", "rt2"):
        model = polymodal.build(NANO[name])
        with pytest.raises((UnsupportedError, ConfigError), match=r"tokenizer|statistics"):
            model.observe([observation(1, "in", model.cameras, 4)])
