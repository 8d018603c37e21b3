"""Serves a policy over a websocket as openpi does: its metadata first, then a chunk for each observation."""

from __future__ import annotations

import hmac
import ipaddress
import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from polymodal.act.wire import pack, unpack
from polymodal.core.errors import ConfigError, MediaError, MissingDependency, PolymodalError
from polymodal.core.observation import Observation
from polymodal.core.verbs import Acts, history_of

if TYPE_CHECKING:
    from websockets.http11 import Request, Response
    from websockets.sync.server import Server, ServerConnection

PATHS: Final = ("/", "/v1/realtime/robot/openpi")
HEALTH: Final = "/healthz"
MAX_BYTES: Final = 32 << 20  # of a message: ten pictures of 1024 x 1024
MAX_CLIENTS: Final = 16
MAX_PROMPT: Final = 4096  # characters
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Where a server listens and what it takes.

    Attributes:
        key: what clients must send (``Authorization: Api-Key KEY``). Needed on any address but this machine's own.
        max_bytes: of one message; a longer one ends the connection before it is read.
        max_clients: connected at once.
        seed: of policies that sample: a client that connects and asks the same gets the same.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    key: str | None = None
    max_bytes: int = MAX_BYTES
    max_clients: int = MAX_CLIENTS
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.port < 1 << 16:
            raise ConfigError(f"a port is from 0 to {(1 << 16) - 1}, not {self.port}")
        if not self.key and not _is_loopback(self.host):
            raise ConfigError(f"{self.host} can be reached by others: give a key, or listen on 127.0.0.1")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class PolicyServer:
    """Answers any number of robots with one policy, one at a time; nothing of one client reaches another.

    Use as a context manager (it then serves in a thread), or call `serve_forever`.

    Args:
        policy: what acts.
        metadata: sent to each client that connects, beside the shape of the actions.
    """

    def __init__(self, policy: Acts, config: ServerConfig, *, metadata: Mapping[str, Any] | None = None) -> None:
        self.policy, self.config = policy, config
        self.metadata = {"horizon": policy.horizon, "action_dim": policy.action_dim, **(metadata or {})}
        self._policy_lock = threading.Lock()
        self._clients = 0
        self._count_lock = threading.Lock()
        self._server = self._listen()
        self._thread: threading.Thread | None = None

    @property
    def port(self) -> int:
        """The one that is listened on: another than asked for, if that was 0."""
        return self._server.socket.getsockname()[1]

    def serve_forever(self) -> None:
        """Serves until `close` is called from another thread."""
        self._server.serve_forever()

    def close(self) -> None:
        """Takes no more connections, and ends the open ones."""
        self._server.shutdown()

    def __enter__(self) -> PolicyServer:
        self._thread = threading.Thread(target=self.serve_forever, name="policy server", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        assert self._thread is not None
        self._thread.join()

    def _listen(self) -> Server:
        try:
            from websockets.sync.server import serve
        except ModuleNotFoundError:
            raise MissingDependency("serving a policy", "websockets", "act") from None
        return serve(
            self._talk,
            self.config.host,
            self.config.port,
            process_request=self._admit,
            origins=[None],  # a web page that a browser shows must not move a robot
            compression=None,
            max_size=self.config.max_bytes,
            max_queue=1,
            server_header=None,
        )

    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        path = request.path.partition("?")[0]
        if path == HEALTH:
            return connection.respond(HTTPStatus.OK, "OK\n")
        if self.config.key is not None:
            given = request.headers.get_all("Authorization")
            expected = f"Api-Key {self.config.key}".encode()
            if len(given) != 1 or not hmac.compare_digest(given[0].encode("utf-8", "surrogateescape"), expected):
                return connection.respond(HTTPStatus.UNAUTHORIZED, "the key is missing or wrong\n")
        if path not in PATHS:
            return connection.respond(HTTPStatus.NOT_FOUND, f"there are {', '.join(PATHS)}\n")
        return None

    def _talk(self, connection: ServerConnection) -> None:
        with self._count_lock:
            self._clients += 1
            full = self._clients > self.config.max_clients
        try:
            if full:
                connection.close(1013, "too many clients")
            else:
                self._answer(connection)
        finally:
            with self._count_lock:
                self._clients -= 1

    def _answer(self, connection: ServerConnection) -> None:
        from websockets.exceptions import ConnectionClosed

        generator = torch.Generator().manual_seed(self.config.seed)
        past: deque[Observation] = deque(maxlen=history_of(self.policy) - 1)
        before: float | None = None
        try:
            connection.send(pack(self.metadata))
            for message in connection:
                began = time.perf_counter()
                try:
                    answer = self._infer(message, past, generator)
                except PolymodalError as error:
                    connection.send(str(error))  # openpi's clients raise what comes as text
                    continue
                except Exception:
                    _logger.exception("the policy failed")
                    connection.send("the policy failed; its server's log says why")
                    connection.close(1011, "the policy failed")
                    return
                if before is not None:
                    answer["server_timing"]["prev_total_ms"] = before
                connection.send(pack(answer))
                before = (time.perf_counter() - began) * 1e3
        except ConnectionClosed:
            pass

    def _infer(self, message: str | bytes, past: deque[Observation], generator: torch.Generator) -> dict[str, Any]:
        if isinstance(message, str):
            raise MediaError("an observation comes as msgpack, not as text")
        observation = read_observation(unpack(message))
        if past and past[-1].instruction != observation.instruction:
            past.clear()  # the protocol has no word for a new episode
        batch = self.policy.observe([replace(observation, past=tuple(past))])
        past.append(observation)
        began = time.perf_counter()
        with self._policy_lock, torch.no_grad():
            actions = self.policy.act(batch, generator=generator)
        took = (time.perf_counter() - began) * 1e3
        return {"actions": actions[0].float().cpu().numpy(), "server_timing": {"infer_ms": took}}


def read_observation(raw: Any) -> Observation:
    """An observation as openpi's clients write it.

    Pictures lie in ``images`` (by camera), or under names such as ``observation/image``; they are uint8, their channels
    last or first. The state is ``state`` or ``observation/state``, the instruction ``prompt``.

    Raises:
        MediaError: it has none of these, or something that is no picture, state or text.
    """
    if not isinstance(raw, Mapping) or not all(isinstance(name, str) for name in raw):
        raise MediaError("an observation is a table with names")
    images: dict[str, np.ndarray] = {}
    state, instruction, moment = None, "", 0.0
    for name, value in raw.items():
        plain = name.removeprefix("observation/").removeprefix("observation.")
        if plain == "images" and isinstance(value, Mapping):
            images |= {str(camera): _picture(picture, str(camera)) for camera, picture in value.items()}
        elif plain == "prompt" and isinstance(value, str):
            if len(value) > MAX_PROMPT:
                raise MediaError(f"an instruction of more than {MAX_PROMPT} characters")
            instruction = value
        elif plain == "time" and isinstance(value, float):
            moment = value
        elif plain == "state":
            state = _state(value)
        elif isinstance(value, np.ndarray):
            camera = plain.removeprefix("images/").removeprefix("images.")
            images[camera] = _picture(value, camera)
        else:
            raise MediaError(f"{name[:40]!r} is no picture, state or prompt")
    return Observation(images=images, state=state, instruction=instruction, time=moment)


def _picture(value: Any, camera: str) -> np.ndarray:
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3 and value.size:
        if value.shape[-1] == 3:
            return value
        if value.shape[0] == 3:
            return np.ascontiguousarray(value.transpose(1, 2, 0))
    raise MediaError(f"{camera[:40]}: a picture is uint8 (height, width, 3)")


def _state(value: Any) -> np.ndarray | None:
    if value is None:
        return None
    row: Sequence[float] | np.ndarray = value
    if not isinstance(row, np.ndarray) or row.ndim != 1 or row.dtype.kind not in "iuf":
        raise MediaError("a state is a vector of numbers")
    return row.astype(np.float32)
