"""Tokenizers of pictures as systems: the verbs, counts, bad sizes, training beside a discriminator."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image as PILImage

import polymodal
from polymodal.core.batch import Batch
from polymodal.core.errors import MediaError, UnsupportedError
from polymodal.core.sample import Sample
from polymodal.core.verbs import Counts, PictureCodes
from polymodal.modalities.image import ImageProcessor
from polymodal.systems.picture_codec import AdversarialPictures
from polymodal.systems.vqgan import VQGAN
from polymodal.tokenizers.vq import PatchDiscriminator
from polymodal.train import Constant, Run, Stage, fit
from tests.nano import nano
from tests.unit.toy_run import HEADER


def vqgan() -> VQGAN:
    model = nano("vqgan")
    assert isinstance(model, VQGAN)
    return model


@pytest.mark.proves("vqgan", "token accounting: count is what the codes number; sizes that do not fit are refused")
def test_the_count_is_what_comes_out() -> None:
    model = vqgan().eval()
    assert all(isinstance(model, verb) for verb in (PictureCodes, Counts))
    assert isinstance(model.images, ImageProcessor)
    picture = PILImage.new("RGB", (31, 20), (200, 30, 90))
    codes = model.quantize(model.images.from_pil([picture, picture.resize((5, 5))]))
    assert codes.numel() == model.count(Sample.of([picture, picture])) == 2 * 8 * 8
    assert model.reconstruct(codes).shape == (2, 3, 16, 16)
    with pytest.raises(MediaError, match="multiples of 2 pixels, not 17 x 16"):
        model.quantize(torch.zeros(1, 3, 16, 17))
    with pytest.raises(MediaError, match="something else"):
        model.count(Sample.of([picture, "a word"]))


def test_a_codec_of_pictures_stays_in_fp32(tmp_path: Path) -> None:
    vqgan().save(tmp_path)
    assert {t.dtype for t in polymodal.load(tmp_path, precision="auto").state_dict().values()} == {torch.float32}
    with pytest.raises(UnsupportedError, match="fp32 only"):
        polymodal.load(tmp_path, precision="bf16")


class Squares:
    """Eight pictures of one square each."""

    def __init__(self) -> None:
        self.pixels = -torch.ones(8, 3, 16, 16)
        for i in range(8):
            self.pixels[i, i % 3, i : i + 6, 2 : 4 + i] = 1

    def __len__(self) -> int:
        return 8

    def batch(self, indices: Sequence[int], rng: np.random.Generator) -> Batch:
        return Batch(pixels=self.pixels[list(indices)])


def adversarial() -> AdversarialPictures:
    return AdversarialPictures(vqgan(), PatchDiscriminator(filters=4, num_layers=1))


@pytest.mark.proves("vqgan", "training: generator and discriminator get the gradients of the paper's two losses")
def test_gradients_are_those_of_two_losses() -> None:
    """By the plain way: the weighted sum for the codec with a frozen judge, the hinge loss for the judge alone."""
    torch.manual_seed(0)
    model, batch = adversarial().train(), Batch(pixels=Squares().pixels)
    real = batch["pixels"]
    for module in model.judge.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.0  # its statistics are not looked at while training
    loss = model.loss(batch)
    (loss.total / loss.weight).backward()
    mine = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    made, penalty = model.codec.autoencode(real)
    error, deceit = F.l1_loss(made, real), -model.judge(made).mean()
    last = model.codec.last_layer
    norms = [torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (error, deceit)]
    weight = 0.8 * norms[0] / (norms[1] + 1e-4)
    torch.testing.assert_close(loss.metrics["weight"], weight, rtol=1e-5, atol=0)
    (error + weight * deceit + penalty).backward()
    for name, parameter in model.codec.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(mine[f"codec.{name}"], parameter.grad, rtol=1e-5, atol=1e-6, msg=name)
    model.zero_grad()
    scores = model.judge(real), model.judge(made.detach())
    (0.5 * (F.relu(1 - scores[0]).mean() + F.relu(1 + scores[1]).mean())).backward()
    for name, parameter in model.judge.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(mine[f"judge.{name}"], parameter.grad, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.proves("vqgan", "training: alone, then beside the discriminator, in the one loop; the error falls")
def test_training_in_the_one_loop(tmp_path: Path) -> None:
    stages = [
        Stage(
            name=name, steps=steps, batch_size=8, source=Squares, lr=3e-3, schedule=Constant(), clip=None,
            trainable=trainable,
        )
        for name, steps, trainable in (("alone", 25, {"codec": 1.0}), ("joined", 5, {"*": 1.0}))
    ]  # fmt: skip
    result = fit(Run(name="vqgan", header=HEADER, model=adversarial, stages=stages), tmp_path, device="cpu")
    trained, pixels = result.model.codec, Squares().pixels  # type: ignore[union-attr]
    assert isinstance(trained, VQGAN)
    with torch.no_grad():
        errors = [float(F.l1_loss(model.eval().through(pixels)[0], pixels)) for model in (vqgan(), trained)]
    assert errors[1] < 0.5 * errors[0]
