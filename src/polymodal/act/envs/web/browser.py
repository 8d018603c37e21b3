"""One Chromium for all pages of a process, behind a door of its own that leads nowhere else.

Every request of the browser, loopback included, goes to one small proxy on 127.0.0.1. It serves the files of one
folder under a made-up host name and refuses all else: no page, and no action on it, reaches a network or another local
service.
"""

from __future__ import annotations

import atexit
import os
import queue
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from concurrent.futures import TimeoutError as FutureTimeout
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar
from urllib.parse import urlsplit

from polymodal.core.errors import MissingDependency, PolymodalError, UnsupportedError

if TYPE_CHECKING:
    from playwright.sync_api import Page, Playwright

T = TypeVar("T")
HOST: Final = "pages.test"  # .test never resolves
DEADLINE: Final = 120.0  # seconds for one piece of work in the browser
TIMEOUT: Final = 60_000.0  # milliseconds for one call of Playwright: a busy machine starts a browser slowly


class BrowserError(PolymodalError):
    """The browser died, hangs, or its page failed."""


def executable() -> str:
    """The Chromium of this machine.

    Raises:
        UnsupportedError: there is none.
    """
    for name in ("chromium", "/usr/bin/chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    raise UnsupportedError("no Chromium on this machine: apt-get install chromium, or put `chromium` on the PATH")


class _Files(SimpleHTTPRequestHandler):
    """A proxy that knows one host, whose files lie in a folder."""

    protocol_version = "HTTP/1.1"

    def send_head(self) -> Any:
        url = urlsplit(self.path)
        self.path = url.path
        if url.netloc != HOST or not Path(self.translate_path(url.path)).is_file():
            self.send_error(403)
            return None
        return super().send_head()

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Browser:
    """A Chromium in a thread of its own, so that it can be used from any thread and from inside an event loop.

    A browser that failed once is not used again: whoever holds it gets a `BrowserError`, and `shared` starts another.
    """

    _shared: ClassVar[Browser | None] = None
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, folder: Path) -> None:
        """Raises:
        MissingDependency: Playwright is not installed.
        UnsupportedError: there is no Chromium.
        BrowserError: it does not start.
        """
        try:
            from playwright.sync_api import sync_playwright
        except ModuleNotFoundError as e:
            raise MissingDependency("a browser environment", "playwright", "miniwob") from e
        program = executable()
        self.folder, self.pid, self.dead = folder, os.getpid(), False
        self._pages = 0
        self._playwright: Playwright | None = None
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Files, directory=str(folder)))
        threading.Thread(target=self._server.serve_forever, name="pages", daemon=True).start()
        threading.Thread(target=self._work, name="browser", daemon=True).start()

        def start() -> None:
            self._playwright = sync_playwright().start()
            self._chromium = self._playwright.chromium.launch(
                executable_path=program,
                chromium_sandbox=os.geteuid() != 0,  # root has none: Chromium does not start with it
                proxy={"server": f"http://127.0.0.1:{self._server.server_port}", "bypass": "<-loopback>"},
                args=["--force-webrtc-ip-handling-policy=disable_non_proxied_udp", "--disable-quic"],
                timeout=TIMEOUT,
            )

        try:
            self.do(start)
        except BaseException:
            self.close()
            raise
        atexit.register(self.close)

    @classmethod
    def shared(cls, folder: Path) -> Browser:
        """The living browser of this process for a folder; a new one where there is none."""
        with cls._lock:
            held = cls._shared
            if held is None or held.dead or held.pid != os.getpid() or held.folder != folder:
                held = cls._shared = cls(folder)
            return held

    def do(self, work: Callable[[], T]) -> T:
        """Runs work with pages where that may be done.

        Raises:
            BrowserError: the browser is dead, or died of this.
        """
        from playwright.sync_api import Error

        if self.dead:
            raise BrowserError("the browser is gone; reset() starts another")
        future: Future[T] = Future()
        self._jobs.put((future, work))
        try:
            return future.result(DEADLINE)
        except FutureTimeout:
            self.close(0.0)
            raise BrowserError(f"the browser did not answer within {DEADLINE:g} s") from None
        except Error as e:
            self.close()
            raise BrowserError(f"the browser failed: {e.message.splitlines()[0]}") from e

    def open(self, *, width: int, height: int, scale: float) -> Page:
        """A page of its own, with cookies and storage of its own; for `do`."""

        def work() -> Page:
            context = self._chromium.new_context(
                viewport={"width": width, "height": height},
                device_scale_factor=scale,
                locale="en-US",
                timezone_id="UTC",
                accept_downloads=False,
            )
            context.set_default_timeout(TIMEOUT)
            page = context.new_page()
            page.on("popup", lambda other: other.close())
            self._pages += 1
            return page

        return self.do(work)

    def release(self, page: Page) -> None:
        """Closes a page; the last one takes the browser with it."""
        if self.dead or self.pid != os.getpid():
            return

        def work() -> int:
            page.context.close()
            self._pages -= 1
            return self._pages

        if not self.do(work):
            self.close()

    def close(self, patience: float = DEADLINE) -> None:
        """Ends the browser, its thread and the proxy; nothing happens to one that has ended."""
        if self.dead or self.pid != os.getpid():
            return
        self.dead = True
        atexit.unregister(self.close)
        ended: Future[None] = Future()
        self._jobs.put((ended, self._end))
        self._jobs.put(None)
        wait([ended], patience)
        self._server.shutdown()
        self._server.server_close()

    def _end(self) -> None:
        if self._playwright is not None:
            self._playwright.stop()  # and with it the Chromium, also a dead one

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, work = job
            try:
                future.set_result(work())
            except BaseException as e:
                future.set_exception(e)
