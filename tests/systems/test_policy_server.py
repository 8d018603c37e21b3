"""A real server and real clients: openpi's own, ours, hostile ones, and one whose link dies."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from torch import Tensor
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from polymodal.act.client import Client, LinkError, RemotePlayer
from polymodal.act.guard import Guard
from polymodal.act.runner import run
from polymodal.act.server import HEALTH, PATHS, PolicyServer, ServerConfig, read_observation
from polymodal.act.wire import pack, unpack
from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError, MediaError, UnsupportedError
from polymodal.core.observation import Observation
from tests.toy_robot import FPS, LIMITS, ToyPolicy, ToyRobot

KEY = "a secret"
PICTURE = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
STATE = np.array([0.1, 0.2, 0.5, 0.0], np.float32)


@pytest.fixture(scope="module")
def server() -> Iterator[PolicyServer]:
    config = ServerConfig(port=0, key=KEY, max_bytes=1 << 20, max_clients=6)
    with PolicyServer(ToyPolicy(noise=0.01), config, metadata={"robot": "toy"}) as running:
        yield running


@pytest.fixture
def address(server: PolicyServer) -> str:
    return f"ws://127.0.0.1:{server.port}"


def view(words: str = "touch the red thing") -> Observation:
    return Observation(images={"front": PICTURE}, state=STATE, instruction=words)


def raw(**more: Any) -> dict[str, Any]:
    return {"observation/image": PICTURE, "observation/state": STATE, "prompt": "touch the red thing", **more}


def header(key: str | None = KEY) -> dict[str, str]:
    return {"Authorization": f"Api-Key {key}"}


# -- the protocol


@pytest.mark.filterwarnings(
    "ignore:connect:DeprecationWarning"
)  # of websockets 17, which openpi's client is older than
def test_openpis_own_client_drives_it(server: PolicyServer, address: str) -> None:
    client = WebsocketClientPolicy(address, api_key=KEY)
    assert client.get_server_metadata() == {"horizon": 8, "action_dim": 4, "robot": "toy"}
    generator, policy = torch.Generator().manual_seed(0), server.policy
    for turn in range(2):
        answer = client.infer(raw())
        expected = policy.act(policy.observe([view()]), generator=generator)[0].numpy()
        np.testing.assert_array_equal(answer["actions"], expected)
        assert answer["server_timing"]["infer_ms"] > 0
        assert ("prev_total_ms" in answer["server_timing"]) == (turn == 1)
    with pytest.raises(RuntimeError, match="no picture, state or prompt"):
        client.infer(raw(dance=1.0))
    assert client.infer(raw())["actions"].shape == (8, 4)  # an error does not end the connection
    client._ws.close()


@pytest.mark.parametrize("path", PATHS)
def test_both_paths_answer(path: str, address: str) -> None:
    with connect(address + path, additional_headers=header(), proxy=None) as link:
        assert unpack(link.recv())["action_dim"] == 4


def test_health_needs_no_key_and_everything_else_does(server: PolicyServer, address: str) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{HEALTH}") as answer:
        assert (answer.status, answer.read()) == (200, b"OK\n")
    for path in (*PATHS, "/nothing"):
        for headers in ({}, header("wrong"), {"Authorization": f"Bearer {KEY}"}, {"Authorization": ""}):
            with (
                pytest.raises(InvalidStatus) as refused,
                connect(address + path, additional_headers=headers, proxy=None),
            ):
                pass
            assert refused.value.response.status_code == 401
    odd = urllib.request.Request(f"http://127.0.0.1:{server.port}/", headers=header("é"))
    with pytest.raises(urllib.error.HTTPError, match="401") as plain:
        urllib.request.urlopen(odd)
    plain.value.close()
    with (
        pytest.raises(InvalidStatus) as refused,
        connect(address + "/nothing", additional_headers=header(), proxy=None),
    ):
        pass
    assert refused.value.response.status_code == 404
    with (
        pytest.raises(InvalidStatus) as refused,
        connect(address, additional_headers=header(), origin="http://example.com", proxy=None),
    ):  # a web page that somebody looks at
        pass
    assert refused.value.response.status_code == 403


def test_without_a_key_only_this_machine_is_served() -> None:
    for host in ("0.0.0.0", "192.168.0.1", "robot.local", "::"):
        with pytest.raises(ConfigError, match="key"):
            ServerConfig(host=host)
    assert ServerConfig().host == "127.0.0.1"
    with (
        PolicyServer(ToyPolicy(), ServerConfig(port=0)) as open_one,
        Client(f"ws://127.0.0.1:{open_one.port}") as client,
    ):
        assert client.infer(view()).shape == (8, 4)


# -- hostile messages


def test_a_gigabyte_is_refused_before_it_is_read(address: str) -> None:
    with connect(address, additional_headers=header(), proxy=None) as link:
        link.recv()
        head = bytes([0x82, 0xFF]) + (1 << 30).to_bytes(8, "big") + bytes(4)  # a masked frame of so many bytes
        link.socket.sendall(head + bytes(1000))
        with pytest.raises(ConnectionClosed) as closed:
            link.recv()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1009


def test_many_small_frames_do_not_add_up_to_a_large_message(address: str) -> None:
    with connect(address, additional_headers=header(), proxy=None) as link:
        link.recv()
        with pytest.raises(ConnectionClosed):  # noqa: PT012
            link.send(bytes(1 << 17) for _ in range(64))
            link.recv()


def marked(dtype: Any, data: Any, shape: Any) -> bytes:
    return msgpack.packb({"state": {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape}})


HOSTILE = {
    "objects": marked("|O", b"\0" * 8, [1]),
    "records": marked("|V8", b"\0" * 8, [1]),
    "complex": marked("<c8", b"\0" * 8, [1]),
    "texts": marked("<U2", b"\0" * 8, [1]),
    "several types": marked("<f4,<f4", b"\0" * 8, [1]),
    "a type that is none": marked(["<f4"], b"\0" * 8, [2]),
    "a huge shape": marked("<f4", b"\0" * 8, [1 << 40]),
    "a negative shape": marked("<f4", b"\0" * 8, [-2]),
    "a shape of many axes": marked("<f4", b"\0" * 4, [1] * 40),
    "fewer bytes than it says": marked("<f4", b"\0" * 4, [2]),
    "no bytes": marked("<f4", [1, 2], [2]),
    "a number of objects": msgpack.packb({"state": {b"__npgeneric__": True, b"data": 1, b"dtype": "|O"}}),
    "an overflow": msgpack.packb({"state": {b"__npgeneric__": True, b"data": 1 << 40, b"dtype": "|i1"}}),
    "an extension": msgpack.packb({"state": msgpack.ExtType(4, b"x" * 100)}),
    "half a message": pack({"state": STATE})[:-3],
    "noise": b"\xc1\xff\x00",
    "many tables": pack([[{}] * 1000, [{}] * 1000]),
    "a long list": pack({"state": [None] * 100_000}),
    "depth": b"\x91" * 100_000,
    "a pickle": b"cos\nsystem\n(S'true'\ntR.",
    "a list": pack([1, 2]),
    "numbers for names": msgpack.packb({b"state": 1}),
    "a state of two axes": pack({"state": np.zeros((2, 2), np.float32)}),
    "a picture of floats": pack({"images": {"a": np.zeros((4, 4, 3), np.float32)}}),
    "a long prompt": pack({"prompt": "a" * 5000}),
    "no state": pack({"prompt": "touch"}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_message_is_refused_and_the_next_one_answered(name: str, address: str) -> None:
    with connect(address, additional_headers=header(), proxy=None) as link:
        link.recv()
        if name != "no state":  # that the policy itself finds
            with pytest.raises(MediaError):
                read_observation(unpack(HOSTILE[name]))
            link.send(HOSTILE[name])
            assert isinstance(link.recv(), str)
        link.send(pack(raw()))
        assert unpack(link.recv())["actions"].shape == (8, 4)


def test_what_breaks_in_the_policy_tells_clients_nothing(address: str) -> None:
    with connect(address, additional_headers=header(), proxy=None) as link:
        link.recv()
        link.send(HOSTILE["no state"])  # ToyPolicy fails on it in its own way
        answer = link.recv()
        assert isinstance(answer, str)
        assert "Traceback" not in answer
        assert "log" in answer
        with pytest.raises(ConnectionClosed):
            link.recv()


def test_arrays_survive_the_wire_in_openpis_own_words() -> None:
    from openpi_client import msgpack_numpy

    rng = np.random.default_rng(0)
    for dtype in (np.uint8, np.int64, np.float16, np.float32, np.float64, bool):
        value = {"a": rng.integers(0, 2, (2, 0, 3)).astype(dtype), "b": [rng.normal(size=(3, 2)).astype(dtype)]}
        assert pack(value) == msgpack_numpy.packb(value)
        again = unpack(pack(value))
        np.testing.assert_array_equal(again["b"][0], value["b"][0])
        assert again["a"].shape == (2, 0, 3)
        assert again["a"].dtype == dtype
    assert unpack(msgpack_numpy.packb(np.float32(0.5))) == 0.5
    with pytest.raises(MediaError):
        pack({"a": np.array([object()])})
    with pytest.raises(MediaError):
        pack({"a": object()})


def test_pictures_are_read_in_all_the_ways_that_clients_write_them() -> None:
    for name in ("observation/front", "observation.images.front", "images/front", "front"):
        np.testing.assert_array_equal(read_observation({name: PICTURE}).images["front"], PICTURE)
    nested = read_observation({"images": {"front": PICTURE.transpose(2, 0, 1)}, "state": STATE.astype(np.float64)})
    np.testing.assert_array_equal(nested.images["front"], PICTURE)
    assert nested.state is not None
    assert nested.state.dtype == np.float32


# -- several clients


def test_clients_do_not_mix(server: PolicyServer, address: str) -> None:
    """Each has its own words and its own random numbers, whatever the others do at the same time."""
    policy = server.policy
    words = {"red": "touch the red thing", "blue": "touch the blue thing"}
    failed: list[str] = []

    def talk(colour: str) -> None:
        generator = torch.Generator().manual_seed(0)
        with Client(address, key=KEY) as client:
            for _ in range(25):
                expected = policy.act(policy.observe([view(words[colour])]), generator=generator)[0].numpy()
                if not np.array_equal(client.infer(view(words[colour])), expected):
                    failed.append(colour)

    threads = [threading.Thread(target=talk, args=(colour,)) for colour in ("red", "blue", "red", "blue")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_too_many_clients_are_turned_away() -> None:
    with PolicyServer(ToyPolicy(), ServerConfig(port=0, max_clients=1)) as small:
        address = f"ws://127.0.0.1:{small.port}"
        with Client(address) as first:
            with pytest.raises(LinkError):
                Client(address)
            assert first.infer(view()).shape == (8, 4)


# -- our client


def test_a_wrong_key_and_a_wrong_observation_are_said(address: str) -> None:
    with pytest.raises(ConfigError, match="key"):
        Client(address, key="wrong")
    with pytest.raises(LinkError, match="does not answer"):
        Client("ws://127.0.0.1:1", timeout=1.0)
    with Client(address, key=KEY) as client:
        with pytest.raises(UnsupportedError, match="4096"):
            client.infer(view("a" * 5000))
        assert client.infer(view()).shape == (8, 4)


class Proxy:
    """Between a client and a server: can be cut, or fall silent, and come back."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.silent = threading.Event()
        self.refuse = threading.Event()
        self._links: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                ours, _ = self._listener.accept()
            except OSError:
                return
            if self.refuse.is_set():
                ours.close()
                continue
            theirs = socket.create_connection(("127.0.0.1", self._to))
            self._links += [ours, theirs]
            for a, b in ((ours, theirs), (theirs, ours)):
                self._threads.append(threading.Thread(target=self._carry, args=(a, b), daemon=True))
                self._threads[-1].start()

    def _carry(self, a: socket.socket, b: socket.socket) -> None:
        try:
            while data := a.recv(65536):
                if not self.silent.is_set():
                    b.sendall(data)
        except OSError:
            pass

    def cut(self) -> None:
        for link in self._links:
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
            link.close()
        self._links.clear()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join()


