"""Filming from Python and by the commands film and show: files, their settings, their mark, and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from torch import Tensor, nn

import polymodal
from polymodal.cli import main
from polymodal.core.drawing import Glimpse
from polymodal.core.errors import ConfigError, MediaError, UnsupportedError
from polymodal.core.filming import Filming, SettledFilm
from polymodal.core.sample import Video
from polymodal.core.verbs import Films, verbs_of
from polymodal.films import settings_of
from polymodal.modalities.film import box, boxes, film
from polymodal.modalities.generated import read_settings, source_type
from polymodal.modalities.video import decode
from polymodal.nn.precision import cast
from polymodal.systems.filming import FilmMaker
from polymodal.systems.stable_video import StableVideo
from polymodal.systems.vit import VisionTransformer
from tests.nano import nano, shaken


class Toy(FilmMaker):
    """Goes from the picture, or from grey, to the seed's shade."""

    size, multiple, frames, motion, steps = (16, 8), 8, 3, 50, 4

    def __init__(self) -> None:
        super().__init__(None)
        self.weight = nn.Parameter(torch.zeros(1, 1))

    def check_frames(self, frames: int) -> None:
        if frames > 20:
            raise ConfigError("too long")

    def made(
        self,
        prompt: str,
        settled: SettledFilm,
        image: Tensor | None,
        watch: Callable[[int, Callable[[], Tensor]], None],
    ) -> Tensor:
        assert not self.training
        width, height = settled.size
        first = torch.zeros(1, 3, height, width) if image is None else image
        shade = settled.seed % 10 / 5 - 1 + len(prompt) / 100
        film = torch.cat([first + (shade - first) * n / settled.frames for n in range(settled.frames)])
        for step in range(1, settled.steps + 1):
            watch(step, lambda: film)
        return film


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polymodal.cli.film.load_model", lambda name: Toy())


def picture(name: str = "first.png", size: tuple[int, int] = (30, 20)) -> str:
    PILImage.new("RGB", size, (250, 20, 20)).save(name)
    return name


def test_films_say_how_they_were_made() -> None:
    steps: list[Glimpse] = []
    made = polymodal.film(Toy().train(), "red", Filming(seed=7, fps=5), watch=steps.append)
    assert made.frames.shape == (3, 8, 16, 3)
    assert [(g.step, g.steps, g.pictures().shape[0]) for g in steps] == [(n, 4, 3) for n in range(1, 5)]
    made.save("one.mp4")
    assert settings_of("one.mp4") == made.made
    assert source_type("one.mp4") == "trainedAlgorithmicMedia"
    m = made.made
    assert (m.prompt, m.motion, m.fps, m.frames, m.width, m.height) == ("red", 50, 5, 3, 16, 8)
    seen = np.stack([picture for _, picture in decode(Video("one.mp4"), (0.0, 0.2, 0.4))])
    assert seen.shape == (3, 8, 16, 3)
    assert abs(seen.astype(int) - made.frames).mean() < 4  # H.264 is lossy
    begun = polymodal.film(Toy(), image=picture(), filming=Filming(seed=1, size=(24, 16)))
    assert begun.frames[0, 0, 0].tolist() == [250, 20, 20]
    begun.save("two.mp4")
    assert source_type("two.mp4") == "compositeWithTrainedAlgorithmicMedia"
    wide = PILImage.new("RGB", (90, 20), "red")
    wide.paste((250, 20, 20), (15, 0, 75, 20))
    assert (polymodal.film(Toy(), image=wide, filming=Filming(size=(24, 16))).frames[0] == [250, 20, 20]).all()
    assert "first.png (sha256" in str(settings_of("two.mp4").image)


def test_what_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="makes no films"):
        polymodal.film(nano("vit"), "a cat")
    for wrong in ({"frames": 0}, {"fps": 1000}, {"motion": 256}, {"steps": 0}, {"seed": -1}, {"size": (0, 4)}):
        with pytest.raises(ConfigError):
            Filming(**wrong)
    with pytest.raises(ConfigError, match="16 x 8 is near"):
        polymodal.film(Toy(), "a", Filming(size=(17, 8)))
    with pytest.raises(ConfigError, match="too long"):
        polymodal.film(Toy(), "a", Filming(frames=21))
    with pytest.raises(MediaError, match="no text"):
        polymodal.film(Toy(), "a\x00")
    made = polymodal.film(Toy(), "a")
    with pytest.raises(MediaError, match=r"\.mp4"):
        made.save("a.gif")
    with pytest.raises(MediaError, match="no frames"):
        replace(made, frames=made.frames[:0]).save("a.mp4")
    assert not Path("a.mp4").exists()  # whole or not at all
    assert "film" in verbs_of(StableVideo)
    assert isinstance(Toy(), Films)
    assert not issubclass(VisionTransformer, Films)


