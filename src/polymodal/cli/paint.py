"""The commands draw (what it makes is marked) and show."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from polymodal.cli.common import Commands, command, count, load_model, with_json, with_model
from polymodal.cli.show import bar, plain, print_json
from polymodal.core.errors import ConfigError, MediaError

if TYPE_CHECKING:
    from polymodal.films import MadeFilm
    from polymodal.pictures import Made, Picture, Preview

PAINTER = "polymodal/nano-draw"
AT_ONCE = 4  # pictures on a GPU; a CPU is busy with one
NAME = 40  # letters of a prompt in a file's name


def _draw(arguments: argparse.Namespace) -> int:
    from polymodal.core.drawing import Drawing
    from polymodal.core.files import check_target
    from polymodal.pictures import check_png, clean, drawn, save, sheet

    a = arguments
    drawing = Drawing(
        steps=a.steps, guidance=a.guidance, rescale=a.rescale, seed=a.seed, size=a.size, negative=clean(a.negative),
        strength=a.strength,
    )  # fmt: skip
    for option in ("mask", "strength"):  # told before a model is loaded
        if getattr(a, option) is not None and a.image is None:
            raise ConfigError(f"--{option} is of a picture to begin with: give --image FILE, too")
    out, preview = (None if name is None else check_png(name) for name in (a.out, a.preview))
    prompt = clean(a.prompt)
    lora, name = _path(a.lora), out or Path(f"{slug(prompt, 'picture')}.png")
    for path in (name, *([] if preview is None else [preview])):  # told before anything is computed
        check_target(path)
    model = load_model(a.model or PAINTER, lora)
    pictures: list[tuple[Path, Picture]] = []
    with bar("pictures", "steps") as show:
        made = drawn(
            model, prompt, drawing, n=a.n, image=_path(a.image), mask=_path(a.mask), control=_path(a.control),
            lora=lora, watch=_watch(show, preview), at_once=AT_ONCE if model.device.type == "cuda" else 1,
        )  # fmt: skip
        for picture in made:  # each is written as soon as it is there: an interruption loses what is not yet made
            m, alone = picture.made, out is not None and a.n == 1
            path = name if alone else name.with_name(f"{name.stem}-{m.seed}{name.suffix}")
            picture.save(path)
            pictures.append((path, picture))
            if not a.json:
                how = f"seed {m.seed}, {m.steps} steps, guidance {m.guidance:g}"
                print(f"{plain(str(path))}: {m.width} x {m.height}, {how}")
    contact = None
    if a.n > 1:
        contact = name.with_name(f"{name.stem}-sheet{name.suffix}")
        save(contact, sheet([one.image for _, one in pictures]), [one.made for _, one in pictures])
    if a.json:
        each = [{"path": str(path), **asdict(one.made)} for path, one in pictures]
        print_json({"pictures": each, "sheet": None if contact is None else str(contact)})
    elif contact is not None:
        print(f"{plain(str(contact))}: all {a.n}")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from polymodal.modalities.generated import source_type

    found = []
    for name in arguments.files:
        path = Path(name).expanduser()
        kind = source_type(path)
        try:
            made = _made(path)
        except MediaError:
            if kind is None:
                raise
            made = []  # another program's, which says that it is generated and no more
        found.append((name, kind, made))
    if arguments.json:
        print_json([{"path": n, "source_type": kind, "pictures": [asdict(m) for m in made]} for n, kind, made in found])
        return 0
    for name, kind, made in found:
        print(f"{plain(name)}: {kind or 'no mark'}")
        for one in made:
            for field, value in asdict(one).items():
                if value not in (None, "") and (field, value) not in (("rescale", 0.0), ("interval", (0.0, 1.0))):
                    print(f"  {field:<9} {plain(str(value))}")
    return 0


def _made(path: Path) -> list[Made] | list[MadeFilm]:
    """How a picture, the pictures of a sheet, or a film were made."""
    from polymodal import films, pictures

    if path.suffix.lower() == ".mp4":
        return [films.settings_of(path)]
    made = pictures.settings_of(path)
    return made if isinstance(made, list) else [made]


def _watch(show: Callable[[int, int], None], preview: Path | None) -> Callable[[Preview], None]:
    """Moves the bar, and keeps what is expected of the picture in a file."""

    def watch(seen: Preview) -> None:
        show(seen.step, seen.steps)
        if preview is not None:
            seen.save(preview)

    return watch


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name).expanduser()


def slug(prompt: str, otherwise: str) -> str:
    """A prompt as a file's name, or another where it has no letters."""
    words = "".join(c.lower() if c.isascii() and c.isalnum() else " " for c in prompt).split()
    return "-".join(words)[:NAME].strip("-") or otherwise


