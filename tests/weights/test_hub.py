"""From a name to a folder: local folders, shipped models, the Hub's cache without a network, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import polymodal
from polymodal.core.errors import ConfigError
from polymodal.weights import hub
from polymodal.weights.hub import resolve, shipped
from tests.nano import nano

OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return nano("siglip").save(tmp_path / "model")


# ---- without the Hub ----


def test_a_local_folder_is_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(folder) == folder
    assert resolve(str(folder)) == folder
    monkeypatch.chdir(folder.parent)
    assert resolve("model") == Path("model")
    assert resolve("./model") == Path("model")
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve("~/model") == folder


def test_a_file_is_no_checkpoint(folder: Path) -> None:
    with pytest.raises(ConfigError, match="is a file; a checkpoint is a folder"):
        resolve(folder / "model.safetensors")


def test_shipped_models_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, path in shipped().items():
        assert resolve(name) == path
        assert polymodal.load(name).source == name
    package = tmp_path / "package"
    nano("siglip").save(package / "shipped" / "nano-siglip")
    monkeypatch.setattr(hub.resources, "files", lambda _: package)
    assert resolve("polymodal/nano-siglip") == package / "shipped" / "nano-siglip"
    with pytest.raises(ConfigError, match=r"called 'polymodal/nano-sigli' \(there: polymodal/nano-siglip\)"):
        resolve("polymodal/nano-sigli")


@pytest.mark.parametrize("name", ["clip", "a/b/c", "./nothing", "../a/b", "/a/b", "~/nothing", "", "a/"])
def test_names_that_are_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "":  # the folder that one is in
        with pytest.raises(ConfigError, match=r"no config\.json"):
            polymodal.load(name)
        return
    with pytest.raises(ConfigError, match="no such folder, and not a"):
        polymodal.load(name)


# ---- the Hub, without a network: in a process of its own, since the client reads its settings once ----

SCRIPT = """
import json, sys
import polymodal
from polymodal.weights.hub import resolve

name, revision, load = sys.argv[1], sys.argv[2] or None, sys.argv[3]
try:
    print(polymodal.load(name, revision=revision).fingerprint if load else resolve(name, revision))
except polymodal.PolymodalError as error:
    print(f"{type(error).__name__}:", error)
"""


class Cache:
    """A home in which the Hub's client finds its cache, and ours its pins."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.pins = home / "polymodal" / "pins.json"

    def add(self, name: str, commit: str, source: Path, *, branch: str | None = "main") -> Path:
        """A snapshot, laid out as `huggingface_hub` does: blobs, links to them, and a file a branch."""
        repo = self.home / "hub" / f"models--{name.replace('/', '--')}"
        snapshot = repo / "snapshots" / commit
        for file in (path for path in source.rglob("*") if path.is_file()):
            place = file.relative_to(source)
            blob = repo / "blobs" / f"{commit[:4]}-{'-'.join(place.parts)}"
            blob.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(file.read_bytes())
            (snapshot / place).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / place).symlink_to(os.path.relpath(blob, (snapshot / place).parent))
        if branch:
            (repo / "refs").mkdir(exist_ok=True)
            (repo / "refs" / branch).write_text(commit)
        return snapshot

    def pin(self, name: str, commit: str) -> None:
        self.pins.parent.mkdir(parents=True, exist_ok=True)
        self.pins.write_text(json.dumps({name: commit}))

    def run(self, name: str, revision: str = "", *, load: bool = False, **settings: str) -> str:
        environment = os.environ | {
            "HF_HOME": str(self.home),
            "POLYMODAL_CACHE": str(self.pins.parent),
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, "-c", SCRIPT, name, revision, "load" if load else ""]
        done = subprocess.run(command, env=environment | settings, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "home")


UNREACHABLE = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}


@pytest.mark.parametrize("settings", [{}, UNREACHABLE], ids=["offline mode", "no network"])
def test_without_a_network_one_is_told_what_to_do(cache: Cache, settings: dict[str, str]) -> None:
    text = cache.run("openai/clip-vit-base-patch32", **settings)
    assert text.startswith("ConfigError: openai/clip-vit-base-patch32: the Hub cannot be reached and revision main")
    assert "give the path of a local folder" in text
    assert not cache.pins.exists()


