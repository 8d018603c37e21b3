"""Rectified flow: times, the loss, Euler's method, and chunks guided by a beginning that is fixed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from polymodal.core.errors import ConfigError
from polymodal.heads.flow import Beta, LogitNormal, Shifted, Uniform, between, flow_loss
from polymodal.nn.noise import shifted
from polymodal.samplers.diffusion import END, DPMSolver, Heun
from polymodal.samplers.flow import Dynamic, Flow, Velocity, continued, euler, guided, prefix_weights

CPU = torch.device("cpu")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_times_have_the_distribution_that_they_name() -> None:
    t = Beta().draw(200_000, CPU, seeded())
    assert t.min() >= 0.001
    assert t.max() <= 1
    quantiles = torch.tensor([0.1, 0.5, 0.9])
    # of Beta(1.5, 1), whose distribution function is t ** 1.5
    torch.testing.assert_close(((t - 0.001) / 0.999).quantile(quantiles), quantiles ** (1 / 1.5), atol=5e-3, rtol=0)
    assert float(t.mean()) == pytest.approx(0.999 * 1.5 / 2.5 + 0.001, abs=2e-3)
    reference = torch.distributions.Beta(1.5, 1.0).sample((200_000,))
    torch.testing.assert_close(
        t.quantile(quantiles), (reference * 0.999 + 0.001).quantile(quantiles), atol=1e-2, rtol=0
    )
    torch.testing.assert_close(Uniform().draw(200_000, CPU, seeded()).quantile(quantiles), quantiles, atol=5e-3, rtol=0)
    logit = LogitNormal(mean=0.5, std=2.0).draw(200_000, CPU, seeded()).logit()
    assert (float(logit.mean()), float(logit.std())) == pytest.approx((0.5, 2.0), abs=2e-2)
    assert torch.equal(Beta().draw(5, CPU, seeded(1)), Beta().draw(5, CPU, seeded(1)))


def test_time_one_is_noise() -> None:
    x, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    torch.testing.assert_close(between(x, noise, torch.tensor([0.0, 1.0])), torch.stack([x[0], noise[1]]))


def test_the_right_velocity_has_no_loss_and_leads_to_the_data() -> None:
    x = torch.randn(6, 5, 2)

    def right(point: Tensor, t: Tensor) -> Tensor:
        return (point - x) / t.view(-1, 1, 1)  # of a line that ends in x

    assert flow_loss(right, x, times=Beta(), generator=seeded()).mean < 1e-8
    for steps in (1, 7):
        torch.testing.assert_close(euler(right, torch.randn(6, 5, 2), steps=steps), x, atol=1e-5, rtol=0)


def test_the_loss_is_the_error_of_noise_minus_data() -> None:
    x = torch.randn(4000, 3, generator=seeded(7)) * 2

    def nothing(point: Tensor, t: Tensor) -> Tensor:
        return torch.zeros_like(point)

    loss = flow_loss(nothing, x, times=Uniform(), generator=seeded())
    assert loss.weight == x.numel()
    assert float(loss.mean) == pytest.approx(1 + 4, rel=0.05)


def test_what_is_masked_is_not_learned_whatever_it_is() -> None:
    x, mask = torch.randn(3, 4, 2), torch.ones(3, 4, 1, dtype=torch.bool)
    mask[1, 2:] = False
    scale = torch.ones((), requires_grad=True)

    def model(point: Tensor, t: Tensor) -> Tensor:
        return point * scale * torch.where(mask, 1.0, 1e6)

    loss = flow_loss(model, x, times=Beta(), mask=mask, generator=seeded())
    assert loss.weight == 20
    assert loss.mean < 100
    assert torch.autograd.grad(loss.total, scale)[0].abs() < 1e4


def test_gaussian_data_are_sampled_with_their_covariance() -> None:
    """Of normal data the velocity is known: the expectation of ``noise - x`` given the point."""
    root = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    covariance = root @ root.T

    def velocity(point: Tensor, t: Tensor) -> Tensor:
        time = float(t[0])
        total = time**2 * torch.eye(2) + (1 - time) ** 2 * covariance
        gain = (time * torch.eye(2) - (1 - time) * covariance) @ torch.linalg.inv(total)
        return point @ gain.T

    x = euler(velocity, torch.randn(20_000, 2, generator=seeded()), steps=100)
    torch.testing.assert_close(x.T.cov(), covariance, atol=0.05, rtol=0)


def walk(horizon: int) -> tuple[Tensor, Velocity]:
    """Random walks, which hang together from step to step, and their velocity."""
    root = torch.ones(horizon, horizon).tril() / horizon**0.5
    covariance = root @ root.T

    def velocity(point: Tensor, t: Tensor) -> Tensor:
        time = float(t[0])
        total = time**2 * torch.eye(horizon) + (1 - time) ** 2 * covariance
        gain = (time * torch.eye(horizon) - (1 - time) * covariance) @ torch.linalg.inv(total)
        return torch.einsum("ij,bjd->bid", gain, point)

    return root, velocity


def test_a_guided_chunk_keeps_its_frozen_steps_and_goes_on_from_them() -> None:
    horizon, frozen = 16, 4
    root, velocity = walk(horizon)
    old = torch.einsum("ij,bjd->bid", root, torch.randn(200, horizon, 1, generator=seeded(1)))
    prefix = old.clone()
    prefix[:, frozen:] = 0.0  # nothing is known behind the frozen steps
    weights = prefix_weights(horizon, frozen=frozen, until=frozen)
    noise = torch.randn(200, horizon, 1, generator=seeded(2))
    free = euler(velocity, noise, steps=20)
    drawn = euler(guided(velocity, prefix, weights), noise, steps=20)

    def jump(x: Tensor) -> float:
        return float((x[:, frozen] - old[:, frozen - 1]).square().mean().sqrt())

    def miss(x: Tensor) -> float:
        return float((x[:, :frozen] - old[:, :frozen]).square().mean().sqrt())

    assert miss(drawn) < 0.25 * miss(free)
    inside = float(old.diff(dim=1).square().mean().sqrt())
    assert jump(drawn) < 1.5 * inside < 2 * inside < jump(free)


def test_more_steps_keep_the_frozen_ones_better() -> None:
    """A bound of the pull that does not grow with the steps of Euler's method would keep them worse."""
    root, velocity = walk(12)
    old, noise = (torch.randn(200, 12, 1, generator=seeded(n)) for n in (1, 2))
    old = root @ old

    def miss(steps: int) -> float:
        return float((continued(velocity, noise, old[:, :8], 4, steps=steps) - old)[:, :4].square().mean().sqrt())

    few, ten, many = miss(5), miss(10), miss(20)
    assert many < 0.5 * ten < 0.25 * few


