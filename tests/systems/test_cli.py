"""The command line teaches, answers in tables or JSON, and tells what is wrong in one message."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from safetensors import safe_open

from polymodal.cli import _parser, main
from polymodal.core.errors import ConfigError
from polymodal.encoders.text import TextConfig
from polymodal.encoders.vit import ViTConfig
from polymodal.systems import TABLE
from polymodal.systems.clip import CLIP, CLIPConfig
from polymodal.tokenizers.text import TextTokenizer
from polymodal.weights.hub import shipped

COMMANDS = [
    "index",
    "search",
    "classify",
    "embed",
    "train",
    "ls",
    "verify",
    "demo",
    "ask",
    "caption",
    "chat",
    "evaluate",
    "plan",
    "record",
    "act",
    "imagine",
    "serve-policy",
    "transcribe",
    "listen",
    "music",
    "speak",
    "consent",
    "detect-watermark",
    "draw",
    "show",
    "film",
]
POLYMODAL = [sys.executable, "-m", "polymodal"]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A CLIP of random weights on disk: it knows no words, but a picture finds itself."""
    torch.manual_seed(0)
    words = TextTokenizer.train_bpe(["a red fruit", "a dog on the beach"], 530, length=32)
    config = CLIPConfig(
        vision=ViTConfig(
            image_size=32, patch_size=8, dim=32, num_layers=2, num_heads=2, hidden_dim=64, norm_eps=1e-5,
            activation="quick_gelu", patch_bias=False, pre_norm=True,
        ),
        text=TextConfig(
            vocab_size=words.vocab_size, context=32, dim=32, num_layers=2, num_heads=2, hidden_dim=64,
            activation="quick_gelu",
        ),
        embed_dim=24, eot_id=words.vocab_size - 1,
    )  # fmt: skip
    clip = CLIP.build(config)
    clip.tokenizer = words
    return str(clip.save(tmp_path_factory.mktemp("models") / "clip"))


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in, with an index of its own."""
    monkeypatch.setenv("POLYMODAL_INDEX", str(tmp_path / "index"))
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def draw(folder: Path, count: int, side: int = 40) -> Path:
    rng = np.random.default_rng(1)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        blocks = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        PILImage.fromarray(blocks).resize((side, side), PILImage.Resampling.NEAREST).save(folder / f"{i}.png")
    return folder


Run = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process; gives what it printed."""

    def call(*arguments: str, code: int = 0, error: str = "") -> str:
        capsys.readouterr()
        assert main(arguments) == code
        out, err = capsys.readouterr()
        assert re.search(error, err) if error else not err
        return out

    return call


# ---- help ----


def test_help_is_light() -> None:
    script = (
        "import sys\nfrom polymodal.cli import main\ntry: main(['search', '--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'numpy', 'PIL', 'rich', 'lancedb', 'pyarrow', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def help_of(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys)
    assert all(re.search(rf"^ +{name}\s", text, re.MULTILINE) for name in COMMANDS)
    assert "{" + ",".join(COMMANDS) + "}" not in text


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_teaches_with_examples_that_parse(capsys: pytest.CaptureFixture[str], command: str) -> None:
    text = help_of(capsys, command)
    examples = re.findall(r"^ {2}polymodal (.+?)(?: {2,}.*)?$", text.split("examples:")[1], re.MULTILINE)
    assert len(examples) >= 2
    for example in examples:
        assert _parser().parse_args(shlex.split(example)).run.__name__ == f"_{command.replace('-', '_')}"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nothing"],
        ["search"],
        ["search", "a", "--image", "b.png"],
        ["search", "a", "--top", "0"],
        ["search", "a", "--top", "x"],
        ["classify", "a.png"],
        ["index", "--unknown"],
    ],
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage: polymodal" in capsys.readouterr().err


# ---- index and search ----