def test_a_cached_model_loads_and_is_pinned(cache: Cache, folder: Path) -> None:
    snapshot = cache.add("owner/model", NEW, folder)
    assert cache.run("owner/model", load=True) == polymodal.load(folder).fingerprint
    assert json.loads(cache.pins.read_text()) == {"owner/model": NEW}
    assert cache.run("owner/model", **UNREACHABLE) == str(snapshot)


def test_a_cached_pipeline_loads_and_is_pinned(cache: Cache, tmp_path: Path) -> None:
    folder = nano("stable_diffusion").save(tmp_path / "model")
    snapshot = cache.add("owner/model", NEW, folder)
    fingerprint = polymodal.load(folder).fingerprint
    assert cache.run("owner/model", load=True) == fingerprint
    assert json.loads(cache.pins.read_text()) == {"owner/model": NEW}
    assert cache.run("owner/model", load=True, **UNREACHABLE) == fingerprint
    assert cache.run("owner/model") == str(snapshot)


def test_a_pin_holds_when_the_branch_moves_on_and_a_revision_overrides_it(cache: Cache, folder: Path) -> None:
    old = cache.add("owner/model", OLD, folder, branch=None)
    new = cache.add("owner/model", NEW, folder)
    cache.pin("owner/model", OLD)
    assert cache.run("owner/model") == str(old)
    assert cache.run("owner/model", "main") == str(new)
    assert json.loads(cache.pins.read_text()) == {"owner/model": NEW}
    assert cache.run("owner/model", OLD) == str(old)
    assert json.loads(cache.pins.read_text()) == {"owner/model": NEW}  # only "main" moves a pin
    assert [p.name for p in cache.pins.parent.iterdir()] == ["pins.json"], "written whole, under a name of its own"


def test_other_pins_are_kept(cache: Cache, folder: Path) -> None:
    cache.add("owner/model", NEW, folder)
    cache.pin("other/model", OLD)
    cache.run("owner/model")
    assert json.loads(cache.pins.read_text()) == {"other/model": OLD, "owner/model": NEW}


def test_a_pin_that_is_not_cached_is_named(cache: Cache, folder: Path) -> None:
    cache.add("owner/model", NEW, folder)
    cache.pin("owner/model", OLD)
    assert f"revision {OLD} is not in the local cache" in cache.run("owner/model")


@pytest.mark.parametrize("content", ["{", "[]", "7"])
def test_broken_pins_are_named(cache: Cache, folder: Path, content: str) -> None:
    cache.add("owner/model", NEW, folder)
    cache.pin("owner/model", OLD)
    cache.pins.write_text(content)
    text = cache.run("owner/model")
    assert text.startswith("ConfigError")
    assert "pins.json" in text


def test_a_name_that_the_hub_does_not_allow(cache: Cache) -> None:
    assert "not a name that the Hub allows" in cache.run("owner/mo del!")


def test_a_half_downloaded_model_is_refused(cache: Cache, folder: Path) -> None:
    snapshot = cache.add("owner/model", NEW, folder)
    (snapshot / "model.safetensors").unlink()
    text = cache.run("owner/model", load=True)
    assert "no model.safetensors" in text or "is not in the local cache" in text


# ---- the real Hub ----


@pytest.mark.network
def test_the_hub_gives_a_model_and_only_what_is_needed(cache: Cache) -> None:
    folder = Path(cache.run("hf-internal-testing/tiny-random-CLIPModel", HF_HUB_OFFLINE="0"))
    assert (folder / "config.json").is_file()
    assert not [p for p in folder.rglob("*") if p.suffix in (".bin", ".py", ".h5", ".msgpack")]
    assert list(json.loads(cache.pins.read_text()).values()) == [folder.name]


@pytest.mark.network
def test_the_hub_has_no_such_model_or_revision(cache: Cache) -> None:
    assert "no model of this name" in cache.run("hf-internal-testing/there-is-no-such-model", HF_HUB_OFFLINE="0")
    text = cache.run("hf-internal-testing/tiny-random-CLIPModel", "f" * 40, HF_HUB_OFFLINE="0")
    assert "the Hub has no revision" in text
