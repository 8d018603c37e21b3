"""World models: the same alone and in a batch, told by actions, and what the papers say of each."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import polymodal
from polymodal.backbones.adaptive_unet import AdaptiveBlock
from polymodal.cli import main
from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError, DataError, MediaError, UnsupportedError
from polymodal.core.sample import Video
from polymodal.core.verbs import Imagines, verbs_of
from polymodal.data.lerobot import Demonstrations
from polymodal.data.lerobot_writer import Episode, Writer
from polymodal.imagining import foresee, from_clips, from_demonstrations, world_model
from polymodal.modalities.generated import source_type
from polymodal.modalities.video import open_video
from polymodal.nn.rope import Rope
from polymodal.nn.skeleton import skeleton
from polymodal.samplers.autoregressive import Settings
from polymodal.systems import TABLE, diamond
from polymodal.systems.diamond import STRONGEST, Diamond, visible
from polymodal.systems.imagining import WorldModel
from polymodal.systems.iris import PRESETS, Iris, IrisConfig, _Writer
from tests.nano import NANO, every_system, nano, shaken


def world(name: str) -> WorldModel:
    torch.manual_seed(0)
    model = shaken(nano(name)).eval()
    assert isinstance(model, WorldModel)
    return model


def shown(model: WorldModel, films: int, context: int, steps: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    width, height = model.size
    frames = torch.rand(films, context, 3, height, width, generator=generator)
    return frames, torch.randn(films, steps, model.action_dim, generator=generator)


# ---- of all


@every_system("imagining: a seed gives the same future alone and among others; actions and seeds matter", WorldModel)
def test_futures(name: str) -> None:
    model = world(name)
    frames, actions = shown(model, 3, 2, 4)
    made = model.imagine(frames, actions, seed=5)
    assert made.shape == (3, 3, *frames.shape[2:])
    assert 0 <= float(made.min()) < float(made.max()) <= 1
    torch.testing.assert_close(model.imagine(frames[1:2], actions[1:2], seed=6), made[1:2], atol=1e-5, rtol=0)
    assert not torch.allclose(model.imagine(frames, actions, seed=6), made, atol=1e-3)
    other = actions.clone()
    other[:, -1] += 3
    changed = model.imagine(frames, other, seed=5)
    torch.testing.assert_close(changed[:, :2], made[:, :2], atol=1e-5, rtol=0)  # what comes before does not know it
    assert not torch.allclose(changed[:, 2], made[:, 2], atol=1e-3)


@every_system("imagining: a past of any length, and futures longer than the model reads", WorldModel)
def test_pasts_of_any_length(name: str) -> None:
    model = world(name)
    for context, future in ((1, 2), (model.history, 1), (model.history + 3, 2), (2, 2 * model.history + 3)):
        frames, actions = shown(model, 1, context, context - 1 + future)
        assert model.imagine(frames, actions).shape[1] == future
    frames, actions = shown(model, 1, model.history + 2, model.history + 3)
    made, lately = model.imagine(frames, actions), model.imagine(frames[:, 2:], actions[:, 2:])
    torch.testing.assert_close(made, lately, atol=1e-5, rtol=0)  # what is longer ago than its history is not looked at


@every_system("imagining: what does not fit is refused, and training goes on where it was", WorldModel)
def test_what_does_not_fit_is_refused(name: str) -> None:
    model = world(name)
    frames, actions = shown(model, 2, 2, 4)
    for wrong in ((frames[..., 1:], actions), (frames, actions[..., 1:]), (frames[:, :0], actions)):
        with pytest.raises(MediaError):
            model.imagine(*wrong)
    for hollow in (torch.nan, torch.inf):
        for films, told in ((frames + hollow, actions), (frames, actions * hollow)):
            with pytest.raises(MediaError, match="finite"):
                model.imagine(films, told)
    with pytest.raises(MediaError, match="one at least"):
        model.imagine(frames[:0], actions[:0])
    for seeds in (-1, [1], [1, -1]):
        with pytest.raises(ConfigError, match="seeds"):
            model.imagine(frames, actions, seed=seeds)
    with pytest.raises(MediaError, match="one more for each frame"):
        model.imagine(frames, actions[:, :1])
    model.train()
    model.imagine(frames, actions)
    assert model.training


@every_system("training: lessons are scaled", WorldModel)
def test_lessons_are_scaled(name: str) -> None:
    model = world(name)
    frames, actions = shown(model, 2, 3, 2)
    batch = model.lesson(frames, actions)
    assert float(batch["frames"].min()) < -0.5
    torch.testing.assert_close(batch["actions"] * torch.tensor(model.action_scale), actions)


def test_who_imagines() -> None:
    worlds = {name for name, entry in TABLE.items() if "imagine" in verbs_of(entry.resolve())}
    assert worlds == {name for name, entry in TABLE.items() if issubclass(entry.resolve(), WorldModel)}
    assert {"diamond", "iris"} <= worlds
    assert all(isinstance(nano(name), Imagines) for name in worlds)


# ---- DIAMOND


@pytest.mark.proves("diamond", "DIAMOND's facts: sizes, what is zero at first, 3 steps from noise of deviation one")
def test_facts_of_diamond() -> None:
    with skeleton():
        paper = Diamond(diamond.PRESETS["eloialonso/diamond"]())
    assert sum(p.numel() for p in paper.parameters()) == 4_406_851  # the paper: 4.4 million
    assert paper.act.weight.shape == (64, 18)  # a fourth of 256 for each of four actions
    assert (len(paper.backbone.down), len(paper.backbone.shrink)) == (4, 3)
    fresh = nano("diamond")
    assert isinstance(fresh, Diamond)
    assert not fresh.backbone.last.weight.any()
    assert not any(part.conv2.weight.any() for part in fresh.modules() if isinstance(part, AdaptiveBlock))
    assert fresh.backbone.last.bias.any()
    square = fresh.backbone.shrink[0].weight.flatten(1)
    torch.testing.assert_close(square @ square.T, torch.eye(len(square)), atol=1e-5, rtol=0)
    points = fresh.sampling.points(fresh.config.steps)
    assert [round(p.deviation, 3) for p in points] == [STRONGEST, 0.283, 0.002, 0.0]


@pytest.mark.proves("diamond", "DIAMOND's facts: a longer clip goes on from its own estimates, cut to 256 levels")
def test_a_longer_clip_is_told_its_own_estimates() -> None:
    model = world("diamond")
    assert isinstance(model, Diamond)
    n, told = model.history, []
    frames, actions = shown(model, 2, n + 2, n + 1)
    batch = model.lesson(frames, actions)
    asked = model.denoise

    def listen(noisy: Tensor, when: Tensor, seen: Tensor, done: Tensor) -> Tensor:
        told.append((seen, done))
        return asked(noisy, when, seen, done)

    model.denoise = listen  # type: ignore[method-assign]
    loss = model.loss(batch)
    (first, _), (second, at_second) = told
    assert torch.equal(first, batch["frames"][:, :n])
    assert torch.equal(at_second, batch["actions"][:, 1 : n + 1])
    assert torch.equal(second[:, :-1], batch["frames"][:, 1:n])
    own = second[:, -1]
    assert not torch.allclose(own, batch["frames"][:, n], atol=1e-2)
    levels = (own + 1) * 127.5
    torch.testing.assert_close(levels, levels.round(), atol=1e-3, rtol=0)
    assert float(own.abs().max()) <= 1
    assert not own.requires_grad
    assert loss.weight == 2 * frames[:, 0].numel()


def test_frames_are_cut_to_levels() -> None:
    pixels = torch.tensor([[-1.5, -1.0, 0.0], [0.999, 1.0, 3.0]]).view(1, 1, 2, 3).expand(1, 3, 2, 3)
    kept = ((visible(pixels) + 1) * 127.5)[0, 0].round().tolist()
    assert kept == [[0, 0, 127], [254, 255, 255]]


def test_a_short_past_stood_still() -> None:
    model = world("diamond")
    frames, actions = shown(model, 2, 1, 2)
    still = torch.cat([torch.zeros(2, 1, model.action_dim), actions], 1)
    twice = model.imagine(frames.expand(-1, 2, -1, -1, -1), still, seed=3)
    assert torch.equal(model.imagine(frames, actions, seed=3), twice)


# ---- IRIS


def iris() -> Iris:
    model = world("iris")
    assert isinstance(model, Iris)
    return model


@pytest.mark.proves("iris", "imagining: codes written from the cache score as all read at once")
def test_the_cache_is_as_the_whole() -> None:
    model = iris()
    frames, actions = shown(model, 2, 4, 3)
    batch = Batch(frames=frames * 2 - 1, actions=actions)
    codes, whole = model.codes(batch["frames"]), model(batch)
    writer, per = _Writer(model, actions), codes.shape[2]
    memory = writer.new_memory(2, 0)
    ids = codes[:, :2].flatten(1)
    scores = [writer.prefill(Batch(ids=ids, valid=torch.ones_like(ids).bool()), memory)]
    scores += [writer.step(code, memory) for code in codes[:, 2:].flatten(1).T[:-1]]
    places = [row * (per + 1) + n - 1 for row in (2, 3) for n in range(per)]
    torch.testing.assert_close(torch.stack(scores, 1), whole[:, places], atol=1e-5, rtol=1e-5)


@pytest.mark.proves("iris", "IRIS' facts: each code but the first is learned, from what stands before it alone")
def test_what_is_learned_of_a_film() -> None:
    model = iris()
    frames, actions = shown(model, 2, 3, 2)
    batch = model.lesson(frames, actions)
    per = model.config.vision.num_codes
    assert model.loss(batch).weight == 2 * (3 * per - 1)
    scores = model(batch)
    assert scores.shape == (2, 3 * per + 2, model.config.backbone.vocab_size)
    later = model(Batch(batch, actions=batch["actions"] + torch.tensor([[[0.0]], [[4.0]]]).view(1, 2, 1)))
    torch.testing.assert_close(later[:, : 2 * per + 1], scores[:, : 2 * per + 1])
    assert not torch.allclose(later[:, 2 * per + 1], scores[:, 2 * per + 1], atol=1e-3)


@pytest.mark.proves("iris", "IRIS' facts: the tokenizer learns nothing; sizes; temperature one")
def test_the_tokenizer_learns_nothing() -> None:
    model = iris().train()
    frames, actions = shown(model, 2, 3, 2)
    model.loss(model.lesson(frames, actions)).mean.backward()
    assert all(p.grad is None and not p.requires_grad for p in model.vision.parameters())
    assert Iris.writing == Settings(temperature=1.0)
    c = PRESETS["eloialonso/iris"]()
    assert (c.each, c.moments, c.backbone.num_layers, c.backbone.dim, c.vision.codes.size) == (17, 20, 10, 256, 512)


def test_positions_are_places_or_time_row_and_column() -> None:
    model = iris()
    x = torch.zeros(1, 20, model.config.backbone.dim)
    position = model.tokens(x, 5).position[0]
    assert position[0].tolist() == [1, 0, 0]
    assert position[3].tolist() == [1, 1, 1]
    assert position[4].tolist() == [1, 2, 0]  # the action, below the last row
    assert position[5].tolist() == [2, 0, 0]
    assert model.tokens(x, 5).block[0, 0] == 5
    with skeleton():
        table = Iris(PRESETS["eloialonso/iris"]())
    assert table.tokens(torch.zeros(1, 3, 256, device="meta"), 4).position.shape == (1, 3, 1)


def test_impossible_configs_are_refused() -> None:
    painted, config = NANO["diamond"], NANO["iris"]
    for fields in (
        {"history": 3}, {"history": 0, "backbone": replace(painted.backbone, in_channels=3)}, {"steps": 0},
        {"width": 0}, {"action_scale": ()}, {"action_scale": (1.0, 0.0)}, {"action_scale": (torch.nan,)},
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            replace(painted, **fields)
    for fields in ({"moments": 5}, {"action_scale": ()}, {"action_scale": (torch.inf,)}, {"vision": NANO["vqgan"]}):
        with pytest.raises(ConfigError):
            IrisConfig(**{**vars(config), **fields})
    with pytest.raises(ConfigError, match="turn by time"):
        replace(config, backbone=replace(config.backbone, position=Rope()))
    with pytest.raises(ConfigError, match="whole groups"):
        replace(painted.backbone, widths=(16, 26))
    with pytest.raises(ConfigError, match="112 channels"):  # on the way up both levels are joined
        replace(painted.backbone, widths=(48, 64), group=32)
    for fields in ({"group": 0}, {"head_dim": 0}, {"condition_dim": 0}):
        with pytest.raises(ConfigError, match="less than one"):
            replace(painted.backbone, **fields)
    with pytest.raises(ConfigError, match="levels"):
        replace(painted.backbone, attention=(7,))
    with pytest.raises(ConfigError, match="as many"):
        replace(painted.backbone, widths=(16,))


# ---- the verb


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Diamond for the world clips, of random weights."""
    torch.manual_seed(0)
    model = Diamond.build(replace(NANO["diamond"], width=16, height=16, action_scale=(0.03, 0.03)))
    return model.save(tmp_path_factory.mktemp("world") / "model")