@pytest.fixture
def proxy(server: PolicyServer) -> Iterator[Proxy]:
    between = Proxy(server.port)
    yield between
    between.close()


def test_a_link_that_only_falls_silent_is_found_by_its_heartbeat(proxy: Proxy) -> None:
    with Client(f"ws://127.0.0.1:{proxy.port}", key=KEY, heartbeat=0.2, timeout=60.0) as client:
        client.infer(view())
        proxy.silent.set()
        began = time.monotonic()
        with pytest.raises(LinkError):
            client.infer(view())
        assert time.monotonic() - began < 30, "the answer's own timeout was not what ended it"


def test_a_dead_link_stops_the_robot_and_a_new_one_moves_it_again(proxy: Proxy) -> None:
    client = Client(f"ws://127.0.0.1:{proxy.port}", key=KEY, heartbeat=0.2, timeout=5.0)
    player = RemotePlayer(client, fps=FPS, execute=4)
    env, guard = ToyRobot(), Guard(LIMITS, fps=FPS)
    raw_view, info = env.reset(seed=0)
    guard.reset(raw_view["state"])
    player.reset()

    def tick() -> np.ndarray:
        nonlocal raw_view
        now = Observation(**raw_view, instruction=info["instruction"], time=guard.now())
        command = guard(player.action(now), now)
        raw_view, *_ = env.step(command)
        return command[:3]

    def until(moves: bool) -> None:
        end = time.monotonic() + 60
        while bool(np.abs(tick()).max() > 1e-3) != moves:
            assert time.monotonic() < end
            time.sleep(0.01)

    until(moves=True)
    proxy.refuse.set()
    proxy.cut()
    until(moves=False)
    place = env.hand.copy()
    for _ in range(5):
        tick()
    np.testing.assert_allclose(env.hand, place, atol=1e-9)  # it stands
    assert guard.interventions[-1].causes == ("no action",)
    proxy.refuse.clear()
    guard.release()  # a person has looked, if it took long
    until(moves=True)
    assert player.errors
    player.close()


class Slow(ToyPolicy):
    """Takes three ticks for a chunk, and says with each action of which step it is."""

    def act(self, batch: Batch, *, generator: torch.Generator | None = None) -> Tensor:
        time.sleep(0.15)
        return super().act(batch, generator=generator)


def test_a_remote_player_runs_in_the_one_loop() -> None:
    with PolicyServer(Slow(), ServerConfig(port=0)) as slow:
        player = RemotePlayer(Client(f"ws://127.0.0.1:{slow.port}"), fps=FPS, execute=2)
        began = time.monotonic()
        guard = Guard(LIMITS, fps=FPS, clock=lambda: time.monotonic() - began)
        report = run(ToyRobot(), player, guard, episodes=1, steps=20, pace=True)
        player.close()
    held = report.interventions.get("held: no action", 0)
    assert 1 <= held < 20, "it stands until the first chunk is there, and not after"
