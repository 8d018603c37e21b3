"""What commands have in common: how they are declared, the arguments that many take, and how models are loaded."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from polymodal.core.errors import UnsupportedError

if TYPE_CHECKING:
    from polymodal.systems.base import System

MODEL = "polymodal/nano-clip"  # finds
WRITER = "polymodal/nano-vlm"  # answers

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


class Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of examples as they are."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)


def command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], int], purpose: str, examples: str
) -> argparse.ArgumentParser:
    """Adds a command: what `run` gives is its exit status, ``examples`` stand below its help."""
    sub = commands.add_parser(
        name, help=purpose, description=purpose[0].upper() + purpose[1:] + ".", epilog=examples, formatter_class=Help
    )
    sub.set_defaults(run=run)
    sub.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    return sub


def with_model(sub: argparse.ArgumentParser, default: str = MODEL) -> None:
    """Adds ``--model``; ``default`` is for the help."""
    sub.add_argument("--model", metavar="NAME", help=f"a shipped model, a folder or a Hub name (default: {default})")


def with_json(sub: argparse.ArgumentParser) -> None:
    """Adds ``--json``."""
    sub.add_argument("--json", action="store_true", help="print JSON")


def count(text: str) -> int:
    """A positive number, for ``type=``."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def whole(text: str) -> int:
    """A number that is not negative, for ``type=``."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def seconds(text: str) -> float:
    """A time that is over some day, for ``type=``."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a time in seconds")
    return value


def model_name(name: str) -> str:
    """What an index may remember: a folder by its whole path."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.is_dir() else name


def load_model(name: str, lora: Path | None = None) -> System:
    """A model in the precision and on the device that are the fastest here, with an adapter merged into it."""
    import torch

    from polymodal.api import load
    from polymodal.nn.packed import can_pack, pack

    model = load(name, precision="auto")
    if lora is not None:  # before layers are packed
        if "hf" not in model.formats:
            raise UnsupportedError(
                f"{name} is a {type(model).__name__}, whose layers shared adapters have no names for"
            )
        from polymodal.train.lora import merge_lora
        from polymodal.train.lora_files import load_lora

        merge_lora(load_lora(model, lora, names=model.hub_layers()))
    if torch.cuda.is_available():
        return model.cuda()
    if can_pack():
        pack(model)
    return model
