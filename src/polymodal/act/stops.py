"""Ways to stop a robot beside the guard's own: a watch-dog on the control loop, signals, a key."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TextIO

from jaxtyping import Float32
from numpy import ndarray

from polymodal.act.guard import Guard
from polymodal.core.errors import UnsupportedError

_logger = logging.getLogger(__name__)


@contextlib.contextmanager
def watchdog(guard: Guard, send: Callable[[Float32[ndarray, " action_dim"]], object], timeout: float) -> Iterator[None]:
    """Stops the robot when the control loop does not ask the guard for ``timeout`` seconds.

    While the loop is silent it sends the commands of the stop itself, in its own thread, at the guard's rate; one that
    cannot be sent does not keep it from the next. A loop that comes back sends the rest of the stop.

    Args:
        guard: of the loop.
        send: gives a command to the motors. It must be safe to call from another thread.
        timeout: in seconds; several ticks.
    """
    done = threading.Event()
    guard.touched = time.monotonic()

    def look() -> None:
        ours: float | None = None  # when this thread asked the guard last, if it speaks for the loop
        while not done.wait(min(timeout / 4, 1 / guard.fps) if ours is None else 1 / guard.fps):
            if guard.touched != ours and time.monotonic() - guard.touched <= timeout:
                ours = None  # of two that send, the robot would get twice the motion of a tick
                continue
            guard.stop(f"watch-dog: the control loop was silent for {timeout:g} s")
            try:
                command = guard(None, None)
                ours = guard.touched
                send(command)
            except Exception:
                _logger.exception("the watch-dog could not send a command")

    thread = threading.Thread(target=look, name="watch-dog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextlib.contextmanager
def stop_on_signals(
    guard: Guard, signals: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
) -> Iterator[None]:
    """Signals stop the robot instead of the program; a second one does what it did before. In the main thread only."""
    before: dict[int, Any] = {each: signal.getsignal(each) for each in signals}

    def stop(number: int, frame: FrameType | None) -> None:
        guard.stop(f"emergency stop: {signal.Signals(number).name}")
        signal.signal(number, before[number])

    try:
        for each in signals:
            signal.signal(each, stop)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def stop_on_key(guard: Guard, stream: TextIO = sys.stdin) -> Iterator[None]:
    """Any key that is pressed in a terminal stops the robot.

    Raises:
        UnsupportedError: the stream is no terminal.
    """
    if not stream.isatty():
        raise UnsupportedError("a key can only be pressed in a terminal: the standard input is none")
    import termios
    import tty

    terminal, (wake, end) = stream.fileno(), os.pipe()
    before = termios.tcgetattr(terminal)

    def listen() -> None:
        ready, _, _ = select.select([terminal, wake], [], [])
        if terminal in ready:
            guard.stop("emergency stop: a key")  # or a terminal that is gone
            os.read(terminal, 64)

    tty.setcbreak(terminal)
    thread = threading.Thread(target=listen, name="stop key", daemon=True)
    thread.start()
    try:
        yield
    finally:
        os.write(end, b".")
        thread.join()
        os.close(wake)
        os.close(end)
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
