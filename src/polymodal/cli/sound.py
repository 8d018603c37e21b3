"""The commands that make sound: music, speak (what they make is marked), consent; and detect-watermark."""

from __future__ import annotations

import argparse
import contextlib
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from polymodal.cli.common import Commands, command, count, load_model, with_json, with_model
from polymodal.cli.listen import LISTENER
from polymodal.cli.show import bar, plain, print_json
from polymodal.core.errors import ConsentError, PolymodalError, UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

    from polymodal.core.sounding import Voice

COMPOSER = "facebook/musicgen-small"
WATCHED, PIECE = 16_000, 30  # samples a second and seconds that the detector looks at, at a time


def _music(arguments: argparse.Namespace) -> int:
    return _make(arguments, arguments.model or COMPOSER)


def _speak(arguments: argparse.Namespace) -> int:
    if arguments.voice is None:
        return _make(arguments, arguments.model)
    from polymodal.voice import consenting_voice

    return _make(arguments, arguments.model, consenting_voice(Path(arguments.voice).expanduser()))


def _consent(arguments: argparse.Namespace) -> int:
    from polymodal.voice import phrase, record_consent, record_path

    recording, words = Path(arguments.file).expanduser(), phrase(arguments.who)
    if not recording.exists():
        raise ConsentError(f'{recording} does not exist. Record these words, nothing else: "{words}"')
    consent = record_consent(recording, arguments.who, load_model(arguments.model or LISTENER))
    print(f'{plain(str(record_path(recording)))}: {plain(consent.who)} agreed: "{plain(consent.heard)}"')
    return 0


def _detect_watermark(arguments: argparse.Namespace) -> int:
    from polymodal.core.sample import Audio
    from polymodal.modalities.audio import blocks, check
    from polymodal.modalities.watermark import Detection, detect_watermark

    found = []
    for name in arguments.files:
        path = Path(name).expanduser()
        try:
            check(path)
            pieces = [detect_watermark(piece, WATCHED) for piece in blocks(Audio(path), WATCHED, PIECE)]
        except PolymodalError as error:  # the others are still looked at
            print("polymodal: " + plain(str(error), keep="\n"), file=sys.stderr)
            continue
        best = max(pieces, key=lambda piece: piece.score)
        alarm = min(1.0, best.false_alarm * len(pieces))  # every piece was one more chance to be wrong
        found.append((name, Detection(score=best.score, false_alarm=alarm)))
    if arguments.json:
        print_json([{"path": n, "marked": d.marked, "score": d.score, "false_alarm": d.false_alarm} for n, d in found])
    else:
        for name, one in found:
            chance = f"; chance reaches it with a probability below {one.false_alarm:.0e}" if one.marked else ""
            verdict = "watermark of Polymodal" if one.marked else "no watermark found"
            print(f"{plain(name)}: {verdict} (score {one.score:.1f}{chance})")
    return int(len(found) < len(arguments.files))


