"""Recipes of what paints: where their autoencoders begin, what they are told, and a tiny run of each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import polymodal
from polymodal.core.drawing import Drawing
from polymodal.data.worlds import prompts
from polymodal.data.worlds.shapes import COLOURS
from polymodal.evaluate.faithfulness import faithfulness
from polymodal.systems.parti import Parti
from polymodal.tokenizers.vae import VAE
from polymodal.train import fit
from recipes.nano import draw, draw_dit, draw_flow, draw_unet, painted
from recipes.nano.averaging import averaging_


@pytest.fixture(scope="module")
def painter() -> Parti:
    torch.manual_seed(0)
    return draw.painter()


def test_autoencoders_begin_with_mean_colours() -> None:
    rng = np.random.default_rng(0)
    pixels = painted.pixels([prompts.prompt(rng) for _ in range(4)], rng)
    squares = torch.nn.functional.avg_pool2d(pixels, 4)
    torch.manual_seed(0)
    vae = VAE(painted.AUTOENCODER)
    vae.init_weights()
    before = (vae.decode(vae.encode(pixels)) - pixels).abs().mean()
    averaging_(vae)
    latents = vae.encode(pixels)[:, :3].flatten()
    assert torch.corrcoef(torch.stack([latents, squares.flatten()]))[0, 1] > 0.95
    assert (vae.decode(vae.encode(pixels)) - pixels).abs().mean() < before / 2


def test_a_code_is_a_colour(painter: Parti) -> None:
    """Squares of paper alone have one code, and those within objects of one colour have another."""
    rng = np.random.default_rng(0)
    one = prompts.Prompt(text="", kinds=(("red", "square"), ("red", "circle")))
    codes = painter.vision.encode(painted.pixels([one], rng))[0]
    values, counts = codes.unique(return_counts=True)
    paper, red = values[counts.argsort(descending=True)[:2]]
    assert (codes == paper).float().mean() > 0.5
    assert (codes == red).sum() >= 12


def test_pictures_pass_the_codes(painter: Parti) -> None:
    vision = painter.vision
    wanted = painted.asked(12, held_out=True)
    pixels = painted.pixels(wanted, np.random.default_rng(5))
    squares = vision.latents(pixels)
    torch.testing.assert_close(vision.paint(squares), pixels)
    assert squares.shape == (12, 48, 12, 12)
    read = painted.judged(vision.decode(vision.encode(pixels)) / 2 + 0.5, wanted)
    assert read.objects.value >= 11 / 12


def test_words_speak_of_what_the_codes_show() -> None:
    batch = draw.Bound().batch(range(12), np.random.default_rng(0))
    squares = torch.nn.functional.avg_pool2d(batch["pixels"], 4).flatten(2).mT  # mean colours
    paper = squares[:, :1]
    words = draw.tokenizer()
    for row in range(12):
        shown = batch["shows"][row]
        for number in range(int(batch["speaks"][row].max()) + 1):
            said = batch["ids"][row][batch["speaks"][row] == number].tolist()
            colour, shape = words.decode(said).split()
            assert shape in prompts.SHAPES
            wanted = torch.tensor(COLOURS[colour]) / 127.5 - 1
            covered = squares[row][shown == number]
            assert len(covered) > 4
            nearer = (covered - wanted).norm(dim=1) < (covered - paper[row]).norm(dim=1)
            assert nearer.float().mean() > 0.5
    assert draw.NONE in batch["speaks"]


def test_places_of_codes_begin_alike_everywhere(painter: Parti) -> None:
    table = painter.backbone.decoder.position
    assert isinstance(table, torch.nn.Embedding)
    alike = table.weight @ table.weight.T
    above, beside = alike.diagonal(12), alike.diagonal(1)[torch.arange(143) % 12 != 11]
    assert torch.allclose(above, above[:1])
    assert torch.allclose(beside, beside[:1])
    assert alike.diagonal().min() > above.max()


def test_texts_are_read_whole() -> None:
    rng = np.random.default_rng(3)
    for one in [prompts.prompt(rng, held_out=i % 2 == 0) for i in range(200)]:
        assert painted.tokenizer().count(one.text) == len(one.text.split()) + 2
        assert len(draw.tokenizer().encode(one.text, special=True)) == len(one.text.split()) <= draw.CONTEXT


def test_what_is_told_is_of_the_picture() -> None:
    batch = painted.Scenes(draw_dit.classes, "one").batch([0, 1, 2], np.random.default_rng(0))
    wanted = [prompts.Prompt(text="", kinds=(tuple(draw_dit.LABELS[i].split()),)) for i in batch["label"]]
    assert painted.judged(batch["pixels"] / 2 + 0.5, wanted).objects.value == 1
    assert painted.Scenes().batch([0], np.random.default_rng(0)).keys() == {"pixels"}


@pytest.mark.slow  # a picture is 144 codes, one after another
def test_a_tiny_run_of_the_shipped_painter(tmp_path: Path) -> None:
    result = fit(draw.run(1, 2, count=6), tmp_path, device="cpu")
    assert result.finished
    assert set(result.reached) <= set(result.metrics)
    assert not any(result.reached.values())
    assert {"unseen/objects", "shuffled/objects", "seen/relation"} <= set(result.metrics)
    (trained,) = result.model.children()
    assert isinstance(trained, Parti)
    saved = polymodal.load(trained.save(tmp_path / "model"))
    drawing = Drawing(seed=3)
    torch.testing.assert_close(saved.draw(["a red circle"], drawing), trained.draw(["a red circle"], drawing))


@pytest.mark.parametrize("recipe", [draw_unet, draw_dit, draw_flow])
def test_a_step_of_the_others(recipe: ModuleType) -> None:
    torch.manual_seed(0)
    run = recipe.run(count=2)
    assert [stage.name for stage in run.stages] == ["autoencoder", "painter", "decoder"]
    learner = run.model().train()
    for stage in run.stages:
        batch = stage.source().batch([0, 1], np.random.default_rng(0))
        learner.zero_grad()
        learner.loss(batch).mean.backward()
        # Zeros behind the text's attention: its tower has a gradient from the second step on.
        learned = {name for name, p in learner.named_parameters() if p.grad is not None}
        for pattern in stage.trainable:
            assert any(name.startswith(pattern) for name in learned), (stage.name, pattern)
    learner.eval()
    pictures = painted.paint(learner.painter, [prompts.Prompt(text=_text(recipe), kinds=())], Drawing(steps=2, seed=0))
    assert pictures.shape == (1, 3, painted.SIDE, painted.SIDE)


def _text(recipe: ModuleType) -> str:
    return "red square" if recipe is draw_dit else "a red square"


def test_the_baseline_is_pictures_of_others() -> None:
    """Pictures that are right score full marks, and beside texts of others next to none."""

    class Perfect(torch.nn.Module):
        """Paints what it is asked for: the scenes of the texts it will be given, one after another."""

        multiple = 1

        def settled(self, drawing: Drawing, **_: object) -> Drawing:
            return drawing

        def draw(self, texts: list[str], drawing: Drawing) -> torch.Tensor:
            rng = np.random.default_rng(0)
            told = {one.text: one for one in wanted}
            return painted.pixels([told[text] for text in texts], rng) / 2 + 0.5

    wanted = painted.asked(12, held_out=True)
    found = painted.evaluate(Perfect(), {"unseen": wanted}, Drawing())
    assert found["unseen/objects"] == found["unseen/relation"] == 1
    assert found["shuffled/objects"] < 0.2
    assert found["shuffled/count"] == 1
    with pytest.raises(AssertionError, match="3 texts"):
        painted.evaluate(Perfect(), {"unseen": wanted[:3]}, Drawing())


def test_chance_is_what_a_painter_scores_that_is_deaf_to_relations() -> None:
    related = [one for one in painted.asked(120, held_out=True) if one.relation is not None] * 3
    rng = np.random.default_rng(0)
    deaf = [prompts.scene(replace(one, relation=None), rng).things for one in related]
    bar, share = painted.EXPECT["unseen/relation"], faithfulness(deaf, related).relation
    assert bar.chance is not None
    assert share is not None
    assert share.value == pytest.approx(bar.chance, abs=0.06)
    assert share.high < bar.value
    assert all(recipe.run().expect == painted.EXPECT for recipe in (draw, draw_unet, draw_flow))
