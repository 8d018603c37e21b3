"""DINOv2's published facts, one by one, against recomputations of a few lines."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError, DataError, UnsupportedError
from polymodal.data.masks import block_mask, block_masks
from polymodal.data.worlds.shapes import HELD_OUT
from polymodal.encoders.vit import ViTConfig
from polymodal.heads.distillation import DistillationConfig, PrototypeHead, koleo, masked_mean, sinkhorn_knopp
from polymodal.systems.dinov2 import DINOv2, DINOv2Config
from polymodal.train import fit
from recipes.nano import dinov2 as recipe
from recipes.nano.scenes import close_up

OBJECTIVE = DistillationConfig(
    global_size=16, local_size=8, num_locals=3, num_prototypes=20, hidden_dim=24, bottleneck_dim=12,
    ibot_bottleneck_dim=8, warmup=0.3, frozen=0.1,
)  # fmt: skip
CONFIG = DINOv2Config(
    vision=ViTConfig(
        image_size=16, patch_size=4, dim=16, num_layers=2, num_heads=2, hidden_dim=32, layer_scale=1e-5, mask_token=True
    ),
    objective=OBJECTIVE,
)


def noisy(model: DINOv2) -> DINOv2:
    """Student and teacher apart, and nothing at zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture
def model() -> DINOv2:
    return noisy(DINOv2.build(CONFIG))


@pytest.fixture
def batch() -> Batch:
    masks = torch.from_numpy(block_masks(np.random.default_rng(0), 8, 4, 4)).reshape(4, 2, 16)
    return Batch({"global": torch.randn(4, 2, 3, 16, 16), "local": torch.randn(4, 3, 3, 8, 8), "masks": masks})


# ------------------------------------------------------------------------------------------------- the losses


def sinkhorn_of_the_paper(scores: np.ndarray, temperature: float, iterations: int) -> np.ndarray:
    q = np.exp(scores.astype(np.float64) / temperature).T
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(1, keepdims=True) * q.shape[0]
        q /= q.sum(0, keepdims=True) * q.shape[1]
    return (q * q.shape[1]).T


