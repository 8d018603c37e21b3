"""A system is one short file over shared parts; a config is small, frozen and says its fields by name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "polymodal"
MAX_LINES = 300
MAX_FIELDS = 20


def systems(source: Path) -> list[Path]:
    return [p for p in sorted((source / "systems").glob("*.py")) if p.name != "__init__.py"]


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def forbidden(tree: ast.Module) -> Iterator[str]:
    """What a system file must not hold: tunnels, probing, a terminal, a command line, downloads."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.Lambda) and node.args.kwarg:
            yield f"line {node.lineno}: **{node.args.kwarg.arg}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"print", "hasattr"}:
            yield f"line {node.lineno}: {node.func.id}()"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + (
                [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            )
            for name in names:
                if name.split(".")[0] in {"argparse", "huggingface_hub", "urllib", "requests", "httpx"}:
                    yield f"line {node.lineno}: import {name}"


def config_problems(tree: ast.Module) -> Iterator[str]:
    """Dataclasses called ...Config that are too wide, mutable or positional."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef) or not node.name.endswith("Config"):
            continue
        options = {
            keyword.arg
            for decorator in node.decorator_list
            if isinstance(decorator, ast.Call) and called(decorator) == "dataclass"
            for keyword in decorator.keywords
            if isinstance(keyword.value, ast.Constant) and keyword.value.value is True
        }
        if not {"frozen", "kw_only"} <= options:
            yield f"{node.name} is not @dataclass(frozen=True, kw_only=True)"
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and "ClassVar" not in ast.unparse(n.annotation)]
        if len(fields) > MAX_FIELDS:
            yield f"{node.name} has {len(fields)} fields, more than {MAX_FIELDS}"


def problems(source: Path) -> list[str]:
    """Everything under ``source`` that breaks the rules of this file."""
    found = []
    for path in systems(source):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_LINES and path.name not in {"base.py", "generator.py", "crossed.py"}:  # what they share is none
            found.append(f"{path.name}: {lines} lines, more than {MAX_LINES}")
        found += [f"{path.name}: {what}" for what in forbidden(tree_of(path))]
    for path in sorted(source.rglob("*.py")):
        found += [f"{path.relative_to(source)}: {what}" for what in config_problems(tree_of(path))]
    return found


def test_sizes() -> None:
    assert problems(SOURCE) == []


FIELDS = "\n".join(f"    f{i}: int = 0" for i in range(MAX_FIELDS + 1))


@pytest.mark.parametrize(
    "text",
    [
        "# a line\n" * (MAX_LINES + 1),
        "def f(**kwargs): ...",
        "f = lambda **kwargs: 0",
        "print('x')",
        "hasattr(a, 'b')",
        "import argparse",
        "from huggingface_hub import hf_hub_download",
        "@dataclass(frozen=True)\nclass AConfig:\n    a: int",
        "class AConfig:\n    a: int",
        f"@dataclass(frozen=True, kw_only=True)\nclass AConfig:\n{FIELDS}",
    ],
)
def test_planted_problem_is_found(text: str, tmp_path: Path) -> None:
    (tmp_path / "systems").mkdir()
    (tmp_path / "systems" / "a.py").write_text(text)
    assert len(problems(tmp_path)) == 1
