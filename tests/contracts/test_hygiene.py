"""What must not be in the tree: large files, paths of one machine, package hosts, and ways to run foreign code."""

from __future__ import annotations

import ast
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_BYTES = 1_000_000
# Files above the limit, each with the reason why it is in the tree.
LARGE = {
    "src/polymodal/shipped/nano-clip/model.safetensors": "the shipped model (8 MB): without it nothing works offline",
    "src/polymodal/shipped/nano-vlm/model.safetensors": "the shipped model that answers (3 MB): `ask` works offline",
    "src/polymodal/shipped/nano-encodec/model.safetensors": "the shipped codec (3 MB): recipes write its codes offline",
    "src/polymodal/shipped/nano-pick-place/model.safetensors": "the shipped policy (2 MB): `act` works offline",
}

# Written in pieces, so that this file does not find itself.
MACHINE_PATHS = re.compile(
    r"(?<![\w.:/~-])/(?:" + "|".join(["home", "root", "Users", "work", "tmp", "mnt", "scratch"]) + r")/\w"
)
PACKAGE_HOSTS = re.compile(
    "|".join(
        [
            "pypi" + r"\.org",
            "pythonhosted" + r"\.org",
            r"download\.py" + r"torch\.org",
            "conda" + r"\.(?:org|anaconda)",
            "--extra" + "-index-url",
            "--index" + "-url",
        ]
    )
)


def tracked() -> list[Path]:
    """The files of the tree that git tracks or would, or all but the ignored folders where there is no git."""
    if (ROOT / ".git").exists():
        listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        out = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        names = [name for name in out.split("\0") if name]
    else:
        left_out = {"build", "dist", "demo", "runs", "__pycache__"}
        names = []
        for folder, inside, found in os.walk(ROOT):
            inside[:] = [d for d in inside if d not in left_out and (d == ".ci" or not d.startswith("."))]
            names += [os.path.relpath(os.path.join(folder, name), ROOT) for name in found]
    return [ROOT / name for name in sorted(names) if (ROOT / name).is_file()]


def texts() -> Iterator[tuple[str, str]]:
    """(name, text) of the tracked files that are text."""
    for path in tracked():
        raw = path.read_bytes()
        if b"\0" not in raw[:8192]:
            yield path.relative_to(ROOT).as_posix(), raw.decode("utf-8")


def test_files_are_small() -> None:
    large = {p.relative_to(ROOT).as_posix() for p in tracked() if p.stat().st_size > MAX_BYTES}
    assert large == set(LARGE), "large files need a line with a reason in LARGE, and each line its file"
    assert all(len(reason.split()) >= 3 for reason in LARGE.values())


def test_no_paths_of_a_machine_and_no_package_hosts() -> None:
    found = [
        f"{name}:{number}: {match[0]}"
        for name, text in texts()
        for number, line in enumerate(text.splitlines(), 1)
        for pattern in (MACHINE_PATHS, PACKAGE_HOSTS)
        if (match := pattern.search(line))
    ]
    assert found == []


def test_text_ends_with_a_newline_and_has_no_carriage_return() -> None:
    assert [name for name, text in texts() if text and (not text.endswith("\n") or "\r" in text)] == []


def unsafe(tree: ast.Module) -> Iterator[str]:
    """Ways to run foreign code or to load half a checkpoint."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names.append(node.module or "")
            for name in {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"} & set(names):
                yield f"line {node.lineno}: import {name}"
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in {"torch.load", "torch.save", "eval", "exec", "torch.hub.load", "os.system", "yaml.load"}:
            yield f"line {node.lineno}: {name}()"
        for keyword in node.keywords:
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            if (keyword.arg, value) in {("strict", False), ("weights_only", False)} and name != "zip":
                yield f"line {node.lineno}: {name}({keyword.arg}=False)"
            if (keyword.arg, value) in {("allow_pickle", True), ("trust_remote_code", True), ("shell", True)}:
                yield f"line {node.lineno}: {name}({keyword.arg}=True)"


def test_nothing_unpickled_and_nothing_loaded_by_half() -> None:
    folders = ("src/", "recipes/", "benchmarks/", "tools/", "examples/")
    found = [
        f"{name}: {what}"
        for name, text in texts()
        if name.endswith(".py") and name.startswith(folders)
        for what in unsafe(ast.parse(text, name))
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "torch.load",
        "model.load_state_dict(w, strict=False)",
        "np.load(p, allow_pickle=True)",
        "AutoModel.from_pretrained(n, trust_remote_code=True)",
        "subprocess.run(c, shell=True)",
        "eval(text)",
    ],
)
def test_planted_use_is_found(line: str) -> None:
    assert bool(list(unsafe(ast.parse(line)))) == (line != "torch.load")  # naming a function is not calling it


@pytest.mark.parametrize("line", ["list(zip(a, b, strict=False))", "model.eval()", "m.load_state_dict(w, strict=True)"])
def test_harmless_use_passes(line: str) -> None:
    assert list(unsafe(ast.parse(line))) == []


def test_constraints_pin_every_line() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins), "one exact version a line, no local label"
    assert "torch" in {pin.partition("==")[0] for pin in pins}


def test_licence() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