@pytest.mark.usefixtures("command")
def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["film", "A red: cat!", "--model", "toy", "--seed", "3", "--frames", "4", "--motion", "9"]) == 0
    assert "a-red-cat.mp4: 4 frames of 16 x 8 at 8 a second, seed 3" in capsys.readouterr().out
    assert main(["film", "--model", "toy", "--image", picture(), "--out", "b.mp4", "--size", "24x16", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"path": "b.mp4", **asdict(settings_of("b.mp4"))}
    assert main(["show", "a-red-cat.mp4", "b.mp4"]) == 0
    out = capsys.readouterr().out
    assert "a-red-cat.mp4: trainedAlgorithmicMedia" in out
    assert "motion    9" in out
    assert main(["show", "b.mp4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["pictures"][0]["width"] == 24
    first = Path("a-red-cat.mp4").read_bytes()
    assert main(["film", "A red: cat!", "--model", "toy", "--seed", "4"]) == 0
    assert "a-red-cat-4.mp4: " in capsys.readouterr().out
    assert Path("a-red-cat.mp4").read_bytes() == first
    assert main(["film", "--model", "toy"]) == 1
    assert main(["film", "cat", "--model", "toy", "--out", "cat.png"]) == 1
    assert not Path("cat.png").exists()


def test_what_cannot_be_written_is_told_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("polymodal.cli.film.load_model", lambda name: pytest.fail("loaded"))
    Path("file").touch()
    Path("folder.mp4").mkdir()
    for out in ("file/a.mp4", "file/b/a.mp4", "folder.mp4", "a.gif"):
        assert main(["film", "cat", "--model", "toy", "--out", out]) == 1
        assert out in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "av", None)
    assert main(["film", "cat", "--model", "toy", "--out", "new/a.mp4"]) == 1
    assert "polymodal[video]" in capsys.readouterr().err
    assert not Path("new").exists()


def test_odd_sides_are_filled_up() -> None:
    with film("odd.mp4", 4) as out:
        out.add(PILImage.new("RGB", (15, 17), "white"))
    ((_, picture),) = decode(Video("odd.mp4"), (0.0,))
    assert picture.shape == (18, 16, 3)
    assert picture[:16, :14].min() > 200
    for fps in (0, -1, float("nan"), float("inf")):
        with pytest.raises(MediaError, match="frames a second"), film("slow.mp4", fps):
            pass
    assert not Path("slow.mp4").exists()


def test_broken_files() -> None:
    polymodal.film(Toy(), "a cat", Filming(seed=1)).save("a.mp4")
    whole = Path("a.mp4").read_bytes()
    for name, content, message in (
        ("cut.mp4", whole[:-10], "broken or cut off"),
        ("bare.mp4", whole[: whole.rindex(b"uuid", 0, whole.index(b"polymodal.made")) - 4], "says nothing"),
        ("other.mp4", whole.replace(b'"seed": 1', b'"seed": "'), "broken"),
        ("more.mp4", whole.replace(b'"seed"', b'"sead"'), "not of this version"),
        ("empty.mp4", b"", "says nothing"),
        ("tiny.mp4", b"\0\0\0\x04ftyp", "broken"),
    ):
        Path(name).write_bytes(content)
        with pytest.raises(MediaError, match=message):
            settings_of(name)
    with pytest.raises(MediaError):
        read_settings("missing.mp4")
    PILImage.new("RGB", (4, 4)).save("plain.png")
    assert boxes("plain.png") is None
    with film("mine.mp4", 4, tail=box(b"0123456789abcdef", b"hello")) as out:
        out.add(PILImage.new("RGB", (16, 16)))
    assert boxes("mine.mp4") == {b"0123456789abcdef": b"hello"}
    assert source_type("mine.mp4") is None


@pytest.mark.proves("stable_video", "films: a seed gives the same film; in bf16 as in fp32, but for rounding")
def test_a_seed_gives_the_same_film() -> None:
    model = shaken(nano("stable_video"), 0.1).eval()
    assert isinstance(model, StableVideo)
    image = torch.from_numpy(np.random.default_rng(0).random((3, 18, 32), np.float32))
    filming = Filming(seed=3, steps=2)
    made = model.film("", filming, image=image)
    assert made.shape == (2, 3, 18, 32)
    assert torch.equal(made, model.film("", filming, image=image))
    for other in (Filming(seed=4, steps=2), replace(filming, motion=9), replace(filming, guidance=9)):
        assert not torch.equal(made, model.film("", other, image=image))
    cast(model, "bf16")
    assert (model.film("", filming, image=image) - made).abs().max() < 0.1 < 5 * made.std()