@pytest.mark.proves("dinov2", "Sinkhorn-Knopp: the paper's iteration, balanced rows and columns, no overflow")
def test_sinkhorn_is_the_papers_and_balances() -> None:
    scores = torch.randn(30, 7)
    ours = sinkhorn_knopp(scores, 0.3)
    np.testing.assert_allclose(ours.numpy(), sinkhorn_of_the_paper(scores.numpy(), 0.3, 3), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(ours.sum(1), torch.ones(30))
    balanced = sinkhorn_knopp(scores, 0.3, iterations=100)
    torch.testing.assert_close(balanced.sum(0), torch.full((7,), 30 / 7), rtol=1e-4, atol=0)
    # Far outside of what the exponential holds in fp32.
    huge = sinkhorn_knopp(scores * 100, 0.04)
    assert huge.isfinite().all()
    assert sinkhorn_knopp(scores[:0], 0.04).shape == (0, 7)


SCRIPT = """
import sys, torch, torch.distributed as dist
from polymodal.heads.distillation import sinkhorn_knopp
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
scores = torch.load(f"{folder}/scores.pt")
torch.save(sinkhorn_knopp(scores[:9] if rank == 0 else scores[9:], 0.1), f"{folder}/{rank}.pt")
torch.save(sinkhorn_knopp(scores if rank == 0 else scores[:0], 0.1), f"{folder}/none-{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.proves("dinov2", "Sinkhorn-Knopp over two ranks with different numbers of rows equals one rank")
def test_sinkhorn_is_global_over_ranks(tmp_path: Path) -> None:
    scores = torch.randn(14, 6)
    torch.save(scores, tmp_path / "scores.pt")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", SCRIPT, str(rank), str(tmp_path)], env=environment)
        for rank in range(2)
    ]
    assert [rank.wait(60) for rank in ranks] == [0, 0]
    expected = sinkhorn_knopp(scores, 0.1)
    assert not torch.allclose(sinkhorn_knopp(scores[:9], 0.1), expected[:9], atol=1e-3)
    torch.testing.assert_close(torch.cat([torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]), expected)
    torch.testing.assert_close(torch.load(tmp_path / "none-0.pt"), expected)


@pytest.mark.proves("dinov2", "KoLeo: minus the mean log distance to the nearest neighbour on the sphere")
def test_koleo() -> None:
    x = torch.randn(9, 5)
    distances = torch.cdist(F.normalize(x), F.normalize(x)).fill_diagonal_(math.inf)
    torch.testing.assert_close(koleo(x), -distances.amin(1).log().mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(koleo(3 * x), koleo(x))
    assert koleo(torch.ones(3, 5)).isfinite()  # collapsed: finite, so that training can leave it
    with pytest.raises(DataError, match="two or more"):
        koleo(x[:1])


def test_masked_mean_counts_each_picture_once() -> None:
    masks = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)
    torch.testing.assert_close(masked_mean(torch.tensor([1.0, 2.0, 6.0, 10.0]), masks), torch.tensor(3.0 + 0.0 + 10.0))


def test_head_ignores_the_length_of_its_last_layer() -> None:
    head = PrototypeHead(6, 8, 4, 10)
    head.init_weights()
    assert sum(isinstance(layer, torch.nn.Linear) for layer in head.mlp) == 3
    x = torch.randn(5, 6)
    before = head(x)
    assert before.abs().max() <= 1 + 1e-6  # a cosine, as long as the scale is one
    with torch.no_grad():
        head.prototypes.mul_(torch.rand(10, 1) + 0.5)
    torch.testing.assert_close(head(x), before)
    with torch.no_grad():
        head.scale.fill_(2.0)
    torch.testing.assert_close(head(x), 2 * before)


# -------------------------------------------------------------------------------------------------- the objective


def cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    return -(teacher * (student / 0.1).log_softmax(-1)).sum(-1).mean()


@pytest.mark.proves("dinov2", "objective: cross-view pairs, weights of terms, iBOT on masked patches, KoLeo per crop")
def test_objective_is_the_official_one(model: DINOv2, batch: Batch) -> None:
    """View by view, as the paper writes it."""
    crops, masks = batch["global"].unbind(1), batch["masks"].unbind(1)
    seen = [model.student(crop, masked=mask).x for crop, mask in zip(crops, masks, strict=True)]
    with torch.no_grad():
        full = [model.vision(crop).x for crop in crops]
        classes = sinkhorn_knopp(model.teacher_heads["dino"](torch.cat([t[:, 0] for t in full])), 0.04).chunk(2)
        hidden = torch.cat([t[:, 1:][mask] for t, mask in zip(full, masks, strict=True)])
        patches = sinkhorn_knopp(model.teacher_heads["ibot"](hidden), 0.04)
    heads = model.student_heads
    terms = 2 + 2 * 3
    # A global crop of the student is compared with the OTHER global crop of the teacher.
    total = cross_entropy(heads["dino"](seen[0][:, 0]), classes[1]) / terms
    total = total + cross_entropy(heads["dino"](seen[1][:, 0]), classes[0]) / terms
    for crop in batch["local"].unbind(1):
        logits = heads["dino"](model.student(crop).x[:, 0])
        total = total + sum(cross_entropy(logits, view) for view in classes) / terms
    row = 0
    for view, mask in zip(seen, masks, strict=True):
        for tokens, hidden_here in zip(view[:, 1:], mask, strict=True):
            if count := int(hidden_here.sum()):
                logits = heads["ibot"](tokens[hidden_here])
                total = total + cross_entropy(logits, patches[row : row + count]) / 8
                row += count
    assert row == len(patches) > 0
    total = total + 0.1 * (koleo(seen[0][:, 0]) + koleo(seen[1][:, 0]))
    loss = model.loss(batch)
    assert loss.weight == 4
    torch.testing.assert_close(loss.mean, total, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sum(loss.metrics.values()), total.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.proves("dinov2", "two views of one picture do not repel each other")
def test_koleo_does_not_see_the_other_view(model: DINOv2, batch: Batch) -> None:
    same = Batch(batch | {"global": batch["global"][:, :1].expand(-1, 2, -1, -1, -1), "masks": batch["masks"] & False})
    # Over all crops together each would have its twin at distance zero: -log(1e-8) = 18.
    assert float(model.loss(same).metrics["koleo"]) < 0.1 * 2 * 6


@pytest.mark.proves("dinov2", "no gradient reaches the teacher, all of the student learns")
def test_only_the_student_learns(model: DINOv2, batch: Batch) -> None:
    model.loss(batch).total.backward()
    for name, parameter in model.named_parameters():
        if name.startswith("student"):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
        else:
            assert not parameter.requires_grad, name
            assert parameter.grad is None, name


def test_teacher_sees_no_masks_and_no_local_crops(model: DINOv2, batch: Batch) -> None:
    masks = batch["masks"].transpose(0, 1).reshape(8, 16)
    crops = batch["global"].transpose(0, 1).reshape(8, 3, 16, 16)
    with torch.no_grad():
        model.vision.mask_token.add_(1.0)
    targets, patches = model.targets(crops, masks)
    with torch.no_grad():
        model.vision.mask_token.sub_(1.0)
    again, patches_again = model.targets(crops, masks)
    assert torch.equal(targets, again)
    assert torch.equal(patches, patches_again)


@pytest.mark.proves("dinov2", "the mask token stands in for the masked patches before positions are added")
def test_mask_token_positions(model: DINOv2) -> None:
    pixels = torch.randn(2, 3, 16, 16)
    masked = torch.zeros(2, 16, dtype=torch.bool)
    masked[0, 3] = masked[1, [0, 15]] = True
    plain, hidden = model.student.embed_patches(pixels), model.student.embed_patches(pixels, masked)
    torch.testing.assert_close(hidden[~masked], plain[~masked])
    expected = model.student.mask_token + model.student.position[1:][[3, 0, 15]]
    torch.testing.assert_close(hidden[masked], expected)
    # What lies under a mask does not reach the tower.
    changed = pixels.clone()
    changed[0, :, 0:4, 12:16] += 1
    torch.testing.assert_close(model.student(changed, masked=masked).x, model.student(pixels, masked=masked).x)


# ------------------------------------------------------------------------------------------------- the schedules


def step_of(model: DINOv2, step: int, total: int) -> dict[str, Tensor]:
    """One step in which an optimiser has moved every parameter of the student by one."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("student"):
                parameter.add_(1.0)
    model.after_step(step, total)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.proves("dinov2", "teacher: starts equal, moves by 1 - momentum, momentum rises to 1 along a cosine")
def test_teacher_is_a_moving_average() -> None:
    model = DINOv2.build(CONFIG)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in before:
        if name.startswith("student."):
            assert torch.equal(before[name], before[name.replace("student", "vision", 1)])
        if name.startswith("student_heads."):
            assert torch.equal(before[name], before[name.replace("student", "teacher", 1)])
    after = step_of(model, 21, 100)
    momentum = 1 - (1 - 0.994) * (math.cos(math.pi * 20 / 100) + 1) / 2
    for name, value in after.items():
        if name.startswith(("vision.", "teacher_heads.")):
            torch.testing.assert_close(value, before[name] + 1 - momentum, rtol=0, atol=1e-6)
    assert OBJECTIVE.momentum_at(0, 100) == 0.994
    assert OBJECTIVE.momentum_at(100, 100) == 1.0


@pytest.mark.proves("dinov2", "the last layers of the heads are frozen at first")
def test_last_layers_are_frozen_at_first() -> None:
    model = DINOv2.build(CONFIG)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    last = [name for name in before if name.endswith((".prototypes", ".scale"))]
    assert len(last) == 8
    after = step_of(model, 10, 100)  # the last step of the first tenth
    assert all(torch.equal(before[name], after[name]) for name in last)
    assert not torch.equal(before["student_heads.dino.mlp.0.weight"], after["student_heads.dino.mlp.0.weight"])
    after = step_of(model, 11, 100)
    assert not any(torch.equal(before[name], after[name]) for name in last)


@pytest.mark.proves("dinov2", "teacher temperature 0.04 to 0.07 along a line, kept by a checkpoint")
def test_temperature_warms_up() -> None:
    model = DINOv2.build(CONFIG)
    seen = [float(model.teacher_temperature)]
    for step in range(1, 101):
        model.after_step(step, 100)
        seen.append(float(model.teacher_temperature))
    np.testing.assert_allclose(seen[:30], np.linspace(0.04, 0.07, 30), rtol=1e-6)
    np.testing.assert_allclose(seen[30:], 0.07, rtol=1e-6)
    assert "teacher_temperature" in model.state_dict()


def test_teacher_never_drops_branches(batch: Batch) -> None:
    config = replace(CONFIG, vision=replace(CONFIG.vision, drop_path=0.5))
    model = noisy(DINOv2.build(config)).train()
    pixels = batch["global"][:, 0]
    assert torch.equal(model.vision(pixels).x, model.vision(pixels).x)
    assert not torch.equal(model.student(pixels).x, model.student(pixels).x)


# ------------------------------------------------------------------------------------------- loading and saving


@pytest.mark.proves("dinov2", "a saved model is the teacher's backbone; without an objective it refuses to train")
def test_what_is_saved_is_the_teacher(model: DINOv2, batch: Batch, tmp_path: Path) -> None:
    loaded = DINOv2.from_folder(model.save(tmp_path), "hf")
    assert loaded.config == replace(CONFIG, objective=None)
    pixels = Batch(pixels=batch["global"][:, 0])
    torch.testing.assert_close(loaded.encode(pixels), model.eval().encode(pixels))
    assert not any(name.startswith(("student", "teacher")) for name in loaded.state_dict())
    with pytest.raises(UnsupportedError, match="pretrain"):
        loaded.loss(batch)
    again = loaded.pretrain(OBJECTIVE)
    assert all(torch.equal(a, b) for a, b in zip(again.student.parameters(), loaded.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(again.vision.parameters(), loaded.parameters(), strict=True))
    assert again.loss(batch).total.isfinite()


def test_config_that_the_hub_cannot_hold(tmp_path: Path) -> None:
    odd = DINOv2.build(DINOv2Config(vision=replace(CONFIG.vision, hidden_dim=40)))
    with pytest.raises(ConfigError, match="multiple"):
        odd.save(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    with pytest.raises(ConfigError, match="mask token"):
        DINOv2Config(vision=replace(CONFIG.vision, mask_token=False))


# --------------------------------------------------------------------------------------------------------- masks


@pytest.mark.proves("dinov2", "block masks: half of the crops, 10 to 50 % of the patches, in rectangles")
def test_block_masks() -> None:
    rng = np.random.default_rng(0)
    masks = block_masks(rng, 64, 16, 16)
    ratios = np.sort(masks.mean(1))
    assert (ratios > 0).sum() == 32
    assert ratios.max() <= 0.5
    assert ratios[32:].mean() == pytest.approx(0.3, abs=0.04)
    assert ratios[32:40].max() < ratios[-8:].min()
    # Blocks: most hidden patches have hidden neighbours, which a random choice of 30 % has not.
    grids = masks.reshape(64, 16, 16)
    beside = (grids[:, :, 1:] & grids[:, :, :-1]).sum() / grids[:, :, 1:].sum()
    assert beside > 0.7
    assert np.array_equal(
        block_masks(np.random.default_rng(1), 4, 8, 8), block_masks(np.random.default_rng(1), 4, 8, 8)
    )


@pytest.mark.parametrize("count", [0, 1, 3, 10, 30])
def test_block_mask_never_hides_more_than_asked(count: int) -> None:
    rng = np.random.default_rng(count)
    found = [int(block_mask(rng, 6, 10, count).sum()) for _ in range(50)]
    assert max(found) <= count
    assert np.mean(found) >= 0.75 * count


# -------------------------------------------------------------------------------------------------------- recipe


def test_the_recipe_trains(tmp_path: Path) -> None:
    run = recipe.run(steps=2)
    stage = replace(run.stages[0], batch_size=8, workers=0)
    result = fit(replace(run, stages=[stage], evaluate=None, expect={}), tmp_path, device="cpu")
    assert result.finished
    views = recipe.Views().batch(range(8), np.random.default_rng(0))
    assert isinstance(result.model, DINOv2)
    assert {name: tuple(t.shape[1:]) for name, t in views.items()} == {
        name: spec.shape for name, spec in result.model.inputs_spec().items()
    }
    again = recipe.Views().batch(range(8), np.random.default_rng(0))
    assert all(torch.equal(views[name], again[name]) for name in views)


def test_questions_are_about_pairs_that_nobody_has_seen() -> None:
    rng = np.random.default_rng(0)
    seen = {(t.colour, t.shape) for _ in range(400) for t in close_up(rng).things}
    asked = {(t.colour, t.shape) for _ in range(400) for t in close_up(rng, held_out=True).things}
    assert asked == HELD_OUT
    assert not asked & seen
    for scene in (close_up(rng) for _ in range(50)):
        (thing,) = scene.things
        assert 0.2 < thing.width <= 0.9
        assert thing.height <= 0.9 + 1e-9
