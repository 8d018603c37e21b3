"""FID, KID, CLIP score, PSNR and SSIM against closed forms and scikit-image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from polymodal.core.errors import DataError
from polymodal.evaluate.pictures import (
    Distance,
    Features,
    clip_score,
    features,
    frechet_distance,
    kernel_distance,
    psnr,
    ssim,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(count: int, dim: int = 6, seed: int = 0) -> Tensor:
    mix = torch.randn(dim, dim, generator=seeded(99))
    return torch.randn(count, dim, generator=seeded(seed)) @ mix


def test_frechet_distance_is_that_of_the_formula() -> None:
    """||m - n||^2 + tr(A + B - 2 (A B)^(1/2)), with a root by scipy."""
    from scipy.linalg import sqrtm

    for count in (4, 50):  # fewer pictures than dimensions, and more
        x, y = drawn(count, seed=1), drawn(60, seed=2) * 1.3 + 0.5
        a, b = (np.cov(v.double().numpy().T) for v in (x, y))
        root = sqrtm(a @ b + 1e-12 * np.eye(6)).real
        expected = float(((x.double().mean(0) - y.double().mean(0)) ** 2).sum()) + np.trace(a + b - 2 * root)
        found = frechet_distance(Features("f", x), Features("f", y))
        assert found.value == pytest.approx(expected, rel=1e-4)
        assert found.pictures == (count, 60)
    same = Features("f", x)
    assert frechet_distance(same, same).value == pytest.approx(0, abs=1e-9)
    moved = Features("f", x + 2.0)
    assert frechet_distance(same, moved).value == pytest.approx(6 * 4)


def test_kernel_distance_is_unbiased_and_that_of_the_formula() -> None:
    x, y = drawn(5, seed=1).double(), drawn(5, seed=2).double() + 1

    def kernel(a: Tensor, b: Tensor) -> float:
        return float((a @ b / 6 + 1) ** 3)

    pairs = [(i, j) for i in range(5) for j in range(5)]
    expected = sum(
        (kernel(x[i], x[j]) + kernel(y[i], y[j])) / 20 * (i != j) - 2 * kernel(x[i], y[j]) / 25 for i, j in pairs
    )
    found = kernel_distance(Features("f", x), Features("f", y))
    assert found.value == pytest.approx(expected)
    assert found.spread is None
    many = [Features("f", drawn(200, seed=s)) for s in (1, 2)]
    same = kernel_distance(*many, subsets=50, size=50)
    assert same.spread is not None
    assert abs(same.value) < same.spread
    far = kernel_distance(many[0], Features("f", many[1].values + 9), subsets=50, size=50)
    assert far.spread is not None
    assert far.value > 5 * far.spread
    assert kernel_distance(*many, subsets=5, size=50) == kernel_distance(*many, subsets=5, size=50)


def test_a_distance_says_by_what_it_is() -> None:
    x = Features("nano-clip 12ab", drawn(9))
    text = str(frechet_distance(x, x))
    assert "nano-clip 12ab" in text
    assert "9 against 9" in text
    assert "+-" in str(Distance(value=1.0, extractor="f", pictures=(2, 2), spread=0.1))
    for score in (frechet_distance, kernel_distance):
        with pytest.raises(DataError, match="cannot be compared"):
            score(x, Features("Inception-v3", x.values))
        with pytest.raises(DataError, match="two are the least"):
            score(x, Features("nano-clip 12ab", x.values[:1]))
    with pytest.raises(DataError, match="no numbers"):
        Features("f", torch.full((2, 2), float("nan")))


def test_features_of_our_models_are_named() -> None:
    from PIL import Image as PILImage

    from tests.nano import nano

    model = nano("clip").eval()
    found = features(model, [PILImage.new("RGB", (20, 20), colour) for colour in ("red", "blue")], name="nano")  # type: ignore[arg-type]
    assert found.extractor == f"nano {model.fingerprint}"
    assert found.values.shape == (2, model.embedding_dim)


def test_clip_score() -> None:
    pictures = torch.tensor([[1.0, 0], [1, 0], [2, 2]])
    texts = torch.tensor([[3.0, 0], [-1, 0], [1, 0]])
    found = clip_score(pictures, texts)
    assert found.value == pytest.approx((100 + 0 + 100 / 2**0.5) / 3)
    assert found.low <= found.value <= found.high


@pytest.mark.parametrize("shape", [(2, 3, 24, 17), (1, 1, 11, 11)])
def test_psnr_and_ssim_are_those_of_scikit_image(shape: tuple[int, ...]) -> None:
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    real = torch.rand(shape, generator=seeded())
    made = (real + 0.1 * torch.randn(shape, generator=seeded(1))).clamp(0, 1)
    for row, (x, y) in enumerate(zip(made.numpy(), real.numpy(), strict=True)):
        assert float(psnr(made, real)[row]) == pytest.approx(peak_signal_noise_ratio(y, x, data_range=1.0), abs=1e-4)
        expected = structural_similarity(
            y, x, data_range=1.0, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert float(ssim(made, real)[row]) == pytest.approx(expected, abs=1e-5)
    assert torch.equal(ssim(real, real), torch.ones(shape[0]))
    assert bool(psnr(real, real).isinf().all())


def test_tiny_pictures_have_no_structure() -> None:
    with pytest.raises(DataError, match="11 x 11"):
        ssim(torch.rand(1, 3, 10, 20), torch.rand(1, 3, 10, 20))
