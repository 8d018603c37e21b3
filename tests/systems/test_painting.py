"""What all painters share, with the smallest one: drawing, changing, filling in, guidance, seeds, and the loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from polymodal.core.batch import Batch
from polymodal.core.drawing import Drawing, Glimpse
from polymodal.core.errors import ConfigError, MediaError, UnsupportedError
from polymodal.core.sample import Sample
from polymodal.core.verbs import Draws, verbs_of
from polymodal.nn.noise import Schedule
from polymodal.samplers.diffusion import DDIM, DDPM, PLMS, Diffusion, DPMSolver, Euler, Heun
from polymodal.samplers.flow import Dynamic, Flow, Sampling
from tests.toy_painter import COLOURS, WORDS, ToyConfig, ToyPainter, toy

LATE: dict[str, Any] = {"interval": (0.5, 1.0)}
NOISE = Diffusion(schedule=Schedule(steps=100, last=0.1), clip=1.5)
WAYS: dict[str, Sampling] = {
    "ddim": NOISE, "ddpm": replace(NOISE, solver=DDPM()), "eta": replace(NOISE, solver=DDIM(eta=1.0)),
    "euler": replace(NOISE, solver=Euler(), spacing="trailing"), "heun": replace(NOISE, solver=Heun()),
    "dpm": replace(NOISE, solver=DPMSolver()), "plms": replace(NOISE, solver=PLMS()),
    "velocity": replace(NOISE, prediction="velocity", schedule=Schedule(steps=100, last=0.1, zero_snr=True)),
    "sample": replace(NOISE, prediction="sample"),
    "flow": Flow(shift=2.0), "flow heun": Flow(solver=Heun()), "flow dpm": Flow(solver=DPMSolver()),
    "dynamic flow": Flow(shift=Dynamic(), spacing="even"),
}  # fmt: skip


@pytest.fixture(scope="module")
def painter() -> ToyPainter:
    return toy(steps=300)


def mean(pictures: Tensor) -> Tensor:
    return pictures.mean((2, 3))


@pytest.mark.parametrize("name", ["ddim", "velocity", "sample", "flow"])
def test_a_painter_learns_to_paint_what_it_is_told(name: str) -> None:
    model = toy(WAYS[name], steps=300)
    pictures = model.draw(list(WORDS[1:]), Drawing(seed=0, guidance=1.0))
    assert pictures.shape == (4, 3, 8, 16)
    assert 0 <= float(pictures.min()) <= float(pictures.max()) <= 1
    torch.testing.assert_close(mean(pictures), COLOURS[1:], atol=0.25, rtol=0)


@pytest.mark.parametrize("name", list(WAYS))
def test_a_seed_gives_the_same_picture_alone_and_among_others(name: str) -> None:
    model = toy(WAYS[name])
    assert isinstance(model, Draws)
    words = ["red", "green", "blue"]
    together = model.draw(words, Drawing(seed=5))
    for row, word in enumerate(words):
        torch.testing.assert_close(model.draw([word], Drawing(seed=5 + row)), together[row : row + 1])
    assert torch.equal(model.draw(words, Drawing(seed=5)), together)
    assert not torch.allclose(model.draw(words, Drawing(seed=6)), together, atol=1e-3)
    image, mask = torch.rand(1, 3, 8, 16), torch.zeros(1, 1, 8, 16)
    mask[..., :8] = 1
    for how in ({"image": image}, {"image": image, "mask": mask}):
        together = model.draw(words, Drawing(seed=5), **how)
        torch.testing.assert_close(model.draw(["blue"], Drawing(seed=7), **how), together[2:])


def test_global_random_numbers_are_left_alone(painter: ToyPainter) -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    painter.draw(["red"], Drawing(seed=1))
    assert torch.equal(torch.rand(3), expected)


def test_strength_says_how_much_of_a_picture_is_left(painter: ToyPainter) -> None:
    image, how = COLOURS[3].view(1, 3, 1, 1).expand(1, 3, 8, 16).clone(), Drawing(seed=0, guidance=1.0, steps=20)
    far = [
        float((painter.draw(["red"], replace(how, strength=s), image=image) - image).abs().mean())
        for s in (0.05, 0.4, 0.7, 1.0)
    ]
    assert far == sorted(far)
    assert far[0] < 0.1 < 0.4 < far[-1]
    plain = painter.draw(["red"], Drawing(seed=0, guidance=1.0, steps=20))
    at_one = painter.draw(["red"], Drawing(seed=0, strength=1.0, guidance=1.0, steps=20), image=image)
    torch.testing.assert_close(at_one, plain)


def test_few_of_the_steps_are_taken_on_a_picture(painter: ToyPainter) -> None:
    image, seen = torch.rand(1, 3, 8, 16), []
    for strength, steps in ((0.3, 3), (0.01, 1), (1.0, 10)):
        seen.clear()
        painter.draw(["red"], Drawing(strength=strength, steps=10), image=image, watch=seen.append)
        assert [(g.step, g.steps) for g in seen] == [(n, steps) for n in range(1, steps + 1)]


def test_inpainting_changes_what_is_masked_and_nothing_else(painter: ToyPainter) -> None:
    image = torch.rand(1, 3, 8, 16)
    mask = torch.zeros(1, 1, 8, 16)
    mask[..., 2:6, 5:11] = 1  # not along the borders of latents
    out = painter.draw(["red", "green"], Drawing(seed=0, guidance=1.0), image=image, mask=mask)
    inside = mask[0, 0].bool()
    for picture, colour in zip(out, COLOURS[1:3], strict=True):
        assert torch.equal(picture[:, ~inside], image[0][:, ~inside])
        torch.testing.assert_close(picture[:, inside].mean(1), colour, atol=0.3, rtol=0)


def test_guidance_goes_beyond_what_is_asked_for_and_away_from_what_is_not() -> None:
    model, asked = toy(), []
    denoise = model.denoise

    def counted(x: Tensor, when: Tensor, condition: Batch) -> Tensor:
        asked.append(len(x))
        return denoise(x, when, condition)

    model.denoise = counted  # type: ignore[method-assign]

    def draw(**how: Any) -> Tensor:
        asked.clear()
        return model.draw(["red"], Drawing(seed=0, steps=10, **how))

    free = draw(guidance=1.0)
    assert asked == [1] * 10
    guided = draw(guidance=3.0)
    assert asked == [2] * 10
    assert not torch.allclose(free, guided, atol=1e-3)
    assert not torch.allclose(guided, draw(guidance=3.0, negative="blue"), atol=1e-3)
    torch.testing.assert_close(draw(guidance=3.0, negative="red"), free)
    late = draw(guidance=3.0, interval=(0.5, 1.0))
    assert asked == [1] * 5 + [2] * 5
    assert not torch.allclose(late, guided, atol=1e-3)
    assert not torch.allclose(draw(guidance=3.0, rescale=0.7), guided, atol=1e-3)
    assert not torch.allclose(draw(guidance=0.0), free, atol=1e-3)


def test_a_distilled_painter_is_told_the_guidance() -> None:
    model = toy()
    model.embeds_guidance, told = True, []
    denoise = model.denoise

    def listening(x: Tensor, when: Tensor, condition: Batch) -> Tensor:
        told.append((len(x), condition["guidance"].tolist()))
        return denoise(x, when, condition)

    model.denoise = listening  # type: ignore[method-assign]
    model.draw(["red", "blue"], Drawing(guidance=3.5, steps=2))
    assert told == [(2, [3.5, 3.5])] * 2
    for how, words in (
        ({"negative": "blue"}, "a negative prompt"),
        ({"rescale": 0.5}, "rescale"),
        (LATE, "an interval"),
    ):
        with pytest.raises(UnsupportedError, match=f"{words}: ToyPainter .* is distilled"):
            model.draw(["red"], Drawing(**how))


def test_control_pictures_are_looked_at() -> None:
    model = toy()
    plain = model.draw(["red"], Drawing(seed=0))
    seen = model.draw(["red"], Drawing(seed=0), control=torch.rand(1, 3, 8, 16))
    assert not torch.allclose(plain, seen, atol=1e-3)


def test_what_is_expected_can_be_looked_at_on_the_way(painter: ToyPainter) -> None:
    glimpses: list[Tensor] = []

    def watch(glimpse: Glimpse) -> None:
        glimpses.append(glimpse.pictures())

    out = painter.draw(["blue"], Drawing(seed=0, steps=10), watch=watch)
    assert len(glimpses) == 10
    assert all(g.shape == out.shape and float(g.min()) >= 0 and float(g.max()) <= 1 for g in glimpses)
    errors = [float((g - out).abs().mean()) for g in glimpses]
    assert errors[-1] < 1e-6 < errors[0]


def test_drawing_leaves_the_model_as_it_was() -> None:
    model = toy().train()
    model.draw(["red"], Drawing(steps=1))
    assert model.training
    with pytest.raises(MediaError):
        model.draw(["mauve"], Drawing(steps=1))
    assert model.training


@pytest.mark.parametrize(
    ("how", "given", "error", "words"),
    [
        ({"size": (18, 8)}, {}, ConfigError, "multiples of 4 pixels, not 18 x 8; 16 x 8 is near"),
        ({"strength": 0.5}, {}, ConfigError, "there is none"),
        ({}, {"mask": torch.ones(1, 1, 8, 16)}, ConfigError, "there is none"),
        ({"size": (16, 16)}, {"image": torch.ones(1, 3, 8, 16)}, MediaError, "16 x 8 pixels"),
        ({}, {"image": torch.ones(1, 3, 8, 16), "mask": torch.ones(1, 1, 8, 8)}, MediaError, "the mask has 8 x 8"),
        ({}, {"control": torch.ones(1, 3, 4, 4)}, MediaError, "the control picture has 4 x 4"),
        ({"steps": 101}, {}, ConfigError, "takes 1 to 100"),
        ({"guidance": 1, "negative": "red"}, {}, ConfigError, "a negative prompt: .* at a guidance of 1 there is none"),
        ({"guidance": 1, "rescale": 0.5}, {}, ConfigError, "rescale: .* at a guidance of 1 there is none"),
        ({"guidance": 1, **LATE}, {}, ConfigError, "an interval: .* at a guidance of 1 there is none"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(how: Any, given: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        toy().draw(["red"], Drawing(**how), **given)


@pytest.mark.parametrize(
    "how",
    [
        {"steps": 0}, {"steps": 1001}, {"guidance": -1.0}, {"guidance": float("nan")}, {"rescale": 2.0}, {"seed": -1},
        {"interval": (0.5, 0.2)}, {"size": (0, 8)}, {"size": (8, 20_000)}, {"strength": 0.0}, {"strength": 1.1},
        {"guidance": float("inf")},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(how: Any) -> None:
    with pytest.raises(ConfigError):
        Drawing(**how)


def test_no_prompt_is_refused() -> None:
    with pytest.raises(ConfigError, match="no prompt"):
        toy().draw([], Drawing())


# ---- the loss


def test_a_tenth_of_the_conditions_is_dropped_in_training() -> None:
    model, seen = toy().train(), []
    condition = model.condition
    model.condition = lambda batch: seen.append(batch["ids"]) or condition(batch)  # type: ignore[assignment, func-returns-value]
    batch = Batch(ids=torch.full((4000, 1), 2), latents=torch.randn(4000, 3, 1, 1))
    model.loss(batch)
    assert float((seen[-1] == 0).float().mean()) == pytest.approx(0.1, abs=0.02)
    chance = torch.arange(4000) % 100
    model.loss(Batch(batch, chance=chance))
    assert torch.equal(seen[-1][:, 0] == 0, chance < 10)
    model.eval()
    model.loss(Batch(batch, chance=chance))
    assert not (seen[-1] == 0).any()


@pytest.mark.parametrize("name", ["ddim", "velocity", "flow"])
def test_the_loss_is_the_error_of_the_prediction(name: str) -> None:
    model = toy(WAYS[name])
    x, noise = torch.randn(2, 3, 2, 4), torch.randn(2, 3, 2, 4)
    flow = isinstance(model.sampling, Flow)
    when = torch.tensor([0.2, 0.9]) if flow else torch.tensor([10, 77])
    batch = Batch(model.prompt(["red", "blue"]), latents=x, noise=noise, when=when)
    if flow:
        wanted = noise - x
    else:
        share = model.sampling.schedule.left[when].view(-1, 1, 1, 1)  # type: ignore[union-attr]
        wanted = share.sqrt() * noise - (1 - share).sqrt() * x if name == "velocity" else noise
    loss = model.loss(batch)
    torch.testing.assert_close(loss.mean, (model(batch) - wanted).square().mean())
    model.gamma = 5.0
    if not flow:
        assert bool(model.loss(batch).mean < loss.mean)


def test_the_autoencoder_learns_nothing_and_its_posterior_may_be_given() -> None:
    model = toy()
    pixels = torch.rand(2, 3, 8, 16, requires_grad=True)
    batch = Batch(
        model.prompt(["red", "blue"]), pixels=pixels, noise=torch.randn(2, 3, 2, 4), when=torch.tensor([10, 77]),
        posterior=torch.randn(2, 3, 2, 4),
    )  # fmt: skip
    one, other = model.loss(batch), model.loss(batch)
    assert torch.equal(one.total, other.total)
    one.mean.backward()
    assert pixels.grad is None
    latents = model.encode_pixels(pixels.detach(), batch["posterior"])
    torch.testing.assert_close(model.loss(Batch(batch, latents=latents)).total, one.total)


def test_count_and_verbs() -> None:
    model = toy()
    assert "draw" in verbs_of(ToyPainter)
    assert "embed" not in verbs_of(ToyPainter)
    assert model.count(Sample.of(["red"])) == 1
    from PIL import Image as PILImage

    assert model.count(Sample.of([PILImage.new("RGB", (9, 9)), "red"])) == 1 + 2 * 4
    assert ToyConfig().sampling == NOISE
