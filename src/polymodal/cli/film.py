"""The command film: what it makes is marked."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from polymodal.cli.common import Commands, command, load_model, with_json
from polymodal.cli.paint import size, slug
from polymodal.cli.show import bar, plain, print_json


def _film(arguments: argparse.Namespace) -> int:
    from polymodal.core.drawing import any_seed
    from polymodal.core.errors import ConfigError
    from polymodal.core.filming import Filming
    from polymodal.films import check_mp4, film
    from polymodal.pictures import clean

    a = arguments
    if not a.prompt and a.image is None:
        raise ConfigError("what is to be seen? Give a PROMPT, or --image FILE for a model that begins with a picture")
    seed = any_seed() if a.seed is None else a.seed
    filming = Filming(
        frames=a.frames, fps=a.fps, motion=a.motion, steps=a.steps, guidance=a.guidance, seed=seed, size=a.size
    )
    prompt = clean(a.prompt)
    name = slug(prompt or Path(a.image).stem, "film")
    free = f"{name}-{seed}" if Path(f"{name}.mp4").exists() else name  # a name that nobody gave takes no film's place
    path = check_mp4(a.out or f"{free}.mp4")
    image = None if a.image is None else Path(a.image).expanduser()
    model = load_model(a.model)
    with bar("filming", "steps") as show:
        made = film(model, prompt, filming, image=image, watch=lambda seen: show(seen.step, seen.steps))
        made.save(path)
    if a.json:
        print_json({"path": str(path), **asdict(made.made)})
        return 0
    m = made.made
    how = f"seed {m.seed}, {m.steps} steps, guidance {m.guidance:g}"
    print(f"{plain(str(path))}: {m.frames} frames of {m.width} x {m.height} at {m.fps} a second, {how}")
    return 0


def add(commands: Commands) -> None:
    """Adds film."""
    sub = command(
        commands, "film", _film, "make a film of a text, or of a picture that it begins with",
        """\
examples:
  polymodal film "a red circle moves to the left" --model runs/nano-film/model --out circle.mp4
  polymodal film "a blue star moves quickly up" --model runs/nano-film/model --seed 1 --frames 17
  polymodal film --image first.png --model stabilityai/stable-video-diffusion-img2vid --motion 60 --fps 7
Models that read texts (in the style of Sora) make a film of PROMPT; Stable Video Diffusion begins with --image.
--frames has to be a number that the model makes: with latents of four frames each, 1, 5, 9, 13, ...
The film says in its file how it was made (polymodal show FILE) and is marked as generated: docs/drawing.md.
The same seed gives the same film.""",
    )  # fmt: skip
    sub.add_argument("prompt", metavar="PROMPT", nargs="?", default="", help="what is to be seen")
    sub.add_argument("--model", metavar="NAME", required=True, help="a folder or a Hub name")
    sub.add_argument("--out", metavar="FILE", help="an .mp4 (default: the prompt; if that is there, and the seed)")
    sub.add_argument("--image", metavar="FILE", help="a picture to begin with; its middle is taken")
    sub.add_argument("--frames", type=int, metavar="N", help="how many (default: the model's own)")
    sub.add_argument("--fps", type=int, metavar="N", help="frames a second; some models are told so")
    sub.add_argument("--motion", type=int, metavar="N", help="how much is to move, 1 to 255, if the model is told")
    sub.add_argument("--seed", type=int, metavar="N", help="of the noise (default: a new one)")
    sub.add_argument("--steps", type=int, metavar="N", help="of the sampler (default: the model's own)")
    sub.add_argument("--guidance", type=float, metavar="X", help="how closely to follow; 1 is none")
    sub.add_argument("--size", type=size, metavar="WxH", help="in pixels (default: the model's own)")
    with_json(sub)
