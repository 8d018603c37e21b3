"""The command imagine."""

from __future__ import annotations

import argparse
from typing import Any

from polymodal.cli.common import Commands, command, count, load_model, seconds, whole, with_json
from polymodal.cli.show import bar, plain, print_json


def _imagine(arguments: argparse.Namespace) -> int:
    from polymodal.core.errors import ConfigError
    from polymodal.films import check_mp4
    from polymodal.imagining import CLIPS_FPS, foresee, from_clips, from_demonstrations, world_model, write_film

    a = arguments
    if a.camera is not None and a.data is None:
        raise ConfigError("--camera is of recorded demonstrations: give --data DIR, too")
    out = None if a.film is None else check_mp4(a.film)
    loaded = load_model(a.model)
    model = world_model(loaded)
    if a.data is None:
        fps = CLIPS_FPS
        films = from_clips(model, a.films, steps=max(1, round(a.seconds * fps)), seed=a.seed)
    else:
        from polymodal.data.lerobot import Demonstrations

        data = Demonstrations(a.data, cameras=None if a.camera is None else [a.camera])
        if not data.cameras:
            raise ConfigError(f"{a.data} has no camera")
        fps = data.fps
        steps = max(1, round(a.seconds * fps))
        films = from_demonstrations(model, data, a.films, camera=data.cameras[0], steps=steps, seed=a.seed)
    made = []
    with bar("imagining", "films") as show:
        for happened in films:
            made.append(foresee(model, happened, seed=a.seed, opposite=a.opposite))
            show(len(made), a.films)
    written = None if out is None else str(write_film(out, made, loaded))
    rows: list[dict[str, Any]] = [
        {
            "film": one.happened.name, "shown": one.context, "fps": fps,
            "psnr": [round(x, 3) for x in one.growth.psnr[0].tolist()],
            "ssim": [round(x, 4) for x in one.growth.ssim[0].tolist()],
            "copied_psnr": [round(x, 3) for x in one.copied.psnr[0].tolist()],
        }
        for one in made
    ]  # fmt: skip
    if a.json:
        print_json({"films": rows, "written": written})
        return 0
    for row in rows:
        print(plain(row["film"]))
        for at in sorted({0, len(row["psnr"]) // 2, len(row["psnr"]) - 1}):
            ours, copied = row["psnr"][at], row["copied_psnr"][at]
            print(f"  after {(at + 1) / fps:.2f} s: {ours:.1f} dB; the last frame repeated has {copied:.1f}")
    if written is not None:
        print(f"written: {plain(written)}")
    return 0


def add(commands: Commands) -> None:
    """Declares the command."""
    sub = command(
        commands, "imagine", _imagine, "let a world model foresee what actions lead to, beside what really happened",
        """\
examples:
  polymodal imagine runs/nano-diamond/model --film foreseen.mp4
  polymodal imagine runs/nano-diamond/model --seconds 3 --films 8 --film long.mp4     a longer foresight
  polymodal imagine runs/nano-diamond/model --opposite --film other.mp4               does it do what it is told?
  polymodal imagine runs/reach-world/model --data data/reach --camera front --film reach.mp4
Films are of the world clips, or of demonstrations (polymodal record). Those of clips are held out: from the first
frame to the last, the first shape goes in a direction that no recipe trains its colour on; a second shape, and the
actions of --opposite, go in directions that training has. How far a shape goes is the same for all --seconds: in a
longer film it goes more slowly, so that figures of two lengths do not compare.
The film shows what happened on the left, and beside it what the model made of its first frames and of all actions;
it is marked as made by a model in part (polymodal show FILE).
A model that foresees nothing is as good as the last frame repeated, which stands beside each figure.""",
    )  # fmt: skip
    sub.add_argument("model", metavar="MODEL", help="a world model: a folder or a Hub name")
    sub.add_argument("--film", metavar="FILE", help="an mp4 of what happened and what was foreseen, side by side")
    sub.add_argument("--data", metavar="DIR", help="recorded demonstrations (LeRobot) to take films and actions from")
    sub.add_argument("--camera", metavar="NAME", help="of the demonstrations (default: the first)")
    sub.add_argument("--films", type=count, default=4, metavar="N", help="(default: 4)")
    sub.add_argument("--seconds", type=seconds, default=1.5, metavar="S", help="that are foreseen (default: 1.5)")
    sub.add_argument("--opposite", action="store_true", help="also what it foresees if the opposite were done")
    sub.add_argument("--seed", type=whole, default=0, metavar="N", help="of the first film, and of what is foreseen")
    with_json(sub)
