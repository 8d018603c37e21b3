"""Pictures and texts become the same numbers as in transformers, on the inputs that processors get wrong.

The reference for pictures are the Pillow-backed classes: the default ones need torchvision.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from PIL import ImageOps

pytest.importorskip("transformers")

from tokenizers import Tokenizer, models, normalizers, trainers
from transformers import CLIPTokenizer, Siglip2Tokenizer
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import (
    Siglip2ImageProcessorPil,
    get_image_size_for_max_num_patches,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from polymodal.core.sample import Image
from polymodal.modalities.image import ImageProcessor, PatchBudget, PatchProcessor, decode
from polymodal.tokenizers.text import Lowercase, TextTokenizer

# ---- pictures ----

REFERENCES: dict[str, Any] = {
    "clip": CLIPImageProcessorPil(),
    "clip, odd sides": CLIPImageProcessorPil(size={"shortest_edge": 57}, crop_size={"height": 51, "width": 64}),
    "clip, crop larger": CLIPImageProcessorPil(size={"shortest_edge": 31}, crop_size={"height": 40, "width": 75}),
    "clip, no resize": CLIPImageProcessorPil(do_resize=False, crop_size={"height": 33, "width": 32}),
    "siglip": SiglipImageProcessorPil(size={"height": 96, "width": 96}),
    "vit": ViTImageProcessorPil(do_convert_rgb=True),
    "vit, nothing": ViTImageProcessorPil(do_convert_rgb=True, do_rescale=False, do_normalize=False, resample=0),
    "dinov2": BitImageProcessorPil(size={"shortest_edge": 256}),
}


def noise(width: int, height: int, *channels: int) -> np.ndarray:
    return np.random.default_rng([width, height]).integers(0, 256, (height, width, *channels), dtype=np.uint8)


def reopened(picture: PILImage.Image, kind: str, **options: Any) -> PILImage.Image:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return PILImage.open(io.BytesIO(file.getvalue()))


def rotated() -> PILImage.Image:
    exif = PILImage.Exif()
    exif[0x0112] = 6
    return reopened(PILImage.fromarray(noise(70, 40, 3)), "JPEG", exif=exif)


def palette(transparency: int | bytes) -> PILImage.Image:
    picture = PILImage.fromarray(noise(50, 60, 3)).quantize(16)
    return reopened(picture, "PNG", transparency=transparency)


AWKWARD: dict[str, PILImage.Image] = {
    "rgb": PILImage.fromarray(noise(300, 200, 3)),
    "rgba": PILImage.fromarray(noise(90, 80, 4)),
    "grey with alpha": PILImage.fromarray(noise(80, 90, 2)),
    "palette": PILImage.fromarray(noise(50, 60, 3)).quantize(16),
    "palette, one colour transparent": palette(3),
    "palette, alpha a colour": palette(bytes(range(0, 256, 16))),
    "colour key": reopened(PILImage.new("RGB", (30, 40), (1, 2, 3)), "PNG", transparency=(1, 2, 3)),
    "cmyk": reopened(PILImage.fromarray(noise(80, 100, 3)).convert("CMYK"), "JPEG"),
    "grey": PILImage.fromarray(noise(231, 230)),
    "bilevel": PILImage.fromarray(noise(64, 61)).convert("1"),
    "1 x 1": PILImage.fromarray(noise(1, 1, 3)),
    "1 x 500": PILImage.fromarray(noise(1, 500, 3)),
    "500 x 1": PILImage.fromarray(noise(500, 1, 3)),
    "one over": PILImage.fromarray(noise(225, 224, 3)),
    "one under": PILImage.fromarray(noise(223, 224, 3)),
    "exact": PILImage.fromarray(noise(224, 224, 3)),
    "tall": PILImage.fromarray(noise(33, 400, 3)),
    "animated": reopened(
        PILImage.new("RGB", (40, 30), "red"),
        "GIF",
        save_all=True,
        append_images=[PILImage.new("RGB", (40, 30), "blue")],
    ),
}


@pytest.mark.proves("clip", "parity: pictures (transformers)")
@pytest.mark.proves("siglip", "parity: pictures (transformers)")
@pytest.mark.proves("vit", "parity: pictures (transformers)")
@pytest.mark.proves("mae", "parity: pictures (transformers)")
@pytest.mark.proves("dinov2", "parity: pictures (transformers)")
@pytest.mark.parametrize("picture", AWKWARD.values(), ids=AWKWARD.keys())
@pytest.mark.parametrize("reference", REFERENCES.values(), ids=REFERENCES.keys())
def test_pictures_become_the_same_pixels(reference: Any, picture: PILImage.Image) -> None:
    expected = reference(picture.copy(), return_tensors="pt")["pixel_values"]
    ours = ImageProcessor.from_hf(reference.to_dict())([Image(picture)])
    # "vit, nothing" leaves 0..255, all others about -2..2.7; no pixel may be a grey level (0.004 or more) off.
    torch.testing.assert_close(ours, expected.float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", REFERENCES)
def test_our_configs_mean_the_same_there(name: str) -> None:
    reference = REFERENCES[name]
    ours = ImageProcessor.from_hf(reference.to_dict())
    again = CLIPImageProcessorPil(**ours.to_hf())
    picture = AWKWARD["rgb"]
    torch.testing.assert_close(
        again(picture, return_tensors="pt")["pixel_values"].float(),
        reference(picture, return_tensors="pt")["pixel_values"].float(),
        atol=1e-6,
        rtol=0,
    )


def test_where_the_reference_differs_and_why() -> None:
    """The three cases in which equal pixels would be wrong ones."""
    reference = CLIPImageProcessorPil()
    ours = ImageProcessor.from_hf(reference.to_dict())
    # EXIF: the processor shows the model a picture lying on its side; transformers' own load_image turns it first.
    upright = ImageOps.exif_transpose(rotated())
    theirs = reference(upright, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours([Image(rotated())]), theirs, atol=1e-6, rtol=0)
    assert not torch.allclose(reference(rotated(), return_tensors="pt")["pixel_values"], theirs, atol=0.1)
    # 16 bits: Pillow's conversion clips at 255, so that all but the darkest pixels come out white.
    deep = PILImage.fromarray(np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16))
    clipped = np.asarray(deep.convert("RGB"))
    assert (clipped == 255).mean() > 0.99
    assert 120 < np.asarray(decode(Image(deep))).mean() < 135
    # Without do_convert_rgb, ViT's processor fails on all that is not RGB: ours always converts.
    with pytest.raises(ValueError, match="mean must have"):
        ViTImageProcessorPil()(AWKWARD["rgba"])
    assert ImageProcessor.from_hf(ViTImageProcessorPil().to_dict())([Image(AWKWARD["rgba"])]).shape == (1, 3, 224, 224)


@pytest.mark.proves("siglip2", "parity: pictures (transformers)")
@pytest.mark.parametrize("name", ["rgb", "1 x 1", "1 x 500", "500 x 1", "one over", "tall", "exact"])
@pytest.mark.parametrize("budget", [PatchBudget(), PatchBudget(patch_size=14, max_patches=50)], ids=["16", "14"])
def test_naflex_patches_are_the_same(name: str, budget: PatchBudget) -> None:
    reference = Siglip2ImageProcessorPil(patch_size=budget.patch_size, max_num_patches=budget.max_patches)
    ours = PatchProcessor.from_hf(reference.to_dict())
    assert ours.budget == budget
    pictures = [AWKWARD[name], AWKWARD["rgb"]]
    expected = reference(pictures, return_tensors="pt")
    patches, mask, shapes = ours([Image(picture) for picture in pictures])
    assert torch.equal(shapes, expected["spatial_shapes"])
    assert torch.equal(mask, expected["pixel_attention_mask"].bool())
    torch.testing.assert_close(patches, expected["pixel_values"], atol=1e-6, rtol=0)
    again = Siglip2ImageProcessorPil(**ours.to_hf())
    assert torch.equal(again(pictures, return_tensors="pt")["pixel_values"], expected["pixel_values"])


def test_naflex_grids_are_the_same_at_all_sizes() -> None:
    sizes = np.random.default_rng(0).integers(1, 3000, (300, 2)).tolist()
    sizes += [(1, 1), (1, 60_000), (60_000, 1), (256, 256), (257, 256), (255, 257), (16, 4096), (4097, 16)]
    for patch, most in ((16, 256), (14, 729), (16, 1), (32, 7)):
        budget = PatchBudget(patch_size=patch, max_patches=most)
        for width, height in sizes:
            rows, columns = budget.grid(width, height)
            assert (rows * patch, columns * patch) == get_image_size_for_max_num_patches(height, width, patch, most)


# ---- texts ----

TEXTS = [
    "a red cup on a blue table",
    "",
    " \t\n ",
    "It's the DOG's, we've said; they'll 'go'!!'s",
    "naïve façade, Straße, ẞ, İstanbul, ΣΊΣΥΦΟΣ",
    "e\u0301 vs é, ﬁ, Ⅷ, ½, \uff11\uff12\uff13, 42nd",
    "漢字とカナ 한국어 ไทย العربية",
    "😀👩\u200d👩\u200d👧🏽 🇩🇪",
    "zero\u200bwidth \u00a0blank \u3000wide \u2028line",
    "control \x00\x07\x1b characters",
    "_under_score_ a--b... #tag @user https://example.org/?q=1&r=2",
    "cup " * 2500,
    "x" * 10_000,
]
TYPED = ["<|endoftext|> more", "a<|startoftext|>b", "cup <|endoftext|>"]
CORPUS = [text[:200] for text in TEXTS[3:11]] + [
    "the quick brown fox jumps over the lazy dog",
    "a picture of a red car and a green tree",
]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[TextTokenizer, Path]:
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = TextTokenizer.train_bpe(CORPUS, 700, length=24, pad="max")
    tokenizer.save(folder)
    return tokenizer, folder


@pytest.mark.proves("clip", "parity: texts (transformers)")
@pytest.mark.filterwarnings("ignore::polymodal.tokenizers.text.TruncationWarning")
def test_clip_reads_our_files_to_the_same_ids(clip: tuple[TextTokenizer, Path]) -> None:
    ours, folder = clip
    theirs = CLIPTokenizer.from_pretrained(folder)
    assert theirs.model_max_length == 24
    expected = theirs(TEXTS, padding="max_length", truncation=True, return_tensors="pt")
    ids, valid = ours(TEXTS)
    assert torch.equal(ids, expected["input_ids"])
    assert torch.equal(valid, expected["attention_mask"].bool())


def test_clip_is_read_as_transformers_saves_it(clip: tuple[TextTokenizer, Path], tmp_path: Path) -> None:
    ours, folder = clip
    CLIPTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    again = TextTokenizer.from_folder(tmp_path, pad="max")
    texts = TEXTS[:3]
    assert torch.equal(again(texts)[0], ours(texts)[0])
    assert (again.prefix, again.suffix, again.pad_id, again.length) == (ours.prefix, ours.suffix, ours.pad_id, 24)


def test_typed_control_tokens_are_text_where_transformers_takes_them_for_control(
    clip: tuple[TextTokenizer, Path],
) -> None:
    ours, folder = clip
    theirs = CLIPTokenizer.from_pretrained(folder)
    safe = CLIPTokenizer.from_pretrained(folder, split_special_tokens=True)
    for text in TYPED:
        ids = ours([text])[0][0]
        assert ids.tolist() == safe(text, padding="max_length", truncation=True)["input_ids"]
        # By default a query can end itself there, or start anew.
        control = torch.tensor(theirs(text)["input_ids"])
        assert torch.isin(control, torch.tensor([*ours.prefix, *ours.suffix])).sum() == 3


@pytest.mark.proves("siglip2", "parity: texts (transformers)")
@pytest.mark.filterwarnings("ignore::polymodal.tokenizers.text.TruncationWarning")
def test_siglip2_reads_to_the_same_ids(tmp_path: Path) -> None:
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    byte_tokens = [f"<0x{value:02X}>" for value in range(256)]
    learner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    learner.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(" ", "▁")])
    learner.train_from_iterator(
        CORPUS[-2:], trainers.BpeTrainer(vocab_size=360, special_tokens=special + byte_tokens, show_progress=False)
    )
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    theirs = Siglip2Tokenizer(
        learner.get_vocab(), merges, add_eos_token=True, model_max_length=16, padding_side="right"
    )
    theirs.save_pretrained(tmp_path)

    ours = TextTokenizer.from_folder(tmp_path, pad="max")
    assert ours.clean == Lowercase()
    assert (ours.prefix, ours.suffix) == ((), (theirs.eos_token_id,))
    expected = theirs(TEXTS, padding="max_length", truncation=True, return_tensors="pt")
    ids, valid = ours(TEXTS)
    assert torch.equal(ids, expected["input_ids"])
    assert torch.equal(valid, expected["attention_mask"].bool())
    typed = ours(["<eos> more <pad>"])[0][0]
    assert (
        typed.tolist()
        == theirs("<eos> more <pad>", padding="max_length", truncation=True, split_special_tokens=True)["input_ids"]
    )

    theirs.padding_side = "left"
    theirs.save_pretrained(tmp_path)
    ids, valid = TextTokenizer.from_folder(tmp_path, pad="max")(TEXTS)
    expected = theirs(TEXTS, padding="max_length", truncation=True, return_tensors="pt")
    assert torch.equal(ids, expected["input_ids"])
    assert torch.equal(valid, expected["attention_mask"].bool())
