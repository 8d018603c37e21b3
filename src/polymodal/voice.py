"""Whose voice may be copied: a recording in which its owner says so, and the record of that beside it.

The recording of the agreement is itself what the voice is copied from, so nobody can agree for somebody else's
recording. ``docs/voice.md`` says what this protects against and what not.
"""

from __future__ import annotations

import datetime as dt
import itertools
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Final

from polymodal.core.errors import ConsentError
from polymodal.core.files import file_hash, read_json, write_json
from polymodal.core.sample import Audio
from polymodal.core.sounding import Voice
from polymodal.core.transcript import Listening
from polymodal.evaluate.audio_metrics import word_error_rate
from polymodal.evaluate.spoken_text import english
from polymodal.systems.base import System
from polymodal.transcribing import heard_in

WORST: Final = 0.3  # word error rate between the phrase and what is heard: names are hard to hear
LONGEST: Final = 6  # words of a name: a long one would be most of the phrase, and anybody's talk could stand for it
_AGREES: Final = ("i", "agree")
_TURNS: Final = frozenset({"no", "not", "never", "nor", "nobody", "disagree", "refuse"})  # say the opposite


@dataclass(frozen=True, kw_only=True)
class Consent:
    """Who agreed and when (UTC), the phrase, what was heard of it, and the SHA-256 of the recording."""

    who: str
    when: str
    phrase: str
    heard: str
    sound: str


def phrase(who: str) -> str:
    """What ``who`` has to say.

    Raises:
        ConsentError: no name, or a very long one.
    """
    who = " ".join(who.split())
    if not who.isprintable() or not any(c.isalpha() for c in who):
        raise ConsentError(f"{who!r} is no name: say who agrees")
    if len(english(who).split()) > LONGEST or len(who) > 20 * LONGEST:
        raise ConsentError(f"{who[:40]!r}... is too long: a name has at most {LONGEST} words")
    return f"My name is {who}. I agree that a computer learns to speak with my voice."


def record_path(recording: str | Path) -> Path:
    """Where the record of a recording lies: beside it."""
    recording = Path(recording)
    return recording.with_name(f"{recording.name}.consent.json")


def record_consent(recording: str | Path, who: str, model: System) -> Consent:
    """Listens whether ``who`` agrees in a recording, and writes the record beside it.

    Args:
        recording: of `phrase` and nothing else.
        who: the owner of the voice.
        model: transcribes.

    Raises:
        ConsentError: something else is heard; nothing is written.
        MediaError: the recording cannot be decoded.
        UnsupportedError: the model does not transcribe.
    """
    said = phrase(who)
    windows = heard_in(model, Audio(Path(recording)), Listening(language="en"))
    heard = " ".join("".join(segment.text for window in windows for segment in window.segments).split())
    if not _fits(heard, said):
        raise ConsentError(
            f'{recording}: heard "{heard}". No consent is recorded: it has to say "{said}", that and nothing else'
        )
    now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    consent = Consent(who=" ".join(who.split()), when=now, phrase=said, heard=heard, sound=file_hash(recording))
    write_json(record_path(recording), asdict(consent))
    return consent


def consent_of(recording: str | Path) -> Consent:
    """The record of a recording.

    Raises:
        ConsentError: there is none, or it is of another sound, or it does not say what it should; the message is the
            command that makes one.
    """
    path = record_path(recording)
    command = f'Make one: polymodal consent {recording} --who "NAME"'
    if not path.is_file():
        raise ConsentError(f"{recording}: no record of its owner's consent to be copied ({path.name}). {command}")
    raw = read_json(path)
    names = {field.name for field in fields(Consent)}
    if not isinstance(raw, dict) or set(raw) != names or not all(isinstance(value, str) for value in raw.values()):
        raise ConsentError(f"{path}: not a record of consent. {command}")
    consent = Consent(**raw)
    if consent.phrase != phrase(consent.who) or not _fits(consent.heard, consent.phrase):
        raise ConsentError(f"{path}: {consent.who} does not agree in it. {command}")
    if not Path(recording).is_file() or consent.sound != file_hash(recording):
        raise ConsentError(f"{path}: a record of consent, but of another recording than {recording}. {command}")
    return consent


def consenting_voice(recording: str | Path) -> Voice:
    """A voice to speak with, whose owner agreed.

    Raises:
        ConsentError: as `consent_of`.
    """
    return Voice(Audio(Path(recording)), consent_of(recording).phrase)


def _fits(heard: str, said: str) -> bool:
    """Whether most words are those of the phrase, "I agree" among them, and none says the opposite."""
    words = english(heard).split()
    if _AGREES not in itertools.pairwise(words) or _TURNS & set(words) - set(english(said).split()):
        return False
    return word_error_rate([heard], [said]).value <= WORST
