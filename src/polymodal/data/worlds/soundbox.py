"""Synthesisers in a process of their own: espeak-ng, flite and fluidsynth, by their C libraries.

espeak-ng carries the phase of its oscillators from one sentence to the next, fluidsynth the tails of its filters, so
that the same order never sounds twice the same. Here a small process loads a library once and forks for each order:
every sound starts from the same state, a crash of the library ends nothing but that sound, and a hundredth of a second
is all that it costs.

This file is also the program of that process (``python -I -S soundbox.py``): it imports the standard library alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import sys
import threading
import weakref
from typing import Any, Final

PACKAGES: Final = {"espeak": "espeak-ng", "flite": "flite", "fluidsynth": "libfluidsynth3"}  # Debian's names
FLITE_VOICES: Final = ("awb", "kal16", "rms", "slt")

# ---- the caller's side ----


class Soundbox:
    """A running process; one sound at a time. Threads take one each (`here`)."""

    def __init__(self) -> None:
        command = [sys.executable, "-I", "-S", __file__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._lock = threading.Lock()
        self._end = weakref.finalize(self, _stop, self._process)

    def sound(self, order: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """What a synthesiser answers to an order, and its samples of 16 bits.

        Args:
            order: ``synthesiser`` and, for speech, ``voice``, ``text``, ``rate`` (words a minute), ``pitch`` and
                ``range`` (0 to 100); for fluidsynth ``font`` (a path), ``rate`` in Hz, ``length`` in blocks of 64
                samples and ``events``: (block, "program", 0, number), (block, "on", key, velocity), (block, "off",
                key, 0).

        Returns:
            ``rate`` in Hz, ``samples`` and ``marks``: (kind, character, sample, phoneme) for espeak, where the kind is
            "word" or "phoneme"; (the token's number, first sample, last sample) for flite. fluidsynth gives none, and
            two channels, sample by sample.

        Raises:
            DataError: the library is not installed, or it cannot do this.
        """
        from polymodal.core.errors import DataError
        from polymodal.data.worlds.sources import install_command

        with self._lock:
            assert self._process.stdin
            assert self._process.stdout
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps(order).encode() + b"\n")
                self._process.stdin.flush()
            line = self._process.stdout.readline()
            answer = json.loads(line) if line else {"error": "its process has ended"}
            if "error" not in answer:
                return answer, self._process.stdout.read(2 * int(answer["samples"]))
        name = order["synthesiser"]
        if answer["error"] == "missing":
            package = PACKAGES[name]
            raise DataError(f"{package} is not installed. Run: {install_command([package])}")
        raise DataError(f"{name} cannot do this: {answer['error']} ({json.dumps(order)[:200]})")


def here() -> Soundbox:
    """This thread's process."""
    box = getattr(_OF_THREAD, "box", None)
    if box is None or _OF_THREAD.process != os.getpid():  # a forked worker must not share its parent's pipes
        box = _OF_THREAD.box = Soundbox()
        _OF_THREAD.process = os.getpid()
    return box


_OF_THREAD = threading.local()


def _stop(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe:
            pipe.close()
    process.wait()


# ---- the process ----

_Answer = tuple[dict[str, Any], bytes]
_WORD, _PHONEME = 1, 7  # espeak_EVENT_TYPE
_SYNCHRONOUS, _PHONEMES_IN_IPA, _RETURN_ON_ERROR = 2, 3, 0x8000
_UTF8, _END_PAUSE = 1, 0x1000
_RATE, _PITCH, _RANGE = 1, 3, 4  # espeak_PARAMETER


class _Id(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8))


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique", ctypes.c_uint),
        ("character", ctypes.c_int),
        ("length", ctypes.c_int),
        ("milliseconds", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user", ctypes.c_void_p),
        ("id", _Id),
    )


_HEARD = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


class _Espeak:
    def __init__(self) -> None:
        self.lib = ctypes.CDLL("libespeak-ng.so.1")
        self.rate = self.lib.espeak_Initialize(_SYNCHRONOUS, 0, None, _PHONEMES_IN_IPA | _RETURN_ON_ERROR)
        if self.rate <= 0:
            raise OSError("espeak-ng finds no voices")
        self.lib.espeak_Synth.argtypes = (
            ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint,
            ctypes.c_void_p, ctypes.c_void_p,
        )  # fmt: skip

    def sound(self, order: dict[str, Any]) -> _Answer:
        pieces: list[bytes] = []
        marks: list[tuple[str, int, int, str]] = []

        def heard(wave: Any, samples: int, events: Any) -> int:
            if wave and samples > 0:
                pieces.append(ctypes.string_at(wave, 2 * samples))
            for event in events:
                if event.type == 0:
                    break
                if event.type == _WORD and event.length:
                    marks.append(("word", event.character - 1, event.sample, ""))
                elif event.type == _PHONEME:
                    phoneme = bytes(event.id.string).decode("utf-8", "replace")
                    marks.append(("phoneme", event.character - 1, event.sample, phoneme))
            return 0

        callback = _HEARD(heard)
        self.lib.espeak_SetSynthCallback(callback)
        if self.lib.espeak_SetVoiceByName(order["voice"].encode()):
            return {"error": "no such voice"}, b""
        for parameter, name in ((_RATE, "rate"), (_PITCH, "pitch"), (_RANGE, "range")):
            self.lib.espeak_SetParameter(parameter, order[name], 0)
        text = order["text"].encode()
        if self.lib.espeak_Synth(text, len(text) + 1, 0, 1, 0, _UTF8 | _END_PAUSE, None, None):
            return {"error": "synthesis failed"}, b""
        wave = b"".join(pieces)
        return {"rate": self.rate, "samples": len(wave) // 2, "marks": marks}, wave


class _Wave(ctypes.Structure):  # cst_wave
    _fields_ = (
        ("type", ctypes.c_char_p),
        ("rate", ctypes.c_int),
        ("samples", ctypes.c_int),
        ("channels", ctypes.c_int),
        ("data", ctypes.POINTER(ctypes.c_short)),
    )


class _Flite:
    def __init__(self) -> None:
        self.lib = ctypes.CDLL("libflite.so.1", ctypes.RTLD_GLOBAL)
        ctypes.CDLL("libflite_usenglish.so.1", ctypes.RTLD_GLOBAL)
        ctypes.CDLL("libflite_cmulex.so.1", ctypes.RTLD_GLOBAL)
        for name, result in (
            ("flite_synth_text", ctypes.c_void_p),
            ("utt_wave", ctypes.POINTER(_Wave)),
            ("utt_relation", ctypes.c_void_p),
            ("relation_head", ctypes.c_void_p),
            ("item_next", ctypes.c_void_p),
            ("ffeature_float", ctypes.c_float),
            ("ffeature_string", ctypes.c_char_p),
        ):
            getattr(self.lib, name).restype = result
        self.lib.flite_init()
        self.voices = {}
        for name in FLITE_VOICES:
            register = getattr(ctypes.CDLL(f"libflite_cmu_us_{name}.so.1"), f"register_cmu_us_{name}")
            register.restype = ctypes.c_void_p
            self.voices[name] = register(None)

    def sound(self, order: dict[str, Any]) -> _Answer:
        if order["voice"] not in self.voices:
            return {"error": f"no such voice; known: {', '.join(self.voices)}"}, b""
        lib = self.lib
        utterance = ctypes.c_void_p(
            lib.flite_synth_text(order["text"].encode(), ctypes.c_void_p(self.voices[order["voice"]]))
        )
        wave = lib.utt_wave(utterance).contents

        def each(relation: bytes) -> Any:
            item = lib.relation_head(ctypes.c_void_p(lib.utt_relation(utterance, relation)))
            while item:
                yield ctypes.c_void_p(item)
                item = lib.item_next(ctypes.c_void_p(item))

        marks = []
        first = b"R:SylStructure.daughter1.daughter1.R:Segment.p.end"
        last = b"R:SylStructure.daughtern.daughtern.R:Segment.end"
        for number, token in enumerate(each(b"Token")):
            start = lib.ffeature_float(token, b"R:Token.daughter1." + first)
            end = lib.ffeature_float(token, b"R:Token.daughtern." + last)
            marks.append((number, round(start * wave.rate), round(end * wave.rate)))
        answer = {"rate": wave.rate, "samples": wave.samples, "marks": marks}
        return answer, ctypes.string_at(wave.data, 2 * wave.samples)


class _Fluidsynth:
    def __init__(self) -> None:
        self.lib = ctypes.CDLL("libfluidsynth.so.3")
        self.lib.new_fluid_settings.restype = self.lib.new_fluid_synth.restype = ctypes.c_void_p
        self.lib.fluid_settings_setnum.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_double)
        self.lib.fluid_set_log_function(2, None, None)  # no warnings of an audio driver that nobody asked for
        self.synths: dict[tuple[str, int], tuple[Any, int]] = {}

    def prepare(self, order: dict[str, Any]) -> None:
        """Reads a sound font, once for all that is forked from here."""
        key = order["font"], order["rate"]
        if key in self.synths:
            return
        settings = ctypes.c_void_p(self.lib.new_fluid_settings())
        self.lib.fluid_settings_setnum(settings, b"synth.sample-rate", float(order["rate"]))
        self.lib.fluid_settings_setnum(settings, b"synth.gain", 0.5)
        for name in (b"synth.reverb.active", b"synth.chorus.active"):
            self.lib.fluid_settings_setint(settings, name, 0)
        synth = ctypes.c_void_p(self.lib.new_fluid_synth(settings))
        self.synths[key] = synth, self.lib.fluid_synth_sfload(synth, order["font"].encode(), 1)

    def sound(self, order: dict[str, Any]) -> _Answer:
        synth, font = self.synths[order["font"], order["rate"]]
        if font < 0:
            return {"error": "not a sound font"}, b""
        lib, now, pieces = self.lib, 0, []

        def play(until: int) -> None:
            if until > now:
                piece = (ctypes.c_short * (128 * (until - now)))()
                lib.fluid_synth_write_s16(synth, 64 * (until - now), piece, 0, 2, piece, 1, 2)
                pieces.append(bytes(piece))

        for block, kind, first, second in order["events"]:
            play(block)
            now = max(now, block)
            if kind == "program":
                lib.fluid_synth_program_select(synth, 0, font, 0, second)
            elif kind == "on":
                lib.fluid_synth_noteon(synth, 0, first, second)
            else:
                lib.fluid_synth_noteoff(synth, 0, first)
        play(order["length"])
        wave = b"".join(pieces)
        return {"rate": order["rate"], "samples": len(wave) // 2}, wave


def _serve() -> None:
    """Answers orders, a line of JSON each, until its input ends."""
    known: dict[str, Any] = {}
    for line in sys.stdin.buffer:
        order = json.loads(line)
        name = order["synthesiser"]
        if name not in known:
            try:
                known[name] = {"espeak": _Espeak, "flite": _Flite, "fluidsynth": _Fluidsynth}[name]()
            except OSError:
                _write({"error": "missing"})
                continue
        if name == "fluidsynth":
            known[name].prepare(order)
        child = os.fork()
        if child == 0:
            try:
                _write(*known[name].sound(order))
            finally:
                os._exit(0)
        if os.waitpid(child, 0)[1]:
            _write({"error": "the library crashed"})


def _write(answer: dict[str, Any], wave: bytes = b"") -> None:
    sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n" + wave)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    _serve()