def size(text: str) -> tuple[int, int]:
    """WIDTHxHEIGHT, or one number for both, for ``type=``."""
    width, _, height = text.lower().partition("x")
    return int(width), int(height or width)


def add(commands: Commands) -> None:
    """Adds draw and show."""
    draw = command(
        commands, "draw", _draw, "paint pictures of a text",
        """\
examples:
  polymodal draw "a red cube left of a blue sphere"
  polymodal draw "a cat" --model runs/painter --n 9 --seed 1 --steps 30        and a contact sheet
  polymodal draw "a winter day" --image summer.png --strength 0.6             begins with a picture
  polymodal draw "a hat" --image me.png --mask head.png                       white is painted, black is kept
  polymodal draw "a cat" --size 768x512 --negative "blurry" --preview now.png
Each picture says in its file how it was made (polymodal show FILE) and is marked as generated: docs/drawing.md.
The same seed gives the same picture, alone and among others.""",
    )  # fmt: skip
    draw.add_argument("prompt", metavar="PROMPT", help="what is to be seen")
    with_model(draw, PAINTER)
    draw.add_argument("--out", metavar="FILE", help="a .png; of many, their names begin with it (default: the prompt)")
    draw.add_argument("--negative", metavar="TEXT", default="", help="what is not to be seen")
    draw.add_argument("--seed", type=int, metavar="N", help="of the first picture (default: a new one)")
    draw.add_argument("--steps", type=int, metavar="N", help="of the sampler (default: the model's own)")
    draw.add_argument("--guidance", type=float, metavar="X", help="how closely to follow PROMPT; 1 is none")
    draw.add_argument(
        "--rescale", type=float, metavar="X", default=0.0, help="how much of guidance's contrast is taken back, 0 to 1"
    )
    draw.add_argument("--size", type=size, metavar="WxH", help="in pixels (default: the model's own)")
    draw.add_argument("--n", type=count, default=1, metavar="N", help="how many pictures; seeds count up (default: 1)")
    draw.add_argument("--image", metavar="FILE", help="a picture to begin with")
    draw.add_argument("--strength", type=float, metavar="X", help="how much of it is changed, up to 1 (default: 0.8)")
    draw.add_argument("--mask", metavar="FILE", help="what of it is painted: white; black is kept")
    draw.add_argument("--control", metavar="FILE", help="what has to be where, for a ControlNet; it gives the size")
    draw.add_argument("--lora", metavar="FILE", help="an adapter for the model: the .safetensors that others share")
    draw.add_argument("--preview", metavar="FILE", help="a .png that shows after each step what is to be expected")
    with_json(draw)
    shown = command(
        commands, "show", _show, "show how pictures and films were made",
        """\
examples:
  polymodal show a-cat-7.png
  polymodal show *.png circle.mp4 --json
It reads what draw and film wrote, and of any PNG or mp4 whether it is marked as generated: see docs/drawing.md.""",
    )  # fmt: skip
    shown.add_argument("files", nargs="+", metavar="FILE", help="pictures and films")
    with_json(shown)
