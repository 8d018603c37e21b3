"""A robot's side of a policy server: one connection that is kept alive, and a player that never waits for it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from jaxtyping import Float32

from polymodal.act.server import MAX_BYTES
from polymodal.act.wire import pack, unpack
from polymodal.core.errors import ConfigError, MediaError, MissingDependency, PolymodalError, UnsupportedError
from polymodal.core.observation import Observation

if TYPE_CHECKING:
    from websockets.sync.client import ClientConnection

_LONGEST_PAUSE: Final = 2.0  # seconds between two tries to connect


class LinkError(PolymodalError):
    """There is no answer: no connection, a dead one, or none in time."""


class Client:
    """Asks a policy server for chunks of actions.

    Args:
        address: such as ``ws://127.0.0.1:8000``.
        key: that the server wants.
        heartbeat: seconds between two signs of life; a link without any for as long again is dead.
        timeout: seconds in which a connection, and each answer, must come.

    Raises:
        LinkError: the server does not answer.
        ConfigError: it refuses the key or the path, or the address is none.
    """

    def __init__(self, address: str, *, key: str | None = None, heartbeat: float = 0.5, timeout: float = 5.0) -> None:
        self.address, self._key, self._heartbeat, self._timeout = address, key, heartbeat, timeout
        self._link: ClientConnection | None = None
        self._end: Callable[[], None] = lambda: None
        self.metadata: dict[str, Any] = {}
        self.connect()

    @property
    def horizon(self) -> int:
        """Steps of a chunk."""
        return self._number("horizon")

    @property
    def action_dim(self) -> int:
        return self._number("action_dim")

    def _number(self, name: str) -> int:
        if type(value := self.metadata.get(name)) is not int:
            raise UnsupportedError(f"{self.address} does not say its {name}: serve it with polymodal serve-policy")
        return value

    def connect(self) -> None:
        """Connects, again if need be."""
        try:
            from websockets.exceptions import InvalidStatus, WebSocketException
            from websockets.sync.client import connect
        except ModuleNotFoundError:
            raise MissingDependency("a policy server", "websockets", "act") from None
        self.close()
        try:
            opened = connect(
                self.address,
                additional_headers={"Authorization": f"Api-Key {self._key}"} if self._key else None,
                compression=None,
                proxy=None,
                max_size=MAX_BYTES,
                open_timeout=self._timeout,
                close_timeout=self._heartbeat,
                ping_interval=self._heartbeat,
                ping_timeout=self._heartbeat,
            )
            stack = ExitStack()
            link = stack.enter_context(opened)
        except InvalidStatus as error:
            raise ConfigError(
                f"{self.address} refuses: {error.response.body.decode(errors='replace').strip()}"
            ) from None
        except (OSError, WebSocketException, TimeoutError) as error:
            raise LinkError(f"{self.address} does not answer ({type(error).__name__})") from None
        except ValueError as error:
            raise ConfigError(f"{self.address} is no address such as ws://127.0.0.1:8000: {error}") from None
        self._link, self._end = link, stack.close
        metadata = self._unpacked()
        if not isinstance(metadata, dict):
            raise self._dead("is no policy server")
        self.metadata = metadata

    def infer(self, observation: Observation) -> Float32[np.ndarray, "horizon action_dim"]:
        """The actions of the next steps.

        Raises:
            LinkError: the link is dead; `connect` makes a new one.
            UnsupportedError: the server's policy cannot answer this observation, and why.
        """
        from websockets.exceptions import ConnectionClosed

        if self._link is None:
            raise LinkError(f"there is no link to {self.address}")
        message: dict[str, Any] = {"images": dict(observation.images), "prompt": observation.instruction}
        if observation.state is not None:
            message["state"] = observation.state
        try:
            self._link.send(pack(message))
        except (ConnectionClosed, OSError):
            raise self._dead("is gone") from None
        answer = self._unpacked()
        actions = answer.get("actions") if isinstance(answer, dict) else None
        if not isinstance(actions, np.ndarray) or actions.ndim != 2:
            raise self._dead("sends no actions")
        return actions.astype(np.float32)

    def _unpacked(self) -> Any:
        message = self._receive()
        try:
            return unpack(message)
        except MediaError as error:
            raise self._dead(f"sends {error}") from None

    def _receive(self) -> bytes:
        from websockets.exceptions import ConnectionClosed

        assert self._link is not None
        try:
            answer = self._link.recv(timeout=self._timeout)
        except TimeoutError:
            raise self._dead(f"did not answer in {self._timeout:g} s") from None
        except (ConnectionClosed, OSError):
            raise self._dead("is gone") from None
        if isinstance(answer, str):
            raise UnsupportedError(f"{self.address}: {answer}")
        return answer

    def _dead(self, what: str) -> LinkError:
        """A late answer must not be taken for that to the next question: the link is given up."""
        self.close()
        return LinkError(f"{self.address} {what}")

    def close(self) -> None:
        """Ends the connection, if there is one."""
        if self._link is not None:
            self._link = None
            self._end()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class RemotePlayer:
    """Chunks of a server as actions, a controller of `runner.run` that never waits for the network.

    A thread asks for the next chunk while the last one is carried out; what the robot did meanwhile is left out of it.
    With no action left it gives None, and the guard holds the robot. A dead link is made anew, after growing pauses.

    Args:
        client: that only this player uses.
        fps: actions a second, to tell from the times of two observations how many steps lie between them.
        execute: steps of a chunk after which the next one is asked for.
    """

    def __init__(self, client: Client, *, fps: float | int, execute: int) -> None:
        if not 1 <= execute <= client.horizon:
            raise ConfigError(f"{execute} steps of a chunk cannot be carried out: it has {client.horizon}")
        self.client, self._fps, self._execute = client, fps, execute
        self.errors: deque[str] = deque(maxlen=100)  # what went wrong with the link
        self._change = threading.Condition()
        self._open = True
        self._episode = 0
        self._question: tuple[int, Observation] | None = None
        self._busy = False
        self._chunk: tuple[float, np.ndarray] | None = None  # time of its first action
        self._thread = threading.Thread(target=self._work, name="policy link", daemon=True)
        self._thread.start()

    def reset(self) -> None:
        """An episode begins: nothing of the one before is carried out."""
        with self._change:
            self._episode += 1
            self._busy = self._busy and self._question is None  # what is being asked is on its way
            self._question = self._chunk = None

    def action(self, observation: Observation) -> Float32[np.ndarray, " action_dim"] | None:
        """The action of this control step; None if there is none."""
        with self._change:
            step = 0 if self._chunk is None else round((observation.time - self._chunk[0]) * self._fps)
            if not self._busy and (self._chunk is None or step >= self._execute):
                self._question, self._busy = (self._episode, observation), True
                self._change.notify()
            if self._chunk is None or not 0 <= step < len(self._chunk[1]):
                return None
            return self._chunk[1][step]

    def wait(self, timeout: float) -> bool:
        """Waits for the first chunk of an episode, or for the link; whether it came."""
        with self._change:
            return self._change.wait_for(lambda: not self._busy, timeout)

    def close(self) -> None:
        """Ends the thread and the connection."""
        with self._change:
            self._open = False
            self._change.notify()
        self._thread.join()
        self.client.close()

    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._question is not None or not self._open)
                if not self._open:
                    return
                assert self._question is not None
                (episode, observation), self._question = self._question, None
            chunk = self._ask(observation)
            with self._change:
                if chunk is not None and episode == self._episode:
                    self._chunk = (observation.time, chunk)
                self._busy = self._question is not None
                self._change.notify_all()

    def _ask(self, observation: Observation) -> np.ndarray | None:
        """A chunk; None where the link had to be made anew, as the observation is old then."""
        try:
            return self.client.infer(observation)
        except LinkError as error:
            self.errors.append(str(error))
        except PolymodalError as error:  # the link lives
            self.errors.append(str(error))
            return None
        pause = 0.05
        while self._open:
            try:
                self.client.connect()
                return None
            except PolymodalError as error:
                self.errors.append(str(error))
            with self._change:
                self._change.wait_for(lambda: not self._open, pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        return None