def test_index_then_search(run: Run, model: str, place: Path) -> None:
    draw(place / "p", 5)
    (place / "p/broken.png").write_text("no picture")
    out = run("index", "p", "--model", model)
    assert "5 pictures in" in out
    assert "5 added" in out
    assert "1 could not be indexed" in out
    assert "broken.png: not a picture" in out
    assert "5 unchanged" in run("index"), "the folder and the model are remembered"
    report = json.loads(run("index", "--json"))
    assert (report["unchanged"], report["pictures"]) == (5, 5)
    assert report["failed"][0][0] == str(place / "p/broken.png")

    found = json.loads(run("search", "--image", "p/3.png", "--top", "2", "--json", "--html", "page.html"))
    assert found["model"] == model
    best, second = found["hits"]
    assert best["path"] == str(place / "p/3.png")
    assert best["score"] == pytest.approx(1, abs=1e-3)
    assert second["score"] < best["score"]
    assert (best["width"], best["height"], best["time"]) == (40, 40, None)
    page = (place / "page.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 3, "two hits and the picture that was asked with"

    table = run("search", "a red fruit", "--filter", 'path~"3.png" or width>40')
    assert {Path(word).name for word in table.split() if word.endswith(".png")} == {"3.png"}
    assert str(place) not in table, "files below the current folder are shown from there"


def test_search_tells_what_is_missing_before_it_loads_anything(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("search", "x", code=1, error="there is no index at .*; make one: polymodal index DIR")
    run("index", code=1, error="say which folders")
    run("index", "nowhere", code=1, error="nowhere does not exist")
    (place / "index").mkdir()
    meta = {"format": 1, "model": "nobody/nothing", "fingerprint": "f", "dim": 3, "roots": []}
    (place / "index/index.json").write_text(json.dumps(meta))
    run("search", "x", "--filter", "widht>3", code=1, error="(?s)Did you mean 'width'.*A filter is written so")


def test_another_model_is_refused_and_rebuild_keeps_the_folders(run: Run, model: str, place: Path) -> None:
    for name in "ab":
        draw(place / name, 3)
    run("index", "a", "b", "--model", model)
    torch.manual_seed(1)
    other = CLIP.from_folder(Path(model), "hf")
    other.init_weights()
    name = str(other.save(place / "other"))
    run("index", "--model", name, code=1, error=f"polymodal index .*{place}/a .*--rebuild")
    run("search", "x", "--model", name, code=1, error="--rebuild")
    assert "6 added" in run("index", "a", "--model", name, "--rebuild")
    assert json.loads(run("search", "x", "--json"))["model"] == name


def test_rebuild_never_forgets_folders_in_silence(run: Run, model: str, place: Path) -> None:
    for name in "ab":
        draw(place / name, 2)
    run("index", "a", "b", "--model", model)
    (place / "b").rename(place / "unplugged")
    run("index", "--rebuild", code=1, error=f"not there now: {place}/b.*polymodal index DIR --rebuild")
    assert json.loads(run("index", "a", "--json"))["pictures"] == 4
    assert "2 added" in run("index", "a", "--rebuild")

    meta = json.loads((place / "index/index.json").read_text())
    (place / "index/index.json").write_text(json.dumps({**meta, "format": 99}))
    run("index", "--rebuild", code=1, error="say which folders: polymodal index DIR --rebuild")
    assert (place / "index/tables").is_dir()
    assert "2 added" in run("index", "a", "--model", model, "--rebuild")


def test_a_terminal_obeys_no_file_name(run: Run, model: str, place: Path) -> None:
    draw(place / "p", 1)
    (place / "p/0.png").rename(place / "p/\x1b[31m[red]x\u202e.png")
    (place / "p/\x1b]0;t\x07.png").write_text("broken")
    out = run("index", "p", "--model", model) + run("search", "--image", "p/\x1b[31m[red]x\u202e.png")
    assert not {"\x1b", "\x07", "\u202e"} & set(out)
    assert "\\x1b[31m[red]x\\u202e.png" in out


def test_ctrl_c_loses_nothing(model: str, place: Path) -> None:
    (source,) = draw(place / "p", 1, side=1500).iterdir()
    for i in range(1, 150):
        (place / f"p/{i}.png").write_bytes(source.read_bytes())
    command = [*POLYMODAL, "index", "p", "--model", model, "--workers", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (place / "index/index.json").exists():
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert err.strip() == "polymodal: interrupted; nothing is lost, run the same command again"
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert report["added"] + report["unchanged"] == report["pictures"] == 150


# ---- the others ----


def test_classify(run: Run, model: str, place: Path) -> None:
    draw(place / "p", 2)
    arguments = ["classify", "p/0.png", "p/1.png", "--labels", "cat, dog,horse", "--model", model]
    rows = json.loads(run(*arguments, "--json"))
    assert [row["path"] for row in rows] == ["p/0.png", "p/1.png"]
    for row in rows:
        shares = [label["probability"] for label in row["labels"]]
        assert sorted(label["label"] for label in row["labels"]) == ["cat", "dog", "horse"]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(1, abs=1e-5)
    assert json.loads(run(*arguments, "--json", "--calibrate")) != rows
    assert json.loads(run(*arguments, "--json", "--template", "no {}")) != rows
    table = run(*arguments)
    assert re.search(r"p/0.png +(cat|dog|horse) \d+ %", table)
    run("classify", "p/0.png", "--labels", "cat", "--model", model, code=1, error="two different labels")
    run("classify", "p/9.png", "--labels", "a,b", "--model", model, code=1, error="p/9.png")
    run(*arguments, "--template", "none", code=1, error="{} once")


def test_embed_writes_the_same_vectors_everywhere(run: Run, model: str, place: Path) -> None:
    draw(place / "p", 3)
    files = ["p/0.png", "p/1.png", "p/2.png"]
    rows = json.loads(run("embed", *files, "--json", "--model", model))
    assert [row["path"] for row in rows] == files
    vectors = np.array([row["vector"] for row in rows], np.float32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-3)
    assert "3 vectors of 24" in run("embed", *files, "--out", "v.npy", "--model", model)
    np.testing.assert_array_equal(np.load("v.npy"), vectors)
    run("embed", *files, "--out", "v.safetensors", "--model", model)
    with safe_open("v.safetensors", "np") as file:
        np.testing.assert_array_equal(file.get_tensor("vectors"), vectors)
        assert json.loads(file.metadata()["paths"]) == files
    run("embed", *files, code=1, error="--out")
    run("embed", *files, "--out", "v.pt", code=1, error=r"\.npy or \.safetensors")
    (place / "p/0.png").write_text("broken")
    run("embed", *files, "--out", "new.npy", "--model", model, code=1, error="p/0.png")
    assert not (place / "new.npy").exists()


def test_ls(run: Run) -> None:
    listed = json.loads(run("ls", "--json"))
    assert [row["name"] for row in listed["systems"]] == list(TABLE)
    assert listed["shipped"] == {name: str(path) for name, path in shipped().items()}
    table = run("ls")
    assert all(name in table for name in TABLE)
    assert "openai/clip-vit-base-patch32" in run("ls", "clip")
    run("ls", "clipp", code=1, error="Did you mean 'clip'")


def test_verify(run: Run, model: str) -> None:
    assert "clip" in run("verify", model).lower()
    run("verify", "nothing-there", code=1, error="nothing-there")


RECIPE = """
import numpy as np, torch
from torch import nn
from polymodal.core.batch import Batch, Loss
from polymodal.train import Bar, Header, Run, Stage

class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(1, 1))
    def loss(self, batch):
        error = (batch["x"] @ self.slope - 2 * batch["x"]).square()
        return Loss(total=error.sum(), weight=len(error))
    def after_step(self, step, total_steps): ...
    def no_decay(self): return ()
    def blocks(self): return iter(())

class Source:
    def __len__(self): return 64
    def batch(self, indices, rng): return Batch(x=torch.from_numpy(rng.standard_normal((len(indices), 1), np.float32)))

def run():
    return Run(
        name="line", header=Header(command="", machine="", time="", expected=""), model=Line,
        stages=[Stage(name="only", steps=20, batch_size=16, source=Source, lr=0.3, workers=0)],
        evaluate=lambda model: {"slope": float(model.slope)}, expect={"slope": Bar(value=BAR)},
    )
"""


@pytest.mark.parametrize(("bar", "code"), [(1.0, 0), (50.0, 1)])
def test_train_ends_by_the_bar_of_the_recipe(
    place: Path, capsys: pytest.CaptureFixture[str], bar: float, code: int
) -> None:
    (place / "recipe.py").write_text(RECIPE.replace("BAR", str(bar)))
    assert main(["train", "recipe.py", "--device", "cpu"]) == code
    out, err = capsys.readouterr()
    assert "line: step 20 of 20" in out
    assert (place / "runs/line/curve.png").is_file()
    assert ("below the bar: slope" in err) == bool(code)


# ---- errors ----


def test_an_error_is_one_message_and_debug_shows_all(run: Run) -> None:
    run("embed", "a.png", code=1, error=r"\Apolymodal: say where the vectors go[^\n]*\n\Z")
    with pytest.raises(ConfigError):
        main(["embed", "a.png", "--debug"])


def test_what_the_system_refuses_is_one_message(run: Run, model: str, place: Path) -> None:
    draw(place, 1)
    command = ["embed", "0.png", "--model", model, "--out", "0.png/v.npy"]
    run(*command, code=1, error=r"\Apolymodal: cannot be written \(0\.png is no folder\): 0\.png/v\.npy\n\Z")
    with pytest.raises(OSError, match=r"0\.png"):
        main([*command, "--debug"])


def test_a_bug_is_not_dressed_up_as_the_users_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polymodal.cli.models._ls", lambda arguments: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        main(["ls"])


def test_a_closed_pipe_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*POLYMODAL, "ls", "--json"], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert done.returncode == 128 + signal.SIGPIPE
    assert done.stderr == ""


# ---- the demo ----


@pytest.mark.slow
@pytest.mark.skipif("polymodal/nano-clip" not in shipped(), reason="no model is shipped yet")
def test_demo(place: Path) -> None:
    for again in (False, True):
        done = subprocess.run([*POLYMODAL, "demo"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("never seen in training") >= 5
        assert (" 0 indexed now" in done.stdout) == again
        assert (place / "demo/search.html").stat().st_size > 20_000
    # The README's second command: the model that searches is the one that indexed.
    done = subprocess.run(
        [*POLYMODAL, "search", "umbrella", "--index", "demo/index"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "umbrella" in done.stdout
