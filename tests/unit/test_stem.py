"""Convolutions before a Vision Transformer's blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import polymodal
from polymodal.connectors.mlp import MLP
from polymodal.core.errors import PolymodalError
from polymodal.encoders.fresh import init_tower
from polymodal.encoders.stem import StemConfig
from polymodal.encoders.vit import ViT, ViTConfig
from polymodal.systems.base import System
from polymodal.systems.clip import CLIP
from polymodal.systems.composed import Composed, ComposedConfig
from tests.nano import NANO, TOWER

STEM = StemConfig(channels=(8, 12), depth=1)
CONFIG = ViTConfig(**TOWER, stem=STEM, class_token=False)


def tower() -> ViT:
    torch.manual_seed(0)
    made = ViT(CONFIG)
    init_tower(made)
    return made.eval()


def test_a_patch_becomes_a_token_at_its_place() -> None:
    made, pixels = tower(), torch.randn(1, 3, 24, 16)
    before = made.embed_patches(pixels)
    assert before.shape == (1, CONFIG.count(24, 16), CONFIG.dim) == (1, 24, 32)
    other = pixels.clone()
    other[..., 20:, 12:] += 1.0  # the last patch; its neighbours see its edge
    changed = (made.embed_patches(other) != before).any(-1).view(6, 4)
    assert changed[5, 3]
    assert not changed[:3].any()
    assert not changed[:, 0].any()


def test_a_fresh_stem_keeps_the_size_of_what_it_reads() -> None:
    made = tower().train()
    out = made.stem(torch.randn(8, 3, 32, 32))
    assert 0.2 < float(out.detach().std()) < 5


def test_the_patch_size_is_what_the_stem_makes() -> None:
    with pytest.raises(PolymodalError, match="patches of 8 pixels, not of 4"):
        ViTConfig(**TOWER, stem=StemConfig(channels=(8, 8, 8)))
    with pytest.raises(PolymodalError, match="impossible"):
        StemConfig(channels=())


def test_statistics_of_the_norms_are_saved(tmp_path: Path) -> None:
    base = NANO["composed"]
    assert isinstance(base, ComposedConfig)
    model = Composed.build(ComposedConfig(vision=CONFIG, connector=MLP(), backbone=base.backbone, image_id=39))
    model.vision(torch.randn(4, 3, 16, 16) * 3)  # in training, so it counts
    model.save(tmp_path / "model")
    again = polymodal.load(tmp_path / "model")
    assert isinstance(again, System)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert float(again.state_dict()["vision.stem.down.0.norm.running_mean"].abs().sum()) > 0


def test_a_format_that_has_no_stem_refuses_it(tmp_path: Path) -> None:
    base = NANO["clip"]
    model = CLIP.build(
        type(base)(vision=ViTConfig(**TOWER, stem=STEM, pre_norm=True, patch_bias=False, activation="quick_gelu"),
                   text=base.text, embed_dim=24, eot_id=39)
    )  # fmt: skip
    with pytest.raises(AssertionError, match=r"no rule writes .*stem"):
        model.save(tmp_path / "model")
