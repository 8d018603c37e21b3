"""Drawing from Python and by the commands draw and show: files, their settings, their mark, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import struct
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from PIL import PngImagePlugin
from safetensors.torch import save_file
from torch import nn

import polymodal
from polymodal.cli import main
from polymodal.core.batch import Batch
from polymodal.core.drawing import Drawing, Glimpse
from polymodal.core.errors import ConfigError, MediaError, UnsupportedError
from polymodal.modalities.generated import COMPOSITE, GENERATED, read_settings, source_type, write_generated
from polymodal.modalities.image import MAX_PIXELS
from polymodal.pictures import Made, draw, drawn, settings_of, sheet
from tests.nano import nano
from tests.toy_painter import ToyPainter, toy


@pytest.fixture(scope="module")
def painter() -> ToyPainter:
    return toy()


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(painter: ToyPainter, monkeypatch: pytest.MonkeyPatch) -> None:
    """`polymodal draw` with the smallest painter, which has no files."""
    monkeypatch.setattr("polymodal.cli.paint.load_model", lambda name, lora: painter)


def pixels(path: str | Path) -> np.ndarray:
    with PILImage.open(path) as opened:
        return np.asarray(opened)


def noise(name: str, size: tuple[int, int] = (16, 8), seed: int = 0) -> str:
    array = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    PILImage.fromarray(array).save(name)
    return name


# ---- Python


def test_pictures_say_how_they_were_made(painter: ToyPainter) -> None:
    drawing = Drawing(seed=7, steps=4, guidance=2, negative="blue", interval=(0.2, 1.0), rescale=0.5)
    pictures = polymodal.draw(painter, "red", drawing, n=3)
    assert [p.made.seed for p in pictures] == [7, 8, 9]
    assert pictures[0].image.size == (16, 8)
    pictures[1].save("one.png")
    assert settings_of("one.png") == pictures[1].made
    assert np.array_equal(pixels("one.png"), np.asarray(pictures[1].image))
    assert source_type("one.png") == "trainedAlgorithmicMedia"
    m = pictures[1].made
    again = draw(painter, m.prompt, Drawing(
        seed=m.seed, steps=m.steps, guidance=m.guidance, negative=m.negative, interval=m.interval, rescale=m.rescale,
        size=(m.width, m.height),
    ))  # fmt: skip
    assert np.array_equal(np.asarray(again[0].image), np.asarray(pictures[1].image))


def test_pictures_come_as_they_are_made(painter: ToyPainter) -> None:
    steps: list[Glimpse] = []
    some = drawn(painter, "red", Drawing(seed=1, steps=3), n=4, at_once=2, watch=steps.append)
    first = next(some)
    assert len(steps) == 3
    rest = list(some)
    assert len(steps) == 6
    one_by_one = draw(painter, "red", Drawing(seed=1, steps=3), n=4)
    for a, b in zip([first, *rest], one_by_one, strict=True):
        assert a.made == b.made
        assert np.abs(np.asarray(a.image).astype(int) - np.asarray(b.image)).max() <= 1


def test_what_was_made_of_a_picture_says_so(painter: ToyPainter) -> None:
    noise("photo.png")
    PILImage.new("L", (16, 8), 255).save("mask.png")
    (picture,) = draw(painter, "red", image=Path("photo.png"), mask=Path("mask.png"))
    picture.save("out.png")
    assert source_type("out.png") == "compositeWithTrainedAlgorithmicMedia"
    made = settings_of("out.png")
    assert isinstance(made, Made)
    assert made.strength == 1.0
    assert str(made.image).startswith("photo.png (sha256 ")
    assert made.image != made.mask
    assert draw(painter, "red", image=PILImage.new("RGB", (16, 8)))[0].made.strength == 0.8


def test_a_picture_to_begin_with_is_brought_to_the_size(painter: ToyPainter) -> None:
    photo = PILImage.fromarray(pixels(noise("photo.png", (40, 30))))
    (picture,) = draw(painter, "red", Drawing(size=(24, 16)), image=photo, mask=PILImage.new("L", (40, 30), 255))
    assert picture.image.size == (24, 16)
    with pytest.raises(ConfigError, match="multiples of 4 pixels, not 40 x 30; 40 x 32 is near"):
        draw(painter, "red", image=photo)
    with pytest.raises(MediaError, match=r"the mask .* has 40 x 29 pixels, its picture 40 x 30"):
        draw(painter, "red", image=photo, mask=PILImage.new("L", (40, 29)))


def test_files_are_named_without_their_folders(painter: ToyPainter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are shared, and with them what is written into them."""
    secret = Path("home/anna/secret").resolve()
    secret.mkdir(parents=True)
    monkeypatch.setattr(painter, "source", str(secret / "painter"))
    photo = Path(noise(str(secret / "photo.png")))
    mask = PILImage.new("L", (16, 8), 255)
    mask.save(secret / "mask.png")
    (picture,) = draw(painter, "red", image=photo, mask=secret / "mask.png", control=str(photo))
    picture.save("out.png")
    made = settings_of("out.png")
    assert isinstance(made, Made)
    assert made.model == "painter"
    assert [str(name).split(" (sha256 ")[0] for name in (made.image, made.mask, made.control)] == [
        "photo.png", "mask.png", "photo.png",
    ]  # fmt: skip
    assert b"anna" not in Path("out.png").read_bytes()
    monkeypatch.setattr(painter, "source", "home/anna/secret")
    assert draw(painter, "red", Drawing(steps=1))[0].made.model == "secret"
    monkeypatch.setattr(painter, "source", "someone/painter")
    assert draw(painter, "red", Drawing(steps=1))[0].made.model == "someone/painter"


