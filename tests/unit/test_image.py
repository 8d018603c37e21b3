"""Pictures: what decodes, what is refused before it costs anything, and where each pixel came from."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage
from PIL import ImageOps

from polymodal.core.errors import ConfigError, MediaError
from polymodal.core.files import write_json
from polymodal.core.sample import Image
from polymodal.modalities import image as module
from polymodal.modalities.image import (
    CLIP_MEAN,
    CLIP_STD,
    FORMATS,
    CenterCrop,
    Exact,
    ImageProcessor,
    PatchBudget,
    PatchProcessor,
    ShortestEdge,
    View,
    decode,
    decode_still,
    load_processor,
    thumbnail,
)

CLIP = ImageProcessor(
    resize=ShortestEdge(size=224), crop=CenterCrop(height=224, width=224), mean=CLIP_MEAN, std=CLIP_STD
)
LOSSLESS = ("PNG", "BMP", "TIFF", "PPM")
PLAIN: Any = {"rescale": 1.0, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}  # pixels stay 0..255
sides = st.integers(1, 90)


def noise(width: int, height: int, *channels: int, dtype: Any = np.uint8) -> np.ndarray:
    high = np.iinfo(dtype).max + 1
    return np.random.default_rng([width, height]).integers(0, high, (height, width, *channels), dtype=dtype)


def encoded(picture: PILImage.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def pixels(picture: PILImage.Image) -> np.ndarray:
    return np.asarray(picture)


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises pixels and has none."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


# ---- decoding ----


@pytest.mark.parametrize("kind", LOSSLESS)
def test_every_kind_of_source_gives_the_same_pixels(kind: str, tmp_path: Path) -> None:
    array = noise(19, 13, 3)
    picture = PILImage.fromarray(array)
    path = tmp_path / f"picture.{kind.lower()}"
    path.write_bytes(encoded(picture, kind))
    for source in (array, picture, path, str(path), path.read_bytes(), bytearray(path.read_bytes())):
        decoded = decode(Image(source))
        assert decoded.mode == "RGB"
        np.testing.assert_array_equal(pixels(decoded), array)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_cut_anywhere_is_refused_by_name(kind: str) -> None:
    data = encoded(PILImage.fromarray(noise(64, 48, 3)), kind)
    assert decode(Image(data)).size == (64, 48)
    for share in (0, 0.02, 0.3, 0.6, 0.95):
        with pytest.raises(MediaError, match=r"^holiday\.x: ") as caught:
            decode(Image(data[: int(len(data) * share)], name="holiday.x"))
        assert "PIL" not in str(caught.value)
        assert "truncated" not in str(caught.value).lower()  # the library's words stay in the chained error


@given(st.sampled_from(FORMATS), st.data())
def test_a_damaged_file_gives_a_picture_or_a_media_error(kind: str, data: st.DataObject) -> None:
    damaged = bytearray(encoded(PILImage.fromarray(noise(24, 17, 3)), kind))
    for _ in range(4):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(MediaError):
        assert decode(Image(damaged), max_pixels=2**16).mode == "RGB"


@pytest.mark.parametrize(
    ("width", "height"),
    [(9000, 8500), (9000, 11000), (60000, 60000), (2**31 - 1, 1)],
    ids=["ours", "Pillow warns", "Pillow fails", "wide"],
)
def test_size_is_refused_before_a_pixel_is_decoded(width: int, height: int) -> None:
    # Had it been decoded, the reason would be the missing data.
    with pytest.raises(MediaError, match="pixels"):
        decode(Image(png_header(width, height)))
    with pytest.raises(MediaError, match="broken or cut off"):
        decode(Image(png_header(90, 85)))


def test_limits_are_the_callers_to_set(tmp_path: Path) -> None:
    path = tmp_path / "a.bmp"
    path.write_bytes(encoded(PILImage.fromarray(noise(10, 10, 3)), "BMP"))
    size = path.stat().st_size
    assert decode(Image(path), max_pixels=100, max_bytes=size).size == (10, 10)
    with pytest.raises(MediaError, match=r"10 x 10 pixels are more than the 99 allowed"):
        decode(Image(path), max_pixels=99)
    for source in (path, path.read_bytes()):
        with pytest.raises(MediaError, match=f"{size} bytes are more than the {size - 1} allowed"):
            decode(Image(source), max_bytes=size - 1)


@pytest.mark.parametrize(
    "data",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"%PDF-1.7\n",
        b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
        encoded(PILImage.fromarray(noise(8, 8, 3)), "EPS"),
        encoded(PILImage.fromarray(noise(8, 8, 3)), "PCX"),
        b"\x00" * 999,
    ],
)
def test_formats_outside_the_list_never_reach_a_decoder(data: bytes) -> None:
    with pytest.raises(MediaError, match=r"not a picture.*png, jpeg"):
        decode(Image(data))


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)  # opening it would wait for ever
    (tmp_path / "empty.png").touch()
    for path, reason in {
        tmp_path: "is a folder",
        tmp_path / "none.png": "no such file",
        tmp_path / "empty.png": "the file is empty",
        pipe: "not a regular file",
        Path("/dev/zero"): "not a regular file",
        "https://example.org/cat.png": "addresses are not fetched",
        "nul\0byte.png": "cannot be read",
    }.items():
        with pytest.raises(MediaError, match=reason):
            decode(Image(path))


@pytest.mark.parametrize(
    ("array", "advice"),
    [
        (np.zeros((4, 5, 3), np.float32), r"\* 255"),
        (np.zeros((4, 5), np.int64), "uint8"),
        (np.zeros((3, 40, 50), np.uint8), r"transpose\(1, 2, 0\)"),
        (np.zeros((40, 50, 2), np.uint8), "height, width, 3 or 4"),
        (np.zeros((2, 4, 5, 3), np.uint8), "height, width, 3 or 4"),
        (np.zeros(5, np.uint8), "height, width, 3 or 4"),
        (np.zeros((0, 5, 3), np.uint8), "empty"),
        (torch.zeros(3, 4, 5), "not Tensor"),
        (None, "not NoneType"),
    ],
)
def test_wrong_arrays_are_told_what_to_do(array: Any, advice: str) -> None:
    with pytest.raises(MediaError, match=advice):
        decode(Image(array))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    exif = PILImage.Exif()
    exif[0x0112] = orientation
    stored = PILImage.fromarray(noise(7, 4, 3))
    data = encoded(stored, "PNG", exif=exif)
    expected = ImageOps.exif_transpose(PILImage.open(io.BytesIO(data)))
    np.testing.assert_array_equal(pixels(decode(Image(data))), pixels(expected))
    assert (decode(Image(data)).size == (4, 7)) == (orientation >= 5)


def test_broken_exif_does_not_lose_the_picture() -> None:
    data = encoded(PILImage.fromarray(noise(7, 4, 3)), "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage")
    assert decode(Image(data)).size == (7, 4)


def test_transparency_goes_on_white_or_is_dropped() -> None:
    array = np.zeros((2, 3, 4), np.uint8)
    array[..., 0], array[..., 3] = 200, [0, 128, 255]
    for source in (array, PILImage.fromarray(array), encoded(PILImage.fromarray(array), "PNG")):
        white = pixels(decode(Image(source)))[0]
        np.testing.assert_array_equal(white[0], [255, 255, 255])
        np.testing.assert_allclose(white[1], [227, 127, 127], atol=1)
        np.testing.assert_array_equal(white[2], [200, 0, 0])
        np.testing.assert_array_equal(pixels(decode(Image(source), alpha="drop"))[0], [[200, 0, 0]] * 3)


def test_transparent_palettes_and_colour_keys() -> None:
    palette = PILImage.new("P", (4, 4), 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((0, 0), 0)
    for transparency in (0, b"\x00\xff"):
        data = encoded(palette, "PNG", transparency=transparency)
        assert decode(Image(data)).getpixel((0, 0)) == (255, 255, 255)
        assert decode(Image(data), alpha="drop").getpixel((0, 0)) == (10, 20, 30)
        assert decode(Image(data)).getpixel((1, 1)) == (40, 50, 60)
    keyed = encoded(PILImage.new("RGB", (2, 2), (1, 2, 3)), "PNG", transparency=(1, 2, 3))
    assert decode(Image(keyed)).getpixel((0, 0)) == (255, 255, 255)
    assert decode(Image(keyed), alpha="drop").getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bits_are_scaled_and_not_clipped(kind: str) -> None:
    grey = noise(16, 9, dtype=np.uint16)
    grey[0, :3] = [0, 257, 65535]
    decoded = pixels(decode(Image(encoded(PILImage.fromarray(grey), kind))))
    np.testing.assert_allclose(decoded[..., 0], grey / 257, atol=0.5 + 1e-6)
    np.testing.assert_array_equal(decoded[0, :3, 0], [0, 1, 255])
    np.testing.assert_array_equal(decoded[..., 0], decoded[..., 2])


def test_samples_without_a_range_are_refused() -> None:
    for array in (np.zeros((3, 3), np.float32), np.full((3, 3), 70000, np.int32)):
        with pytest.raises(MediaError, match="convert the picture to 8"):
            decode(Image(encoded(PILImage.fromarray(array), "TIFF")))


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "CMYK", "YCbCr", "HSV"])
def test_every_colour_mode_becomes_rgb(mode: str) -> None:
    flat = PILImage.new("RGB", (5, 4), (255, 255, 255)).convert(mode)
    np.testing.assert_array_equal(pixels(decode(Image(flat))), 255)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation(kind: str) -> None:
    frames = [PILImage.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(pixels(decode(Image(data))), pixels(frames[0]))
    with pytest.raises(MediaError, match=r"pages.gif: has several frames or pages"):
        decode_still(Image(data, name="pages.gif"))
    np.testing.assert_array_equal(pixels(decode_still(Image(encoded(frames[0], kind, **options)))), pixels(frames[0]))


def test_a_second_view_of_a_camera_is_no_other_frame() -> None:
    views = [PILImage.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    data = encoded(views[0], "MPO", save_all=True, append_images=views[1:])
    np.testing.assert_array_equal(pixels(decode_still(Image(data))), pixels(decode(Image(data))))


def test_the_callers_picture_is_left_alone() -> None:
    picture = PILImage.fromarray(noise(9, 9, 4))
    before = pixels(picture).copy()
    small = thumbnail(decode(Image(picture)), 4)
    assert (picture.mode, picture.size, small.size) == ("RGBA", (9, 9), (4, 4))
    np.testing.assert_array_equal(pixels(picture), before)


@given(sides, sides, st.integers(1, 60))
def test_thumbnails_fit_and_are_never_enlarged(width: int, height: int, side: int) -> None:
    small = thumbnail(PILImage.new("RGB", (width, height)), side)
    assert max(small.size) <= max(side, 1)
    assert min(small.size) >= 1
    assert small.width <= width
    assert small.height <= height
    if max(width, height) <= side:
        assert small.size == (width, height)


# ---- processors ----


def processors() -> st.SearchStrategy[ImageProcessor]:
    resize = st.one_of(st.none(), st.builds(ShortestEdge, size=sides), st.builds(Exact, height=sides, width=sides))
    crop = st.one_of(st.none(), st.builds(CenterCrop, height=sides, width=sides))
    return st.builds(ImageProcessor, resize=resize, crop=crop, resample=st.sampled_from(["bilinear", "bicubic"]))


@given(processors(), sides, sides)
def test_the_view_says_the_size_and_inverts(processor: ImageProcessor, width: int, height: int) -> None:
    view = processor.view(width, height)
    out = processor([Image(noise(width, height, 3))])
    assert out.shape == (1, 3, view.seen[1], view.seen[0])
    points = torch.rand(5, 2, dtype=torch.float64) * torch.tensor([width, height])
    torch.testing.assert_close(view.to_original(view.to_seen(points)), points)
    boxes = points[:4].view(2, 2, 2)  # pairs of corners keep their shape
    assert view.to_seen(boxes).shape == (2, 2, 2)


@pytest.mark.parametrize(("width", "height"), [(64, 48), (31, 90), (200, 37), (20, 20)])
@pytest.mark.parametrize(
    "processor",
    [
        ImageProcessor(resize=ShortestEdge(size=48), crop=CenterCrop(height=48, width=48), **PLAIN),
        ImageProcessor(resize=Exact(height=60, width=44), **PLAIN),
        ImageProcessor(resize=ShortestEdge(size=30), crop=CenterCrop(height=53, width=70), **PLAIN),
    ],
    ids=["crop", "squash", "pad"],
)
def test_a_bright_box_is_found_again_in_the_original(processor: ImageProcessor, width: int, height: int) -> None:
    box = [width // 2 - 6, height // 2 - 5, width // 2 + 4, height // 2 + 7]
    picture = np.zeros((height, width, 3), np.uint8)
    picture[box[1] : box[3], box[0] : box[2]] = 255
    seen = processor([Image(picture)])[0, 0] / 255
    rows, columns = torch.arange(seen.shape[0]) + 0.5, torch.arange(seen.shape[1]) + 0.5
    centre = torch.stack([(seen.sum(0) * columns).sum(), (seen.sum(1) * rows).sum()]) / seen.sum()
    found = processor.view(width, height).to_original(centre)
    expected = torch.tensor([(box[0] + box[2]) / 2, (box[1] + box[3]) / 2])
    torch.testing.assert_close(found, expected, atol=0.15, rtol=0)


def test_padding_of_a_crop_is_black_before_normalising() -> None:
    processor = ImageProcessor(resize=None, crop=CenterCrop(height=5, width=8))
    out = processor([Image(np.full((2, 3, 3), 255, np.uint8))])
    # An odd lack is padded more on the near side, as in the reference.
    expected = -torch.ones(5, 8)
    expected[2:4, 3:6] = 1
    torch.testing.assert_close(out[0, 1], expected)


def test_arithmetic_by_hand() -> None:
    processor = ImageProcessor(resize=None, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    array = noise(4, 3, 3)
    expected = (array / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.25, 2.0]
    torch.testing.assert_close(
        processor([Image(array)])[0].permute(1, 2, 0).double(), torch.from_numpy(expected), atol=1e-6, rtol=0
    )


def test_a_batch_equals_its_pictures_one_by_one_also_from_threads() -> None:
    images = [Image(encoded(PILImage.fromarray(noise(30 + i, 50 - i, 3)), "PNG")) for i in range(12)]
    batch = CLIP(images)
    assert batch.is_contiguous()
    assert torch.equal(batch, torch.cat([CLIP([image]) for image in images]))
    assert torch.equal(batch, CLIP.from_pil([decode(image) for image in images]))
    with ThreadPoolExecutor(8) as pool:
        many = list(pool.map(lambda image: CLIP([image]), images * 4))
    assert torch.equal(torch.cat(many), batch.repeat(4, 1, 1, 1))


def test_8_bits_travel_and_are_normalised_later() -> None:
    pictures = [PILImage.fromarray(noise(50, 40, 3))] * 2
    eight = CLIP.pixels(pictures)
    assert eight.dtype == torch.uint8
    assert torch.equal(CLIP.normalise(eight), CLIP.from_pil(pictures))


def test_a_line_of_pixels_does_not_grow_to_gigabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert CLIP([Image(np.zeros((1, 60_000, 3), np.uint8))]).shape == (1, 3, 224, 224)
    with pytest.raises(MediaError, match="sides are too unequal"):
        ImageProcessor(resize=ShortestEdge(size=224))([Image(np.zeros((60_000, 1, 3), np.uint8))])

    for crop in (CenterCrop(height=40, width=40), CenterCrop(height=64, width=33)):
        # Bilinear: the overshoot of bicubic, cut off between Pillow's passes, depends on their order.
        processor = ImageProcessor(resize=ShortestEdge(size=40), crop=crop, resample="bilinear")
        pictures = [PILImage.fromarray(noise(*size, 3)) for size in [(300, 11), (11, 300), (70, 69)]]
        whole = processor.pixels(pictures).int()
        with monkeypatch.context() as patch:
            patch.setattr(module, "_MAX_RESIZED", 1)  # every picture takes the narrow way
            window = processor.pixels(pictures).int()
        assert (whole - window).abs().max() <= 1


def test_pictures_that_make_no_batch() -> None:
    with pytest.raises(MediaError, match=r"different sizes \(40 x 40, 60 x 40\)"):
        ImageProcessor(resize=ShortestEdge(size=40))([Image(noise(20, 20, 3)), Image(noise(30, 20, 3))])
    for processor in (CLIP, PatchProcessor(budget=PatchBudget())):
        with pytest.raises(MediaError, match="at least one"):
            processor([])


def test_the_picture_at_fault_is_named() -> None:
    with pytest.raises(MediaError, match=r"^second\.png: "):
        CLIP([Image(noise(4, 4, 3), name="first.png"), Image(b"nothing", name="second.png")])


# ---- patches ----


@given(st.integers(1, 700), st.integers(1, 700), st.sampled_from([4, 7, 16]), st.integers(1, 60))
def test_the_grid_is_the_largest_that_fits(width: int, height: int, patch: int, most: int) -> None:
    rows, columns = PatchBudget(patch_size=patch, max_patches=most).grid(width, height)
    assert rows >= 1
    assert columns >= 1
    assert rows * columns <= max(most, 1)
    # Were the picture scaled a little more than the search's precision, one more row or column would not fit.
    more = min(rows / height, columns / width) * patch + 1e-3
    larger = [max(1, -(-int(side * more * 1e6) // int(patch * 1e6))) for side in (height, width)]
    if larger != [rows, columns] and more < 100:
        grown = max(rows / height, columns / width) * patch * 1.001 + 1e-3
        assert np.ceil(height * grown / patch) * np.ceil(width * grown / patch) > most or grown > 100


@given(st.integers(1, 300), st.integers(1, 300))
def test_the_count_is_what_the_processor_makes(width: int, height: int) -> None:
    processor = PatchProcessor(budget=PatchBudget(patch_size=8, max_patches=30))
    patches, mask, shapes = processor([Image(np.zeros((height, width, 3), np.uint8)), Image(noise(16, 16, 3))])
    assert patches.shape == (2, 30, 8 * 8 * 3)
    assert int(mask[0].sum()) == int(shapes[0].prod()) == processor.count(width, height) <= 30
    assert mask[0, : int(mask[0].sum())].all()
    assert (patches[~mask] == 0).all()
    view = processor.view(width, height)
    assert view.seen == (int(shapes[0, 1]) * 8, int(shapes[0, 0]) * 8)
    corner = torch.tensor([[float(width), float(height)]])
    torch.testing.assert_close(view.to_seen(corner), torch.tensor([view.seen]).float())


def test_patches_put_together_are_the_resized_picture() -> None:
    processor = PatchProcessor(budget=PatchBudget(patch_size=4, max_patches=24), **PLAIN)
    picture = PILImage.fromarray(noise(37, 21, 3))
    patches, _, shapes = processor([Image(picture)])
    rows, columns = shapes[0].tolist()
    whole = patches[0, : rows * columns].view(rows, columns, 4, 4, 3).transpose(1, 2).reshape(rows * 4, columns * 4, 3)
    resized = picture.resize((columns * 4, rows * 4), PILImage.Resampling.BILINEAR)
    np.testing.assert_array_equal(whole.numpy(), pixels(resized))


# ---- configs of the Hub ----

HUB_CLIP = {
    "crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": 224,
    "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD),
}  # fmt: skip


def test_old_and_new_configs_of_clip_agree() -> None:
    new = {
        **HUB_CLIP, "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 224}, "do_rescale": True,
        "crop_size": {"height": 224, "width": 224}, "rescale_factor": 1 / 255, "do_convert_rgb": True,
        "processor_class": "CLIPProcessor",
    }  # fmt: skip
    assert ImageProcessor.from_hf(HUB_CLIP) == ImageProcessor.from_hf(new) == CLIP


@pytest.mark.parametrize("suffix", ["ImageProcessor", "ImageProcessorFast", "ImageProcessorPil", "FeatureExtractor"])
def test_defaults_are_those_of_the_class(suffix: str) -> None:
    vit = ImageProcessor.from_hf({"image_processor_type": f"ViT{suffix}"})
    assert vit == ImageProcessor(resize=Exact(height=224, width=224), resample="bilinear")
    siglip = ImageProcessor.from_hf({"image_processor_type": f"Siglip{suffix}", "size": {"height": 384, "width": 384}})
    assert siglip == ImageProcessor(resize=Exact(height=384, width=384), resample="bicubic")
    bit = ImageProcessor.from_hf({"image_processor_type": f"Bit{suffix}", "size": {"shortest_edge": 256}})
    assert (bit.resize, bit.crop, bit.mean) == (ShortestEdge(size=256), CLIP.crop, CLIP_MEAN)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"do_resiz": True}, "do_resiz = True is not known. Did you mean 'do_resize'"),
        ({"do_pad": True}, "do_pad = True asks for a step"),
        ({"size": {"longest_edge": 3}}, "size = .* is not understood"),
        ({"size": {"height": "224", "width": 224}}, "size = .* is not understood"),
        ({"crop_size": {"shortest_edge": 3}}, "crop_size needs height and width"),
        ({"resample": 9}, "resample = 9"),
        ({"image_mean": [0.5, 0.5]}, "image_mean needs 3 number"),
        ({"image_std": [0.5, 0.0, 0.5]}, "must be positive"),
        ({"image_processor_type": "LayoutLMv2ImageProcessor"}, "LayoutLMv2ImageProcessor is not supported"),
        ({"image_processor_type": "Siglip2ImageProcessor"}, "not read here"),
        ({"data_format": "channels_last"}, "data_format"),
        ({"alpha": "black"}, "neither white nor drop"),
    ],
)
def test_what_is_not_understood_is_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        ImageProcessor.from_hf({**HUB_CLIP, **change})


def test_all_problems_of_a_config_are_listed() -> None:
    with pytest.raises(ConfigError) as caught:
        ImageProcessor.from_hf({**HUB_CLIP, "spam": 1, "eggs": 2, "do_pad": True})
    assert all(word in str(caught.value) for word in ("spam", "eggs", "do_pad"))


def test_a_config_without_a_type_is_refused() -> None:
    with pytest.raises(ConfigError, match="image_processor_type is missing"):
        ImageProcessor.from_hf({"size": 224})


@given(processors(), st.sampled_from(["white", "drop"]))
def test_configs_survive_the_round_trip(processor: ImageProcessor, alpha: Any) -> None:
    processor = ImageProcessor(**{**vars(processor), "alpha": alpha, "rescale": 0.5, "mean": CLIP_MEAN})
    assert ImageProcessor.from_hf(processor.to_hf()) == processor


def test_processors_load_from_either_file(tmp_path: Path) -> None:
    flexible = PatchProcessor(budget=PatchBudget(patch_size=14, max_patches=100), mean=CLIP_MEAN)
    write_json(tmp_path / "one" / "preprocessor_config.json", CLIP.to_hf())
    write_json(tmp_path / "two" / "processor_config.json", {"image_processor": flexible.to_hf(), "x": 1})
    assert load_processor(tmp_path / "one") == CLIP
    assert load_processor(tmp_path / "two") == flexible
    write_json(tmp_path / "three" / "processor_config.json", {"x": 1})
    for folder, reason in {"three": "not a JSON object", "four": "holds neither"}.items():
        with pytest.raises(ConfigError, match=reason):
            load_processor(tmp_path / folder)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ImageProcessor(resize=ShortestEdge(size=0)),
        lambda: ImageProcessor(resize=None, std=(1.0, 0.0, 1.0)),
        lambda: ImageProcessor(resize=None, rescale=0.0),
        lambda: PatchBudget(patch_size=0),
    ],
)
def test_impossible_processors_are_refused(make: Any) -> None:
    with pytest.raises(ConfigError, match="must be positive"):
        make()


def test_a_view_of_a_box_as_corners() -> None:
    view = View(original=(100, 50), seen=(40, 40), scale=(0.8, 0.8), offset=(-20.0, 0.0))
    box = torch.tensor([[25.0, 0.0], [75.0, 50.0]])
    torch.testing.assert_close(view.to_seen(box), torch.tensor([[0.0, 0.0], [40.0, 40.0]]))
