"""What codecs learn from: mel spectra against numpy, discriminators, hinge, the balancer, the joint step."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from polymodal.core.batch import Batch
from polymodal.heads.codec import (
    Balancer,
    DiscriminatorConfig,
    MelScales,
    MultiScaleSpectrum,
    Verdict,
    adversarial,
    feature_matching,
    hinge,
    mel_spectrum,
    multi_scale_mel,
)
from polymodal.nn.mel import log_mel_distance, mel_filters
from polymodal.systems.codec import Adversarial, Codec
from tests.nano import nano, nano_batch

SMALL = DiscriminatorConfig(filters=4, windows=(128, 64))


def tone(hertz: float, samples: int = 4000, rate: int = 8000) -> Tensor:
    return torch.sin(2 * math.pi * hertz * torch.arange(samples) / rate)[None, None]


@pytest.mark.parametrize("samples", [400, 1000, 1001])
def test_a_mel_spectrum_is_that_of_numpy(samples: int) -> None:
    scales = MelScales(rate=8000, windows=(64,), num_mels=10)
    wave = torch.randn(2, 1, samples)
    ours = mel_spectrum(wave, scales, 64)
    assert ours.shape == (2, 10, math.ceil(samples / 16))
    padded = np.pad(wave[:, 0].double().numpy(), ((0, 0), (24, 24)), "reflect")
    padded = np.pad(padded, ((0, 0), (0, 16)))
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(64) / 64)
    frames = np.stack([padded[:, 16 * n : 16 * n + 64] * window for n in range(ours.shape[2])], 2)
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2 / (window**2).sum()
    bands = mel_filters(33, 10, 8000, low=64, scale="htk", normalise=False)
    np.testing.assert_allclose(ours, bands.T.numpy() @ power, rtol=1e-4, atol=1e-5)


@pytest.mark.proves("encodec", "multi-scale mel loss: linear L1 and log L2 at five windows, zero for equal sounds")
def test_distances_are_zero_for_equal_sounds_and_grow() -> None:
    wave = tone(440)
    for distance in (
        lambda x: multi_scale_mel(x, wave, MelScales(rate=8000)),
        lambda x: log_mel_distance(x, wave, 8000),
    ):
        near, far = distance(0.8 * wave), distance(tone(1200))
        assert distance(wave) == 0
        assert 0 < near < far
        assert distance(-wave) < 1e-4, "the ear hears no sign"


@pytest.mark.proves("encodec", "discriminators of spectra: shapes over time and frequency at each window")
def test_discriminators_halve_frequency_and_keep_time() -> None:
    heads = MultiScaleSpectrum(DiscriminatorConfig(channels=2, filters=4))
    verdicts = heads(torch.randn(3, 2, 4096))
    assert len(verdicts) == 5
    for verdict, window in zip(verdicts, (1024, 2048, 512, 256, 128), strict=True):
        frames, bins = 1 + (4096 - window) // (window // 4), window // 2 + 1
        halves = [bins]
        for _ in range(3):
            halves.append((halves[-1] + 1) // 2)
        assert [tuple(f.shape) for f in verdict.features] == [(3, 4, frames, b) for b in [*halves, halves[-1]]]
        assert verdict.logits.shape == (3, 1, frames, halves[-1])


def verdict(*logits: float) -> Verdict:
    return Verdict(torch.tensor(logits).reshape(1, 1, 1, -1), [torch.tensor([1.0, 2.0]), torch.tensor([4.0])])


@pytest.mark.proves("encodec", "hinge and feature-matching losses by hand")
def test_losses_by_hand() -> None:
    real, made = [verdict(2.0, 0.5), verdict(0.0, 0.0)], [verdict(-3.0, 0.0), verdict(1.0, 1.0)]
    assert hinge(real, made) == pytest.approx(((0.25 + 0.5) + (1 + 2)) / 2)
    assert adversarial(made) == pytest.approx((1.5 - 1) / 2)
    other = [made[0]._replace(features=[torch.tensor([2.0, 2.0]), torch.tensor([1.0])]), made[1]]
    assert feature_matching(real, other) == pytest.approx(((0.5 + 3) / 2 + 0) / 2)


@pytest.mark.proves("encodec", "balancer: weights are shares of the gradient, whatever the size of the losses")
def test_shares_of_the_gradient() -> None:
    x = torch.randn(4, 1, 50, requires_grad=True)
    first, second = torch.randn(2, 4, 1, 50)
    balancer = Balancer({"a": 3.0, "b": 1.0})
    for _ in range(3):
        gradient = balancer({"a": 1000 * (x * first).mean(), "b": 0.01 * (x * second).mean()}, x)
    units = [g / g.flatten(1).norm(dim=1).mean() for g in (first, second)]
    torch.testing.assert_close(gradient, 0.75 * units[0] + 0.25 * units[1])


def test_norms_are_moving_averages_without_the_bias_of_their_start() -> None:
    x = torch.zeros(2, 1, 1, requires_grad=True)
    balancer = Balancer({"a": 1.0}, decay=0.5)
    norms = []
    for size in (1.0, 4.0):
        gradient = balancer({"a": size * x.sum() / 2}, x)
        norms.append(size / 2 / gradient.abs().mean().item())
    assert norms == pytest.approx([0.5, (0.5 * 0.5 + 2.0) / 1.5])


@pytest.fixture
def joint() -> Adversarial:
    codec = nano("encodec")
    assert isinstance(codec, Codec)
    torch.manual_seed(1)
    return Adversarial(codec, MultiScaleSpectrum(SMALL)).train()


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.proves("encodec", "one backward gives codec and discriminators each their own gradients, exactly")
def test_the_joint_step_is_two_steps(joint: Adversarial) -> None:
    batch = nano_batch(joint.codec, 4)
    torch.manual_seed(2)
    joint.loss(batch)  # k-means, and norms that are not those of one batch
    twin = copy.deepcopy(joint)
    torch.manual_seed(3)
    loss = joint.loss(batch)
    loss.mean.backward()
    ours = gradients(joint)

    torch.manual_seed(3)
    wave = batch["wave"]
    made, quantised = twin.codec.autoencode(wave)
    hinge(twin.discriminators(wave), twin.discriminators(made.detach())).backward()
    theirs = gradients(twin.discriminators)
    twin.discriminators.requires_grad_(False)
    real, fake = twin.discriminators(wave), twin.discriminators(made)
    parts = {
        "adversarial": adversarial(fake),
        "features": feature_matching(real, fake),
        **twin.codec.reconstruction(made, wave),
    }
    gradient = twin.balancer(parts, made)
    quantised.penalty.backward(retain_graph=True)
    made.backward(gradient)
    expected = {f"discriminators.{n}": g for n, g in theirs.items()}
    expected |= {f"codec.{n}": g for n, g in gradients(twin.codec).items()}
    assert ours.keys() == expected.keys() == dict(joint.named_parameters()).keys()
    for name, one in ours.items():
        torch.testing.assert_close(one, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_stage_may_leave_the_discriminators_out(joint: Adversarial) -> None:
    joint.discriminators.requires_grad_(False)
    loss = joint.loss(nano_batch(joint.codec, 4))
    loss.mean.backward()
    assert set(loss.metrics) == {"l1", "mel", "penalty", "hinge"}
    assert {name.split(".")[0] for name in gradients(joint)} == {"codec"}
    assert (joint.balancer.mass > 0).tolist() == [False, False, True, True]
    joint.discriminators.requires_grad_(True)
    joint.loss(nano_batch(joint.codec, 4))
    assert (joint.balancer.mass > 0).all()


def test_both_sides_learn(joint: Adversarial) -> None:
    """Discriminators alone learn to tell; the codec's distance falls while they do."""
    batch, seen = nano_batch(joint.codec, 4), []
    batch = Batch(wave=0.3 * batch["wave"])
    optimizer = torch.optim.AdamW(joint.parameters(), lr=5e-3, betas=(0.5, 0.9))
    for _ in range(25):
        torch.manual_seed(0)
        loss = joint.loss(batch)
        seen.append({name: float(value) for name, value in loss.metrics.items()})
        optimizer.zero_grad()
        loss.mean.backward()
        optimizer.step()
    assert min(s["mel"] for s in seen) < 0.7 * seen[0]["mel"]
    assert min(s["hinge"] for s in seen) < 0.9 * seen[0]["hinge"]
