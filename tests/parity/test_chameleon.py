"""Chameleon against transformers: scores, loss, gradients, greedy text, files both ways; names at full size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image as PILImage
from torch import Tensor

import polymodal
from polymodal.core.batch import IGNORE, Batch
from polymodal.core.errors import ConfigError, MediaError
from polymodal.modalities.image import ImageProcessor
from polymodal.nn.skeleton import skeleton
from polymodal.samplers.autoregressive import Settings, complete
from polymodal.samplers.modes import Wordless
from polymodal.systems.chameleon import PRESETS, Chameleon, read_hf, write_hf
from polymodal.systems.unified import Z_LOSS
from tests.parity.harness import alone, assert_learns_alike, assert_same_files, cases, save_reference

transformers = pytest.importorskip("transformers")

CODES = [*range(50, 30, -1)]  # the token of each code, in no order of theirs
NAMES = {f"IMGIMG{str(i).translate(str.maketrans('0123456789', 'ABCDEFGHIJ'))}Z": t for i, t in enumerate(CODES)}
VQ: dict[str, Any] = {
    "embed_dim": 6, "num_embeddings": 20, "latent_channels": 8, "resolution": 8, "base_channels": 32,
    "channel_multiplier": [1, 1], "num_res_blocks": 1,
}  # fmt: skip
FIELDS: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "vq_config": VQ, "vocabulary_map": NAMES | {"<image>": 51, "<racm3:break>": 52, "<eoss>": 53, "a word": 5},
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {"small": {}, "norms behind": {"swin_norm": True, "model_parallel_size": 4}}
PICTURE = [52, *[51] * 16, 53]


def unmasked(reference: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Its scores before it hides those of pictures."""
    return reference.lm_head(reference.model(**inputs).last_hidden_state)


def example() -> Batch:
    """Two pictures in one row, one in another, none in the last; what is asked is not learned, pictures are."""
    rows = [[1, 7, *PICTURE, 9, 8, *PICTURE, 4], [1, 3, 20, *PICTURE, 11, 12, 13], [1, 5, 6, 7, 22, 23]]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    valid = torch.tensor([[i < len(row) for i in range(longest)] for row in rows])
    labels = ids.masked_fill(~valid, IGNORE)
    labels[1, :10] = IGNORE
    pixels = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    return Batch(ids=ids, valid=valid, labels=labels, pixels=pixels, pixels_row=torch.tensor([0, 0, 1]))


def theirs(batch: Batch) -> dict[str, Tensor]:
    inputs = {"input_ids": batch["ids"], "attention_mask": batch["valid"].long()}
    return inputs | ({"pixel_values": batch["pixels"]} if "pixels" in batch else {})


@pytest.fixture(params=cases(dict.fromkeys(CASES, "chameleon")))
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Chameleon, Any, Path]:
    torch.manual_seed(0)
    config = transformers.ChameleonConfig(**FIELDS, **CASES[request.param])
    config._attn_implementation = "eager"
    reference = save_reference(transformers.ChameleonForConditionalGeneration(config), tmp_path, scale=0.2)
    system = polymodal.load(tmp_path)
    assert isinstance(system, Chameleon)
    return system.eval(), reference, tmp_path


def test_scores_loss_gradients(pair: tuple[Chameleon, Any, Path]) -> None:
    """Its own loss hides pictures; with their scores live, it is ours."""
    system, reference, folder = pair
    batch = example()
    logits = unmasked(reference, theirs(batch))
    tokens = system.picture_tokens(batch["pixels"])
    assert torch.equal(tokens, reference.get_image_tokens(batch["pixels"]).long())
    assert len(tokens.unique()) > 3
    ids = batch["ids"].masked_scatter(batch["ids"] == 51, tokens.flatten())
    labels = torch.where(batch["labels"] == 51, ids, batch["labels"])
    assert torch.equal(system.spelled(batch)["labels"], labels)
    loss = reference.loss_function(logits=logits, labels=labels, vocab_size=60)
    known = labels[:, 1:] != IGNORE
    loss = loss + Z_LOSS * logits[:, :-1][known].logsumexp(-1).square().mean()
    assert_learns_alike(system, batch, reference, logits, loss, folder)


