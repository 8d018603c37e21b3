"""Convolutions over films that never look ahead, and wavelets."""

from __future__ import annotations

import pytest
import torch

from polymodal.nn.conv3d import CausalConv3d, FactorisedConv3d, haar, patches, unhaar, unpatches


@pytest.mark.parametrize(
    ("kernel", "stride", "pad"), [((3, 3, 3), (1, 1, 1), 1), ((3, 1, 1), (2, 1, 1), 0), ((1, 3, 3), (1, 2, 2), 0)]
)
def test_no_frame_sees_a_later_one(kernel: tuple[int, ...], stride: tuple[int, ...], pad: int) -> None:
    torch.manual_seed(0)
    conv = CausalConv3d(2, 3, kernel, stride=stride, pad=pad)  # type: ignore[arg-type]
    film = torch.randn(1, 2, 10, 6, 6)
    whole = conv(film)
    assert whole.shape[2] == 10 // stride[0]
    for frame in range(10):
        changed = film.clone()
        changed[:, :, frame + 1 :] += 1
        upto = (frame + 1) // stride[0]
        assert torch.equal(conv(changed)[:, :, :upto], whole[:, :, :upto])
        if frame < 9:
            assert (conv(changed) != whole).any()


def test_before_the_first_frame_stands_the_first_frame() -> None:
    conv = CausalConv3d(1, 1, (3, 1, 1))
    film = torch.randn(1, 1, 4, 2, 2)
    assert conv.bias is not None
    expected = conv.bias + conv.weight.sum() * film[:, :, :1]
    torch.testing.assert_close(conv(film)[:, :, :1], expected)
    still = film[:, :, :1].expand(-1, -1, 4, -1, -1)
    torch.testing.assert_close(conv(still), expected.expand_as(still))
    assert FactorisedConv3d(1, 5)(film).shape == (1, 5, 4, 2, 2)


def test_wavelets_by_hand() -> None:
    film = torch.randn(2, 3, 4, 6, 8)
    out = haar(film)
    assert out.shape == (2, 24, 2, 3, 4)
    block = film.unfold(2, 2, 2).unfold(3, 2, 2).unfold(4, 2, 2)  # ... t h w
    torch.testing.assert_close(out[:, :3], block.mean((5, 6, 7)))
    signs = torch.tensor([1.0, -1.0])
    for number in range(8):
        t, h, w = (signs if number >> shift & 1 else torch.ones(2) for shift in (2, 1, 0))
        expected = torch.einsum("bcijkthw,t,h,w->bcijk", block, t, h, w) / 8
        torch.testing.assert_close(out[:, 3 * number : 3 * number + 3], expected)
    torch.testing.assert_close(unhaar(out), film, rtol=0, atol=1e-5)


@pytest.mark.proves("cosmos_tokenizer", "wavelet patches: undone exactly, the first frame alone in its patch")
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("groups", [0, 1, 3])
def test_patches_are_undone(size: int, groups: int) -> None:
    film = torch.randn(1, 3, 1 + groups * size, 8, 12)
    cut = patches(film, size)
    assert cut.shape == (1, 3 * size**3, 1 + groups, 8 // size, 12 // size)
    torch.testing.assert_close(unpatches(cut, size), film, rtol=0, atol=1e-5)
    torch.testing.assert_close(cut[:, :, :1], patches(film[:, :, :1], size))
