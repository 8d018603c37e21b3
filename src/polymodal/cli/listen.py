"""The command that writes down what is said: transcribe."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from polymodal.cli.common import Commands, command, load_model, with_model
from polymodal.cli.show import bar, plain, print_json

if TYPE_CHECKING:
    from polymodal.core.transcript import Listening, Segment
    from polymodal.systems.base import System

LISTENER = "polymodal/nano-whisper"
FORMATS = ("txt", "srt", "vtt", "json")


def _transcribe(arguments: argparse.Namespace) -> int:
    from polymodal.core.errors import ConfigError
    from polymodal.core.transcript import Listening
    from polymodal.modalities.audio import check
    from polymodal.transcribing import transcribe_file

    kind, outs = _outs(arguments)
    if arguments.out is None and len(arguments.files) > 1 and kind != "txt":
        raise ConfigError(f"several files as {kind}: say a folder to write to, --out FOLDER")
    listening = Listening(language=arguments.language, task=arguments.task, words=arguments.words)
    twice = sorted({str(out) for out in outs if out is not None and outs.count(out) > 1})
    if twice:
        raise ConfigError(f"two files would both be written to {twice[0]}: transcribe them to different folders")
    for name in arguments.files:
        if name != "-":
            check(Path(name).expanduser())  # told before a model is loaded and the files before are heard
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


def _outs(arguments: argparse.Namespace) -> tuple[str, list[Path | None]]:
    """The format, and where each transcript goes: to the file that ``--out`` names, or into the folder."""
    from polymodal.core.errors import ConfigError

    names, kind = arguments.files, arguments.format or "txt"
    if arguments.out is None:
        return kind, [None] * len(names)
    out = Path(arguments.out).expanduser()
    ending = out.suffix.lower().removeprefix(".")
    if out.is_dir() or not ending:
        return kind, [out / f"{'pipe' if name == '-' else Path(name).stem}.{kind}" for name in names]
    if len(names) > 1 or ending not in FORMATS:
        raise ConfigError(
            f"--out {out}: a transcript of one file ends in .{', .'.join(FORMATS)}; a folder has no ending, or is there"
        )
    if arguments.format not in (None, ending):
        raise ConfigError(f"--out {out} ends otherwise than --format {kind}: leave out one of them")
    return ending, [out]


@contextlib.contextmanager
def _source(name: str) -> Iterator[Path]:
    """The file, or the pipe as one."""
    from polymodal.transcribing import spooled

    if name != "-":
        yield Path(name).expanduser()
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
    if kind == "json":
        print_json(json.loads(WRITERS[kind](segments)))  # what `plain` makes of odd letters is no JSON
    elif kind != "txt":
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
  arecord -d 60 -f cd | polymodal transcribe -    a minute from the microphone
The default model knows synthetic voices of English alone: for people take openai/whisper-small or larger.
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
