"""Turns picture files that we did not draw into square RGBA arrays, in worker processes that may fail alone.

Clip art holds broken, huge and hostile files. Each worker is a child process with a memory limit that is killed when
a file takes too long; entities are refused and references outside the file are never followed.
"""

from __future__ import annotations

import importlib.util
import io
import json
import queue
import re
import resource
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO
from xml.etree.ElementTree import Element

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from polymodal.core.errors import MediaError, MissingDependency

MAX_FILE_BYTES = 2 << 20
MAX_SIDE = 2048  # pixels of an intermediate drawing
MEMORY_LIMIT = 2 << 30
MARGIN = 1 / 32  # of the side, left free around the picture

_DUBLIN_CORE = "{http://purl.org/dc/elements/1.1/}"
_RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"


@dataclass(frozen=True, kw_only=True)
class Raster:
    """A rendered file; ``pixels`` is None and ``problem`` says why where it could not be rendered."""

    path: Path
    pixels: UInt8[np.ndarray, "size size 4"] | None = None
    title: str = ""
    tags: tuple[str, ...] = ()
    problem: str = ""


def fit(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size 4"]:
    """Cuts a picture to what is drawn, centres it in a square with a small margin and resizes it.

    Raises:
        MediaError: nothing is drawn, or nothing that could be seen on white paper.
    """
    image = image.convert("RGBA")
    box = image.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox()
    if box is None:
        raise MediaError("the picture is empty")
    image = image.crop(box)
    side = max(image.size)
    border = round(side * MARGIN) + 1
    square = Image.new("RGBA", (side + 2 * border,) * 2)
    square.paste(image, (border + (side - image.width) // 2, border + (side - image.height) // 2))
    # Resizing with premultiplied alpha: otherwise the colour of invisible pixels bleeds into the edges.
    square = square.convert("RGBa").resize((size, size), Image.Resampling.LANCZOS).convert("RGBA")
    on_white = Image.alpha_composite(Image.new("RGBA", square.size, "white"), square).convert("L")
    if float(np.asarray(on_white).std()) < 4:
        raise MediaError("the picture cannot be seen on white")
    return np.asarray(square)


def _parse(svg: bytes) -> Element:
    import defusedxml.ElementTree  # type: ignore[import-untyped]
    from defusedxml import DefusedXmlException

    if len(svg) > MAX_FILE_BYTES:
        raise MediaError(f"{len(svg)} bytes of SVG, at most {MAX_FILE_BYTES} are read")
    try:
        return defusedxml.ElementTree.fromstring(svg)
    except (DefusedXmlException, SyntaxError, ValueError, LookupError) as error:
        raise MediaError(f"not a safe SVG: {type(error).__name__}: {error}") from None


def _extent(root: Element) -> tuple[float, float]:
    """Width and height that a document asks for, from its attributes or its view box; units do not matter here."""
    view = root.get("viewBox", "").replace(",", " ").split()
    asked = []
    for name, fallback in (("width", view[2:3]), ("height", view[3:4])):
        number = re.match(r"\s*([\d.]+(?:e[+-]?\d+)?)(?!.*%)", root.get(name, ""))
        text = number[1] if number else (fallback or ["512"])[0]
        try:
            asked.append(float(text))
        except ValueError:
            raise MediaError(f"the {name} {text!r} is not a number") from None
    if not all(0 < extent < 1e6 for extent in asked):
        raise MediaError(f"impossible size {asked[0]} x {asked[1]}")
    return asked[0], asked[1]


def draw_svg(svg: bytes, size: int) -> UInt8[np.ndarray, "size size 4"]:
    """Renders an SVG document to a square; nothing outside the document is ever read.

    Raises:
        MediaError: the document is broken, hostile, too large or empty.
    """
    try:
        import cairosvg
    except OSError as error:  # cairocffi finds no libcairo
        raise MediaError(f"libcairo is missing ({error}): run `apt-get install libcairo2`") from None
    width, height = _extent(_parse(svg))

    def draw(side: int) -> Image.Image:
        scale = min(side, MAX_SIDE) / max(width, height)
        target = max(1, round(width * scale)), max(1, round(height * scale))
        try:
            # Its default (`unsafe=False`) follows data: addresses only and refuses entities.
            png = cairosvg.svg2png(svg, output_width=target[0], output_height=target[1])
        except MemoryError:
            raise
        except Exception as error:  # a renderer of untrusted drawings may raise anything
            raise MediaError(f"cairosvg: {type(error).__name__}: {error}") from None
        return Image.open(io.BytesIO(png)).convert("RGBA")

    drawn = draw(2 * size)
    box = drawn.getchannel("A").getbbox()
    # A small drawing on a large page: once more, so that the drawing itself has enough pixels.
    if box is not None and (used := max(box[2] - box[0], box[3] - box[1])) < size:
        drawn = draw(3 * size * size // max(used, 1))
    return fit(drawn, size)


def metadata(svg: bytes) -> tuple[str, tuple[str, ...]]:
    """The title and the subject tags that an SVG document declares of itself."""
    root = _parse(svg)
    work = root.find(f".//{_DUBLIN_CORE}title")
    titles = [t for t in (work, root.find("{http://www.w3.org/2000/svg}title")) if t is not None and t.text]
    tags = [li.text for bag in root.iter(f"{_DUBLIN_CORE}subject") for li in bag.iter(f"{_RDF}li") if li.text]
    return (titles[0].text or "").strip() if titles else "", tuple(tag.strip() for tag in tags)


def _render(path: Path, size: int) -> tuple[dict[str, object], bytes]:
    if path.suffix != ".svg":
        with Image.open(path) as image:
            return {}, fit(image, size).tobytes()
    svg = path.read_bytes()
    title, tags = metadata(svg)
    return {"title": title, "tags": tags}, draw_svg(svg, size).tobytes()


def _worker(size: int, requests: IO[bytes], replies: IO[bytes]) -> None:
    """Answers each line (a path) with a line of JSON and, where that has no ``problem``, the pixels."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    sys.setrecursionlimit(2000)
    for line in requests:
        try:
            header, pixels = _render(Path(json.loads(line)), size)
        except (MediaError, OSError, MemoryError, RecursionError, ValueError, Image.DecompressionBombError) as error:
            header, pixels = {"problem": f"{error or type(error).__name__}"}, b""
        replies.write(json.dumps(header).encode() + b"\n" + pixels)
        replies.flush()


@dataclass
class _Renderer:
    """One child process, started again whenever a file has killed it."""

    size: int
    time_limit: float
    process: subprocess.Popen[bytes] | None = None
    buffer: bytearray = field(default_factory=bytearray)

    def render(self, path: Path) -> Raster:
        if self.process is None:
            command = [sys.executable, "-m", "polymodal.data.worlds.raster", str(self.size)]
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, bufsize=0)
            self.buffer.clear()
        assert self.process.stdin is not None
        deadline = time.monotonic() + self.time_limit
        try:
            self.process.stdin.write(json.dumps(str(path)).encode() + b"\n")
            while (end := self.buffer.find(b"\n")) < 0:
                self._receive(deadline)
            header = json.loads(self.buffer[:end])
            del self.buffer[: end + 1]
            if "problem" in header:
                return Raster(path=path, problem=header["problem"])
            needed = self.size * self.size * 4
            while len(self.buffer) < needed:
                self._receive(deadline)
        except (TimeoutError, EOFError, BrokenPipeError) as error:
            self.close()
            return Raster(path=path, problem=str(error) or "the renderer died")
        pixels = np.frombuffer(bytes(self.buffer[:needed]), np.uint8).reshape(self.size, self.size, 4)
        del self.buffer[:needed]
        return Raster(path=path, pixels=pixels, title=header.get("title", ""), tags=tuple(header.get("tags", ())))

    def _receive(self, deadline: float) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"took longer than {self.time_limit:g} s")
        received = self.process.stdout.read(1 << 16)
        if not received:
            raise EOFError("the renderer died")
        self.buffer += received

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            with self.process:  # waits, and closes the pipes
                pass
            self.process = None


def render_files(paths: Sequence[Path], size: int, *, processes: int = 2, time_limit: float = 20.0) -> Iterator[Raster]:
    """Renders SVG and raster files to ``size`` x ``size`` RGBA, in the order of ``paths``; failures come as problems.

    Args:
        time_limit: seconds for one file, after which its process is killed (the first file also pays the start).

    Raises:
        MissingDependency: there are SVG files and no cairosvg.
    """
    if importlib.util.find_spec("cairosvg") is None and any(path.suffix == ".svg" for path in paths):
        raise MissingDependency("drawing SVG", "cairosvg", "worlds")
    renderers = [_Renderer(size, time_limit) for _ in range(processes)]
    free: queue.SimpleQueue[_Renderer] = queue.SimpleQueue()
    for renderer in renderers:
        free.put(renderer)

    def one(path: Path) -> Raster:
        renderer = free.get()
        try:
            return renderer.render(path)
        finally:
            free.put(renderer)

    try:
        with ThreadPoolExecutor(processes) as pool:
            yield from pool.map(one, paths)
    finally:
        for renderer in renderers:
            renderer.close()


if __name__ == "__main__":
    _worker(int(sys.argv[1]), sys.stdin.buffer, sys.stdout.buffer)
