"""The commands and the code of the documentation run as they stand, page by page, in an empty folder with pictures."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN = {"bash", "sh", "python"}
BLOCK = re.compile(
    r"(?:^[ ]*<!-- not run: (?P<reason>[^\n]+?) -->\n+)?^[ ]*```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^[ ]*```[ ]*$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block of a page; ``reason`` says why it is not run."""

    line: int
    language: str
    code: str
    reason: str | None


def blocks(text: str) -> list[Block]:
    return [
        Block(
            line=text.count("\n", 0, match.start("language")) + 1,
            language=match["language"],
            code=match["code"],
            reason=match["reason"],
        )
        for match in BLOCK.finditer(text)
    ]


def draw_pictures(folder: Path) -> None:
    """The files that the examples name: a folder of pictures, and one picture to ask with."""
    (folder / "pictures").mkdir()
    for name, colour in {"apple": "red", "leaf": "green", "sky": "blue", "sun": "yellow", "plum": "purple"}.items():
        picture = Image.new("RGB", (96, 96), "white")
        ImageDraw.Draw(picture).ellipse((16, 16, 80, 80), fill=colour)
        picture.save(folder / "pictures" / f"{name}.png")
    Image.open(folder / "pictures" / "apple.png").save(folder / "cat.jpg")


def run(block: Block, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a block as a reader would, with the commands of this environment first on the path."""
    command = [sys.executable, "-c"] if block.language == "python" else ["bash", "-euo", "pipefail", "-c"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    # A home of its own, so that the examples touch nobody's index.
    environment = {**os.environ, "PATH": path, "HOME": str(folder), "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    return subprocess.run(
        [*command, block.code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_blocks_run(page: Path, tmp_path: Path) -> None:
    draw_pictures(tmp_path)
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language not in RUN or block.reason is not None:
            continue
        done = run(block, tmp_path)
        assert done.returncode == 0, f"{page.name}:{block.line} failed\n{block.code}\n{done.stdout}\n{done.stderr}"


def test_blocks_that_are_not_run_say_why() -> None:
    left_out = {
        f"{page.relative_to(ROOT)}:{block.line}": block.reason
        for page in PAGES
        for block in blocks(page.read_text(encoding="utf-8"))
        if block.language in RUN and block.reason is not None
    }
    for where, reason in left_out.items():
        print(f"not run: {where}: {reason}")  # noqa: T201 - shown with -rP and on failure
        assert len(reason.split()) >= 3, f"{where}: {reason!r} is no reason"


def test_links_inside_the_tree_lead_somewhere() -> None:
    dead = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in PAGES
        for target in re.findall(r"(?:\]\(|(?:src|href)=\")([^)#\"\s]+)", page.read_text(encoding="utf-8"))
        if not re.match(r"[a-z]+:", target) and not (page.parent / target).exists()
    ]
    assert dead == []


def test_a_failing_block_fails(tmp_path: Path) -> None:
    text = (
        "a\n\n```bash\ntrue\n```\n\n"
        "<!-- not run: takes an hour -->\n```bash\nexit 3\n```\n\n"
        "```python\nraise SystemExit(4)\n```\n"
    )
    good, left_out, bad = blocks(text)
    assert (good.language, good.line, good.reason) == ("bash", 3, None)
    assert left_out.reason == "takes an hour"
    assert (run(good, tmp_path).returncode, run(bad, tmp_path).returncode) == (0, 4)