def test_a_control_picture_gives_the_size_and_is_not_stretched(painter: ToyPainter) -> None:
    edges = PILImage.fromarray(pixels(noise("edges.png", (24, 36))))
    drawing = Drawing(seed=1, steps=2)
    (picture,) = draw(painter, "red", drawing, control=edges)
    assert picture.image.size == (24, 36)
    assert draw(painter, "red", Drawing(steps=2, size=(48, 72)), control=edges)[0].image.size == (48, 72)
    with pytest.raises(MediaError, match="has 24 x 36 pixels: it would be stretched to 36 x 24"):
        draw(painter, "red", Drawing(size=(36, 24)), control=edges)
    with pytest.raises(MediaError, match="stretched to 16 x 8"):
        draw(painter, "red", drawing, image=PILImage.new("RGB", (16, 8)), control=edges)
    odd = PILImage.new("RGB", (101, 150))
    with pytest.raises(ConfigError, match="not 101 x 150; 100 x 152 is near"):
        draw(painter, "red", drawing, control=odd)
    assert draw(painter, "red", Drawing(steps=2, size=(100, 152)), control=odd)[0].image.size == (100, 152)


def test_how_a_control_picture_counted_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from polymodal.systems.controlnet import ControlNet

    model = nano("controlnet")
    assert isinstance(model, ControlNet)
    spec = model.inputs_spec()["ids"]
    monkeypatch.setattr(model, "prompt", lambda texts: Batch(ids=spec.random(len(texts), torch.Generator())))
    model.scale, model.guess = 0.7, True
    drawing, edges = Drawing(seed=1, steps=1), PILImage.new("RGB", model.size)
    (picture,) = draw(model, "a", drawing, control=edges)
    picture.save("out.png")
    made = settings_of("out.png")
    assert made == picture.made
    assert (picture.made.control_scale, picture.made.control_guess) == (0.7, True)
    (plain,) = draw(model, "a", drawing)
    assert (plain.made.control_scale, plain.made.control_guess) == (None, None)


