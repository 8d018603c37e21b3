"""MiniWoB in a real browser, the grammar of what is done to a screen, and a chatting model as its user."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import gymnasium
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polymodal.act.envs import make
from polymodal.act.envs.web import actions, browser
from polymodal.act.envs.web.actions import GRAMMAR, KEYS, MalformedAction, ScreenAction, from_vector, parse, to_vector
from polymodal.act.screen_agent import ScreenAgent
from polymodal.core.errors import ConfigError, UnsupportedError
from polymodal.core.observation import Observation
from polymodal.modalities.image import CenterCrop, ImageProcessor, ShortestEdge

browsed = pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine")

# ---- the grammar ----

_PART = st.integers(0, 10_000).map(lambda n: n / 10_000)
_TEXT = st.text(st.characters(exclude_categories=("C", "Z")) | st.just(" "), min_size=1, max_size=actions.CHARACTERS)
_SAID = st.one_of(  # kind, numbers, text
    st.tuples(st.sampled_from(["click", "double_click", "right_click", "move"]), st.tuples(_PART, _PART), st.just("")),
    st.tuples(st.just("drag"), st.tuples(*[_PART] * 4), st.just("")),
    st.tuples(st.just("scroll"), st.tuples(*[st.integers(-10, 10).map(float)] * 2), st.just("")),
    st.tuples(st.just("type"), st.just(()), _TEXT),
    st.tuples(st.just("press"), st.just(()), st.sampled_from(KEYS)),
    st.just(("wait", (), "")),
)


@given(_SAID)
def test_text_and_vector_give_the_action_back(said: tuple[str, tuple[float, ...], str]) -> None:
    action = ScreenAction(*said)
    assert parse(str(action)) == action
    vector = to_vector(action)
    assert (vector >= actions.LOW).all()
    assert (vector <= actions.HIGH).all()
    again = from_vector(vector)
    assert (again.kind, again.text) == (action.kind, action.text)
    np.testing.assert_allclose(again.numbers, action.numbers, atol=1e-6)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "click",
            "click()",
            "click(0.5)",
            "click(0.5, 0.5, 0.5)",
            "click(0.5 0.5)",
            "click(nan, 0)",
            "click(1e-1, 0)",
        ),
        *("click(1.01, 0)", "click(-0.1, 0)", "click(0.5, 0.5) click(0.1, 0.1)", "click(x=0.5, y=0.5)", "Click(0, 0)"),
        *(
            "click(\u0660, 0)",
            "click(0_0, 0)",
            "click(0.5, 0.5); wait()",
            "wait(1)",
            "scroll(0, 11)",
            "goto('http://x')",
        ),
        *("press('F5')", "press('Alt+ArrowLeft')", "press('Control+l')", "press(Enter)", "type(hello)", "type('')"),
        *("type('a' + 'b')", "type('a\nb')", r"type('\x41')", "type('a')'", "type('\\')", "type('" + "a" * 501 + "')"),
        *("__import__('os').system('true')", "type(open('/etc/passwd').read())", "(" * 1400, "click(" + "-" * 1400),
        "click(" + " " * 1400,
        "click(" + "9" * 1_000_000 + ", 0)",
    ],
)
def test_anything_else_is_malformed(text: str) -> None:
    with pytest.raises(MalformedAction):
        parse(text)


@given(st.lists(st.floats(width=32), min_size=37, max_size=37))
def test_any_vector_is_an_action_or_malformed(numbers: list[float]) -> None:
    try:
        action = from_vector(np.array(numbers, np.float32))
    except MalformedAction:
        return
    assert action.kind in GRAMMAR
    assert np.isfinite(numbers).all()


def test_a_text_that_a_vector_cannot_hold_is_never_cut() -> None:
    with pytest.raises(MalformedAction, match="in pieces"):
        to_vector(ScreenAction("type", text="a" * (actions.CHARACTERS + 1)))


# ---- a chatting model ----


def _seen(width: int = 320, height: int = 160, task: str = "Click {x}.") -> Observation:
    return Observation(images={"screen": np.zeros((height, width, 3), np.uint8)}, instruction=task)


def test_agent_puts_places_back_through_the_models_crop() -> None:
    crop = ImageProcessor(resize=ShortestEdge(size=80), crop=CenterCrop(height=80, width=80))  # 320 x 160 -> 160 x 80
    for unit, said in (("parts", "click(0, 0.5)"), ("thousandths", "click(0, 500)"), ("pixels", "click(0, 40)")):
        agent = ScreenAgent(lambda picture, prompt, said=said: f"It is red.\nAction: `{said}`\n", unit=unit, views=crop)
        assert agent.next_action(_seen()) == ScreenAction("click", (0.25, 0.5))
        assert agent.malformed == 0


def test_agent_asks_once_more_then_waits_and_remembers_what_was_done() -> None:
    answers = iter(["I would click.", "click(62, 109)", "click(400, 0)", "press('F5')", "wait()"])
    prompts: list[str] = []

    def chat(picture: np.ndarray, prompt: str) -> str:
        assert picture.shape == (160, 320, 3)
        prompts.append(prompt)
        return next(answers)

    agent = ScreenAgent(chat, unit="pixels")
    assert agent.next_action(_seen()).numbers == pytest.approx((62 / 320, 109 / 160))
    assert "no action" in prompts[1]
    assert "no action" not in prompts[0]
    assert (agent.action(_seen()) == to_vector(actions.WAIT)).all()
    assert "Click {x}." in prompts[2]
    assert "You did so far:\nclick(62, 109)" in prompts[2]
    agent.next_action(_seen())
    assert (agent.asked, agent.malformed) == (5, 3)
    agent.reset()
    answers = iter(["wait()"])
    agent.next_action(_seen())
    assert "did nothing" in prompts[-1]


# ---- the browser ----


@pytest.fixture(scope="module")
def env() -> Iterator[object]:
    with make("miniwob/click-test-2") as env:
        yield env


def test_unknown_tasks_sizes_and_swaps_are_refused() -> None:
    with pytest.raises(ConfigError, match="click-test"):
        make("miniwob/clik-test")
    with pytest.raises(ConfigError, match="multiple of 32"):
        make("miniwob", size=100)
    with pytest.raises(UnsupportedError, match="target"):
        make("miniwob").reset(options={"swapped": True})


def test_a_missing_chromium_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UnsupportedError, match="apt-get install chromium"):
        make("miniwob").reset()


@browsed
def test_a_seed_gives_the_page_and_right_and_wrong_clicks_their_rewards(env) -> None:
    first, info = env.reset(seed=3)
    assert info["instruction"] == "Click button ONE."
    assert env.observation_space.contains(first)
    right = env.expert()()
    after, reward, done, cut, info = env.step(right)
    assert (reward, done, cut, info["success"], info["malformed"], info["failure"]) == (1.0, True, False, True, "", "")
    np.testing.assert_allclose(after["state"], right[1:3])
    assert (after["images"]["screen"][50:] > 200).mean() > 0.5, "the finished page is not covered"
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(right)

    other, _ = env.reset(seed=4)
    assert not np.array_equal(other["images"]["screen"], first["images"]["screen"])
    again, _ = env.reset(seed=3)
    assert np.array_equal(again["images"]["screen"], first["images"]["screen"])
    assert (env.expert()() == right).all()
    wrong = "() => (({left, top}) => [left + 2, top + 2])(document.querySelector('#subbtn2').getBoundingClientRect())"
    x, y = env._do(lambda page: page.evaluate(wrong))
    *_, reward, done, cut, info = env.step(f"click({x / 160:.4f}, {y / 210:.4f})")
    assert (reward, done, info["success"]) == (-1.0, True, False)


@browsed
def test_malformed_acts_do_nothing_and_episodes_are_cut_off(env) -> None:
    env.reset(seed=5)
    env.steps = 3
    try:
        *_, cut, info = env.step("click(0.5, 0.5) and more")
        assert "not an action" in info["malformed"]
        *_, cut, info = env.step(np.full(37, np.nan, np.float32))
        assert info["malformed"]
        assert not cut
        *_, done, cut, info = env.step("press('Tab')")
        assert (done, cut, info["success"], info["malformed"]) == (False, True, False, "")
    finally:
        env.steps = 30


@browsed
def test_real_keys_wheel_and_drag_reach_pages_that_share_a_browser(env) -> None:
    env.reset(seed=0)
    for task in ("scroll-text", "drag-box", "login-user"):
        with make(f"miniwob/{task}") as other:
            assert other.reset(seed=1)[1]["instruction"]
            assert other._browser is env._browser
            kinds, done = set(), False
            expert = other.expert()
            while not done:
                action = expert()
                kinds.add(from_vector(action).kind)
                _, _, done, cut, info = other.step(action)
                assert not cut
            assert info["success"], task
            assert {"scroll-text": "scroll", "drag-box": "drag", "login-user": "type"}[task] in kinds
    assert env.step("wait()")[4]["failure"] == "", "the shared browser outlives the others"


class _Notes(BaseHTTPRequestHandler):
    """Another service of this machine, which nobody should reach."""

    reached: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.reached.append(self.path)
        self.send_error(404)

    do_CONNECT = do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


_TRY = """async (port) => {
  const done = (u, options) => fetch(u, options).then((r) => r.status, () => 'no');
  for (const host of ['127.0.0.1', 'localhost', '[::1]']) {
    await done(`http://${host}:${port}/get`, {mode: 'no-cors'});
    await done(`http://${host}:${port}/post`, {mode: 'no-cors', method: 'POST'});
    await new Promise((r) => { new WebSocket(`ws://${host}:${port}/ws`).onerror = r; });
    await new Promise((r) => { const i = new Image(); i.onerror = r; i.src = `http://${host}:${port}/img`; });
  }
  return await Promise.all(['/core/core.js', '/miniwob/', '/../environment.py', '/%2e%2e/environment.py',
    '/..%2fenvironment.py', 'file:///etc/passwd'].map((u) => done(u)));
}"""


@browsed
def test_the_page_reaches_nothing_but_its_own_files(env) -> None:
    env.reset(seed=0)
    with ThreadingHTTPServer(("127.0.0.1", 0), _Notes) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        assert env._do(lambda page: page.evaluate(_TRY, other.server_port)) == [200, 403, 403, 403, 403, "no"]
        leave = f"() => {{ open('http://127.0.0.1:{other.server_port}/'); location.href = 'http://example.com/'; }}"
        env._do(lambda page: page.evaluate(leave))
        env._do(lambda page: page.wait_for_timeout(300))
        *_, done, cut, info = env.step("click(0.5, 0.5)")
        other.shutdown()
    assert _Notes.reached == []
    assert (done, cut, info["success"]) == (False, True, False)
    assert "left" in info["failure"]


@browsed
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_a_browser_that_dies_or_hangs_ends_the_episode_and_the_next_has_another(env, sent, monkeypatch) -> None:
    env.reset(seed=1)
    broken = env._browser
    pids = [p for p in _descendants(os.getpid()) if b"chromium" in Path(f"/proc/{p}/cmdline").read_bytes()]
    try:
        for pid in pids:
            os.kill(pid, sent)
        with monkeypatch.context() as m:
            m.setattr(browser, "DEADLINE", 2.0)
            *_, done, cut, info = env.step("click(0.5, 0.5)")
        assert (done, cut, info["success"]) == (False, True, False)
        assert ("did not answer" in info["failure"]) == (sent == signal.SIGSTOP)
        env.reset(seed=1)
        assert env._browser is not broken
        assert env.step(env.expert()())[4]["success"]
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@browsed
def test_it_works_in_any_thread_and_inside_an_event_loop(env) -> None:
    env.reset(seed=1)

    async def act() -> str:
        return env.step("move(0.5, 0.5)")[4]["failure"]

    assert asyncio.run(act()) == ""
    with ThreadPoolExecutor(1) as other:
        assert other.submit(env.step, "press('Tab')").result()[4]["failure"] == ""


def _descendants(pid: int) -> list[int]:
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue  # it ended meanwhile
    found, new = [], [pid]
    while new := [child for child, parent in parents.items() if parent in new]:
        found += new
    return found
