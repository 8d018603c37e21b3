"""How DiT, Stable Diffusion 3 and FLUX are trained: what is left out, at which times, and with which guidance."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from polymodal.core.batch import Batch
from polymodal.heads.flow import LogitNormal
from polymodal.systems.dit import DiT
from polymodal.systems.flux import Flux
from polymodal.systems.sd3 import SD3
from tests.nano import NANO, nano, nano_batch, shaken


@pytest.mark.proves("sd3", "training: each text encoder is left out on its own with probability 0.463, as zeros")
def test_each_encoder_is_left_out_on_its_own() -> None:
    model = nano("sd3").eval()
    assert isinstance(model, SD3)
    torch.manual_seed(0)
    heard = model.hearing(40_000).double()
    torch.testing.assert_close(heard.mean(0), torch.full((3,), 0.537, dtype=torch.float64), atol=0.01, rtol=0)
    assert float((heard.sum(1) == 0).double().mean()) == pytest.approx(0.463**3, abs=0.005)  # one in ten has no text
    torch.testing.assert_close(torch.corrcoef(heard.T), torch.eye(3, dtype=torch.float64), atol=0.02, rtol=0)

    batch = Batch({n: t for n, t in nano_batch(model).items() if n != "heard"})
    whole, (first, second) = model.condition(batch), (32, 64)  # widths of the towers, side by side
    words = batch["ids"].shape[1]
    for number, (tokens, vector) in enumerate(
        [
            ((slice(0, words), slice(0, first)), slice(0, 10)),
            ((slice(0, words), slice(first, second)), slice(10, 24)),
            ((slice(words, None), slice(None)), slice(0, 0)),
        ]
    ):
        kept = torch.ones(batch.size, 3, dtype=torch.bool)
        kept[:, number] = False
        told = model.condition(Batch(batch, heard=kept))
        expected, pooled = whole["context"].clone(), whole["pooled"].clone()
        assert expected[:, tokens[0], tokens[1]].any()
        expected[:, tokens[0], tokens[1]] = 0
        pooled[:, vector] = 0
        assert torch.equal(told["context"], expected)
        assert torch.equal(told["pooled"], pooled)
    assert not whole["context"][:, :words, second:].any()  # padded to T5's width


@pytest.mark.proves("flux", "training: guidance is a condition, 1 where nothing is said")
def test_guidance_is_a_condition_of_distilled_models() -> None:
    model = shaken(nano("flux")).eval()
    assert isinstance(model, Flux)
    batch = nano_batch(model)
    batch |= {"when": torch.full((batch.size,), 0.4), "noise": torch.randn(batch.size, 4, 8, 8)}
    batch["posterior"] = torch.randn(batch.size, 4, 8, 8)
    plain = model(batch)
    assert torch.equal(plain, model(Batch(batch, guidance=torch.ones(batch.size))))
    assert not torch.allclose(plain, model(Batch(batch, guidance=torch.full((batch.size,), 3.5))), atol=1e-4)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_times_are_those_of_the_pictures_size(name: str) -> None:
    """Drawn around the middle, and moved towards noise as sampling moves them."""
    model = nano(name).eval()
    assert isinstance(model, SD3 | Flux)
    batch = nano_batch(model)
    batch |= {"noise": torch.randn(batch.size, 4, 8, 8), "posterior": torch.randn(batch.size, 4, 8, 8)}
    torch.manual_seed(5)
    drawn = model.loss(batch).total
    torch.manual_seed(5)
    t = LogitNormal().draw(batch.size, torch.device("cpu"))
    k = 3.0 if name == "sd3" else model.sampling.shift.at(16)  # type: ignore[union-attr]
    moved = k * t / (1 + (k - 1) * t)
    assert model.loss(Batch(batch, when=moved)).total.item() == pytest.approx(drawn.item(), rel=1e-6)


@pytest.mark.proves("dit", "training: one class in ten is replaced by none")
def test_classes_are_dropped() -> None:
    model = shaken(nano("dit")).train()
    assert isinstance(model, DiT)
    batch = nano_batch(model)
    rows = batch.size
    batch |= {"noise": torch.randn(rows, 4, 8, 8), "posterior": torch.randn(rows, 4, 8, 8)}
    batch["when"] = torch.arange(rows) * 100
    none = torch.full((rows,), 5)
    for chance, label in ((9, none), (10, batch["label"])):
        got = model.loss(Batch(batch, chance=torch.full((rows,), chance))).total
        expected = model.loss(Batch(batch, label=label, chance=torch.full((rows,), 99))).total
        assert got.item() == pytest.approx(expected.item(), rel=1e-6)
    assert set(model.loss(batch).metrics) == {"noise", "variance"}


def test_what_is_not_distilled_for_guidance_is_drawn_without() -> None:
    """FLUX.1-schnell: few steps, one prediction each."""
    config = NANO["flux"]
    schnell = Flux(replace(config, backbone=replace(config.backbone, guidance=False)))
    assert (schnell.steps, schnell.guidance, schnell.embeds_guidance) == (4, 1.0, False)
    dev = Flux(config)
    assert (dev.steps, dev.guidance, dev.embeds_guidance) == (28, 3.5, True)
