"""The command line: parses, calls, prints. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from polymodal.cli import act, ask, film, find, imagine, listen, models, paint, sound
from polymodal.cli.common import Help
from polymodal.cli.show import plain
from polymodal.core.errors import PolymodalError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0, 1 for an error that is the user's to mend, 130 for Ctrl-C; 2 for usage exits."""
    arguments = _parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return arguments.run(arguments)
    except PolymodalError as error:
        if arguments.debug:
            raise
        print("polymodal: " + plain(str(error), keep="\n"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\npolymodal: interrupted; nothing is lost, run the same command again", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) has enough. Python would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:  # a full disk, a folder that may not be written to
        if arguments.debug:
            raise
        name = error.filename if error.filename2 is None else error.filename2  # of a renaming, what was asked for
        where = f": {name}" if name is not None else ""
        print("polymodal: " + plain(f"{error.strerror or error}{where}", keep="\n"), file=sys.stderr)
        return 1


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    print("polymodal: " + plain(str(message), keep="\n"), file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    from polymodal import __version__

    parser = argparse.ArgumentParser(
        prog="polymodal",
        description="Find pictures and sounds by words, ask about them, write down speech, make pictures and sound; "
        "train, load and check the models that do it.",
        epilog="""\
a first look:
  polymodal demo                          pictures, an index and five searches, from nothing
  polymodal index ~/Pictures              then:
  polymodal search "a dog on the beach"

polymodal COMMAND --help teaches each command with examples.""",
        formatter_class=Help,
    )
    parser.add_argument("--version", action="version", version=f"polymodal {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (
        find.add,
        ask.add,
        models.add,
        act.add,
        imagine.add,
        listen.add,
        sound.add,
        paint.add,
        film.add,
        find.add_demo,
    ):
        add(commands)
    return parser
