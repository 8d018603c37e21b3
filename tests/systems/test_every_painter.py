"""What holds for every system of the table that paints, at nano size."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from polymodal.core.batch import Batch
from polymodal.core.drawing import Drawing
from polymodal.nn.packed import can_pack, pack
from polymodal.nn.precision import cast
from polymodal.systems import TABLE
from polymodal.systems.painting import Painter
from tests.nano import NANO, every_system, nano, nano_batch


def painter(name: str) -> Painter:
    """With gates and outputs that are not zero; where it has no words, a text is as many numbers as it has letters."""
    model = nano(name).eval()
    assert isinstance(model, Painter)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    some = nano_batch(model)
    others = ("pixels", "chance", "noise", "when", "posterior", "control")
    words = Batch({name: some[name] for name in some if name not in others})

    def prompt(texts: Sequence[str]) -> Batch:
        asked = words.take([len(text) % words.size for text in texts])
        return model.drop(asked, torch.tensor([not text for text in texts]))

    model.prompt = prompt  # type: ignore[method-assign]
    return model


@every_system("drawing: a seed gives the same picture alone and among others; guidance and words matter", Painter)
def test_seeds(name: str) -> None:
    model, drawing = painter(name), Drawing(seed=3, steps=2, guidance=3.0)
    width, height = model.size
    both = model.draw(["a", "bb"], drawing)
    assert both.shape == (2, 3, height, width)
    assert 0 <= float(both.min()) < float(both.max()) <= 1
    alone = model.draw(["bb"], Drawing(seed=4, steps=2, guidance=3.0))
    torch.testing.assert_close(alone, both[1:], atol=1e-5, rtol=0)
    assert not torch.allclose(both, model.draw(["a", "bb"], Drawing(seed=3, steps=2, guidance=9.0)), atol=1e-5)
    assert not torch.allclose(both[:1], model.draw([""], drawing), atol=1e-5)


@every_system("drawing: pictures are changed and filled in", Painter)
def test_changing(name: str) -> None:
    model = painter(name)
    width, height = model.size
    image = torch.rand(1, 3, height, width)
    mask = torch.zeros(1, 1, height, width)
    mask[..., : width // 2] = 1
    changed = model.draw(["a"], Drawing(seed=3, steps=4, strength=0.5), image=image)
    filled = model.draw(["a"], Drawing(seed=3, steps=4), image=image, mask=mask)
    assert not torch.allclose(changed, image, atol=1e-2)
    assert torch.equal(filled[..., width // 2 :], image[..., width // 2 :])
    assert not torch.allclose(filled[..., : width // 2], image[..., : width // 2], atol=1e-2)


@every_system("drawing: in bf16 as in fp32, but for rounding", Painter)
def test_precision(name: str) -> None:
    model, drawing = painter(name), Drawing(seed=3, steps=2, guidance=2.0)
    image = torch.rand(1, 3, model.size[1], model.size[0])
    exact = model.draw(["a"], drawing)
    begun = model.draw(["a"], Drawing(seed=3, steps=2, strength=0.5), image=image)
    cast(model, "bf16")
    # bf16 has 8 bits: two steps of it move a pixel by up to 0.006 here.
    torch.testing.assert_close(model.draw(["a"], drawing), exact, atol=0.02, rtol=0)
    torch.testing.assert_close(
        model.draw(["a"], Drawing(seed=3, steps=2, strength=0.5), image=image), begun, atol=0.02, rtol=0
    )


@every_system("drawing: the autoencoder computes in fp32 whatever the rest does", Painter)
def test_the_autoencoder_is_exact(name: str) -> None:
    model = painter(name)
    latents = torch.randn(1, *model.latents(model.size))
    pixels, noise = torch.rand(1, 3, model.size[1], model.size[0]) * 2 - 1, torch.randn_like(latents)
    exact = model.encode_pixels(pixels, noise), model.decode_latents(latents)
    cast(model, "bf16")
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.encode_pixels(pixels, noise), exact[0])
    assert torch.equal(model.decode_latents(latents), exact[1])


@every_system("drawing: with packed layers, as the command line has it", Painter)
@pytest.mark.skipif(not can_pack(), reason="needs oneDNN")
def test_packed(name: str) -> None:
    model, drawing = painter(name), Drawing(seed=3, steps=2, guidance=2.0)
    exact = model.draw(["a"], drawing)
    pack(model)
    torch.testing.assert_close(model.draw(["a"], drawing), exact, atol=1e-5, rtol=0)


@every_system("training: what is dropped is what the empty text makes", Painter)
def test_dropping(name: str) -> None:
    model = painter(name)
    batch = model.prompt(["a", "bb"])
    dropped = model.drop(batch, torch.tensor([False, True]))
    assert set(dropped) == set(batch)
    empty = model.prompt([""])
    for key, value in dropped.items():
        assert torch.equal(value[0], batch[key][0])
        assert torch.equal(value[1], empty[key][0])
    assert any(not torch.equal(dropped[key], batch[key]) for key in batch)


def test_there_are_painters() -> None:
    painters = {name for name, entry in TABLE.items() if issubclass(entry.resolve(), Painter)}
    assert {"stable_diffusion", "sdxl", "controlnet", "dit", "sd3", "flux"} <= painters <= NANO.keys()
    with pytest.raises(NotImplementedError):
        Painter(None).latents((8, 8))
