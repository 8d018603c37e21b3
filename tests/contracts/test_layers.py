"""Imports run one way, wherever in a file they stand (functions, ``TYPE_CHECKING`` and ``import_module`` included)."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "polymodal"
PARTS = ("modalities", "encoders", "tokenizers", "connectors", "backbones", "heads")

# What the files of each folder may import from, beside their own folder.
ALLOWED: dict[str, set[str]] = {
    "core": set(),
    "nn": {"core"},
    **{part: {"core", "nn"} for part in PARTS},
    # Several systems share a tower or a backbone, and with it how the Hub writes its config and names its weights.
    "encoders": {"core", "nn", "weights"},
    "backbones": {"core", "nn", "weights"},
    "samplers": {"core", "nn"},
    "weights": {"core", "nn"},
    "data": {"core", "nn", "modalities", "tokenizers"},
    "systems": {"core", "nn", *PARTS, "samplers", "weights"},  # a policy samples its actions inside `act`
    "train": {"core", "data", "samplers"},  # rewards are of what a model writes
    "evaluate": {"core", "nn"},
    "retrieve": {"core", "modalities"},
    "act": {"core", "modalities"},
    "serve": {"core", "nn", "samplers"},
}
# The command line stands above everything, and nothing but its own door knows it.
TOP, DOOR = "cli", "__main__.py"
# Files of systems/ that are no systems, but what several of them share.
SHARED = {
    "base", "generator", "tower", "qwen_vl", "reader", "crossed", "seq2seq", "prefix", "fused", "acting", "speaking",
    "chunk_heads", "token_head", "lerobot", "listening", "windows", "whisper_files", "wav2vec2_files", "clap_files",
    "expert_policy", "expert_files", "codec", "seanet_codec", "picture_codec", "vqgan_files", "chameleon_files",
    "picture_writing", "painting", "scheduler_files", "vae_files", "latent_painting", "stable_diffusion_files",
    "flow_painter", "flow_files", "exact", "filming", "imagining", "unified",
}  # fmt: skip
# Oracles of the tests: never needed at run time.
ORACLES = {"transformers", "diffusers", "peft", "timm", "open_clip", "skimage", "accelerate"}
# The certificate runs the reference implementation where it is installed, and only inside a function.
MAY_IMPORT_ORACLES = {"weights/verify.py", "verify.py"}
OPTIONAL = (
    "lancedb", "pyarrow", "cairosvg", "cairocffi", "matplotlib", "av", "soundfile", "soxr", "llguidance",
    "gymnasium", "mujoco", "metaworld", "minigrid", "miniwob", "playwright", "websockets", "msgpack", "scipy",
    *sorted(ORACLES),
)  # fmt: skip


def imports(path: Path, package: list[str]) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a file imports; ``package`` is the dotted package that holds it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def violations(source: Path) -> list[str]:
    """Every import under ``source`` (a folder called polymodal) that the table does not allow."""
    found = []
    for path in sorted(source.rglob("*.py")):
        relative = path.relative_to(source)
        where = relative.as_posix()
        folder = relative.parts[0] if len(relative.parts) > 1 else None
        if folder not in (None, TOP, *ALLOWED):
            found.append(f"{where}: the folder {folder} has no line in the table of layers")
            continue
        for line, name in imports(path, ["polymodal", *relative.parts[:-1]]):
            words = name.split(".")
            if words[0] in ORACLES and where not in MAY_IMPORT_ORACLES:
                found.append(f"{where}:{line} imports {words[0]}, which only tests may need")
            target = words[1] if len(words) > 1 else ""
            if words[0] != "polymodal" or folder == TOP or target == "__version__":
                continue
            if folder is None:
                if target == TOP and where != DOOR:
                    found.append(f"{where}:{line} imports {name}: nothing may know the command line")
            elif target not in ALLOWED:
                found.append(f"{where}:{line} imports {name}: a part must not know the top of the package")
            elif target != folder and target not in ALLOWED[folder]:
                found.append(f"{where}:{line} imports {name}: {folder} may not know {target}")
            elif folder == target == "systems" and where != "systems/__init__.py":
                other = words[2] if len(words) > 2 else ""
                if (source / "systems" / f"{other}.py").exists() and other not in SHARED | {relative.stem}:
                    found.append(f"{where}:{line} imports {name}: a system never knows another system")
    return found


def test_layers() -> None:
    assert violations(SOURCE) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("core/a.py", "from polymodal.nn.mlp import MLP"),
        ("core/a.py", "def f():\n    import polymodal.weights.rules"),
        ("nn/a.py", "from polymodal import encoders"),
        ("nn/a.py", "from ..encoders import vit"),
        ("encoders/a.py", "from polymodal.heads.contrastive import loss"),
        ("encoders/a.py", "if TYPE_CHECKING:\n    from polymodal.systems.clip import CLIP"),
        ("samplers/a.py", "import polymodal.backbones.decoder as d"),
        ("weights/a.py", "from polymodal.systems import TABLE"),
        ("train/a.py", "from polymodal.systems.clip import CLIP"),
        ("train/a.py", "import importlib\nimportlib.import_module('polymodal.systems.clip')"),
        ("evaluate/a.py", "from polymodal import load"),
        ("retrieve/a.py", "import polymodal"),
        ("systems/a.py", "from polymodal.systems.b import B"),
        ("systems/a.py", "from polymodal.systems import b"),
        ("systems/a.py", "from .b import B"),
        ("systems/a.py", "from polymodal.train.loop import fit"),
        ("systems/a.py", "from transformers import CLIPModel"),
        ("newfolder/a.py", ""),
        ("serve/a.py", "from polymodal.cli.show import plain"),
        ("api.py", "from polymodal.cli import main"),
    ],
)
def test_planted_violation_is_found(file: str, line: str, tmp_path: Path) -> None:
    source = tmp_path / "polymodal"
    for name in (file, "systems/b.py"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("")
    (source / file).write_text(line)
    (problem,) = violations(source)
    assert problem.startswith(file)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("core/a.py", "from polymodal.core.errors import ConfigError\nfrom polymodal import __version__\nimport torch"),
        ("encoders/a.py", "from polymodal.encoders.vit import ViT\nfrom ..nn import mlp"),
        ("systems/a.py", "from polymodal.systems.base import System\nfrom polymodal.weights.rules import copy"),
        ("systems/__init__.py", "from polymodal.systems.b import B"),
        ("cli/a.py", "from polymodal.retrieve.index import Index\nfrom polymodal.systems.b import B"),
        ("cli/a.py", "from polymodal.api import load\nfrom polymodal.cli.show import plain"),
        ("api.py", "from polymodal.systems.b import B"),
        ("__main__.py", "from polymodal.cli import main"),
    ],
)
def test_allowed_imports_pass(file: str, line: str, tmp_path: Path) -> None:
    source = tmp_path / "polymodal"
    for name in (file, "systems/b.py", "systems/base.py"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("")
    (source / file).write_text(line)
    assert violations(source) == []


def test_every_module_imports_with_the_core_dependencies_alone() -> None:
    """Extras are imported inside the functions that need them, so a missing one breaks one verb and not the package.

    An environment is a subclass of what its simulator gives; `act.envs` imports it when it is asked for.
    """
    modules = [
        ".".join(("polymodal", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
        for path in sorted(SOURCE.rglob("*.py"))
        if path.name != "__main__.py" and (path.name == "__init__.py" or path.parent != SOURCE / "act" / "envs")
    ]
    script = (
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({OPTIONAL!r}))\n"  # None in sys.modules makes an import fail
        f"for name in {modules!r}:\n    importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