def test_what_cannot_be_drawn_is_refused(painter: ToyPainter) -> None:
    with pytest.raises(UnsupportedError, match="CLIP, which draws nothing"):
        draw(nano("clip"), "red")
    with pytest.raises(ConfigError, match="0 pictures"):
        draw(painter, "red", n=0)
    with pytest.raises(ConfigError, match="give the picture, too"):
        draw(painter, "red", mask=PILImage.new("L", (16, 8)))
    with pytest.raises(MediaError, match=r"out\.jpg: pictures are written as \.png"):
        draw(painter, "red")[0].save("out.jpg")
    assert not Path("out.jpg").exists()


@pytest.mark.parametrize("prompt", ["red\x1b[31m", "red\0", "red \ud800"])
def test_prompts_that_are_no_text_are_refused(painter: ToyPainter, prompt: str) -> None:
    with pytest.raises(MediaError, match="no text"):
        draw(painter, prompt)
    with pytest.raises(MediaError, match="no text"):
        draw(painter, "red", Drawing(negative=prompt))


@pytest.mark.parametrize(
    "more", ['"><x:evil a="&', "</x:xmpmeta>]]>", "é 猫 👩‍🚀\n\t'", "<?xpacket end='w'?>", "{source}"]
)
def test_any_text_survives_in_the_file(painter: ToyPainter, more: str) -> None:
    import xml.etree.ElementTree as ET

    (picture,) = draw(painter, f"red {more}", Drawing(steps=1))
    picture.save("out.png")
    assert settings_of("out.png") == picture.made
    with PILImage.open("out.png") as opened:
        packet = opened.info["XML:com.adobe.xmp"]
    (description,) = ET.fromstring(packet.split("?>", 1)[1].rsplit("<?", 1)[0]).iter(
        "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description"
    )
    iptc = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}"
    assert description.attrib[f"{iptc}DigitalSourceType"] == GENERATED
    assert description.attrib[f"{iptc}AIPromptInformation"].split() == f"red {more}".split()
    assert description.attrib[f"{iptc}AISystemUsed"] == painter.source


# ---- what is read back may be hostile


def planted(path: str, text: str, key: str = "polymodal") -> str:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text(key, text)
    PILImage.new("RGB", (4, 4)).save(path, pnginfo=chunks)
    return path


GOOD = asdict(Made(prompt="a", model="m", seed=1, width=4, height=4, steps=1, guidance=1.0))


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "7", "{}", "[" * 100_000, '{"sheet": [3]}', json.dumps(GOOD | {"more": 1}),
        json.dumps(GOOD | {"seed": "1"}), json.dumps(GOOD | {"interval": [1]}), json.dumps(GOOD | {"interval": 3}),
        json.dumps(GOOD | {"steps": True}), json.dumps({k: v for k, v in GOOD.items() if k != "prompt"}),
        json.dumps(GOOD | {"interval": ["a", "b"]}), json.dumps(GOOD | {"control_guess": 1}),
        json.dumps(GOOD | {"lora": 3}), json.dumps(GOOD | {"control_scale": True}), '{"seed": ' + "9" * 5000 + "}",
    ],
)  # fmt: skip
def test_broken_settings_are_refused(text: str) -> None:
    with pytest.raises(MediaError, match=r"broken|version"):
        settings_of(planted("bad.png", text))


def test_a_picture_of_another_program_says_nothing() -> None:
    with pytest.raises(MediaError, match="says nothing"):
        settings_of(noise("photo.png"))
    assert source_type("photo.png") is None
    PILImage.new("RGB", (4, 4)).save("photo.jpg")
    with pytest.raises(MediaError, match="says nothing"):
        settings_of("photo.jpg")
    Path("text.png").write_text("no picture")
    with pytest.raises(MediaError):
        settings_of("text.png")
    with pytest.raises(MediaError):
        settings_of("missing.png")


def test_a_bomb_in_a_text_chunk_is_refused() -> None:
    noise("bomb.png")
    raw = Path("bomb.png").read_bytes()
    body = b"zTXt" + b"polymodal\0\0" + zlib.compress(b"x" * 80_000_000)
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    Path("bomb.png").write_bytes(raw[:33] + chunk + raw[33:])
    with pytest.raises(MediaError, match=r"broken|not a picture"):
        read_settings("bomb.png")


