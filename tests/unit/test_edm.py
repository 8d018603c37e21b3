"""EDM's scaling is that of its paper and of diffusers; its way from noise to data is the textbook's."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import EDMEulerScheduler
from torch import Tensor

from polymodal.core.errors import ConfigError
from polymodal.heads.diffusion import edm_loss
from polymodal.nn.edm import Preconditioning
from polymodal.samplers.diffusion import END, Euler, Heun
from polymodal.samplers.edm import Karras

LEVELS = torch.tensor([0.002, 0.1, 0.5, 3.0, 80.0])


@pytest.mark.parametrize("offset", [0.0, 0.3])
def test_what_is_read_and_what_is_learned_have_a_deviation_of_one(offset: float) -> None:
    scaling = Preconditioning(offset=offset)
    x, noise, shared = torch.randn(3, 200_000)
    for level in LEVELS:
        noisy = x * scaling.data + level * noise + offset * shared
        target = (x * scaling.data - scaling.kept(level) * noisy) / scaling.added(level)
        assert float((scaling.reads(level) * noisy).std()) == pytest.approx(1, abs=0.02)
        assert float(target.std()) == pytest.approx(1, abs=0.02)
        assert float(scaling.told(level)) == pytest.approx(math.log(math.hypot(level, offset)) / 4, abs=1e-5)


def test_levels_are_drawn_around_their_median() -> None:
    torch.manual_seed(0)
    scaling = Preconditioning(median=0.7, spread=1.2, least=0.01, most=20.0)
    drawn = scaling.draw(50_000, torch.device("cpu"))
    assert float(drawn.median()) == pytest.approx(0.7, rel=0.03)
    assert float(drawn.log().std()) == pytest.approx(1.2, rel=0.03)
    assert (float(drawn.min()), float(drawn.max())) == pytest.approx((0.01, 20.0))


@pytest.mark.parametrize("offset", [0.0, 0.3])
def test_a_network_that_knows_the_data_loses_nothing(offset: float) -> None:
    scaling, x = Preconditioning(offset=offset), torch.randn(6, 3, 4, 4)
    seen: list[tuple[Tensor, Tensor]] = []
    given = {"noise": torch.randn_like(x), "deviation": scaling.draw(6, x.device), "offset": torch.randn(6, 3, 1, 1)}

    def knows(read: Tensor, told: Tensor) -> Tensor:
        seen.append((read, told))
        level = given["deviation"].view(-1, 1, 1, 1)
        noisy = read / scaling.reads(level)
        torch.testing.assert_close(noisy, x + level * given["noise"] + offset * given["offset"])
        return (x - scaling.kept(level) * noisy) / scaling.added(level)

    loss, estimate = edm_loss(knows, x, scaling, **given)
    assert loss.mean.item() < 1e-6
    torch.testing.assert_close(estimate, x, atol=1e-4, rtol=0)
    assert torch.equal(seen[0][1], scaling.told(given["deviation"]))
    wrong, _ = edm_loss(lambda read, told: torch.zeros_like(read), x, scaling, **given)
    assert wrong.mean.item() > 0.5


def theirs(network: Tensor, noise: Tensor, steps: int) -> Tensor:
    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=5.0, sigma_data=0.5, rho=7.0)
    scheduler.set_timesteps(steps)
    x = noise
    for sigma, told in zip(scheduler.sigmas, scheduler.timesteps, strict=False):
        said = answer(network, scheduler.precondition_inputs(x, sigma), told.expand(len(x)))
        x = scheduler.step(said, told, x).prev_sample
    return x


def answer(network: Tensor, read: Tensor, told: Tensor) -> Tensor:
    return (read.flatten(1) @ network).tanh().view(read.shape) + 0.1 * told.view(-1, 1, 1, 1)


@pytest.mark.parametrize("steps", [3, 12])
def test_the_way_is_that_of_diffusers(steps: int) -> None:
    network, noise = torch.randn(12, 12) * 0.3, torch.randn(2, 3, 2, 2) * 5
    scaling = Preconditioning()
    karras = Karras(scaling=scaling, solver=Euler(), most=5.0)

    def model(x: Tensor, when: Tensor) -> Tensor:
        return answer(network, scaling.reads(when).view(-1, 1, 1, 1) * x, scaling.told(when))

    ours = karras.sample(model, noise, karras.points(steps))
    torch.testing.assert_close(ours, theirs(network, noise, steps), atol=1e-4, rtol=1e-5)


def test_the_levels_of_three_steps_are_those_of_the_paper() -> None:
    points = Karras(most=5.0).points(3)
    middle = ((5 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7
    assert [point.deviation for point in points] == pytest.approx([5.0, middle, 0.002, 0.0])
    assert points[-1].when == END
    assert [point.deviation for point in Karras(most=5.0).points(1)] == pytest.approx([5.0, 0.0])


def test_heun_goes_where_the_equation_leads() -> None:
    """Of normal data the best network is known, and so is where each noise goes."""
    scaling, noise = Preconditioning(), torch.randn(1, 64)

    def best(x: Tensor, when: Tensor) -> Tensor:
        sample = scaling.data**2 / (scaling.data**2 + when[:, None] ** 2) * x
        return (sample - scaling.kept(when)[:, None] * x) / scaling.added(when)[:, None]

    goal = noise * scaling.data / math.sqrt(scaling.data**2 + 80**2) * 80
    errors = {}
    for solver in (Euler(), Heun()):
        for steps in (30, 60):
            karras = Karras(scaling=scaling, solver=solver)
            made = karras.sample(best, noise * 80, karras.points(steps))
            errors[type(solver), steps] = float((made - goal).abs().max())
    assert errors[Heun, 60] < 0.35 * errors[Heun, 30], "of second order"
    assert 0.4 * errors[Euler, 30] < errors[Euler, 60], "of first order"
    assert errors[Heun, 60] < 0.2 * errors[Euler, 60]


@pytest.mark.parametrize("fields", [{"data": 0.0}, {"offset": -1.0}, {"spread": 0.0}, {"least": 3.0, "most": 2.0}])
def test_impossible_noise_is_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Preconditioning(**fields)


def test_impossible_ways_are_refused() -> None:
    with pytest.raises(ConfigError):
        Karras(least=0.0)
    with pytest.raises(ConfigError, match="one at least"):
        Karras().points(0)