def _make(arguments: argparse.Namespace, name: str, voice: Voice | None = None) -> int:
    """Writes sound block by block while the model goes on."""
    from polymodal.core.sounding import Sounding
    from polymodal.core.verbs import Sounds
    from polymodal.modalities.audio import check_out
    from polymodal.modalities.watermark import watermarked

    if arguments.out != "-":
        check_out(Path(arguments.out).expanduser())  # told before a model is loaded
    sounding = Sounding(
        seconds=arguments.seconds, seed=arguments.seed, guidance=arguments.guidance, temperature=arguments.temperature,
        top_k=arguments.top_k,
    )  # fmt: skip
    model = load_model(name)
    if not isinstance(model, Sounds):
        raise UnsupportedError(f"{plain(name)} is a {type(model).__name__}, which makes no sound")
    rate, done = model.sample_rate, 0
    blocks = watermarked(model.sound(arguments.text, sounding, voice=voice), rate)
    with bar("sound", "s") as show, _output(arguments.out, rate, model.channels) as add:
        for block in blocks:
            add(block)
            done += block.shape[1]
            show(done // rate, max(done // rate, round(arguments.seconds or 0)))
    if arguments.out != "-":
        print(f"{plain(arguments.out)}: {done / rate:.2f} s")
    return 0


def _output(out: str, rate: int, channels: int) -> contextlib.AbstractContextManager[Callable[[Tensor], None]]:
    from polymodal.modalities.audio import writing

    return _pipe(rate, channels) if out == "-" else writing(Path(out).expanduser(), rate, channels)


@contextlib.contextmanager
def _pipe(rate: int, channels: int) -> Iterator[Callable[[Tensor], None]]:
    """WAV of 16 bits for a player that reads a pipe: the header says that it has no end."""
    out, endless = sys.stdout.buffer, 2**32 - 1
    frame = 2 * channels
    out.write(b"RIFF" + struct.pack("<I", endless) + b"WAVEfmt ")
    out.write(struct.pack("<IHHIIHH", 16, 1, channels, rate, rate * frame, frame, 16))
    out.write(b"data" + struct.pack("<I", endless))

    def add(wave: Tensor) -> None:
        out.write((wave.T.clamp(-1, 1) * 32767).round().cpu().numpy().astype("<i2").tobytes())
        out.flush()

    yield add


def add(commands: Commands) -> None:
    """Declares the commands."""
    music = command(
        commands, "music", _music, "make music of a description",
        """\
examples:
  polymodal music "slow piano" --out piano.wav --seconds 10
  polymodal music "rock with loud guitars" --out rock.flac --seed 7 --guidance 4
  polymodal music "a flute at dawn" --out -  | ffplay -
The sound comes while it is being made; it carries a watermark, made not to be heard (docs/voice.md).""",
    )  # fmt: skip
    music.add_argument("text", metavar="PROMPT", help="what is to be heard")
    with_model(music, COMPOSER)
    speak = command(
        commands, "speak", _speak, "say a text",
        """\
examples:
  polymodal speak "hello" --model runs/valle --out hello.wav
  polymodal speak "hello" --model runs/valle --voice me.wav --out hello.wav     after `polymodal consent me.wav`
  polymodal speak "good morning" --model runs/valle --out -  | ffplay -
The sound comes a sentence at a time; it carries a watermark, made not to be heard (docs/voice.md).""",
    )  # fmt: skip
    speak.add_argument("text", metavar="TEXT", help="what is to be said")
    speak.add_argument("--model", metavar="NAME", required=True, help="a folder or a Hub name")
    speak.add_argument("--voice", metavar="FILE", help="whose voice: needs a record of their consent")
    for sub, most in ((music, "how long (default: 15)"), (speak, "the most that it may take")):
        sub.add_argument("--out", metavar="FILE", required=True, help="wav, flac, ogg or mp3; - is a pipe of wav")
        sub.add_argument("--seconds", type=float, metavar="S", help=most)
        sub.add_argument("--seed", type=int, metavar="N", help="the same one makes the same sound (default: a new one)")
        sub.add_argument(
            "--temperature", type=float, metavar="X", help="0 takes what is the most probable (default: 1)"
        )
        sub.add_argument(
            "--top-k", type=count, metavar="K", help="draw from the best K codes (default: the model's own)"
        )
    music.add_argument(
        "--guidance", type=float, metavar="X", help="how closely to follow PROMPT; 1 is none (default: 3)"
    )
    speak.set_defaults(guidance=None)
    consent = command(
        commands, "consent", _consent, "record that somebody lets their voice be copied",
        """\
examples:
  polymodal consent me.wav --who "Ada Lovelace"      without me.wav it says what to record
  polymodal consent me.wav --who Ada --model openai/whisper-base
What is said in FILE is written down and compared; the record is written beside it. The default model knows
synthetic voices alone: to hear a person take openai/whisper-base or larger.""",
    )  # fmt: skip
    consent.add_argument("file", metavar="FILE", help="a recording of the agreement, by the owner of the voice")
    consent.add_argument("--who", metavar="NAME", required=True, help="who agrees")
    with_model(consent, LISTENER)
    detect = command(
        commands, "detect-watermark", _detect_watermark, "look for the watermark of Polymodal in sound",
        """\
examples:
  polymodal detect-watermark hello.wav
  polymodal detect-watermark *.mp3 --json
A sound without it may yet be made by a machine; a second of sound is about the least: see docs/voice.md.""",
    )  # fmt: skip
    detect.add_argument("files", nargs="+", metavar="FILE", help="sound, or video with sound")
    with_json(detect)