def test_the_pull_is_the_gradient_through_the_model() -> None:
    """At one point, against the paper's formula written out with the model's whole derivative."""
    matrix = torch.randn(4, 4, generator=seeded(3)) * 0.5

    def velocity(point: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(point.flatten(1) @ matrix.T).view(point.shape)

    x, old = torch.randn(1, 2, 2, generator=seeded(4)), torch.randn(1, 2, 2, generator=seeded(5))
    weights, t = torch.tensor([1.0, 0.3]), torch.tensor([0.4])

    def end(point: Tensor) -> Tensor:
        return (point.view(1, 2, 2) - 0.4 * velocity(point.view(1, 2, 2), t)).flatten()

    jacobian = torch.autograd.functional.jacobian(end, x.flatten())
    error = ((old.flatten() - end(x.flatten())) * weights.repeat_interleave(2)) @ jacobian
    tau = 1 - 0.4  # the paper's time
    r_squared = (1 - tau) ** 2 / (tau**2 + (1 - tau) ** 2)
    expected = velocity(x, t) - min(5.0, (1 - tau) / (tau * r_squared)) * error.view(1, 2, 2)
    torch.testing.assert_close(guided(velocity, old, weights)(x, t), expected)


def test_weights_fall_from_one_to_zero() -> None:
    weights = prefix_weights(10, frozen=3, until=7)
    assert weights[:3].tolist() == [1, 1, 1]
    assert weights[7:].tolist() == [0, 0, 0]
    middle = weights[2:8]
    assert bool((middle.diff() < 0).all())
    share = (7 - 3) / (7 - 3 + 1)  # of the paper: c = (H - s - i) / (H - s - d + 1)
    assert float(weights[3]) == pytest.approx(share * (2.718281828**share - 1) / (2.718281828 - 1))
    assert prefix_weights(4, frozen=9, until=4).tolist() == [1, 1, 1, 1]
    assert prefix_weights(4, frozen=0, until=0).tolist() == [0, 0, 0, 0]


# ---- flows of pictures


def test_the_shift_moves_times_towards_noise_and_keeps_the_ends() -> None:
    """By 3 the signal-to-noise ratio falls by 9: sqrt of the ratio is (1 - t) / t (Esser et al. 2024)."""
    t = torch.linspace(0.01, 0.99, 50)
    moved = shifted(t, 3.0)
    torch.testing.assert_close((1 - moved) / moved, (1 - t) / t / 3)
    assert (shifted(0.0, 3.0), shifted(1.0, 3.0)) == (0, 1)
    drawn = Shifted(times=LogitNormal(), k=3.0).draw(200_000, CPU, seeded())
    assert float(drawn.logit().mean()) == pytest.approx(math.log(3), abs=2e-2)


def test_the_dynamic_shift_is_that_of_the_size() -> None:
    shift = Dynamic()
    assert shift.at(256) == pytest.approx(math.exp(0.5))
    assert shift.at(4096) == pytest.approx(math.exp(1.15))
    assert shift.at(1024) == pytest.approx(math.exp(0.5 + 0.65 * 768 / 3840))
    with pytest.raises(ConfigError):
        Dynamic(fewest=10, largest=10)
    for how in ({"most": 1e6}, {"least": -1e6}, {"least": math.nan}):
        with pytest.raises(ConfigError, match=r"it goes to exp\(20\)"):
            Dynamic(**how)
    with pytest.raises(ConfigError, match="a picture of 1,048,576 tokens"):
        shift.at(2**20)


def test_times_of_a_flow() -> None:
    even = [p.when for p in Flow(spacing="even").points(4, 0)]
    assert even == [1, 0.75, 0.5, 0.25, END]
    trained = [p.when for p in Flow(shift=3.0).points(4, 0)]
    least = shifted(0.001, 3.0)
    assert trained[0] == 1
    assert trained[-2] == pytest.approx(shifted(least, 3.0))  # twice, as diffusers has it
    for steps in (0, 1001):
        with pytest.raises(ConfigError, match="steps"):
            Flow().points(steps, 0)
    for k in (0.0, 1e-17, 1e30, math.nan):
        with pytest.raises(ConfigError, match="factor above 0"):
            Flow(shift=k)


def test_a_flow_of_pictures_is_eulers_method() -> None:
    matrix = torch.randn(3, 3, generator=seeded(3)) * 0.5

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return (x @ matrix).tanh() + t[:, None]

    noise, way = torch.randn(5, 3, generator=seeded()), Flow(spacing="even")
    torch.testing.assert_close(way.sample(velocity, noise, way.points(10, 0)), euler(velocity, noise, steps=10))


@pytest.mark.parametrize("solver", [Heun(), DPMSolver()])
def test_solvers_of_second_order_get_there_sooner(solver: Heun | DPMSolver) -> None:
    def velocity(x: Tensor, t: Tensor) -> Tensor:  # of data of mean 0.3 and deviation 0.5
        time = t.to(x.dtype).view(-1, 1)
        total = time**2 + (1 - time) ** 2 * 0.25
        sample = 0.3 + (1 - time) * 0.25 / total * (x - (1 - time) * 0.3)
        return (x - sample) / time

    noise = torch.randn(50, 1, generator=seeded(), dtype=torch.float64)

    def error(way: Flow) -> float:
        return float((way.sample(velocity, noise, way.points(16, 0)) - (0.3 + 0.5 * noise)).abs().max())

    assert error(Flow(solver=solver, spacing="even")) < 0.4 * error(Flow(spacing="even"))
