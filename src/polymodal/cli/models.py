"""The commands that make, list, check and price models: train, ls, verify, plan."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from polymodal.cli.common import Commands, command, count, with_json
from polymodal.cli.show import console, plain, print_json
from polymodal.core.errors import ConfigError


def _train(arguments: argparse.Namespace) -> int:
    sys.path.insert(0, os.getcwd())  # a recipe may import its neighbours
    from polymodal.train import fit, load_run, merge_lora

    run = load_run(arguments.recipe)
    out = Path(arguments.out or f"runs/{run.name}")
    result = fit(
        run,
        out,
        resume=not arguments.fresh,
        until_step=arguments.until_step,
        device=arguments.device,
        parallel=arguments.parallel,
    )
    if int(os.environ.get("RANK", "0")) > 0:
        return 0  # the first process speaks for all
    from polymodal.systems.base import System

    # What learns may stand inside a module that knows how: `Policy`, or a recipe's own.
    trained = next((m for m in (result.model, *result.model.children()) if isinstance(m, System)), None)
    if result.finished and trained is not None:
        print(f"model: {plain(str(merge_lora(trained).save(out / 'model')))}")
    print(f"{run.name}: step {result.step} of {run.steps}, loss {result.loss:.4f}, in {plain(str(result.folder))}")
    for name, value in result.metrics.items():
        bar = run.expect.get(name)
        print(f"  {name:<28} {value:.4f}" + (f"  (bar {bar.value}, chance {bar.chance})" if bar else ""))
    missed = [name for name, reached in result.reached.items() if not reached] if result.finished else []
    if missed:
        print(f"polymodal: below the bar: {', '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0


def _ls(arguments: argparse.Namespace) -> int:
    from importlib import resources

    from polymodal.systems import TABLE
    from polymodal.weights.hub import shipped

    file = resources.files("polymodal.systems") / "proofs.json"
    proofs: dict[str, dict[str, str]] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    names = [arguments.system] if arguments.system else list(TABLE)
    rows = [_system(TABLE[name], proofs.get(name, {})) for name in names]
    models = {name: str(path) for name, path in shipped().items()}
    if arguments.json:
        print_json({"systems": rows, "shipped": models})
        return 0
    from rich.table import Table

    if arguments.system:
        _print_system(rows[0])
        return 0
    table = Table(box=None, pad_edge=False)
    for column in ("system", "paper", "year", "verbs", "presets", "proven"):
        table.add_column(column, overflow="fold", style="bold" if column == "system" else "")
    for row in rows:
        passed = sum(outcome == "passed" for outcome in row["proofs"].values())
        proven = f"{passed} of {len(row['proofs'])}" if row["proofs"] else "not run"
        table.add_row(
            row["name"], row["paper"], str(row["year"]), " ".join(row["verbs"]), str(len(row["presets"])), proven
        )
    console().print(table)
    print("\nshipped models: " + (", ".join(models) or "none"))
    print("polymodal ls SYSTEM lists its presets and what each proof is")
    return 0


def _system(entry: Any, proofs: dict[str, str]) -> dict[str, Any]:
    from polymodal.core.verbs import verbs_of

    cls = entry.resolve()
    presets = getattr(sys.modules[cls.__module__], "PRESETS", {})
    return {
        "name": entry.name,
        "paper": entry.paper,
        "year": entry.year,
        "url": entry.url,
        "verbs": list(verbs_of(cls)),
        "presets": list(presets),
        "proofs": proofs,
    }


def _print_system(row: dict[str, Any]) -> None:
    print(f"{row['name']}: {row['paper']} ({row['year']}), {row['url']}")
    print(f"verbs: {', '.join(row['verbs'])}")
    print("presets:", *[f"\n  {preset}" for preset in row["presets"]] or ["none"])
    print("proofs:", *[f"\n  {outcome:<8} {claim}" for claim, outcome in row["proofs"].items()] or ["not run"])


def _verify(arguments: argparse.Namespace) -> int:
    from polymodal.core.files import write_json
    from polymodal.verify import verify

    certificate = verify(arguments.name, arguments.revision)
    if arguments.out:
        write_json(arguments.out, certificate.to_json())
    if arguments.json:
        print_json(certificate.to_json())
    else:
        print(plain(certificate.text(), keep="\n"))
    return 0 if certificate.ok else 1


def _plan(arguments: argparse.Namespace) -> int:
    from polymodal.plan import Input, price

    if arguments.checklist:
        return _checklist(arguments)
    if arguments.calibrate:
        from polymodal.machine import calibrate

        print("Measuring this machine (about half a minute; best when it is quiet) ...", file=sys.stderr, flush=True)
        rates = calibrate()
        if arguments.name is None:
            print(f"{plain(rates.name)}: {plain(rates.cpu)}, {rates.threads} threads, measured {rates.date}")
            return 0
    if arguments.name is None:
        raise ConfigError("say what to price: a preset of polymodal ls SYSTEM, a shipped model or a folder")
    given = Input(
        images=tuple(arguments.image) if arguments.image else None, frames=arguments.frames, fps=arguments.fps,
        text=arguments.text, new=arguments.new, steps=arguments.steps, batch=arguments.batch,
    )  # fmt: skip
    plan = price(arguments.name, given, dtype=arguments.dtype, train=arguments.train)
    if arguments.json:
        print_json(plan.to_json())
    else:
        _print_plan(plan)
    return 0


def _print_plan(plan: Any) -> None:
    from rich.table import Table
    from rich.text import Text

    title = Text(f"{plain(plan.name)}: {plan.system}, {plan.dtype}, batch {plan.input.batch}", style="bold")
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=False)
    table.add_column("", style="dim")
    table.add_column("", overflow="fold")
    table.add_column("", justify="right", style="cyan")
    last = ""
    for section, what, much in plan.rows():
        table.add_row("" if section == last else Text(plain(section)), Text(plain(what)), much)
        last = section
    console().print(table)
    if plan.note:
        print(plain(plan.note))


def _checklist(arguments: argparse.Namespace) -> int:
    from polymodal.checklist import QUESTIONS, recommend

    answers = {}
    for question in QUESTIONS:
        names = list(question.options)
        print(question.ask, file=sys.stderr)
        for name, meaning in question.options.items():
            print(f"  {name:<10} {meaning}", file=sys.stderr)
        answers[question.key] = _line(f"[{names[0]}] ") or names[0]
    memory = _line("How many GiB of memory may it take? [8] ") or "8"
    try:
        room = float(memory)
    except ValueError:
        raise ConfigError(f"{memory!r} is not a number of GiB") from None
    found = recommend(answers, room)
    if arguments.json:
        print_json(found.to_json())
        return 0
    print(plain(found.text(), keep="\n") + "\n")
    _print_plan(found.plan)
    return 0


def _line(ask: str) -> str:
    """A line of the terminal or of a pipe; the question goes to stderr, so that --json stays whole."""
    print(ask, end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip()


def _size(text: str) -> tuple[int, int]:
    width, by, height = text.lower().partition("x")
    if not (by and width.isdigit() and height.isdigit()):
        raise argparse.ArgumentTypeError(f"{text} is not a size such as 640x480")
    return int(width), int(height)


def add(commands: Commands) -> None:
    """Declares the commands that make and check models."""
    sub = command(
        commands,
        "train",
        _train,
        "train the run of a recipe, going on where it was interrupted",
        """\