def test_imagining_clips(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "film.mp4"
    asked = ["imagine", str(saved), "--films", "2", "--seconds", "0.5", "--film", str(out), "--opposite", "--json"]
    assert main(asked) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["written"] == str(out)
    assert [len(one["psnr"]) for one in said["films"]] == [4, 4]
    assert all(one["psnr"][0] < one["copied_psnr"][0] for one in said["films"])  # it was never trained
    info = open_video(Video(out))
    assert info.frames == 2 * (2 + 4)
    assert info.size[0] == 3 * 256
    assert source_type(out) == "compositeWithTrainedAlgorithmicMedia"
    assert main(["imagine", str(saved), "--films", "1", "--seconds", "0.25"]) == 0
    assert "the last frame repeated has" in capsys.readouterr().out


def test_what_cannot_be_asked_for_is_refused_before_a_model_is_loaded(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for asked in (("--seed", "-1"), ("--seconds", "nan"), ("--seconds", "inf"), ("--seconds", "-3")):
        with pytest.raises(SystemExit):
            main(["imagine", str(saved), *asked])
    nowhere = str(tmp_path / "no model")
    assert main(["imagine", nowhere, "--film", "x.gif"]) == 1
    assert ".mp4" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["imagine", nowhere, "--film", str(tmp_path / "file" / "x.mp4")]) == 1
    assert "cannot be written" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "av", None)
    assert main(["imagine", nowhere, "--film", str(tmp_path / "x.mp4")]) == 1
    assert "polymodal[video]" in capsys.readouterr().err
    assert not (tmp_path / "x.mp4").exists()
    for count, seed in ((0, 0), (1, -1)):
        with pytest.raises(ConfigError, match="one at least"):
            list(from_clips(world_model(polymodal.load(saved)), count, steps=2, seed=seed))


