"""LoRA adapters of transformers' models, made by PEFT, on ours, and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import polymodal
from polymodal.train import add_lora, load_peft, merge_lora, save_peft
from tests.parity.harness import random_batch, randomise, reference_call
from tests.parity.test_dual_encoders import clip_pair, with_eot

peft = pytest.importorskip("peft")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers of itself, through peft
@pytest.mark.proves("clip", "LoRA: adapters of PEFT load, merge and go back (transformers)")
def test_an_adapter_for_transformers_clip_fits_ours_and_goes_back(tmp_path: Path) -> None:
    system, reference = clip_pair(tmp_path / "base")
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "out_proj", "fc1"])
    theirs = peft.get_peft_model(reference, config).eval()
    randomise(theirs, 0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    batch = with_eot(random_batch(system, 4), 49)
    with torch.no_grad():
        expected = reference_call(system, theirs, batch).logits_per_image
        plain = system(batch)
        load_peft(system, tmp_path / "theirs", names=polymodal.load(tmp_path / "base").hub_layers())
        torch.testing.assert_close(system(batch), expected, atol=1e-4, rtol=1e-5)  # logits of a few tens
        assert not torch.allclose(plain, expected, atol=1e-2)
        torch.testing.assert_close(merge_lora(system)(batch), expected, atol=1e-4, rtol=1e-5)

    ours = add_lora(polymodal.load(tmp_path / "base"), ["q_proj", "up_proj"], rank=2)
    names = polymodal.load(tmp_path / "base").hub_layers()
    randomise(ours, 0.2)
    save_peft(ours, tmp_path / "ours", names=names)
    base = type(reference).from_pretrained(tmp_path / "base")
    back = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(
            reference_call(system, back, batch).logits_per_image, ours(batch), atol=1e-4, rtol=1e-5
        )