def test_marks_of_others_are_read() -> None:
    packet = '<rdf:Description Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/digitalCapture"/>'
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("XML:com.adobe.xmp", packet)
    PILImage.new("RGB", (4, 4)).save("photo.png", pnginfo=chunks)
    assert source_type("photo.png") == "digitalCapture"
    write_generated("made.png", PILImage.new("RGB", (4, 4)), {}, prompt="", system="", version="", composite=True)
    assert COMPOSITE.endswith(str(source_type("made.png")))


# ---- the commands


@pytest.mark.usefixtures("command")
def test_draw_writes_one_picture(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["draw", "red & Blue!", "--seed", "3", "--steps", "4", "--guidance", "2.5", "--size", "24x16"]
    assert main(arguments) == 0
    assert capsys.readouterr().out == "red-blue-3.png: 24 x 16, seed 3, 4 steps, guidance 2.5\n"
    assert main([*arguments, "--out", "deep/cube.png", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["sheet"] is None
    assert told["pictures"][0]["path"] == "deep/cube.png"
    assert np.array_equal(pixels("red-blue-3.png"), pixels("deep/cube.png"))
    assert {p.name for p in Path().iterdir()} == {"red-blue-3.png", "deep"}


@pytest.mark.parametrize(("name", "prompt"), [("dit", "3"), ("dit", "")])
def test_draw_with_a_model_from_its_files(name: str, prompt: str, capsys: pytest.CaptureFixture[str]) -> None:
    nano(name).save("model")
    assert main(["draw", prompt, "--model", "model", "--seed", "2", "--steps", "2", "--out", "a.png"]) == 0
    capsys.readouterr()
    made = settings_of("a.png")
    assert isinstance(made, Made)
    assert (made.model, made.prompt, made.seed) == ("model", prompt, 2)
    (picture,) = draw(polymodal.load("model"), prompt, Drawing(seed=2, steps=2))
    assert np.abs(np.asarray(picture.image).astype(int) - pixels("a.png")).max() <= 8  # bf16, where that is faster
    assert main(["draw", "no such class", "--model", "model"]) == 1
    assert "is no class" in capsys.readouterr().err


@pytest.mark.usefixtures("command")
def test_draw_writes_many_and_a_sheet(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["draw", "red", "--seed", "3", "--steps", "2", "--n", "5", "--out", "cubes.png"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "cubes-sheet.png: all 5"
    assert sorted(p.name for p in Path().iterdir()) == [*(f"cubes-{n}.png" for n in range(3, 8)), "cubes-sheet.png"]
    assert main(["draw", "red", "--seed", "5", "--steps", "2", "--out", "alone.png"]) == 0
    assert np.array_equal(pixels("alone.png"), pixels("cubes-5.png"))
    made = settings_of("cubes-sheet.png")
    assert isinstance(made, list)
    assert [m.seed for m in made] == [3, 4, 5, 6, 7]
    assert source_type("cubes-sheet.png") == "trainedAlgorithmicMedia"
    whole = pixels("cubes-sheet.png")
    assert np.array_equal(whole[:8, :16], pixels("cubes-3.png"))


@pytest.mark.usefixtures("command")
def test_draw_shows_what_is_to_be_expected(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["draw", "red", "--seed", "3", "--out", "a.png", "--preview", "now.png"]) == 0
    assert np.abs(pixels("now.png").astype(int) - pixels("a.png")).max() <= 1
    assert source_type("now.png") == "trainedAlgorithmicMedia"
    assert settings_of("now.png") == settings_of("a.png")
    noise("photo.png")
    assert main(["draw", "red", "--n", "2", "--image", "photo.png", "--out", "b.png", "--preview", "now.png"]) == 0
    assert source_type("now.png") == "compositeWithTrainedAlgorithmicMedia"


def test_draw_with_an_adapter(capsys: pytest.CaptureFixture[str]) -> None:
    model = nano("dit")
    torch.manual_seed(0)
    with torch.no_grad():  # gates and outputs that are not zero
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save("model")
    name = next(n for n, layer in model.named_modules() if n in model.hub_layers() and isinstance(layer, nn.Linear))
    layer, called = model.get_submodule(name), model.hub_layers()[name]
    assert isinstance(layer, nn.Linear)
    torch.manual_seed(1)
    down, up = torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2)
    Path("folder").mkdir()
    save_file({f"{called}.lora_A.weight": down, f"{called}.lora_B.weight": up}, "folder/cats.safetensors")
    base = ["draw", "3", "--model", "model", "--seed", "2", "--steps", "2", "--out"]
    assert main([*base, "plain.png"]) == 0
    assert main([*base, "a.png", "--lora", "folder/cats.safetensors"]) == 0
    made = settings_of("a.png")
    assert isinstance(made, Made)
    assert str(made.lora).startswith("cats.safetensors (sha256 ")
    assert not np.array_equal(pixels("a.png"), pixels("plain.png"))
    with torch.no_grad():
        layer.weight += up @ down
    (picture,) = draw(model, "3", Drawing(seed=2, steps=2))
    assert np.abs(np.asarray(picture.image).astype(int) - pixels("a.png")).max() <= 8  # bf16, where that is faster
    capsys.readouterr()
    assert main([*base, "b.png", "--lora", "missing.safetensors"]) == 1
    assert "missing.safetensors" in capsys.readouterr().err
    assert not Path("b.png").exists()


@pytest.mark.usefixtures("command")
def test_draw_changes_and_fills_in(capsys: pytest.CaptureFixture[str]) -> None:
    noise("photo.png")
    mask = np.zeros((8, 16), dtype=np.uint8)
    mask[:, 8:] = 255
    PILImage.fromarray(mask).save("mask.png")
    base = ["draw", "red", "--seed", "3", "--image", "photo.png"]
    assert main([*base, "--strength", "0.2", "--out", "a.png"]) == 0
    assert main([*base, "--mask", "mask.png", "--out", "b.png"]) == 0
    assert np.array_equal(pixels("b.png")[:, :8], pixels("photo.png")[:, :8])
    assert not np.array_equal(pixels("b.png")[:, 8:], pixels("photo.png")[:, 8:])
    capsys.readouterr()
    assert main(["show", "b.png"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("b.png: compositeWithTrainedAlgorithmicMedia\n")
    assert "  strength  1.0\n" in shown
    assert "photo.png (sha256" in shown


@pytest.mark.usefixtures("command")
@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--size", "17x8"], "multiples of 4 pixels, not 17 x 8; 16 x 8 is near"),
        (["--strength", "0.5"], "--strength is of a picture"), (["--mask", "m.png"], "--mask is of a picture"),
        (["--image", "photo.png", "--strength", "1.5"], "at most 1"),
        (["--image", "photo.png", "--strength", "0"], "more than 0"),
        (["--image", "photo.png", "--mask", "small.png"], "the mask small.png has 8 x 8 pixels, its picture 16 x 8"),
        (["--image", "photo.png", "--mask", "ones.png"], "ones.png has nothing white at 16 x 8 pixels"),
        (["--image", "photo.png", "--mask", "dot.png", "--size", "8x4"], "dot.png has nothing white at 8 x 4 pixels"),
        (["--image", "missing.png"], "missing.png"), (["--steps", "0"], "1 to 1,000 steps"),
        (["--steps", "101"], "takes 1 to 100"), (["--guidance", "-1"], "guidance"), (["--seed", "-1"], "a seed"),
        (["--size", "100000x8"], "1 to 16,384 pixels"), (["--rescale", "0.5", "--guidance", "1"], "rescale"),
        (["--out", "a.jpg"], "written as .png"), (["--preview", "a.gif"], "written as .png"),
        (["--negative", "\x1b[2J"], "no text"),
    ],
)  # fmt: skip
def test_draw_says_what_is_wrong(more: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    noise("photo.png")
    noise("small.png", (8, 8))
    PILImage.new("L", (16, 8), 1).save("ones.png")
    dot = PILImage.new("L", (16, 8))
    dot.putpixel((0, 0), 255)
    dot.save("dot.png")
    before = sorted(Path().iterdir())
    assert main(["draw", "red", *more]) == 1
    told = capsys.readouterr()
    assert words in told.err
    assert "\x1b" not in told.err
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize("more", [["--n", "0"], ["--size", "axb"], ["--size", ""], ["--n", "x"]])
def test_usage_is_checked(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["draw", "red", *more])
    assert error.value.code == 2
    assert more[0] in capsys.readouterr().err


def test_draw_needs_a_model_that_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["draw", "red", "--model", "./nothing"]) == 1
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.usefixtures("command")
def test_an_interruption_loses_no_picture_that_is_done(
    painter: ToyPainter, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    denoise, asked = painter.denoise, []

    def cut(*given: Any) -> torch.Tensor:
        asked.append(1)
        if len(asked) == 25:
            os.kill(os.getpid(), signal.SIGINT)
        return denoise(*given)

    monkeypatch.setattr(painter, "denoise", cut)
    arguments = ["draw", "red", "--seed", "3", "--n", "5", "--out", "a.png", "--preview", "now.png"]
    assert main(arguments) == 130
    assert sorted(p.name for p in Path().iterdir()) == ["a-3.png", "a-4.png", "now.png"]
    assert settings_of("a-4.png")
    assert "nothing is lost" in capsys.readouterr().err


def test_what_cannot_be_written_is_told_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("polymodal.cli.paint.load_model", lambda name, lora: pytest.fail("loaded"))
    Path("file").touch()
    Path("folder.png").mkdir()
    for option in ("--out", "--preview"):
        for name in ("file/a.png", "folder.png"):
            assert main(["draw", "red", option, name]) == 1
            told = capsys.readouterr().err
            assert "cannot be written" in told
            assert name in told


@pytest.mark.usefixtures("command")
def test_a_folder_that_may_not_be_written_to_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("")
    assert main(["draw", "red", "--steps", "1", "--out", "file/a.png"]) == 1
    assert "is no folder" in capsys.readouterr().err


@pytest.mark.usefixtures("command")
def test_show(capsys: pytest.CaptureFixture[str]) -> None:
    main(["draw", "red", "--seed", "3", "--steps", "1", "--n", "2", "--out", "a.png"])
    capsys.readouterr()
    assert main(["show", "a-3.png", "a-sheet.png", "--json"]) == 0
    one, both = json.loads(capsys.readouterr().out)
    assert one["source_type"] == both["source_type"] == "trainedAlgorithmicMedia"
    assert [m["seed"] for m in both["pictures"]] == [3, 4]
    assert both["pictures"][0] == one["pictures"][0]
    assert main(["show", noise("photo.png")]) == 1
    assert "says nothing of how it was made" in capsys.readouterr().err


@pytest.mark.parametrize(("count", "size", "grid"), [(1, (8, 8), (1, 1)), (4, (8, 8), (2, 2)), (3, (8, 8), (2, 2)),
                                                     (6, (16, 8), (2, 3)), (2, (8, 16), (2, 1))])  # fmt: skip
def test_sheets_are_about_as_wide_as_high(count: int, size: tuple[int, int], grid: tuple[int, int]) -> None:
    whole = sheet([PILImage.new("RGB", size)] * count, gap=4)
    assert whole.size == (grid[0] * (size[0] + 4) - 4, grid[1] * (size[1] + 4) - 4)


def test_a_sheet_of_large_pictures_can_be_shown_again() -> None:
    whole = sheet([PILImage.new("RGB", (6000, 3000), "red")] * 4, gap=4)
    assert whole.width * whole.height <= MAX_PIXELS < 4 * 6000 * 3000
    assert whole.height / whole.width == pytest.approx(4 * 3000 / 6000, rel=0.01)
    assert whole.getpixel((whole.width // 2, whole.height // 8)) == (255, 0, 0)
