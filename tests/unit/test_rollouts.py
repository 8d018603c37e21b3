"""How foresight is judged: what needs no model, how errors grow, and whether other actions lead elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polymodal.core.errors import DataError
from polymodal.evaluate.rollouts import EXACT, Linear, copy_last, counterfactual, growth

CONTEXT = 3


def films(count: int, *, steps: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A bright column on a dark ground, moved to the right by 0 or 1 pixel a step, as the action says."""
    generator = torch.Generator().manual_seed(seed)
    actions = torch.randint(0, 2, (count, steps - 1, 1), generator=generator)
    place = torch.cat([torch.randint(0, 4, (count, 1), generator=generator), actions[..., 0]], 1).cumsum(1)
    frames = 0.1 + 0.8 * torch.nn.functional.one_hot(place, 12)
    return frames[:, :, None, None].expand(-1, -1, 3, 12, -1).float(), actions.float()


def perfect(frames: Tensor, actions: Tensor, *, seed: int = 0) -> Tensor:
    """The true world."""
    seen = [frames[:, -1]]
    for action in actions[:, frames.shape[1] - 1 :].unbind(1):
        seen.append(torch.where(action[:, 0, None, None, None] > 0, seen[-1].roll(1, -1), seen[-1]))
    return torch.stack(seen[1:], 1)


def test_copying_repeats_the_last_frame() -> None:
    frames, actions = films(2)
    made = copy_last(frames[:, :CONTEXT], actions)
    assert made.shape == (2, 5, 3, 12, 12)
    assert all(torch.equal(frame, frames[:, CONTEXT - 1]) for frame in made.unbind(1))


def test_a_linear_world_is_foreseen_to_the_end() -> None:
    """What fades, and brightens when it is told to, is linear; a column that stays or moves is not."""
    generator = torch.Generator().manual_seed(0)
    actions = torch.rand(6, 7, 2, generator=generator)
    seen = [torch.rand(6, 3, 12, 12, generator=generator) * 0.3]
    for step in range(7):
        seen.append(0.7 * seen[-1] + (actions[:, step] @ torch.tensor([0.1, 0.05])).view(-1, 1, 1, 1))
    frames = torch.stack(seen, 1)
    linear = Linear.fit(frames[:4], actions[:4], reach=1)
    made = growth(linear.imagine, frames[4:], actions[4:], context=CONTEXT)
    assert float(made.psnr.min()) > 45
    assert float(made.over(growth(copy_last, frames[4:], actions[4:], context=CONTEXT), 5).low) > 0
    lone = linear.imagine(frames[4:, :1], actions[4:])
    # It fades by the last two frames, which differ by a constant alone in every film that was fitted.
    torch.testing.assert_close(lone, frames[4:, 1:], atol=0.05, rtol=0)
    moving, told = films(8)
    assert float(growth(Linear.fit(moving, told).imagine, moving, told, context=CONTEXT).psnr[:, -1].mean()) < 30


def test_errors_grow_and_the_truth_has_none() -> None:
    frames, actions = films(40)
    true = growth(perfect, frames, actions, context=CONTEXT)
    assert bool((true.psnr == EXACT).all())
    torch.testing.assert_close(true.ssim, torch.ones(40, 5))
    copied = growth(copy_last, frames, torch.ones_like(actions), context=CONTEXT)
    assert float(copied.psnr[:, -1].mean()) < float(copied.psnr[:, 0].mean())
    gain = true.over(copied, 5)
    assert gain.low > 10
    assert copied.over(true, 5).value == pytest.approx(-gain.value)


def both() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    frames, actions = films(5)
    others = torch.cat([actions[:, : CONTEXT - 1], 1 - actions[:, CONTEXT - 1 :]], 1)
    instead = torch.cat([frames[:, :CONTEXT], perfect(frames[:, :CONTEXT], others)], 1)
    return frames, actions, instead, others


def test_a_model_that_listens_goes_where_the_world_would() -> None:
    found = counterfactual(perfect, *both(), context=CONTEXT)
    assert (found.nearer.value, found.spread) == (1.0, 0.0)
    assert found.along.value == pytest.approx(1.0)
    assert found.response == pytest.approx(found.true)
    assert found.response > 0.1


def test_a_model_that_does_not_listen_is_found_out() -> None:
    def deaf(frames: Tensor, actions: Tensor, *, seed: int = 0) -> Tensor:
        noise = 0.05 * torch.randn(actions.shape[1] + 1 - CONTEXT, generator=torch.Generator().manual_seed(seed))
        return copy_last(frames, actions) + noise.view(1, -1, 1, 1, 1)

    found = counterfactual(deaf, *both(), context=CONTEXT)
    assert found.response == 0.0
    assert found.spread > 0.01
    assert abs(found.along.value) < 1e-6

    def stubborn(frames: Tensor, actions: Tensor, *, seed: int = 0) -> Tensor:
        frames, actions, _, _ = both()
        return perfect(frames[:, :CONTEXT], actions)

    assert counterfactual(stubborn, *both(), context=CONTEXT).nearer.value == 0.0


def test_what_cannot_be_judged_is_refused() -> None:
    frames, actions, instead, others = both()
    with pytest.raises(DataError, match="the same past"):
        counterfactual(perfect, frames, actions, instead.flip(0), others, context=CONTEXT)
    with pytest.raises(DataError, match="the same past"):
        counterfactual(perfect, frames, actions, instead, 1 - actions, context=CONTEXT)
    with pytest.raises(DataError, match="foreseen"):
        growth(perfect, frames, actions, context=8)
    with pytest.raises(DataError, match="two"):
        Linear.fit(frames[:, :2], actions[:, :1])