A recipe is a Python file with a function `run` that returns a polymodal.train.Run. A finished run leaves
its model in the Hub's format in DIR/model, its loss curve in DIR/curve.png and its numbers in
DIR/result.json. The exit status is 1 when it ends below a bar that the recipe sets.

examples:
  polymodal train recipes/nano/clip.py
  polymodal train recipes/nano/clip.py --out runs/trial --until-step 100
  torchrun --nproc-per-node 2 -m polymodal train recipes/nano/clip.py --parallel ddp""",
    )
    sub.add_argument("recipe", metavar="PATH", help="a recipe's file or dotted module")
    sub.add_argument("--out", metavar="DIR", help="default: runs/ and the name of the run")
    sub.add_argument("--fresh", action="store_true", help="start over instead of going on")
    sub.add_argument("--until-step", type=count, metavar="N", help="stop there, with a checkpoint")
    sub.add_argument("--device", metavar="NAME", help="default: a GPU if there is one")
    sub.add_argument("--parallel", choices=("ddp", "fsdp"), help="how the processes of torchrun share the work")

    sub = command(
        commands,
        "ls",
        _ls,
        "list the systems, their presets, what is proven of each, and the shipped models",
        """\
examples:
  polymodal ls
  polymodal ls clip
  polymodal ls --json""",
    )
    sub.add_argument("system", nargs="?", metavar="SYSTEM", help="show one in full")
    with_json(sub)

    sub = command(
        commands,
        "verify",
        _verify,
        "check a checkpoint and write what agrees with the reference implementation",
        """\
Loads it, checks names, shapes, dtypes and every field of its config, and runs the reference
implementation where that is installed. Ends with 1 if anything is wrong.

examples:
  polymodal verify polymodal/nano-clip
  polymodal verify ~/models/clip-vit-base-patch32 --out certificate.json""",
    )
    sub.add_argument("name", metavar="NAME_OR_PATH")
    sub.add_argument("--revision", metavar="REVISION", help="a Hub commit, tag or branch")
    sub.add_argument("--out", metavar="FILE", help="write the certificate as JSON, too")
    with_json(sub)

    sub = command(
        commands,
        "plan",
        _plan,
        "price a system before it runs: tokens, parameters, operations, memory, time",
        """\
Nothing is downloaded, loaded or computed. Tokens and parameters are exact; time is known after
--calibrate has measured this machine once. --checklist asks what you want to build, and recommends a
system, the size of it that fits, and how to evaluate it.

examples:
  polymodal plan llava-hf/llava-1.5-7b-hf --image 1280x720 --text 40 --new 100 --dtype bf16
  polymodal plan ~/models/qwen2-vl --frames 60 --fps 2 --json
  polymodal plan polymodal/nano-clip --batch 64 --train
  polymodal plan --calibrate
  polymodal plan --checklist""",
    )
    sub.add_argument("name", nargs="?", metavar="NAME_OR_PRESET", help="a preset, a shipped model or a folder")
    sub.add_argument("--image", action="append", type=_size, metavar="WxH", help="of a picture; may be given again")
    sub.add_argument("--frames", type=int, default=0, metavar="N", help="of a clip")
    sub.add_argument("--fps", type=float, default=2.0, metavar="F", help="of the clip (default: 2)")
    sub.add_argument("--text", type=count, default=32, metavar="N", help="tokens of text (default: 32)")
    sub.add_argument("--new", type=count, default=64, metavar="N", help="tokens of the answer (default: 64)")
    sub.add_argument("--steps", type=count, metavar="N", help="of a picture that is painted (default: the system's)")
    sub.add_argument("--batch", type=count, default=1, metavar="N", help="so many inputs at once")
    sub.add_argument("--dtype", choices=("fp32", "bf16", "int8"), default="fp32", help="of weights (default: fp32)")
    sub.add_argument("--train", action="store_true", help="also a training step, in fp32 with AdamW")
    sub.add_argument("--calibrate", action="store_true", help="measure this machine first")
    sub.add_argument("--checklist", action="store_true", help="ask what to build, and recommend a system")
    with_json(sub)