def test_imagining_demonstrations(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pyarrow")
    rng, folder = np.random.default_rng(0), tmp_path / "data"
    with Writer(
        folder, fps=10, cameras={"front": (24, 24)}, state_names=("x",), action_names=("dx", "dy"), robot="r",
        lossless=False,
    ) as writer:  # fmt: skip
        for length in (4, 9):
            pictures = rng.integers(0, 255, (length, 24, 24, 3), np.uint8)
            action, state = rng.normal(size=(length, 2)).astype(np.float32), np.zeros((length, 1), np.float32)
            writer.add(Episode(task="go", action=action, state=state, images={"front": pictures}, extra={}))
    model = world_model(polymodal.load(saved))
    data = Demonstrations(folder)
    (happened,) = from_demonstrations(model, data, 1, camera="front", steps=5)
    assert happened.frames.shape == (7, 16, 16, 3)
    assert np.array_equal(happened.actions, data.action[4:10])
    assert foresee(model, happened).frames.shape == (5, 16, 16, 3)
    with pytest.raises(DataError, match="1 episodes of 7 frames"):
        list(from_demonstrations(model, data, 2, camera="front", steps=5))
    assert main(["imagine", str(saved), "--data", str(folder), "--films", "1", "--seconds", "0.2", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["films"][0]["psnr"]) == 2


def test_who_cannot_imagine_says_so(saved: Path) -> None:
    with pytest.raises(UnsupportedError, match="foresees nothing"):
        world_model(nano("vit"))
    oblong = nano("diamond")
    assert isinstance(oblong, Imagines)
    with pytest.raises(ConfigError, match="square"):
        list(from_clips(oblong, 1, steps=2))
    assert main(["imagine", str(saved), "--camera", "front"]) == 1
