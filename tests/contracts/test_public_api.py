"""What a user may rely on: names that exist, documentation on each, and an import that costs nothing."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

import polymodal

SOURCE = Path(__file__).parents[2] / "src" / "polymodal"


def test_all_is_there() -> None:
    assert {"__version__", "build", "load"} <= set(polymodal.__all__)
    assert len(set(polymodal.__all__)) == len(polymodal.__all__)
    for name in polymodal.__all__:
        assert getattr(polymodal, name) is not None, name
    assert set(polymodal.__all__) <= set(dir(polymodal))


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        _ = polymodal.nothing_of_this_name


def test_every_public_function_and_class_is_documented() -> None:
    bare = []
    for path in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if not ast.get_docstring(tree) and tree.body:
            bare.append(f"{path.relative_to(SOURCE)}: the module")
        # The functions of a system file fill the fields of `systems.base.Format`, which says what each does.
        kinds = ast.ClassDef if path.parent.name == "systems" else ast.ClassDef | ast.FunctionDef
        bare += [
            f"{path.relative_to(SOURCE)}:{node.lineno} {node.name}"
            for node in tree.body
            if isinstance(node, kinds) and not node.name.startswith("_") and not ast.get_docstring(node)
        ]
    assert bare == []


def test_import_is_light() -> None:
    heavy = ["torch", "numpy", "PIL", "lancedb", "pyarrow", "tokenizers", "huggingface_hub", "rich", "matplotlib"]
    script = f"import json, sys, polymodal; print(json.dumps([m for m in {heavy!r} if m in sys.modules]))"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == []


def test_types_are_shipped() -> None:
    assert files("polymodal").joinpath("py.typed").is_file()
