"""The commands that hear: transcribe."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from polymodal.cli.common import Commands, command, load_model, with_model
from polymodal.cli.show import bar, plain

if TYPE_CHECKING:
    from polymodal.core.transcript import Listening, Segment
    from polymodal.systems.base import System

LISTENER = "polymodal/nano-whisper"
FORMATS = ("txt", "srt", "vtt", "json")


def _transcribe(arguments: argparse.Namespace) -> int:
    from polymodal.core.errors import ConfigError
    from polymodal.core.transcript import Listening
    from polymodal.transcribing import transcribe_file

    kind = _kind(arguments)
    if arguments.out is None and len(arguments.files) > 1 and kind != "txt":
        raise ConfigError(f"several files as {kind}: say a folder to write to, --out FOLDER")
    listening = Listening(language=arguments.language, task=arguments.task, words=arguments.words)
    outs = [_out(arguments, name, kind) for name in arguments.files]
    twice = sorted({str(out) for out in outs if out is not None and outs.count(out) > 1})
    if twice:
        raise ConfigError(f"two files would both be written to {twice[0]}: transcribe them to different folders")
    model = load_model(arguments.model or LISTENER)
    for name, out in zip(arguments.files, outs, strict=True):
        with _source(name) as source:
            if out is None:
                _print(model, source, name, listening, kind, several=len(arguments.files) > 1)
                continue
            with bar(plain(Path(name).name), "s") as show:
                transcribe_file(model, source, out, listening, progress=show)
        print(plain(str(out)))
    return 0


def _kind(arguments: argparse.Namespace) -> str:
    suffix = "" if arguments.out is None else Path(arguments.out).suffix.removeprefix(".")
    return arguments.format or (suffix if suffix in FORMATS else "txt")


def _out(arguments: argparse.Namespace, name: str, kind: str) -> Path | None:
    """Where a transcript goes: the file that ``--out`` names, or one in the folder that it names."""
    if arguments.out is None:
        return None
    out = Path(arguments.out)
    if len(arguments.files) == 1 and out.suffix == f".{kind}" and not out.is_dir():
        return out
    return out / f"{'pipe' if name == '-' else Path(name).stem}.{kind}"


@contextlib.contextmanager
def _source(name: str) -> Iterator[Path]:
    """The file, or the pipe as one."""
    from polymodal.transcribing import spooled

    if name != "-":
        yield Path(name)
        return
    path = spooled(sys.stdin.buffer)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _print(model: System, source: Path, name: str, listening: Listening, kind: str, *, several: bool) -> None:
    """To the terminal: text as soon as it is certain, other formats at the end."""
    from polymodal.core.sample import Audio
    from polymodal.core.transcript import WRITERS
    from polymodal.transcribing import heard_in

    segments: list[Segment] = []
    with bar(plain(Path(name).name), "s") as show:
        for number, heard in enumerate(heard_in(model, Audio(source, name=name), listening, progress=show)):
            if kind == "txt":
                if several and not number:
                    print(f"{plain(name)}:")
                print(plain(WRITERS["txt"](heard.segments), keep="\n"), end="", flush=True)
            segments += heard.segments
    if kind != "txt":
        print(plain(WRITERS[kind](segments), keep="\n"), end="")


def add(commands: Commands) -> None:
    """Declares the commands."""
    transcribe = command(
        commands,
        "transcribe",
        _transcribe,
        "write down what is said in files of sound or video, with times",
        """\
examples:
  polymodal transcribe meeting.wav
  polymodal transcribe talk.mp4 --format srt --out talk.srt
  polymodal transcribe *.mp3 --format vtt --words --out subtitles
  polymodal transcribe interview.ogg --language de --task translate --model openai/whisper-small
  arecord -f cd | polymodal transcribe -
An hour takes no more memory than a minute; a run that was cut goes on where it was, with --out.""",
    )
    transcribe.add_argument("files", nargs="+", metavar="FILE", help="sound or video; - reads a pipe")
    with_model(transcribe, LISTENER)
    transcribe.add_argument("--language", metavar="CODE", help="what is spoken, such as en (default: found out)")
    transcribe.add_argument(
        "--task", choices=("transcribe", "translate"), default="transcribe", help="translate: into English"
    )
    transcribe.add_argument("--words", action="store_true", help="the time of each word, in vtt and json")
    transcribe.add_argument("--format", choices=FORMATS, help="(default: that of --out, else txt)")
    transcribe.add_argument("--out", metavar="PATH", help="a file, or a folder for several")
