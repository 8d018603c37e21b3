"""CLIP, SigLIP and SigLIP 2 against their public implementations: outputs, loss, first gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import polymodal
from polymodal.core.batch import Batch
from polymodal.systems.base import System
from tests.parity.harness import assert_parity, random_batch, save_reference

transformers = pytest.importorskip("transformers")

TOWER = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 56}


def clip_pair(folder: Path, activation: str = "quick_gelu", eos: int = 49) -> tuple[System, object]:
    text = TOWER | {
        "vocab_size": 50,
        "max_position_embeddings": 12,
        "eos_token_id": eos,
        "bos_token_id": 48,
        "pad_token_id": 1,
    }
    config = transformers.CLIPConfig(
        text_config=text | {"hidden_act": activation, "hidden_size": 24},
        vision_config=TOWER | {"image_size": 20, "patch_size": 4, "hidden_act": activation},
        projection_dim=16,
    )
    reference = save_reference(transformers.CLIPModel(config), folder)
    return polymodal.load(folder), reference


def with_eot(batch: Batch, eot: int) -> Batch:
    """Texts of different lengths: a start, words, one end token, then padding."""
    ids = batch["ids"].clamp(2, eot - 2)
    for row, end in zip(ids, (3, 11, 6, 8, 5), strict=False):
        row[end] = eot
        row[end + 1 :] = 1
    return Batch(batch | {"ids": ids})


@pytest.mark.proves("clip", "parity: outputs, loss, first gradients (transformers)")
@pytest.mark.parametrize(("activation", "eos"), [("quick_gelu", 49), ("gelu", 49), ("quick_gelu", 2)])
def test_clip_matches_transformers(tmp_path: Path, activation: str, eos: int) -> None:
    system, reference = clip_pair(tmp_path, activation, eos)
    batch = with_eot(random_batch(system, 5), 49)
    assert_parity(system, reference, batch, tmp_path / "grad")


@pytest.mark.proves("siglip", "parity: outputs, loss, first gradients (transformers)")
def test_siglip_matches_transformers(tmp_path: Path) -> None:
    config = transformers.SiglipConfig(
        text_config=TOWER | {"vocab_size": 50, "max_position_embeddings": 12, "projection_size": 32},
        vision_config=TOWER | {"image_size": 20, "patch_size": 4},
    )
    reference = save_reference(transformers.SiglipModel(config), tmp_path)
    system = polymodal.load(tmp_path)
    assert_parity(system, reference, random_batch(system, 5), tmp_path / "grad")


@pytest.mark.proves("siglip", "parity at a size that is no multiple of the patch")
def test_siglip_drops_the_border_as_its_convolution_does(tmp_path: Path) -> None:
    config = transformers.SiglipConfig(
        text_config=TOWER | {"vocab_size": 50, "max_position_embeddings": 12, "projection_size": 32},
        vision_config=TOWER | {"image_size": 23, "patch_size": 4},
    )
    reference = save_reference(transformers.SiglipModel(config), tmp_path)
    system = polymodal.load(tmp_path)
    assert_parity(system, reference, random_batch(system, 3), tmp_path / "grad")


@pytest.mark.proves("siglip2", "parity: outputs, loss, first gradients (transformers), mixed aspects")
@pytest.mark.parametrize("shapes", [[(4, 4)] * 4, [(2, 8), (4, 4), (5, 3), (1, 16)]])
def test_siglip2_matches_transformers(tmp_path: Path, shapes: list[tuple[int, int]]) -> None:
    config = transformers.Siglip2Config(
        text_config=TOWER | {"vocab_size": 50, "max_position_embeddings": 12, "projection_size": 32},
        vision_config=TOWER | {"num_patches": 16, "patch_size": 4},
    )
    reference = save_reference(transformers.Siglip2Model(config), tmp_path)
    system = polymodal.load(tmp_path)
    batch = random_batch(system, len(shapes))
    batch["shapes"] = torch.tensor(shapes)
    batch["mask"] = torch.arange(16) < batch["shapes"].prod(1, keepdim=True)
    assert_parity(system, reference, batch, tmp_path / "grad")
