"""What must not be answered: told in one message by `ask` and by the command line, and nothing is cut in silence."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from polymodal.asking import ask
from polymodal.cli import main
from polymodal.core.batch import Batch
from polymodal.core.chat import Chat
from polymodal.core.errors import MediaError
from polymodal.core.sample import Sample
from polymodal.samplers.autoregressive import Settings
from polymodal.systems.generator import Generator
from tests.talking import MARKS, talking

NAMES = ["llava", "qwen2_vl", "paligemma"]
FEW = Settings(max_new_tokens=4)
SAYS = "{{ messages[0].content[-1].text }}"  # a chat template


def noise(*size: int) -> PILImage.Image:
    return PILImage.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))


def frames(file: Path) -> None:
    noise(20, 31).save(file, save_all=True, append_images=[PILImage.new("RGB", (31, 20), c) for c in ("red", "lime")])


def cut(file: Path) -> None:
    noise(20, 31).save(file)
    file.write_bytes(file.read_bytes()[:-200])


def huge(file: Path) -> None:
    PILImage.new("1", (20_000, 20_000)).save(file)


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut.png": (cut, "is broken or cut off"),
    "cut.jpg": (cut, "is broken or cut off"),
    "cut.webp": (cut, "broken"),
    "huge.png": (huge, "pixels.*shrink it first"),
    "moving.gif": (frames, "has several frames or pages; pass the one that is meant"),
    "moving.png": (frames, "has several frames"),
    "moving.webp": (frames, "has several frames"),
    "pages.tif": (frames, "has several frames"),
    "empty.png": (lambda file: file.write_bytes(b""), "the file is empty"),
    "words.png": (lambda file: file.write_text("hello"), "not a picture"),
    "folder.png": (lambda file: file.mkdir(), "is a folder, not a picture"),
    "nothing.png": (lambda file: None, "there is no such file"),
    "cut.mp4": (lambda file: file.write_bytes(b"\0\0\0\x18ftypmp42\0\0"), "cut off|reads no clips"),
    "notes.txt": (lambda file: file.write_text("hello"), "no known medium ends in '.txt'"),
}


@cache
def model_of(name: str, context: int = 400) -> Generator:
    return talking(name, context=context)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: model_of(name).save(tmp_path_factory.mktemp(name)) for name in NAMES}


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    noise(20, 31).save(tmp_path / "good.png")
    return tmp_path / "good.png"


def told(capsys: pytest.CaptureFixture[str], folder: Path, *asked: str | Path, error: str = "") -> Any:
    """What the command line answers, or that it refuses in one message."""
    capsys.readouterr()
    code = main(["ask", *map(str, asked), "--model", str(folder), "--max-tokens", "4", "--json"])
    out, err = capsys.readouterr()
    assert code == bool(error), err
    if not error:
        return json.loads(out)
    assert out == ""
    assert re.fullmatch(rf"polymodal: .*{error}.*\n", err), err
    return None


@pytest.mark.parametrize("name", NAMES)
def test_files_that_are_no_picture(
    name: str, folders: dict[str, Path], tmp_path: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file, (make, error) in BAD.items():
        make(tmp_path / file)
        with pytest.raises(MediaError, match=rf"{file}: .*(?:{error})"):
            ask(model_of(name), [picture, tmp_path / file, "what is it?"], FEW)
        if name == "llava" or file in ("cut.png", "moving.gif"):  # the command does the same for all
            told(capsys, folders[name], picture, tmp_path / file, "what is it?", error=rf"{file}: .*(?:{error})")


@pytest.mark.parametrize("name", NAMES)
def test_pictures_of_odd_sizes(
    name: str, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_of(name)
    for size in ((1, 1), (1, 190), (190, 1)):
        file = tmp_path / f"{size[0]}.png"
        noise(*size).save(file)
        prompt = model.prompt([Chat.of([file, "what is it?"])])
        assert int((prompt["ids"] == model.media_id).sum()) == model.count(Sample.of(file)) > 0
        assert told(capsys, folders[name], file, "what is it?")["tokens"] >= 1
    noise(1, 20_000).save(tmp_path / "flat.png")
    if name == "qwen2_vl":
        told(capsys, folders[name], tmp_path / "flat.png", "what?", error="too unequal for this model")
    else:
        told(capsys, folders[name], tmp_path / "flat.png", "what?")


@pytest.mark.parametrize("name", NAMES)
def test_a_text_over_the_context(name: str, tmp_path: Path, picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = len(model_of(name).prompt([Chat.of([picture, "x"])])["ids"][0])
    most, long = short + 20, "a red cup and a blue plate " * 30
    model = model_of(name, most)
    with pytest.raises(MediaError, match=rf"a prompt of \d+ tokens; \w+ reads at most {most}"):
        ask(model, [picture, long], FEW)
    with pytest.raises(MediaError, match="no room to answer"):
        ask(model, [picture, "x" + "7" * 20], FEW)
    folder = model.save(tmp_path / "model")
    told(capsys, folder, picture, long, error=f"reads at most {most}")
    told(capsys, folder, *[picture] * 40, "what?", error=f"reads at most {most}: fewer or smaller pictures")
    row = told(capsys, folder, picture, "x")
    assert row["finished"] == ("length" if row["tokens"] == 4 else "stop"), "an answer that stops short says why"


@pytest.mark.parametrize("name", NAMES)
def test_placeholders_that_were_typed_are_text(
    name: str, folders: dict[str, Path], picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_of(name)
    typed = " ".join([*MARKS.values(), "<image>", "<|image_pad|>", "<__media__>", "<|im_end|>", "<loc0001>"])
    places = model.count(Sample.of(picture))
    for parts in ([picture, typed], [typed]):
        ids = model.prompt([Chat.of(parts)])["ids"]
        assert int(model.places(ids).sum()) == places * (len(parts) - 1)
        assert model.tokenizer is not None
        assert typed in model.tokenizer.decode(ids[0].tolist(), skip_special=False), "all of it is read"
    assert told(capsys, folders[name], picture, typed)["tokens"] >= 1


@pytest.mark.parametrize("name", NAMES)
def test_parts_that_no_chat_has(name: str, picture: Path) -> None:
    for part, error in (
        ({"type": "image_pad", "text": "x"}, "image_pad"),
        ({"type": "image_url", "image_url": {"url": "http://example.org/a.png"}}, "not fetched|data:|remote|address"),
        ({"type": "image"}, "image"),
    ):
        with pytest.raises(MediaError, match=error):
            ask(model_of(name), [{"role": "user", "content": [part, {"type": "text", "text": "what?"}]}], FEW)


@pytest.mark.parametrize("name", NAMES)
def test_more_or_fewer_places_than_media(name: str, picture: Path) -> None:
    model = model_of(name)
    prompt = model.prompt([Chat.of([picture, "what is it?"])])
    place = int(prompt["ids"][0].eq(model.media_id).nonzero()[0])
    for ids in (
        torch.cat([prompt["ids"][:, :place], prompt["ids"][:, place + 1 :]], 1),
        torch.cat([prompt["ids"][:, :place], prompt["ids"][:, place : place + 1], prompt["ids"][:, place:]], 1),
    ):
        batch = Batch(prompt | {"ids": ids, "valid": torch.ones_like(ids, dtype=torch.bool)})
        with pytest.raises(MediaError):
            model.prefill(batch, model.new_memory(1, 200))


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("llava", ("chat_template.jinja", "", SAYS), "the chat has 1 of the kind image, but the template wrote"),
        ("llava", ("chat_template.jinja", "", f"<|image|><|image|>{SAYS}"), r"wrote '<\|image\|>' 2 times"),
        ("qwen2_vl", ("chat_template.jinja", "", SAYS), "the chat has 1 of the kind image"),
        ("llava", ("config.json", '"image_token_index": ID', '"image_token_index": 70'), "is no token"),
        (
            "llava",
            ("config.json", '"image_token_index": ID', '"image_token_index": 4000'),
            "4000 is not in a vocabulary",
        ),
        ("paligemma", ("config.json", '"image_token_index": ID', '"image_token_index": 4000'), "4000 is not in a voc"),
        ("qwen2_vl", ("config.json", '"image_token_id": ID', '"image_token_id": 4000'), "the tokenizer lacks a token"),
    ],
)
def test_a_checkpoint_whose_placeholders_do_not_fit(
    name: str, change: tuple[str, str, str], error: str, tmp_path: Path, picture: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model = model_of(name)
    folder = model.save(tmp_path / "model")
    file, old, new = folder / change[0], change[1].replace("ID", str(model.media_id)), change[2]
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new) if old else new)
    told(capsys, folder, picture, "what is it?", error=error)