def test_its_own_loss_of_text(pair: tuple[Chameleon, Any, Path]) -> None:
    system, reference, _ = pair
    batch = example()
    batch["labels"] = batch["labels"].masked_fill(batch["labels"] == 51, IGNORE)
    expected = reference(**theirs(batch), labels=batch["labels"])
    scores = system(batch)
    scores[..., CODES] = torch.finfo(scores.dtype).min
    loss = F.cross_entropy(scores[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORE)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-5)


class NoCodes:
    """What transformers leaves to be written."""

    ended = False

    def start(self) -> NoCodes:
        return self

    copy = start

    def allowed(self) -> Tensor:
        return ~torch.isin(torch.arange(60), torch.tensor(CODES))

    def take(self, token: int) -> None: ...


def test_greedy_text(pair: tuple[Chameleon, Any, Path]) -> None:
    system, reference, _ = pair
    system.stop_ids = ()
    batch = Batch({name: tensor for name, tensor in example().items() if name != "labels"})
    answers = complete(system, batch, Settings(max_new_tokens=8, constraint=NoCodes()), Wordless())
    for row, answer in enumerate(answers):
        made = reference.generate(
            **theirs(alone(batch, row)), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert answer.ids == made[0, -8:].tolist()


def test_files_both_ways(pair: tuple[Chameleon, Any, Path]) -> None:
    system, reference, folder = pair
    again = assert_same_files(system, reference, folder, folder / "again")
    batch = example()
    torch.testing.assert_close(unmasked(again, theirs(batch)), unmasked(reference, theirs(batch)), rtol=0, atol=0)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.proves("chameleon", "weights: total on names and shapes of full-size checkpoints")
def test_full_size(name: str) -> None:
    config = PRESETS[name]()
    raw = write_hf(config)
    assert read_hf(raw)[0] == config
    with torch.device("meta"):
        reference = transformers.ChameleonForConditionalGeneration(transformers.ChameleonConfig(**raw))
    with skeleton():
        ours = Chameleon(config)
    theirs = dict(reference.state_dict())
    assert not config.vision.paints
    todo = ours.plan(ours.formats["hf"], theirs)
    assert todo.problems == []
    shapes = {name: tuple(t.shape) for name, t in theirs.items()}
    assert {name: tuple(t.shape) for name, t in ours.to_hub(ours.state_dict()).items()} == shapes
    assert ours.modes[0].rounds == 1024
    assert len(config.code_ids) == 8192
    assert config.backbone.vocab_size == 65536


@pytest.mark.proves("chameleon", "images: resized, cut and scaled as transformers' processor does")
def test_pixels(tmp_path: Path) -> None:
    from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil

    processor = ChameleonImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor.save_pretrained(tmp_path)
    ours = ImageProcessor.from_hf(processor.to_dict())
    noise = np.random.default_rng(0).integers(0, 256, (40, 23, 3), dtype=np.uint8)
    expected = processor(PILImage.fromarray(noise), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours.from_pil([PILImage.fromarray(noise)]), expected, rtol=0, atol=1e-5)
    assert ImageProcessor.from_hf(ours.to_hf()) == ours


@pytest.mark.parametrize(
    "names",
    [
        {}, NAMES, NAMES | {"<image>": 51, "<racm3:break>": 52},
        NAMES | {"<image>": "51", "<racm3:break>": 52, "<eoss>": 3},
        {**NAMES, "IMGIMGCAZ": 3, "<image>": 51, "<racm3:break>": 52, "<eoss>": 53},
        {**NAMES, "IMGIMGAZ": 49, "<image>": 51, "<racm3:break>": 52, "<eoss>": 53},
        {**NAMES, "IMGIMGAZ": 60, "<image>": 51, "<racm3:break>": 52, "<eoss>": 53},
        {**NAMES, "<image>": 50, "<racm3:break>": 52, "<eoss>": 53},
        *({**FIELDS["vocabulary_map"], "<reserved08706>": wrong} for wrong in (["x"], "54", -1, 60, True, 50)),
    ],
)  # fmt: skip
def test_an_impossible_vocabulary_is_refused(names: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"vocabulary_map|token"):
        read_hf({"model_type": "chameleon", **FIELDS, "vocabulary_map": names})


def test_pictures_and_places_that_differ_are_refused(pair: tuple[Chameleon, Any, Path]) -> None:
    batch = example()
    batch["ids"][0, 3] = 7
    with pytest.raises(MediaError, match="47 places in the text for 48 codes"):
        pair[0].loss(batch)
