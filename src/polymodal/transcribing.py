"""Writing down what is said in files: what was heard is kept beside the output, and a run that was cut goes on."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from io import BufferedIOBase
from pathlib import Path
from typing import Any, BinaryIO

from polymodal.core.errors import ConfigError, DataError, MediaError, UnsupportedError
from polymodal.core.files import atomic_write, file_hash, read_json, write_json
from polymodal.core.sample import Audio
from polymodal.core.transcript import WRITERS, Heard, Listening
from polymodal.core.verbs import Transcribes
from polymodal.modalities.audio import blocks, check, seconds
from polymodal.systems.base import System
from polymodal.systems.listening import BLOCK

Show = Callable[[int, int], None]  # seconds that are done, of how many


def heard_in(
    model: System,
    audio: Audio,
    listening: Listening,
    *,
    progress: Show | None = None,
    after: Heard | None = None,
) -> Iterator[Heard]:
    """What is said, window by window, in memory that does not grow with the length.

    Args:
        model: hears.
        audio: a file of sound or a clip, or an array.
        listening: how to hear it.
        progress: is told seconds done and the length.
        after: goes on behind what was heard before.

    Raises:
        UnsupportedError: the model does not transcribe, or knows no such language or task.
        MediaError: the sound cannot be decoded.
    """
    if not isinstance(model, Transcribes):
        raise UnsupportedError(f"{model.source} is a {type(model).__name__}, which does not write down speech")
    length = int(seconds(audio))
    sound = (block[0] for block in blocks(audio, model.sample_rate, BLOCK))
    for heard in model.transcribe_stream(sound, listening, after=after):
        yield heard
        if progress is not None:
            progress(min(heard.until // model.sample_rate, length), length)


def transcribe_file(
    model: System, source: str | Path, out: str | Path, listening: Listening, *, progress: Show | None = None
) -> Path:
    """Writes what is said in a file to another, in the format of its suffix: txt, srt, vtt or json.

    While it runs, ``.NAME.part`` beside ``out`` holds what was heard; the same call goes on behind it, and ends with
    the text of a run that was never cut. A sound, a model or settings that have changed begin anew.

    Args:
        model: hears.
        source: a file of sound or a clip.
        out: is there, whole, when the call has ended.
        listening: how to hear it.
        progress: is told seconds done and the length.

    Raises:
        ConfigError: no format has this suffix.
        UnsupportedError: as `heard_in`.
        MediaError: as `heard_in`; what was heard before the sound broke off is in ``out`` then.
    """
    out = Path(out)
    write = WRITERS.get(out.suffix.lower().removeprefix("."))
    if write is None:
        raise ConfigError(f"{out}: no transcript ends so; known: {', '.join(f'.{name}' for name in WRITERS)}")
    check(source)
    part = out.with_name(f".{out.name}.part")
    task = {"sound": file_hash(source), "model": model.fingerprint, "listening": asdict(listening)}
    done = _kept(part, task)
    broken: MediaError | None = None
    try:
        for heard in heard_in(model, Audio(source), listening, progress=progress, after=done[-1] if done else None):
            done.append(heard)
            write_json(part, {**task, "heard": [one.to_json() for one in done]})
    except MediaError as error:  # cut off after an hour, it may be: the hour is not kept back
        if not done:
            raise
        broken = error
    atomic_write(out, write([segment for heard in done for segment in heard.segments]))
    part.unlink(missing_ok=True)
    if broken is not None:
        raise MediaError(f"{broken}. What was heard before that is in {out}") from broken
    return out


def _kept(part: Path, task: dict[str, Any]) -> list[Heard]:
    """What a run before heard of the same task."""
    if not part.is_file():
        return []
    kept = read_json(part)
    if not isinstance(kept, dict) or any(kept.get(name) != value for name, value in task.items()):
        return []
    try:
        return [Heard.from_json(one) for one in kept["heard"]]
    except (KeyError, TypeError) as error:
        raise DataError(f"{part} is not what a transcription keeps ({error!r}): remove it to begin anew") from None


def spooled(pipe: BinaryIO | BufferedIOBase) -> Path:
    """A pipe as a temporary file, which the caller removes: containers are read back and forth.

    Raises:
        DataError: nothing came.
    """
    with tempfile.NamedTemporaryFile(prefix="polymodal-", delete=False) as file:
        try:
            shutil.copyfileobj(pipe, file)
            if not file.tell():
                raise DataError("the pipe gave nothing: there is no sound to hear")
        except BaseException:  # Ctrl-C, too: what was recorded is not left where nobody looks for it
            Path(file.name).unlink()
            raise
    return Path(file.name)
