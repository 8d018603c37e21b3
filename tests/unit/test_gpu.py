"""What only a GPU can show."""

from __future__ import annotations

import pytest
import torch
from PIL import Image as PILImage

from polymodal.core.batch import Batch
from tests.nano import nano, nano_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("name", ["vit", "mae", "dinov2", "clip", "siglip", "siglip2"])
def test_a_gpu_gives_the_vectors_and_losses_of_the_cpu(name: str) -> None:
    model, picture = nano(name).eval(), PILImage.radial_gradient("L")
    torch.manual_seed(0)
    batch = nano_batch(model)
    vector, loss = model.embed(picture), model.loss(batch)
    model.cuda()
    torch.testing.assert_close(model.embed(picture), vector, atol=1e-3, rtol=0)  # TF32 and another kernel
    assert model.embed(picture).device.type == "cpu"
    if name in ("vit", "clip", "siglip", "siglip2"):  # the others draw masks from the device's own generator
        torch.testing.assert_close(model.loss(batch.to("cuda")).mean.cpu(), loss.mean, atol=1e-3, rtol=1e-3)


def test_a_batch_that_comes_back_is_whole() -> None:
    x = torch.randn(4096, 4096, device="cuda")
    for _ in range(8):
        x = (x @ x).tanh()  # still running when it is asked for
    assert torch.equal(Batch(x=x).to("cpu")["x"], x.cpu())
